"""A real browser for the tests: Debian's chromium driven by Playwright, and servers of notebooks."""

import os
import shutil
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

IPYWIDGETS = int(version("ipywidgets").split(".")[0])
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def browser():
    """Chromium, headless. A missing one is an announced skip for a user and a failure in CI."""
    path = shutil.which("chromium")
    if path is None:
        message = "Debian's chromium is not installed (apt-get install chromium): the browser tests can't run"
        pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """One browser page; remembers what went wrong in it."""

    def __init__(self, browser, width: int, theme: str, offline: bool) -> None:
        view = {"viewport": {"width": width, "height": 1000}, "color_scheme": theme, "offline": offline}
        self.page, self.errors = browser.new_context(**view).new_page(), []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        if not offline:
            self.page.route("**/*", self._only_local)

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


@pytest.fixture(scope="module")
def visit(browser):
    """Open pages: visit(width, theme, offline=False)."""
    visits = []

    def open_(width: int = 1280, theme: str = "light", offline: bool = False) -> Visit:
        visits.append(Visit(browser, width, theme, offline))
        return visits[-1]

    yield open_
    for one in visits:
        one.page.context.close()


@pytest.fixture(scope="module")
def voila(tmp_path_factory):
    """Serve a notebook, executed anew for each visitor: voila(path) -> its address."""
    if IPYWIDGETS < 8:
        pytest.skip("Voila's page is written for ipywidgets 8; the classic front end takes its place")
    options = ["--VoilaConfiguration.allow_theme_override=YES", "--VoilaExecutor.timeout=300"]
    yield from _servers(tmp_path_factory, lambda path: (["voila", str(path), *options], ""))


@pytest.fixture(scope="module")
def classic(tmp_path_factory):
    """Open a notebook in the classic Jupyter front end (Notebook 6), which ipywidgets 7 was written for."""
    options = ["--NotebookApp.token=", "--NotebookApp.password=", "--allow-root", "--ip=127.0.0.1"]

    def command(path):
        return ["notebook", *options, f"--notebook-dir={path.parent}"], f"notebooks/{path.name}"

    yield from _servers(tmp_path_factory, command)


def _servers(tmp_path_factory, command_of):
    servers, log = [], tmp_path_factory.mktemp("server") / "log"

    def serve(notebook: Path) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments, page = command_of(notebook)
        command = [sys.executable, "-m", *arguments, "--no-browser", f"--port={port}"]
        with log.open("w") as output:
            paths = os.environ | {"PYTHONPATH": str(ROOT)}
            servers.append(subprocess.Popen(command, stdout=output, stderr=output, env=paths))
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and servers[-1].poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return f"http://127.0.0.1:{port}/{page}"
            time.sleep(0.2)
        pytest.fail(f"the server stopped, or did not start within a minute:\n{log.read_text()[-2000:]}")

    yield serve
    for server in servers:
        server.terminate()
        server.wait(30)
