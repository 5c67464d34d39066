"""`python -m spi_utils` as a user meets it: one line and an exit code, whatever is wrong."""

import errno
import importlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import nbformat
import psutil
import pytest

from spi_utils import __version__
from spi_utils import notebook as book
from spi_utils.__main__ import main
from spi_utils.errors import RunError
from spi_utils.notebook import is_for_readers
from spi_utils.plan import make_plan
from spi_utils.presets import resolve
from tests.synthetic import layer_table

ROOT = Path(__file__).resolve().parent.parent


def call(*arguments, cwd, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", "spi_utils", *map(str, arguments)],
        **{"capture_output": True, "text": True, "cwd": cwd, "env": environment, "timeout": 120, **options},
        check=False,
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "file").write_text("x")
    return tmp_path


WRONG_CALLS = [
    (["run", "-p", "model", "5"], 1, "ModelError: '5' is neither a directory here nor a Hub id"),
    (["run", "-p", "windows", "[1"], 2, "ParameterError: windows='[1': expected a whole number"),
    (
        ["run", "-p", "windwos", "3"],
        2,
        "ParameterError: 00_run_all.ipynb has no parameter 'windwos'. Did you",
    ),
    (["run", "-p", "run_dir", "file"], 2, "ParameterError: run_dir='file': expected 'auto', or a folder"),
    (
        ["run", "-p", "run_dir", "file/a/b"],
        2,
        "ParameterError: run_dir='file/a/b': expected 'auto', or a fold",
    ),
    (
        ["run", "--only", "04_evaluate", "-p", "run_dir", "file"],
        2,
        "ParameterError: run_dir='file': expected",
    ),
    (["run", "--only", "04_evaluate", "-p", "texts", "nope"], 2, "ParameterError: texts='nope': expected"),
    (
        ["run", "--only", "04_evaluate", "-p", "score", "fisher"],
        2,
        "ParameterError: 04_evaluate has no param",
    ),
    (["summary", "nowhere"], 1, "RunError: nowhere/run.json: there is no run record here"),
    (["summary", "file"], 1, ""),
    (["batch", "nowhere.yaml"], 1, "BatchError: nowhere.yaml: can't be read"),
    (["batch", "grid.yaml"], 2, "ParameterError: grid.yaml: double_quant='maybe': expected True or False"),
]


@pytest.mark.parametrize(("arguments", "code", "said"), WRONG_CALLS, ids=lambda x: str(x)[:60])
def test_a_wrong_call_ends_with_one_line_and_a_code(folder, arguments, code, said):
    (folder / "grid.yaml").write_text("models: [a/b]\nparameters: {double_quant: maybe}\n")
    done = call(*arguments, cwd=folder)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not (folder / "runs").exists()


def test_a_folder_that_can_not_be_made_is_named(folder):
    place = "/proc/nowhere"
    if not os.path.isdir("/proc/self"):
        pytest.skip("Linux alone has a folder in which the superuser can make none")
    done = call("run", "-p", "run_dir", place, cwd=folder)
    assert done.returncode in (1, 2) and place in done.stderr and done.stderr.count("\n") == 1


def test_a_read_only_folder_is_refused(folder, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert main(["run", "-p", "run_dir", str(folder / "new")]) == 2
    assert f"({folder} can't be written)" in capsys.readouterr().err


def test_a_read_only_disk_met_later_is_one_line(monkeypatch, capsys, folder):
    def failing(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder / "run.json"))

    monkeypatch.setattr("spi_utils.__main__.execute", failing)
    assert main(["run", "-p", "run_dir", str(folder / "run")]) == 1
    error = capsys.readouterr().err
    assert str(folder / "run.json") in error and "Read-only" in error and "the same command goes on" in error


def test_a_disk_that_takes_no_byte_is_one_line(folder):
    def nothing_fits():
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    done = call("run", "-p", "run_dir", "new", cwd=folder, preexec_fn=nothing_fits)
    assert done.returncode == 1 and "Free some space" in done.stderr and done.stderr.count("\n") == 1


