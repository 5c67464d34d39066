"""Guided rounding: 4-bit codes and scales that move a model's predictions least, in the same stock file.

bitsandbytes and compressed-tensors round every weight to the nearest level of its block's scale. But any
scale and any code is a legal file. To second order an error ΔW of one layer costs

    E KL = ½ E[(Σ_t g_t · ΔW x_t)²]  ∝  tr(ΔW H ΔWᵀ)   with   H = Σ_t ‖g_t‖² x_t x_tᵀ

where x_t is the layer's input and g_t the gradient of the sequence's log-likelihood at its output (products
of positions dropped, the output's components treated alike: GuidedQuant, arXiv 2505.07004, one group). GPTQ
(arXiv 2210.17323) minimises that column by column: what a column's rounding breaks, the columns to its right
mend; then each code is chosen again, given all others. Both come from one pass over text that the model
writes itself, so no data is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from spi_utils.errors import AnalysisError, RunError
from spi_utils.formats import (
    BLOCK,
    HIGHEST,
    LOWEST,
    NESTED_BLOCK,
    NF4_DQ,
    TINY,
    Packed,
    check_finite,
    format_row,
    nf4_levels,
    quantize,
)
from spi_utils.runs import write_tensors

DAMPING = 0.05  # of the mean diagonal, added to it; raised tenfold, twice at most, where that isn't enough
SWEEPS = 1  # of coordinate descent: the first takes 4 to 6 % off the KL, the next three 1 to 3 % more
# stored(rows, place, scale); without `rows` inside a part
Stored = Callable[..., torch.Tensor]
# Of the widest scale, the one whose levels span ± a block's absmax: 1 … .76, of either sign, then one FINE
# step to each side of the best.
SHARES = tuple(sign * round(1 - 0.04 * step, 2) for sign in (1, -1) for step in range(7))
FINE = 0.02


def guidable(fmt: str, cols: int) -> bool:
    """Whether guided rounding makes codes for a format and a width; others are rounded to nearest."""
    row = format_row(fmt)
    if fmt in ("nf4", NF4_DQ):
        return cols % BLOCK == 0
    return row.bits == 4 and row.symmetric and row.group is not None and cols % row.group == 0


def guided(
    weight: torch.Tensor,
    moments: Sequence[torch.Tensor],
    fmt: str,
    *,
    parts: Sequence[int] = (),
    damping: float = DAMPING,
    sweeps: int = SWEEPS,
) -> tuple[Packed, float | None]:
    """Round a weight so that tr(ΔW H ΔWᵀ) is small.

    Args:
        weight: (out, in), float16, bfloat16 or float32; the format's block (nf4: 64) divides in.
        moments: H, (in, in), symmetric, any scale: one, or one for each of `parts`.
        fmt: "nf4", "nf4_dq" or a symmetric int4 format.
        parts: rows of each part of a fused projection; all are one part if empty.
        damping: share of H's mean diagonal that is added to it.
        sweeps: of coordinate descent after the first pass.

    Returns:
        The packed matrix, and the damping that was needed, of all parts the most; None where an H can't be
        used (not finite, zero, or singular at a hundredfold damping): that part takes nearest levels, and
        the caller says so.

    Raises:
        AnalysisError: a format or a width that can't be rounded so, or a weight that isn't finite.
    """
    group, levels, stored = _grid(fmt, weight)
    if weight.shape[1] % group:
        raise AnalysisError(
            f"{fmt} has blocks of {group} weights, which don't divide {weight.shape[1]} columns."
        )
    check_finite(weight.float().abs().amax(dim=1))
    made: list[tuple[torch.Tensor, torch.Tensor, float | None]] = []
    start = 0
    for part, moment in zip(weight.split(list(parts) or len(weight)), moments, strict=True):
        rows = slice(start, start := start + len(part))
        made.append(_rounded(part.float(), moment, group, levels, partial(stored, rows), damping, sweeps))
    index, scales = (torch.cat([one[i] for one in made]) for i in (0, 1))  # type: ignore[misc]
    needed = [used for *_, used in made if used is not None]
    return _packed(fmt, weight, index, scales), max(needed) if len(needed) == len(made) else None


def _rounded(
    weight: torch.Tensor,
    moment: torch.Tensor,
    group: int,
    levels: torch.Tensor,
    stored: Stored,
    damping: float,
    sweeps: int,
) -> tuple[torch.Tensor, torch.Tensor, float | None]:
    """Each weight's level (rows, cols) uint8, each block's scale (rows, blocks), and the damping used."""
    rows, cols = weight.shape
    middles = (levels[1:] + levels[:-1]) / 2
    w = weight.clone()
    upper, used = _inverse_factor(moment, damping)
    index = torch.empty(cols, rows, dtype=torch.int32, device=w.device)
    scales = torch.empty(rows, cols // group, device=w.device)
    for place, first in enumerate(range(0, cols, group)):
        block = slice(first, first + group)
        corner = upper[block, block]
        scale = _best_scale(w[:, block], corner.diagonal(), levels, middles, partial(stored, place))
        x = (w[:, block] / scale[:, None]).T.contiguous()  # (group, rows), in units of the scale
        errors = torch.empty_like(x)
        for j in range(group):
            index[first + j] = torch.bucketize(x[j], middles, out_int32=True)
            errors[j] = (x[j] - levels[index[first + j]]) / corner[j, j]
            x[j + 1 :].addr_(corner[j, j + 1 :], errors[j], alpha=-1)
        w[:, first + group :] -= (errors * scale).T @ upper[block, first + group :]
        scales[:, place] = scale
    if used is not None:
        h = (moment / moment.diagonal().mean()).float()
        h.diagonal().add_(used)
        for _ in range(sweeps):
            _sweep(weight, h, levels, middles, stored, scales, index)
    return index.T.to(torch.uint8), scales, used


def _sweep(
    w: torch.Tensor,
    h: torch.Tensor,
    levels: torch.Tensor,
    middles: torch.Tensor,
    stored: Stored,
    scales: torch.Tensor,
    index: torch.Tensor,
) -> None:
    """Coordinate descent, in place: in each block the best scale given all codes, then each code in turn."""
    group = len(h) // scales.shape[1]
    error = levels[index].T * scales.repeat_interleave(group, dim=1) - w
    for place, first in enumerate(range(0, len(h), group)):
        block = slice(first, first + group)
        old, corner, codes = scales[:, place].clone(), h[block, block], levels[index[block]].T
        pull = error @ h[:, block]  # half the gradient, (rows, group)
        bent = codes @ corner
        wanted = stored(place, old - (pull * codes).sum(dim=1) / (bent * codes).sum(dim=1))
        near = (wanted / old - 1).abs() < 0.5  # not where all codes are zero, or a step would turn the sign
        scale = scales[:, place] = torch.where(near, wanted, old)
        pull = ((pull + bent * (scale - old)[:, None]) / scale[:, None]).T.contiguous()
        for j in range(group):
            held = levels[index[first + j]]
            index[first + j] = torch.bucketize(held - pull[j] / corner[j, j], middles, out_int32=True)
            pull.addr_(corner[j], levels[index[first + j]] - held)
        error[:, block] = (levels[index[block]] * scale).T - w[:, block]


def _inverse_factor(moment: torch.Tensor, damping: float) -> tuple[torch.Tensor, float | None]:
    """The upper Cholesky factor of the damped moment's inverse, float32, and the damping."""
    h = moment.double() if moment.device.type == "cpu" else moment.float()  # float64 is slow on small GPUs
    mean = h.diagonal().mean()
    if bool(h.isfinite().all()) and mean > 0:
        for used in (damping, 10 * damping, 100 * damping):
            damped = h / mean + used * torch.eye(len(h), dtype=h.dtype, device=h.device)
            factor, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                inverse = torch.cholesky_inverse(factor)
                upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
                if not failed:
                    return upper.float(), used
    return torch.eye(len(h), device=h.device), None  # no feedback: nearest levels, searched scales


