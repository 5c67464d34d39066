import shutil
from pathlib import Path

import pytest

from spi_utils import notebook, workspace
from spi_utils.errors import RunError
from spi_utils.runs import run_info, run_path
from spi_utils.workspace import begin_run, continue_run, find_run


def test_a_run_is_begun_found_and_continued(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, source = begin_run("auto", str(tiny("llama")))
    assert str(run.path) == "runs/llama" and run_info(run)["model"]["id"] == "llama"
    assert find_run("auto", str(tiny("llama"))) == run
    again, same = continue_run("runs/llama")
    assert again == run and same == source


def test_another_model_is_refused(tiny, tmp_path):
    run_dir = str(tmp_path / "run")
    begin_run(run_dir, str(tiny("llama")))
    for call in (begin_run, continue_run, find_run):
        with pytest.raises(RunError, match="holds a run of llama"):
            call(run_dir, str(tiny("phi3")))
    with pytest.raises(RunError, match="01_analyze first"):
        find_run(str(tmp_path / "none"))


def test_changed_weights_are_noticed(tiny, tmp_path):
    copy = shutil.copytree(tiny("llama"), tmp_path / "copy")
    begin_run(str(tmp_path / "run"), str(copy))
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(RunError, match="whose weights have changed since"):
        continue_run(str(tmp_path / "run"))


# --- where "auto" is -------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("folder", ["notebooks", "spi_utils", "tests/notebooks"])
def test_auto_is_the_same_run_from_any_folder_of_the_checkout(monkeypatch, folder):
    monkeypatch.chdir(ROOT)
    assert run_path("auto", "m") == Path("runs/m") and run_path("elsewhere", "m") == Path("elsewhere")
    monkeypatch.chdir(ROOT / folder)
    assert run_path("auto", "m") == ROOT / "runs" / "m"


def test_a_checkout_within_another_is_one_of_its_own(tmp_path, monkeypatch):
    for checkout in (tmp_path, tmp_path / "inner"):
        (checkout / "spi_utils").mkdir(parents=True)
        (checkout / "spi_utils" / "runs.py").touch()
        (checkout / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path / "inner" / "spi_utils")
    assert run_path("auto", "m") == tmp_path / "inner" / "runs" / "m"


# --- an attached run -------------------------------------------------------------------------------------


@pytest.fixture
def attached(tiny, tmp_path, monkeypatch):
    """A fresh session: nothing in its working folder, an earlier session's output among its inputs."""
    root = tmp_path / "input"
    run, _ = begin_run(str(root / "my-output" / "runs" / "llama"), str(tiny("llama")))
    (run.path / "partial" / "evaluate").mkdir(parents=True)
    (run.path / "partial" / "evaluate" / "one").write_text("half")
    run.model_dir.mkdir()
    (run.model_dir / "model.safetensors").write_bytes(b"x" * 2000)
    (root / "a-dataset").mkdir()
    (root / "a-dataset" / "run.json").write_text("{}")
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")
    monkeypatch.setattr(workspace, "LARGE", 1000)
    return root


def contents(folder):
    return {
        p.relative_to(folder): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.suffix != ".lock"
    }


def test_a_fresh_session_goes_on_with_the_attached_run(attached, tiny, capsys):
    source = attached / "my-output" / "runs" / "llama"
    before = contents(source)
    run, model = continue_run("auto", attached=attached)
    assert run.path == Path("runs/llama") and model.directory == tiny("llama")
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and str(source) in said and "runs/llama" in said
    (run.path / "layers.csv").write_text("a stage's output")
    assert (run.path / "partial" / "evaluate" / "one").read_text() == "half"
    assert (run.model_dir / "model.safetensors").is_symlink() and contents(source) == before
    again = find_run("auto", attached=attached)  # the next notebook
    assert again == run and (run.path / "layers.csv").exists() and capsys.readouterr().out == ""


def test_a_copy_that_was_interrupted_is_made_again(attached, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(workspace, "write_json", full)
        with pytest.raises(OSError, match="No space"):
            find_run("auto", attached=attached)
    assert find_run("auto", attached=attached).info_json.exists()


def test_several_attached_runs_are_listed_with_what_to_type(attached, tiny, monkeypatch):
    other = attached / "other" / "run"
    begin_run(str(other), str(tiny("phi3")))
    with pytest.raises(RunError, match="2 runs are attached") as refused:
        find_run("auto", attached=attached)
    typed = [line.split(" = ")[1].split('"')[1] for line in str(refused.value).splitlines()[1:]]
    assert typed == [str(attached / "my-output" / "runs" / "llama"), str(other)]
    monkeypatch.setattr(notebook, "ATTACHED", attached)
    monkeypatch.setattr(notebook.os, "access", lambda *_: False)  # inputs are read-only
    assert notebook.problem_of("run_dir", str(other), notebook.TABLE["run_dir"]) == ""
    assert find_run(str(other), attached=attached).path == Path("runs/phi3")
    assert find_run(str(other), attached=attached).path == Path("runs/phi3")
    assert find_run("auto", str(tiny("llama")), attached=attached).path == Path("runs/llama")
    with pytest.raises(RunError, match="no run of qwen3_5 is attached"):
        find_run("auto", str(tiny("qwen3_5")), attached=attached)


def test_an_attached_run_takes_no_other_runs_place(attached, tiny):
    shutil.copytree(attached / "my-output", attached / "newer")
    find_run(str(attached / "newer" / "runs" / "llama"), attached=attached)
    with pytest.raises(RunError, match="holds another run than the attached"):
        find_run(str(attached / "my-output" / "runs" / "llama"), attached=attached)
