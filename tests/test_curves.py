"""The slider's Chooser, where a choice stands, and the frontier: against make_plan and by hand."""

import time

import numpy as np
import pytest

from spi_utils.curves import QUANTILES, Chooser, Field, frontier
from spi_utils.plan import make_plan
from tests.synthetic import layer_table

WISHES = {"force_16bit": r"\.0\.mlp", "double_quant": True}


@pytest.mark.parametrize("direction", ["high", "low"])
@pytest.mark.parametrize("options", [{}, {"group": "fused"}, WISHES])
def test_a_threshold_means_the_same_to_the_slider_and_to_the_plan(direction, options):
    layers = layer_table(70)
    chooser = Chooser(layers, "alpha_hill", direction, **options)
    for cut in np.quantile(layers["alpha_hill"].dropna(), (0.0, 0.3, 0.7, 1.0)):
        choice = chooser.at_threshold(cut)
        plan = make_plan(layers, direction=direction, rule="threshold", value=float(cut), **options)
        assert tuple(np.array(list(plan.formats))[choice.mask]) == plan.protected
        assert choice.layers == len(plan.protected)
        assert choice.total_bytes == plan.bytes["total"]
        assert choice.saved_bytes == plan.bytes["total_16bit"] - plan.bytes["total"]
        assert choice.predicted_kl == pytest.approx(plan.predicted_kl, abs=1e-12)
        assert choice.matrix_bits == pytest.approx(plan.matrix_bits)


def test_ends_ties_and_missing_scores():
    layers = layer_table(14)
    layers.loc[1:7, "alpha_hill"] = 3.0
    layers.loc[8:14, "alpha_hill"] = [5.0, 5.0, 4.0, np.nan, np.inf, 2.0, 1.0]
    chooser = Chooser(layers, "alpha_hill")
    assert chooser.limits == (1.0, 5.0)
    counts = [chooser.at_threshold(cut).layers for cut in (np.inf, 5.0, 4.0, 3.0, 1.0, 0.0)]
    assert counts == [1, 3, 4, 11, 13, 13]
    assert Chooser(layers, "alpha_hill", "low").at_threshold(3.0).layers == 9


def test_the_byte_side_is_the_same_choice():
    layers = layer_table(70)
    chooser = Chooser(layers, "alpha_hill")
    for budget in np.linspace(chooser.file_bytes[0], chooser.file_bytes[-1], 9):
        choice = chooser.at_threshold(chooser.threshold_for(budget))
        assert choice.total_bytes <= budget
        assert choice.layers == 70 or chooser.at_count(choice.layers + 1).total_bytes > budget
    assert chooser.at_threshold(chooser.threshold_for(0)).layers == 0
    tied = Chooser(layers.assign(alpha_hill=2.0), "alpha_hill")  # all or none
    for place, layers_kept in ((30, 0), (-1, 70)):
        size = float(tied.file_bytes[place])
        assert tied.at_threshold(tied.threshold_for(size)).layers == layers_kept


def test_without_sensitivity_the_bytes_remain():
    layers = layer_table(14).drop(columns=["predicted_nf4"])
    assert Chooser(layers, "alpha_hill").at_count(3).predicted_kl is None
    assert Field.of(layers) is None
    table = frontier(layers, ["alpha_hill"])
    assert set(table["kind"]) == {"score"} and table["predicted_kl"].isna().all()
    assert table["bytes"].notna().all()


def test_standing_at_the_optimum_the_median_and_the_worst():
    layers = layer_table(210)
    field, asked = Field.of(layers), {"rule": "matrix_bits", "value": 8}
    best, worst = (make_plan(layers, score="fisher", direction=d, **asked) for d in ("high", "low"))
    top = field.standing(best.bytes["total"], best.predicted_kl)
    assert top.better_than == 1.0 and 0.98 < top.gain <= 1.0 + 1e-9
    assert top.optimum <= best.predicted_kl * (1 + 1e-9) < top.random_low
    low = field.standing(worst.bytes["total"], worst.predicted_kl)
    assert low.better_than == 0.0 and low.gain < 0 and low.random_high < worst.predicted_kl


def test_the_frontier_is_tidy_ordered_and_knows_the_fields_choices():
    layers = layer_table(70)
    table = frontier(layers, ["alpha_hill", "fisher"], points=11)
    assert table["kind"].value_counts()["random"] == 11 * len(QUANTILES)
    assert set(table["kind"]) == {"score", "random", "optimum"}
    best = table[table["kind"] == "optimum"].set_index("bytes")["predicted_kl"].sort_index()
    assert best.is_monotonic_decreasing and best.iloc[-1] == 0.0
    field = Field.of(layers, points=2001)  # its optimum may split a layer: a bound on every plan
    for _, curve in table[table["kind"] != "random"].dropna(subset="predicted_kl").groupby("score"):
        bound = np.interp(curve["bytes"], field.file_bytes, field.optimum)
        assert (curve["predicted_kl"] >= bound - 1e-4 * best.iloc[0]).all()
    for _, curve in table[table["kind"] == "score"].groupby(["score", "direction"]):
        assert curve["bytes"].is_monotonic_increasing
    middle = table[(table["kind"] == "random") & (table["quantile"] == 0.5)]
    size, field = middle["bytes"].iloc[4], Field.of(layers, points=11)
    assert field.standing(size, 0.1).random_median == pytest.approx(middle["predicted_kl"].iloc[4], rel=1e-6)


def test_the_frontier_covers_every_score_of_the_table():
    table = frontier(layer_table(28), points=3, seeds=5)
    curves = set(table[table["kind"] == "score"].groupby(["score", "direction"]).groups)
    assert {("alpha_pl", "low"), ("swan", "high"), ("measured", "high"), ("type_prior", "low")} <= curves


def test_a_slider_step_takes_well_below_five_milliseconds_for_two_thousand_layers():
    layers = layer_table(2000)
    chooser, field = Chooser(layers, "alpha_hill"), Field.of(layers)
    took = []
    for cut in np.linspace(*chooser.limits, 100):
        started = time.process_time()
        choice = chooser.at_threshold(cut)
        field.standing(choice.total_bytes, choice.predicted_kl)
        took.append(time.process_time() - started)
    assert np.median(took) < 0.002
