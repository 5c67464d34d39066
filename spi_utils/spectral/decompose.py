"""A weight matrix -> its singular values, by the eigenvalues of its Gram matrix.

In float64 they give the same alpha as a float64 SVD to 1e-12, for a quarter of the arithmetic. What won by
measurement: numpy's `matmul`, which sees the symmetric product and calls ?syrk, and OpenBLAS' ?syevd
(lapack.py).
What did not:

- the drivers ?syev and ?syevr: the same without vectors; torch's MKL: slower up to M = 2,000;
- numpy's `eigvalsh`: no float32 inside; scipy's `eigh`: keeps the GIL, so no layers side by side;
- LAPACK's two-stage tridiagonalisation: 4 to 10 times slower in OpenBLAS' build;
- stacks of equal shapes: LAPACK takes one at a time, and the Python around it is under 1 ms a matrix;
- BLAS threads instead of a layer a core: on 2 cores a third less throughput at M = 576, a tenth at 2,560.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from spi_utils.errors import AnalysisError
from spi_utils.spectral.lapack import symmetric_eigenvalues
from spi_utils.spectral.nulls import BLOCK, choose_blocks

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
GRAM_ENTRIES = 1 << 23  # of a weight that become float64 at a time: 64 MiB


@dataclass(frozen=True)
class Moments:
    """Of the entries of a weight: mean, variance (population), excess kurtosis, largest minus smallest."""

    mean: float
    variance: float
    kurtosis: float
    span: float


NO_MOMENTS = Moments(np.nan, np.nan, np.nan, np.nan)


def checked(weight: torch.Tensor | np.ndarray) -> torch.Tensor:
    """The weight as a floating-point matrix with entries, or an error that says what it is instead."""
    matrix = (
        torch.from_numpy(np.ascontiguousarray(weight)) if isinstance(weight, np.ndarray) else weight.detach()
    )
    found = f"shape {tuple(matrix.shape)}, {str(matrix.dtype).removeprefix('torch.')}"
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise AnalysisError(
            f"Expected a matrix with at least one entry, got {found}. Pass stacks slice by slice."
        )
    if matrix.dtype not in FLOATS:
        raise AnalysisError(
            f"Expected float16, bfloat16, float32 or float64 entries, got {found}. Integer and 8-bit codes "
            "mean nothing without their scales: dequantize the checkpoint first."
        )
    return matrix


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
    noise = (
        count * np.finfo(np.float64).eps if precision == "float64" else count**0.5 * np.finfo(np.float32).eps
    )
    with np.errstate(invalid="ignore"):
        kept = np.where(values <= noise * values[-1], 0.0, values)
        return np.ascontiguousarray(np.sqrt(kept)[::-1]), moments


def _host_eigenvalues(matrix: torch.Tensor, precision: str) -> tuple[np.ndarray, Moments]:
    """Ascending eigenvalues of the Gram matrix, summed over slices: the weight is never whole in float64."""
    tall, short = matrix.shape[0] >= matrix.shape[1], min(matrix.shape)
    step = max(1, GRAM_ENTRIES // short)
    shift = float(matrix[0].double().mean())
    gram = sums = None
    for first in range(0, max(matrix.shape), step):
        part = matrix[first : first + step] if tall else matrix[:, first : first + step]
        piece = part.to(getattr(torch, precision)).contiguous().numpy()
        part_sums = _power_sums(piece.reshape(-1), shift)
        # numpy sees that both factors are one array, and computes half of the symmetric product (syrk).
        product = piece.T @ piece if tall else piece @ piece.T
        sums = part_sums if sums is None else sums + part_sums
        gram = product if gram is None else np.add(gram, product, out=gram)
    assert gram is not None and sums is not None  # a checked matrix has entries
    if not (np.isfinite(gram).all() and np.isfinite(sums).all()):
        return np.full(short, np.nan), NO_MOMENTS
    low, high = torch.aminmax(matrix)
    moments = _moments(sums, shift, matrix.numel(), float(high) - float(low))
    return symmetric_eigenvalues(gram).astype(np.float64), moments


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


def block_eigenvalues(matrix: torch.Tensor, *, precision: str = "float64", seed: int = 0) -> np.ndarray:
    """Eigenvalues of the 128 × 128 blocks that FARMS pools (blocks, 128); empty where a side is under 128."""
    corners = choose_blocks(*matrix.shape, seed=seed)
    if len(corners) == 0:
        return np.empty((0, BLOCK))
    blocks = torch.stack([matrix[row : row + BLOCK, col : col + BLOCK] for row, col in corners])
    # On the host whatever the device: a GPU spends most of such small solves in launching them.
    stack = blocks.cpu().to(getattr(torch, precision)).numpy()
    values = symmetric_eigenvalues(stack @ stack.transpose(0, 2, 1)).astype(np.float64)
    return np.maximum(values, 0.0)
