"""A real browser for the tests: Debian's chromium driven by Playwright, and Voila serving notebooks to it."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

CHROMIUM = "chromium"
IPYWIDGETS = int(version("ipywidgets").split(".")[0])
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def browser():
    """Chromium, headless. A missing one is an announced skip for a user and a failure in CI."""
    path = shutil.which(CHROMIUM)
    if path is None:
        message = "Debian's chromium is not installed (apt-get install chromium): the browser tests can't run"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """One browser page; remembers what went wrong in it."""

    def __init__(self, browser, width: int, theme: str, offline: bool = False) -> None:
        context = browser.new_context(
            viewport={"width": width, "height": 1000}, color_scheme=theme, offline=offline
        )
        self.page = context.new_page()
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._note)
        if not offline:
            self.page.route("**/*", self._only_local)

    def _note(self, message) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def _only_local(self, route) -> None:
        local = route.request.url.startswith(("http://localhost", "http://127.0.0.1", "data:", "blob:"))
        # Voila asks a CDN for an icon font; an empty answer keeps the console clean.
        route.continue_() if local else route.fulfill(status=200, body="")

    def cut_off(self) -> list[str]:
        """What a person must see and the window's sides cut off."""
        return self.page.evaluate(
            """[...document.querySelectorAll("img, canvas, select, input, button, h1, h2, p, pre")]
               .filter(e => e.offsetParent && (e.getBoundingClientRect().right > window.innerWidth + 1
                                               || e.getBoundingClientRect().left < 0))
               .map(e => e.outerHTML.slice(0, 80))"""
        )

    def close(self) -> None:
        self.page.context.close()


@pytest.fixture(scope="module")
def visit(browser) -> Iterator[Callable[..., Visit]]:
    """Open pages: visit(width, theme, offline=False)."""
    visits: list[Visit] = []

    def open_(width: int = 1280, theme: str = "light", offline: bool = False) -> Visit:
        visits.append(Visit(browser, width, theme, offline))
        return visits[-1]

    yield open_
    for one in visits:
        one.close()


@pytest.fixture(scope="module")
def voila(tmp_path_factory) -> Iterator[Callable[[Path], str]]:
    """Serve a notebook, executed anew for each visitor: voila(path) -> its address."""
    if IPYWIDGETS < 8:
        pytest.skip("Voila's page is written for ipywidgets 8; test_widgets7.py takes its place")
    yield from _servers(tmp_path_factory, voila_command)


@pytest.fixture(scope="module")
def classic(tmp_path_factory) -> Iterator[Callable[[Path], str]]:
    """Open a notebook in the classic Jupyter front end, which ipywidgets 7 was written for."""
    yield from _servers(tmp_path_factory, classic_command)


def voila_command(notebook: Path, port: int) -> tuple[list[str], str]:
    """The server's command, and the path of the notebook's page on it."""
    options = ["--VoilaConfiguration.allow_theme_override=YES", "--VoilaExecutor.timeout=300"]
    return ["voila", str(notebook), "--no-browser", f"--port={port}", *options], ""


def classic_command(notebook: Path, port: int) -> tuple[list[str], str]:
    """As `voila_command`, for Jupyter Notebook 6."""
    options = ["--NotebookApp.token=", "--NotebookApp.password=", f"--notebook-dir={notebook.parent}"]
    command = ["notebook", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", *options]
    return command, f"notebooks/{notebook.name}"


def _servers(tmp_path_factory, command_of) -> Iterator[Callable[[Path], str]]:
    servers: list[subprocess.Popen] = []
    log = tmp_path_factory.mktemp("server") / "log"

    def serve(notebook: Path) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments, page = command_of(notebook, port)
        command = [sys.executable, "-m", *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with log.open("w") as output:
            servers.append(subprocess.Popen(command, stdout=output, stderr=output, env=environment))
        _wait_for(port, servers[-1], log)
        return f"http://127.0.0.1:{port}/{page}"

    yield serve
    for server in servers:
        server.terminate()
        server.wait(30)


def _wait_for(port: int, server: subprocess.Popen, log: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            pytest.fail(f"the server stopped:\n{log.read_text()[-2000:]}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    pytest.fail(f"the server did not start within {seconds:.0f} s:\n{log.read_text()[-2000:]}")
