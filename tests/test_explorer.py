"""The explorer: state against plan.py, pictures against a full redraw, widgets, and the offline page."""

import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from spi_utils.errors import AnalysisError, PlanError, RunError, SPIError
from spi_utils.explorer.charts import chart_specs
from spi_utils.explorer.page import explorer_html, page_data, write_explorer
from spi_utils.explorer.picture import ChoicePicture, encode_png
from spi_utils.explorer.state import ExplorerState, three_digits
from spi_utils.explorer.widgets import Explorer, explore, read_number
from spi_utils.figures.plotting import FORMAT_COLOURS
from spi_utils.plan import ProtectionPlan, check_writer, make_plan
from spi_utils.planning.scores import available_scores
from spi_utils.runs import layers_fingerprint, read_layers
from tests.synthetic import layer_table, make_run, spectra_of


@pytest.fixture(scope="module")
def layers():
    return layer_table(70)


@pytest.fixture
def state(layers):
    return ExplorerState(layers, spectra=spectra_of(layers))


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


# --- the state -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["alpha_hill", "stable_rank", "fisher", "type_prior"])
@pytest.mark.parametrize("direction", ["high", "low"])
def test_every_number_is_plan_pys(state, layers, score, direction):
    state.set_score(score, direction)
    for value in np.quantile(state.chooser.cut, [0.0, 0.2, 0.5, 0.9]):
        state.set_threshold(float(value))
        plan = make_plan(layers, score=score, direction=direction, rule="threshold", value=float(value))
        kept = tuple(state.planned["name"][state.choice.mask])
        assert kept == plan.protected
        assert state.choice.total_bytes == plan.bytes["total"]
        assert state.choice.saved_bytes == plan.bytes["total_16bit"] - plan.bytes["total"]
        assert state.choice.bits_per_weight == pytest.approx(plan.bits_per_weight)
        assert state.choice.predicted_kl == pytest.approx(plan.predicted_kl)
        assert f"{len(kept)} of 70 layers" in state.line()


def test_the_size_slider_is_the_same_choice_from_the_other_side(state):
    low, high = state.size_bounds
    for size in np.linspace(low, high, 9):
        state.set_size(size)
        assert state.choice.total_bytes <= size
        beyond = state.chooser.cut[state.choice.layers :]
        if len(beyond):  # one more layer would not have fitted
            assert state.chooser.at_threshold(beyond[0]).total_bytes > size
        by_threshold = state.choice
        state.set_threshold(state.threshold)
        assert state.choice.total_bytes == by_threshold.total_bytes


def test_the_ends_of_the_range_protect_all_and_none(state):
    for direction in ("high", "low"):
        state.set_score("alpha_hill", direction)
        counts = []
        for bound in state.bounds:
            state.set_threshold(bound)
            counts.append(state.choice.layers)
        assert sorted(counts) == [0, 70]


def test_another_score_keeps_as_many_layers(state):
    state.set_size(sum(state.size_bounds) / 2)
    count = state.choice.layers
    state.set_score("alpha_decay", "low")
    assert state.choice.layers == count


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 1e9])
def test_a_bad_number_is_refused_and_changes_nothing(state, bad):
    before = (state.threshold, state.choice.layers)
    with pytest.raises(PlanError, match=r"threshold .*expected a number between .* stays at"):
        state.set_threshold(bad)
    with pytest.raises(PlanError, match=r"expected a size between .* stays at"):
        state.set_size(bad)
    assert (state.threshold, state.choice.layers) == before


def test_the_comparison_is_against_random_and_the_optimum(state):
    state.set_score("fisher", "high")
    state.set_size(sum(state.size_bounds) / 2)
    best = state.standing
    state.set_score("fisher", "low")
    worst = state.standing
    assert best.gain > 0.9 > 0 > worst.gain
    assert best.better_than == 1.0
    assert "the least predicted KL" in state.comparison()
    assert f"worse than random by {worst.predicted_kl - worst.random_median:.3g}" in state.comparison()
    state.set_threshold(state.bounds[0])  # nothing left to gain
    assert "This choice" not in state.comparison()


