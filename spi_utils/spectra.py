"""A weight matrix -> its singular values -> what they say about the layer (numbers only, no models).

Read `analyze_matrix` first: (1) the Gram matrix of the shorter side, (2) its eigenvalues, which are the
squared singular values, (3) three exponents, all called alpha elsewhere and never mixed here, (4) what alpha
would be without learning, (5) one function for each statistic, listed in `STATISTICS`. Whoever wants another
statistic writes one function and one row there.

Everything counts on eigenvalues λ = σ², not divided by the longer side, descending. M = min(rows, cols),
N = max(rows, cols). Sources: WeightWatcher (Martin and Mahoney, arXiv:1810.01075) unless a docstring says
other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
import torch
from scipy.linalg import eigvalsh_tridiagonal

from spi_utils.errors import AnalysisError

SHORT_TAIL = 50  # eigenvalues; alpha_pl of a shorter tail has a standard error above 14 %
POOR_KS = 0.1  # a larger distance means that the tail isn't a power law
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
GRAM_ENTRIES = 1 << 23  # of a weight that become float64 at a time: 64 MiB
EIGENVALUE_FLOOR = 1e-5  # WeightWatcher drops eigenvalues up to this before it fits
FEW_VALUES = 20  # below it WeightWatcher 0.7.7 fits with a bias correction and tails of at least 8
SMALL_TAIL = 8
DRAWS = 24  # Gaussian matrices behind a null
BLOCK = 128  # side of FARMS' blocks
MIN_BLOCKS = 48  # fewer shift alpha by several per cent from draw to draw; half of a larger grid by 1 to 2
MAX_BLOCKS = 256


@dataclass(frozen=True)
class Moments:
    """Of the entries of a weight: mean, variance (population), excess kurtosis, largest minus smallest."""

    mean: float
    variance: float
    kurtosis: float
    span: float


NO_MOMENTS = Moments(np.nan, np.nan, np.nan, np.nan)


@dataclass(frozen=True)
class PowerLawFit:
    """The density p(λ) ~ λ^-alpha for λ >= xmin, fitted to the `tail` largest eigenvalues.

    `ks` is the largest distance between the fitted and the observed distribution of the tail, `sigma` alpha's
    standard error, (alpha - 1)/√tail. All NaN with tail 0 where nothing can be fitted.
    """

    alpha: float
    xmin: float
    ks: float
    tail: int
    sigma: float


NO_FIT = PowerLawFit(float("nan"), float("nan"), float("nan"), 0, float("nan"))


@dataclass(frozen=True)
class Spectrum:
    """What a statistic may look at: descending singular values, the fit, the shape, the moments."""

    sigma: np.ndarray
    fit: PowerLawFit
    rows: int
    cols: int
    moments: Moments

    @property
    def eigenvalues(self) -> np.ndarray:
        """λ = σ², descending."""
        return self.sigma**2


@dataclass(frozen=True)
class LayerSpectrum:
    """One analysed layer: `singular_values` (M,) float64 descending, `statistics` by column name, `status`.

    `status` is `ok`; `few_values` (under 20 eigenvalues above 1e-5: WeightWatcher's small-sample fit);
    `short_tail` (the fitted tail has under 50 values); `poor_fit` (KS distance above 0.1); `failed` (NaN or
    Inf in the weight, or fewer than two distinct eigenvalues, so that no exponent exists). Only `failed`
    blocks a selection.
    """

    singular_values: np.ndarray
    statistics: dict[str, float]
    status: str


def analyze_matrix(
    weight: torch.Tensor | np.ndarray,
    *,
    precision: str = "auto",
    min_tail: int | None = None,
    seed: int = 0,
    farms: bool = True,
) -> LayerSpectrum:
    """Singular values, every statistic and the status of one weight.

    Args:
        weight: (rows, cols), floating point of any width, on the CPU or a CUDA device: it is worked on there.
        precision: "float64", "float32", or "auto": float64 on the CPU, float32 (TF32 off) on CUDA.
        min_tail: see `fit_power_law`.
        seed: of the Gaussian null and of the blocks drawn for FARMS.
        farms: compute alpha_farms too, which costs up to 256 decompositions of 128 × 128 blocks.

    Raises:
        AnalysisError: the weight isn't a floating-point matrix with at least one entry.
    """
    matrix = torch.from_numpy(weight) if isinstance(weight, np.ndarray) else weight.detach()
    if matrix.ndim != 2 or matrix.numel() == 0 or matrix.dtype not in FLOATS:
        raise AnalysisError(
            "Expected a matrix with at least one entry in float16, bfloat16, float32 or float64, got shape "
            f"{tuple(matrix.shape)}, {str(matrix.dtype).removeprefix('torch.')}. Pass stacks slice by slice, "
            "and dequantize checkpoints first: codes mean nothing without their scales."
        )
    precision = choose_precision(precision, matrix.device)
    sigma, moments = decompose(matrix, precision=precision)
    if not np.isfinite(sigma).all() or sigma[0] == 0:
        return LayerSpectrum(sigma, dict.fromkeys((*COLUMNS, *INPUTS), float("nan")), "failed")
    rows, cols = matrix.shape
    fit = fit_power_law(sigma**2, min_tail)
    spectrum = Spectrum(sigma, fit, rows, cols, moments)
    values = {name: float(function(spectrum)) for name, function in (STATISTICS | INPUTS).items()}
    mean, deviation = gaussian_hill(rows, cols, seed=seed)
    values["alpha_excess"] = values["alpha_hill"] - mean
    values["alpha_excess_z"] = values["alpha_excess"] / deviation
    pooled = block_eigenvalues(matrix, precision=precision, seed=seed) if farms else np.empty(0)
    values["alpha_farms"] = hill_alpha(np.sort(pooled, axis=None)[::-1])
    status = "poor_fit" if fit.ks > POOR_KS else "ok"
    if not np.isfinite(fit.alpha):
        status = "failed"
    elif np.count_nonzero(spectrum.eigenvalues > EIGENVALUE_FLOOR) < FEW_VALUES:
        status = "few_values"
    elif fit.tail < SHORT_TAIL:
        status = "short_tail"
    return LayerSpectrum(sigma, {name: values[name] for name in (*COLUMNS, *INPUTS)}, status)


# --- the decomposition -----------------------------------------------------------------------------------


# In float64 the eigenvalues of the Gram matrix give the same alpha as a float64 SVD to 1e-12, for a quarter
# of the arithmetic. numpy's `matmul` sees the symmetric product and calls ?syrk; its `eigvalsh` is LAPACK's
# dsyevd and frees Python's lock (scipy's `eigh` keeps it, torch's MKL is slower on AMD): layers in threads of
# one process really run side by side. Measured and left: ?syev and ?syevr (no faster), two-stage
# tridiagonalisation (4 to 10 times slower in OpenBLAS' build), BLAS threads instead of a layer a core.


def choose_precision(precision: str, device: torch.device) -> str:
    """What "auto" means on this device: float64 on the CPU, float32 on a device whose float64 is slow."""
    if precision == "auto":
        return "float64" if device.type == "cpu" else "float32"
    if precision not in ("float64", "float32"):
        raise AnalysisError(f"precision is {precision!r}; expected 'auto', 'float64' or 'float32'.")
    return precision


def decompose(matrix: torch.Tensor, *, precision: str = "float64") -> tuple[np.ndarray, Moments]:
    """Singular values (M,) float64 descending, and the entries' moments; NaN where an entry isn't finite.

    The eigenvalues of the Gram matrix of the shorter side: in float64 they give the same alpha as a float64
    SVD to 1e-14, for a quarter of the arithmetic and less. What rounding can't tell from zero is zero: λ
    below ε·M·λ_1 in float64, ε·√M·λ_1 in float32.

    Args:
        matrix: (rows, cols) floating point; on the device where the work shall happen.
        precision: "float64" or "float32".
    """
    solve = _host_eigenvalues if matrix.device.type == "cpu" else _device_eigenvalues
    values, moments = solve(matrix, precision)
    count = len(values)
    noise = np.finfo(precision).eps * (count if precision == "float64" else count**0.5)
    with np.errstate(invalid="ignore"):
        kept = np.where(values <= noise * values[-1], 0.0, values)
        return np.ascontiguousarray(np.sqrt(kept)[::-1]), moments


def _host_eigenvalues(matrix: torch.Tensor, precision: str) -> tuple[np.ndarray, Moments]:
    """Ascending eigenvalues of the Gram matrix, summed over slices: the weight is never whole in float64."""
    tall, short = matrix.shape[0] >= matrix.shape[1], min(matrix.shape)
    shift = float(matrix[0].double().mean())
    gram, sums = np.zeros((short, short), precision), np.zeros(4)
    for part in matrix.split(max(1, GRAM_ENTRIES // short), dim=0 if tall else 1):
        piece = part.to(getattr(torch, precision)).contiguous().numpy()
        sums += _power_sums(piece.reshape(-1), shift)
        # numpy sees that both factors are one array, and computes half of the symmetric product (syrk).
        gram += piece.T @ piece if tall else piece @ piece.T
    if not (np.isfinite(gram).all() and np.isfinite(sums).all()):
        return np.full(short, np.nan), NO_MOMENTS
    low, high = torch.aminmax(matrix)
    moments = _moments(sums, shift, matrix.numel(), float(high) - float(low))
    return np.linalg.eigvalsh(gram).astype(np.float64), moments


def _power_sums(entries: np.ndarray, shift: float) -> np.ndarray:
    """Σ x^p for p = 1…4 and x = entry - shift, in slices that stay in the processor's cache."""
    total = np.zeros(4)
    for first in range(0, len(entries), 1 << 16):
        x = entries[first : first + (1 << 16)] - entries.dtype.type(shift)
        squares = x * x
        total += (x.sum(), x @ x, squares @ x, squares @ squares)
    return total


def _moments(sums: np.ndarray, shift: float, count: int, span: float) -> Moments:
    """Central moments from power sums about `shift` (a value near the mean, so that little cancels)."""
    m1, m2, m3, m4 = sums / count
    variance = m2 - m1**2
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    # Equal entries leave rounding alone in the variance.
    spread = variance > 1e-14 * (m2 + shift**2)
    return Moments(shift + m1, max(variance, 0.0), fourth / variance**2 - 3 if spread else np.nan, span)


def _device_eigenvalues(matrix: torch.Tensor, precision: str) -> tuple[np.ndarray, Moments]:
    """The same on a CUDA device: only the eigenvalues and six numbers leave it, in one transfer."""
    x = matrix.to(getattr(torch, precision))
    shift = x[0].double().mean()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    x = x - shift.to(x.dtype)
    sums = [(x**power).sum(dtype=torch.float64) for power in (1, 2, 3, 4)]
    if not bool(torch.isfinite(gram).all()):
        return np.full(len(gram), np.nan), NO_MOMENTS
    low, high = torch.aminmax(x)
    numbers = torch.stack([shift, (high - low).double(), *sums])
    packed = torch.cat([numbers, torch.linalg.eigvalsh(gram).double()]).cpu().numpy()
    return packed[6:], _moments(packed[2:6], float(packed[0]), matrix.numel(), float(packed[1]))


# --- three exponents -------------------------------------------------------------------------------------


def fit_power_law(eigenvalues: np.ndarray, min_tail: int | None = None) -> PowerLawFit:
    """Fit a power law to the tail that minimises the Kolmogorov-Smirnov distance.

    For the ascending eigenvalues x_i > 1e-5 and n_i = N - i values from x_i on,
    alpha_i = 1 + n_i / Σ_{j>=i} ln(x_j / x_i) and D_i = max_j |1 - (x_{i+j}/x_i)^(1-alpha_i) - j/n_i|; the
    first i with the smallest D_i wins. With fewer than 20 values the numerator is n_i - 1 and n_i >= 8, as
    WeightWatcher.

    Args:
        eigenvalues: squared singular values in any order, 1-D.
        min_tail: fit at least that many eigenvalues (all, if there are fewer). WeightWatcher has no such
            floor and picks tails of 8…60 out of 2,560 on spectra without a heavy tail; with None neither
            have we.

    Returns:
        The fit; NaN where fewer than two distinct eigenvalues exceed 1e-5.
    """
    x = np.sort(np.asarray(eigenvalues, dtype=np.float64))
    x = x[x > EIGENVALUE_FLOOR]
    if len(x) < 2 or x[0] == x[-1]:
        return NO_FIT
    logs, few = np.log(x), len(x) < FEW_VALUES
    tails = len(x) - np.arange(len(x) - 1)
    shortest = max(min_tail or 0, SMALL_TAIL if few else 0)
    sums = np.cumsum(logs[::-1])[::-1][:-1] - tails * logs[:-1]
    # Rounding leaves about 1e-15 where a tail of equal values sums to zero.
    sums = np.where(logs[-1] > logs[:-1], sums, 0.0)
    with np.errstate(divide="ignore"):
        exponents = (tails - 1 if few else tails) / sums  # alpha_i - 1 for every start i
    starts = np.flatnonzero(tails >= shortest) if tails[0] >= shortest else np.array([0])
    starts = starts[np.isfinite(exponents[starts]) & (exponents[starts] > 0)]
    if len(starts) == 0:
        return NO_FIT
    best, distance = -1, np.inf
    for start in starts.tolist():
        steps = np.arange(len(x) - start) / (len(x) - start)
        full = float(np.abs(-np.expm1(-exponents[start] * (logs[start:] - logs[start])) - steps).max())
        if full < distance:
            best, distance = start, full
    exponent, tail = exponents[best], int(np.count_nonzero(x >= x[best]))
    sigma = exponent / np.sqrt(tails[best])
    return PowerLawFit(float(1 + exponent), float(x[best]), distance, tail, float(sigma))


def hill_alpha(eigenvalues: np.ndarray, k: int | None = None) -> float:
    """Hill's estimate of the tail exponent from the k largest eigenvalues (AlphaQ's and TempBalance's form).

    1 + k / Σ_{i<=k} ln(λ_i / λ_{k+1}), k = max(10, ⌊0.1 M⌋) unless given. NaN where λ_{k+1} doesn't exist
    or is 0, or where the k + 1 largest are all equal.

    Args:
        eigenvalues: descending, 1-D.
        k: number of values in the tail.
    """
    k = hill_k(len(eigenvalues)) if k is None else k
    if len(eigenvalues) <= k or eigenvalues[k] <= 0:
        return float("nan")
    total = float(np.log(eigenvalues[:k] / eigenvalues[k]).sum())
    return 1 + k / total if total > 0 else float("nan")


def hill_k(count: int) -> int:
    """Length of Hill's tail for `count` eigenvalues."""
    return max(10, count // 10)


def decay_alpha(singular_values: np.ndarray) -> float:
    """Exponent a of the rank decay σ_k ~ k^-a: least squares of ln σ on ln k over k = 2…⌊M/2⌋.

    A heavy tail of the eigenvalues (low alpha_pl) is a fast rank decay (high a): alpha_pl ≈ 1 + 1/(2a). Zero
    singular values are left out; NaN with fewer than three left.

    Args:
        singular_values: descending, 1-D.
    """
    sigma = singular_values[1 : len(singular_values) // 2]
    sigma = sigma[sigma > 0]
    if len(sigma) < 3:
        return float("nan")
    rank = np.log(np.arange(2, len(sigma) + 2))
    rank = rank - rank.mean()
    return float(-(rank @ np.log(sigma)) / (rank @ rank))


# --- what alpha would be without learning, and alpha freed from the matrix's shape -----------------------


# Hill's alpha of a Gaussian matrix is anything from 2 to 15 depending on its shape alone, so a threshold on
# raw alpha picks layer types. `gaussian_hill` is what to subtract; FARMS (Hu et al., arXiv:2506.06280) pools
# the eigenvalues of fixed 128 × 128 blocks, so that every layer is judged at the same aspect ratio.


@lru_cache(maxsize=256)
def gaussian_hill(rows: int, cols: int, *, seed: int = 0, draws: int = DRAWS) -> tuple[float, float]:
    """Mean and standard deviation of Hill's alpha over Gaussian matrices of this shape, kept for the process.

    No matrix is ever drawn. For W (N, M) with independent standard normal entries, Householder reflections
    turn WᵀW into BᵀB with B bidiagonal, χ_N, χ_{N-1}, … on its diagonal and χ_{M-1}, …, χ_1 beside it, and
    leave the eigenvalues as they were (Silverstein 1985; Dumitriu and Edelman 2002, arXiv:math-ph/0206043).

    Args:
        rows: of the weight, any order with `cols`: only the shorter and the longer side matter.
        cols: of the weight.
        seed: of the draws; the same seed and shape give the same null anywhere.
        draws: number of matrices.

    Returns:
        (mean, standard deviation with draws - 1); NaN where a matrix has too few values for Hill's tail.
    """
    short, long = sorted((rows, cols))
    k = hill_k(short)
    if short <= k:
        return float("nan"), float("nan")
    rng = np.random.default_rng([seed, short, long])
    alphas = []
    for _ in range(draws):
        diagonal = np.sqrt(rng.chisquare(long - np.arange(short)))
        beside = np.sqrt(rng.chisquare(short - 1 - np.arange(short - 1)))
        main = diagonal**2
        main[1:] += beside**2
        # All of them by the root-free QL iteration: faster than bisection for the few.
        how = {"lapack_driver": "sterf", "check_finite": False}
        values = eigvalsh_tridiagonal(main, diagonal[:-1] * beside, **how)
        alphas.append(hill_alpha(values[: -k - 2 : -1], k))
    return float(np.mean(alphas)), float(np.std(alphas, ddof=1))


def choose_blocks(rows: int, cols: int, *, seed: int = 0) -> np.ndarray:
    """Upper left corners (n, 2) of the 128 × 128 blocks that FARMS looks at.

    Half of the grid of blocks that don't overlap, at least 48 of them (or all) and at most 256, drawn without
    replacement: seeded, and the same for equal shapes. Rows and columns beyond the last whole block are left
    out. Empty where a side is under 128.
    """
    across = cols // BLOCK
    total = (rows // BLOCK) * across
    chosen = np.arange(total)
    count = min(MAX_BLOCKS, max(MIN_BLOCKS, total // 2))
    if total > count:
        chosen = np.sort(np.random.default_rng([seed, rows, cols]).choice(total, count, replace=False))
    return np.stack([chosen // max(across, 1), chosen % max(across, 1)], axis=1) * BLOCK


def block_eigenvalues(matrix: torch.Tensor, *, precision: str = "float64", seed: int = 0) -> np.ndarray:
    """Eigenvalues of the 128 × 128 blocks that FARMS pools (blocks, 128); empty where a side is under 128."""
    corners = choose_blocks(*matrix.shape, seed=seed)
    if len(corners) == 0:
        return np.empty((0, BLOCK))
    blocks = torch.stack([matrix[row : row + BLOCK, col : col + BLOCK] for row, col in corners])
    # On the host whatever the device: a GPU spends most of such small solves in launching them.
    stack = blocks.cpu().to(getattr(torch, precision)).numpy()
    values = np.linalg.eigvalsh(stack @ stack.transpose(0, 2, 1)).astype(np.float64)
    return np.maximum(values, 0.0)


# --- the statistics --------------------------------------------------------------------------------------


def stable_rank(s: Spectrum) -> float:
    """Σλ / λ_1 = ‖W‖_F² / ‖W‖_2²."""
    return s.eigenvalues.sum() / s.eigenvalues[0]


def effective_rank(s: Spectrum) -> float:
    """exp(-Σ p ln p) with p = λ/Σλ, the share of energy. (Roy and Vetterli 2007 use σ/Σσ instead.)"""
    shares = s.eigenvalues / s.eigenvalues.sum()
    shares = shares[shares > 0]
    return np.exp(-(shares @ np.log(shares)))


def nuclear_rank_90(s: Spectrum) -> float:
    """The fewest singular values that hold at least 90 % of Σσ (the preprint's trace-norm compactness)."""
    mass = np.cumsum(s.sigma)
    # The slack keeps a sum that is 90 % but for its last bit from asking for one value more.
    return int(np.searchsorted(mass, 0.9 * mass[-1] * (1 - 1e-12))) + 1


def log_alpha_norm(s: Spectrum) -> float:
    """log10 Σ λ_i^alpha_pl, summed relative to λ_1 so that large exponents can't overflow."""
    top = s.eigenvalues[0]
    return s.fit.alpha * np.log10(top) + np.log10(((s.eigenvalues / top) ** s.fit.alpha).sum())


def mp_excess(s: Spectrum) -> float:
    """Share of Σλ above the Marchenko-Pastur edge v·(√M + √N)², v the entries' variance: what isn't noise."""
    edge = s.moments.variance * (np.sqrt(s.rows) + np.sqrt(s.cols)) ** 2
    return s.eigenvalues[s.eigenvalues > edge].sum() / s.eigenvalues.sum()


def top_share(s: Spectrum) -> float:
    """Σλ of the largest tenth of the singular values (at least one) over all: SWAN's concentration."""
    top = max(1, len(s.sigma) // 10)
    return s.eigenvalues[:top].sum() / s.eigenvalues.sum()


STATISTICS: dict[str, Callable[[Spectrum], float]] = {
    "alpha_pl": lambda s: s.fit.alpha,
    "alpha_pl_xmin": lambda s: s.fit.xmin,
    "alpha_pl_ks": lambda s: s.fit.ks,
    "alpha_pl_tail": lambda s: s.fit.tail,
    "alpha_pl_sigma": lambda s: s.fit.sigma,
    "alpha_hill": lambda s: hill_alpha(s.eigenvalues),
    "alpha_decay": lambda s: decay_alpha(s.sigma),
    "effective_rank": effective_rank,
    "effective_rank_rel": lambda s: effective_rank(s) / len(s.sigma),
    "stable_rank": stable_rank,
    "nuclear_rank_90": nuclear_rank_90,
    "nuclear_rank_90_rel": lambda s: nuclear_rank_90(s) / len(s.sigma),
    "log_frobenius_norm": lambda s: np.log10(s.eigenvalues.sum()),  # of the squared norm, as WeightWatcher
    "log_spectral_norm": lambda s: np.log10(s.eigenvalues[0]),  # of the squared norm
    "log_alpha_norm": log_alpha_norm,
    "alpha_weighted": lambda s: s.fit.alpha * np.log10(s.eigenvalues[0]),
    "mp_excess": mp_excess,
    "kurtosis": lambda s: s.moments.kurtosis,
}
INPUTS: dict[str, Callable[[Spectrum], float]] = {  # of scores that need the whole table: AlphaQ and SWAN
    "mean": lambda s: s.moments.mean,
    "variance": lambda s: s.moments.variance,
    "span": lambda s: s.moments.span,
    "top_share": top_share,
}
SHAPE_FREE = ("alpha_farms", "alpha_excess", "alpha_excess_z")
_AFTER = list(STATISTICS).index("alpha_decay") + 1
COLUMNS = (*list(STATISTICS)[:_AFTER], *SHAPE_FREE, *list(STATISTICS)[_AFTER:])  # of layers.csv, in its order


# --- published scores that need the whole table ----------------------------------------------------------


ALPHAQ_BITS = (4, 16)


def alphaq(alpha: pd.Series, variance: pd.Series, planned: pd.Series, gamma: float = 1.0) -> pd.Series:
    """AlphaQ: (median α / α_l)^γ · Var(W_l) · (2^-8 - 2^-32), high where 4 bits cost most.

    Args:
        alpha: (layers,) Hill's α on 128 × 128 blocks; NaN gives NaN.
        variance: (layers,) of the weights' entries.
        planned: (layers,) bool: whose median counts.
        gamma: how strongly α weighs.
    """
    low, high = ALPHAQ_BITS
    return (alpha[planned].median() / alpha) ** gamma * variance * (2.0 ** (-2 * low) - 2.0 ** (-2 * high))


def swan(inputs: pd.DataFrame, error: pd.Series) -> pd.Series:
    """SWAN: a weighted sum of four properties, each clipped to 0…1, high where 4 bits cost most.

    .20·(c - .1)/.8 + .45·kurtosis/10 + .15·(log10 δ + 2)/3 + .20·(NRMSE - .005)/.045, with c the energy
    share of the top tenth of the singular values, and NRMSE the root mean square error of 4 bits over the
    entries' range. δ is the relative change of the output on Gaussian probes x. Its mean needs no probe:
    E‖ΔW x‖² = ‖ΔW‖_F² and E‖W x‖² = ‖W‖_F², so δ is the relative error itself.

    Args:
        inputs: columns `top_share`, `kurtosis`, `variance`, `mean`, `span` (largest minus smallest entry).
        error: (layers,) ‖Q(W) - W‖_F / ‖W‖_F in NF4; NaN gives NaN.
    """
    rms = np.sqrt(inputs["variance"] + inputs["mean"] ** 2)
    with np.errstate(divide="ignore"):
        output = np.log10(error)
    parts = (
        0.20 * ((inputs["top_share"] - 0.1) / 0.8).clip(0, 1),
        0.45 * (inputs["kurtosis"] / 10).clip(0, 1),
        0.15 * ((output + 2) / 3).clip(0, 1),
        0.20 * ((error * rms / inputs["span"] - 0.005) / 0.045).clip(0, 1),
    )
    return parts[0] + parts[1] + parts[2] + parts[3]
