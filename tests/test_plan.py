"""Plans: bytes by hand and against a saved file, scores, every rule and refusal, the knapsack, plan.json."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from spi_utils.errors import PlanError, SPIError
from spi_utils.plan import (
    EQUAL,
    GAP,
    ProtectionPlan,
    additive_cost,
    bit_rates,
    check_plan,
    check_writer,
    decide,
    in_order,
    least_cost,
    make_plan,
    read_plan,
    score_values,
)
from spi_utils.runs import layers_fingerprint, read_layers, run_info
from tests.synthetic import layer_table, make_run

MIX = ("nf4", "int8", "16bit")
FISHER = {"score": "fisher", "rule": "matrix_bits"}


def small(costs=(3.0, 2.0, 1.0), shapes=((64, 64), (64, 128), (128, 128)), alpha=(3.0, 5.0, 4.0)):
    """Layers and an embedding with round numbers; without bytes columns, so that they are computed."""
    rows = [
        {"name": f"model.layers.{i}.mlp.up_proj", "type": "up_proj", "depth": i, "role": "linear", "rows": r,
         "cols": c, "numel": r * c, "quantizable": True, "status": "ok"}
        for i, (r, c) in enumerate(shapes)
    ]  # fmt: skip
    embedding = rows[0] | {"name": "model.embed_tokens", "type": "embed_tokens", "depth": -1, "rows": 100}
    embedding |= {"role": "embedding", "cols": 64, "numel": 6400, "quantizable": False, "status": "listed"}
    table = pd.DataFrame([embedding, *rows])
    table["fisher_nf4"] = table["predicted_nf4"] = [np.nan, *costs]
    return table.assign(alpha_hill=[np.nan, *alpha])


# --- bytes -----------------------------------------------------------------------------------------------


def test_bytes_by_hand():
    plan = make_plan(small(), rule="top_k", value=1)  # α 5: the 64 × 128 layer
    assert plan.protected == ("model.layers.1.mlp.up_proj",)
    # NF4: half a byte a weight, 4 bytes a block of 64, 16 levels of 4 bytes, and the state as JSON.
    states = [len(json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": s}))
              for s in ([64, 64], [128, 128])]  # fmt: skip
    nf4 = sum(n // 2 + 4 * (n // 64) + 64 + state for n, state in zip((4096, 16384), states, strict=True))
    parts = {"16bit": 2 * 64 * 128, "nf4": nf4, "embeddings": 12800, "rest": 0}
    assert {part: plan.bytes[part] for part in parts} == parts
    assert plan.bytes["total"] == sum(parts.values()) + plan.bytes["header"]
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
    half = torch.zeros(int(layers["numel"].iloc[-1]) // 2, dtype=torch.float16)
    tensors |= {f"model.layers.0.norm{i}.weight": half.clone() for i in (1, 2)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    size = (tmp_path / "model.safetensors").stat().st_size
    assert plan.bytes["total"] == pytest.approx(size, rel=0.002)


# --- scores ----------------------------------------------------------------------------------------------


def test_planning_imports_no_torch():
    code = (
        "import sys, spi_utils.plan, spi_utils.curves, spi_utils.formats; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'bitsandbytes'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_additive_scores_are_nats_a_gigabyte_scaled_to_what_all_layers_cost():
    layers = layer_table(7)
    row = layers.iloc[3]  # v_proj: 192 × 576 weights; by hand 2 bytes and 4.5 bits a weight
    nf4, total = 192 * 576 * 4.5 / 8, layers["predicted_nf4"].sum() / layers["fisher_nf4"].sum()
    alone = row["fisher_nf4"] * total / (2 * 192 * 576 - nf4)
    assert score_values(layers, "fisher")[3] == pytest.approx(alone * 1e9)
    between = (row["fisher_nf4"] * total - row["fisher_int8"] * 1.1) / (192 * 576 + 2 * 192 - nf4)
    assert score_values(layers, "fisher", formats=("int8", "nf4"))[3] == pytest.approx(between * 1e9)
    for fmt in ("nf4", "int8"):
        summed = np.nansum(additive_cost(layers, "fisher", fmt))
        assert summed == pytest.approx(layers[f"predicted_{fmt}"].sum())
    raw = additive_cost(layers.drop(columns="predicted_nf4"), "fisher", "nf4")
    assert np.array_equal(raw[1:-1], layers["fisher_nf4"].to_numpy(float)[1:-1])


def test_orders_by_place_size_type_and_chance():
    layers = layer_table(28)  # four blocks
    names, depth = layers["name"].to_numpy(), layers["depth"].to_numpy()
    assert names[np.nanargmax(score_values(layers, "smallest"))].endswith("k_proj")  # first of two
    ends = score_values(layers, "first_last")
    assert set(ends[(depth == 0) | (depth == 3)]) == {1.0} and max(ends[(depth == 1) | (depth == 2)]) < 1
    values = dict(zip(names, score_values(layers, "type_prior"), strict=True))
    kinds = ("self_attn.v_proj", "mlp.down_proj", "self_attn.o_proj", "self_attn.k_proj", "mlp.gate_proj")
    ranked = [values[f"model.layers.1.{kind}"] for kind in kinds]
    assert ranked == sorted(ranked, reverse=True) and values["model.layers.0.mlp.gate_proj"] > ranked[0]
    first, again, other = (score_values(layers, "random", seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again, equal_nan=True) and not np.array_equal(first, other, equal_nan=True)


# --- rules -----------------------------------------------------------------------------------------------


def test_the_default_is_the_claim():
    large, less = make_plan(layer_table(248)), make_plan(layer_table(210))
    asked = (large.score, large.direction, large.rule, large.double_quant)
    assert asked == ("alpha_hill", "high", "claim", False)
    assert len(large.protected) == 129 and "scaled" not in large.reason
    assert len(less.protected) == round(0.52 * 210) == 109 and "round(0.52·210) = 109" in less.reason
    highest = layer_table(248).nlargest(129, "alpha_hill")["name"]
    assert set(large.protected) == set(highest)


@pytest.mark.parametrize("direction", ["high", "low"])
def test_top_k_and_threshold_agree(direction):
    layers = layer_table(70)
    by_count = make_plan(layers, rule="top_k", value=20, direction=direction)
    values = layers.set_index("name").loc[list(by_count.protected), "alpha_hill"]
    cut = values.min() if direction == "high" else values.max()
    by_cut = make_plan(layers, rule="threshold", value=cut, direction=direction)
    assert by_cut.protected == by_count.protected and by_cut.value == cut


def test_ends_ties_infinite_and_missing_scores():
    for value, count, said in ((99, 0, "That is none"), (-1, 21, "That is all of them")):
        plan = make_plan(layer_table(21), rule="threshold", value=value)
        assert len(plan.protected) == count and said in plan.reason
    first = [f"model.layers.{i}.mlp.up_proj" for i in range(3)]
    tied = make_plan(small(alpha=(2.0, 2.0, 2.0)), rule="top_k", value=2)
    assert tied.protected == tuple(first[:2])  # equal scores keep the model's order
    layers = small(alpha=(np.nan, np.inf, 4.0))
    assert make_plan(layers, rule="top_k", value=1).protected == (first[1],)
    two = make_plan(layers, rule="threshold", value=0.0)
    assert len(two.protected) == 2 and "1 layers have no alpha_hill" in two.reason
    assert len(make_plan(layers, rule="top_k", value=3).protected) == 3


def test_a_plan_says_how_much_of_the_model_it_cannot_touch():
    layers = small()
    experts = layers.iloc[[1]].assign(
        name="model.layers.0.mlp.experts.up_proj", role="experts", quantizable=False
    )
    for numel, said in ((2000, False), (9 * 35072, True)):  # of 35,072 weights beside them
        plan = make_plan(pd.concat([layers, experts.assign(numel=numel)]), rule="top_k", value=1)
        assert ("90% of the 16-bit model is never quantized: stacked experts" in plan.reason) == said


@pytest.mark.parametrize(
    ("rule", "value"), [("matrix_bits", 7.0), ("bits_per_weight", 9.0), ("budget_gb", 0.15)]
)
@pytest.mark.parametrize("score", ["fisher", "alpha_hill", "smallest", "type_prior", "random"])
def test_budgets_are_met_and_filled(rule, value, score):
    plan = make_plan(layer_table(210), score=score, rule=rule, value=value)
    rate = {"matrix_bits": plan.matrix_bits, "bits_per_weight": plan.bits_per_weight}
    assert rate.get(rule, plan.bytes["total"] / 1e9) <= value
    assert 0 <= plan.bytes["miss"] <= EQUAL * plan.bytes["total_16bit"]


def test_the_additive_budget_is_the_optimum_by_brute_force():
    rng = np.random.default_rng(3)
    shapes = [(64 * int(rng.integers(1, 6)), 64) for _ in range(6)]
    layers = small(costs=rng.random(6), shapes=shapes, alpha=rng.random(6))
    plan = make_plan(layers, **FISHER, value=8.0)
    best = np.inf
    for kept in itertools.product(("nf4", "16bit"), repeat=6):
        if bit_rates(layers, dict(zip(plan.formats, kept, strict=True)), False)[1] <= 8.0:
            best = min(best, layers["fisher_nf4"][1:][np.array(kept) == "nf4"].sum())
    assert plan.predicted_kl == pytest.approx(best)


@pytest.mark.parametrize("score", ["fisher", "alpha_hill"])
def test_the_smallest_plan_for_a_predicted_kl(score):
    layers = layer_table(70)
    plan = make_plan(layers, score=score, rule="max_kl", value=0.05)
    assert plan.predicted_kl <= 0.05
    by_bytes = make_plan(layers, score=score, rule="matrix_bits", value=plan.matrix_bits)
    assert by_bytes.predicted_kl <= 0.05 * 1.001  # the same trade seen from the other side
    assert make_plan(layers, score=score, rule="max_kl", value=0.02).bytes["total"] > plan.bytes["total"]
    assert make_plan(layers, score=score, rule="max_kl", value=99).protected == ()


# --- wishes ----------------------------------------------------------------------------------------------


def test_fused_groups_share_a_format():
    plan = make_plan(layer_table(70), **FISHER, value=7, group="fused")
    for block, leaves in itertools.product(range(10), ("[qkv]_proj", "(gate|up)_proj")):
        own = re.compile(rf"\.{block}\..*\.{leaves}$")
        assert len({fmt for name, fmt in plan.formats.items() if own.search(name)}) == 1
    assert plan.options["group"] == "fused"
    names = [f"model.layers.0.linear_attn.in_proj_{leaf}" for leaf in ("qkv", "z", "b", "a")]
    layers = small(costs=(9.0, 0.1, 0.2, 5.0), shapes=[(128, 64)] * 4, alpha=(1, 2, 3, 4))
    layers.loc[1:, "name"] = names
    plan = make_plan(layers, score="fisher", rule="top_k", value=2, group="fused")
    assert plan.protected == tuple(names[:2])  # 9.1 together against 5.2


@pytest.mark.parametrize("asked", [{"rule": "top_k", "value": 10}, {**FISHER, "value": 7}])
def test_force_and_forbid(asked):
    layers = layer_table(70)
    plan = make_plan(layers, **asked, force_16bit=r"\.0\.mlp", forbid_16bit=["k_proj$", "v_proj$"])
    assert {name for name in layers["name"] if ".0.mlp" in name} <= set(plan.protected)
    assert not [name for name in plan.protected if name.endswith(("k_proj", "v_proj"))]
    assert len(plan.protected) == 10 or asked["rule"] != "top_k"
    empty = make_plan(layers, force_16bit="", forbid_16bit=[""])  # no wish
    assert empty.formats == make_plan(layers).formats


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"score": "alpha_hil"}, "Did you mean 'alpha_hill'"),
        ({"direction": "hihg"}, "Did you mean 'high'"),
        ({"rule": "top-k", "value": 3}, "Did you mean 'top_k'"),
        ({"group": "fusd"}, "Did you mean 'fused'"),
        *(({"rule": "top_k", "value": value}, "21 layers") for value in (22, 2.5)),
        *(({"rule": "top_k", "value": value}, "needs a value") for value in (None, "12")),
        ({"rule": "claim", "value": 12}, "use rule='top_k' for 12"),
        *(({"rule": "threshold", "value": float(value)}, "finite number") for value in ("nan", "inf")),
        *(({"rule": "matrix_bits", "value": value}, "4.5000 .* in nf4 and 16.0000") for value in (4, 17)),
        ({"rule": "budget_gb", "value": 5}, r"can't be had: .* 0\.\d+ GB .* and 0\.\d+ GB"),
        ({"rule": "max_kl", "value": -1, "score": "fisher"}, "predicted at 0"),
        ({"formats": ("nf4", "int9")}, "int8"),
        ({"formats": ("nf4",)}, "at least two formats"),
        ({"formats": MIX}, "chooses between two formats"),
        ({"score": "refined"}, "refine_at"),
        ({"force_16bit": "down_prj"}, "matches none of the 21"),
        ({"force_16bit": "up_proj", "forbid_16bit": "mlp"}, "no format in common"),
        ({"force_16bit": "q_proj", "forbid_16bit": "k_proj", "group": "fused"}, "no format in common"),
        ({"rule": "top_k", "value": 2, "force_16bit": "mlp"}, "9…21"),
        ({**FISHER, "value": 4.6, "force_16bit": "mlp"}, "can't be had"),
    ],
)
def test_what_cannot_be_had_is_said(asked, said):
    with pytest.raises(PlanError, match=said):
        make_plan(layer_table(21), **asked)


def test_failed_layers_and_missing_costs_are_refused_by_name():
    layers = layer_table(14)
    with pytest.raises(PlanError, match="nothing to plan"):
        make_plan(layers.assign(quantizable=False))
    with pytest.raises(PlanError, match="holds no swan"):
        make_plan(layers.drop(columns="swan"), score="swan")
    layers.loc[3, ["status", "alpha_hill", "fisher_nf4"]] = ["failed", np.nan, np.nan]
    with pytest.raises(PlanError, match=r"failed for 1 layer\(s\).*v_proj"):
        make_plan(layers)
    with pytest.raises(PlanError, match=r"v_proj has no fisher in nf4"):
        make_plan(layers.assign(status="ok"), **FISHER, value=7)
    assert len(make_plan(layers, score="smallest").protected) == 7  # reads no spectrum


# --- the knapsack ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_small_knapsacks_are_the_optimum_by_brute_force(seed):
    rng = np.random.default_rng(seed)
    items, formats = rng.integers(1, 8), rng.integers(2, 4)
    size = rng.integers(0, 30, (items, formats)).astype(float)
    cost, allowed, rows = rng.random((items, formats)), rng.random((items, formats)) < 0.85, np.arange(items)
    allowed[:, 0] = True
    limit = np.where(allowed, size, np.inf).min(axis=1).sum() + rng.random() * 50
    choice, gap = least_cost(cost, size, limit, allowed)
    assert allowed[rows, choice].all() and size[rows, choice].sum() <= limit
    every = np.array(list(itertools.product(range(formats), repeat=items)))
    can = allowed[rows, every].all(axis=1) & (size[rows, every].sum(axis=1) <= limit)
    best, found = cost[rows, every].sum(axis=1)[can].min(), cost[rows, choice].sum()
    start = cost[rows, np.where(allowed, size, np.inf).argmin(axis=1)].sum()
    assert found <= best + GAP * max(start - best, 0) + 1e-12
    assert found - best <= gap * (start - found) + 1e-9  # what it says of itself holds


def test_a_greedy_trap_and_the_ends_of_the_range():
    # Per byte the first item is best (6/5), but it leaves room for nothing; the other two together save 10.
    cost = np.array([[6.0, 0.0], [5.0, 0.0], [5.0, 0.0]])
    size = np.array([[0.0, 5.0], [0.0, 4.5], [0.0, 4.5]])
    for limit, want in ((9.0, [0, 1, 1]), (0.0, [0, 0, 0]), (14.0, [1, 1, 1])):
        assert least_cost(cost, size, limit, cost >= 0)[0].tolist() == want
    with pytest.raises(PlanError, match="smallest possible choice takes 0"):
        least_cost(cost, size, -1.0, cost >= 0)
    assert least_cost(cost[:0], size[:0], 0.0, cost[:0] >= 0)[0].shape == (0,)
    taken = in_order(np.array([5, 6, 3, 2]), np.arange(4), 10)
    assert taken.tolist() == [True, False, True, True]  # what doesn't fit is skipped


@pytest.mark.parametrize(("formats", "share"), [(2, 0.05), (7, 0.3)])
def test_two_thousand_layers_are_fast_and_near_the_linear_bound(formats, share):
    rng, rows = np.random.default_rng(0), np.arange(2000)
    bits = np.array({2: [4.5, 16], 7: [4.127, 4.25, 4.5, 5, 6, 8.06, 16]}[formats])
    numel = rng.choice([2560 * 2560, 9216 * 2560, 1024 * 2560, 32 * 2560, 8192 * 2560], 2000)
    size = np.round(numel[:, None] * bits / 8)
    cost = np.exp(rng.normal(0, 1, 2000))[:, None] * 4.0**-bits * numel[:, None] ** 0.5
    limit = size.min(axis=1).sum() + share * (size.max(axis=1) - size.min(axis=1)).sum()
    started = time.process_time()  # the machine's other work is not this one's
    choice, gap = least_cost(cost, size, limit, cost >= 0)
    assert time.process_time() - started < 3
    assert size[rows, choice].sum() <= limit and gap <= GAP * (1 + 1e-9)
    # Any price gives a lower bound on every choice; the best of a grid is near the linear optimum's value.
    prices = cost.max() / size.min() * np.logspace(-12, 0, 1001)
    bound = max((cost + price * size).min(axis=1).sum() - price * limit for price in prices)
    saved = cost[rows, size.argmin(axis=1)].sum() - cost[rows, choice].sum()
    assert cost[rows, choice].sum() - bound <= 2e-3 * saved


def test_the_same_inputs_give_the_same_bytes_in_every_process(tmp_path):
    """A set's order differs between processes, and a sum's last digit with it."""
    code = (
        "import sys; from spi_utils.plan import make_plan; from tests.synthetic import layer_table\n"
        "for count in (28, 42, 56, 70):\n"
        "    asked = {'score': 'fisher', 'rule': 'matrix_bits', 'value': 6.5}\n"
        "    plan = make_plan(layer_table(count), **asked, formats=('int4_g64', 'nf4', 'int8', '16bit'))\n"
        "    plan.write(f'{sys.argv[1]}-{count}.json')\n"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, tmp_path / seed], env=os.environ | {"PYTHONHASHSEED": seed}
        )
        for seed in ("1", "2")
    ]
    assert [one.wait() for one in started] == [0, 0]
    for count in (28, 42, 56, 70):
        first, second = ((tmp_path / f"{seed}-{count}.json").read_bytes() for seed in ("1", "2"))
        assert first == second


# --- plan.json, and who can take a plan --------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", 14)


def by_hand(run, count=5, **wishes):
    """A plan as the explorer saves it: the first `count` layers."""
    known = {"model": run_info(run)["model"], "layers_fingerprint": layers_fingerprint(run)}
    plan = make_plan(read_layers(run), rule="top_k", value=count, origin="slider", **known, **wishes)
    plan.write(run.plan_json)
    return plan


def test_plan_json_round_trips(run):
    plan = by_hand(run, force_16bit=["up_proj"])
    assert read_plan(run) == plan
    held = json.loads(run.plan_json.read_text())
    assert set(held) == {field.name for field in dataclasses.fields(ProtectionPlan)}
    assert held["origin"] == "slider" and held["protected"] == list(plan.protected)
    make_plan(layer_table(14).drop(columns=["predicted_nf4"])).write(run.plan_json)
    assert json.loads(run.plan_json.read_text())["predicted_kl"] is None


DAMAGED = {  # what is said: what is changed in a good plan.json; None takes the entry out
    "score": {"score": 5},
    "formats": {"formats": None},
    "can't be read": {"formats": ["nf4"]},
    "bytes": {"bytes": []},
    "matrix_bits": {"matrix_bits": "4.5"},
    "protected": {"protected": "all"},
    "schema 2": {"schema": 2},
    "formatz": {"formatz": {}},
    "no format nf5": {"formats": {"model.layers.0.mlp.up_proj": "nf5"}},
    "unhashable": {"formats": {"model.layers.0.mlp.up_proj": ["nf4"]}},
    r"another layers\.csv": {"layers_fingerprint": "0" * 64},
    r"for other \(weights ffffffffffff\), not for synthetic/model \(weights 0000": {
        "model": {"id": "other", "sha256": "f" * 64}
    },
}


def test_a_damaged_plan_is_refused_by_name_and_made_again_as_advised(run):
    plan = decide(run, rule="top_k", value=3)
    good = json.loads(run.plan_json.read_text())
    texts = [("plan", text) for text in ("", "[]", '{"schema": 1}', json.dumps(good)[:200])]
    for said, change in DAMAGED.items():
        gone = [name for name, value in change.items() if value is None]
        held = {name: value for name, value in (good | change).items() if name not in gone}
        texts.append((said, json.dumps(held)))
    for said, text in texts:
        run.plan_json.write_text(text)
        with pytest.raises(SPIError, match=said) as refused:
            read_plan(run)
        assert str(run.plan_json) in str(refused.value)
        assert "02_visualize again with force=True" in str(refused.value), text
    assert decide(run, rule="top_k", value=3, force=True) == read_plan(run) == plan
    run.plan_json.unlink()
    with pytest.raises(SPIError, match="Run notebook 02_visualize first"):
        read_plan(run)


def test_unknown_modules_and_writers_are_refused():
    layers = layer_table(14)
    plan = make_plan(layers)
    check_plan(plan, layers["name"])
    renamed = [name.replace("model.", "model.language_model.") for name in layers["name"]]
    with pytest.raises(PlanError, match=r"14 of the plan's 14 modules .*Did you mean 'model\.language_model"):
        check_plan(plan, renamed)
    check_writer(plan, "bitsandbytes")
    mixed = make_plan(layers, **FISHER, value=6, formats=MIX)
    with pytest.raises(PlanError, match=r"can't hold int8, which the plan gives to \d+ layers"):
        check_writer(mixed, "bitsandbytes")
    assert plan.writers >= {"bitsandbytes"} and "bitsandbytes" not in mixed.writers
    # What decides the checkpoint decides the fingerprint, and nothing else.
    assert plan.fingerprint == make_plan(layers, origin="slider").fingerprint
    others = [{"double_quant": True}, {"direction": "low"}]
    assert len({plan.fingerprint, *(make_plan(layers, **one).fingerprint for one in others)}) == 3


# --- the run's plan --------------------------------------------------------------------------------------


def test_a_plan_saved_by_hand_stays_until_forced(run, capsys):
    by_hand(run)
    assert len(decide(run).protected) == 5
    assert "Kept the plan saved from the explorer (5 layers)" in capsys.readouterr().out
    assert decide(run, rule="top_k", value=5).origin == "slider"
    made = decide(run, rule="top_k", value=9, force=True)
    assert set(made.protected) == set(layer_table(14).nlargest(9, "alpha_hill")["name"])
    assert read_plan(run) == made and made.origin == "parameters"
    assert len(decide(run, rule="top_k", value=3).protected) == 3
    by_hand(run)
    layers = read_layers(run)
    layers["alpha_hill"] += 1e-6
    layers.to_csv(run.layers_csv, index=False)
    with pytest.raises(PlanError, match=r"another layers\.csv"):
        read_plan(run)
    assert decide(run).origin == "parameters"  # a plan for another layer table is made anew


@pytest.mark.parametrize("asked", [{"score": "fisher"}, {"forbid_16bit": "up_proj"}])
def test_a_plan_saved_by_hand_does_not_answer_for_another_choice(run, asked):
    by_hand(run)
    saved = run.plan_json.read_bytes()
    with pytest.raises(PlanError, match=f"{next(iter(asked))}=.*02_visualize with force=True"):
        decide(run, **asked)
    assert run.plan_json.read_bytes() == saved
    assert decide(run, **asked, force=True).origin == "parameters"
    wishes = {name: value for name, value in asked.items() if "16bit" in name}
    by_hand(run, 7, **wishes)
    defaults = {"score": "alpha_hill", "direction": "high", "rule": "claim", "value": None, "seed": 0}
    empty = {"force_16bit": [], "forbid_16bit": [], "double_quant": False, "group": None, "formats": ()}
    assert decide(run, **defaults, **empty).origin == "slider"  # as the notebook calls it
    assert decide(run, **wishes).origin == "slider"