def test_a_score_of_costs_starts_at_its_high_end(state):
    state.set_score("alpha_hill", "low")
    state.set_score("alpha_decay")
    assert state.direction == "low"
    state.set_score("fisher")
    assert state.direction == "high"
    state.set_score("fisher", "low")  # who wants it gets it
    assert state.direction == "low"


def test_layers_that_share_a_value_are_counted(state, layers):
    assert state.ties() == ""
    state.set_score("smallest", "high")
    sizes = layers.loc[layers["quantizable"], "numel"]
    last = sizes[state.choice.mask].max()
    assert state.ties().startswith(f"{(sizes == last).sum()} layers share")
    assert ExplorerState(layers, group="fused").ties() == ""  # a group's layers are one choice


def test_sizes_of_one_model_share_a_unit():
    small = ExplorerState(layer_table(7))
    assert small.unit == (1e6, "MB") and re.search(r" [\d.]+ MB in all, [\d.]+ MB saved", small.line())
    assert [three_digits(x) for x in (205.04, 64.0, 0.4978, 0, -1.5)] == [
        "205",
        "64.0",
        "0.498",
        "0",
        "−1.50",
    ]


def test_without_sensitivity_sizes_remain_and_that_is_said(layers):
    bare = layers.drop(columns=[c for c in layers if c.startswith(("fisher", "measured", "predicted"))])
    state = ExplorerState(bare)
    assert "predicted KL" not in state.line()
    assert "No sensitivity" in state.comparison()
    assert "fisher" not in state.scores
    assert pixels(state.picture()).shape == (600, 1000, 3)


def test_unusual_tables():
    one = ExplorerState(layer_table(1))
    one.set_threshold(one.bounds[1])
    assert one.choice.layers == 0
    equal = ExplorerState(layer_table(14).assign(alpha_hill=3.0))
    assert [equal.chooser.at_threshold(bound).layers for bound in equal.bounds] == [14, 0]
    table = layer_table(14)
    table.loc[1:3, "alpha_hill"] = [np.nan, np.inf, -np.inf]
    odd = ExplorerState(table)
    assert np.isfinite(odd.bounds).all()
    for state in (one, equal, odd):
        assert pixels(state.picture()).std() > 0
    with pytest.raises(AnalysisError, match="none that can be quantized"):
        ExplorerState(layer_table(3).iloc[[0]])
    with pytest.raises(PlanError, match="none of the 1 planned layers"):
        one.select("nope")


# --- failed layers and wishes ----------------------------------------------------------------------------

FAILED = ["model.layers.1.self_attn.v_proj", "model.layers.4.mlp.down_proj"]


def failed_table(count: int = 70):
    """A table in which the analysis of two layers failed: no score that reads the weights."""
    table = layer_table(count)
    bad = table["name"].isin(FAILED)
    spectral = table.columns[table.columns.get_loc("alpha_pl") : table.columns.get_loc("bytes_16bit")]
    table.loc[bad, "status"] = "failed"
    return table.assign(**{name: table[name].astype(float).mask(bad) for name in spectral})


def test_failed_layers_stay_in_16bit_and_that_is_said(tmp_path):
    run = make_run(tmp_path / "run", layers=failed_table())
    state = ExplorerState.open(run)
    for bound in state.bounds:  # all but the failed ones can be chosen
        state.set_threshold(bound)
        assert set(state.planned["name"][state.chooser.held]) == set(FAILED)
        assert state.choice.mask[state.planned["name"].isin(FAILED)].all()
        assert state.choice.layers == len(state.plan().protected) == int(state.choice.mask.sum())
    state.set_threshold(4.5)
    assert f"{state.choice.layers} of 70 layers in 16-bit, 2 of them as their analysis failed" in state.line()
    assert all(name in state.notes() for name in FAILED)
    state.save()
    plan = ProtectionPlan.read(run.plan_json)
    assert plan.bytes["total"] == state.choice.total_bytes
    assert plan.predicted_kl == pytest.approx(state.choice.predicted_kl)
    assert set(FAILED) <= set(plan.protected)
    assert "2 layers stay in 16-bit because the analysis failed" in plan.reason
    assert plan.options["force_16bit"] == [f"^{re.escape(name)}$" for name in FAILED]
    again = ExplorerState.open(run)
    assert (again.wishes.force_16bit, again.wishes.held) == ((), tuple(FAILED))
    assert again.line() == state.line()


