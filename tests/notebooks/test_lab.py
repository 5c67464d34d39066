"""The compactness lab, executed on tiny networks."""

import re

import nbformat
import pytest

from spi_utils.notebook import execute

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
NAME = "06_compactness_lab"
TINY = {"levels": [4.2, 3.8], "width": 32, "depth": 1, "seeds": 2, "windows": 16, "layers": 60}
VERDICTS = {"supported", "refuted", "not separable"}


def test_the_lab_runs_tiny_and_ends_on_its_table(tmp_path):
    execute(NAME, tmp_path / "lab.ipynb", {"run_dir": str(tmp_path / "runs"), **TINY})
    book = nbformat.read(tmp_path / "lab.ipynb", as_version=4)
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert outputs and all(output.output_type != "error" for output in outputs)
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    tables = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert len(pictures) == 2 and len(list((tmp_path / "runs" / "trained").glob("*.json"))) == 6
    assert any("82" in table and "83" in table for table in tables)
    for table in tables[-2:]:
        cells = set(re.findall(r"<td[^>]*>([^<]*)</td>", table))
        assert "Spearman" in table and cells & VERDICTS
