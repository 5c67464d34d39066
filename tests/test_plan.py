"""Plans: bytes by hand and against a saved file, every rule, every refusal, plan.json."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from spi_utils.errors import PlanError
from spi_utils.plan import (
    EQUAL,
    ProtectionPlan,
    bit_rates,
    check_plan,
    check_writer,
    equal_bytes_plan,
    make_plan,
    price,
)
from tests.synthetic import layer_table

MODEL = {
    "id": "tests/synthetic",
    "kind": "local",
    "revision": None,
    "sha256": "a" * 64,
    "storage_dtype": "float16",
}


def small(costs=(3.0, 2.0, 1.0), shapes=((64, 64), (64, 128), (128, 128)), **columns):
    """Three layers and an embedding with round numbers; without bytes columns, so that they are computed."""
    rows = [
        {"name": f"model.layers.{i}.mlp.up_proj", "type": "up_proj", "depth": i, "role": "linear", "rows": r,
         "cols": c, "numel": r * c, "quantizable": True, "status": "ok"}
        for i, (r, c) in enumerate(shapes)
    ]  # fmt: skip
    embedding = rows[0] | {"name": "model.embed_tokens", "type": "embed_tokens", "depth": -1, "rows": 100}
    embedding |= {"role": "embedding", "cols": 64, "numel": 6400, "quantizable": False, "status": "listed"}
    table = pd.DataFrame([embedding, *rows])
    table["fisher_nf4"] = table["predicted_nf4"] = [np.nan, *costs]
    table["alpha_hill"] = [np.nan, *columns.get("alpha", (3.0, 5.0, 4.0))]
    return table


# --- bytes -----------------------------------------------------------------------------------------------


def test_bytes_by_hand():
    plan = make_plan(small(), rule="top_k", value=1)  # α 5: the 64 × 128 layer
    assert plan.protected == ("model.layers.1.mlp.up_proj",)
    # NF4: half a byte a weight, 4 bytes a block of 64, 16 levels of 4 bytes, and the state as JSON.
    states = [len(json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": s}))
              for s in ([64, 64], [128, 128])]  # fmt: skip
    nf4 = sum(n // 2 + 4 * (n // 64) + 64 + state for n, state in zip((4096, 16384), states, strict=True))
    assert plan.bytes["16bit"] == 2 * 64 * 128
    assert plan.bytes["nf4"] == nf4
    assert plan.bytes["embeddings"] == 12800
    assert plan.bytes["rest"] == 0
    parts = ("16bit", "nf4", "embeddings", "rest", "header")
    assert plan.bytes["total"] == sum(plan.bytes[part] for part in parts)
    assert plan.matrix_bits == pytest.approx(8 * (16384 + nf4) / (4096 + 8192 + 16384))
    assert plan.bits_per_weight == pytest.approx(8 * (16384 + nf4 + 12800) / (4096 + 8192 + 16384 + 6400))


@pytest.mark.parametrize("double_quant", [False, True])
def test_bytes_match_a_file_that_bitsandbytes_and_safetensors_wrote(tmp_path, double_quant):
    import torch
    from bitsandbytes.nn import Linear4bit
    from safetensors.torch import save_file

    layers = layer_table(7)
    layers = layers.drop(columns=[c for c in layers if c.startswith("bytes_")])  # made-up ones
    layers.loc[layers["role"] == "embedding", ["rows", "numel"]] = [640, 640 * 576]
    plan = make_plan(layers, rule="top_k", value=2, double_quant=double_quant)
    tensors = {"model.embed_tokens.weight": torch.zeros(640, 576, dtype=torch.float16)}
    for row in layers[layers["quantizable"]].itertuples():
        weight = torch.randn(row.rows, row.cols, dtype=torch.float16)
        if row.name in plan.protected:
            tensors[f"{row.name}.weight"] = weight
            continue
        layer = Linear4bit(row.cols, row.rows, bias=False, quant_type="nf4", compress_statistics=double_quant)
        layer.load_state_dict({"weight": weight})
        tensors |= {f"{row.name}.{key}": value for key, value in layer.to("cpu").state_dict().items()}
    other = int(layers["numel"].iloc[-1])
    tensors |= {
        f"model.layers.0.norm{i}.weight": torch.zeros(other // 2, dtype=torch.float16) for i in (1, 2)
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    size = (tmp_path / "model.safetensors").stat().st_size
    assert plan.bytes["total"] == pytest.approx(size, rel=0.002)


def test_the_bundled_models_rates_are_those_of_its_shapes():
    layers = layer_table(210)  # SmolLM2's shapes: 30 blocks, a 49,152 × 576 embedding
    all_nf4 = make_plan(layers, rule="top_k", value=0)
    assert all_nf4.matrix_bits == pytest.approx(4.5, abs=0.01)
    assert all_nf4.bits_per_weight == pytest.approx(6.92, abs=0.01)
    everything = make_plan(layers, rule="top_k", value=210)
    assert everything.bytes["total"] == everything.bytes["total_16bit"]
    assert everything.matrix_bits == everything.bits_per_weight == 16.0
    assert everything.predicted_kl == 0.0


def test_price_keeps_unnamed_layers_in_16bit():
    layers = layer_table(14)
    assert price(layers, {})["total"] == price(layers, {})["total_16bit"]
    assert bit_rates(layers, {}, False) == (16.0, 16.0)


# --- rules -----------------------------------------------------------------------------------------------


def test_the_default_is_the_claim():
    large, less = make_plan(layer_table(248)), make_plan(layer_table(210))
    assert (large.score, large.direction, large.rule, large.double_quant) == (
        "alpha_hill",
        "high",
        "claim",
        False,
    )
    assert len(large.protected) == 129 and "scaled" not in large.reason
    assert len(less.protected) == round(0.52 * 210) == 109 and "round(0.52·210) = 109" in less.reason
    layers = layer_table(248)
    kept = layers.set_index("name").loc[list(large.protected), "alpha_hill"].min()
    rest = [name for name in large.formats if name not in set(large.protected)]
    assert kept >= layers.set_index("name").loc[rest, "alpha_hill"].max()


@pytest.mark.parametrize("direction", ["high", "low"])
def test_top_k_and_threshold_agree(direction):
    layers = layer_table(70)
    by_count = make_plan(layers, rule="top_k", value=20, direction=direction)
    values = layers.set_index("name").loc[list(by_count.protected), "alpha_hill"]
    cut = values.min() if direction == "high" else values.max()
    by_cut = make_plan(layers, rule="threshold", value=cut, direction=direction)
    assert by_cut.protected == by_count.protected and by_cut.value == cut


@pytest.mark.parametrize(
    ("value", "count", "said"), [(99, 0, "That is none"), (-1, 21, "That is all of them")]
)
def test_a_threshold_may_select_nothing_or_everything_and_says_so(value, count, said):
    plan = make_plan(layer_table(21), rule="threshold", value=value)
    assert len(plan.protected) == count and said in plan.reason


def test_equal_scores_keep_the_models_order():
    plan = make_plan(small(alpha=(2.0, 2.0, 2.0)), rule="top_k", value=2)
    assert plan.protected == ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")


def test_infinite_scores_rank_and_missing_ones_come_last():
    layers = small(alpha=(np.nan, np.inf, 4.0))
    assert make_plan(layers, rule="top_k", value=1).protected == ("model.layers.1.mlp.up_proj",)
    two = make_plan(layers, rule="threshold", value=0.0)
    assert len(two.protected) == 2 and "1 layers have no alpha_hill" in two.reason
    assert len(make_plan(layers, rule="top_k", value=3).protected) == 3


@pytest.mark.parametrize("rule", ["matrix_bits", "bits_per_weight", "budget_gb"])
@pytest.mark.parametrize("score", ["fisher", "alpha_hill", "random"])
def test_budgets_are_met_and_filled(rule, score):
    layers = layer_table(210)
    value = {"matrix_bits": 7.0, "bits_per_weight": 9.0, "budget_gb": 0.15}[rule]
    plan = make_plan(layers, score=score, rule=rule, value=value)
    rate = {"matrix_bits": plan.matrix_bits, "bits_per_weight": plan.bits_per_weight}
    assert rate.get(rule, plan.bytes["total"] / 1e9) <= value
    assert 0 <= plan.bytes["miss"] <= EQUAL * plan.bytes["total_16bit"]


def test_the_additive_budget_is_the_optimum_by_brute_force():
    rng = np.random.default_rng(3)
    shapes = [(64 * int(rng.integers(1, 6)), 64) for _ in range(8)]
    layers = small(costs=rng.random(8), shapes=shapes, alpha=rng.random(8))
    budget = 8.0
    plan = make_plan(layers, score="fisher", rule="matrix_bits", value=budget)
    names = list(plan.formats)
    best = np.inf
    for bits in range(1 << 8):
        kept = {name: "16bit" if bits >> i & 1 else "nf4" for i, name in enumerate(names)}
        if bit_rates(layers, kept, False)[1] <= budget:
            best = min(
                best,
                sum(c for c, f in zip(layers["fisher_nf4"][1:], kept.values(), strict=True) if f == "nf4"),
            )
    assert plan.predicted_kl == pytest.approx(best)


def test_three_formats_beat_two_and_never_lose_to_one():
    layers = layer_table(210)
    ask = {"score": "fisher", "rule": "matrix_bits", "value": 6.0}
    two, three = make_plan(layers, **ask), make_plan(layers, **ask, formats=("nf4", "int8", "16bit"))
    assert three.predicted_kl < two.predicted_kl
    assert set(three.formats.values()) >= {"nf4", "int8"} and three.matrix_bits <= 6.0


@pytest.mark.parametrize("score", ["fisher", "alpha_hill"])
def test_the_smallest_plan_for_a_predicted_kl(score):
    layers = layer_table(70)
    plan = make_plan(layers, score=score, rule="max_kl", value=0.05)
    assert plan.predicted_kl <= 0.05
    by_bytes = make_plan(layers, score=score, rule="matrix_bits", value=plan.matrix_bits)
    assert by_bytes.predicted_kl <= 0.05 * 1.001  # the same trade seen from the other side
    tighter = make_plan(layers, score=score, rule="max_kl", value=0.02)
    assert tighter.bytes["total"] > plan.bytes["total"]
    assert make_plan(layers, score=score, rule="max_kl", value=99).protected == ()


def test_the_low_direction_of_an_additive_score_is_the_anti_oracle():
    layers = layer_table(70)
    plans = [
        make_plan(layers, score="fisher", direction=d, rule="matrix_bits", value=8) for d in ("high", "low")
    ]
    chance = make_plan(layers, score="random", rule="matrix_bits", value=8)
    assert plans[0].predicted_kl < chance.predicted_kl < plans[1].predicted_kl


# --- wishes ----------------------------------------------------------------------------------------------


def test_a_format_that_fits_no_layer_is_refused_as_such():
    odd = layer_table(14).assign(cols=100).drop(columns=["fisher_int4_g64", "predicted_int4_g64"])
    with pytest.raises(PlanError, match="int4_g64 can hold none of the 14 layers"):
        make_plan(odd, score="fisher", rule="matrix_bits", value=8, formats=("int4_g64", "16bit"))


def test_fused_groups_share_a_format():
    plan = make_plan(layer_table(70), score="fisher", rule="matrix_bits", value=7, group="fused")
    for block in range(10):
        for leaves in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            held = {
                fmt
                for name, fmt in plan.formats.items()
                if re.search(rf"\.{block}\..*({'|'.join(leaves)})$", name)
            }
            assert len(held) == 1
    assert plan.options["group"] == "fused"


def test_qwens_linear_attention_pairs_are_groups():
    names = [f"model.layers.0.linear_attn.in_proj_{leaf}" for leaf in ("qkv", "z", "b", "a")]
    layers = small(costs=(9.0, 0.1, 0.2, 5.0), shapes=[(128, 64)] * 4, alpha=(1, 2, 3, 4))
    layers.loc[1:, "name"] = names
    plan = make_plan(layers, score="fisher", rule="top_k", value=2, group="fused")
    assert plan.protected == tuple(names[:2])  # 9.1 together against 5.2


def test_force_and_forbid():
    layers = layer_table(70)
    plan = make_plan(
        layers, rule="top_k", value=10, force_16bit=r"\.0\.mlp", forbid_16bit=["k_proj$", "v_proj$"]
    )
    assert len(plan.protected) == 10
    assert {f"model.layers.0.mlp.{kind}_proj" for kind in ("gate", "up", "down")} <= set(plan.protected)
    assert not [name for name in plan.protected if name.endswith(("k_proj", "v_proj"))]
    assert "23 layers are decided by" in plan.reason  # 3 forced, 20 forbidden
    budget = make_plan(
        layers, score="fisher", rule="matrix_bits", value=7, force_16bit=r"\.0\.mlp", forbid_16bit="v_proj"
    )
    assert {name for name in layers["name"] if ".0.mlp" in name} <= set(budget.protected)
    assert not [name for name in budget.protected if name.endswith("v_proj")]


def test_empty_patterns_are_no_wish():
    assert (
        make_plan(layer_table(14), force_16bit="", forbid_16bit=[""]).formats
        == make_plan(layer_table(14)).formats
    )


# --- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"score": "alpha_hil"}, "Did you mean 'alpha_hill'"),
        ({"direction": "up"}, "unknown direction 'up'"),
        ({"rule": "top-k", "value": 3}, "Did you mean 'top_k'"),
        ({"rule": "top_k", "value": 22}, "21 layers that can be protected"),
        ({"rule": "top_k", "value": -1}, "21 layers"),
        ({"rule": "top_k", "value": 2.5}, "21 layers"),
        ({"rule": "top_k"}, "needs a value"),
        ({"rule": "top_k", "value": "12"}, "needs a value"),
        ({"rule": "claim", "value": 12}, "use rule='top_k' for 12"),
        ({"rule": "threshold", "value": float("nan")}, "finite number"),
        ({"rule": "threshold", "value": float("inf")}, "finite number"),
        ({"rule": "matrix_bits", "value": 4.0}, "4.5000 matrix bits .* in nf4 and 16.0000 .* in 16-bit"),
        ({"rule": "matrix_bits", "value": 17}, "4.5000 matrix bits .* and 16.0000"),
        ({"rule": "budget_gb", "value": 5}, r"can't be had: this model takes 0\.\d+ GB .* and 0\.\d+ GB"),
        ({"rule": "max_kl", "value": -1, "score": "fisher"}, "best plan of these formats is predicted at 0"),
        ({"formats": ("nf4", "int9")}, "int8"),
        ({"formats": ("nf4",)}, "at least two formats"),
        ({"formats": ("nf4", "int8", "16bit")}, "chooses between two formats"),
        ({"score": "refined"}, "refine_at"),
        ({"group": "fusd"}, "Did you mean 'fused'"),
        ({"force_16bit": "down_prj"}, "matches none of the 21"),
        ({"force_16bit": "(("}, "no regular expression"),
        ({"force_16bit": "up_proj", "forbid_16bit": "mlp"}, "matches force_16bit and forbid_16bit"),
        ({"force_16bit": "q_proj", "forbid_16bit": "k_proj", "group": "fused"}, "has no format that all"),
        ({"rule": "top_k", "value": 2, "force_16bit": "mlp"}, "leave 9…21"),
        ({"rule": "matrix_bits", "value": 4.6, "score": "fisher", "force_16bit": "mlp"}, "can't be had"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_said(asked, said):
    with pytest.raises(PlanError, match=said):
        make_plan(layer_table(21), **asked)


def test_failed_layers_block_a_spectral_score_and_are_named():
    layers = layer_table(14)
    layers.loc[3, ["status", "alpha_hill"]] = ["failed", np.nan]
    with pytest.raises(PlanError, match=r"failed for 1 layer\(s\).*v_proj"):
        make_plan(layers)
    assert len(make_plan(layers, score="smallest").protected) == 7  # reads no spectrum


def test_a_missing_cost_is_refused_by_name():
    layers = layer_table(14)
    layers.loc[3, "fisher_nf4"] = np.nan
    with pytest.raises(PlanError, match=r"v_proj has no fisher in nf4"):
        make_plan(layers, score="fisher", rule="matrix_bits", value=7)


def test_a_model_without_quantizable_layers_is_refused():
    with pytest.raises(PlanError, match="nothing to plan"):
        make_plan(layer_table(7).assign(quantizable=False))


# --- plan.json -------------------------------------------------------------------------------------------


def plan_of(layers=None, **asked):
    return make_plan(
        layer_table(21) if layers is None else layers, model=MODEL, layers_fingerprint="f" * 64, **asked
    )


def test_plan_json_round_trips(tmp_path):
    plan = plan_of(force_16bit=["up_proj"], rule="top_k", value=5, origin="slider")
    plan.write(tmp_path / "plan.json")
    assert ProtectionPlan.read(tmp_path / "plan.json", model=MODEL, layers_fingerprint="f" * 64) == plan
    held = json.loads((tmp_path / "plan.json").read_text())
    keys = {"schema", "model", "score", "direction", "rule", "value", "formats", "protected", "double_quant",
            "bytes", "bits_per_weight", "matrix_bits", "predicted_kl", "layers_fingerprint", "origin",
            "reason"}  # fmt: skip
    assert keys <= set(held)
    assert held["origin"] == "slider" and held["protected"] == list(plan.protected)


def test_without_sensitivity_the_predicted_kl_is_null(tmp_path):
    plan_of(layer_table(14).drop(columns=["predicted_nf4"])).write(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["predicted_kl"] is None


def test_missing_truncated_or_foreign_plans_are_refused(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(PlanError, match="02_visualize"):
        ProtectionPlan.read(path)
    plan_of().write(path)
    with pytest.raises(
        PlanError, match=r"tests/synthetic \(weights aaaaaaaaaaaa\), not for other \(weights bbbb"
    ):
        ProtectionPlan.read(path, model=MODEL | {"id": "other", "sha256": "b" * 64})
    with pytest.raises(PlanError, match=r"another layers\.csv"):
        ProtectionPlan.read(path, layers_fingerprint="e" * 64)
    path.write_text(path.read_text()[:200])
    with pytest.raises(PlanError, match="truncated"):
        ProtectionPlan.read(path)


def test_unknown_modules_and_writers_are_refused():
    layers = layer_table(14)
    plan = plan_of(layers)
    check_plan(plan, layers["name"])
    renamed = [name.replace("model.", "model.language_model.") for name in layers["name"]]
    with pytest.raises(PlanError, match=r"14 of the plan's 14 modules .*Did you mean 'model\.language_model"):
        check_plan(plan, renamed)
    check_writer(plan, "bitsandbytes")
    assert "can't hold" not in plan.reason
    mixed = plan_of(layers, score="fisher", rule="matrix_bits", value=6, formats=("nf4", "int8", "16bit"))
    assert (
        "bitsandbytes checkpoint can't hold int8, and no writer holds all of these formats." in mixed.reason
    )
    with pytest.raises(PlanError, match=r"can't hold int8, which the plan gives to \d+ layers"):
        check_writer(mixed, "bitsandbytes")
    assert plan.writers >= {"bitsandbytes"} and "bitsandbytes" not in mixed.writers


def test_the_fingerprint_tells_what_decides_the_checkpoint():
    one, again = plan_of(), plan_of(origin="slider")
    assert one.fingerprint == again.fingerprint
    assert one.fingerprint != plan_of(double_quant=True).fingerprint
    assert one.fingerprint != plan_of(direction="low").fingerprint


def test_the_same_inputs_give_the_same_bytes_in_every_process(tmp_path):
    """A set's order differs between processes, and a sum's last digit with it."""
    code = (
        "import sys; from spi_utils.plan import make_plan; from tests.synthetic import layer_table\n"
        "formats = ('int4_g64', 'nf4', 'int8', '16bit')\n"
        "for count in (28, 35, 42, 49, 56, 63, 70):\n"
        "    asked = {'score': 'fisher', 'rule': 'matrix_bits', 'value': 6.5, 'formats': formats}\n"
        "    plan = make_plan(layer_table(count), **asked)\n"
        "    plan.write(f'{sys.argv[1]}/{count}.json')\n"
    )
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        given = [sys.executable, "-c", code, str(tmp_path / seed)]
        subprocess.run(given, check=True, env=os.environ | {"PYTHONHASHSEED": seed})
    for one in (tmp_path / "1").iterdir():
        assert one.read_bytes() == (tmp_path / "2" / one.name).read_bytes()


# --- controls --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["fisher", "alpha_hill", "smallest", "type_prior"])
def test_equal_bytes_plans_are_within_half_a_percent(score):
    layers = layer_table(210)
    plan = make_plan(layers)
    other = equal_bytes_plan(layers, total_bytes=plan.bytes["total"], score=score)
    assert other.bytes["total"] <= plan.bytes["total"]
    assert plan.bytes["total"] - other.bytes["total"] <= EQUAL * plan.bytes["total_16bit"]


def test_random_plans_spend_the_same_and_differ_by_seed():
    layers = layer_table(210)
    total = make_plan(layers).bytes["total"]
    plans = [equal_bytes_plan(layers, total_bytes=total, score="random", seed=seed) for seed in range(5)]
    assert len({plan.protected for plan in plans}) == 5
    assert plans[3].protected == equal_bytes_plan(layers, total_bytes=total, score="random", seed=3).protected
    assert all(plan.bytes["total"] == pytest.approx(total, rel=EQUAL) for plan in plans)


def test_a_missed_budget_is_said():
    layers = small(shapes=((64, 64), (64, 64), (2048, 2048)), alpha=(1.0, 2.0, 3.0))
    plan = make_plan(layers, rule="matrix_bits", value=12.0)
    assert plan.bytes["miss"] > EQUAL * plan.bytes["total_16bit"] and "misses its budget" in plan.reason