def test_a_plan_from_parameters_still_refuses_failed_layers_until_a_person_decides():
    table = failed_table()
    with pytest.raises(PlanError, match=r"failed for 2 layer.*force_16bit"):
        make_plan(table, score="alpha_hill")
    plan = make_plan(table, rule="top_k", value=10, force_16bit=r"layers\.1\..*v_proj|layers\.4\..*down_proj")
    assert set(FAILED) <= set(plan.protected)
    assert len(plan.protected) == 10
    low = ExplorerState(table, forbid_16bit=r"layers\.1\..*v_proj")  # a person decides otherwise
    assert low.wishes.held == (FAILED[1],)
    assert FAILED[0] not in low.plan().protected


def test_a_failed_layer_without_a_cost_leaves_the_prediction_whole():
    table = failed_table()
    bad = table["name"].isin(FAILED)
    known = table.loc[~bad & table["quantizable"], "predicted_nf4"].sum()
    table.loc[bad, ["fisher_nf4", "predicted_nf4"]] = np.nan
    state = ExplorerState(table, score="fisher")
    state.set_threshold(state.bounds[1])
    assert state.choice.predicted_kl == pytest.approx(known)
    assert state.standing is not None
    assert page_data(state)["kl"] is not None


def test_failed_layers_are_hollow_in_the_picture():
    whole, table = ExplorerState(layer_table(70)), failed_table()
    state = ExplorerState(table)
    one = ExplorerState(table.assign(status="ok"), score="type_prior")
    assert state.grid.hollow.sum() == 2 and not whole.grid.hollow.any() and not one.grid.hollow.any()
    state.set_score("type_prior", "high")
    state.set_threshold(state.bounds[0])
    one.set_threshold(one.bounds[0])
    map_of = [pixels(each.picture())[340:] for each in (state, one)]
    colour = [int(FORMAT_COLOURS["16bit"][i : i + 2], 16) for i in (1, 3, 5)]
    solid = [int((part == colour).all(axis=2).sum()) for part in map_of]
    cell = solid[1] / 70
    assert 1.0 * cell < solid[1] - solid[0] < 2.0 * cell  # two cells lost their insides, not their frames


def test_the_page_holds_failed_layers_in_16bit():
    state = ExplorerState(failed_table())
    data = page_data(state)
    places = [i for i, layer in enumerate(data["layers"]) if layer["name"] in FAILED]
    assert data["held"] == 2 and "as their analysis failed" in data["failed"]
    assert [data["settled"][i] for i in places] == ["16-bit, analysis failed"] * 2
    assert all(score["values"][i] is None for score in data["scores"].values() for i in places)
    kept = [value is not None and value >= 4.5 for value in data["scores"]["alpha_hill"]["values"]]
    state.set_threshold(4.5)
    extra = sum(step for step, keep in zip(data["size_extra"], kept, strict=True) if keep)
    kl = sum(cost for cost, keep in zip(data["kl"], kept, strict=True) if not keep)
    assert data["held"] + sum(kept) == state.choice.layers
    assert data["size_base"] + extra == state.choice.total_bytes
    assert kl == pytest.approx(state.choice.predicted_kl)
    assert "analysis failed" in json.dumps(chart_specs(state, 100)["map"])
    assert "analysis failed" not in json.dumps(chart_specs(ExplorerState(layer_table(7)), 100)["map"])


