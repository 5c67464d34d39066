"""Notebook 02 in a real browser: the sliders move, plan.py's numbers appear, "Save plan" saves."""

import time

import nbformat
import pytest

from spi_utils.explorer import ExplorerState
from spi_utils.notebook import notebook_path
from spi_utils.plan import read_plan
from tests.browser.fixtures import IPYWIDGETS
from tests.synthetic import make_run

pytestmark = pytest.mark.browser
PATIENCE = 120_000  # ms for a notebook to run on a busy machine
# Cells that run before the classic front end listens for widgets would show none.
READY = "window.Jupyter?.notebook?.kernel?.is_connected() && Jupyter.notebook.kernel.widget_manager"
SETTLED = 6000  # ms; the manager then asks the kernel for widgets, and drops what is shown before the answer


def notebook_for(run):
    """Notebook 02 with the run's directory as its parameter, beside it."""
    notebook = nbformat.read(notebook_path("02_visualize"), as_version=4)
    parameters = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    parameters.source += f"\nrun_dir = {str(run.path)!r}"
    nbformat.write(notebook, run.path.parent / "02_visualize.ipynb")
    return run.path.parent / "02_visualize.ipynb"


class Controls:
    """The explorer's parts, as a person sees them from the top."""

    def __init__(self, page) -> None:
        self.page = page
        self.box = page.locator(".spi-explorer")
        self.handle = self.box.locator(".noUi-handle").first
        self.numbers = self.box.locator("input[type=text]")

    def line(self) -> str:
        return self.box.locator("b").first.inner_text()

    def number(self) -> float:
        return float(self.numbers.nth(0).input_value())

    def type(self, box: int, text: str) -> None:
        self.numbers.nth(box).fill(text)
        self.numbers.nth(box).press("Enter")

    def changed(self, read, before, seconds: float = 20):
        """Wait until `read()` gives something else than before and stays so, and return it."""
        deadline, last = time.monotonic() + seconds, before
        while time.monotonic() < deadline:
            self.page.wait_for_timeout(400)  # all messages of this change
            last, now = read(), last
            if last == now != before:
                return last
        pytest.fail(f"nothing changed within {seconds:.0f} s; still {before!r}")

    def picture(self) -> str:
        return self.box.locator("img").first.get_attribute("src")


def test_the_explorer_is_moved_refuses_and_saves(tmp_path, voila, visit):
    run, one = make_run(tmp_path / "run", 70), visit()
    one.page.goto(voila(notebook_for(run)), timeout=PATIENCE)
    one.page.wait_for_selector(".spi-explorer img", timeout=PATIENCE)
    controls, state = Controls(one.page), ExplorerState.open(run)
    assert read_plan(run).origin == "parameters" and controls.line() == state.say("line")
    assert controls.page.locator("img").count() >= 7  # static figures stand beside the widget

    def follows(act, size: float | None = None) -> None:
        """An act changes line and picture together, to what plan.py makes of the new threshold."""
        line, picture = controls.line(), controls.picture()
        act()
        controls.changed(controls.line, line)
        state.set_size(size) if size else state.set_threshold(controls.number())
        assert controls.line() == state.say("line") and controls.picture() != picture

    follows(lambda: controls.type(0, "4.25"))
    controls.handle.focus()
    follows(lambda: [one.page.keyboard.press("ArrowRight") for _ in range(15)])
    assert controls.number() > 4.25
    box = controls.handle.bounding_box()
    one.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    one.page.mouse.down()
    follows(lambda: [one.page.mouse.move(box["x"] - 90, box["y"] + 5, steps=6), one.page.mouse.up()])
    size = round(state.sizes.mean() / 1e6, 1)
    follows(lambda: controls.type(1, str(size)), 1e6 * size)
    line, number = controls.line(), controls.number()
    for bad in ("seven", "1e9"):
        controls.type(0, bad)
        one.page.wait_for_selector(".spi-explorer [role=status] >> text=⚠")
        one.page.wait_for_timeout(300)
        assert (controls.line(), controls.number()) == (line, number)
    picture = controls.picture()
    controls.box.locator("select").first.select_option(label="a, decay of the singular values by rank")
    picture = controls.changed(controls.picture, picture)
    controls.box.locator("button", has_text="low end").click()
    controls.changed(controls.picture, picture)
    state.set_score("alpha_decay", "low")
    follows(lambda: controls.type(0, "0.21"))
    controls.box.locator("button", has_text="Save plan").click()
    one.page.wait_for_selector(".spi-explorer [role=status] >> text=Saved to")
    plan = read_plan(run)
    assert (plan.origin, plan.score, plan.direction) == ("slider", "alpha_decay", "low")
    assert controls.line().startswith(f"{len(plan.protected)} of 70 layers in 16-bit")
    # Voila scrolls inside the page: only a window as high as the notebook shows all of it.
    one.page.set_viewport_size({"width": 800, "height": 7000})
    one.page.wait_for_timeout(1000)
    assert one.cut_off() == []
    assert one.errors == []


@pytest.mark.skipif(IPYWIDGETS >= 8, reason="for ipywidgets 7, Colab's: see make test-images")
def test_the_explorer_works_with_ipywidgets_7(tmp_path, classic, visit):
    run, page = make_run(tmp_path / "run", 70), visit().page
    page.goto(classic(notebook_for(run)), timeout=PATIENCE)
    page.wait_for_function(READY, timeout=PATIENCE)
    page.wait_for_timeout(SETTLED)
    page.evaluate("Jupyter.notebook.execute_all_cells()")
    page.wait_for_selector(".spi-explorer img", timeout=PATIENCE)
    controls = Controls(page)
    before, line = controls.picture(), controls.line()
    controls.type(0, "3.0")
    assert controls.changed(controls.line, line) != line and controls.picture() != before
    kept = int(controls.line().split()[0])
    assert kept > int(line.split()[0]) and controls.number() == pytest.approx(3.0, abs=0.2)
    controls.box.locator("button", has_text="Save plan").click()
    said = "document.querySelector('.spi-explorer').innerText.includes('plan.json')"
    page.wait_for_function(said, timeout=PATIENCE)
    assert len(read_plan(run).protected) == kept