def test_a_full_disk_in_a_notebook_is_said(folder, monkeypatch):
    """papermill has cut the executed copy, so that no cell's error can be read from it."""

    def full(notebook, output, parameters, show):
        output.write_text('{"cells": [{"cell_ty')
        return 1, "Traceback (most recent call last)\nOSError: [Errno 28] No space left on device\n"

    monkeypatch.setattr(book, "_papermill", full)
    with pytest.raises(book.NotebookError, match=r"01_analyze failed: the disk is full\. Free some space"):
        book.execute("01_analyze", folder / "run" / "out.ipynb", {})


def test_an_output_below_a_file_is_refused_by_the_function_too(folder):
    with pytest.raises(RunError, match=r"can't be made: .*Choose another `run_dir`"):
        book.execute("01_analyze", folder / "file" / "out.ipynb", {})


def test_version_and_help(folder):
    assert call("--version", cwd=folder).stdout == f"spi_utils {__version__}\n"
    told = call("--help", cwd=folder)
    commands = ("run", "summary", "speed", "publish", "batch")
    assert told.returncode == 0 and all(f"    {word}  " in told.stdout for word in commands)
    assert call(cwd=folder).returncode == 2


@pytest.mark.parametrize("command", ["run", "batch"])
def test_the_help_lists_every_parameter_with_its_default_and_comment(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0
    for name, default in book.parameters_of(book.ALL).items():
        (line,) = re.findall(rf"^  {name} +(.*)$", told, re.MULTILINE)
        shown = json.dumps(default) if isinstance(default, str | list) else repr(default)
        assert line.startswith(f"{shown} ") and len(line) > len(shown) + 5


def test_the_installed_command_is_this_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, name = project["scripts"]["spi-utils"].split(":")
    assert getattr(importlib.import_module(module), name) is main


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        (["--preset", "small"], {"rule": "matrix_bits", "value": 4.6, "backend": "bitsandbytes"}),
        (
            [
                *("-p", "backend", "compressed-tensors", "-p", "formats", "[int8, 16bit]"),
                *("-p", "rule", "top_k", "-p", "value", "0"),
            ],
            {"formats": ["int8", "16bit"], "rule": "top_k", "value": 0, "backend": "compressed-tensors"},
        ),
    ],
    ids=["a preset", "int8 everywhere"],
)
def test_what_is_typed_comes_to_this_plan(monkeypatch, folder, typed, wanted):
    told = {}
    monkeypatch.setattr("spi_utils.__main__.execute", lambda name, output, given, show: told.update(given))
    monkeypatch.setattr("spi_utils.__main__._print_summary", lambda run_dir: None)
    assert main(["run", "-p", "model", "bundled", "-p", "run_dir", str(folder / "run"), *typed]) == 0
    every = {**book.parameters_of(book.ALL), **told}
    chosen = resolve(every["preset"], every)
    assert {name: chosen[name] for name in wanted} == wanted
    plan = make_plan(
        layer_table(),
        score=chosen["score"],
        rule=chosen["rule"],
        value=chosen["value"],
        formats=tuple(chosen["formats"]) or ("nf4", "16bit"),
        writer=chosen["backend"],
    )
    assert plan.formats and (wanted["value"] or set(plan.formats.values()) == {"int8"})


def test_a_checkpoints_speed_is_told_as_json(monkeypatch, capsys, folder):
    (folder / "run").mkdir()
    assert main(["speed", str(folder / "run")]) == 1
    assert "01_analyze" in capsys.readouterr().err
    (folder / "config.json").write_text('{"dtype": "bfloat16"}')
    asked = {}
    monkeypatch.setattr(
        "spi_utils.speed.measure_in_subprocess",
        lambda path, **how: asked.update(how, path=path) or {"decode": [3, 2, 4]},
    )
    assert main(["speed", str(folder), "--device", "cpu", "--repeats", "2"]) == 0
    assert json.loads(capsys.readouterr().out) == {"decode": [3, 2, 4]}
    assert (asked["path"], asked["dtype"], asked["device"], asked["repeats"]) == (
        folder,
        "bfloat16",
        "cpu",
        2,
    )


