"""Notebook 02 in a real browser: the sliders move, plan.py's numbers appear, "Save plan" saves."""

import time
from pathlib import Path

import nbformat
import pytest

from spi_utils.explorer import ExplorerState
from spi_utils.notebook import notebook_path
from spi_utils.plan import read_plan
from tests.synthetic import make_run

pytestmark = pytest.mark.browser
PATIENCE = 120_000  # ms for a notebook to run on a busy machine


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("notebook") / "run", 70)


@pytest.fixture(scope="module")
def address(run, voila):
    """Notebook 02 with the run's directory as its parameter, served."""
    notebook = nbformat.read(notebook_path("02_visualize"), as_version=4)
    parameters = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    parameters.source += f"\nrun_dir = {str(run.path)!r}"
    copy = Path(run.path).parent / "02_visualize.ipynb"
    nbformat.write(notebook, copy)
    return voila(copy)


@pytest.fixture(scope="module")
def opened(address, visit):
    one = visit()
    one.page.goto(address, timeout=PATIENCE)
    one.page.wait_for_selector(".spi-explorer img", timeout=PATIENCE)
    return one


class Controls:
    """The explorer's parts, as a person sees them from the top."""

    def __init__(self, page) -> None:
        self.page = page
        self.box = page.locator(".spi-explorer")
        self.handle = self.box.locator(".noUi-handle").first
        self.numbers = self.box.locator("input[type=text]")
        self.pictures = self.box.locator("img")

    def line(self) -> str:
        return self.box.locator("b").first.inner_text()

    def number(self) -> float:
        return float(self.numbers.nth(0).input_value())

    def type(self, box: int, text: str) -> None:
        self.numbers.nth(box).fill(text)
        self.numbers.nth(box).press("Enter")

    def changed(self, read, before, seconds: float = 20):
        """Wait until `read()` gives something else than before, and return it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if read() != before:
                self.page.wait_for_timeout(300)  # all messages of this change
                return read()
            self.page.wait_for_timeout(50)
        pytest.fail(f"nothing changed within {seconds:.0f} s; still {before!r}")

    def picture(self, which: int = 0) -> str:
        return self.pictures.nth(which).get_attribute("src")


@pytest.fixture
def controls(opened):
    return Controls(opened.page)


def told(run, threshold: float, score="alpha_hill", direction="high") -> str:
    """What plan.py's numbers make of a threshold."""
    state = ExplorerState.open(run, score=score, direction=direction)
    state.set_threshold(threshold)
    return state.line()


def test_it_opens_at_the_plan_of_the_parameters(controls, run):
    plan = read_plan(run)
    assert controls.line().startswith(f"{len(plan.protected)} of 70 layers in 16-bit")
    assert plan.origin == "parameters"
    assert controls.page.locator("img").count() >= 8  # static figures stand beside the widget


def test_number_box(controls, run):
    line, picture = controls.line(), controls.picture()
    controls.type(0, "4.25")
    assert controls.changed(controls.line, line) == told(run, 4.25)
    assert controls.picture() != picture


def test_slider_by_keyboard(controls, run):
    number, picture = controls.number(), controls.picture()
    controls.handle.focus()
    for _ in range(15):
        controls.page.keyboard.press("ArrowRight")
    assert controls.changed(controls.number, number) > number
    assert controls.line() == told(run, controls.number())
    assert controls.picture() != picture


def test_slider_by_mouse(controls, run):
    number = controls.number()
    box = controls.handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    controls.page.mouse.move(x, y)
    controls.page.mouse.down()
    controls.page.mouse.move(x - 90, y, steps=6)
    controls.page.mouse.up()
    assert controls.changed(controls.number, number) < number
    assert controls.line() == told(run, controls.number())


def test_byte_budget_is_the_same_choice(controls, run):
    state = ExplorerState.open(run)
    size = sum(state.size_bounds) / 2
    line = controls.line()
    controls.type(1, f"{size / 1e6:.1f}")
    controls.changed(controls.line, line)
    state.set_size(float(f"{size / 1e6:.1f}") * 1e6)
    assert controls.line() == state.line()


def test_a_bad_number_is_refused_visibly(controls):
    line, number = controls.line(), controls.numbers.nth(0).input_value()
    for bad in ("seven", "1e9"):
        controls.type(0, bad)
        controls.page.wait_for_selector(".spi-explorer [role=status] >> text=⚠")
        controls.page.wait_for_timeout(300)
        assert controls.line() == line
        assert controls.numbers.nth(0).input_value() == number


def test_score_and_direction(controls, run):
    picture = controls.picture()
    controls.box.locator("select").first.select_option(label="a, decay of the singular values by rank")
    picture = controls.changed(controls.picture, picture)
    controls.box.locator("button", has_text="low end").click()
    controls.changed(controls.picture, picture)
    line = controls.line()
    controls.type(0, "0.21")
    assert controls.changed(controls.line, line) == told(run, 0.21, "alpha_decay", "low")


def test_choosing_a_layer_shows_its_spectrum(controls):
    spectrum = controls.picture(1)
    controls.box.locator("select").nth(1).select_option("down_proj")
    assert controls.changed(lambda: controls.picture(1), spectrum) != spectrum


def test_save_plan_writes_what_the_next_notebook_reads(controls, run):
    line = controls.line()
    controls.box.locator("button", has_text="Save plan").click()
    controls.page.wait_for_selector(".spi-explorer [role=status] >> text=Saved to")
    plan = read_plan(run)
    assert (plan.origin, plan.score, plan.direction) == ("slider", "alpha_decay", "low")
    assert line.startswith(f"{len(plan.protected)} of 70 layers in 16-bit")


def test_the_console_stayed_clean(opened):
    assert opened.errors == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_is_cut_off(opened, address, run, visit, theme):
    one = opened
    if theme == "dark":
        one = visit(1280, theme)
        one.page.goto(f"{address}?theme={theme}", timeout=PATIENCE)
        one.page.wait_for_selector(".spi-explorer img", timeout=PATIENCE)
    for width in (1280, 800):
        # Voila scrolls inside the page: only a window as high as the notebook shows all of it.
        one.page.set_viewport_size({"width": width, "height": 7000})
        one.page.wait_for_timeout(1000)
        one.page.screenshot(path=run.figures / f"screen_notebook_{width}_{theme}.png")
        assert one.cut_off() == []
    assert one.errors == []
