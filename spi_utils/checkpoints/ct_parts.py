"""An int4 or int8 matrix as the compressed-tensors format saves it (`pack-quantized`), which vLLM serves.

Codes are packed into int32 words along a row, beside a 16-bit scale for each group or row, the matrix' shape
and, for asymmetric formats, zero points packed along the column. Each format of a plan is one group of the
configuration, its targets the modules' full names; every other linear module is in `ignore`, heads too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from spi_utils.errors import CheckpointError
from spi_utils.formats import Packed, dequantize, format_row, quantize

if TYPE_CHECKING:
    from torch import nn

LAYOUT = "pack-quantized"
MARLIN_ROWS, MARLIN_COLS = 64, 128  # vLLM's Marlin kernel wants multiples of these


def suffixes(fmt: str, double_quant: bool) -> tuple[str, ...]:
    """ "weight_packed", "weight_scale", …"""
    zero = () if format_row(fmt).symmetric else ("weight_zero_point",)
    return ("weight_packed", "weight_scale", "weight_shape", *zero)


def parts(packed: Packed) -> dict[str, torch.Tensor]:
    """The file's tensors of a packed matrix."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    assert packed.scales is not None
    rows, cols = packed.shape
    made = {
        "weight_packed": _words(packed),
        "weight_scale": packed.scales.view(rows, -1),
        "weight_shape": torch.tensor([rows, cols]),
    }
    if packed.zeros is not None:
        made["weight_zero_point"] = pack_to_int32(packed.zeros, 4, packed_dim=0)
    return made


def _words(packed: Packed) -> torch.Tensor:
    """int32 words (rows, ⌈cols · bits / 32⌉), the first code in the lowest bits, each code as code + 2^(b-1).

    int4's bytes hold two codes in that order already; four bytes are a word on a little-endian machine, which
    every one is that torch has wheels for.
    """
    codes = packed.codes
    if packed.fmt == "int8":
        codes = (codes.to(torch.int16) + 128).to(torch.uint8)
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 4))
    return codes.contiguous().view(torch.int32)


def packed(fmt: str, held: Mapping[str, torch.Tensor]) -> Packed:
    """A packed matrix from the file's tensors."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    rows, cols = (int(size) for size in held["weight_shape"])
    codes = held["weight_packed"].contiguous().view(torch.uint8)
    scales = held["weight_scale"]
    zeros = held.get("weight_zero_point")
    if fmt == "int8":
        codes = (codes[:, :cols].to(torch.int16) - 128).to(torch.int8)
        return Packed(fmt, (rows, cols), scales.dtype, codes, scales.view(rows))
    if zeros is not None:
        zeros = unpack_from_int32(zeros, 4, torch.Size(scales.shape), packed_dim=0)
    return Packed(fmt, (rows, cols), scales.dtype, codes, scales, zeros=zeros)


def library(weight: torch.Tensor, fmt: str, double_quant: bool) -> dict[str, torch.Tensor]:
    """The tensors that a weight should have become, proven by compressed-tensors' own decompression.

    Codes and scales are ours (no library searches them); what they decompress to must be bit-equal to our own
    dequantized values, or CheckpointError.
    """
    made = quantize(weight, fmt)
    check_values(made)
    return {name: tensor.cpu() for name, tensor in parts(made).items()}


def check_values(packed: Packed) -> None:
    """Refuse codes that compressed-tensors decompresses to other values than ours."""
    from compressed_tensors.compressors import PackedQuantizationCompressor

    held = {name: tensor.cpu() for name, tensor in parts(packed).items()}
    theirs = PackedQuantizationCompressor.decompress(held, scheme(packed.fmt, []))["weight"]
    if not torch.equal(theirs, dequantize(packed, packed.dtype).cpu()):
        raise CheckpointError(
            f"compressed-tensors decompresses {packed.fmt} to other values than were chosen for a "
            f"{packed.shape} matrix. Please report this with the version of compressed-tensors."
        )


def scheme(fmt: str, targets: list[str]) -> Any:
    """compressed-tensors' `QuantizationScheme` of a format: weights only."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    row = format_row(fmt)
    how = {"strategy": "group", "group_size": row.group} if row.group else {"strategy": "channel"}
    weights = QuantizationArgs(num_bits=row.bits, type="int", symmetric=row.symmetric, **how)
    return QuantizationScheme(targets=targets, weights=weights, format=LAYOUT)


def config(
    model: nn.Module, formats: Mapping[str, str], double_quant: bool, compute: torch.dtype
) -> dict[str, Any]:
    """The `quantization_config` of config.json: a group a format, targets by full module name."""
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    used = sorted({fmt for fmt in formats.values() if fmt != "16bit"})
    groups = {fmt: scheme(fmt, [name for name in linear if formats.get(name) == fmt]) for fmt in used}
    made = QuantizationConfig(
        config_groups=groups,
        format=LAYOUT,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[name for name in linear if formats.get(name, "16bit") == "16bit"],
    )
    return made.model_dump(mode="json") | {"version": compressed_tensors.__version__}


def read_formats(held: Mapping[str, Any]) -> dict[str, str]:
    """{module: format} of a configuration that `config` wrote.

    Raises:
        CheckpointError: a group whose name is no format of ours: another program's checkpoint.
    """
    formats: dict[str, str] = {}
    for name, group in held["config_groups"].items():
        row = format_row(name) if name in _ours() else None
        weights = group["weights"]
        said = (weights["num_bits"], weights.get("group_size"), weights.get("symmetric", True))
        if row is None or said != (row.bits, row.group, row.symmetric):
            raise CheckpointError(
                f"config.json: the group {name!r} of compressed-tensors is none of {', '.join(_ours())}: "
                "this checkpoint was not written by notebook 03_quantize."
            )
        formats |= dict.fromkeys(group["targets"], name)
    return formats


def _ours() -> list[str]:
    from spi_utils.formats import FORMATS

    return [name for name, row in FORMATS.items() if row.bits is not None]


def serving_notes(formats: Mapping[str, str], shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """What vLLM would object to in a plan, by the rules of its loader (compressed_tensors/utils.py,
    compressed_tensors_wNa16.py, marlin_utils.py; read in its public source, not run here).

    Layers that vLLM merges must share a format. Shapes that Marlin doesn't take go to slower kernels, or
    nowhere on old GPUs. `shapes` {module: (rows, cols)}.
    """
    from spi_utils.plan import fused_groups

    names = list(formats)
    torn = [
        [names[index] for index in group]
        for group in fused_groups(names)
        if len({formats[names[index]] for index in group}) > 1
    ]
    odd = [
        name
        for name, fmt in formats.items()
        if fmt != "16bit" and (shapes[name][0] % MARLIN_ROWS or shapes[name][1] % MARLIN_COLS)
    ]
    notes = []
    if torn:
        notes.append(
            f"vLLM merges layers that have different formats here and will refuse the checkpoint: "
            f"{len(torn)} groups, such as {', '.join(torn[0])}. Plan with group='fused'."
        )
    if odd:
        notes.append(
            f"{len(odd)} quantized layers, such as {odd[0]}, have rows that {MARLIN_ROWS} or columns that "
            f"{MARLIN_COLS} doesn't divide: vLLM's Marlin kernel pads them or leaves them to slower ones."
        )
    return notes
