import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from spi_utils import notebook as book
from spi_utils.__main__ import main
from spi_utils.errors import ParameterError
from spi_utils.runs import open_run, run_info, write_text

IDENTITY = {"id": "a/b", "kind": "local", "revision": None, "sha256": "0" * 64, "storage_dtype": "float16"}


def write_notebook(path, parameters, *code):
    notebook = nbformat.v4.new_notebook()
    first = nbformat.v4.new_code_cell(parameters)
    first.metadata["tags"] = ["parameters"]
    notebook.cells = [first, *map(nbformat.v4.new_code_cell, code)]
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """Toy notebooks under the real names: each writes its file and counts its runs."""
    folder = tmp_path / "notebooks"
    monkeypatch.setattr(book, "notebook_path", lambda name: folder / f"{name}.ipynb")
    monkeypatch.setattr(book, "STAGES", book.STAGES[:3])
    monkeypatch.setattr(book.runs, "code_hash", lambda: "the same code")

    def make(name, code):
        write_notebook(folder / f"{name}.ipynb", 'run_dir = ""\nword = "x"\nforce = False', code)

    for name in book.STAGES:
        target = book.MADE[name]
        make(
            name,
            "from pathlib import Path\n"
            f"made, count = Path(run_dir, '{target}'), Path(run_dir, 'count-{name}')\n"
            "made.parent.mkdir(exist_ok=True); made.write_text(word)\n"
            "count.write_text(str(int(count.read_text() if count.exists() else 0) + 1))\n"
            f"print('{name} ran')",
        )
    return make


def counts(run):
    files = [run.path / f"count-{name}" for name in book.STAGES]
    return [int(file.read_text()) if file.exists() else 0 for file in files]


@pytest.mark.slow
def test_stages_run_in_order_are_recognised_and_follow_what_changed(toys, tmp_path):
    run = open_run(tmp_path / "run", IDENTITY)
    lines = []
    done = book.run_stages(run.path, {"word": "a"}, show=lambda *line: lines.append(line))
    assert counts(run) == [1, 1, 1] and all(seconds is not None for seconds in done.values())
    assert "03_quantize ran" in [line for name, _, line in lines if name == "03_quantize"]
    assert set(book.run_stages(run.path, {"word": "a"}).values()) == {None}
    write_text(run.plan_json, "a person's plan")
    book.run_stages(run.path, {"word": "a"})
    assert counts(run) == [1, 2, 1]  # this toy's 02 restores what 03 saw
    assert set(run_info(run)["notebooks"]) == set(book.STAGES)


@pytest.mark.slow
def test_the_first_failing_stage_stops_with_its_own_error(toys, tmp_path):
    run = open_run(tmp_path / "run", IDENTITY)
    toys("02_visualize", "raise ValueError('no such score: gamma')")
    with pytest.raises(book.NotebookError) as caught:
        book.run_stages(run.path, {})
    message = str(caught.value)
    assert "02_visualize failed: ValueError: no such score: gamma" in message
    assert str(run.notebooks / "02_visualize.ipynb") in message
    assert counts(run) == [1, 0, 0]


@pytest.mark.slow
def test_a_dead_kernel_is_said_to_be_out_of_memory(toys, tmp_path):
    toys("01_analyze", "import os; os._exit(1)")
    with pytest.raises(book.NotebookError, match=r"01_analyze failed: (the kernel died|Dead)") as caught:
        book.execute("01_analyze", tmp_path / "out.ipynb", {})
    assert caught.value.exit_code == 138


@pytest.mark.parametrize(("code", "told"), [(1, 1), (138, 138), (-9, 137)])
def test_the_command_ends_with_the_notebooks_own_code(monkeypatch, capsys, code, told):
    def failing(*_, **__):
        raise book.NotebookError("01_analyze failed: why", code)

    monkeypatch.setattr("spi_utils.__main__.run_stages", failing)
    assert main(["run", "--only", "01_analyze", "-p", "run_dir", "runs/x"]) == told
    assert capsys.readouterr().err == "NotebookError: 01_analyze failed: why\n"


