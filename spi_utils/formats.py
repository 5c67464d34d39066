"""Number formats a weight matrix can be kept in: their exact bytes, and their exact quantize-dequantize.

One row of `FORMATS` per format. The numbers need no torch; the functions import it when called.

A new format is one row: its size in bytes, how to pack a matrix, how to unpack it, and which checkpoint
writers can hold it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from spi_utils.checkpoints.integers import int4_codes, int4_values, int8_codes, int8_values
from spi_utils.checkpoints.nf4 import (
    BLOCK,
    CHUNK,
    NF4_LEVELS,
    check_finite,
    nf4_codes,
    nf4_levels,
    one_thread,
)
from spi_utils.errors import AnalysisError, PlanError

if TYPE_CHECKING:
    import torch

SIZE_TOLERANCE = 0.005  # share of the predicted size of a checkpoint
SIZE_FLOOR = 64_000  # bytes; headers of tiny models are not predicted better than this
NESTED_BLOCK = 256  # absmaxes that share one second-level absmax (double quantization)


@dataclass(frozen=True)
class Format:
    """One row of the table of formats.

    `bits_per_weight` is nominal (large matrices); `size(rows, cols, double_quant, dtype)` is exact, in bytes.
    `writers` names the checkpoint writers that can hold the format. `pack` and `unpack` do the arithmetic.
    `group` must divide a matrix's columns, and `bits` is the code's width (None: not an integer format);
    `symmetric` formats have no zero points.
    """

    name: str
    bits_per_weight: float
    writers: frozenset[str]
    size: Callable[[int, int, bool, str], int]
    pack: Callable[[torch.Tensor, bool], Packed]
    unpack: Callable[[Packed, torch.dtype], torch.Tensor]
    bits: int | None = None
    group: int | None = None
    symmetric: bool = True


@dataclass(frozen=True)
class Packed:
    """A quantized matrix: everything that its dequantized values depend on, and nothing else.

    `codes` are uint8 (two 4-bit codes a byte) for nf4 and int4, int8 (rows, cols) for int8, the weight itself
    for 16bit. `scales` are a float32 absmax for each block (nf4; uint8 codes of it with double quantization),
    or a scale in the weight's dtype for each row (int8) or group (int4), with the groups' `zeros` where the
    format is asymmetric. `nested` holds double quantization's second level: absmax float32, its 256 levels,
    offset.
    """

    fmt: str
    shape: tuple[int, int]
    dtype: torch.dtype
    codes: torch.Tensor
    scales: torch.Tensor | None = None
    nested: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    zeros: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Packed:
        """The same with every tensor on a device."""
        scales = None if self.scales is None else self.scales.to(device)
        zeros = None if self.zeros is None else self.zeros.to(device)
        nested = None if self.nested is None else tuple(part.to(device) for part in self.nested)
        moved = replace(self, codes=self.codes.to(device), scales=scales, zeros=zeros)
        return replace(moved, nested=nested)  # type: ignore[arg-type]


# --- the public functions -------------------------------------------------------------------------------


def format_row(fmt: str) -> Format:
    """The table's row for a format's name; PlanError with the nearest name if there is none."""
    if fmt in FORMATS:
        return FORMATS[fmt]
    near = get_close_matches(fmt, FORMATS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise PlanError(f"Unknown format {fmt!r}; the formats are {', '.join(FORMATS)}.{hint}")


def layer_bytes(fmt: str, rows: int, cols: int, *, double_quant: bool = False, dtype: str = "float16") -> int:
    """Bytes that the saved file's tensors hold for a (rows, cols) matrix, quantization state included.

    Exact, with one exception: with `double_quant` bitsandbytes writes the absmax offset as decimal digits
    whose number depends on the weights; the estimate is then within 10 bytes.
    """
    return format_row(fmt).size(rows, cols, double_quant, dtype)


def gigabytes(count: float) -> str:
    """Bytes in units of 10⁹ or 10⁶, as prose writes them: "6.41 GB", "205 MB"."""
    return f"{count / 1e9:.2f} GB" if abs(count) >= 999.5e6 else f"{count / 1e6:.3g} MB"


def size_tolerance(planned: int) -> int:
    """How far a checkpoint's files may be from the plan's bytes, in bytes."""
    return max(int(SIZE_TOLERANCE * planned), SIZE_FLOOR)


def quantize(weight: torch.Tensor, fmt: str, *, double_quant: bool = False) -> Packed:
    """Quantize a 2-D float16, bfloat16 or float32 weight (rows = out_features, cols = in_features).

    nf4: codes and absmax are bit-equal to `bitsandbytes.functional.quantize_4bit` on the same device.
    int8, int4: see `checkpoints.integers`; the values are what compressed-tensors decompresses.
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
    return row.pack(weight, double_quant)


