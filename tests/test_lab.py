"""The lab's experiments: synthetic ones against closed forms, trained ones on very small networks."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats

from spi_utils.errors import AnalysisError, EvaluationError
from spi_utils.formats import NF4_LEVELS
from spi_utils.lab import experiment, figures, numeric, summary, tables, training
from spi_utils.lab.experiment import Judge, rounded
from spi_utils.lab.training import NUCLEAR, STANDARD, Arm, Recipe, Shape, load_corpus, make_network, train

TINY = experiment.Setting(
    Recipe(levels=(4.2, 4.0), batch=4, warmup=5, every=5, limit=60), Shape(16, 1, 2, 16), 8, 8
)


FROBENIUS = Arm("frobenius", "Frobenius norm", "control", penalty="frobenius", coefficient=1e-3)


@pytest.fixture(scope="module")
def corpus():
    return load_corpus(16, 8, 8)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Three seeds of four arms, and where they are kept."""
    folder = tmp_path_factory.mktemp("lab")
    chosen = [STANDARD, NUCLEAR, training.trace_arm(1e-3), FROBENIUS]
    return experiment.run_all(chosen, range(3), TINY, folder, workers=1), folder, chosen


# --- synthetic -------------------------------------------------------------------------------------------


def test_the_stated_shares_arise_together_under_two_denominators():
    grid = numeric.quantizer_grid()
    found = numeric.stated_shares(grid)
    both = found[found["both"]]
    assert len(both) and (both["36.0 %"] == "n").all() and (both["63.6 %"] == "held").all()
    one = both.iloc[0]
    assert (one["flat"], one["compact"], one["flat/n"], one["compact/held"]) == (36, 7, 0.36, 7 / 11)
    query = "bits == 2 and scaling == 'largest value' and steps == '2^b − 1' and count == 'not zero'"
    row = grid.query(query + " and among == 'all'").iloc[0]
    assert row["flat"] == sum(k**-0.5 * 3 >= 0.5 for k in range(1, 101)) == 36
    assert row["compact"] == sum(math.exp(-0.2 * (k - 1)) * 3 >= 0.5 for k in range(1, 101))


@pytest.mark.parametrize("bases", numeric.BASES[1:])
def test_products_keep_the_determinant_and_the_norm_of_plain_float64(bases):
    sigma = numeric.spectra(12)["flat"]
    logs = numeric.product_logs(sigma, bases, 30, seed=1)
    assert np.allclose(logs.sum(axis=1), np.arange(1, 31) * np.log(sigma).sum())
    product = np.eye(12)
    for _, matrix in zip(range(30), numeric.layers(sigma, bases, 1), strict=False):
        assert np.allclose(np.linalg.svd(matrix, compute_uv=False), sigma)
        product = matrix @ product
    assert logs[-1, 0] == pytest.approx(math.log(np.linalg.norm(product, 2)), abs=2.5)


def test_float32_meets_its_floor_where_arithmetic_says():
    sigma = numeric.spectra()["compact"]
    logs = numeric.product_logs(sigma, "diagonal", 7, 0)
    assert np.allclose(logs[-1], np.log(sigma**7)) and logs.shape == (7, 100)
    first = math.ceil(math.log(numeric.FLOOR) / -0.2)  # e^(-0.2 t) below the smallest normal number
    assert numeric.float32_outcome(sigma, "diagonal", 600, 0, -50.0) == f"floor at {first}"
    assert numeric.float32_outcome(sigma / sigma[0], "diagonal", 50, 0, 0.0) == "stays"
    assert numeric.float32_outcome(2 * sigma / sigma[0], "diagonal", 200, 0, 60.0) == "overflow at 128"
    table, curves = numeric.depth_table(12, n=8)
    assert len(table) == 2 * len(numeric.BASES) * len(numeric.NORMALISATIONS) and len(curves) == 6
    spectral = table[(table["normalisation"] == "spectral: σ₁ = 1") & (table["bases"] == "diagonal")]
    assert np.allclose(spectral["log10_norm"], 0) and (spectral["float32"] == "stays").all()


# --- damage ----------------------------------------------------------------------------------------------


def test_integer_formats_round_to_their_levels_by_hand():
    weight = torch.zeros(2, 64)
    weight[0, :5] = torch.tensor([0.7, -0.34, 0.06, 0.04, -0.7])
    weight[1, :3] = torch.tensor([3.0, 1.4, -1.6])
    four, three = rounded(weight, "int4"), rounded(weight, "int3")
    assert four[0, :5].tolist() == pytest.approx([0.7, -0.3, 0.1, 0.0, -0.7])
    assert three[1, :3].tolist() == pytest.approx([3.0, 1.0, -2.0])
    assert not four[:, 5:].any()


