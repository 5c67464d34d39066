"""A small Hub on a local port: the endpoints that publishing and loading a model use, kept in memory.

Written from what huggingface_hub sends and expects (1.11, 1.27, 2.4). It records every request, and can be
told to fail, or to stall in the middle of an upload.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

OWNER = "me"
LFS = re.compile(r"\.(safetensors|png|bin)$")


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Fault:
    """Answer `times` requests that match with `status` instead of serving them; -1 drops the connection.

    -2 serves the request, then drops the connection: the client never learns that it was done.
    """

    match: str
    status: int
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "no"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=lambda: ["1" * 40])


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def oid_of(path: str, data: bytes) -> str:
    return sha256(data) if LFS.search(path) else git_oid(data)


class Refusal(Exception):
    def __init__(self, status: int, message: str, **headers: str) -> None:
        self.status, self.message, self.headers = status, message, headers


class Hub:
    """The state of the server, and its answers: a JSON value, or bytes and headers."""

    def __init__(self, token: str) -> None:
        self.token, self.address = token, ""
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.on_request: Callable[[Request], None] = lambda request: None  # called before each answer
        self.stall_at: str | None = None  # an object's sha256: its PUT is read in part, then waits
        self.stalled, self.released = threading.Event(), threading.Event()
        repo = r"(?P<repo>[\w.-]+/[\w.-]+)"
        self.routes: dict[str, Callable[..., Any]] = {
            r"GET /api/whoami-v2": self.whoami,
            r"POST /api/repos/create": self.create,
            r"POST /api/validate-yaml": self.validate,
            rf"GET /api/models/{repo}/tree/[^/]+(?P<folder>/.*)?": self.tree,
            rf"POST /api/models/{repo}/preupload/[^/]+": self.preupload,
            rf"POST /api/models/{repo}/commit/[^/]+": self.commit,
            rf"GET /api/models/{repo}(/revision/[^/]+)?": self.info,
            rf"POST /{repo}\.git/info/lfs/objects/batch": self.batch,
            r"PUT /lfs/(?P<oid>[0-9a-f]{64})": self.put,
            rf"(HEAD|GET) /{repo}/resolve/[^/]+/(?P<file>.+)": self.resolve,
        }

    def sent(self, method: str, pattern: str) -> list[Request]:
        """The requests that match, in order."""
        return [r for r in self.requests if r.method == method and re.search(pattern, r.path)]

    def serve(self, request: Request) -> Any:
        """The answer; None drops the connection."""
        self.on_request(request)
        asked = f"{request.method} {request.path}"
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.match, asked):
                fault.times -= 1
                if fault.status == -2:
                    self.route(request, asked)
                if fault.status < 0:
                    return None
                raise Refusal(fault.status, fault.message, **fault.headers)
        return self.route(request, asked)

    def route(self, request: Request, asked: str) -> Any:
        tried = ((re.fullmatch(pattern, asked), act) for pattern, act in self.routes.items())
        found, act = next(((found, act) for found, act in tried if found), (None, None))
        if found is None:
            raise Refusal(404, f"no such endpoint {asked}")
        open_to_all = request.path.startswith(("/api/validate-yaml", "/lfs/"))
        if not open_to_all and request.headers.get("authorization") != f"Bearer {self.token}":
            raise Refusal(401, "Invalid credentials in Authorization header")
        names = {name: value for name, value in found.groupdict().items() if value is not None}
        if names.get("repo", OWNER) not in (OWNER, *self.repositories):
            raise Refusal(404, "Repository not found", **{"X-Error-Code": "RepoNotFound"})
        return act(request, **names)

    def whoami(self, request: Request) -> Any:
        return {"type": "user", "id": "1", "name": OWNER, "fullname": OWNER, "orgs": [], "auth": {}}

    def create(self, request: Request) -> Any:
        asked = json.loads(request.body)
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        if name in self.repositories:
            raise Refusal(409, "You already created this model repo")
        private = asked.get("private", asked.get("visibility") == "private")
        self.repositories[name] = Repository(private, {".gitattributes": b"*.safetensors filter=lfs\n"})
        return {"url": f"{self.address}/{name}", "name": name, "id": name}

    def validate(self, request: Request) -> Any:
        data = yaml.safe_load(json.loads(request.body)["content"].split("---")[1])
        if not isinstance(data.get("license"), str):
            raise Refusal(400, "license must be a string")
        return {"errors": [], "warnings": []}

    def tree(self, request: Request, repo: str, folder: str = "") -> Any:
        files = self.repositories[repo].files
        found = {path: data for path, data in files.items() if path.startswith(folder.strip("/"))}
        if folder and not found:
            raise Refusal(404, "Entry not found", **{"X-Error-Code": "EntryNotFound"})
        return [
            {"type": "file", "path": name, "size": len(data), "oid": git_oid(data)}
            for name, data in found.items()
        ]

    def info(self, request: Request, repo: str) -> Any:
        held = self.repositories[repo]
        files = [{"rfilename": path} for path in sorted(held.files)]
        return {"id": repo, "sha": held.commits[-1], "private": held.private, "siblings": files, "tags": []}

    def preupload(self, request: Request, repo: str) -> Any:
        held, files = self.repositories[repo].files, []
        for path in (asked["path"] for asked in json.loads(request.body)["files"]):
            oid = oid_of(path, held[path]) if path in held else None
            mode = "lfs" if LFS.search(path) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def batch(self, request: Request, repo: str) -> Any:
        objects = []
        for asked in json.loads(request.body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.address}/lfs/{asked['oid']}"}}}
            known = {"oid": asked["oid"], "size": asked["size"]}
            objects.append(known if asked["oid"] in self.objects else known | upload)
        return {"transfer": "basic", "objects": objects}

    def put(self, request: Request, oid: str) -> Any:
        if sha256(request.body) != oid:
            raise Refusal(400, "content does not match its oid")
        self.objects[oid] = request.body
        return {}

    def commit(self, request: Request, repo: str) -> Any:
        held = self.repositories[repo]
        files = dict(held.files)
        for item in map(json.loads, request.body.splitlines()):
            value = item["value"]
            if item["key"] == "header" and value.get("parentCommit", held.commits[-1]) != held.commits[-1]:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        held.files = files
        held.commits.append(hashlib.sha1(request.body).hexdigest())
        url = f"{self.address}/{repo}/commit/{held.commits[-1]}"
        return {"success": True, "commitOid": held.commits[-1], "commitUrl": url}

    def resolve(self, request: Request, repo: str, file: str) -> Any:
        held = self.repositories[repo]
        if unquote(file) not in held.files:
            raise Refusal(404, "Entry not found", **{"X-Error-Code": "EntryNotFound"})
        data = held.files[unquote(file)]
        etag = f'"{oid_of(file, data)}"'
        return data, {"ETag": etag, "X-Repo-Commit": held.commits[-1], "Accept-Ranges": "bytes"}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def serve(self) -> None:
        path = urlsplit(self.path).path
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = b""
        if "chunked" in headers.get("transfer-encoding", ""):
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        elif size := int(headers.get("content-length", 0)):
            if self.hub.stall_at and path == f"/lfs/{self.hub.stall_at}":
                self.rfile.read(min(size, 1000))
                self.hub.stalled.set()
                self.hub.released.wait(60)
            body = self.rfile.read(size)
        request = Request(self.command, path, headers, body)
        self.hub.requests.append(request)
        status, more = 200, {}
        try:
            answer = self.hub.serve(request)
            body, more = answer if isinstance(answer, tuple) else (json.dumps(answer).encode(), {})
        except Refusal as refusal:
            answer, status = refusal, refusal.status
            told = {"error": refusal.message, "errors": [{"message": refusal.message}]}
            body = json.dumps({**told, "url": f"{self.hub.address}/{OWNER}/name"}).encode()
            more = {**refusal.headers, "X-Error-Message": refusal.message}
        if answer is None:
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(status)
        for name, value in {**more, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean; the hub records every request."""


@contextmanager
def running_hub(token: str, monkeypatch: pytest.MonkeyPatch, home: str) -> Iterator[Hub]:
    """A Hub on a free port of this machine, in a thread; huggingface_hub here and in children goes there."""
    hub = Hub(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a client that was killed
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", f"{home}/hub")
    for name, value in {
        "ENDPOINT": hub.address,
        "HUB_DISABLE_XET": "1",
        "HOME": home,
        "TOKEN": token,
    }.items():
        monkeypatch.setenv(f"HF_{name}", value)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
