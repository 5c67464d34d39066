"""Number formats a weight matrix can be kept in: their exact bytes, and their exact quantize-dequantize.

One row of `FORMATS` per format: how many bytes it takes, how to pack a matrix, how to unpack it, and which
checkpoint writers can hold it. The numbers need no torch; the functions import it when called.

`nf4` is bitsandbytes', bit for bit. A matrix is read row by row in blocks of 64 weights; a block keeps one
float32 absmax, and each weight, divided by it, becomes the index of the nearest of 16 levels, quantiles of a
normal distribution (QLoRA, arXiv 2305.14314).

`int8` and `int4_…` are compressed-tensors': integer codes and a 16-bit scale for each group, which is a row
(int8) or 32, 64 or 128 neighbouring weights of a row (int4). Symmetric formats keep W ≈ scale · code, `_asym`
also a 4-bit zero point, W ≈ scale · (code − zero). Scales are rounded to the storage dtype before the codes
are chosen, so that what a loader computes is exactly what was meant. int4's scales are searched: of a small
grid the one with the least squared error, since clipping a few large weights buys the others a finer step;
`_absmax` scales cover the largest weight, for comparison. No data is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from spi_utils.errors import AnalysisError, PlanError, suggest
from spi_utils.progress import one_thread

if TYPE_CHECKING:
    import torch

    Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # codes, scales, zero points

NF4_DQ = "nf4_dq"  # nf4 with double quantization: a plan says nf4 and `double_quant`
SIZE_TOLERANCE = 0.005  # share of the predicted size of a checkpoint
SIZE_FLOOR = 64_000  # bytes; headers of tiny models are not predicted better than this


@dataclass(frozen=True)
class Format:
    """One row of the table of formats.

    `bits_per_weight` is nominal (large matrices). `writers` names the checkpoint writers that can hold the
    format. `size(row, rows, cols, double_quant, dtype)` is exact, in bytes; `pack(row, weight)` and
    `unpack(packed, dtype)` do the arithmetic. Integer formats have `bits`, a code's width; `group` weights of
    a row share a scale and must divide the columns (None: they need not); `symmetric` ones have no zero
    points; the scales of `searched` ones have the least squared error of `GRID`.
    """

    name: str
    bits_per_weight: float
    writers: frozenset[str]
    size: Callable[[Format, int, int, bool, str], int]
    pack: Callable[[Format, torch.Tensor], Packed]
    unpack: Callable[[Packed, torch.dtype], torch.Tensor]
    bits: int | None = None
    group: int | None = None
    symmetric: bool = True
    searched: bool = False


@dataclass(frozen=True)
class Packed:
    """A quantized matrix: everything that its dequantized values depend on, and nothing else.

    `codes`: nf4 (⌈n/2⌉, 1) uint8, two codes a byte, the first weight in the high half; int4 (rows, cols/2)
    uint8, the first weight in the low half, each code + 8; int8 (rows, cols) int8; 16bit the weight itself.
    `scales`: nf4 a float32 absmax for each block (uint8 codes of it with double quantization), else a scale
    in the weight's dtype for each row (int8) or group (int4, (rows, groups)); `zeros` int8 of the same shape
    where the format is asymmetric. `nested` is double quantization's second level: absmax float32, its 256
    levels, offset.
    """

    fmt: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    codes: torch.Tensor
    scales: torch.Tensor | None = None
    nested: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    zeros: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Packed:
        """The same with every tensor on a device."""
        move = {name: getattr(self, name) for name in ("codes", "scales", "zeros")}
        moved = {name: None if value is None else value.to(device) for name, value in move.items()}
        nested = None if self.nested is None else tuple(part.to(device) for part in self.nested)
        return replace(self, **moved, nested=nested)  # type: ignore[arg-type]


# --- the public functions -------------------------------------------------------------------------------


def format_row(fmt: str) -> Format:
    """The table's row for a format's name; PlanError with the nearest name if there is none."""
    if fmt in FORMATS:
        return FORMATS[fmt]
    raise PlanError(f"Unknown format {fmt!r}; the formats are {', '.join(FORMATS)}.{suggest(fmt, FORMATS)}")


def layer_bytes(fmt: str, rows: int, cols: int, *, double_quant: bool = False, dtype: str = "float16") -> int:
    """Bytes that the saved file's tensors hold for a (rows, cols) matrix, quantization state included.

    Exact, with one exception: with `double_quant` bitsandbytes writes the absmax offset as decimal digits
    whose number depends on the weights; the estimate is then within 10 bytes.
    """
    row = format_row(fmt)
    return row.size(row, rows, cols, double_quant, dtype)


def stored_as(fmt: str, double_quant: bool) -> str:
    """A format as the table's columns and a file's tensors know it: NF4's second quantization is a kind."""
    return NF4_DQ if fmt == "nf4" and double_quant else fmt


