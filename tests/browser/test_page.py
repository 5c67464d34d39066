"""explorer.html in a real browser, opened from a file with the network off."""

import shlex

import pytest

from spi_utils.explorer import ExplorerState, write_explorer
from spi_utils.plan import make_plan
from spi_utils.runs import read_layers
from tests.synthetic import layer_table, make_run

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("page") / "run", 70)
    write_explorer(run)
    return run


@pytest.fixture
def opened(run, visit):
    one = visit(offline=True)
    one.page.goto(run.explorer.as_uri())
    one.page.wait_for_selector("body[data-ready=yes]")
    yield one
    assert one.errors == []


def answer(page) -> str:
    return page.inner_text("#answer")


def expected(run, threshold: float, score="alpha_hill", direction="high") -> str:
    plan = make_plan(read_layers(run), rule="threshold", value=threshold, score=score, direction=direction)
    return f"{len(plan.protected)} of 70 layers in 16-bit"


def picture(page, chart: str) -> str:
    return page.evaluate(f"document.querySelector('#{chart} canvas').toDataURL()")


def test_number_box_gives_plan_pys_answer(opened, run):
    page = opened.page
    before = [picture(page, chart) for chart in ("map", "histogram", "frontier")]
    page.fill("#number", "4.5")
    page.press("#number", "Enter")
    plan = make_plan(read_layers(run), rule="threshold", value=4.5)
    text = answer(page)
    assert text.startswith(expected(run, 4.5))
    assert f"{plan.matrix_bits:.2f} matrix bits" in text
    assert f"predicted KL {plan.predicted_kl:.3g}" in text
    page.wait_for_timeout(300)
    after = [picture(page, chart) for chart in ("map", "histogram", "frontier")]
    assert all(old != new for old, new in zip(before, after, strict=True))


def test_the_page_ends_with_what_makes_the_choice(opened, run):
    page = opened.page
    page.fill("#number", "4.5")
    page.press("#number", "Enter")
    page.select_option("#direction", "low")
    value = float(page.input_value("#number"))
    cell, command = page.inner_text("#parameters").split("\n\n")
    given = {}
    exec(cell, given)  # a parameters cell of notebook 02
    chosen = {name: given[name] for name in ("score", "direction", "rule", "value")}
    plan = make_plan(read_layers(run), **chosen)
    assert chosen["direction"] == "low" and chosen["value"] == pytest.approx(value, rel=1e-3)
    assert answer(page).startswith(f"{len(plan.protected)} of 70 layers in 16-bit")
    words = shlex.split(command)
    assert words[:4] == ["spi-utils", "run", "-p", "model"]
    typed = dict(zip(words[3::3], words[4::3], strict=True))
    assert {name: typed[name] for name in ("score", "direction", "rule")} == {
        name: chosen[name] for name in ("score", "direction", "rule")
    }
    assert float(typed["value"]) == chosen["value"]
    page.click("#copy")
    page.wait_for_function("document.querySelector('#copied').textContent !== ''")


def test_slider_moves_by_keyboard_and_mouse(opened, run):
    page = opened.page
    page.focus("#slider")
    first = page.input_value("#number")
    page.keyboard.press("ArrowRight")
    second = page.input_value("#number")
    assert float(second) > float(first)
    box = page.locator("#slider").bounding_box()
    page.mouse.click(box["x"] + 0.9 * box["width"], box["y"] + box["height"] / 2)
    third = float(page.input_value("#number"))
    assert third > float(second)
    assert answer(page).startswith(expected(run, third))


def test_score_and_direction(opened, run):
    page = opened.page
    count = answer(page).split(" ")[0]
    page.select_option("#score", "alpha_decay")
    page.select_option("#direction", "low")
    assert answer(page).split(" ")[0] == count  # as many layers stay protected
    page.fill("#number", "0.2")
    page.press("#number", "Enter")
    assert answer(page).startswith(expected(run, 0.2, "alpha_decay", "low"))


@pytest.mark.parametrize("bad", ["abc", "1e9", ""])
def test_a_bad_number_is_refused_visibly(opened, bad):
    page = opened.page
    before = answer(page)
    page.fill("#number", bad)
    page.press("#number", "Enter")
    assert page.locator("#refusal").is_visible()
    assert "number" in page.inner_text("#refusal")
    assert answer(page) == before


