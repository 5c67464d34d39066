"""Shared fixtures: the bundled model, tiny checkpoints, and the text that evaluation tests use."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.browser.fixtures import browser, classic, visit, voila  # noqa: F401  (one browser for all tests that need it)

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--wikitext", default=None, help="a file with WikiText-2's test split; pydoc without it")


@pytest.fixture(scope="session")
def evaluation_text(request: pytest.FixtureRequest) -> str:
    """What tests evaluate on: CPython's pydoc topics, or WikiText-2 where --wikitext points to it."""
    return request.config.getoption("--wikitext") or "pydoc"


@pytest.fixture(scope="session")
def bundled():
    """The bundled model's source."""
    from spi_utils.models import resolve

    return resolve("bundled")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny checkpoints by architecture, each made once a session; never write into them."""
    from tests.tiny import make_tiny

    made: dict[str, Path] = {}

    def get(arch: str) -> Path:
        if arch not in made:
            made[arch] = make_tiny(arch, tmp_path_factory.mktemp("tiny") / arch)
        return made[arch]

    return get


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory):
    """A finished run of a tiny model, its checkpoint in several files; never write into it."""
    from tests.finished_run import make_finished_run

    return make_finished_run(tmp_path_factory.mktemp("finished"), shard="200KB")
