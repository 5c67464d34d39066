"""Run directories: stages that resume, two owners, kills, damage, full disks, attached runs."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from spi_utils import notebook, runs, workspace
from spi_utils.errors import RunError
from spi_utils.workspace import begin_run, continue_run, find_run

ROOT = Path(__file__).resolve().parent.parent
IDENTITY = {"id": "a/b", "kind": "local", "revision": None, "sha256": "0" * 64, "storage_dtype": "float16"}
OWNER = """
import sys, time
from spi_utils import runs
with runs.stage(runs.Run(runs.Path(sys.argv[1])), "analyze", {}, ["out.txt"]):
    with runs.atomic_path(sys.argv[1] + "/out.txt") as temporary:
        temporary.write_text("half")
        print("inside", flush=True)
        time.sleep(60)
"""
WRITER = """
import sys
from spi_utils import runs
run = runs.Run(runs.Path(sys.argv[1]))
for index in range(40):
    runs.update_info(run, lambda info: info.setdefault("notes", {}).update({f"{sys.argv[2]}-{index}": 1}))
"""


@pytest.fixture
def run(tmp_path):
    return runs.open_run(tmp_path / "run", IDENTITY)


def make(run, value=1, *, inner=lambda: None, name="analyze", force=False):
    """A stage that writes out.txt; whether it was finished already."""
    with runs.stage(run, name, {"value": value}, ["out.txt"], force=force) as stage:
        if not stage.finished:
            inner()
            runs.write_text(run.path / "out.txt", str(value))
            stage.record(seen=value)
    return stage.finished


def python(code, *arguments):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE)


# --- stages ----------------------------------------------------------------------------------------------


def test_a_finished_stage_is_recognised_and_an_input_or_output_change_is_noticed(run):
    assert [make(run), make(run), make(run, 2)] == [False, True, False]
    (run.path / "out.txt").write_text("3")
    assert [make(run, 2), make(run, 2), make(run, 2, force=True)] == [False, True, False]
    entry = runs.run_info(run)["stages"]["analyze"]
    assert entry["seen"] == 2 and entry["outputs"]["out.txt"]["bytes"] == 1 and entry["seconds"] >= 0


def test_a_stage_that_fails_or_writes_nothing_is_not_finished(run):
    with pytest.raises(ZeroDivisionError):
        make(run, inner=lambda: 1 / 0)
    with pytest.raises(RunError, match=r"without writing x\.txt"), runs.stage(run, "analyze", {}, ["x.txt"]):
        pass
    assert runs.run_info(run)["stages"] == {}


def test_partial_work_is_kept_for_the_same_inputs_only(run):
    for inputs, expected in (({"a": 1}, False), ({"a": 1}, True), ({"a": 2}, False)):
        with pytest.raises(KeyboardInterrupt), runs.stage(run, "analyze", inputs, ["x"]):
            piece = run.partial / "analyze" / "piece"
            assert piece.exists() is expected
            runs.write_text(piece, "done")
            raise KeyboardInterrupt


def test_a_run_directory_has_one_owner_and_a_killed_one_leaves_no_lock(run):
    make(run, "old")
    owner = python(OWNER, run.path)
    try:
        assert owner.stdout.readline() == b"inside\n"
        with pytest.raises(RunError, match=rf"process {owner.pid} on .+ since \d{{4}}-.+ in stage analyze"):
            make(run)
    finally:
        owner.kill()
        owner.wait()
    assert (run.path / "out.txt").read_text() == "old"
    assert make(run, inner=lambda: make(run, name="spectra")) is False  # stages of one process nest
    assert set(runs.run_info(run)["stages"]) == {"analyze", "spectra"}


def test_without_locks_the_work_goes_on_and_says_so(run, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert make(run) is False and "can't be locked" in capsys.readouterr().out


def test_two_processes_lose_no_entry_of_the_record(run):
    writers = [python(WRITER, run.path, name) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len(runs.run_info(run)["notes"]) == 80


def test_left_overs_of_a_kill_are_no_outputs_and_are_removed(run):
    run.figures.mkdir()
    left, keep = run.figures / ".quality.svg.ab120f9e.svg", run.figures / ".keep"
    with runs.stage(run, "visualize", {}, ["figures"]):
        runs.write_text(run.figures / "quality.svg", "<svg/>")
        left.write_text("half")
    assert set(runs.run_info(run)["stages"]["visualize"]["outputs"]) == {"figures/quality.svg"}
    old, live = run.path / ".plan.json.abcdef12.json", run.path / ".card.md.12345678.md"
    for path in (keep, old, live):
        path.write_text("half")
    with runs.stage(run, "visualize", {}, ["figures", "plan.json"], force=True):
        assert [path.exists() for path in (left, old, live, keep)] == [False, False, True, True]
        runs.write_text(run.plan_json, "{}")


# --- damage ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"stages": None},
        {"stages": {"analyze": {"outputs": {"a": {}}}}},
        {"model": None},
        {"model": {"id": "a/b"}},
        {"schema": None},
        {"schema": runs.SCHEMA + 1},
    ],
)
def test_a_record_that_is_damaged_or_of_another_version_is_named_and_left_alone(run, change):
    runs.write_json(run.info_json, json.loads(run.info_json.read_text()) | change)
    before = run.info_json.read_bytes()
    for call in (lambda: runs.existing_run(run.path), lambda: runs.open_run(run.path, IDENTITY)):
        with pytest.raises(RunError, match=r"run\.json is damaged, or another version.*01_analyze"):
            call()
    assert run.info_json.read_bytes() == before


@pytest.mark.parametrize("entry", [{}, {"fingerprint": "1"}, {"fingerprint": "1", "outputs": {}}])
def test_a_stage_without_its_keys_is_done_again(run, entry):
    make(run)
    runs.update_info(run, lambda info: info.update(stages={"analyze": entry}))
    assert make(run) is False and make(run) is True


def test_another_model_and_foreign_folders_are_refused(run, tmp_path):
    with pytest.raises(RunError, match="holds a run of a/b"):
        runs.open_run(run.path, {**IDENTITY, "id": "c/d", "sha256": "1" * 64})
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    with pytest.raises(RunError, match=r"cat\.jpg"):
        runs.open_run(tmp_path / "photos", IDENTITY)
    with pytest.raises(RunError, match="Run notebook 01_analyze first"):
        runs.existing_run(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"cat\.jpg"):
        runs.open_run(tmp_path / "photos" / "cat.jpg" / "below", IDENTITY)


@pytest.mark.parametrize(
    "text, message",
    [(None, "02_visualize first"), ("{", "damaged"), ("[]", "JSON object"), ('{"schema": 9}', "schema 9")],
)
def test_damaged_json_names_the_file_and_the_notebook(tmp_path, text, message):
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    with pytest.raises(RunError, match=rf"plan\.json.*{message}") as caught:
        runs.read_json(tmp_path / "plan.json", 1, "plan", "02_visualize")
    assert "02_visualize" in str(caught.value)


def test_the_layer_table_comes_back_bit_for_bit_or_is_refused(run):
    with pytest.raises(RunError, match="no layer table"):
        runs.read_layers(run)
    table = pd.DataFrame({key: [1, 2] for key in runs.LAYER_KEYS} | {"x": [0.1 + 0.2, 1e-300]})
    table["quantizable"] = [True, False]
    table.to_csv(run.layers_csv, index=False)
    back = runs.read_layers(run)
    assert back["x"].tolist() == [0.1 + 0.2, 1e-300] and back["quantizable"].tolist() == [True, False]
    text = run.layers_csv.read_text()
    for broken in ("", text.replace("True", "2")):
        run.layers_csv.write_text(broken)
        with pytest.raises(RunError, match="Run notebook 01_analyze again"):
            runs.read_layers(run)


# --- writes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_names_its_cause_and_leaves_what_was_there(run, monkeypatch, call):
    make(run, "old")
    for code in (errno.ENOSPC, errno.EROFS):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, lambda *_, c=code: (_ for _ in ()).throw(OSError(c, os.strerror(c))))
            with pytest.raises(RunError, match=rf"{os.strerror(code)}.*Free some space"):
                runs.write_text(run.path / "out.txt", "new")
    assert make(run, "old") is True and not [path for path in run.path.iterdir() if runs.is_temporary(path)]


def test_a_full_disk_within_a_stage_is_said(run):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError, match="Free some space"):
        make(run, inner=full)
    assert make(run) is False


def test_small_promises_of_writing(run, tmp_path):
    with pytest.raises(ValueError, match=r"NaN|Out of range"):
        runs.write_json(run.info_json, {"x": float("nan")})
    with pytest.raises(TypeError, match="not JSON serializable"):
        runs.fingerprint({"x": object()})
    before = os.umask(0o077)
    try:
        runs.write_text(tmp_path / "private", "")
    finally:
        os.umask(before)
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_peak_memory_is_this_process_own():
    code = "from spi_utils.runs import peak_rss_bytes; print(peak_rss_bytes())"
    held = bytearray(400_000_000)
    small = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(held) == 400_000_000 and runs.peak_rss_bytes() > 400_000_000
    assert 10_000_000 < int(small.stdout) < 300_000_000


# --- which run -------------------------------------------------------------------------------------------


def test_auto_is_one_folder_for_a_model_wherever_one_stands_in_a_checkout(monkeypatch, tmp_path):
    assert runs.slug("Qwen/Qwen3.5-4B") == "qwen3.5-4b" and runs.slug("/some where/My Model/") == "my-model"
    monkeypatch.chdir(ROOT)
    assert runs.run_path("auto", "m") == Path("runs/m") and runs.run_path("elsewhere", "m") == Path(
        "elsewhere"
    )
    monkeypatch.chdir(ROOT / "tests" / "notebooks")
    assert runs.run_path("auto", "m") == ROOT / "runs" / "m"
    for checkout in (tmp_path, tmp_path / "inner"):  # a checkout within another is one of its own
        (checkout / "spi_utils").mkdir(parents=True)
        (checkout / "spi_utils" / "runs.py").touch()
        (checkout / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path / "inner" / "spi_utils")
    assert runs.run_path("auto", "m") == tmp_path / "inner" / "runs" / "m"


def test_a_run_is_begun_found_and_continued_with_its_own_model_only(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, source = begin_run("auto", str(tiny("llama")))
    assert str(run.path) == "runs/llama" and runs.run_info(run)["model"]["id"] == "llama"
    assert find_run("auto", str(tiny("llama"))) == run and continue_run("runs/llama") == (run, source)
    for call in (begin_run, continue_run, find_run):
        with pytest.raises(RunError, match="holds a run of llama"):
            call("runs/llama", str(tiny("phi3")))
    with pytest.raises(RunError, match="01_analyze first"):
        find_run("none")


@pytest.mark.parametrize(
    "file, message",
    [
        ("model.safetensors", "whose weights have changed since"),
        ("config.json", "configuration, tokenizer or code"),
    ],
)
def test_a_changed_model_is_noticed(tiny, tmp_path, file, message):
    copy = shutil.copytree(tiny("llama"), tmp_path / "copy")
    begin_run(str(tmp_path / "run"), str(copy))
    data = (copy / file).read_bytes()
    (copy / file).write_bytes(data[:-1] + (b"\n\n" if file == "config.json" else bytes([data[-1] ^ 1])))
    for again in (
        lambda: begin_run(str(tmp_path / "run"), str(copy)),
        lambda: continue_run(str(tmp_path / "run")),
    ):
        with pytest.raises(RunError, match=message):
            again()


@pytest.fixture
def attached(tiny, tmp_path, monkeypatch):
    """A fresh session: nothing in its working folder, an earlier session's output among its inputs."""
    root = tmp_path / "input"
    run, _ = begin_run(str(root / "my-output" / "runs" / "llama"), str(tiny("llama")))
    runs.write_text(run.partial / "evaluate" / "one", "half")
    runs.write_text(run.model_dir / "model.safetensors", "x" * 2000)
    runs.write_text(root / "a-dataset" / "run.json", "{}")
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")
    monkeypatch.setattr(workspace, "LARGE", 1000)
    return root