def gigabytes(count: float) -> str:
    """Bytes in units of 10⁹ or 10⁶, as prose writes them: "6.41 GB", "205 MB"."""
    return f"{count / 1e9:.2f} GB" if abs(count) >= 999.5e6 else f"{count / 1e6:.3g} MB"


def size_tolerance(planned: int) -> int:
    """How far a checkpoint's files may be from the plan's bytes, in bytes."""
    return max(int(SIZE_TOLERANCE * planned), SIZE_FLOOR)


def fits(fmt: str, cols: int) -> bool:
    """Whether a matrix with this many columns can be held: a format's groups must divide them."""
    group = format_row(fmt).group
    return group is None or cols % group == 0


def quantize(weight: torch.Tensor, fmt: str, *, double_quant: bool = False) -> Packed:
    """Quantize a 2-D float16, bfloat16 or float32 weight (rows = out_features, cols = in_features).

    nf4: codes and absmax are bit-equal to `bitsandbytes.functional.quantize_4bit` on the same device.
    int8, int4: the values are what compressed-tensors decompresses.
    Raises AnalysisError for a wrong shape or dtype, for weights that are not finite, or for columns that the
    format's groups don't divide.
    """
    _check_weight(weight)
    row = format_row(fmt)
    if not fits(fmt, weight.shape[1]):
        raise AnalysisError(
            f"{fmt} shares scales among {row.group} weights of a row; {row.group} doesn't divide the "
            f"{weight.shape[1]} columns of this {tuple(weight.shape)} matrix. Use a smaller group or int8."
        )
    row = format_row(stored_as(fmt, double_quant))
    return row.pack(row, weight)


def dequantize(packed: Packed, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The (rows, cols) matrix that the codes stand for, computed in float32, in `dtype` (default float32)."""
    import torch

    return FORMATS[packed.fmt].unpack(packed, dtype or torch.float32)


def relative_error(weight: torch.Tensor, fmt: str) -> float:
    """‖Q(W) − W‖_F / ‖W‖_F, summed in float64; 0 for an all-zero matrix."""
    import torch

    _check_weight(weight)
    error = total = 0.0
    # Whole rows in multiples of BLOCK: every quantization block lies in one part, so parts are exact.
    step = max(BLOCK, AT_ONCE // weight.shape[1] // BLOCK * BLOCK)
    for start in range(0, weight.shape[0], step):
        part = weight[start : start + step]
        diff = dequantize(quantize(part, fmt)).sub_(part)
        error += torch.linalg.vector_norm(diff, dtype=torch.float64).item() ** 2
        total += torch.linalg.vector_norm(part, dtype=torch.float64).item() ** 2
    return math.sqrt(error / total) if total else 0.0


def in_dtype(packed: Packed, dtype: torch.dtype) -> Packed:
    """The same codes for a checkpoint in another 16-bit dtype; integer formats' scales are rounded to it."""
    if packed.dtype == dtype:
        return packed
    scales = packed.scales
    if scales is not None and packed.fmt not in ("nf4", NF4_DQ):
        scales = scales.to(dtype)
    return replace(packed, dtype=dtype, scales=scales)


def _check_weight(weight: torch.Tensor) -> None:
    kind = str(weight.dtype).removeprefix("torch.")
    if weight.dim() != 2 or weight.numel() == 0 or kind not in ("float16", "bfloat16", "float32"):
        raise AnalysisError(
            "Only a non-empty 2-D weight in float16, bfloat16 or float32 can be quantized; got shape "
            f"{tuple(weight.shape)}, {kind}."
        )


def check_finite(values: torch.Tensor) -> None:
    """AnalysisError unless every value is finite: a weight's, or those of its blocks' absmaxes."""
    if not values.isfinite().all():
        raise AnalysisError(
            "The weight holds NaN or infinity, so it can't be quantized. "
            "Check the checkpoint, or the cast that made it 16-bit."
        )


# --- nf4 ------------------------------------------------------------------------------------------------

BLOCK = 64  # weights that share one absmax
NESTED_BLOCK = 256  # absmaxes that share one second-level absmax (double quantization)
TINY = 1e-38  # bitsandbytes divides by max(absmax, TINY), so that an all-zero block stays zero
AT_ONCE = 1 << 22  # weights whose error is summed at once

# bitsandbytes' levels (functional.get_4bit_type), ascending.
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def nf4_levels(device: torch.device | str = "cpu") -> torch.Tensor:
    """The 16 NF4 levels, float32, ascending."""
    import torch

    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)


