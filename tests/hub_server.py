"""A small Hub on a local port: the endpoints that publishing and loading a model use, kept in memory.

Written from what huggingface_hub sends and expects (1.11, 1.27, 2.4). It records every request, and can be
told to fail, to stall or to be full.
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
from urllib.parse import unquote, urlsplit

import yaml

OWNER = "me"
LFS = re.compile(r"\.(safetensors|png|bin)$")


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    status: int = 0


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
    commits: list[str] = field(default_factory=list)


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def as_json(value: object, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Hub:
    """The state of the server, and its answers."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.on_request: Callable[[Request], None] | None = None  # called before each answer
        self.stall_at: str | None = None  # an object's sha256: its PUT is read in part, then waits
        self.stalled = threading.Event()
        self.released = threading.Event()
        self.part_size: int | None = None  # bytes a part: objects are sent in parts
        self.parts: dict[str, dict[int, bytes]] = {}
        self.address = ""
        repo = r"(?P<repo>[\w.-]+/[\w.-]+)"
        self.routes: list[tuple[str, str, Callable[..., Answer]]] = [
            ("GET", r"/api/whoami-v2", self.whoami),
            ("POST", r"/api/repos/create", self.create),
            ("POST", r"/api/validate-yaml", self.validate),
            ("GET", rf"/api/models/{repo}/tree/[^/]+(?P<folder>/.*)?", self.tree),
            ("POST", rf"/api/models/{repo}/preupload/[^/]+", self.preupload),
            ("POST", rf"/api/models/{repo}/commit/[^/]+", self.commit),
            ("GET", rf"/api/models/{repo}(/revision/[^/]+)?", self.info),
            ("POST", rf"/{repo}\.git/info/lfs/objects/batch", self.batch),
            ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})(/(?P<part>\d+))?", self.put),
            ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/complete", self.complete),
            ("POST", rf"/{repo}/lfs-verify", self.verify),
            ("HEAD", rf"/{repo}/resolve/[^/]+/(?P<file>.+)", self.resolve),
            ("GET", rf"/{repo}/resolve/[^/]+/(?P<file>.+)", self.resolve),
        ]

    def sent(self, method: str, pattern: str) -> list[Request]:
        """The requests that match, in order."""
        return [r for r in self.requests if r.method == method and re.search(pattern, r.path)]

    def answer(self, request: Request) -> Answer | None:
        """What to reply; None drops the connection."""
        if self.on_request is not None:
            self.on_request(request)
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.match, f"{request.method} {request.path}"):
                fault.times -= 1
                if fault.status == -2:
                    self._routed(request)
                if fault.status < 0:
                    return None
                refused = as_json({"error": fault.message}, fault.status)
                refused.headers |= {**fault.headers, "X-Error-Message": fault.message}
                return refused
        return self._routed(request)

    def _routed(self, request: Request) -> Answer:
        for method, pattern, serve in self.routes:
            found = re.fullmatch(pattern, request.path)
            if found and method == request.method:
                if self._refuses(request):
                    return as_json({"error": "Invalid credentials in Authorization header"}, 401)
                return self._serve(serve, request, found.groupdict())
        return as_json({"error": f"no such endpoint {request.method} {request.path}"}, 404)

    def _refuses(self, request: Request) -> bool:
        open_to_all = request.path.startswith(("/api/validate-yaml", "/lfs/"))
        return not open_to_all and request.headers.get("authorization") != f"Bearer {self.token}"

    def _serve(self, serve: Callable[..., Answer], request: Request, names: dict) -> Answer:
        repo = names.get("repo")
        if repo is not None and repo not in self.repositories:
            missing = as_json({"error": "Repository not found"}, 404)
            missing.headers["X-Error-Code"] = "RepoNotFound"
            return missing
        return serve(request, **{name: value for name, value in names.items() if value is not None})

    # --- endpoints

    def whoami(self, request: Request) -> Answer:
        return as_json({"type": "user", "id": "1", "name": OWNER, "fullname": OWNER, "orgs": [], "auth": {}})

    def create(self, request: Request) -> Answer:
        asked = json.loads(request.body)
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        if name in self.repositories:
            return as_json(
                {"error": "You already created this model repo", "url": self.address + "/" + name}, 409
            )
        private = asked.get("private", asked.get("visibility") == "private")
        self.repositories[name] = Repository(
            private, {".gitattributes": b"*.safetensors filter=lfs\n"}, ["0" * 40]
        )
        return as_json({"url": f"{self.address}/{name}", "name": name, "id": name})

    def validate(self, request: Request) -> Answer:
        content = json.loads(request.body)["content"]
        try:
            data = yaml.safe_load(content.split("---")[1])
            errors = (
                [] if isinstance(data.get("license"), str) else [{"message": '"license" must be a string'}]
            )
        except (yaml.YAMLError, IndexError, AttributeError) as error:
            errors = [{"message": str(error)}]
        return as_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def tree(self, request: Request, repo: str, folder: str = "") -> Answer:
        start = folder.strip("/")
        entries = [
            self._entry(path, data)
            for path, data in sorted(self.repositories[repo].files.items())
            if not start or path.startswith(f"{start}/")
        ]
        if start and not entries:
            return self._no_entry()
        return as_json(entries)

    def _entry(self, path: str, data: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
        if LFS.search(path):
            entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
        return entry

    def info(self, request: Request, repo: str) -> Answer:
        held = self.repositories[repo]
        files = [{"rfilename": path} for path in sorted(held.files)]
        return as_json(
            {"id": repo, "sha": held.commits[-1], "private": held.private, "siblings": files, "tags": []}
        )

    def preupload(self, request: Request, repo: str) -> Answer:
        files = []
        for asked in json.loads(request.body)["files"]:
            path, data = asked["path"], self.repositories[repo].files.get(asked["path"])
            lfs = bool(LFS.search(path))
            oid = None if data is None else (sha256(data) if lfs else git_oid(data))
            files.append(
                {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}
            )
        return as_json({"files": files})

    def batch(self, request: Request, repo: str) -> Answer:
        objects = []
        for asked in json.loads(request.body)["objects"]:
            reply = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.objects:
                verify = {"href": f"{self.address}/{repo}/lfs-verify"}
                reply["actions"] = {"upload": self._upload_action(asked), "verify": verify}
            objects.append(reply)
        return as_json({"transfer": "multipart" if self.part_size else "basic", "objects": objects})

    def _upload_action(self, asked: dict) -> dict:
        url = f"{self.address}/lfs/{asked['oid']}"
        if self.part_size is None:
            return {"href": url}
        count = -(-asked["size"] // self.part_size)
        parts = {f"{part:05d}": f"{url}/{part}" for part in range(1, count + 1)}
        return {"href": f"{url}/complete", "header": {"chunk_size": str(self.part_size), **parts}}

    def put(self, request: Request, oid: str, part: str | None = None) -> Answer:
        if part is not None:
            self.parts.setdefault(oid, {})[int(part)] = request.body
            return Answer(headers={"ETag": f'"{part}"'})
        return self._store(oid, request.body)

    def complete(self, request: Request, oid: str) -> Answer:
        return self._store(oid, b"".join(data for _, data in sorted(self.parts.pop(oid).items())))

    def _store(self, oid: str, data: bytes) -> Answer:
        if sha256(data) != oid:
            return as_json({"error": "content does not match its oid"}, 400)
        self.objects[oid] = data
        return Answer()

    def verify(self, request: Request, repo: str) -> Answer:
        asked = json.loads(request.body)
        known = len(self.objects.get(asked["oid"], b"")) == asked["size"]
        return as_json({}, 200 if known else 404)

    def commit(self, request: Request, repo: str) -> Answer:
        held = self.repositories[repo]
        files = dict(held.files)
        for line in request.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header" and value.get("parentCommit", held.commits[-1]) != held.commits[-1]:
                return as_json({"error": "A commit has happened since. Please refresh and try again."}, 412)
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        held.files = files
        held.commits.append(hashlib.sha1(request.body).hexdigest())
        url = f"{self.address}/{repo}/commit/{held.commits[-1]}"
        return as_json({"success": True, "commitOid": held.commits[-1], "commitUrl": url})

    def resolve(self, request: Request, repo: str, file: str) -> Answer:
        held = self.repositories[repo]
        data = held.files.get(unquote(file))
        if data is None:
            return self._no_entry()
        etag = f'"{sha256(data) if LFS.search(file) else git_oid(data)}"'
        return Answer(200, data, {"ETag": etag, "X-Repo-Commit": held.commits[-1], "Accept-Ranges": "bytes"})

    def _no_entry(self) -> Answer:
        missing = as_json({"error": "Entry not found"}, 404)
        missing.headers["X-Error-Code"] = "EntryNotFound"
        return missing


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def serve(self) -> None:
        split = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, split.path, headers, self._body(split.path))
        self.hub.requests.append(request)
        answer = self.hub.answer(request)
        if answer is None:
            self.close_connection = True
            self.connection.close()
            return
        request.status = answer.status
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _body(self, path: str) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            return b"".join(self._chunks())
        size = int(self.headers.get("Content-Length", 0))
        if self.hub.stall_at and path == f"/lfs/{self.hub.stall_at}":
            self.rfile.read(min(size, 1000))
            self.hub.stalled.set()
            self.hub.released.wait(60)
        return self.rfile.read(size)

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean; the hub records every request."""


@contextmanager
def running_hub(token: str) -> Iterator[Hub]:
    """A Hub on a free port of this machine, in a thread."""
    hub = Hub(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
