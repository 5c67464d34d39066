"""What alpha would be without learning, and alpha freed from the matrix's shape.

Hill's alpha of a Gaussian matrix is anything from 2 to 15 depending on its shape alone, so a threshold on raw
alpha picks layer types. Two corrections:

`gaussian_hill`: mean and deviation of Hill's alpha over Gaussian matrices of the same shape, to subtract.
`block_eigenvalues`: FARMS (Hu et al., arXiv:2506.06280): pool the eigenvalues of fixed 128 × 128 blocks, so
that every layer is judged at the same aspect ratio.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy.linalg import eigvalsh_tridiagonal

from spi_utils.spectral.powerlaw import hill_alpha, hill_k

DRAWS = 24
BLOCK = 128
MIN_BLOCKS = 48  # fewer shift alpha by several per cent from draw to draw; half of a larger grid by 1 to 2
MAX_BLOCKS = 256


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
    alphas = [hill_alpha(_largest_gaussian_eigenvalues(rng, short, long, k + 1), k) for _ in range(draws)]
    return float(np.mean(alphas)), float(np.std(alphas, ddof=1))


def _largest_gaussian_eigenvalues(rng: np.random.Generator, short: int, long: int, count: int) -> np.ndarray:
    """The `count` largest eigenvalues of WᵀW for a Gaussian W (long, short), descending."""
    diagonal = np.sqrt(rng.chisquare(long - np.arange(short)))
    beside = np.sqrt(rng.chisquare(short - 1 - np.arange(short - 1)))
    main = diagonal**2
    main[1:] += beside**2
    # All of them by the root-free QL iteration: faster than bisection for the few.
    values = eigvalsh_tridiagonal(main, diagonal[:-1] * beside, lapack_driver="sterf", check_finite=False)
    return values[: -count - 1 : -1]


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


def block_hill(eigenvalues: np.ndarray) -> float:
    """Hill's alpha of the pooled eigenvalues of all blocks, any order; NaN where there are none."""
    return hill_alpha(np.sort(eigenvalues, axis=None)[::-1])