WISHES = {
    "group": "fused",
    "force_16bit": ["layers.9.mlp"],
    "forbid_16bit": ["q_proj$", "k_proj$", "v_proj$"],
}


def wished_run(directory):
    """A run that holds a plan made with groups and patterns."""
    run = make_run(directory, 70)
    plan = make_plan(read_layers(run), model={"sha256": "0" * 64}, double_quant=True, **WISHES)
    plan.write(run.plan_json)
    return run, plan


def test_the_runs_plan_keeps_its_wishes_when_the_slider_saves(tmp_path):
    run, first = wished_run(tmp_path / "run")
    state = ExplorerState.open(run)
    assert "group fused" in state.notes() and "layers.9.mlp" in state.notes()
    state.set_threshold(4.5)
    state.save()
    plan = ProtectionPlan.read(run.plan_json)
    assert plan.options == first.options
    assert plan.double_quant
    forced = {f"model.layers.9.mlp.{leaf}_proj" for leaf in ("gate", "up", "down")}
    assert forced <= set(plan.protected)
    assert not any(name.endswith(("q_proj", "k_proj", "v_proj")) for name in plan.protected)
    assert tuple(state.planned["name"][state.choice.mask]) == plan.protected
    assert state.choice.total_bytes == plan.bytes["total"]
    gates = {name.replace("gate", "up") for name in plan.protected if "gate_proj" in name}
    assert gates == {name for name in plan.protected if "up_proj" in name}


def test_the_page_keeps_the_wishes_too(tmp_path):
    run, _ = wished_run(tmp_path / "run")
    state = ExplorerState.open(run)
    data = page_data(state)
    state.set_threshold(4.5)
    kept = [value is not None and value >= 4.5 for value in data["scores"]["alpha_hill"]["values"]]
    extra = sum(step for step, keep in zip(data["size_extra"], kept, strict=True) if keep)
    assert data["held"] + sum(kept) == state.choice.layers
    assert data["size_base"] + extra == state.choice.total_bytes
    assert "group fused" in data["notes"]


def test_a_format_that_the_explorer_cant_keep_is_named(tmp_path):
    run = make_run(tmp_path / "run", 35)
    layers = read_layers(run)
    made = make_plan(layers, formats=("nf4", "int8", "16bit"), score="fisher", rule="matrix_bits", value=7,
                     model={"sha256": "0" * 64})  # fmt: skip
    assert "int8" in made.formats.values()
    made.write(run.plan_json)
    explorer = Explorer(ExplorerState.open(run))
    assert "Not kept from the run&#x27;s plan: int8" in explorer.line.value
    assert explorer.state.notes().startswith("Not kept")


def test_ten_thousand_layers():
    state = ExplorerState(layer_table(10_000))
    state.set_threshold(4.0)
    assert pixels(state.picture()).shape == (600, 1000, 3)


# --- the run directory -----------------------------------------------------------------------------------


def test_save_writes_the_plan_and_a_reopened_explorer_starts_there(tmp_path):
    run = make_run(tmp_path / "run", 35)
    state = ExplorerState.open(run.path)
    state.set_score("alpha_decay", "low")
    state.set_threshold(float(np.median(state.chooser.cut)))
    assert state.save() == run.plan_json
    plan = ProtectionPlan.read(run.plan_json, model={"sha256": "0" * 64})
    assert (plan.origin, plan.rule, plan.score, plan.direction) == (
        "slider",
        "threshold",
        "alpha_decay",
        "low",
    )
    assert plan.protected == tuple(state.planned["name"][state.choice.mask])
    again = ExplorerState.open(run.path)
    assert (again.score, again.direction, again.threshold) == ("alpha_decay", "low", state.threshold)
    assert ExplorerState.open(run, score="alpha_hill").score == "alpha_hill"


