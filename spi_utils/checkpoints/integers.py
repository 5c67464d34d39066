"""int8 and int4 as the compressed-tensors format stores them: integer codes, a 16-bit scale for each group.

A group is a row (int8) or 32, 64 or 128 neighbouring weights of a row (int4). Symmetric formats keep
W ≈ scale · code; asymmetric ones also keep a 4-bit zero point, W ≈ scale · (code − zero). Scales are rounded
to the storage dtype before the codes are chosen, so that what a loader computes is exactly what was meant.

`absmax` scales cover the largest weight of a group. `search` scales come from a small grid below that and
minimise the group's squared error: clipping a few large weights buys the others a finer step. No data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from spi_utils.checkpoints.nf4 import check_finite, map_parts

if TYPE_CHECKING:
    import torch

Triple = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor | None"]

LOWEST, HIGHEST = -8, 7  # int4's codes
FULL_RANGE = HIGHEST - LOWEST
# Shares of the group's range that the search tries; on Gaussian weights the best lie between .7 and 1.
GRID = tuple(round(1.04 - 0.04 * step, 2) for step in range(14))  # 1.04 … 0.52
CHUNK = 1 << 16  # weights searched at once: a candidate's scratch arrays fit a CPU's cache


def int8_codes(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rows, cols) weight -> int8 codes (rows, cols) and scales (rows,) in the weight's dtype.

    The scale is the row's absmax / 127, as LLM.int8 (arXiv 2208.07339) has it; codes round half to even.
    AnalysisError if a weight isn't finite.
    """
    import torch

    rows = len(weight)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(rows, dtype=weight.dtype, device=weight.device)

    def fill(start: int) -> None:
        part = weight[start : start + step].float()
        peak = part.abs().amax(dim=1)
        check_finite(peak)
        scale = _stored(peak / 127, weight.dtype)
        scales[start : start + step] = scale
        codes[start : start + step] = (
            part.div(scale.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        )

    step = _rows_at_once(weight)
    map_parts(fill, range(0, rows, step))
    return codes, scales


def int8_values(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """scale · code in float32: (rows, cols). Exact: 7 bits times at most 11."""
    return codes.float().mul_(scales.float()[:, None])


def int4_codes(weight: torch.Tensor, group: int, *, symmetric: bool, search: bool) -> Triple:
    """A (rows, cols) weight -> packed codes, scales and zero points.

    Args:
        group: weights that share a scale; divides cols.
        symmetric: no zero point.
        search: the scale with the least squared error of the grid, else the one that covers the absmax.

    Returns:
        Codes (rows, cols / 2) uint8, two a byte, the first in the low half, each code + 8 (the bytes of
        compressed-tensors' `weight_packed`); scales (rows, cols / group) in the weight's dtype; zeros
        (rows, cols / group) int8, or None. AnalysisError if a weight isn't finite.
    """
    import torch

    rows, cols = weight.shape
    device = weight.device
    codes = torch.empty((rows, cols // 2), dtype=torch.uint8, device=device)
    scales = torch.empty((rows, cols // group), dtype=weight.dtype, device=device)
    zeros = None if symmetric else torch.empty(scales.shape, dtype=torch.int8, device=device)
    fit = _symmetric if symmetric else _asymmetric

    def fill(start: int) -> None:
        part = weight[start : start + step].float().view(-1, group)
        check_finite(part.abs().amax(dim=1))
        code, scale, zero = _best(part, fit, GRID if search else (1.0,), weight.dtype)
        pairs = (code - LOWEST).to(torch.uint8).view(-1, cols // 2, 2)
        codes[start : start + step] = pairs[..., 0] | (pairs[..., 1] << 4)
        scales[start : start + step] = scale.view(-1, cols // group)
        if zeros is not None and zero is not None:
            zeros[start : start + step] = zero.to(torch.int8).view(-1, cols // group)

    step = _rows_at_once(weight)
    map_parts(fill, range(0, rows, step))
    return codes, scales, zeros


def int4_values(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    """scale · (code − zero) in float32: (rows, cols). Exact: 5 bits times at most 11."""
    import torch

    pairs = torch.stack([codes & 15, codes >> 4], dim=-1)  # (rows, cols / 2, 2)
    code = pairs.view(*scales.shape, -1).float() + LOWEST  # (rows, groups, group)
    if zeros is not None:
        code -= zeros.float()[..., None]
    return code.mul_(scales.float()[..., None]).flatten(1)


# --- choosing a scale ------------------------------------------------------------------------------------

Fit = Callable[["torch.Tensor", float, "torch.dtype"], Triple]


def _best(part: torch.Tensor, fit: Fit, grid: tuple[float, ...], dtype: torch.dtype) -> Triple:
    """For each group (row of `part`), the candidate with the least squared error; ties: the first."""
    import torch

    code, scale, zero = fit(part, grid[0], dtype)
    if len(grid) == 1:
        return code, scale, zero
    least = _error(part, code, scale, zero)
    for share in grid[1:]:
        other, other_scale, other_zero = fit(part, share, dtype)
        error = _error(part, other, other_scale, other_zero)
        better = error < least
        least = torch.where(better, error, least)
        code = torch.where(better[:, None], other, code)
        scale = torch.where(better, other_scale, scale)
        zero = None if zero is None else torch.where(better, other_zero, zero)  # type: ignore[arg-type]
    return code, scale, zero


def _symmetric(part: torch.Tensor, share: float, dtype: torch.dtype) -> Triple:
    """Codes (G, group) float32, scales (G,) in `dtype`, for a range of ± share · absmax over 15 steps."""
    scale = _stored(part.abs().amax(dim=1).mul_(share * 2 / FULL_RANGE), dtype)
    code = part.div(scale.float()[:, None]).round_().clamp_(LOWEST, HIGHEST)
    return code, scale, None


def _asymmetric(part: torch.Tensor, share: float, dtype: torch.dtype) -> Triple:
    """The same with zero points (G,) float32, for a range of share · [min, max] that holds zero."""
    low = part.amin(dim=1).clamp_(max=0).mul_(share)
    high = part.amax(dim=1).clamp_(min=0).mul_(share)
    scale = _stored((high - low) / FULL_RANGE, dtype)
    step = scale.float()
    zero = (LOWEST - low / step).round_().clamp_(LOWEST, HIGHEST)
    code = part.div(step[:, None]).add_(zero[:, None]).round_().clamp_(LOWEST, HIGHEST)
    return code, scale, zero


def _error(
    part: torch.Tensor, code: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None
) -> torch.Tensor:
    shifted = code if zero is None else code - zero[:, None]
    return (shifted * scale.float()[:, None]).sub_(part).square_().sum(dim=1)


def _rows_at_once(weight: torch.Tensor) -> int:
    """How many rows are worked on together: few on a CPU, for its cache; many on a GPU, to fill it."""
    return max(1, (CHUNK if weight.device.type == "cpu" else 256 * CHUNK) // weight.shape[1])


def _stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales as the file holds them; 1 where that would be 0, so that such a group becomes zeros."""
    held = scale.to(dtype)
    return held.masked_fill_(held == 0, 1)