def test_a_fresh_session_goes_on_with_the_attached_run(attached, tiny, capsys, monkeypatch):
    source = attached / "my-output" / "runs" / "llama"

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:  # a copy that was interrupted is made again
        patch.setattr(workspace, "write_json", full)
        with pytest.raises(OSError, match="No space"):
            find_run("auto", attached=attached)
    run, model = continue_run("auto", attached=attached)
    assert run.path == Path("runs/llama") and model.directory == tiny("llama")
    assert str(source) in capsys.readouterr().out
    (run.path / "layers.csv").write_text("a stage's output")
    assert (run.partial / "evaluate" / "one").read_text() == "half"
    assert (run.model_dir / "model.safetensors").is_symlink() and not (source / "layers.csv").exists()
    assert find_run("auto", attached=attached) == run  # the next notebook
    assert (run.path / "layers.csv").exists() and capsys.readouterr().out == ""
    shutil.copytree(attached / "my-output", attached / "newer")
    with pytest.raises(RunError, match="holds another run than the attached"):
        find_run(str(attached / "newer" / "runs" / "llama"), attached=attached)


def test_several_attached_runs_are_listed_with_what_to_type(attached, tiny, monkeypatch):
    other = attached / "other" / "run"
    begin_run(str(other), str(tiny("phi3")))
    with pytest.raises(RunError, match="2 runs are attached") as refused:
        find_run("auto", attached=attached)
    typed = [line.split('"')[1] for line in str(refused.value).splitlines()[1:]]
    assert typed == [str(attached / "my-output" / "runs" / "llama"), str(other)]
    monkeypatch.setattr(notebook, "ATTACHED", attached)
    monkeypatch.setattr(notebook.os, "access", lambda *_: False)  # inputs are read-only
    assert notebook.problem_of("run_dir", str(other), notebook.TABLE["run_dir"]) == ""
    assert find_run(str(other), attached=attached).path == Path("runs/phi3")
    assert find_run("auto", str(tiny("llama")), attached=attached).path == Path("runs/llama")
    with pytest.raises(RunError, match="no run of qwen3_5 is attached"):
        find_run("auto", str(tiny("qwen3_5")), attached=attached)


def test_a_lost_file_of_a_stage_is_missed_one_that_was_added_too(run):
    make(run)
    runs.write_text(run.explorer, "<html>")
    runs.add_outputs(run, "analyze", [run.explorer.name])
    assert make(run) is True
    run.explorer.unlink()
    assert make(run) is False