@pytest.mark.parametrize(
    ("lower", "width"), [("int4_g64", "4-bit"), ("int8", "8-bit"), ("int4_g32", "4-bit")]
)
def test_a_plan_of_the_other_backends_formats_is_explored_in_them(tmp_path, lower, width):
    run = make_run(tmp_path / "run", 35)
    table, mark = read_layers(run), layers_fingerprint(run)
    held = make_plan(
        table, rule="top_k", value=9, formats=(lower, "16bit"), group="fused",
        model={"sha256": "0" * 64}, layers_fingerprint=mark,
    )  # fmt: skip
    held.write(run.plan_json)
    state = ExplorerState.open(run)
    assert (state.lower, state.rest) == (lower, width)
    state.set_threshold(float(np.median(state.chooser.cut)))
    state.save()
    plan = ProtectionPlan.read(run.plan_json, model={"sha256": "0" * 64})
    check_writer(plan, "compressed-tensors")
    assert set(plan.formats.values()) == {lower, "16bit"}
    assert plan.bytes["total"] == state.choice.total_bytes
    data = page_data(state)
    assert data["rest"] == width
    moved = [extra for extra, kept in zip(data["size_extra"], state.choice.mask, strict=True) if kept]
    assert data["size_base"] + sum(moved) == plan.bytes["total"]
    page = explorer_html(state, "model")
    assert f"stored in {width} ({lower})" in page
    assert f"bytes_{lower}" in page
    assert "bytes_nf4" not in page


def test_tiers_between_two_formats_are_left_out_and_said(tmp_path):
    run = make_run(tmp_path / "run", 35)
    mixed = make_plan(
        read_layers(run), score="fisher", rule="matrix_bits", value=6.5,
        formats=("int4_g64", "int8", "16bit"), model={"sha256": "0" * 64},
    )  # fmt: skip
    assert set(mixed.formats.values()) >= {"int4_g64", "int8"}
    mixed.write(run.plan_json)
    state = ExplorerState.open(run)
    assert state.lower == "int4_g64"
    assert "int8; here layers are int4_g64 or 16-bit" in state.notes()
    assert ExplorerState.open(run, lower="nf4").lower == "nf4"
    with pytest.raises(PlanError, match="at least two formats"):
        ExplorerState.open(run, lower="16bit")


def test_a_run_without_analysis_names_the_notebook(tmp_path):
    with pytest.raises(RunError, match="01_analyze"):
        explore(tmp_path)
    with pytest.raises(RunError, match="no run directory to save to"):
        ExplorerState(layer_table(7)).save()


def cell(column, value):
    def damage(run):
        table = pd.read_csv(run.layers_csv, dtype=str)
        table.loc[5, column] = value
        table.to_csv(run.layers_csv, index=False)

    return damage


def lines(change):
    return lambda run: run.layers_csv.write_text("".join(change(run.layers_csv.read_text().splitlines(True))))


