"""The explorer: state against plan.py, pictures against a full redraw, widgets, and the page's table."""

import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from spi_utils import explorer as explorer_module
from spi_utils.errors import AnalysisError, PlanError, RunError, SPIError
from spi_utils.explorer import (
    Explorer,
    ExplorerState,
    explore,
    explorer_html,
    page_data,
    read_number,
    say,
    three_digits,
    write_explorer,
)
from spi_utils.figures import FORMAT_COLOURS
from spi_utils.plan import ProtectionPlan, available_scores, check_writer, make_plan
from spi_utils.runs import layers_fingerprint, read_layers
from tests.synthetic import layer_table, make_run, spectra_of

MODEL = {"sha256": "0" * 64}
KEPT = [int(FORMAT_COLOURS["16bit"][i : i + 2], 16) for i in (1, 3, 5)]


@pytest.fixture(scope="module")
def layers():
    return layer_table(70)


@pytest.fixture
def state(layers):
    return ExplorerState(layers, spectra=spectra_of(layers))


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def kept_area(image: np.ndarray) -> int:
    return int((image == KEPT).all(axis=2).sum())


def kept(state) -> tuple[str, ...]:
    return tuple(state.planned["name"][state.choice.mask])


def on_page(data, score, direction, threshold):
    """What explorer.js finds for a threshold: the facts it tells, the file's bytes, the kept layers."""
    table = data["scores"][score][direction]
    row = sum(cut >= threshold if direction == "high" else cut <= threshold for cut in table["cut"])
    facts = {key: values[row] for key, values in table["facts"].items() if values[row] is not None}
    names = tuple(
        layer["name"]
        for layer, first in zip(data["layers"], table["row"], strict=True)
        if (layer["fixed"] or "").startswith("16-bit") or (first is not None and first <= row)
    )
    return data["facts"] | facts, table["bytes"][row], names


# --- one choice, told by the state, by the page, and by plan.py -------------------------------------------