def _size_nf4(row: Format, rows: int, cols: int, double_quant: bool, dtype: str) -> int:
    blocks = math.ceil(rows * cols / BLOCK)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": dtype, "shape": [rows, cols]}
    size = math.ceil(rows * cols / 2) + 4 * len(NF4_LEVELS)
    if double_quant or row.name == NF4_DQ:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": 0.0}
        size += blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + 4 * 256
        size += len("0.04123456789012345") - len("0.0")  # a float32's digits, as json writes them
    else:
        size += 4 * blocks
    return size + len(json.dumps(state))


def _pack_nf4(row: Format, weight: torch.Tensor) -> Packed:
    from bitsandbytes import functional

    check_finite(weight)
    codes, state = functional.quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
    return Packed("nf4", tuple(weight.shape), weight.dtype, codes, state.absmax)


def _pack_nf4_dq(row: Format, weight: torch.Tensor) -> Packed:
    """nf4 whose absmaxes are 8-bit codes themselves, as bitsandbytes makes them."""
    from bitsandbytes import functional

    packed = _pack_nf4(row, weight)
    assert packed.scales is not None
    with one_thread():  # the mean's last bit would depend on the number of threads
        offset = packed.scales.mean()
    scales, second = functional.quantize_blockwise(packed.scales - offset, blocksize=NESTED_BLOCK)
    return replace(packed, fmt=NF4_DQ, scales=scales, nested=(second.absmax, second.code, offset))


def bitsandbytes_state(packed: Packed) -> Any:
    """The `bitsandbytes.functional.QuantState` of an nf4 matrix, as bitsandbytes itself would make it."""
    import torch
    from bitsandbytes.functional import QuantState

    offset = second = None
    if packed.nested is not None:
        absmax2, levels, offset = packed.nested
        second = QuantState(absmax=absmax2, code=levels, blocksize=NESTED_BLOCK, dtype=torch.float32)
    code, shape = nf4_levels(packed.codes.device), torch.Size(packed.shape)
    return QuantState(packed.scales, shape, code, BLOCK, "nf4", packed.dtype, offset, second)