def halve(name):
    return lambda run: (run.path / name).write_bytes(
        (run.path / name).read_bytes()[: len((run.path / name).read_bytes()) // 2]
    )


def entry(name, key, value):
    def damage(run):
        held = json.loads((run.path / name).read_text())
        (run.path / name).write_text(json.dumps(held | {key: value}))

    return damage


@pytest.mark.parametrize(
    ("damage", "file", "notebook"),
    [
        *(
            (cell(column, value), "layers.csv", "01_analyze")
            for value, columns in {
                "seven": ("alpha_hill", "numel", "quantizable"),
                None: ("name", "type", "depth", "numel"),
                "inf": ("depth",),
            }.items()
            for column in columns
        ),
        (lines(lambda rows: rows[:9] + rows[10:]), "layers.csv", "01_analyze"),
        (lines(lambda rows: [*rows, rows[9]]), "layers.csv", "01_analyze"),
        (lines(lambda rows: []), "layers.csv", "01_analyze"),
        (halve("layers.csv"), "layers.csv", "01_analyze"),
        (halve("spectra.safetensors"), "spectra.safetensors", "01_analyze"),
        (halve("plan.json"), "plan.json", "02_visualize"),
        (entry("plan.json", "formats", None), "plan.json", "02_visualize"),
        (halve("run.json"), "run.json", "01_analyze"),
        (entry("run.json", "stages", None), "run.json", "01_analyze"),
    ],
)  # fmt: skip
def test_a_damaged_run_is_told_in_one_sentence(tmp_path, damage, file, notebook):
    run = make_run(tmp_path / "run", 21)
    make_plan(read_layers(run), rule="top_k", value=9, model={"sha256": "0" * 64}).write(run.plan_json)
    damage(run)
    with pytest.raises(SPIError, match=rf"{file}: .*{notebook}") as told:
        ExplorerState.open(run.path)
    assert "\n" not in str(told.value)


# --- the picture -----------------------------------------------------------------------------------------


def test_png_is_what_pillow_reads_back():
    image = np.random.default_rng(0).integers(0, 256, (17, 31, 4), dtype=np.uint8)
    assert (pixels(encode_png(image)) == image[..., :3]).all()


def test_a_redrawn_picture_equals_a_fresh_one(state):
    state.set_threshold(3.0)
    state.picture()
    state.set_threshold(5.0)
    redrawn = pixels(state.picture())
    state._pictures.clear()
    assert (redrawn == pixels(state.picture())).all()


def test_the_picture_shows_how_much_is_kept(state):
    def kept_area() -> int:
        colour = [int(FORMAT_COLOURS["16bit"][i : i + 2], 16) for i in (1, 3, 5)]
        return int((pixels(state.picture()) == colour).all(axis=2).sum())

    areas = []
    for value in np.linspace(*state.bounds, 5):
        state.set_threshold(value)
        areas.append(kept_area())
    assert areas == sorted(areas, reverse=True)
    assert areas[0] > 100_000 > 2000 > areas[-1]


def test_a_picture_survives_having_no_values(state):
    picture = ChoicePicture(state.grid, np.full(70, np.nan), "alpha_hill", "high", None)
    assert pixels(picture.png(0.5, np.zeros(70, bool), None)).shape == (600, 1000, 3)


# --- the widgets -----------------------------------------------------------------------------------------


@pytest.fixture
def explorer(tmp_path):
    return Explorer(ExplorerState.open(make_run(tmp_path / "run", 70).path))


def test_the_menu_holds_every_score_of_the_table(explorer):
    assert [value for _, value in explorer.score.options] == available_scores(explorer.state.layers)


def test_slider_number_box_and_size_box_agree(explorer):
    state = explorer.state
    explorer.threshold.value = explorer.threshold.min + 50 * explorer.threshold.step
    assert float(explorer.number.value) == pytest.approx(state.threshold, rel=1e-4)
    before = explorer.picture.value
    explorer.number.value = "4,5"  # a decimal comma
    assert state.threshold == 4.5
    assert explorer.threshold.value == pytest.approx(4.5, abs=explorer.threshold.step)
    assert explorer.picture.value != before
    assert f"{state.choice.layers} of 70 layers" in explorer.line.value
    explorer.size_number.value = f"{np.mean(state.size_bounds) / 1e6:.2f}"
    assert state.choice.total_bytes <= np.mean(state.size_bounds) + 1e4
    assert float(explorer.number.value) == pytest.approx(state.threshold, rel=1e-4)


def test_a_bad_number_is_refused_visibly(explorer):
    for place, text in enumerate(("abc", "", "nan", "1e99", "-7")):
        before = explorer.state.threshold
        explorer.number.value = text
        assert explorer.state.threshold == before
        assert "⚠" in explorer.message.value
        assert float(explorer.number.value) == pytest.approx(before, rel=1e-4)
        explorer.number.value = f"4.{place + 1}"
        assert explorer.message.value == ""


def test_the_browsers_rounding_of_a_slider_changes_nothing(explorer):
    before = explorer.state.choice.layers
    place = explorer.threshold.value
    explorer.threshold.value = place + 1e-6 * explorer.threshold.step  # what a browser sends back
    assert explorer.state.choice.layers == before
    explorer.threshold.value = place + 40 * explorer.threshold.step  # a person
    moved = explorer.state.threshold
    explorer.threshold.value = place  # and back again
    assert explorer.state.threshold < moved


def test_score_and_direction_change_ranges_and_picture(explorer):
    before = explorer.picture.value
    explorer.direction.value = "low"
    explorer.score.value = "fisher"
    assert explorer.direction.value == "high"
    explorer.direction.value = "low"
    assert (explorer.state.score, explorer.state.direction) == ("fisher", "low")
    assert explorer.state.wide
    assert 10**explorer.threshold.min == pytest.approx(explorer.state.bounds[0])
    assert explorer.picture.value != before


def test_choosing_a_layer_shows_its_spectrum(explorer):
    before = explorer.spectrum.value
    explorer.type.value = "down_proj"
    assert explorer.state.layer == "model.layers.0.mlp.down_proj"
    explorer.layer.index = 3
    assert explorer.state.layer == "model.layers.3.mlp.down_proj"
    assert explorer.spectrum.value != before


def test_save_button_writes_and_says_where(explorer):
    assert not explorer.state.run.plan_json.exists()  # nothing is written before
    explorer.number.value = "4.0"
    explorer.save.click()
    assert str(explorer.state.run.plan_json) in explorer.saved.value
    assert ProtectionPlan.read(explorer.state.run.plan_json).value == 4.0


def test_only_core_widgets_are_used(explorer):
    def walk(widget):
        yield widget
        for child in getattr(widget, "children", ()):
            yield from walk(child)

    modules = {w._model_module for w in walk(explorer.box)}
    assert modules <= {"@jupyter-widgets/base", "@jupyter-widgets/controls"}


def test_read_number():
    assert read_number(" 3,25 ") == 3.25
    with pytest.raises(PlanError, match="'x' is no number"):
        read_number("x")


# --- the page without a kernel ---------------------------------------------------------------------------


def test_page_is_small_self_contained_and_the_same_each_time(tmp_path):
    run = make_run(tmp_path / "run", 250)
    path = write_explorer(run)
    page = path.read_text(encoding="utf-8")
    assert len(page.encode()) <= 3_000_000
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"src=|href=|url\(|@import", markup)
    assert page.count("<script") - page.count("<script type=") == 0  # no script from elsewhere
    write_explorer(run)
    assert path.read_text(encoding="utf-8") == page


