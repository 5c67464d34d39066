"""A weight matrix -> its singular values -> what they say about the layer (numbers only, no models).

Read `analyze_matrix` first: (1) the Gram matrix of the shorter side, (2) its eigenvalues, which are the
squared singular values, (3) one function for each statistic, listed in `STATISTICS`. Whoever wants another
statistic writes one function and one row there.

Everything counts on eigenvalues λ = σ², not divided by the longer side, descending. M = min(rows, cols),
N = max(rows, cols). Sources: WeightWatcher (Martin and Mahoney, arXiv:1810.01075) unless a docstring says
other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from spi_utils.spectral.decompose import Moments, block_eigenvalues, checked, choose_precision, decompose
from spi_utils.spectral.nulls import block_hill, gaussian_hill
from spi_utils.spectral.powerlaw import (
    EIGENVALUE_FLOOR,
    FEW_VALUES,
    PowerLawFit,
    decay_alpha,
    fit_power_law,
    hill_alpha,
)

SHORT_TAIL = 50  # eigenvalues; alpha_pl of a shorter tail has a standard error above 14 %
POOR_KS = 0.1  # a larger distance means that the tail isn't a power law


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
        weight: (rows, cols), floating point of any width, on the CPU or a CUDA device; the work happens
        there.
        precision: "float64", "float32", or "auto": float64 on the CPU, float32 (TF32 off) on CUDA.
        min_tail: see `fit_power_law`.
        seed: of the Gaussian null and of the blocks drawn for FARMS.
        farms: compute alpha_farms too, which costs up to 256 decompositions of 128 × 128 blocks.

    Raises:
        AnalysisError: the weight isn't a floating-point matrix with at least one entry.
    """
    matrix = checked(weight)
    precision = choose_precision(precision, matrix.device)
    rows, cols = matrix.shape
    sigma, moments = decompose(matrix, precision=precision)
    if not np.isfinite(moments.variance) or not np.isfinite(sigma).all():
        return _failed(np.full(min(rows, cols), np.nan))
    pooled = block_eigenvalues(matrix, precision=precision, seed=seed) if farms else np.empty(0)
    return describe(sigma, moments, rows, cols, pooled=pooled, min_tail=min_tail, seed=seed)


def describe(
    sigma: np.ndarray,
    moments: Moments,
    rows: int,
    cols: int,
    *,
    pooled: np.ndarray,
    min_tail: int | None = None,
    seed: int = 0,
) -> LayerSpectrum:
    """The statistics of known singular values: everything that follows the decomposition.

    Args:
        sigma: (M,) float64, descending.
        moments: of the weight's entries.
        rows: of the weight.
        cols: of the weight.
        pooled: the eigenvalues of the weight's blocks (`block_eigenvalues`), or none.
        min_tail: see `fit_power_law`.
        seed: of the Gaussian null.
    """
    fit = fit_power_law(sigma**2, min_tail)
    spectrum = Spectrum(sigma, fit, rows, cols, moments)
    if sigma[0] == 0:
        return _failed(sigma)
    values = {name: float(function(spectrum)) for name, function in (STATISTICS | INPUTS).items()}
    mean, deviation = gaussian_hill(rows, cols, seed=seed)
    values["alpha_excess"] = values["alpha_hill"] - mean
    values["alpha_excess_z"] = values["alpha_excess"] / deviation
    values["alpha_farms"] = block_hill(pooled)
    return LayerSpectrum(sigma, {name: values[name] for name in (*COLUMNS, *INPUTS)}, _status(spectrum))


def _failed(sigma: np.ndarray) -> LayerSpectrum:
    return LayerSpectrum(sigma, dict.fromkeys((*COLUMNS, *INPUTS), float("nan")), "failed")


def _status(spectrum: Spectrum) -> str:
    fit = spectrum.fit
    if not np.isfinite(fit.alpha):
        return "failed"
    if np.count_nonzero(spectrum.eigenvalues > EIGENVALUE_FLOOR) < FEW_VALUES:
        return "few_values"
    if fit.tail < SHORT_TAIL:
        return "short_tail"
    return "poor_fit" if fit.ks > POOR_KS else "ok"


# --- The statistics ---------------------------------------------------------------------------------------


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
