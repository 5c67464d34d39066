"""Spectra against closed forms, scipy and brute force."""

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import scipy.stats
import torch

from spi_utils import spectra as decomposition
from spi_utils.errors import AnalysisError
from spi_utils.spectra import (
    COLUMNS,
    alphaq,
    analyze_matrix,
    block_eigenvalues,
    choose_blocks,
    decay_alpha,
    decompose,
    fit_power_law,
    gaussian_hill,
    hill_alpha,
    swan,
)


def with_singular_values(sigma: np.ndarray, rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((rows, len(sigma))))[0]
    right = np.linalg.qr(rng.standard_normal((cols, len(sigma))))[0]
    return torch.from_numpy((left * sigma) @ right.T)


def gaussian(rows: int, cols: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, cols))).to(dtype)


def brute_force_fit(values: np.ndarray, min_tail: int = 0) -> tuple[float, float, float]:
    """Clauset's fit by the definition: every start, every distance. (alpha, xmin, ks)"""
    x, fits = np.sort(values), []
    for i in range(len(x) - 1):
        tail = x[i:]
        if len(tail) < min_tail or tail[-1] == tail[0]:
            continue
        alpha = 1 + len(tail) / np.log(tail / tail[0]).sum()
        distance = np.abs(1 - (tail / tail[0]) ** (1 - alpha) - np.arange(len(tail)) / len(tail)).max()
        fits.append((distance, alpha, tail[0]))
    distance, alpha, xmin = min(fits, key=lambda fit: fit[0])
    return alpha, xmin, distance


# --- the decomposition -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64), (1, 7), (7, 1), (1, 1)])
@pytest.mark.parametrize("entries, offset", [(1 << 23, 0.5), (500, 1e3)])
def test_singular_values_equal_a_float64_svd(shape, entries, offset, monkeypatch):
    monkeypatch.setattr(decomposition, "GRAM_ENTRIES", entries)  # 500: many slices, the last one ragged
    weight = gaussian(*shape) + offset
    sigma, moments = decompose(weight)
    # a Gram matrix resolves σ down to about 1e-8 of the largest
    np.testing.assert_allclose(sigma, scipy.linalg.svdvals(weight.numpy()), rtol=1e-10, atol=1e-8 * sigma[0])
    flat = weight.numpy().ravel()
    assert moments.mean == pytest.approx(flat.mean(), rel=1e-12)
    assert moments.variance == pytest.approx(flat.var(), rel=1e-9, abs=1e-9)
    assert moments.span == pytest.approx(np.ptp(flat), rel=1e-12)
    if flat.size > 1:
        assert moments.kurtosis == pytest.approx(scipy.stats.kurtosis(flat), rel=1e-6)


def test_float32_is_close_to_float64():
    weight = gaussian(300, 500, dtype=torch.float16)
    exact, fast = (analyze_matrix(weight, precision=p).statistics for p in ("float64", "float32"))
    for column in ("alpha_hill", "alpha_decay", "effective_rank", "stable_rank", "alpha_farms", "kurtosis"):
        assert fast[column] == pytest.approx(exact[column], rel=1e-3), column


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_the_device_path_gives_the_host_numbers(precision):
    """The CUDA path is plain torch: on CPU tensors it must agree with the other one."""
    weight = gaussian(130, 70, dtype=torch.float16) + 0.1
    values, moments = decomposition._device_eigenvalues(weight, precision)
    expected, same = decomposition._host_eigenvalues(weight, precision)
    np.testing.assert_allclose(values, expected, rtol=1e-3 if precision == "float32" else 1e-10)
    for name in ("mean", "variance", "kurtosis", "span"):
        assert getattr(moments, name) == pytest.approx(getattr(same, name), rel=1e-3), name