def test_page_sums_are_plan_pys(state, layers):
    data = page_data(state)
    values = data["scores"]["alpha_hill"]["values"]
    plan = make_plan(layers, rule="threshold", value=4.5)
    kept = [value is not None and value >= 4.5 for value in values]
    size = data["size_base"] + sum(
        extra for extra, keep in zip(data["size_extra"], kept, strict=True) if keep
    )
    kl = sum(cost for cost, keep in zip(data["kl"], kept, strict=True) if not keep)
    assert sum(kept) == len(plan.protected)
    assert size == plan.bytes["total"]
    assert kl == pytest.approx(plan.predicted_kl)
    assert data["size_full"] == plan.bytes["total_16bit"]


def test_page_survives_hostile_names_and_missing_values():
    table = layer_table(7)
    table.loc[2, ["name", "alpha_hill", "alpha_pl"]] = ["a</script><b>__DATA__", np.nan, np.nan]
    page = explorer_html(ExplorerState(table, spectra=spectra_of(table)), "<b>model</b>")
    assert "a</script>" not in page
    assert "<title>&lt;b&gt;model" in page
    line = next(line for line in page.splitlines() if line.startswith("const DATA = "))
    data = json.loads(line.removeprefix("const DATA = ").removesuffix(";"))
    assert data["layers"][1]["name"] == "a</script><b>__DATA__"
    assert data["scores"]["alpha_hill"]["values"][1] is None