def dequantize(packed: Packed, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The (rows, cols) matrix that the codes stand for, computed in float32, in `dtype` (default float32)."""
    import torch

    return FORMATS[packed.fmt].unpack(packed, dtype or torch.float32)


def fits(fmt: str, cols: int) -> bool:
    """Whether a matrix with this many columns can be held: a format's groups must divide them."""
    group = format_row(fmt).group
    return group is None or cols % group == 0


def relative_error(weight: torch.Tensor, fmt: str) -> float:
    """‖Q(W) − W‖_F / ‖W‖_F, summed in float64; 0 for an all-zero matrix."""
    import torch

    _check_weight(weight)
    error = total = 0.0
    # Whole rows in multiples of BLOCK: every quantization block lies in one part, so parts are exact.
    step = max(BLOCK, 16 * CHUNK // weight.shape[1] // BLOCK * BLOCK)
    for start in range(0, weight.shape[0], step):
        part = weight[start : start + step]
        diff = dequantize(quantize(part, fmt)).sub_(part)
        error += torch.linalg.vector_norm(diff, dtype=torch.float64).item() ** 2
        total += torch.linalg.vector_norm(part, dtype=torch.float64).item() ** 2
    return math.sqrt(error / total) if total else 0.0


def bitsandbytes_state(packed: Packed) -> Any:
    """The `bitsandbytes.functional.QuantState` of an nf4 matrix, as bitsandbytes itself would make it."""
    import torch
    from bitsandbytes.functional import QuantState

    if packed.nested is None:
        offset, second = None, None
    else:
        absmax2, levels, offset = packed.nested
        second = QuantState(absmax=absmax2, code=levels, blocksize=NESTED_BLOCK, dtype=torch.float32)
    return QuantState(
        absmax=packed.scales,
        shape=torch.Size(packed.shape),
        code=nf4_levels(packed.codes.device),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=packed.dtype,
        offset=offset,
        state2=second,
    )


def _check_weight(weight: torch.Tensor) -> None:
    import torch

    if weight.dim() != 2 or weight.numel() == 0:
        raise AnalysisError(f"Only a non-empty 2-D weight can be quantized; got shape {tuple(weight.shape)}.")
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise AnalysisError(
            f"Only float16, bfloat16 and float32 weights can be quantized; got {weight.dtype}."
        )


# --- 16bit ----------------------------------------------------------------------------------------------


def _size_16bit(rows: int, cols: int, double_quant: bool, dtype: str) -> int:
    return 2 * rows * cols


def _pack_16bit(weight: torch.Tensor, double_quant: bool) -> Packed:
    return Packed("16bit", _shape(weight), weight.dtype, weight)


def _unpack_16bit(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    return packed.codes.to(dtype, copy=True)


# --- int8 and int4 ---------------------------------------------------------------------------------------

SHAPE_BYTES = 16  # compressed-tensors keeps every packed matrix's shape, two int64


def _size_int8(rows: int, cols: int, double_quant: bool, dtype: str) -> int:
    return 4 * rows * math.ceil(cols / 4) + _itemsize(dtype) * rows + SHAPE_BYTES


def _pack_int8(weight: torch.Tensor, double_quant: bool) -> Packed:
    return Packed("int8", _shape(weight), weight.dtype, *int8_codes(weight))


def _unpack_int8(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    assert packed.scales is not None
    return int8_values(packed.codes, packed.scales).to(dtype)


def _unpack_int4(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    assert packed.scales is not None
    return int4_values(packed.codes, packed.scales, packed.zeros).to(dtype)


def _int4(group: int, *, symmetric: bool, search: bool) -> Format:
    """The row of one int4 format: searched scales by default, `_absmax` and `_asym` say otherwise."""
    name = f"int4_g{group}" + ("" if symmetric else "_asym") + ("" if search else "_absmax")

    def size(rows: int, cols: int, double_quant: bool, dtype: str) -> int:
        groups = math.ceil(cols / group)
        zeros = 0 if symmetric else 4 * math.ceil(rows / 8) * groups
        return 4 * rows * math.ceil(cols / 8) + _itemsize(dtype) * rows * groups + zeros + SHAPE_BYTES

    def pack(weight: torch.Tensor, double_quant: bool) -> Packed:
        codes, scales, zeros = int4_codes(weight, group, symmetric=symmetric, search=search)
        return Packed(name, _shape(weight), weight.dtype, codes, scales, zeros=zeros)

    bits = 4 + (16 if symmetric else 20) / group
    return Format(name, bits, _MIXED, size, pack, _unpack_int4, 4, group, symmetric)


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


# --- nf4 ------------------------------------------------------------------------------------------------


def _size_nf4(rows: int, cols: int, double_quant: bool, dtype: str) -> int:
    blocks = math.ceil(rows * cols / BLOCK)
    state: dict[str, object] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": dtype,
        "shape": [rows, cols],
    }
    size = math.ceil(rows * cols / 2) + 4 * len(NF4_LEVELS)
    if double_quant:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": 0.0}
        size += blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + 4 * 256
        size += len("0.04123456789012345") - len("0.0")  # a float32's digits, as json writes them
    else:
        size += 4 * blocks
    return size + len(json.dumps(state))


def _pack_nf4(weight: torch.Tensor, double_quant: bool) -> Packed:
    from bitsandbytes import functional

    if weight.device.type != "cpu":
        codes, state = functional.quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
        absmax = state.absmax
        check_finite(absmax)
    else:
        codes, absmax = nf4_codes(weight)
    packed = Packed("nf4", _shape(weight), weight.dtype, codes, absmax)
    return double_quantized(packed) if double_quant else packed


def in_dtype(packed: Packed, dtype: torch.dtype) -> Packed:
    """The same codes for a checkpoint in another 16-bit dtype; integer formats' scales are rounded to it."""
    if packed.dtype == dtype:
        return packed
    scales = packed.scales if packed.fmt == "nf4" or packed.scales is None else packed.scales.to(dtype)
    return replace(packed, dtype=dtype, scales=scales)


def double_quantized(packed: Packed) -> Packed:
    """An nf4 matrix whose absmaxes are 8-bit codes themselves, as bitsandbytes makes them."""
    from bitsandbytes import functional

    assert packed.scales is not None
    with one_thread():  # the mean's last bit would depend on the number of threads
        offset = packed.scales.mean()
    scales, second = functional.quantize_blockwise(packed.scales - offset, blocksize=NESTED_BLOCK)
    return replace(packed, scales=scales, nested=(second.absmax, second.code, offset))


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


def _shape(weight: torch.Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


_BOTH = frozenset({"bitsandbytes", "compressed-tensors"})
_STOCK = frozenset({"bitsandbytes"})
_MIXED = frozenset({"compressed-tensors"})

FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("16bit", 16.0, _BOTH, _size_16bit, _pack_16bit, _unpack_16bit),
        Format("nf4", 4.5, _STOCK, _size_nf4, _pack_nf4, _unpack_nf4),
        Format("int8", 8.0, _MIXED, _size_int8, _pack_int8, _unpack_int8, 8),
        *(
            _int4(group, symmetric=symmetric, search=search)
            for search in (True, False)
            for symmetric in (True, False)
            for group in (128, 64, 32)
        ),
    )
}
