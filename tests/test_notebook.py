"""One table of parameters for every door; notebooks executed, recognised, interrupted; the command line."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml
from papermill.parameterize import parameterize_notebook

from spi_utils import __version__
from spi_utils import notebook as book
from spi_utils.__main__ import main
from spi_utils.batch import arguments_of, expand
from spi_utils.errors import ParameterError
from spi_utils.notebook import ALL, LAB, LAB_TABLE, STAGES, TABLE, check_given, parameters_of
from spi_utils.presets import resolve
from spi_utils.runs import open_run, run_info, write_text

ROOT = Path(__file__).resolve().parent.parent
SWITCHES = ("force", "trust_remote_code", "include_embeddings", "double_quant", "dry_run", "private")
COUNTS = ("seed", "min_tail", "workers", "sensitivity_windows", "sensitivity_length", "windows", "length")
COUNTS += ("random_seeds",)
LISTS = ("cost_formats", "refine_at", "formats", "rivals", "lm_eval_tasks")
TEXTS = [name for name, row in TABLE.items() if row.kind is str and row.many == "one"]
# Parameter, a wrong value as a notebook may hold it, and a piece of what must be said beside name and value.
WRONG = [
    *((name, 5, "") for name in TEXTS),
    *((name, None, "") for name in TABLE if not TABLE[name].optional),
    *((name, wrong, "True or False") for name in SWITCHES for wrong in ("maybe", 1)),
    *((name, wrong, "a whole number") for name in COUNTS for wrong in ("abc", 2.5, -1, True, [8])),
    *((name, "nf4", "a list") for name in LISTS),
    ("preset", "smal", "Did you mean 'small'?"),
    ("preset", {"a": 1}, "one of 'claim'"),
    ("windows", "8", "a whole number"),
    ("length", 1, "from 2, or 0"),
    ("seed", 2**32, "to 4294967295"),
    ("refine_at", 5.65, "a list"),
    ("refine_at", [3], "between 4 and 16"),
    ("cost_formats", ["nf5"], "Did you mean 'nf4'?"),
    ("score", "alpha_hil", "Did you mean 'alpha_hill'?"),
    ("backend", "bitsandbyte", "Did you mean 'bitsandbytes'?"),
    ("group", False, "or None"),
    *(("value", wrong, "a finite number, or None") for wrong in ("x", float("nan"), float("inf"), True)),
    *(("device", wrong, "'cuda:0'") for wrong in ("gpu", "cuda:x")),
    *(("max_shard_size", wrong, "'500MB'") for wrong in ("2", "0GB", "0.0 MB")),
    *(("texts", wrong, "path of a text file") for wrong in ("no-such.txt", "pydoc,no-such.txt")),
    ("texts", ["pydoc", 3], "3 is none"),
    ("texts", [], "it is empty"),
    ("layers", "(", "unterminated subpattern"),
    ("forbid_16bit", ["a", "*"], "nothing to repeat"),
    ("rivals", ["no/such/folder"], "a folder or a Hub id"),
    ("lm_eval_tasks", [""], "a task's name"),
    *(
        ("repo_id", wrong, "'owner/name'")
        for wrong in ("a b/c", "a/b/c", "a/b--c", "a/b.git", "a/" + "b" * 97)
    ),
    ("revision", 1.0, "a text"),
    ("model", " ", "a Hub id"),
    *(("run_dir", wrong, "that can be written") for wrong in (__file__, f"{__file__}/below/it")),
]
RIGHT = [
    *(("seed", 0), ("windows", 0), ("length", 0), ("length", 2), ("refine_at", []), ("refine_at", [5, 5.65])),
    *(("cost_formats", ["16bit", "nf4"]), ("group", None), ("group", "fused"), ("device", "cuda:1")),
    *(("texts", "pydoc, pycode"), ("texts", __file__), ("texts", ["wikitext2", __file__])),
    *(
        ("sensitivity", "none"),
        ("force_16bit", r"layers\.0\."),
        ("force_16bit", ["lm_head"]),
        ("repo_id", ""),
    ),
    *(("rivals", ["owner/name", "."]), ("repo_id", "name"), ("repo_id", "owner/my-model_1.5")),
    *(("max_shard_size", "1.5gb"), ("run_dir", "runs/new/one"), ("revision", "")),
]
# In the lab, and where a rule and its number belong together.
WRONG_TOGETHER = [
    *((LAB, {"seeds": 0}, "from 1"), (LAB, {"coefficient": 0}, "above 0"), (LAB, {"levels": []}, "is empty")),
    *((LAB, {"levels": 2.0}, "a list"), (LAB, {"width": 97}, "a multiple of 8")),
    *((ALL, {"rule": rule, "value": value}, said) for rule, value, said in [
        *(("claim", 3, "use rule='top_k'"), ("top_k", None, "needs a value"), ("top_k", 2.5, "a whole one")),
        *(("top_k", -1, "a whole one"), ("budget_gb", 0, "above 0"), ("max_kl", -0.1, "from 0")),
    ]),
]  # fmt: skip


def everything(notebook=ALL, **changes):
    return {**parameters_of(notebook), **changes}


# --- the table --------------------------------------------------------------------------------------------


def test_every_parameter_has_a_row_and_its_default_may_stand():
    assert set(TABLE) == set(parameters_of(ALL)) and set(LAB_TABLE) == set(parameters_of(LAB))
    assert {name for name, _, _ in WRONG} | {"rule", "value"} == set(TABLE)
    for notebook in (ALL, *STAGES, LAB):
        book.check_values(parameters_of(notebook), notebook)


def test_names_that_are_repeated_here_are_those_of_their_modules():
    from spi_utils.evaluate import PROFILES
    from spi_utils.quantize import OVERFLOW
    from spi_utils.sensitivity import OWN
    from spi_utils.texts import NAMES

    assert set(TABLE["profile"].choices) == set(PROFILES)
    assert set(TABLE["overflow"].choices) == set(OVERFLOW)
    assert set(TABLE["sensitivity"].choices) == {*OWN, "measured", "none", *NAMES}


@pytest.mark.parametrize(("name", "value", "said"), WRONG, ids=lambda x: str(x)[:30])
def test_a_wrong_value_is_refused_by_every_door(name, value, said, monkeypatch, capsys):
    for notebook in (ALL, *STAGES):
        if name in parameters_of(notebook):
            with pytest.raises(ParameterError) as refused:
                check_given(everything(notebook, **{name: value}), notebook)
            assert str(refused.value).startswith(f"{name}={value!r}: expected ") and said in str(
                refused.value
            )
    if value == "8":  # right where it comes as text
        return
    if name not in ("run_dir", "force", "repo_id", "dry_run", "over_budget", "model"):  # a grid has none
        with pytest.raises(ParameterError, match=rf"^the grid: {name}="):
            expand({"models": ["a/b"], "parameters": {name: value}})
    # A text takes any digits; a null is a text there, too.
    if value is None or (TABLE[name].kind is str and isinstance(value, int | float)):
        return
    monkeypatch.setattr(book, "execute", lambda *_, **__: pytest.fail("it was started"))
    typed = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).split("\n")[0]
    assert main(["run", "-p", "run_dir", "runs/x", "-p", name, typed]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ParameterError: {name}=") and error.count("\n") == 1


def test_what_is_wrong_in_the_lab_or_together_is_refused_and_what_is_right_may_stand():
    for notebook, wrong, said in WRONG_TOGETHER:
        with pytest.raises(ParameterError, match=said):
            check_given(everything(notebook, **wrong), notebook)
    for name, value in RIGHT:
        check_given(everything(**{name: value}), ALL)


READ = [
    *(("value", "1e-2", 0.01), ("value", "5.65", 5.65), ("value", "12", 12), ("value", "null", None)),
    *(("revision", "1.0", "1.0"), ("revision", "no", "no"), ("revision", "'1e3'", "1e3")),
    *(("revision", "null", "null"), ("model", "5", "5"), ("model", "2026-01-01", "2026-01-01")),
    *(("layers", "[abc]", "[abc]"), ("layers", "''", ""), ("force_16bit", "[a-z]+_proj", "[a-z]+_proj")),
    *(("force_16bit", "[lm_head, '7']", ["lm_head", "7"]), ("force_16bit", "[no]", ["no"])),
    *(("group", "null", None), ("double_quant", "no", False), ("double_quant", "True", True)),
    *(("seed", "010", 10), ("refine_at", "[5.65, 6e0]", [5.65, 6.0]), ("windows", "[1", "[1")),
    *(("cost_formats", "[nf4, int8]", ["nf4", "int8"]), ("texts", "pydoc, pycode", "pydoc, pycode")),
]


@pytest.mark.parametrize(("name", "text", "value"), READ, ids=str)
def test_a_text_is_read_by_the_parameters_own_kind_and_handed_on_unchanged(name, text, value):
    found = book.from_command_line(name, text)
    assert found == value and type(found) is type(value)
    told = arguments_of([ALL], {name: value})
    assert book.from_command_line(name, told[-1]) == value  # a batch's jobs are command lines


def test_what_plain_papermill_lets_through_is_refused_by_the_notebook(monkeypatch):
    monkeypatch.setattr(book, "interactive", lambda: False)
    notebook = nbformat.v4.new_notebook()
    notebook.metadata = nbformat.from_dict({"kernelspec": {"name": "python3"}, "papermill": {}})
    given = {"mine": 1, "exit": print, **parameters_of("02_visualize")}
    for name, said in (("score", ""), ("scoer", "Did you mean 'score'"), ("zzz", "It has model,")):
        made = parameterize_notebook(notebook, {name: "fisher"}, kernel_name="python3", language="python")
        cells = {"In": ["", made.cells[0].source, "mine = 1"]}
        if said:
            with pytest.raises(ParameterError, match=f"02_visualize has no parameter '{name}'.*{said}"):
                check_given(given | cells, "02_visualize")
        else:
            check_given(given | cells, "02_visualize")


# --- notebooks, executed ----------------------------------------------------------------------------------


def toy(path, *code):
    notebook = nbformat.v4.new_notebook()
    first = nbformat.v4.new_code_cell('run_dir = ""\nword = "x"\nforce = False')
    first.metadata["tags"] = ["parameters"]
    notebook.cells = [first, *map(nbformat.v4.new_code_cell, code)]
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """The folder of two toy notebooks under real names: each writes its file and counts its runs."""
    folder = tmp_path / "notebooks"
    monkeypatch.setattr(book, "notebook_path", lambda name: folder / f"{name}.ipynb")
    monkeypatch.setattr(book, "STAGES", STAGES[:2])
    monkeypatch.setattr(book.runs, "code_hash", lambda: "the same code")
    for name in book.STAGES:
        toy(
            folder / f"{name}.ipynb",
            f"from pathlib import Path\nPath(run_dir, '{book.MADE[name]}').write_text(word)\n"
            f"open(run_dir + '/count-{name}', 'a').write('x')\nprint('{name} ran')",
        )
    return folder


IDENTITY = {"id": "a/b", "kind": "local", "revision": None, "sha256": "0" * 64, "storage_dtype": "float16"}


@pytest.mark.slow
def test_stages_run_in_order_are_recognised_follow_what_changed_and_stop_at_a_failure(toys, tmp_path):
    run, lines = open_run(tmp_path / "run", IDENTITY), []

    def counts():
        return [len((run.path / f"count-{name}").read_text()) for name in book.STAGES]

    done = book.run_stages(run.path, {"word": "a"}, show=lambda *line: lines.append(line))
    assert counts() == [1, 1] and all(seconds is not None for seconds in done.values())
    assert "02_visualize ran" in [line for name, _, line in lines if name == "02_visualize"]
    assert set(book.run_stages(run.path, {"word": "a"}).values()) == {None}
    write_text(run.plan_json, "a person's plan")
    book.run_stages(run.path, {"word": "a"})
    assert counts() == [1, 2] and set(run_info(run)["notebooks"]) == set(book.STAGES)
    widget = "import ipywidgets as w\nfrom IPython.display import display\nbox = w.VBox([w.FloatSlider()])"
    toy(toys / "01_analyze.ipynb", f"{widget}\ndisplay(box)\nprint('after it')\nraise ValueError('no gamma')")
    lines.clear()
    with pytest.raises(book.NotebookError, match=r"01_analyze failed: ValueError: no gamma") as caught:
        book.run_stages(run.path, {"word": "a"}, show=lambda *line: lines.append(line[2]))
    assert str(run.notebooks / "01_analyze.ipynb") in str(caught.value) and counts() == [1, 2]
    assert lines == ["after it"]  # neither the widget's repr nor papermill's own lines
    with pytest.raises(ParameterError, match=r"no parameter 'wrod'\. Did you mean 'word'\?"):
        book.run_stages(run.path, {"wrod": 1})


@pytest.mark.slow
def test_a_dead_kernel_is_said_to_be_out_of_memory(toys, tmp_path):
    toy(toys / "01_analyze.ipynb", "import os; os._exit(1)")
    with pytest.raises(book.NotebookError, match=r"01_analyze failed: (the kernel died|Dead)"):
        book.execute("01_analyze", tmp_path / "out.ipynb", {})


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    def full(notebook, output, parameters, show):
        output.write_text('{"cells": [{"cell_ty')  # papermill has cut the executed copy
        return 1, "Traceback (most recent call last)\nOSError: [Errno 28] No space left on device\n"

    monkeypatch.setattr(book, "_papermill", full)
    with pytest.raises(book.NotebookError, match=r"01_analyze failed: the disk is full\. Free some space"):
        book.execute("01_analyze", tmp_path / "run" / "out.ipynb", {})


def python(code, **options):
    """What a fresh interpreter that sees this checkout prints and how it ends."""
    environment = {**os.environ, "PYTHONPATH": str(options.pop("path", ROOT)), "CUDA_VISIBLE_DEVICES": ""}
    options = {"capture_output": True, "text": True, "env": environment, "timeout": 120, **options}
    return subprocess.run([sys.executable, "-c", code], check=False, **options)


def test_an_installed_package_finds_its_notebooks(tmp_path):
    package = tmp_path / "spi_utils"
    shutil.copytree(ROOT / "spi_utils", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "notebooks", package / "notebooks")
    code = "from spi_utils.notebook import notebook_path\nprint(notebook_path('05_publish'))"
    done = python(code, path=tmp_path, cwd=tmp_path)
    assert done.stdout.strip() == str(package / "notebooks" / "05_publish.ipynb"), done.stderr
    with pytest.raises(book.NotebookError, match="no notebook '09_fly'"):
        book.notebook_path("09_fly")


# --- the command line -------------------------------------------------------------------------------------

WRONG_CALLS = [
    ("run -p model 5", 1, "ModelError: '5' is neither a directory here nor a Hub id"),
    ("run -p windwos 3", 2, "ParameterError: 00_run_all has no parameter 'windwos'. Did you mean 'windows'"),
    ("run -p run_dir file/a/b", 2, "ParameterError: run_dir='file/a/b': expected 'auto', or a folder"),
    ("run --only 04_evaluate -p texts nope", 2, "ParameterError: texts='nope': expected"),
    ("run --only 04_evaluate -p score fisher", 2, "ParameterError: 04_evaluate has no parameter 'score'"),
    ("run --only 02_visualize -p rule top_k", 2, "ParameterError: rule='top_k' needs a value"),
    ("summary nowhere", 1, "RunError: nowhere/run.json: there is no run record here"),
    ("speed nowhere", 1, "RunError: nowhere/run.json"),
    ("summary file", 1, ""),
    ("batch nowhere.yaml", 1, "BatchError: nowhere.yaml: can't be read"),
]


@pytest.mark.parametrize(("line", "code", "said"), WRONG_CALLS, ids=lambda x: str(x)[:40])
def test_a_wrong_call_ends_with_one_line_and_a_code(tmp_path, monkeypatch, capsys, line, code, said):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    assert main(line.split()) == code
    out, error = capsys.readouterr()
    assert out == "" and error.startswith(said) and error.count("\n") == 1 and not Path("runs").exists()


def test_the_command_answers_at_once_where_torch_is_not_needed(capsys):
    done = python(
        "import sys; from spi_utils.__main__ import main\n"
        "print(main(['run', '-p', 'windows', 'abc']), 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    assert done.stdout.split() == ["2", "False", "False"]
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"spi_utils {__version__}\n"


def test_a_disk_that_can_not_be_written_is_one_line(tmp_path):
    def nothing_fits():
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    code = "import sys; from spi_utils.__main__ import main; sys.exit(main(['run', '-p', 'run_dir', 'new']))"
    done = python(code, cwd=tmp_path, preexec_fn=nothing_fits)
    assert done.returncode == 1 and "Free some space" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["", "batch"])
def test_the_help_lists_every_command_and_every_parameter_with_its_default(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0
    if not command:
        assert all(f"    {word}  " in told for word in ("run", "summary", "speed", "publish", "batch"))
        return
    for name, default in parameters_of(ALL).items():
        (line,) = re.findall(rf"^  {name} +(.*)$", told, re.MULTILINE)
        shown = json.dumps(default) if isinstance(default, str | list) else repr(default)
        assert line.startswith(f"{shown} ") and len(line) > len(shown) + 5


def test_what_is_typed_reaches_the_notebooks(monkeypatch, tmp_path):
    told = {}
    monkeypatch.setattr(book, "execute", lambda name, output, given, show: told.update({name: given}) or 0.0)
    monkeypatch.setattr(book.runs, "update_info", lambda run, change: None)
    monkeypatch.setattr("spi_utils.__main__._summary", lambda run_dir: None)
    where = ["-p", "model", "bundled", "-p", "run_dir", str(tmp_path / "run")]
    assert main(["run", *where, "--preset", "small", "-p", "formats", "[int8, 16bit]"]) == 0
    every = {**parameters_of(ALL), **told[ALL]}
    chosen = resolve(every["preset"], every)
    assert (chosen["rule"], chosen["value"], chosen["formats"]) == ("matrix_bits", 4.6, ["int8", "16bit"])
    assert main(["run", *where, "--only", "04_evaluate", "-p", "windows", "3"]) == 0
    assert told["04_evaluate"]["windows"] == 3


@pytest.mark.slow
def test_ctrl_c_ends_the_kernel_and_says_that_the_same_command_goes_on(tmp_path):
    pid = "import os, time\nopen(run_dir + '/pid', 'w').write(str(os.getpid()))\ntime.sleep(600)"
    toy(tmp_path / "toy.ipynb", pid)
    code = (
        "import sys\nfrom pathlib import Path\nfrom spi_utils import notebook as book\n"
        "from spi_utils.__main__ import main\n"
        f"book.notebook_path = lambda name: Path({str(tmp_path / 'toy.ipynb')!r})\n"
        f"sys.exit(main(['run', '-p', 'run_dir', {str(tmp_path)!r}]))"
    )
    here = {"stderr": subprocess.PIPE, "text": True, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    process = subprocess.Popen([sys.executable, "-c", code], **here)
    deadline = time.monotonic() + 90
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.strip() == "Interrupted; the same command goes on where it stopped."
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
