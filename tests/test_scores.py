"""Scores: every row of the table, by hand on a small table; and that planning needs no torch."""

import subprocess
import sys

import numpy as np
import pytest

from spi_utils.errors import PlanError
from spi_utils.plan import (
    SCORES,
    additive_cost,
    available_scores,
    make_plan,
    score_row,
    score_values,
)
from tests.synthetic import layer_table

METHOD_ROWS = {
    *("alpha_pl", "alpha_hill", "alpha_decay", "alpha_excess", "alpha_farms"),
    *("effective_rank_rel", "stable_rank", "nuclear_rank_90_rel", "nf4_error", "alphaq", "swan"),
    *("type_prior", "random", "fisher", "measured", "refined", "smallest", "first_last"),
}


def test_the_table_holds_every_score_of_the_method():
    assert set(SCORES) == METHOD_ROWS
    assert [name for name, row in SCORES.items() if row.additive] == ["fisher", "refined", "measured"]


def test_planning_imports_no_torch():
    code = (
        "import sys, spi_utils.plan, spi_utils.curves, spi_utils.formats; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'bitsandbytes'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name", [n for n, s in SCORES.items() if isinstance(s.source, str) and not s.additive]
)
def test_a_column_score_is_its_column_on_planned_rows_only(name):
    layers = layer_table(14)
    column = "error_nf4" if name == "nf4_error" else name
    values = score_values(layers, name)
    assert np.isnan(values[[0, -1]]).all()  # the embedding and the rest
    assert np.array_equal(values[1:-1], layers[column].to_numpy(float)[1:-1])


def test_additive_scores_are_nats_a_gigabyte():
    layers = layer_table(7)
    row = layers.iloc[3]  # v_proj: 192 × 576 weights; by hand 2 bytes and 4.5 bits a weight
    spent = 192 * 576 * (2 - 4.5 / 8)
    total = layers["predicted_nf4"].sum() / layers["fisher_nf4"].sum()
    assert score_values(layers, "fisher")[3] == pytest.approx(row["fisher_nf4"] * total / spent * 1e9)
    between = (row["fisher_nf4"] * total - row["fisher_int8"] * 1.1) / (
        192 * 576 + 2 * 192 - 192 * 576 * 4.5 / 8
    )
    assert score_values(layers, "fisher", formats=("int8", "nf4"))[3] == pytest.approx(between * 1e9)


def test_additive_costs_are_scaled_to_what_all_layers_cost_together():
    layers = layer_table(21)
    for fmt in ("nf4", "int8"):
        assert np.nansum(additive_cost(layers, "fisher", fmt)) == pytest.approx(
            layers[f"predicted_{fmt}"].sum()
        )
    raw = additive_cost(layers.drop(columns="predicted_nf4"), "fisher", "nf4")
    assert np.array_equal(raw[1:-1], layers["fisher_nf4"].to_numpy(float)[1:-1])
    assert not additive_cost(layers, "fisher", "16bit").any()


def test_smallest_and_the_ends_come_first():
    layers = layer_table(21)  # three blocks
    names = layers["name"].to_numpy()
    small = np.nanargmax(score_values(layers, "smallest"))
    assert names[small].endswith("k_proj")  # 192 × 576, before v_proj of the same size in model order
    ends = score_values(layers, "first_last")
    depth = layers["depth"].to_numpy()
    assert (
        set(ends[depth == 0]) == {1.0} and set(ends[depth == 2]) == {1.0} and set(ends[depth == 1]) == {0.5}
    )


def test_the_type_prior_orders_types_and_puts_whole_end_blocks_first():
    layers = layer_table(28)  # four blocks
    values = dict(zip(layers["name"], score_values(layers, "type_prior"), strict=True))
    inner = [values[f"model.layers.1.{kind}"] for kind in ("self_attn.v_proj", "mlp.down_proj")]
    inner += [values["model.layers.1.self_attn.o_proj"], values["model.layers.1.self_attn.k_proj"]]
    inner += [values["model.layers.1.mlp.gate_proj"]]
    assert inner == sorted(inner, reverse=True) and len(set(inner)) == 5
    assert values["model.layers.0.mlp.gate_proj"] > inner[0]


def test_random_is_seeded():
    layers = layer_table(50)
    one, again, two = (score_values(layers, "random", seed=seed)[1:-1] for seed in (1, 1, 2))
    assert np.array_equal(one, again) and not np.array_equal(one, two)


def test_available_scores_are_those_with_a_column():
    layers = layer_table(7)
    assert "refined" not in available_scores(layers)
    assert "measured" in available_scores(layers) and "measured" not in available_scores(
        layers, ("nf4", "int8", "16bit")
    )
    bare = layers[["name", "type", "depth", "role", "rows", "cols", "numel", "quantizable", "status"]]
    assert available_scores(bare) == ["type_prior", "first_last", "smallest", "random"]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: score_row("alpha_hil"), "Did you mean 'alpha_hill'"),
        (lambda: make_plan(layer_table(7), direction="hihg"), "Did you mean 'high'"),
        (lambda: score_values(layer_table(7), "refined"), "refine_at"),
        (lambda: score_values(layer_table(7).drop(columns="swan"), "swan"), "holds no swan"),
        (lambda: additive_cost(layer_table(7), "alpha_hill", "nf4"), "fisher, refined, measured"),
    ],
)
def test_what_is_wrong_is_said(call, said):
    with pytest.raises(PlanError, match=said):
        call()