# --- the power-law fit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["gaussian", "pareto", "lognormal", "ties"])
def test_fit_finds_the_best_of_all_starts(kind, seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(25, 400))
    values = {
        "gaussian": lambda: scipy.linalg.svdvals(rng.standard_normal((count, 2 * count))) ** 2,
        "pareto": lambda: rng.pareto(1.5, count) + 1,
        "lognormal": lambda: rng.lognormal(0, 2, count) + 1e-4,
        "ties": lambda: rng.integers(1, 30, count).astype(float),
    }[kind]()
    fit = fit_power_law(values)
    alpha, xmin, distance = brute_force_fit(values)
    assert fit.ks == pytest.approx(distance, rel=1e-10)
    assert (fit.alpha, fit.xmin) == pytest.approx((alpha, xmin), rel=1e-10)
    assert fit.tail == np.count_nonzero(values >= xmin)
    assert fit.sigma == pytest.approx((alpha - 1) / np.sqrt(fit.tail), rel=0.3 if kind == "ties" else 1e-10)


def test_the_floor_lengthens_the_tail_and_stays_the_best_above_it():
    values = scipy.linalg.svdvals(np.random.default_rng(3).standard_normal((200, 260))) ** 2
    free, held = fit_power_law(values), fit_power_law(values, min_tail=100)
    assert free.tail < 100 <= held.tail
    assert (held.alpha, held.xmin, held.ks) == pytest.approx(brute_force_fit(values, 100), rel=1e-10)
    assert fit_power_law(values, min_tail=999).tail == len(values)


@pytest.mark.parametrize("values", [[], [3.0], [2.0, 2.0, 2.0], [0.0, 0.0], [1e-9, 5.0]])
def test_nothing_to_fit_is_nan_not_a_number_out_of_the_air(values):
    fit = fit_power_law(np.array(values))
    assert np.isnan(fit.alpha) and fit.tail == 0


def test_hill_by_hand():
    values = np.exp(np.linspace(3, 0, 40))  # ln λ falls by 3/39 a step
    step = 3 / 39
    expected = 1 + 10 / sum(step * (10 - i) for i in range(10))
    assert hill_alpha(values) == pytest.approx(expected)
    assert hill_alpha(values, k=20) == pytest.approx(1 + 20 / sum(step * (20 - i) for i in range(20)))
    assert np.isnan(hill_alpha(values[:10]))  # ten values have no eleventh
    assert np.isnan(hill_alpha(np.ones(40)))


@pytest.mark.parametrize("a", [0.25, 0.5, 1.0, 2.0])
def test_rank_decay_and_the_tail_exponent_are_one_law(a):
    sigma = np.arange(1.0, 2001.0) ** -a
    assert decay_alpha(sigma) == pytest.approx(a, rel=1e-12)
    assert hill_alpha(sigma**2) == pytest.approx(1 + 1 / (2 * a), rel=0.02)


# --- the statistics --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sigma", "expected"),
    [(np.arange(1.0, 101.0) ** -0.5, 83), (np.exp(-0.2 * np.arange(1, 101)), 12), (np.ones(100), 90)],
)
def test_nuclear_rank_of_the_preprints_spectra(sigma, expected):
    got = analyze_matrix(with_singular_values(sigma, 100, 140), farms=False).statistics
    assert got["nuclear_rank_90"] == expected
    assert got["nuclear_rank_90_rel"] == expected / 100


def test_exponential_decay():
    sigma = np.exp(-0.05 * np.arange(200))
    got = analyze_matrix(with_singular_values(sigma, 300, 200), farms=False).statistics
    energy = sigma**2 / (sigma**2).sum()
    expected = {
        "effective_rank": np.exp(scipy.stats.entropy(energy)),
        "stable_rank": (1 - np.exp(-20)) / (1 - np.exp(-0.1)),
        "log_spectral_norm": 0,
        "log_frobenius_norm": np.log10((sigma**2).sum()),
        "top_share": energy[:20].sum(),
    }
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("weight", "rank", "count"),
    [(torch.eye(150), 150, 135), (with_singular_values(np.array([3.0]), 64, 200), 1, 1)],
)
def test_a_flat_spectrum_and_rank_one_have_ranks_and_no_exponent(weight, rank, count):
    got = analyze_matrix(weight)
    assert got.status == "failed"
    assert got.statistics["effective_rank"] == pytest.approx(rank)
    assert got.statistics["stable_rank"] == pytest.approx(rank)
    assert got.statistics["nuclear_rank_90"] == count
    assert np.count_nonzero(got.singular_values) == rank
    assert np.isnan([got.statistics[name] for name in ("alpha_pl", "alpha_hill")]).all()


