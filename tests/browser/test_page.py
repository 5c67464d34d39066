"""explorer.html in a real browser, opened from a file with the network off."""

import shlex

import pytest

from spi_utils.explorer import ExplorerState, write_explorer
from spi_utils.plan import make_plan
from spi_utils.runs import read_layers
from tests.synthetic import layer_table, make_run

pytestmark = pytest.mark.browser
CHARTS = ("map", "histogram", "frontier")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    table = layer_table(70)
    table.loc[[5, 30], ["status", "alpha_hill", "alpha_pl"]] = ["failed", None, None]
    run = make_run(tmp_path_factory.mktemp("page") / "run", layers=table)
    write_explorer(run)
    return run


@pytest.fixture(scope="module")
def page(run, visit):
    """The page, opened once: each test starts at the choice that it makes."""
    one = visit(offline=True)
    one.page.goto(run.explorer.as_uri())
    one.page.wait_for_selector("body[data-ready=yes]")
    yield one.page
    assert one.errors == []


@pytest.fixture
def state(run):
    return ExplorerState.open(run)


def enter(page, box: str, text: str) -> str:
    page.fill(box, text)
    page.press(box, "Enter")
    return page.inner_text("#answer")


def test_the_choice_is_the_notebooks_and_ends_with_what_makes_it(page, run, state):
    pictures = f"{list(CHARTS)}.map(name => document.querySelector('#' + name + ' canvas').toDataURL())"
    before = page.evaluate(pictures)
    choices = (("alpha_hill", "high", 4.5), ("alpha_decay", "low", 0.2), ("smallest", "high", -5.9))
    for score, direction, value in choices:
        page.select_option("#score", score)
        page.select_option("#direction", direction)
        state.set_score(score, direction)
        state.set_threshold(value)
        assert enter(page, "#number", f"{value}") == state.say("line")
        assert page.inner_text("#standing") == state.say("comparison")
        told = page.inner_text("#notes")
        assert state.say("ties") in told and all(name in told for name in state.held)  # two failed layers
    page.wait_for_timeout(300)
    assert all(old != new for old, new in zip(before, page.evaluate(pictures), strict=True))
    cell, command = page.inner_text("#parameters").split("\n\n")
    given = {}
    exec(cell, given)  # a parameters cell of notebook 02
    chosen = {name: given[name] for name in ("score", "direction", "rule", "value")}
    made = make_plan(read_layers(run), **chosen, force_16bit=given["force_16bit"])
    assert made.protected == state.plan().protected
    words = shlex.split(command)
    assert words[:4] == ["spi-utils", "run", "-p", "model"]
    typed = dict(zip(words[6::3], words[7::3], strict=True))
    assert {name: typed[name] for name in chosen} == {name: str(value) for name, value in chosen.items()}
    page.click("#copy")
    page.wait_for_function("document.querySelector('#copied').textContent !== ''")


def test_sliders_move_by_keyboard_and_mouse(page, state):
    page.select_option("#score", "alpha_hill")
    page.select_option("#direction", "high")
    enter(page, "#number", "4")
    page.focus("#slider")
    page.keyboard.press("ArrowRight")
    second = float(page.input_value("#number"))
    assert second > 4
    box = page.locator("#slider").bounding_box()
    page.mouse.click(box["x"] + 0.9 * box["width"], box["y"] + box["height"] / 2)
    third = float(page.input_value("#number"))
    state.set_threshold(third)
    assert third > second and page.inner_text("#answer") == state.say("line")
    page.focus("#size")
    for key, count in (("End", 70), ("Home", 2)):
        page.keyboard.press(key)
        assert page.inner_text("#answer").startswith(f"{count} of 70 layers in 16-bit, 2 of them as")
    page.select_option("#score", "alpha_decay")  # as many layers stay protected
    assert page.inner_text("#answer").startswith("2 of 70")


def test_a_bad_number_is_refused_visibly_and_costs_start_at_their_high_end(page):
    page.select_option("#score", "alpha_hill")
    page.select_option("#direction", "high")
    before = enter(page, "#number", "4.5")
    for box, bad in (("#number", "abc"), ("#number", "1e9"), ("#number", ""), ("#size-number", "1e9")):
        assert enter(page, box, bad) == before
        assert page.locator("#refusal").is_visible() and "number" in page.inner_text("#refusal")
    page.select_option("#direction", "low")
    page.select_option("#score", "fisher")
    assert page.input_value("#direction") == "high"
    page.select_option("#direction", "low")
    assert page.input_value("#direction") == "low" and "worse than random" in page.inner_text("#standing")


def test_the_map_tells_a_layers_numbers_and_shows_its_spectrum(page):
    page.select_option("#score", "alpha_hill")
    before = page.inner_text("#spectrum-title")
    box = page.locator("#map canvas").bounding_box()
    page.mouse.click(box["x"] + 0.7 * box["width"], box["y"] + 0.6 * box["height"])
    title = page.inner_text("#spectrum-title")
    assert title != before and all(words in title for words in ("Clauset's α", "KS", "Hill's"))
    page.hover("#map canvas", position={"x": 0.5 * box["width"], "y": 0.6 * box["height"]})
    page.wait_for_selector("#vg-tooltip-element.visible")
    told = page.inner_text("#vg-tooltip-element")
    assert "α Hill (the score)" in told and " MB" in told and told.count("α Hill") == 1


def test_nothing_is_cut_off(run, visit):
    one = visit(1280, "dark", offline=True)
    one.page.goto(run.explorer.as_uri())
    one.page.wait_for_selector("body[data-ready=yes]")
    for width in (1280, 420):
        one.page.set_viewport_size({"width": width, "height": 1000})
        one.page.wait_for_timeout(300)
        one.page.screenshot(path=run.figures / f"screen_page_{width}.png", full_page=True)
        assert one.cut_off() == [] and one.page.evaluate("document.documentElement.scrollWidth") <= width
    assert one.errors == []
