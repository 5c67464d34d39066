"""A disk that is full while a notebook writes: a sentence that helps, nothing lost, the same call goes on."""

import errno

import pytest

from spi_utils import notebook as book
from spi_utils.runs import existing_run, update_info
from tests.evaluated_run import ready_run
from tests.synthetic import make_run

# Every process below starts with this: syncing a file whose name holds a word says that the disk is full.
FULL = """import os

_sync = os.fsync


def fsync(fd):
    name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
    if %r in name:
        raise OSError(%d, "No space left on device", name)
    _sync(fd)


os.fsync = fsync
"""


@pytest.fixture
def full_for(tmp_path, monkeypatch):
    def start(word):
        (tmp_path / "full").mkdir(exist_ok=True)
        (tmp_path / "full" / "sitecustomize.py").write_text(FULL % (word, errno.ENOSPC))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "full"))

    yield start


def refused(name, run, parameters):
    output = run.notebooks / f"{name}.ipynb"
    with pytest.raises(book.NotebookError) as found:
        book.execute(name, output, {"run_dir": str(run.path), **parameters})
    said = str(found.value)
    assert said.startswith(f"{name} failed: RunError: ") and "No space left on device" in said
    assert "Free some space" in said and "Traceback" not in said and "NotJSON" not in said
    return said


@pytest.mark.slow
def test_in_02_the_plan_of_before_stays(tmp_path, full_for, monkeypatch):
    run = make_run(tmp_path / "run", count=42)
    book.execute("02_visualize", run.notebooks / "02_visualize.ipynb", {"run_dir": str(run.path)})
    before = run.plan_json.read_bytes()
    full_for("plan.json")
    said = refused("02_visualize", run, {"score": "alpha_pl"})
    assert "plan.json" in said and run.plan_json.read_bytes() == before
    assert not [p for p in run.path.iterdir() if p.name.startswith(".plan")]
    monkeypatch.delenv("PYTHONPATH")
    book.execute(
        "02_visualize",
        run.notebooks / "02_visualize.ipynb",
        {"run_dir": str(run.path), "score": "alpha_pl"},
    )
    assert run.plan_json.read_bytes() != before


@pytest.mark.slow
def test_in_04_what_was_scored_stays_and_the_same_call_ends_it(tmp_path, tiny, full_for, monkeypatch):
    run, source = ready_run(tiny("llama"), tmp_path / "run")
    update_info(run, lambda info: info.update(location=source.location))
    parameters = {"windows": 12, "length": 32, "random_seeds": 1, "texts": "pydoc", "model": "auto"}
    full_for("evaluation.json")
    said = refused("04_evaluate", run, parameters)
    assert "evaluation.json" in said and not run.evaluation_json.exists()
    scored = [*(run.path / "partial").rglob("*.npz")] or [*(run.path / "partial").rglob("*")]
    assert scored
    monkeypatch.delenv("PYTHONPATH")
    book.execute("04_evaluate", run.notebooks / "04_evaluate.ipynb", {"run_dir": str(run.path), **parameters})
    assert existing_run(run.path).evaluation_json.exists()
