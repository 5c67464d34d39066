"""What can be said of every notebook without running it."""

import ast
import json
import re
from pathlib import Path

import nbformat
import pytest

from spi_utils.notebook import ALL, STAGES, parameters_of

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SHARED = ("model", "run_dir", "device", "dtype", "seed", "force")
TOKENS = re.compile(r"hf_[A-Za-z0-9]{20,}|gh[po]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|KGAT_[0-9a-f]{16,}")
ABSOLUTE = re.compile(r"(?<![\w.<{/:])/(?:home|root|Users|mnt|tmp|work|opt|usr)/")


def cells(path, kind="code"):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == kind]


def parameters_cell(path):
    return [c for c in cells(path) if "parameters" in c.metadata.get("tags", [])]


def test_there_are_the_notebooks_that_the_pipeline_names():
    assert {ALL, *STAGES} <= {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_valid_stripped_and_asks_for_a_gpu_only_where_it_computes(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    gpu = (notebook.metadata.get("accelerator"), notebook.metadata.colab.get("gpuType"))
    assert gpu == ((None, None) if path.stem in ("02_visualize", "05_publish") else ("GPU", "T4"))
    badges = "open-in-kaggle.svg" in cells(path, "markdown")[0].source
    assert badges == (path.stem in ("00_run_all", "06_compactness_lab"))  # where a fresh session can run
    for cell in cells(path):
        assert not cell.outputs and cell.execution_count is None
    assert cells(path, "markdown")[0].source.startswith("# ")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_one_parameters_cell_of_commented_literals(path):
    (cell,) = parameters_cell(path)
    lines = [line for line in cell.source.splitlines() if line.strip() and not line.startswith("#")]
    for line in lines:
        name, rest = line.split(" = ", 1)
        value, comment = rest.split("  # ", 1)
        ast.literal_eval(value)
        assert name.isidentifier() and len(comment) > 5
    names = [line.split(" = ", 1)[0] for line in lines]
    assert len(set(names)) == len(names)
    if path.stem[:2] != "06":
        assert set(SHARED) <= set(names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_secret_no_absolute_path_and_short_cells(path):
    text = path.read_text(encoding="utf-8")
    assert not TOKENS.search(text) and not ABSOLUTE.search(text)
    for cell in cells(path):
        code = [
            line for line in cell.source.splitlines() if line.strip() and not line.strip().startswith("#")
        ]
        if not {"parameters", "setup"} & set(cell.metadata.get("tags", [])):
            assert len(code) <= 18, cell.source
            ast.parse("\n".join(line for line in code if not line.startswith(("%", "!"))))
    assert json.loads(text)["nbformat"] == 4


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem != ALL], ids=lambda p: p.stem)
def test_every_parameter_is_used(path):
    (cell,) = parameters_cell(path)
    names = re.findall(r"^(\w+) = ", cell.source, flags=re.M)
    code = "\n".join(c.source for c in cells(path) if c is not cell and c.source != cell.source)
    unused = {name for name in names if not re.search(rf"\b{name}\b", code)}
    # shared by all so that one dictionary serves every stage; 02 and 05 compute nothing on a device
    assert unused <= {"device", "dtype", "seed", "force"}


def test_run_all_has_every_parameter_of_every_stage_with_the_same_default():
    everything = parameters_of(ALL)
    union = {}
    for stage in STAGES:
        for name, value in parameters_of(stage).items():
            assert union.setdefault(name, value) == value, f"{stage}: {name}"
    assert {name: everything.get(name, "missing") for name in union} == union