@pytest.mark.parametrize("shape", [(64, 64), (96, 96), (10, 30)])
def test_nf4_is_the_nearest_level_of_each_block_also_at_odd_widths(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half().float()
    levels, flat = torch.tensor(NF4_LEVELS), weight.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    peak = blocks.abs().amax(1, keepdim=True)
    nearest = levels[(blocks / peak).unsqueeze(-1).sub(levels).abs().argmin(-1)] * peak
    assert torch.allclose(rounded(weight, "nf4"), nearest.flatten()[: len(flat)].view(shape), atol=1e-6)


def test_kl_and_loss_are_those_of_the_definitions_and_weights_come_back(corpus):
    network = make_network(STANDARD, TINY.shape, corpus.symbols, torch.Generator().manual_seed(0))
    judge = Judge(network.requires_grad_(False), corpus.judge)
    before = {name: layer.weight.clone() for name, layer in judge.layers.items()}
    assert judge.damage(lambda weight: weight) == {"kl": 0.0, "dloss": 0.0}
    assert 0 < judge.damage("int4")["kl"] < judge.damage("int3")["kl"]
    found = judge.damage(lambda weight: 1.1 * weight)
    assert all(torch.equal(layer.weight, before[name]) for name, layer in judge.layers.items())
    inputs, wanted = corpus.judge[:, :-1], corpus.judge[:, 1:]
    one = judge.network(inputs).double()
    for layer in judge.layers.values():
        layer.weight.mul_(1.1)
    two = judge.network(inputs).double()
    p, q = torch.softmax(one, -1), torch.softmax(two, -1)
    assert found["kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    loss = [torch.nn.functional.cross_entropy(x.flatten(0, 1), wanted.flatten()) for x in (one, two)]
    assert found["dloss"] == pytest.approx(float(loss[1] - loss[0]), abs=1e-6)


# --- training --------------------------------------------------------------------------------------------


def test_levels_are_met_and_the_seed_decides(corpus):
    one, again, other = (list(train(STANDARD, s, TINY.recipe, TINY.shape, corpus)) for s in (0, 0, 1))
    assert [level for level, _, _ in one] == [None, 4.2, 4.0]
    losses = [float(training.token_losses(network, corpus.level)[1].mean()) for _, _, network in one[1:]]
    assert losses == pytest.approx([4.2, 4.0], abs=0.01)
    states = [met[-1][2].state_dict() for met in (one, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])
    assert all(torch.equal(value, value.half().float()) for value in states[0].values())


def test_arms_start_from_what_they_are_named_after(corpus):
    nuclear = make_network(NUCLEAR, TINY.shape, corpus.symbols, torch.Generator().manual_seed(0))
    for layer in nuclear.matrices().values():
        sigma = np.linalg.svd(layer.weight.detach().numpy(), compute_uv=False)
        assert sigma[1] / sigma[0] == pytest.approx(math.exp(-training.DECAY), rel=1e-3)
    *_, (_, _, final) = train(
        Arm("low_rank", "low rank", rank=3), 0, Recipe(levels=(4.2,), batch=4), TINY.shape, corpus
    )
    for layer in final.matrices().values():
        sigma = np.linalg.svd(layer.weight.numpy(), compute_uv=False)
        assert sigma[3] < 1e-2 * sigma[0]  # rounding to float16 leaves crumbs


@pytest.mark.parametrize(
    ("penalty", "norm"),
    [("trace", lambda s: s.sum()), ("spectral", lambda s: s[0] ** 2), ("frobenius", lambda s: (s**2).sum())],
)
def test_penalties_are_the_norms_of_numpy(penalty, norm, corpus):
    generator = torch.Generator().manual_seed(0)
    arm = Arm("x", "x", penalty=penalty, coefficient=0.5)
    network = make_network(arm, TINY.shape, corpus.symbols, generator)
    found = training.make_penalty(arm, network, generator)
    for _ in range(300):  # power iteration
        value = float(found().detach())
    weights = [layer.weight.detach().numpy() for layer in network.matrices().values()]
    assert value == pytest.approx(0.5 * sum(norm(np.linalg.svd(w)[1]) for w in weights), rel=1e-3)


def test_bad_levels_and_texts_are_refused():
    with pytest.raises(AnalysisError, match="falling order"):
        Recipe(levels=(2.0, 2.1))
    with pytest.raises(EvaluationError, match="asked for"):
        load_corpus(64, 4000, 4000)


# --- runs, numbers, answers ------------------------------------------------------------------------------


def test_finished_runs_are_read_and_do_not_depend_on_the_company(results):
    runs, folder, chosen = results
    assert len(runs) == 12 and all(run["reached"] for run in runs)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    alone = experiment.run_all(chosen[1:2], [2], TINY, folder, workers=1)
    assert alone == [run for run in runs if run["seed"] == 2 and run["arm"]["name"] == "nuclear"]
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    final = alone[0]["final"]
    whole = alone[0]["levels"][-1]["damage"]["int3"]["kl"]
    assert all(0 <= final["plans"][key] < whole for key in ("high", "low", "flat", "compact", "random"))
    missed = experiment.Setting(Recipe(levels=(4.2, 0.1), batch=2, warmup=1, limit=20), TINY.shape, 8, 8)
    result = experiment.run_arm(STANDARD, 0, missed)
    assert not result["reached"] and "final" not in result


def test_student_intervals_are_scipys():
    values = [0.3, 0.1, 0.4, 0.15, 0.22]
    found, known = summary.t_estimate(values), scipy_stats.ttest_1samp(values, 0)
    wanted = known.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    assert found.p == pytest.approx(known.pvalue) and summary.t_estimate([1.0]).low == -math.inf


def test_the_summary_pairs_by_seed_and_becomes_tables_figures_and_answers(results):
    runs, _, _ = results
    found = summary.summarize(runs, "trace_0.001")
    assert json.loads(json.dumps(found)) == found
    row = next(arm for arm in found["arms"] if arm["name"] == "trace_0.001")
    kl = {(r["arm"]["name"], r["seed"]): r["levels"][-1]["damage"]["nf4"]["kl"] for r in runs}
    wanted = np.mean([math.log(kl["trace_0.001", s] / kl["standard", s]) for s in range(3)])
    assert row["damage_ratio"]["nf4"]["mean"] == pytest.approx(wanted, rel=1e-3)
    assert row["reached"] == 3 and row["damage_ratio"]["nf4"]["p_holm"] is not None
    assert set(found["matched"]) == {"frobenius"}
    assert len(tables.arm_frame(found)) == 4 and len(tables.plan_frame(found)) == 5
    assert len(tables.correlation_frame(found)) == 10 and len(tables.matched_frame(found)) == 1
    depth, curves = numeric.depth_table(20)
    for figure in (
        figures.damage_against_compactness(found),
        figures.depth_collapse(depth, curves),
    ):
        figure.canvas.draw()
        assert any(character.isdigit() for character in figure.get_suptitle())
    table = tables.closing_table(found, numeric.mass_table(), numeric.quantizer_grid(), depth)
    assert set(table["verdict"]) <= {"supported", "refuted", "not separable"} and len(table) == 8
    assert table["verdict"][0] == "supported" and "83 → 12" in table["reproduced"][0]
    assert "36 of 100 and 7 of 11" in table["reproduced"][1]


def estimate(low, high, **more):
    return {"mean": (low + high) / 2, "low": low, "high": high, "clusters": 5, **more}


@pytest.mark.parametrize(
    ("one", "wanted"),
    [
        (estimate(0.1, 0.3), 1),
        (estimate(-0.3, -0.1), -1),
        (estimate(-0.1, 0.1), 0),
        (estimate(0.1, 0.3, clusters=2), 0),
        (estimate(0.1, 0.3, p_holm=0.2), 0),
        (estimate(0.1, 0.3, p_holm=0.01), 1),
        (estimate(0.1, 0.3) | {"high": None}, 0),
        (None, 0),
    ],
)
def test_an_effect_counts_where_its_interval_says_so(one, wanted):
    assert tables.sign(one) == wanted


@pytest.mark.parametrize(
    ("damages", "control", "rank", "wanted"),
    [
        ([(-0.4, -0.2), (-0.3, -0.1)], (-0.2, -0.1), (-0.5, -0.3), "supported"),
        ([(-0.4, -0.2), (-0.3, -0.1)], (-0.2, 0.1), (-0.5, -0.3), "not separable"),
        ([(-0.4, -0.2), (-0.3, -0.1)], (0.1, 0.2), (-0.5, -0.3), "refuted"),
        ([(-0.4, -0.2), (0.1, 0.3)], (-0.2, -0.1), (-0.5, -0.3), "refuted"),
        # a more compact control that suffers more refutes the cause
        ([(-0.4, -0.2)], (-0.3, -0.1), (0.1, 0.2), "refuted"),
        ([(-0.4, -0.2)], (-0.3, -0.1), (-0.1, 0.2), "not separable"),
    ],
)
def test_causes_needs_every_compact_arm_and_more_than_a_smaller_norm(damages, control, rank, wanted):
    rows = [
        {"label": f"a{i}", "reached": 5, "compactness_ratio": estimate(-0.5, -0.3),
         "damage_ratio": {"nf4": estimate(*ends)}}
        for i, ends in enumerate(damages)
    ]  # fmt: skip
    matched = {"frobenius": {"compactness": estimate(*rank), "nf4": estimate(*control)}}
    assert tables.causes({"arms": rows, "matched": matched})[1] == wanted


@pytest.mark.parametrize(
    ("second", "wanted"),
    [((-0.8, -0.1), "supported"), ((0.2, 0.9), "refuted"), ((-0.2, 0.9), "not separable")],
)
def test_alpha_predicts_through_training_only_with_one_sign(second, wanted):
    given = {"alpha_through_training": {"a": estimate(-0.9, -0.5), "b": estimate(*second)}}
    assert tables.predicts_training(given)[1] == wanted