def test_marchenko_pastur_holds_noise_and_lets_a_spike_out():
    noise = gaussian(600, 1200)
    plain = analyze_matrix(noise, farms=False).statistics
    assert plain["mp_excess"] < 0.01
    assert plain["kurtosis"] == pytest.approx(0, abs=0.05)
    spike = with_singular_values(np.array([150.0]), 600, 1200)
    assert analyze_matrix(noise + spike, farms=False).statistics["mp_excess"] == pytest.approx(
        150**2 / (150**2 + 600 * 1200), rel=0.15
    )


def test_log_alpha_norm_of_a_steep_tail_does_not_overflow():
    got = analyze_matrix(1e30 * gaussian(100, 120), farms=False).statistics
    assert got["alpha_pl"] > 5.5
    assert got["alpha_weighted"] <= got["log_alpha_norm"] <= got["alpha_weighted"] + np.log10(100)


def test_alpha_does_not_depend_on_scale_or_orientation():
    weight = gaussian(150, 220)
    base, other = (analyze_matrix(w).statistics for w in (weight, 8 * weight.T))
    for column in ("alpha_pl", "alpha_hill", "alpha_decay", "alpha_farms", "alpha_excess", "mp_excess"):
        assert other[column] == pytest.approx(base[column], rel=1e-8), column


# --- the nulls -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(120, 300), (300, 120), (200, 200)])
def test_gaussian_null_is_that_of_drawn_matrices(shape):
    mean, deviation = gaussian_hill(*shape, seed=5, draws=200)
    drawn = [hill_alpha(decompose(gaussian(*shape, seed=s))[0] ** 2) for s in range(60)]
    assert abs(np.mean(drawn) - mean) < 4 * deviation * np.sqrt(1 / 200 + 1 / 60)
    assert np.std(drawn, ddof=1) == pytest.approx(deviation, rel=0.4)


def test_gaussian_null_of_the_methods_figures():
    """Hill's α of a Gaussian matrix with k = 0.1 M: 6.3 at 2560 × 2560 and about 15 at 2560 × 32 (METHOD)."""
    assert gaussian_hill(2560, 2560, draws=2)[0] == pytest.approx(6.3, abs=0.3)
    assert gaussian_hill(2560, 32)[0] == pytest.approx(15, abs=1.5)
    assert np.isnan(gaussian_hill(10, 400)[0])


def test_excess_of_a_gaussian_matrix_is_noise_and_seeded():
    got, again = (analyze_matrix(gaussian(256, 384, seed=9), seed=1).statistics for _ in range(2))
    assert abs(got["alpha_excess_z"]) < 4 and again == got
    assert got["alpha_excess"] == got["alpha_hill"] - gaussian_hill(256, 384, seed=1)[0]


def test_farms_pools_the_blocks_of_the_grid():
    weight = gaussian(300, 400).mul(torch.linspace(0.1, 3, 300)[:, None])
    pooled = [
        scipy.linalg.svdvals(weight[r : r + 128, c : c + 128].numpy()) ** 2
        for r in (0, 128)
        for c in (0, 128, 256)
    ]
    np.testing.assert_allclose(np.sort(block_eigenvalues(weight), None), np.sort(pooled, None), atol=1e-9)
    expected = np.sort(np.concatenate(pooled))[::-1]
    k = 6 * 128 // 10
    assert analyze_matrix(weight).statistics["alpha_farms"] == pytest.approx(
        1 + k / np.log(expected[:k] / expected[k]).sum()
    )


def test_farms_draws_blocks_where_there_are_many_and_none_where_a_side_is_short():
    assert len(choose_blocks(128 * 20, 128 * 30)) == 256
    assert (choose_blocks(2560, 3840, seed=1) == choose_blocks(2560, 3840, seed=1)).all()
    assert (choose_blocks(2560, 3840, seed=1) != choose_blocks(2560, 3840, seed=2)).any()
    assert choose_blocks(2560, 3840).max(axis=0).tolist() <= [2560 - 128, 3840 - 128]
    assert np.isnan(analyze_matrix(gaussian(127, 500)).statistics["alpha_farms"])


