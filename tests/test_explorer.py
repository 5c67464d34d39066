"""The explorer: state against plan.py, pictures against a full redraw, widgets, and the page's table."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from spi_utils.errors import PlanError, RunError
from spi_utils.explorer import Explorer, ExplorerState, explore, explorer_html, page_data, say, write_explorer
from spi_utils.figures import FORMAT_COLOURS
from spi_utils.plan import ProtectionPlan, available_scores, check_writer, make_plan
from spi_utils.runs import layers_fingerprint, read_layers
from tests.synthetic import layer_table, make_run, spectra_of

MODEL = {"sha256": "0" * 64}
KEPT = [int(FORMAT_COLOURS["16bit"][i : i + 2], 16) for i in (1, 3, 5)]
FAILED = ["model.layers.1.self_attn.v_proj", "model.layers.4.mlp.down_proj"]


@pytest.fixture(scope="module")
def layers():
    return layer_table(70)


@pytest.fixture
def state(layers):
    return ExplorerState(layers, spectra=spectra_of(layers))


def kept_pixels(png: bytes, top: int = 0) -> int:
    image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    assert image.shape == (600, 1000, 3)
    return int((image[top:] == KEPT).all(axis=2).sum())


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
        if (layer["fixed"] or "").startswith("16-bit") or (layer["fixed"] is None and first <= row)
    )
    return data["facts"] | facts, table["bytes"][row], names


# --- one choice, told by the state, by the page, and by plan.py -------------------------------------------


@pytest.mark.parametrize(
    "wishes", [{}, {"group": "fused", "force_16bit": "layers.9.mlp", "double_quant": True}]
)
def test_every_number_of_slider_and_page_is_plan_pys(layers, wishes):
    state = ExplorerState(layers, **wishes)
    data = page_data(state)
    for score, direction in (("alpha_hill", "high"), ("fisher", "high"), ("smallest", "low")):
        state.set_score(score, direction)
        cut = state.chooser.cut
        for value in (cut[0], (cut[5] + cut[6]) / 2, cut[-1], *state.thresholds[[0, -1]]):
            state.set_threshold(float(value))
            rule = {"score": score, "direction": direction, "rule": "threshold", "value": float(value)}
            plan = make_plan(layers, **rule, **wishes)
            facts, size, names = on_page(data, score, direction, value)
            assert kept(state) == names == plan.protected
            assert state.choice.total_bytes == size == plan.bytes["total"]
            assert state.choice.saved_bytes == plan.bytes["total_16bit"] - plan.bytes["total"]
            assert state.choice.predicted_kl == pytest.approx(plan.predicted_kl)
            assert state.say("line").startswith(f"{len(names)} of 70 layers in 16-bit · ")
            assert f"predicted KL {plan.predicted_kl:.3g} nats" in state.say("line")
            for what in ("line", "comparison", "ties"):
                assert say(what, facts) == state.say(what)


def test_size_slider_and_another_score(state):
    for size in state.sizes[::60]:
        state.set_size(size)
        beyond = state.chooser.cut[state.choice.layers :]
        assert state.choice.total_bytes <= size  # and one more layer would not have fitted
        assert not len(beyond) or state.chooser.at_threshold(beyond[0]).total_bytes > size
    state.set_score("alpha_hill", "low")
    state.set_size(np.mean(state.sizes))
    count = state.choice.layers
    state.set_score("alpha_decay")
    assert (state.choice.layers, state.direction) == (count, "low")  # as many layers stay
    state.set_score("fisher")  # to protect what costs least is never meant
    assert state.direction == "high" and "better than 100% of random" in state.say("comparison")
    state.set_score("fisher", "low")  # but who wants it gets it
    assert state.direction == "low" and "predicted worse than random by" in state.say("comparison")


def test_unusual_tables():
    odd = layer_table(14)
    odd.loc[1:3, "alpha_hill"] = [np.nan, np.inf, -np.inf]
    tables = [layer_table(1), layer_table(14).assign(alpha_hill=3.0), odd]
    tables.append(layer_table(7).assign(alpha_hill=np.nan, alpha_pl=np.nan))
    bare = layer_table(14)
    tables.append(bare.drop(columns=[c for c in bare if c.startswith(("fisher", "measured", "predicted"))]))
    for table in tables:
        state = ExplorerState(table, score="alpha_hill" if table["alpha_hill"].notna().any() else "fisher")
        state.set_threshold(state.thresholds[-1])
        assert np.isfinite(state.thresholds).all() and state.picture()
        assert state.choice.layers == np.isposinf(table["alpha_hill"]).sum()
        json.dumps(page_data(state), allow_nan=False)
    assert state.say("comparison").startswith("No sensitivity") and "predicted KL" not in state.say("line")
    assert page_data(state)["band"] is None and "fisher" not in state.scores
    with pytest.raises(PlanError, match="no layer that can be quantized"):
        ExplorerState(layer_table(3).iloc[[0]])


# --- failed layers, wishes, and the run directory ---------------------------------------------------------


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
    for value in (*state.thresholds[[0, -1]], 4.5):  # all but the failed ones can be chosen
        state.set_threshold(value)
        plan = state.plan()
        assert kept(state) == on_page(data, "alpha_hill", "high", value)[2] == plan.protected
        assert set(FAILED) <= set(plan.protected) and plan.bytes["total"] == state.choice.total_bytes
    assert "of 70 layers in 16-bit, 2 of them as their analysis failed" in state.say("line")
    assert all(name in data["notes"] for name in FAILED)
    plan = ProtectionPlan.read(state.save())
    assert "stay in 16-bit because the analysis failed" in plan.reason
    assert plan.options["force_16bit"] == [f"^{re.escape(name)}$" for name in FAILED]
    again = ExplorerState.open(run)
    assert again.held == FAILED and again.say("line") == state.say("line") and again.notes == state.notes


def test_the_runs_plan_keeps_its_wishes_when_the_slider_saves(tmp_path):
    run = make_run(tmp_path / "run", 70)
    wishes = {"group": "fused", "force_16bit": ["layers.9.mlp"], "forbid_16bit": ["[qkv]_proj$"]}
    first = make_plan(read_layers(run), model=MODEL, double_quant=True, **wishes)
    first.write(run.plan_json)
    state = ExplorerState.open(run)
    assert "group fused" in page_data(state)["notes"] and "layers.9.mlp" in page_data(state)["notes"]
    state.set_threshold(4.5)
    plan = ProtectionPlan.read(state.save())
    assert plan.options == first.options and plan.double_quant and kept(state) == plan.protected
    assert {f"model.layers.9.mlp.{leaf}_proj" for leaf in ("gate", "up", "down")} <= set(plan.protected)
    assert not any(name.endswith(("q_proj", "k_proj", "v_proj")) for name in plan.protected)


def test_save_writes_the_plan_and_a_reopened_explorer_starts_there(tmp_path):
    with pytest.raises(RunError, match="01_analyze"):
        explore(tmp_path)
    with pytest.raises(RunError, match="no run directory to save to"):
        ExplorerState(layer_table(7)).save()
    run = make_run(tmp_path / "run", 35)
    state = ExplorerState.open(run.path)
    state.set_score("alpha_decay", "low")
    state.set_threshold(float(np.median(state.chooser.cut)))
    assert state.save() == run.plan_json
    plan = ProtectionPlan.read(run.plan_json, model=MODEL)
    said = (plan.origin, plan.rule, plan.score, plan.direction)
    assert said == ("slider", "threshold", "alpha_decay", "low")
    assert plan.protected == kept(state) and plan.layers_fingerprint == layers_fingerprint(run)
    again = ExplorerState.open(run.path)
    assert (again.score, again.direction, again.threshold) == ("alpha_decay", "low", state.threshold)
    assert ExplorerState.open(run, score="alpha_hill").score == "alpha_hill"
    make_plan(read_layers(run), rule="threshold", value=1e9, model=MODEL).write(run.plan_json)
    assert ExplorerState.open(run).choice.layers == 0  # a plan may protect nothing, by any threshold


def test_plans_of_the_other_backends_formats(tmp_path):
    run = make_run(tmp_path / "run", 35)
    formats = {"formats": ("int8", "16bit"), "group": "fused", "model": MODEL}
    make_plan(read_layers(run), rule="top_k", value=9, **formats).write(run.plan_json)
    state = ExplorerState.open(run)
    state.set_threshold(float(np.median(state.chooser.cut)))
    plan = ProtectionPlan.read(state.save(), model=MODEL)
    check_writer(plan, "compressed-tensors")
    assert set(plan.formats.values()) == {"int8", "16bit"} and state.rest == "8-bit"
    assert "stored in 8-bit (int8)" in explorer_html(state, "model")
    assert on_page(page_data(state), "alpha_hill", "high", state.threshold)[1] == plan.bytes["total"]


# --- the picture, the widgets, the page -------------------------------------------------------------------


def test_a_redrawn_picture_equals_a_fresh_one_and_shows_how_much_is_kept(state):
    areas = []
    for value in state.thresholds[[0, 200, -1]]:
        state.set_threshold(value)
        redrawn = state.picture()
        state._picture = None
        assert redrawn == state.picture()
        areas.append(kept_pixels(redrawn))
    assert areas[0] > areas[1] + 50_000 > 50_000 > 2000 > areas[2]


@pytest.fixture
def explorer(tmp_path):
    return Explorer(ExplorerState.open(make_run(tmp_path / "run", 35).path))


def test_widgets_follow_each_other(explorer):
    state = explorer.state
    assert [value for _, value in explorer.score.options] == available_scores(state.layers)
    explorer.threshold.value = 50
    assert float(explorer.number.value) == pytest.approx(state.thresholds[50], rel=1e-4)
    before, place = explorer.picture.value, explorer.threshold.value
    explorer.number.value = "4,5"  # a decimal comma
    assert state.threshold == 4.5 and explorer.picture.value != before and explorer.threshold.value != place
    assert f"{state.choice.layers} of 35 layers" in explorer.line.value
    explorer.size_number.value = f"{np.mean(state.sizes) / 1e6:.2f}"
    assert state.choice.total_bytes <= np.mean(state.sizes) + 1e4
    assert float(explorer.number.value) == pytest.approx(state.threshold, rel=1e-4)
    explorer.direction.value = "low"
    explorer.score.value = "fisher"
    assert explorer.direction.value == "high"
    explorer.direction.value = "low"
    assert (state.score, state.direction) == ("fisher", "low")


def test_a_bad_number_is_refused_visibly_and_the_button_saves(explorer):
    for place, text in enumerate(("abc", "", "nan", "1e99", "-7")):
        before = explorer.state.threshold
        explorer.number.value = text
        assert explorer.state.threshold == before and "⚠" in explorer.message.value
        assert float(explorer.number.value) == pytest.approx(before, rel=1e-4)
        explorer.number.value = f"4.{place + 1}"
        assert explorer.message.value == ""
    assert not explorer.state.run.plan_json.exists()  # nothing is written before
    explorer.save.click()
    assert str(explorer.state.run.plan_json) in explorer.saved.value
    assert ProtectionPlan.read(explorer.state.run.plan_json).value == 4.5


def test_page_is_small_self_contained_and_the_same_each_time(tmp_path):
    run = make_run(tmp_path / "run", 70)
    page = write_explorer(run).read_text(encoding="utf-8")
    assert len(page.encode()) <= 3_000_000
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"src=|href=|url\(|@import", markup)
    assert page.count("<script") == page.count("<script type=")  # no script from elsewhere
    assert write_explorer(run).read_text(encoding="utf-8") == page


def test_page_survives_hostile_names_and_missing_values():
    table, name = layer_table(7), "<!--<script>a</script><b>{{ data }}"
    table.loc[2, ["name", "alpha_hill", "alpha_pl"]] = [name, np.nan, np.nan]
    page = explorer_html(ExplorerState(table, spectra=spectra_of(table)), "<b>model</b>")
    line = next(line for line in page.splitlines() if line.startswith("const DATA = "))
    assert "<title>&lt;b&gt;model" in page and "<" not in line  # nothing leaves the script element
    data = json.loads(line.removeprefix("const DATA = ").removesuffix(";"))
    table = data["scores"]["alpha_hill"]["high"]
    assert data["layers"][1]["name"] == name and table["row"][1] > len(table["cut"])
