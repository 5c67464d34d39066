"""Intervals, verdicts and corrections, against scipy, simulations with known truth, and sums done by hand."""

import math

import numpy as np
import pytest
import scipy.stats

from spi_utils import stats

QUICK, FULL = 24, 96  # window counts of the two profiles


def window_means(kind, clusters, simulations=2000, seed=1):
    """Simulated differences with true mean 0: (clusters, simulations)."""
    rng, size = np.random.default_rng(seed), (clusters, simulations)
    if kind == "windows":  # 32 tokens a window that share its effect, intra-window correlation 0.5
        return rng.normal(size=size) + rng.laplace(size=(32, *size)).mean(axis=0) / math.sqrt(2)
    return {"normal": rng.normal, "heavy": lambda size: rng.standard_t(5, size)}.get(
        kind, lambda size: rng.gamma(2, size=size) - 2
    )(size=size)


@pytest.mark.parametrize("clusters", [QUICK, FULL])
@pytest.mark.parametrize("kind", ["normal", "heavy", "skewed", "windows"])
def test_intervals_cover_the_truth_and_5_per_cent_are_called_different(kind, clusters):
    values = window_means(kind, clusters)
    found = stats.estimates(values, draws=1000)
    covered = np.mean([one.low <= 0 <= one.high for one in found])
    assert 0.925 <= covered <= 0.97
    assert np.mean([stats.verdict(one, "lower") == "not separable" for one in found]) == covered
    assert np.mean([one.p < 0.05 for one in found]) == pytest.approx(1 - covered, abs=0.01)
    if (kind, clusters) == ("skewed", QUICK):  # the percentile bootstrap covers less
        means = stats.draw_counts(QUICK, 1000) @ values / QUICK
        low, high = np.quantile(means, (0.025, 0.975), axis=0)
        assert np.mean((low <= 0) & (high >= 0)) < 0.925


def test_agrees_with_scipys_bootstrap():
    values = np.random.default_rng(5).gamma(2, size=30)
    mean, se = values.mean(), values.std(ddof=1) / math.sqrt(30)

    def t_star(sample, axis):
        return (sample.mean(axis) - mean) / (sample.std(axis, ddof=1) / math.sqrt(30))

    scipys = scipy.stats.bootstrap((values,), t_star, n_resamples=40_000, rng=np.random.default_rng(0))
    q_low, q_high = np.quantile(scipys.bootstrap_distribution, (0.025, 0.975))
    ours = stats.estimate(values, draws=40_000)
    assert ours.low == pytest.approx(mean - q_high * se, abs=0.05 * se)
    assert ours.high == pytest.approx(mean - q_low * se, abs=0.1 * se)


def test_the_error_is_the_sandwich_of_a_regression_on_tokens():
    """se² = C/(C−1) · Σ_c (Σ_t residual)² / N², the textbook's cluster sandwich for a mean."""
    tokens = np.random.default_rng(2).normal(size=(24, 255)) + np.random.default_rng(3).normal(size=(24, 1))
    residual_sums = (tokens - tokens.mean()).sum(axis=1)
    sandwich = math.sqrt(24 / 23 * (residual_sums**2).sum()) / tokens.size
    assert stats.cluster_se(tokens.mean(axis=1)) == pytest.approx(sandwich, rel=1e-12)
    assert sandwich > 5 * tokens.std() / math.sqrt(tokens.size)  # the token-level error is far too small


def test_one_draw_by_hand():
    values, counts = np.array([[1.0], [2.0], [6.0]]), np.array([[2, 1, 0]])
    # the sample 1, 1, 2: mean 4/3, sd 1/√3, se 1/3
    assert stats.studentized(values, counts)[0, 0] == pytest.approx((4 / 3 - 3) / (1 / 3))


def test_windows_that_all_agree_and_a_single_one():
    same, shifted = stats.paired(np.ones(24), np.ones(24)), stats.estimate(np.full(24, -0.5))
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert (shifted.low, shifted.high, shifted.p) == (-0.5, -0.5, 0)
    assert [stats.verdict(one, "lower") for one in (same, shifted)] == ["not separable", "supported"]
    one = stats.estimate(np.array([3.0]))
    assert (one.low, one.high, one.p) == (-math.inf, math.inf, 1.0)
    assert stats.Estimate.from_dict(one.as_dict()) == one and one.as_dict()["low"] is None


def test_holm_by_hand_and_over_a_family():
    assert stats.holm(np.array([0.01, 0.04, 0.03])) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm(np.array([0.6, 0.5])) == pytest.approx([1.0, 1.0])
    values = np.random.default_rng(0).normal([0.0, 3.0], 1, size=(24, 2))
    family = stats.holm_family(dict(zip("ab", stats.estimates(values), strict=True)))
    assert [family["b"].p_holm / family["b"].p, family["a"].p_holm / family["a"].p] == pytest.approx([2, 1])


@pytest.mark.parametrize(
    ("low", "high", "claim", "windows", "p_holm", "expected"),
    [
        (-0.2, -0.1, "lower", 24, None, "supported"),
        (-0.2, -0.1, "higher", 24, None, "refuted"),
        (0.1, 0.2, "lower", 24, 0.04, "refuted"),
        (0.1, 0.2, "higher", 24, 0.04, "supported"),
        (-0.2, 0.1, "lower", 24, None, "not separable"),
        (-0.2, -0.1, "lower", 11, None, "not separable"),
        (-0.2, -0.1, "lower", 24, 0.2, "not separable"),
    ],
)
def test_verdicts_come_from_interval_windows_and_family(low, high, claim, windows, p_holm, expected):
    one = stats.Estimate((low + high) / 2, 0.05, low, high, 0.001, windows, p_holm)
    assert stats.verdict(one, claim) == expected


def test_the_windows_behind_an_effect():
    few = stats.effect_windows(np.concatenate([np.full(5, -6.0), np.full(251, 0.01)]))
    assert (few["median_window"], few["share_improved"]) == pytest.approx((0.01, 5 / 256))
    assert set(few["carriers"]) < {0, 1, 2, 3, 4} and few["flip_after"] == 5
    shared = stats.effect_windows(np.full(10, 0.2))
    assert shared["carriers"] == [0, 1, 2, 3, 4] and shared["flip_after"] == 10  # never