def test_unknown_parameters_are_refused_before_anything_runs(toys, tmp_path):
    run = open_run(tmp_path / "run", IDENTITY)
    with pytest.raises(ParameterError, match=r"no parameter 'wrod'\. Did you mean 'word'\?"):
        book.run_stages(run.path, {"wrod": 1})
    with pytest.raises(ParameterError, match="It has run_dir, word, force"):
        book.execute("01_analyze", tmp_path / "out.ipynb", {"zzz": 1})
    assert counts(run) == [0, 0, 0]


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"score": "alpha_hil"}, "Did you mean 'alpha_hill'"),
        ({"direction": "hihg"}, "Did you mean 'high'"),
        ({"rule": "budget_gb"}, "needs a value"),
    ],
)
def test_a_plan_that_can_not_be_made_is_refused_before_the_analysis(monkeypatch, alone, wrong, words):
    monkeypatch.setattr(book, "interactive", lambda: not alone)
    chosen = {"score": "alpha_hill", "direction": "high", "rule": "claim", "value": None}
    book.check_given(chosen, "00_run_all")
    with pytest.raises(ParameterError, match=words):
        book.check_given(chosen | wrong, "00_run_all")


def injected(**parameters):
    """A cell as papermill makes it."""
    from papermill.parameterize import parameterize_notebook

    notebook = nbformat.v4.new_notebook()
    notebook.metadata = nbformat.from_dict({"kernelspec": {"name": "python3"}, "papermill": {}})
    made = parameterize_notebook(notebook, parameters, kernel_name="python3", language="python")
    return made.cells[0].source


def test_what_plain_papermill_lets_through_is_refused_by_the_notebook(monkeypatch):
    monkeypatch.setattr(book, "interactive", lambda: False)
    given = {"_x": 1, "exit": print, "SOURCE": "", "FIGURES": {}, **book.parameters_of("02_visualize")}
    book.check_given({**given, "In": ["", injected(score="alpha_pl")]}, "02_visualize")
    for stranger in ("scoer", "scores", "zzz"):
        cells = ["", injected(score="alpha_pl", **{stranger: "alpha_pl"})]
        with pytest.raises(ParameterError, match=rf"02_visualize\.ipynb has no parameter '{stranger}'\."):
            book.check_given({**given, "In": cells, stranger: "alpha_pl"}, "02_visualize")


def test_a_variable_of_ones_own_is_refused_only_where_it_looks_misspelt(monkeypatch):
    """Kaggle's "Save & Run All" is as headless as papermill, but its variables are a person's own."""
    monkeypatch.setattr(book, "interactive", lambda: False)
    given = {"In": ["", "mine = 1", "scoer = 2"], **book.parameters_of("02_visualize")}
    for name in ("mine", "notes", "scores", "format", "value2", "wheels", "what", "i", "model_2"):
        book.check_given({**given, name: 1}, "02_visualize")
    for name, meant in (("scoer", "score"), ("doubel_quant", "double_quant"), ("run_dri", "run_dir")):
        with pytest.raises(ParameterError, match=f"'{name}'. Did you mean '{meant}'. If it is a variable of"):
            book.check_given({**given, name: 1}, "02_visualize")
    monkeypatch.setattr(book, "interactive", lambda: True)
    book.check_given({**given, "scoer": 1, "mine": 1}, "02_visualize")


def test_every_stage_of_the_project_is_found_and_read():
    for name in book.STAGES:
        assert book.parameters_of(name)["model"] == "auto"
    with pytest.raises(book.NotebookError, match="no notebook '09_fly'"):
        book.notebook_path("09_fly")


def test_the_command_line_reports_and_exits(capsys, tmp_path):
    from spi_utils.__main__ import main

    assert main(["run", "-p", "modle", "bundled"]) == 2
    assert "Did you mean 'model'?" in capsys.readouterr().err
    assert main(["summary", str(tmp_path)]) == 1


def test_an_installed_package_finds_its_notebooks(tmp_path):
    root, package = Path(book.__file__).resolve().parent.parent, tmp_path / "spi_utils"
    shutil.copytree(root / "spi_utils", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(root / "notebooks", package / "notebooks")
    # An installation for development must not find the checkout's.
    code = (
        "import sys\nsys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "from spi_utils.notebook import notebook_path\nprint(notebook_path('05_publish'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.strip() == str(package / "notebooks" / "05_publish.ipynb"), done.stderr