# --- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_single_bad_entry_fails_the_layer(bad, dtype):
    weight = gaussian(140, 150, dtype=dtype)
    weight[77, 3] = bad
    got = analyze_matrix(weight)
    assert got.status == "failed" and len(got.singular_values) == 140
    assert np.isnan([*got.singular_values, *got.statistics.values()]).all()
    assert analyze_matrix(torch.zeros(130, 140)).status == "failed"


def test_a_row_vector_and_small_matrices_are_not_dropped():
    assert analyze_matrix(gaussian(1, 500)).status == "failed"  # one eigenvalue has no exponent
    few = analyze_matrix(gaussian(6, 500))
    assert few.status == "few_values"
    assert np.isfinite(few.statistics["alpha_pl"]) and np.isnan(few.statistics["alpha_hill"])
    assert analyze_matrix(gaussian(19, 500)).status == "few_values"


def test_status_tells_a_short_tail_from_a_poor_fit_and_a_good_one():
    rng = np.random.default_rng(0)
    pareto = np.sqrt(np.sort((1 - rng.random(400)) ** (-1 / 1.2))[::-1])
    assert analyze_matrix(with_singular_values(pareto, 400, 500), farms=False).status == "ok"
    light = analyze_matrix(gaussian(300, 300), farms=False)
    assert light.statistics["alpha_pl_tail"] < 50 and light.status == "short_tail"
    assert analyze_matrix(gaussian(300, 300), farms=False, min_tail=200).status == "poor_fit"


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.zeros(3, 4, 5), r"shape \(3, 4, 5\)"),
        (torch.zeros(0, 4), "at least one entry"),
        (torch.zeros(4, 4, dtype=torch.int8), "int8"),
        (torch.zeros(4, 4, dtype=torch.float8_e4m3fn), "dequantize"),
        (np.zeros((4, 4), dtype=np.uint8), "uint8"),
    ],
)
def test_what_is_no_matrix_of_numbers_is_refused(weight, said):
    with pytest.raises(AnalysisError, match=said):
        analyze_matrix(weight)
    with pytest.raises(AnalysisError, match="float16"):
        analyze_matrix(torch.ones(4, 4), precision="float16")


def test_columns_are_complete_and_ordered():
    got = analyze_matrix(gaussian(140, 150)).statistics
    assert tuple(got)[: len(COLUMNS)] == COLUMNS
    assert COLUMNS[:8] == (
        *("alpha_pl", "alpha_pl_xmin", "alpha_pl_ks", "alpha_pl_tail", "alpha_pl_sigma"),
        *("alpha_hill", "alpha_decay", "alpha_farms"),
    )
    assert all(np.isfinite(value) for value in got.values())


# --- AlphaQ and SWAN -------------------------------------------------------------------------------------


def test_alphaq_by_hand():
    alpha, variance = pd.Series([2.0, 4.0, 8.0, np.nan]), pd.Series([1.0, 1.0, 3.0, 1.0])
    got = alphaq(alpha, variance, pd.Series([True, True, False, True]))
    unit = 2.0**-8 - 2.0**-32
    np.testing.assert_allclose(got[:3], [1.5 * unit, 0.75 * unit, 3 / 8 * 3 * unit])
    assert np.isnan(got[3])


def test_swan_by_hand_and_its_probe_free_output_error():
    inputs = pd.DataFrame(
        {"top_share": [0.5], "kurtosis": [5.0], "variance": [1.0], "mean": [0.0], "span": [8.0]}
    )
    expected = 0.2 * 0.5 + 0.45 * 0.5 + 0.15 * (np.log10(0.1) + 2) / 3 + 0.2 * (0.1 / 8 - 0.005) / 0.045
    assert swan(inputs, pd.Series([0.1]))[0] == pytest.approx(expected)
    rng = np.random.default_rng(0)
    weight, change = rng.standard_normal((200, 300)), 0.1 * rng.standard_normal((200, 300))
    probes = rng.standard_normal((300, 400))
    measured = np.sqrt(((change @ probes) ** 2).sum() / ((weight @ probes) ** 2).sum())
    assert measured == pytest.approx(np.linalg.norm(change) / np.linalg.norm(weight), rel=0.01)