@pytest.mark.parametrize(
    "wishes", [{}, {"group": "fused", "force_16bit": "layers.9.mlp", "double_quant": True}]
)
def test_every_number_of_slider_and_page_is_plan_pys(layers, wishes):
    state = ExplorerState(layers, **wishes)
    data = page_data(state)
    for score in ("alpha_hill", "stable_rank", "fisher", "smallest", "type_prior"):
        for direction in ("high", "low"):
            state.set_score(score, direction)
            cut = state.chooser.cut
            for value in (cut[0], cut[len(cut) // 3], (cut[5] + cut[6]) / 2, cut[-1], *state.bounds):
                state.set_threshold(float(value))
                plan = make_plan(
                    layers, score=score, direction=direction, rule="threshold", value=float(value), **wishes
                )
                facts, size, names = on_page(data, score, direction, value)
                assert kept(state) == names == plan.protected
                assert state.choice.total_bytes == size == plan.bytes["total"]
                assert state.choice.saved_bytes == plan.bytes["total_16bit"] - plan.bytes["total"]
                assert state.choice.bits_per_weight == pytest.approx(plan.bits_per_weight)
                assert state.choice.predicted_kl == pytest.approx(plan.predicted_kl)
                assert say("line", facts) == state.line()
                assert state.line().startswith(f"{len(names)} of 70 layers in 16-bit · ")
                assert f"predicted KL {plan.predicted_kl:.3g} nats" in state.line()
                assert say("comparison", facts) == state.say("comparison")
                assert say("ties", facts) == state.say("ties")


def test_the_size_slider_is_the_same_choice_from_the_other_side(state):
    low, high = state.size_bounds
    for size in np.linspace(low, high, 9):
        state.set_size(size)
        assert state.choice.total_bytes <= size
        beyond = state.chooser.cut[state.choice.layers :]
        if len(beyond):  # one more layer would not have fitted
            assert state.chooser.at_threshold(beyond[0]).total_bytes > size


def test_the_ends_of_the_range_protect_all_and_none_and_another_score_keeps_as_many(state):
    for direction in ("high", "low"):
        state.set_score("alpha_hill", direction)
        counts = []
        for bound in state.bounds:
            state.set_threshold(bound)
            counts.append(state.choice.layers)
        assert sorted(counts) == [0, 70]
    state.set_size(sum(state.size_bounds) / 2)
    count = state.choice.layers
    state.set_score("alpha_decay")
    assert (state.choice.layers, state.direction) == (count, "low")
    state.set_score("fisher")  # to protect what costs least is never meant
    assert state.direction == "high"
    state.set_score("fisher", "low")  # but who wants it gets it
    assert state.direction == "low"


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
    best = state.consequences(state.chooser, state.choice.layers)
    assert best["better"] == "100%" and int(best["gain"][:-1]) > 90 and "worse" not in best
    state.set_score("fisher", "low")
    assert "predicted worse than random by" in state.say("comparison")
    state.set_threshold(state.bounds[0])  # nothing left to gain
    assert "This choice" not in state.say("comparison")


def test_layers_that_share_a_value_are_counted(state, layers):
    assert state.say("ties") == ""
    state.set_score("smallest", "high")
    sizes = layers.loc[layers["quantizable"], "numel"]
    last = sizes[state.choice.mask].max()
    assert state.say("ties").startswith(f"{(sizes == last).sum()} layers share")
    assert ExplorerState(layers, group="fused").say("ties") == ""  # a group's layers are one choice


def test_sizes_of_one_model_share_a_unit():
    small = ExplorerState(layer_table(7))
    assert small.unit == (1e6, "MB") and re.search(r" [\d.]+ MB in all, [\d.]+ MB saved", small.line())
    numbers = [three_digits(x) for x in (205.04, 64.0, 0.4978, 0, -1.5)]
    assert numbers == ["205", "64.0", "0.498", "0", "−1.50"]


def test_without_sensitivity_sizes_remain_and_that_is_said(layers):
    bare = layers.drop(columns=[c for c in layers if c.startswith(("fisher", "measured", "predicted"))])
    state = ExplorerState(bare)
    assert "predicted KL" not in state.line() and "fisher" not in state.scores
    assert state.say("comparison").startswith("No sensitivity")
    assert pixels(state.picture()).shape == (600, 1000, 3)
    data = page_data(state)
    assert data["band"] is None and say("comparison", data["facts"]) == state.say("comparison")


def test_unusual_tables():
    one = ExplorerState(layer_table(1))
    one.set_threshold(one.bounds[1])
    assert one.choice.layers == 0
    equal = ExplorerState(layer_table(14).assign(alpha_hill=3.0))
    assert [equal.chooser.at_threshold(bound).layers for bound in equal.bounds] == [14, 0]
    table = layer_table(14)
    table.loc[1:3, "alpha_hill"] = [np.nan, np.inf, -np.inf]
    odd = ExplorerState(table)
    none = ExplorerState(layer_table(7).assign(alpha_hill=np.nan, alpha_pl=np.nan), score="fisher")
    for state in (one, equal, odd, none):
        assert np.isfinite(state.bounds).all() and pixels(state.picture()).std() > 0
        json.dumps(page_data(state), allow_nan=False)
    with pytest.raises(AnalysisError, match="none that can be quantized"):
        ExplorerState(layer_table(3).iloc[[0]])


def test_ten_thousand_layers(monkeypatch):
    state = ExplorerState(layer_table(10_000))
    state.set_threshold(4.0)
    assert pixels(state.picture()).shape == (600, 1000, 3)
    monkeypatch.setattr(explorer_module, "ROWS", 100)  # a table with more cuts is thinned, its ends kept
    table = explorer_module._score(state, "alpha_hill")["high"]
    assert 50 < len(table["cut"]) <= 101 and len(table["row"]) == 10_000 and None not in table["row"]
    assert table["bytes"][-1] == state.size_bounds[1] and table["facts"]["layers"][0] == 0


# --- failed layers and wishes ----------------------------------------------------------------------------

FAILED = ["model.layers.1.self_attn.v_proj", "model.layers.4.mlp.down_proj"]


def failed_table():
    """A table in which the analysis of two layers failed: no score that reads the weights."""
    table = layer_table(70)
    bad = table["name"].isin(FAILED)
    spectral = table.columns[table.columns.get_loc("alpha_pl") : table.columns.get_loc("bytes_16bit")]
    table.loc[bad, "status"] = "failed"
    return table.assign(**{name: table[name].astype(float).mask(bad) for name in spectral})


def test_failed_layers_stay_in_16bit_and_that_is_said(tmp_path):
    run = make_run(tmp_path / "run", layers=failed_table())
    state = ExplorerState.open(run)
    data = page_data(state)
    assert [one["fixed"] for one in data["layers"] if one["fixed"]] == ["16-bit, analysis failed"] * 2
    for value in (*state.bounds, 4.5):  # all but the failed ones can be chosen
        state.set_threshold(value)
        plan = state.plan()
        assert kept(state) == on_page(data, "alpha_hill", "high", value)[2] == plan.protected
        assert set(FAILED) <= set(plan.protected) and plan.bytes["total"] == state.choice.total_bytes
    assert f"{state.choice.layers} of 70 layers in 16-bit, 2 of them as their analysis failed" in state.line()
    assert all(name in data["notes"] for name in FAILED)
    plan = ProtectionPlan.read(state.save())
    assert "2 layers stay in 16-bit because the analysis failed" in plan.reason
    assert plan.options["force_16bit"] == [f"^{re.escape(name)}$" for name in FAILED]
    again = ExplorerState.open(run)
    assert again.held == FAILED and again.line() == state.line() and len(again.notes) == 1


def test_a_person_decides_on_failed_layers():
    table = failed_table()
    with pytest.raises(PlanError, match=r"failed for 2 layer.*force_16bit"):
        make_plan(table, score="alpha_hill")
    low = ExplorerState(table, forbid_16bit=r"layers\.1\..*v_proj")
    assert low.held == [FAILED[1]]
    assert FAILED[0] not in low.plan().protected


def test_a_failed_layer_without_a_cost_leaves_the_prediction_whole():
    table = failed_table()
    bad = table["name"].isin(FAILED)
    known = table.loc[~bad & table["quantizable"], "predicted_nf4"].sum()
    table.loc[bad, ["fisher_nf4", "predicted_nf4"]] = np.nan
    state = ExplorerState(table, score="fisher")
    state.set_threshold(state.bounds[1])
    assert state.choice.predicted_kl == pytest.approx(known)
    assert "random choices" in state.say("comparison") and page_data(state)["band"] is not None


def test_failed_layers_are_hollow_in_the_picture():
    table = failed_table()
    solid = []
    for each in (table, table.assign(status="ok")):
        state = ExplorerState(each, score="type_prior")
        state.set_threshold(state.bounds[0])
        solid.append(kept_area(pixels(state.picture())[340:]))
    cell = solid[1] / 70
    assert 1.0 * cell < solid[1] - solid[0] < 2.0 * cell  # two cells lost their insides, not their frames


def test_the_runs_plan_keeps_its_wishes_when_the_slider_saves(tmp_path):
    run = make_run(tmp_path / "run", 70)
    wishes = {
        "group": "fused",
        "force_16bit": ["layers.9.mlp"],
        "forbid_16bit": ["q_proj$", "k_proj$", "v_proj$"],
    }
    first = make_plan(read_layers(run), model=MODEL, double_quant=True, **wishes)
    first.write(run.plan_json)
    state = ExplorerState.open(run)
    assert "group fused" in state.notes[0] and "layers.9.mlp" in state.notes[0]
    assert "group fused" in page_data(state)["notes"]
    state.set_threshold(4.5)
    plan = ProtectionPlan.read(state.save())
    assert plan.options == first.options and plan.double_quant
    assert {f"model.layers.9.mlp.{leaf}_proj" for leaf in ("gate", "up", "down")} <= set(plan.protected)
    assert not any(name.endswith(("q_proj", "k_proj", "v_proj")) for name in plan.protected)
    assert kept(state) == plan.protected and state.choice.total_bytes == plan.bytes["total"]


# --- the run directory -----------------------------------------------------------------------------------


def test_save_writes_the_plan_and_a_reopened_explorer_starts_there(tmp_path):
    run = make_run(tmp_path / "run", 35)
    state = ExplorerState.open(run.path)
    state.set_score("alpha_decay", "low")
    state.set_threshold(float(np.median(state.chooser.cut)))
    assert state.save() == run.plan_json
    plan = ProtectionPlan.read(run.plan_json, model=MODEL)
    assert (plan.origin, plan.rule, plan.score, plan.direction) == (
        "slider",
        "threshold",
        "alpha_decay",
        "low",
    )
    assert plan.protected == kept(state)
    again = ExplorerState.open(run.path)
    assert (again.score, again.direction, again.threshold) == ("alpha_decay", "low", state.threshold)
    assert ExplorerState.open(run, score="alpha_hill").score == "alpha_hill"
    make_plan(read_layers(run), rule="threshold", value=1e9, model=MODEL).write(run.plan_json)
    assert ExplorerState.open(run).choice.layers == 0  # a plan may protect nothing, by any threshold


@pytest.mark.parametrize(
    ("lower", "width"), [("int4_g64", "4-bit"), ("int8", "8-bit"), ("int4_g32", "4-bit")]
)
def test_a_plan_of_the_other_backends_formats_is_explored_in_them(tmp_path, lower, width):
    run = make_run(tmp_path / "run", 35)
    held = make_plan(
        read_layers(run), rule="top_k", value=9, formats=(lower, "16bit"), group="fused",
        model=MODEL, layers_fingerprint=layers_fingerprint(run),
    )  # fmt: skip
    held.write(run.plan_json)
    state = ExplorerState.open(run)
    assert (state.lower, state.rest) == (lower, width)
    state.set_threshold(float(np.median(state.chooser.cut)))
    plan = ProtectionPlan.read(state.save(), model=MODEL)
    check_writer(plan, "compressed-tensors")
    assert set(plan.formats.values()) == {lower, "16bit"}
    page = explorer_html(state, "model")
    assert f"stored in {width} ({lower})" in page
    assert on_page(page_data(state), "alpha_hill", "high", state.threshold)[1] == plan.bytes["total"]


def test_formats_that_the_explorer_cant_keep_are_named(tmp_path):
    run = make_run(tmp_path / "run", 35)
    mixed = make_plan(
        read_layers(run), score="fisher", rule="matrix_bits", value=6.5,
        formats=("int4_g64", "int8", "16bit"), model=MODEL,
    )  # fmt: skip
    assert set(mixed.formats.values()) >= {"int4_g64", "int8"}
    mixed.write(run.plan_json)
    state = ExplorerState.open(run)
    assert state.lower == "int4_g64"
    assert state.notes[-1] == "Not kept from the run's plan: int8; here layers are int4_g64 or 16-bit."
    assert "Not kept from the run&#x27;s plan: int8" in Explorer(state).line.value
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
    def damage(run):
        held = (run.path / name).read_bytes()
        (run.path / name).write_bytes(held[: len(held) // 2])

    return damage


def entry(name, key, value):
    def damage(run):
        held = json.loads((run.path / name).read_text())
        (run.path / name).write_text(json.dumps(held | {key: value}))

    return damage


CELLS = {
    "seven": ("alpha_hill", "numel", "quantizable"),
    None: ("name", "type", "depth", "numel"),
    "inf": ("depth",),
}


@pytest.mark.parametrize(
    ("damage", "file", "notebook"),
    [
        *(
            (cell(column, value), "layers.csv", "01_analyze")
            for value, columns in CELLS.items()
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
)
def test_a_damaged_run_is_told_in_one_sentence(tmp_path, damage, file, notebook):
    run = make_run(tmp_path / "run", 21)
    make_plan(read_layers(run), rule="top_k", value=9, model=MODEL).write(run.plan_json)
    damage(run)
    with pytest.raises(SPIError, match=rf"{file}: .*{notebook}") as told:
        ExplorerState.open(run.path)
    assert "\n" not in str(told.value)


# --- the picture -----------------------------------------------------------------------------------------


def test_a_redrawn_picture_equals_a_fresh_one_and_shows_how_much_is_kept(state):
    areas = []
    for value in np.linspace(*state.bounds, 5):
        state.set_threshold(value)
        redrawn = pixels(state.picture())
        areas.append(kept_area(redrawn))
        state._pictures.clear()
        assert (redrawn == pixels(state.picture())).all()
    assert areas == sorted(areas, reverse=True)
    assert areas[0] > 100_000 > 2000 > areas[-1]


# --- the widgets -----------------------------------------------------------------------------------------


@pytest.fixture
def explorer(tmp_path):
    return Explorer(ExplorerState.open(make_run(tmp_path / "run", 70).path))


def test_slider_number_box_and_size_box_agree(explorer):
    state = explorer.state
    assert [value for _, value in explorer.score.options] == available_scores(state.layers)
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
    with pytest.raises(PlanError, match="'x' is no number"):
        read_number("x")


def test_the_browsers_rounding_of_a_slider_changes_nothing(explorer):
    before = explorer.state.choice.layers
    place = explorer.threshold.value
    explorer.threshold.value = place + 1e-6 * explorer.threshold.step  # what a browser sends back
    assert explorer.state.choice.layers == before
    explorer.threshold.value = place + 40 * explorer.threshold.step  # a person
    moved = explorer.state.threshold
    explorer.threshold.value = place  # and back again
    assert explorer.state.threshold < moved


def test_score_direction_and_layer_change_what_is_shown(explorer):
    before = explorer.picture.value
    explorer.direction.value = "low"
    explorer.score.value = "fisher"
    assert explorer.direction.value == "high"
    explorer.direction.value = "low"
    assert (explorer.state.score, explorer.state.direction) == ("fisher", "low")
    assert explorer.state.wide
    assert 10**explorer.threshold.min == pytest.approx(explorer.state.bounds[0])
    assert explorer.picture.value != before
    spectrum = explorer.spectrum.value
    explorer.type.value = "down_proj"
    explorer.layer.index = 3
    assert explorer.layer.value == "model.layers.3.mlp.down_proj"
    assert explorer.spectrum.value != spectrum


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


# --- the page without a kernel ---------------------------------------------------------------------------


def test_page_is_small_self_contained_and_the_same_each_time(tmp_path):
    run = make_run(tmp_path / "run", 250)
    page = write_explorer(run).read_text(encoding="utf-8")
    assert len(page.encode()) <= 3_000_000
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"src=|href=|url\(|@import", markup)
    assert page.count("<script") == page.count("<script type=")  # no script from elsewhere
    assert write_explorer(run).read_text(encoding="utf-8") == page


@pytest.mark.parametrize("name", ["a</script><b>{{ data }}", "<!--<script>", "a < b"])
def test_page_survives_hostile_names_and_missing_values(name):
    table = layer_table(7)
    table.loc[2, ["name", "alpha_hill", "alpha_pl"]] = [name, np.nan, np.nan]
    page = explorer_html(ExplorerState(table, spectra=spectra_of(table)), "<b>model</b>")
    assert "<title>&lt;b&gt;model" in page
    line = next(line for line in page.splitlines() if line.startswith("const DATA = "))
    assert "<" not in line  # nothing leaves the script element
    data = json.loads(line.removeprefix("const DATA = ").removesuffix(";"))
    assert data["layers"][1]["name"] == name
    assert data["scores"]["alpha_hill"]["high"]["row"][1] is None and data["layers"][1]["fixed"] is None


def test_other_files_stand_beside_the_frontier(tmp_path):
    table = layer_table(30)
    table["predicted_int8"] = table["predicted_nf4"] / 50
    state = ExplorerState(table)
    ((label, size, kl),) = state.landmarks
    planned = state.planned
    everywhere = make_plan(table, rule="top_k", value=0, formats=("int8", "16bit"))
    assert label == "int8 everywhere" and size == everywhere.bytes["total"]
    assert kl == pytest.approx(planned["predicted_nf4"].sum() / 50)
    assert page_data(state)["landmarks"][0]["size"] == pytest.approx(size / state.unit[0])
    unknown = table.drop(columns=[name for name in table if name.startswith("predicted_")])
    assert ExplorerState(unknown).landmarks == []
