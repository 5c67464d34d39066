"""The repository's address stands in pyproject.toml, and everywhere else as `make links` writes it."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest

import spi_utils
from spi_utils import platforms

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("links", ROOT / "scripts" / "links.py")
links = importlib.util.module_from_spec(spec)
spec.loader.exec_module(links)

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


def test_every_kind_of_link_is_rewritten_and_foreign_ones_are_left():
    text = links.relink(BADGES, "ada/spi-lab")
    assert text.count("ada/spi-lab") == 5 and text.count("OWNER/REPO") == 1
    assert "https://github.com/huggingface/transformers" in text
    assert "git clone https://github.com/ada/spi-lab.git && cd REPO" in text
    assert f'"git+https://github.com/ada/spi-lab@v{spi_utils.__version__}"' in text  # at the tag, not at main
    assert links.relink(text, "OWNER/REPO") == BADGES.replace("@main", f"@v{spi_utils.__version__}")


def test_the_whole_tree_follows_a_new_address(tmp_path, monkeypatch, capsys):
    for name in ("pyproject.toml", "kernel-metadata.json"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "README.md").write_text(BADGES)
    (tmp_path / "spi_utils").mkdir()
    (tmp_path / "spi_utils" / "__init__.py").write_text('__version__ = "7.8.9"\n')
    project = (tmp_path / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(
        re.sub(r'(Repository = ").*(")', r"\1https://github.com/Ada/spi\2", project)
    )
    monkeypatch.setattr(links, "ROOT", tmp_path)
    assert links.main(["--check"]) == 1 and "would change README.md" in capsys.readouterr().out
    assert links.main([]) == 0
    assert links.main(["--check"]) == 0 and links.changes("Ada/spi") == {}
    assert json.loads((tmp_path / "kernel-metadata.json").read_text())["id"].startswith("ada/")
    assert "git+https://github.com/Ada/spi@v7.8.9" in (tmp_path / "scripts" / "first_cell.py").read_text()
    badge = "colab.research.google.com/github/Ada/spi/blob/main/notebooks/00_run_all.ipynb"
    assert badge in (tmp_path / "notebooks" / "00_run_all.ipynb").read_text()


def test_a_notebooks_setup_cell_is_the_first_cell_with_the_address():
    cells = [
        {"cell_type": "code", "metadata": {"tags": ["setup"]}, "source": "old"},
        {"cell_type": "markdown", "metadata": {}, "source": ["no link\n", "here"]},
    ]
    text = json.dumps({"cells": cells})
    book = json.loads(links.relink_notebook(text, "ada/spi"))
    assert "git+https://github.com/ada/spi@" in book["cells"][0]["source"]
    assert book["cells"][1]["source"] == ["no link\n", "here"]
    unchanged = json.dumps({"cells": cells[1:]})
    assert links.relink_notebook(unchanged, "ada/spi") == unchanged


def test_an_address_elsewhere_is_refused(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text('[project]\nurls = {Repository = "https://example.org/x"}\n')
    monkeypatch.setattr(links, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"expected https://github\.com/owner/name"):
        links.address()


def test_the_kernel_metadata_is_what_kaggle_needs():
    kernel = json.loads((ROOT / "kernel-metadata.json").read_text())
    required = {
        "id",
        "title",
        "code_file",
        "language",
        "kernel_type",
        "enable_gpu",
        "machine_shape",
        "enable_internet",
    }
    assert required <= set(kernel)
    assert kernel["machine_shape"] == "NvidiaTeslaT4" and kernel["enable_gpu"] and kernel["enable_internet"]
    slug = re.sub(r"[^a-z0-9]+", "-", kernel["title"].lower()).strip("-")
    assert kernel["id"].split("/")[1] == slug  # Kaggle makes the address from the title
    book = json.loads((ROOT / kernel["code_file"]).read_text())
    assert book["metadata"]["kernelspec"]["name"] == "python3"


def test_the_first_cell_is_short_and_valid():
    text = (ROOT / "scripts" / "first_cell.py").read_text()
    assert len(text.splitlines()) <= 22 and "/kaggle/input" in text
    compile(text, "first_cell", "exec")


def test_the_package_states_its_address_only_once_it_is_fixed(monkeypatch):
    class Message:
        def __init__(self, address):
            self.address = address

        def get_all(self, name):
            return ["Issues, https://x", f"Repository, {self.address}"] if name == "Project-URL" else None

    monkeypatch.setattr(platforms.metadata, "metadata", lambda name: Message("https://github.com/OWNER/REPO"))
    assert platforms.repository_url() is None
    monkeypatch.setattr(platforms.metadata, "metadata", lambda name: Message("https://github.com/ada/spi"))
    assert platforms.repository_url() == "https://github.com/ada/spi"
