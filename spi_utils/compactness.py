"""Compact spectra, made and measured: an initialization, a penalty, and the rank that holds the mass.

For anyone's own training loop; the experiments that use them are in `spi_utils/lab`.

    nuclear_init_(layer.weight, 0.2)                        # singular values fall like e^(-0.2 k)
    model.apply(NuclearInit(16))                            # 16 of them hold 90 % of the trace norm
    loss = loss + trace_norm_penalty(weights, 1e-3)         # weights: the matrices to make compact

"Trace norm" and "nuclear norm" both mean ‖W‖_* = Σσ. Its subgradient of smallest norm is U Vᵀ over the
non-zero singular values, well defined also where singular values coincide: no 1/(σ_i − σ_j) enters, because
the singular vectors themselves are not differentiated.

What a gradient costs (torch 2.13, float32, one core of an AMD EPYC that other jobs share, milliseconds;
`python -m benchmarks.compactness --costs` measures it again, with Newton-Schulz and randomized SVD beside
it):

    shape        exact (SVD)   fast (Gram)   relative error of the fast one at a Gaussian weight
    96 × 96          0.9           0.5           8e-4
    96 × 384         2.0           0.7           1e-6
    512 × 512         44            25           4e-2 (a square Gaussian's smallest σ are tiny)

Newton-Schulz was slower than the Gram matrix at each of these shapes on the CPU (0.6, 1.7 and 71 ms); a
randomized SVD of rank 32 is the fastest (0.2, 0.5, 1.1 ms), but its gradient misses every direction beyond
the 32nd.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spi_utils.errors import AnalysisError

MASS = 0.9  # the share of the trace norm by which the preprint counts rank
SLACK = 1e-12  # a sum that is the share but for its last bits has reached it


# --- the rank that holds the mass ------------------------------------------------------------------------


def rank_of_mass(sigma: NDArray[np.float64], share: float = MASS, *, count: str = "at_least") -> int:
    """How many of the largest singular values hold `share` of Σσ.

    "at_least" counts until the share is reached, "before" only those that stay strictly below it: one fewer.
    For n = 100 and 90 %, σ_k = k^-½ gives 83 and 82, e^(-0.2k) gives 12 and 11; the preprint's are
    the second ones.

    Args:
        sigma: (M,) non-negative, in any order.
        share: 0 < share ≤ 1.
        count: "at_least" or "before".

    Raises:
        AnalysisError: not 1-D, empty, negative, not finite, all zero; a share or a count that isn't one.
    """
    values = np.sort(np.asarray(sigma, dtype=np.float64))[::-1]
    if values.ndim != 1 or not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
        shape = np.shape(sigma)
        raise AnalysisError(
            f"Expected finite singular values, none negative, one above 0; got shape {shape}."
        )
    if not 0 < share <= 1 or count not in ("at_least", "before"):
        raise AnalysisError(
            f"share={share!r}, count={count!r}: expected 0 < share ≤ 1, 'at_least' or 'before'."
        )
    mass = np.cumsum(values)
    reached = int(np.searchsorted(mass, share * mass[-1] * (1 - SLACK))) + 1
    return reached if count == "at_least" else reached - 1


# --- initialization --------------------------------------------------------------------------------------


@torch.no_grad()
def nuclear_init_(
    weight: Tensor, rank_or_decay: int | float, *, gain: float = 1, generator: torch.Generator | None = None
) -> Tensor:
    """Fill a matrix in place with W = U diag(σ) Vᵀ, σ_k ∝ e^(-κk), U and V Haar-random; returns it.

    Scaled to ‖W‖_F = gain·√rows, the norm that independent entries of variance gain²/cols have on average: an
    input keeps its mean square, as after `torch.nn.init.kaiming_normal_(…, nonlinearity="linear")`. Only the
    spectrum's shape differs.

    Args:
        weight: (rows, cols), float16, bfloat16, float32 or float64; computed in float32 at least.
        rank_or_decay: a float is κ > 0. An int r is how many values shall hold 90 % of Σσ; κ follows.
        gain: > 0.
        generator: of the random bases, for a result that depends on its seed alone; on the weight's device.

    Raises:
        AnalysisError: not a floating-point matrix; a rank below 1 or above the dimension; κ or gain ≤ 0.
    """
    _check_matrix(weight)
    rows, cols = weight.shape
    short, kappa = min(rows, cols), rank_or_decay
    if isinstance(rank_or_decay, int) and not isinstance(rank_or_decay, bool):
        kappa = decay_for_rank(rank_or_decay, short)
    elif not (isinstance(kappa, float) and 0 < kappa < math.inf):
        raise AnalysisError(f"rank_or_decay={kappa!r}: expected an int (rank) or a finite float above 0.")
    if not 0 < gain < math.inf:
        raise AnalysisError(f"gain={gain!r}: expected a finite number above 0.")
    sigma = torch.exp(-kappa * torch.arange(short, dtype=torch.float64, device=weight.device))
    sigma = sigma * (gain * math.sqrt(rows) / torch.linalg.vector_norm(sigma))
    dtype, bases = _working(weight.dtype), []
    for side in (rows, cols):  # orthonormal columns, Haar-distributed (Mezzadri 2007: fix the signs of R)
        q, r = torch.linalg.qr(
            torch.randn(side, short, generator=generator, dtype=dtype, device=weight.device)
        )
        bases.append(q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(dtype))
    return weight.copy_((bases[0] * sigma.to(dtype)) @ bases[1].T)


def decay_for_rank(rank: int, dimension: int) -> float:
    """The κ for which `rank` of `dimension` singular values e^(-κk) hold 90 % of their sum.

    Solves (1 − q^(r−½)) / (1 − q^n) = 0.9 with q = e^(-κ): between r − 1 and r values, so that rounding
    doesn't change the count.

    Raises:
        AnalysisError: rank < 1, or above what even a flat spectrum of that dimension needs.
    """
    most = math.ceil(MASS * dimension)
    if not 1 <= rank <= most:
        raise AnalysisError(
            f"rank={rank} is outside 1…{most}: in dimension {dimension} even a flat spectrum holds 90 % of "
            f"its sum in {most} values."
        )
    if rank - 0.5 >= MASS * dimension:
        return 0.0
    return float(
        brentq(lambda k: math.expm1(-k * (rank - 0.5)) / math.expm1(-k * dimension) - MASS, 1e-9, 50.0)
    )


@dataclass(frozen=True)
class NuclearInit:
    """`nuclear_init_` for `module.apply`: fills every nn.Linear's weight, and zeroes its bias."""

    rank_or_decay: int | float
    gain: float = 1.0
    generator: torch.Generator | None = None

    def __call__(self, module: nn.Module) -> None:
        """Initialize `module` if it is an nn.Linear, else leave it alone."""
        if isinstance(module, nn.Linear):
            nuclear_init_(module.weight, self.rank_or_decay, gain=self.gain, generator=self.generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


# --- penalty ---------------------------------------------------------------------------------------------


def trace_norm(weight: Tensor, *, method: str = "exact") -> Tensor:
    """‖W‖_* = Σσ as a scalar with a gradient (first order only).

    "exact": LAPACK's SVD; the gradient is U Vᵀ over σ > ε·max(rows, cols)·σ_1 and 0 on the rest, the
    subgradient of smallest norm. O(rows·cols·min(rows, cols)) with a large constant.
    "fast": the eigenvalues λ = σ² of the shorter side's Gram matrix; the gradient is
    (W Wᵀ + δ)^-½ W, δ = 4 ε λ_1, whose singular values are σ/√(σ² + δ): U Vᵀ but for σ of the order of
    2√ε·σ_1 (0.07 % of the largest in float32), where the penalty turns smooth instead of having a kink.

    Args:
        weight: (rows, cols), float16, bfloat16, float32 or float64. Half precision is computed and
            returned in float32 (a sum has no use for 8 bits); the gradient has the weight's dtype.
        method: "exact" or "fast".

    Raises:
        AnalysisError: not a floating-point matrix, or it holds NaN or infinity; an unknown method.
    """
    if method not in ("exact", "fast"):
        raise AnalysisError(f"method={method!r}: expected 'exact' or 'fast'.")
    _check_matrix(weight)
    if not torch.isfinite(weight).all():
        raise AnalysisError(
            f"A weight of shape {tuple(weight.shape)} holds NaN or infinity: training has diverged, or the "
            "checkpoint is damaged. Lower the learning rate, or look at the step before."
        )
    return _TraceNorm.apply(weight, method)


def trace_norm_penalty(weights: Iterable[Tensor], coefficient: float, *, method: str = "fast") -> Tensor:
    """coefficient · Σ ‖W‖_*, to be added to a loss; the arguments as for `trace_norm`.

    Raises:
        AnalysisError: a negative or infinite coefficient, no weights, or what `trace_norm` refuses.
    """
    if not 0 <= coefficient < math.inf:
        raise AnalysisError(f"coefficient={coefficient!r}: expected a finite number, 0 or more.")
    norms = [trace_norm(weight, method=method) for weight in weights]
    if not norms:
        raise AnalysisError("There are no weights to penalize: expected at least one matrix.")
    return coefficient * torch.stack(norms).sum()


class _TraceNorm(torch.autograd.Function):
    """The norm and its gradient together; the gradient is kept for backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, method: str) -> Tensor:
        matrix = weight.detach().to(_working(weight.dtype))
        info = torch.finfo(matrix.dtype)
        if method == "exact":  # U Vᵀ over the non-zero σ
            u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
            polar = (u * (sigma > info.eps * max(matrix.shape) * sigma[0])) @ vh
        else:  # (W Wᵀ + δ)^-½ W by the eigenvalues of the shorter side's Gram matrix
            wide = matrix.shape[0] <= matrix.shape[1]
            short = matrix if wide else matrix.T
            values, vectors = torch.linalg.eigh(short @ short.T)
            sigma = values.clamp(min=0).sqrt()
            shifted = values.clamp(min=0) + (4 * info.eps * values[-1].clamp(min=0) + info.tiny)
            polar = (vectors * shifted.rsqrt()) @ (vectors.T @ short)
            polar = polar if wide else polar.T
        ctx.save_for_backward(polar.to(weight.dtype))
        return sigma.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (polar,) = ctx.saved_tensors
        return grad.to(polar.dtype) * polar, None


def _working(dtype: torch.dtype) -> torch.dtype:
    """The precision to compute in: float64 stays, everything narrower is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_matrix(weight: Tensor) -> None:
    if weight.dim() != 2 or weight.numel() == 0:
        raise AnalysisError(
            f"Expected a matrix with entries, got shape {tuple(weight.shape)}; pass stacks slice by slice."
        )
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise AnalysisError(f"Expected float16, bfloat16, float32 or float64 entries, got {weight.dtype}.")
