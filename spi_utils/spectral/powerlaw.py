"""Three exponents of one spectrum, all called alpha elsewhere, never mixed here (numpy only).

`fit_power_law`: Clauset, Shalizi and Newman's fit (arXiv:0706.1062) of the eigenvalues' tail, as
WeightWatcher 0.7.7 does it, every eigenvalue but the largest tried as the tail's start. Exact, and about 20
times faster than
WeightWatcher: all exponents come from one cumulative sum, and a lower bound of each KS distance decides which
few distances have to be computed in full.
`hill_alpha`: the same exponent with the tail's length fixed beforehand.
`decay_alpha`: how fast the singular values fall with their rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

EIGENVALUE_FLOOR = 1e-5  # WeightWatcher drops eigenvalues up to this before it fits
FEW_VALUES = 20  # below it WeightWatcher 0.7.7 fits with a bias correction and tails of at least 8
SMALL_TAIL = 8
BOUND_POSITIONS = 40  # of the tail, where the KS distance is bounded from below


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


def fit_power_law(eigenvalues: np.ndarray, min_tail: int | None = None) -> PowerLawFit:
    """Fit a power law to the tail that minimises the Kolmogorov-Smirnov distance.

    For the ascending eigenvalues x_i > 1e-5 and n_i = N - i values from x_i on,
    alpha_i = 1 + n_i / Σ_{j>=i} ln(x_j / x_i) and D_i = max_j |1 - (x_{i+j}/x_i)^(1-alpha_i) - j/n_i|; the
    first i with the smallest D_i wins. With fewer than 20 values the numerator is n_i - 1 and n_i >= 8, as
    WeightWatcher.

    Args:
        eigenvalues: squared singular values in any order, 1-D.
        min_tail: fit at least that many eigenvalues (all, if there are fewer). WeightWatcher has no such
        floor
            and picks tails of 8…60 out of 2,560 on spectra without a heavy tail; with None neither have we.

    Returns:
        The fit; NaN where fewer than two distinct eigenvalues exceed 1e-5.
    """
    x = np.sort(np.asarray(eigenvalues, dtype=np.float64))
    x = x[x > EIGENVALUE_FLOOR]
    if len(x) < 2 or x[0] == x[-1]:
        return NO_FIT
    logs = np.log(x)
    tails = len(x) - np.arange(len(x) - 1)
    starts = _candidates(tails, min_tail)
    exponents = _exponents(logs, tails)
    usable = starts[np.isfinite(exponents[starts]) & (exponents[starts] > 0)]
    if len(usable) == 0:
        return NO_FIT
    start, distance = _smallest_distance(logs, exponents, usable)
    exponent, tail = exponents[start], int(np.count_nonzero(x >= x[start]))
    sigma = exponent / np.sqrt(tails[start])
    return PowerLawFit(float(1 + exponent), float(x[start]), float(distance), tail, float(sigma))


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


def _candidates(tails: np.ndarray, min_tail: int | None) -> np.ndarray:
    """Indices where a tail may begin; the whole spectrum where no tail is long enough."""
    shortest = min_tail or 0
    if len(tails) + 1 < FEW_VALUES:
        shortest = max(shortest, SMALL_TAIL)
    starts = np.flatnonzero(tails >= shortest)
    return starts if len(starts) else np.array([0])


def _exponents(logs: np.ndarray, tails: np.ndarray) -> np.ndarray:
    """alpha_i - 1 for every start i (infinite where all values of the tail are equal)."""
    sums = np.cumsum(logs[::-1])[::-1][:-1] - tails * logs[:-1]
    numerators = tails - 1 if len(logs) < FEW_VALUES else tails
    # Rounding leaves about 1e-15 where a tail of equal values sums to zero.
    sums = np.where(logs[-1] > logs[:-1], sums, 0.0)
    with np.errstate(divide="ignore"):
        return numerators / sums


def _smallest_distance(logs: np.ndarray, exponents: np.ndarray, starts: np.ndarray) -> tuple[int, float]:
    """The first start with the smallest KS distance, and that distance.

    A maximum over some positions never exceeds the maximum over all: rows are visited in the order of their
    lower bounds until the bound passes the best full distance.
    """
    bounds = _lower_bounds(logs, exponents, starts)
    best, distance = -1, np.inf
    for row in np.argsort(bounds, kind="stable"):
        if bounds[row] > distance:
            break
        start = int(starts[row])
        steps = np.arange(len(logs) - start) / (len(logs) - start)
        full = float(np.abs(-np.expm1(-exponents[start] * (logs[start:] - logs[start])) - steps).max())
        if full < distance or (full == distance and start < best):
            best, distance = start, full
    return best, distance


def _lower_bounds(logs: np.ndarray, exponents: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """max_j |F_fit - F_observed| over a few positions j of every tail (starts, positions)."""
    tails = len(logs) - starts
    # Evenly spread positions and the last one; a tiny slack keeps a rounded bound below the rounded distance.
    parts = np.append(np.arange(1, BOUND_POSITIONS) / BOUND_POSITIONS, 1.0)
    jumps = ((tails - 1)[:, None] * parts).astype(np.int64)
    gaps = logs[starts[:, None] + jumps] - logs[starts][:, None]
    gaps *= -exponents[starts][:, None]
    np.exp(gaps, out=gaps)
    gaps += jumps / tails[:, None]
    gaps -= 1
    return np.maximum(gaps.max(axis=1), -gaps.min(axis=1)) - 1e-12