# --- a stage alone ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "name", "value", "said"),
    [
        ("04_evaluate", "score", "fisher", "it is 02_visualize's. Leave it out, or run that stage too."),
        ("04_evaluate", "score", "no such", "it is 02_visualize's"),
        ("03_quantize", "windows", "3", "it is 04_evaluate's"),
        ("02_visualize", "over_budget", "stop", "has no parameter 'over_budget'"),
        ("04_evaluate", "windows", "abc", "windows='abc': expected a whole number"),
        ("04_evaluate", "windwos", "3", "Did you mean 'windows'?"),
        ("02_visualize", "rule", "top_k", "needs a value"),
    ],
)
def test_a_stage_alone_is_asked_for_its_own_parameters(monkeypatch, capsys, stage, name, value, said):
    monkeypatch.setattr(book, "execute", lambda *_, **__: pytest.fail("it was started"))
    assert main(["run", "--only", stage, "-p", "run_dir", "runs/x", "-p", name, value]) == 2
    assert said in capsys.readouterr().err


def test_a_stage_alone_gets_its_parameters(monkeypatch, tmp_path):
    told = {}
    monkeypatch.setattr(book, "execute", lambda name, output, given, show: told.update({name: given}) or 0.0)
    monkeypatch.setattr(book, "update_info", lambda run, change: None)
    for stage, name, text in (("04_evaluate", "windows", "3"), ("02_visualize", "value", "1e-2")):
        given = ["-p", "rule", "max_kl"] if name == "value" else []
        assert main(["run", "--only", stage, "-p", "run_dir", str(tmp_path), "-p", name, text, *given]) == 0
    assert told["04_evaluate"]["windows"] == 3 and told["02_visualize"]["value"] == 0.01


# --- what a run prints, and how it is interrupted ---------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("VBox(children=(HBox(children=(Dropdown(description='score', options=(('α', 'x'),)", False),
        ("HTML(value='<b>x</b>')", False),
        ("FloatSlider(value=1.0)", False),
        ("Output(outputs=())", False),
        ("<pandas.io.formats.style.Styler at 0x7f>", False),
        ("   ", False),
        ("spectra: 3/30, about 4 s left", True),
        ("Fisher's optimum (KL 0.01) lies below", True),
        ("Kept the plan saved from the explorer (3 layers)", True),
        ("Budget on Kaggle, T4, by arithmetic:", True),
    ],
)
def test_a_runs_progress_holds_lines_for_readers(line, shown):
    assert is_for_readers(line) == shown


def toy(folder, *code):
    notebook = nbformat.v4.new_notebook()
    first = nbformat.v4.new_code_cell('run_dir = ""')
    first.metadata["tags"] = ["parameters"]
    notebook.cells = [first, *map(nbformat.v4.new_code_cell, code)]
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "toy.ipynb")


@pytest.mark.slow
def test_a_widget_leaves_no_line_in_the_log(folder, monkeypatch):
    toy(
        folder,
        "import ipywidgets as w\nbox = w.VBox([w.HBox([w.FloatSlider(), w.HTML('x')]), w.Output()])\nbox",
        "from IPython.display import display\ndisplay(box.children[0])\nprint('after it')",
    )
    monkeypatch.setattr(book, "notebook_path", lambda name: folder / "toy.ipynb")
    lines = []
    book.execute("toy", folder / "out.ipynb", {}, show=lines.append)
    assert lines == ["after it"]


@pytest.mark.slow
def test_ctrl_c_ends_the_kernel_and_says_that_the_same_command_goes_on(folder):
    toy(folder, "import os, time\nopen(run_dir + '/pid', 'w').write(str(os.getpid()))\ntime.sleep(600)")
    code = (
        "import sys\nfrom pathlib import Path\nfrom spi_utils import notebook as book\n"
        "from spi_utils.__main__ import main\n"
        f"book.notebook_path = lambda name: Path({str(folder / 'toy.ipynb')!r})\n"
        f"sys.exit(main(['run', '-p', 'run_dir', {str(folder)!r}]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.monotonic() + 60
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.strip() == "Interrupted; the same command goes on where it stopped."
    assert not psutil.pid_exists(int((folder / "pid").read_text()))
