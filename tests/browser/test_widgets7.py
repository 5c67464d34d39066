"""Notebook 02 with ipywidgets 7, as Colab has it, in the classic Jupyter front end (`make test-images`)."""

from pathlib import Path

import nbformat
import pytest

from spi_utils.notebook import notebook_path
from spi_utils.plan import read_plan
from tests.browser.fixtures import IPYWIDGETS
from tests.browser.test_notebook import PATIENCE, Controls
from tests.synthetic import make_run

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(IPYWIDGETS >= 8, reason="for ipywidgets 7, Colab's: see make test-images"),
]
# Cells that run before the front end listens for widgets would show none.
READY = """window.Jupyter && Jupyter.notebook && Jupyter.notebook.kernel
           && Jupyter.notebook.kernel.is_connected()
           && Jupyter.notebook.kernel.widget_manager"""
SETTLED = 6000  # ms; the manager then asks the kernel for widgets, and drops what is shown before the answer


def test_the_explorer_works_with_ipywidgets_7(tmp_path, classic, visit):
    run = make_run(tmp_path / "run", 70)
    notebook = nbformat.read(notebook_path("02_visualize"), as_version=4)
    parameters = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    parameters.source += f"\nrun_dir = {str(run.path)!r}"
    nbformat.write(notebook, Path(tmp_path) / "02_visualize.ipynb")
    page = visit().page
    page.goto(classic(tmp_path / "02_visualize.ipynb"), timeout=PATIENCE)
    page.wait_for_function(READY, timeout=PATIENCE)
    page.wait_for_timeout(SETTLED)
    page.evaluate("Jupyter.notebook.execute_all_cells()")
    page.wait_for_selector(".spi-explorer img", timeout=PATIENCE)
    controls = Controls(page)
    before, line = controls.picture(), controls.line()
    controls.type(0, "3.0")
    assert controls.changed(controls.line, line) != line and controls.picture() != before
    assert controls.number() == pytest.approx(3.0, abs=0.2)
    kept = int(controls.line().split()[0])
    assert kept > int(line.split()[0])  # a lower threshold keeps more
    controls.box.locator("button", has_text="Save plan").click()
    page.wait_for_function(
        "document.querySelector('.spi-explorer').innerText.includes('plan.json')", timeout=PATIENCE
    )
    assert len(read_plan(run).protected) == kept