def _best_scale(
    block: torch.Tensor,
    diagonal: torch.Tensor,
    levels: torch.Tensor,
    middles: torch.Tensor,
    stored: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """For each row of a (rows, group) block the scale with the least weighted error, 1/U_jj²: of either sign,
    since the levels are not symmetric and a block's larger side may want the finer half."""
    widest = block.abs().amax(dim=1) * 2 / (levels[-1] - levels[0])
    weights = diagonal.square().reciprocal()

    def best(scales: list[torch.Tensor]) -> torch.Tensor:
        errors = []
        for scale in (stored(one)[:, None] for one in scales):
            values = levels[torch.bucketize(block / scale, middles, out_int32=True)] * scale
            errors.append(values.sub_(block).square_() @ weights)
        return torch.stack(scales).gather(0, torch.stack(errors).argmin(dim=0, keepdim=True))[0]

    coarse = best([widest * share for share in SHARES])
    return stored(best([coarse, coarse - FINE * widest, coarse + FINE * widest]))


def _grid(fmt: str, weight: torch.Tensor) -> tuple[int, torch.Tensor, Stored]:
    """A format's block, its levels in units of the scale, and `stored(rows, place, scale)`: the scales of a
    block's rows as the file can hold them, float32."""
    if fmt == "nf4":
        return BLOCK, nf4_levels(weight.device), lambda _, __, scale: scale.where(scale.abs() > TINY, TINY)
    if fmt == NF4_DQ:  # of each block the values that its second level, fixed by the plain weights, can hold
        second, code, offset = _second_level(weight)
        middles = (code[1:] + code[:-1]) / 2

        def representable(rows: slice, place: int, scale: torch.Tensor) -> torch.Tensor:
            step = second[rows, place]
            return code[torch.bucketize((scale - offset) / step, middles)] * step + offset

        return BLOCK, nf4_levels(weight.device), representable
    row = format_row(fmt)
    if row.bits != 4 or not row.symmetric or row.group is None:
        raise AnalysisError(f"{fmt} has no guided rounding; nf4, nf4_dq and the symmetric int4 formats have.")
    levels = torch.arange(LOWEST, HIGHEST + 1, dtype=torch.float32, device=weight.device)

    def rounded(_: slice, __: int, scale: torch.Tensor) -> torch.Tensor:
        held = scale.to(weight.dtype)
        return held.masked_fill_(held == 0, 1).float()  # 1 for a block of zeros

    return row.group, levels, rounded


def _second_level(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Double quantization's absmax of each block (rows, blocks), its 256 levels, ascending, its offset."""
    nested = quantize(weight, NF4_DQ).nested
    assert nested is not None
    absmax, code, offset = nested
    blocks = weight.shape[1] // BLOCK
    held = absmax.repeat_interleave(NESTED_BLOCK)[: len(weight) * blocks].view(-1, blocks)
    return held.clamp(min=TINY), code, offset


def _packed(fmt: str, weight: torch.Tensor, index: torch.Tensor, scales: torch.Tensor) -> Packed:
    """The codes in the bytes of the format: nf4's first weight in a byte's high half, int4's in the low."""
    shape = (weight.shape[0], weight.shape[1])
    pairs = index.contiguous().view(shape[0], -1, 2)
    if fmt not in ("nf4", NF4_DQ):
        codes = pairs[..., 0] | (pairs[..., 1] << 4)
        return Packed(fmt, shape, weight.dtype, codes, scales.to(weight.dtype))
    codes = ((pairs[..., 0] << 4) | pairs[..., 1]).reshape(-1, 1)
    if fmt == "nf4":
        return Packed(fmt, shape, weight.dtype, codes, scales.reshape(-1))
    second, code, offset = _second_level(weight)
    held = torch.bucketize((scales - offset) / second, (code[1:] + code[:-1]) / 2).to(torch.uint8)
    return replace(quantize(weight, fmt), codes=codes, scales=held.reshape(-1))


# --- codes on disk ----------------------------------------------------------------------------------------


class Codes(Mapping[tuple[str, str], Packed]):
    """The codes in a folder, by (layer, format); read one at a time.

    Raises:
        RunError: a file in it is cut or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.files: dict[tuple[str, str], tuple[Path, list[int], str]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            for name, fmt, shape, dtype in read_mark(path)[1]:
                self.files[name, fmt] = (path, shape, dtype)

    def __getitem__(self, key: tuple[str, str]) -> Packed:
        path, (rows, cols), dtype = self.files[key]
        with _opened(path) as file:
            parts = [file.get_tensor("|".join((*key, part))).clone() for part in _PARTS[: _held(key[1])]]
        codes, scales, *nested = parts
        return Packed(key[1], (rows, cols), getattr(torch, dtype), codes, scales, tuple(nested) or None)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


_PARTS = ("codes", "scales", "absmax", "levels", "offset")  # the last three are double quantization's


def _held(fmt: str) -> int:
    return len(_PARTS) if fmt == NF4_DQ else 2


def write_codes(path: Path, chosen: Mapping[tuple[str, str], Packed], mark: str) -> None:
    """Write codes and scales by (layer, format), atomically; `mark` says what they were made from."""
    tensors: dict[str, torch.Tensor] = {}
    rows = []
    for (name, fmt), packed in chosen.items():
        assert packed.scales is not None
        held = (packed.codes, packed.scales, *(packed.nested or ()))
        tensors |= {f"{name}|{fmt}|{part}": one.cpu() for part, one in zip(_PARTS, held, strict=False)}
        rows.append([name, fmt, list(packed.shape), str(packed.dtype).removeprefix("torch.")])
    # one entry: safetensors writes several in an order that differs from process to process
    write_tensors(path, tensors, made=json.dumps({"mark": mark, "packed": rows}))


def read_mark(path: Path) -> tuple[str, list[Any]]:
    """What a file of codes was made from, and [layer, format, shape, dtype] of each matrix in it.

    Raises:
        RunError: cut or damaged.
    """
    with _opened(path) as file:
        held = json.loads((file.metadata() or {})["made"])
        return held["mark"], held["packed"]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise RunError(
            f"{path} is cut or damaged ({error}): the codes that guided rounding chose. Run notebook "
            "01_analyze again; it makes this block's again."
        ) from error
