"""What can be said of README, the docs and the notebooks without running them; `make links`."""

import ast
import importlib.util
import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest

from spi_utils.notebook import ALL, STAGES, parameters_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHARED = {"model", "run_dir", "device", "dtype", "seed", "force"}
TOKENS = re.compile(r"hf_[A-Za-z0-9]{20,}|gh[po]_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|KGAT_[0-9a-f]{16,}")
ABSOLUTE = re.compile(r"(?<![\w.<{/:])/(?:home|root|Users|mnt|tmp|work|opt|usr)/")


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


links, numbers = script("links"), script("readme_numbers")

# --- pages ------------------------------------------------------------------------------------------------


def test_the_front_page_is_short_and_its_numbers_are_those_of_the_runs(tmp_path, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 10_000
    assert numbers.main(["--check"]) == 0, capsys.readouterr().out
    page = tmp_path / "README.md"
    monkeypatch.setattr(numbers, "PAGES", (page,))
    monkeypatch.setattr(numbers, "ROOT", tmp_path)
    block = text.index("<!-- numbers:verdict -->")
    digit = re.search(r"\d", text[block:]).start() + block
    page.write_text(f"{text[:digit]}{(int(text[digit]) + 1) % 10}{text[digit + 1 :]}", encoding="utf-8")
    assert numbers.main(["--check"]) == 1
    assert numbers.main([]) == 0 and page.read_text(encoding="utf-8") == text


def test_the_parameters_that_the_front_page_names_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| `", text, flags=re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert len(named) >= 10 and named - set(numbers.PRESETS) <= set(parameters_of(ALL))
    assert set(re.findall(r"-p (\w+)", text)) <= set(parameters_of(ALL))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_within_the_project_leads_somewhere(page):
    # An image is shown on PyPI too, so its address is absolute.
    ours = r"https://raw\.githubusercontent\.com/[^/]+/[^/]+/main/"
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(ours, "", page.read_text(encoding="utf-8"))):
        if not link.startswith(("http", "mailto:")):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            heads = re.findall(r"^#+ (.+)$", target.read_text(), flags=re.M) if anchor else []
            anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
            assert not anchor or anchor in anchors, f"{page.name}: {link}"


# --- the repository's address -----------------------------------------------------------------------------

BADGES = """[![k](x)](https://www.kaggle.com/notebooks/welcome?src=https://github.com/OWNER/REPO/blob/main/notebooks/a.ipynb&accelerator=nvidiaTeslaT4)
[![c](y)](https://colab.research.google.com/github/OWNER/REPO/blob/main/notebooks/a.ipynb)
git clone https://github.com/OWNER/REPO.git && cd REPO
git clone https://github.com/OWNER/REPO
pip install "git+https://github.com/OWNER/REPO@main"
See https://github.com/huggingface/transformers and https://github.com/OWNER/REPO/issues.
"""


def test_every_committed_file_holds_pyprojects_address():
    found = links.changes(links.address())
    assert not found, f"run `make links`: {sorted(path.name for path in found)}"


def test_the_whole_tree_follows_a_new_address(tmp_path, monkeypatch, capsys):
    for folder in ("notebooks", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "kernel-metadata.json", tmp_path)
    (tmp_path / "README.md").write_text(BADGES)
    (tmp_path / "spi_utils").mkdir()
    (tmp_path / "spi_utils" / "__init__.py").write_text('__version__ = "7.8.9"\n')
    project = tmp_path / "pyproject.toml"
    monkeypatch.setattr(links, "ROOT", tmp_path)
    project.write_text('[project.urls]\nRepository = "https://example.org/x"\n')
    with pytest.raises(SystemExit, match=r"expected https://github\.com/owner/name"):
        links.address()
    project.write_text('[project.urls]\nRepository = "https://github.com/Ada/spi"\n')
    assert links.main(["--check"]) == 1 and "would change README.md" in capsys.readouterr().out
    assert links.main([]) == 0
    assert links.main(["--check"]) == 0 and links.changes("Ada/spi") == {}
    assert json.loads((tmp_path / "kernel-metadata.json").read_text())["id"].startswith("ada/")
    assert "git+https://github.com/Ada/spi@v7.8.9" in (tmp_path / "scripts" / "first_cell.py").read_text()
    book = (tmp_path / "notebooks" / "00_run_all.ipynb").read_text()
    assert "colab.research.google.com/github/Ada/spi/blob/main/notebooks/00_run_all.ipynb" in book
    assert "git+https://github.com/Ada/spi@v7.8.9" in book  # the first cell


def test_the_kernel_metadata_is_what_kaggle_needs():
    kernel = json.loads((ROOT / "kernel-metadata.json").read_text())
    assert kernel["machine_shape"] == "NvidiaTeslaT4" and kernel["enable_gpu"] and kernel["enable_internet"]
    assert (kernel["language"], kernel["kernel_type"]) == ("python", "notebook")
    slug = re.sub(r"[^a-z0-9]+", "-", kernel["title"].lower()).strip("-")
    assert kernel["id"].split("/")[1] == slug  # Kaggle makes the address from the title
    book = json.loads((ROOT / kernel["code_file"]).read_text())
    assert book["metadata"]["kernelspec"]["name"] == "python3"


# --- notebooks --------------------------------------------------------------------------------------------


def test_run_all_has_every_parameter_of_every_stage_with_the_same_default():
    assert {ALL, *STAGES} <= {path.stem for path in NOTEBOOKS}
    everything = parameters_of(ALL)
    for stage in STAGES:
        own = parameters_of(stage)
        assert {name: everything.get(name, "missing") for name in own} == own, stage


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_valid_stripped_short_and_commented(path):
    notebook, text = nbformat.read(path, as_version=4), path.read_text(encoding="utf-8")
    nbformat.validate(notebook)
    assert not TOKENS.search(text) and not ABSOLUTE.search(text)
    assert notebook.metadata.kernelspec.name == "python3"
    gpu = (notebook.metadata.get("accelerator"), notebook.metadata.colab.get("gpuType"))
    assert gpu == ((None, None) if path.stem in ("02_visualize", "05_publish") else ("GPU", "T4"))
    title = next(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    fresh = path.stem in (ALL, "06_compactness_lab")  # where a fresh session can run
    assert title.startswith("# ") and ("open-in-kaggle.svg" in title) == fresh
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    (parameters,) = (cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
    names = []
    for line in parameters.source.splitlines():
        if line.strip() and not line.startswith("#"):
            name, value, comment = re.fullmatch(r"(\w+) = (.*?)  # (.*)", line).groups()
            ast.literal_eval(value)
            assert len(comment) > 5
            names.append(name)
    assert len(set(names)) == len(names) and (path.stem[:2] == "06" or set(names) >= SHARED)
    rest = [cell for cell in cells if cell is not parameters]
    for cell in cells:
        assert not cell.outputs and cell.execution_count is None
    for cell in rest:
        code = [line for line in cell.source.splitlines() if line.strip() and line.strip()[0] not in "#%!"]
        assert "setup" in cell.metadata.get("tags", []) or len(code) <= 18, cell.source
        ast.parse("\n".join(code))
    unused = {name for name in names if not any(re.search(rf"\b{name}\b", cell.source) for cell in rest)}
    # shared by all so that one dictionary serves every stage; 02 and 05 compute nothing on a device
    assert path.stem == ALL or unused <= {"device", "dtype", "seed", "force"}