def test_a_click_on_the_map_shows_that_layers_spectrum(opened):
    page = opened.page
    before = page.inner_text("#spectrum-title")
    box = page.locator("#map canvas").bounding_box()
    page.mouse.click(box["x"] + 0.7 * box["width"], box["y"] + 0.6 * box["height"])
    assert page.inner_text("#spectrum-title") != before
    page.hover("#map canvas", position={"x": 0.5 * box["width"], "y": 0.6 * box["height"]})
    page.wait_for_selector("#vg-tooltip-element.visible")
    told = page.inner_text("#vg-tooltip-element")
    assert "α Hill (the score)" in told and "α (Hill)" not in told and " MB" in told
    assert told.count("\t") <= 6
    title = page.inner_text("#spectrum-title")
    assert "Clauset's α" in title and "KS distance" in title and "Hill's α" in title


def test_size_is_the_same_choice_from_the_other_side(opened, run):
    page, state = opened.page, ExplorerState.open(run)
    low, high = state.size_bounds
    for score in ("alpha_hill", "smallest"):
        state.set_score(score)
        page.select_option("#score", score)
        for share in (0.001, 0.3, 0.7, 1):
            size = round((low + share * (high - low)) / 1e6, 2)
            page.fill("#size-number", f"{size}")
            page.press("#size-number", "Enter")
            state.set_size(size * 1e6)
            assert answer(page) == state.line()
            assert float(page.input_value("#size-number")) == pytest.approx(
                state.choice.total_bytes / 1e6, abs=0.006
            )
    page.focus("#size")
    before = page.input_value("#slider")
    for _ in range(100):
        page.keyboard.press("ArrowLeft")
    assert page.input_value("#slider") != before
    before = answer(page)
    page.fill("#size-number", "1e9")
    page.press("#size-number", "Enter")
    assert "no size" in page.inner_text("#refusal") and answer(page) == before


def test_a_score_of_costs_starts_at_its_high_end(opened):
    page = opened.page
    page.select_option("#direction", "low")
    page.select_option("#score", "fisher")
    assert page.input_value("#direction") == "high"
    page.select_option("#direction", "low")
    assert page.input_value("#direction") == "low"
    assert "worse than random by" in page.inner_text("#standing")


def test_layers_that_share_a_value_are_counted(opened, run):
    page, state = opened.page, ExplorerState.open(run)
    assert page.inner_text("#notes") == ""
    state.set_score("smallest")
    page.select_option("#score", "smallest")
    assert page.inner_text("#notes") == state.say("ties") != ""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_failed_layers_are_hollow_and_counted(tmp_path, visit, theme):
    table = layer_table(70)
    table.loc[[5, 30], ["status", "alpha_hill", "alpha_pl"]] = ["failed", None, None]
    run = make_run(tmp_path / "run", layers=table)
    write_explorer(run)
    one = visit(1280, theme, offline=True)
    one.page.goto(run.explorer.as_uri())
    one.page.wait_for_selector("body[data-ready=yes]")
    for threshold in ("3", "6"):  # they stay where they are
        one.page.fill("#number", threshold)
        one.page.press("#number", "Enter")
        kept = int((table["alpha_hill"] >= float(threshold)).sum()) + 2
        assert answer(one.page).startswith(
            f"{kept} of 70 layers in 16-bit, 2 of them as their analysis failed"
        )
    assert table["name"][5] in one.page.inner_text("#notes")
    one.page.screenshot(path=run.figures / f"screen_failed_{theme}.png", full_page=True)
    assert one.errors == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 800, 420])
def test_nothing_is_cut_off(run, visit, width, theme):
    one = visit(width, theme, offline=True)
    one.page.goto(run.explorer.as_uri())
    one.page.wait_for_selector("body[data-ready=yes]")
    one.page.screenshot(path=run.figures / f"screen_page_{width}_{theme}.png", full_page=True)
    assert one.cut_off() == []
    assert one.page.evaluate("document.documentElement.scrollWidth") <= width
    assert one.errors == []


@pytest.mark.parametrize(("end", "count"), [(0, 0), (1, 70)])
def test_page_and_notebook_agree_on_nothing_and_on_everything(opened, run, end, count):
    """As many layers stay protected under another score, none included."""
    page, state = opened.page, ExplorerState.open(run)
    state.set_size(state.size_bounds[end])
    page.focus("#size")
    page.keyboard.press(("Home", "End")[end])
    assert state.choice.layers == count
    assert answer(page).startswith(f"{count} of 70")
    state.set_score("alpha_decay")
    page.select_option("#score", "alpha_decay")
    assert state.choice.layers == count
    assert answer(page).startswith(f"{count} of 70")
