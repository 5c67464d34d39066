"""Intervals, verdicts and corrections, against scipy, simulations with known truth, and sums done by hand."""

import math

import numpy as np
import pytest
import scipy.stats

from spi_utils import stats
from spi_utils.errors import EvaluationError

QUICK, FULL = 24, 96  # window counts of the two profiles
SIMULATIONS = 3000


def window_means(kind, clusters, simulations, seed=1):
    """Simulated differences with true mean 0: (clusters, simulations)."""
    rng = np.random.default_rng(seed)
    size = (clusters, simulations)
    return {
        "normal": lambda: rng.normal(size=size),
        "heavy": lambda: rng.standard_t(5, size=size),
        "skewed": lambda: rng.gamma(2, size=size) - 2,
        # Tokens share their window's effect: 32 tokens a window, intra-window correlation 0.5.
        "windows": lambda: rng.normal(size=size) + rng.laplace(size=(32, *size)).mean(axis=0) / math.sqrt(2),
    }[kind]()


@pytest.mark.parametrize("clusters", [QUICK, FULL])
@pytest.mark.parametrize("kind", ["normal", "heavy", "skewed", "windows"])
def test_intervals_cover_the_truth_at_the_profiles_window_counts(kind, clusters):
    all_estimates = stats.estimates(window_means(kind, clusters, SIMULATIONS), draws=2000)
    covered = np.mean([one.low <= 0 <= one.high for one in all_estimates])
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize("clusters", [QUICK, FULL])
def test_under_the_null_about_five_per_cent_are_called_different(clusters):
    null = stats.estimates(window_means("normal", clusters, SIMULATIONS), draws=2000)
    by_p = np.mean([one.p < 0.05 for one in null])
    by_verdict = np.mean([stats.verdict(one, "lower") != "not separable" for one in null])
    assert 0.035 <= by_p <= 0.065
    assert 0.035 <= by_verdict <= 0.065


def test_the_studentized_interval_beats_the_percentile_one_on_few_skewed_windows():
    values = window_means("skewed", QUICK, SIMULATIONS)
    means = stats.draw_counts(QUICK, 2000) @ values / QUICK
    low, high = np.quantile(means, (0.025, 0.975), axis=0)
    percentile = np.mean((low <= 0) & (high >= 0))
    ours = np.mean([one.low <= 0 <= one.high for one in stats.estimates(values, draws=2000)])
    assert percentile < 0.93 < ours


def test_familywise_error_under_holm():
    """11 variants without any effect: at least one false verdict in about 5 % of runs, not 43 %."""
    runs, variants = 400, 11
    values = window_means("normal", QUICK, runs * variants, seed=3)
    p = np.array([one.p for one in stats.estimates(values, draws=4000)]).reshape(runs, variants)
    assert np.mean([(stats.holm(row) < 0.05).any() for row in p]) < 0.09
    assert np.mean((p < 0.05).any(axis=1)) > 0.3


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

    plain = scipy.stats.bootstrap((values,), np.mean, n_resamples=40_000, rng=np.random.default_rng(0))
    drawn = stats.draw_counts(30, 40_000) @ values / 30
    assert drawn.std() == pytest.approx(plain.standard_error, rel=0.02)


def test_cluster_robust_error_equals_the_sandwich_of_a_regression_on_tokens():
    """se² = C/(C−1) · Σ_c (Σ_t residual)² / N², the textbook's cluster sandwich for a mean."""
    tokens = np.random.default_rng(2).normal(size=(24, 255)) + np.random.default_rng(3).normal(size=(24, 1))
    residual_sums = (tokens - tokens.mean()).sum(axis=1)
    sandwich = math.sqrt(24 / 23 * (residual_sums**2).sum()) / tokens.size
    assert stats.cluster_se(tokens.mean(axis=1)) == pytest.approx(sandwich, rel=1e-12)
    assert sandwich > 5 * tokens.std() / math.sqrt(
        tokens.size
    )  # the token-level error would be far too small


def test_one_draw_by_hand():
    values = np.array([[1.0], [2.0], [6.0]])
    counts = np.array([[2, 1, 0]])  # the sample 1, 1, 2: mean 4/3, sd 1/√3, se 1/3
    assert stats.studentized(values, counts)[0, 0] == pytest.approx((4 / 3 - 3) / (1 / 3))