def _unpack_nf4(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """bitsandbytes' own dequantization: level · absmax in float32, then rounded to `dtype`."""
    import torch
    from bitsandbytes import functional

    state = bitsandbytes_state(packed)
    state.dtype = dtype
    numel = packed.shape[0] * packed.shape[1]
    if packed.shape[1] % BLOCK:
        # Blocks run on across rows, but bitsandbytes' CPU path (0.50) begins one at every row: values of
        # widths that 64 doesn't divide come out wrong. As a single row they are right.
        state.shape = torch.Size((1, numel + numel % 2))
    values = functional.dequantize_4bit(packed.codes, state)
    return values.reshape(-1)[:numel].reshape(packed.shape)


# --- int8 and int4 ---------------------------------------------------------------------------------------

SHAPE_BYTES = 16  # compressed-tensors keeps every packed matrix's shape, two int64
LOWEST, HIGHEST = -8, 7  # int4's codes
# Shares of the group's range that the search tries; on Gaussian weights the best lie between .7 and 1.
GRID = tuple(round(1.04 - 0.04 * step, 2) for step in range(14))  # 1.04 … 0.52
SEARCHED_AT_ONCE = 1 << 16  # weights: a candidate's scratch arrays fit a CPU's cache


def _size_integers(row: Format, rows: int, cols: int, double_quant: bool, dtype: str) -> int:
    """Codes in int32 words along a row, scales, zero points in words along the column, the shape."""
    assert row.bits is not None
    groups = math.ceil(cols / (row.group or cols))
    zeros = 0 if row.symmetric else 4 * math.ceil(rows / 8) * groups
    scale = 4 if dtype == "float32" else 2
    return 4 * rows * math.ceil(cols * row.bits / 32) + scale * rows * groups + zeros + SHAPE_BYTES


def _pack_integers(row: Format, weight: torch.Tensor) -> Packed:
    import torch

    rows, cols = weight.shape
    group, dtype, device = row.group or cols, weight.dtype, weight.device
    check_finite(weight)
    # few rows at once on a CPU, for its cache; many on a GPU, to fill it
    step = max(1, (SEARCHED_AT_ONCE if device.type == "cpu" else 256 * SEARCHED_AT_ONCE) // cols)
    made: list[Triple] = []
    for rows_here in weight.split(step):
        part = rows_here.float().reshape(-1, group)
        made.append(_searched(part, row, dtype) if row.searched else _rounded(part, row, 1.0, dtype))
    code, scales = torch.cat([one[0] for one in made]), torch.cat([one[1] for one in made])
    zeros = None
    if not row.symmetric:
        zeros = torch.cat([zero for *_, zero in made if zero is not None]).to(torch.int8).view(rows, -1)
    if row.bits == 4:
        pairs = (code - LOWEST).to(torch.uint8).view(-1, 2)
        codes = (pairs[:, 0] | (pairs[:, 1] << 4)).view(rows, -1)
    else:
        codes = code.to(torch.int8).view(rows, cols)
    scales = scales.view(rows, -1) if row.group else scales
    return Packed(row.name, tuple(weight.shape), dtype, codes, scales, zeros=zeros)


def _rounded(part: torch.Tensor, row: Format, share: float, dtype: torch.dtype) -> Triple:
    """Codes (G, group) float32, scales (G,) in `dtype` and zero points (G,) float32, for a share of each
    group's range. Codes round half to even.

    int8: ± absmax over 127 steps a side (LLM.int8, arXiv 2208.07339); symmetric int4: ± absmax over 15 steps;
    asymmetric int4: [min, max], with zero in it, over 15.
    """
    steps = HIGHEST - LOWEST
    if row.symmetric:
        low, high = (-127, 127) if row.bits == 8 else (LOWEST, HIGHEST)
        peak = part.abs().amax(dim=1)
        scale = _stored(peak / 127 if row.bits == 8 else peak.mul_(share * 2 / steps), dtype)
        return part.div(scale.float()[:, None]).round_().clamp_(low, high), scale, None
    smallest = part.amin(dim=1).clamp_(max=0).mul_(share)
    largest = part.amax(dim=1).clamp_(min=0).mul_(share)
    scale = _stored((largest - smallest) / steps, dtype)
    step = scale.float()
    zero = (LOWEST - smallest / step).round_().clamp_(LOWEST, HIGHEST)
    code = part.div(step[:, None]).add_(zero[:, None]).round_().clamp_(LOWEST, HIGHEST)
    return code, scale, zero


def _searched(part: torch.Tensor, row: Format, dtype: torch.dtype) -> Triple:
    """For each group (row of `part`) the share of `GRID` with the least squared error; ties: the first."""
    import torch

    def squared_error(code: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        shifted = code if zero is None else code - zero[:, None]
        return (shifted * scale.float()[:, None]).sub_(part).square_().sum(dim=1)

    best = _rounded(part, row, GRID[0], dtype)
    least = squared_error(*best)
    for share in GRID[1:]:
        other = _rounded(part, row, share, dtype)
        error = squared_error(*other)
        better = error < least
        least = torch.where(better, error, least)
        code = torch.where(better[:, None], other[0], best[0])
        scale = torch.where(better, other[1], best[1])
        zero = None if row.symmetric else torch.where(better, other[2], best[2])  # type: ignore[arg-type]
        best = code, scale, zero
    return best


def _stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales as the file holds them; 1 where that would be 0, so that such a group becomes zeros."""
    held = scale.to(dtype)
    return held.masked_fill_(held == 0, 1)


def _unpack_integers(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """scale · (code − zero) in float32; exact: 7 bits (or 5 with a zero point) times at most 11."""
    import torch

    assert packed.scales is not None
    scales = packed.scales.float().view(packed.shape[0], -1)  # (rows, groups)
    code = packed.codes.float()
    if packed.codes.dtype == torch.uint8:
        code = torch.stack([packed.codes & 15, packed.codes >> 4], dim=-1).float() + LOWEST
    code = code.view(*scales.shape, -1)  # (rows, groups, group)
    if packed.zeros is not None:
        code -= packed.zeros.float()[..., None]
    return code.mul_(scales[..., None]).flatten(1).to(dtype)


# --- the table -------------------------------------------------------------------------------------------

_BNB, _CT = frozenset({"bitsandbytes"}), frozenset({"compressed-tensors"})
_INTEGERS = (_CT, _size_integers, _pack_integers, _unpack_integers)
_ROWS = [
    Format(
        "16bit",
        16.0,
        _BNB | _CT,
        size=lambda row, rows, cols, double_quant, dtype: 2 * rows * cols,
        pack=lambda row, weight: Packed("16bit", tuple(weight.shape), weight.dtype, weight),
        unpack=lambda packed, dtype: packed.codes.to(dtype, copy=True),
    ),
    Format("nf4", 4.5, _BNB, _size_nf4, _pack_nf4, _unpack_nf4),
    Format(NF4_DQ, 4.127, _BNB, _size_nf4, _pack_nf4_dq, _unpack_nf4),
    Format("int8", 8.0, *_INTEGERS, bits=8),
]
_ROWS += [
    Format(
        f"int4_g{group}{kind}",
        4 + (20 if kind == "_asym" else 16) / group,
        *(*_INTEGERS, 4, group, kind != "_asym", kind != "_absmax"),
    )
    for kind in ("", "_asym", "_absmax")
    for group in (128, 64, 32)
]
FORMATS: dict[str, Format] = {row.name: row for row in _ROWS}