def test_wide_normal_samples_give_the_normal_interval():
    values = np.random.default_rng(0).normal(3, 2, size=1000)
    one = stats.estimate(values)
    assert one.se == pytest.approx(2 / math.sqrt(1000), rel=0.05)
    assert (one.high - one.low) / (2 * 1.96 * one.se) == pytest.approx(1, abs=0.04)
    assert one.p <= 2 / stats.DRAWS


def test_the_same_seed_gives_the_same_numbers_and_columns_do_not_interact():
    values = np.random.default_rng(0).normal(size=(24, 3))
    together = stats.estimates(values)
    assert together == stats.estimates(values)
    alone = stats.estimate(values[:, 1])
    assert (together[1].low, together[1].high) == pytest.approx((alone.low, alone.high), rel=1e-12)


def test_no_difference_at_all():
    same = stats.paired(np.ones(24), np.ones(24))
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert stats.verdict(same, "lower") == "not separable"


def test_a_constant_difference_is_certain():
    shifted = stats.estimate(np.full(24, -0.5))
    assert (shifted.low, shifted.high) == (-0.5, -0.5)
    assert stats.verdict(shifted, "lower") == "supported"


def test_one_window_says_nothing():
    one = stats.estimate(np.array([3.0]))
    assert (one.low, one.high, one.p) == (-math.inf, math.inf, 1.0)
    assert stats.Estimate.from_dict(one.as_dict()) == one
    assert one.as_dict()["low"] is None


def test_holm_by_hand():
    assert stats.holm(np.array([0.01, 0.04, 0.03])) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm(np.array([0.6, 0.5])) == pytest.approx([1.0, 1.0])


def test_perplexity_ratio_exponentiates_the_ends():
    one = stats.Estimate(-0.145, 0.01, -0.165, -0.125, 0.0, 96)
    assert stats.ratio(one) == pytest.approx((0.8650, 0.8479, 0.8825), abs=1e-4)


@pytest.mark.parametrize(
    ("low", "high", "claim", "than", "expected"),
    [
        (-0.2, -0.1, "lower", 0.0, "supported"),
        (-0.2, -0.1, "higher", 0.0, "refuted"),
        (-0.2, 0.1, "lower", 0.0, "not separable"),
        (-0.2, -0.1, "lower", -0.3, "refuted"),
        (0.4, 0.5, "higher", 0.3, "supported"),
    ],
)
def test_verdicts_come_from_the_interval(low, high, claim, than, expected):
    one = stats.Estimate((low + high) / 2, 0.05, low, high, 0.001, 24)
    assert stats.verdict(one, claim, than=than) == expected


def test_few_windows_or_a_family_withhold_the_verdict():
    few = stats.Estimate(-1.0, 0.1, -1.2, -0.8, 0.001, 11)
    assert stats.verdict(few, "lower") == "not separable"
    corrected = stats.Estimate(-1.0, 0.4, -1.9, -0.1, 0.03, 24, p_holm=0.2)
    assert stats.verdict(corrected, "lower") == "not separable"
    with pytest.raises(ValueError, match="better"):
        stats.verdict(few, "better")


def test_holm_family_keeps_the_estimates_and_orders_the_p_values():
    values = np.random.default_rng(0).normal([0.0, 3.0], 1, size=(24, 2))
    family = stats.holm_family(dict(zip("ab", stats.estimates(values), strict=True)))
    assert family["b"].p_holm == pytest.approx(2 * family["b"].p)
    assert family["a"].p_holm == pytest.approx(family["a"].p)


def test_a_gain_that_five_windows_carry_is_shown_as_such():
    difference = np.concatenate([np.full(5, -6.0), np.full(251, 0.01)])
    found = stats.effect_windows(difference)
    assert found["median_window"] == pytest.approx(0.01)
    assert found["share_improved"] == pytest.approx(5 / 256)
    assert set(found["carriers"]) < {0, 1, 2, 3, 4}
    assert found["flip_after"] == 5


def test_an_effect_that_every_window_shares_never_flips():
    found = stats.effect_windows(np.full(10, 0.2))
    assert found["flip_after"] == 10
    assert found["carriers"] == [0, 1, 2, 3, 4]


def test_refuses_values_that_are_not_finite_or_not_paired():
    with pytest.raises(EvaluationError, match="window 1 of column 0"):
        stats.estimate(np.array([1.0, np.nan, 2.0]))
    with pytest.raises(EvaluationError, match="same windows"):
        stats.paired(np.ones(3), np.ones(4))
