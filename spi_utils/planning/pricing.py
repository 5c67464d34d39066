"""What a choice of formats costs in bytes: exact for every tensor, estimated for the file's header.

Two bit rates stand on these bytes and are never mixed: `bits_per_weight` counts the whole model (embeddings,
norms and all), `matrix_bits` only the planned matrices, those that a quantizer may touch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from spi_utils.errors import PlanError
from spi_utils.formats import fits, format_row, layer_bytes

# The tensors that a saved file holds for one matrix, as suffixes of its module name: their entries in the
# safetensors header are a real share of a small layer.
TENSORS = {
    "16bit": (".weight",),
    "nf4": (".weight", ".weight.absmax", ".weight.quant_map", ".weight.quant_state.bitsandbytes__nf4"),
    "nf4_dq": (
        ".weight",
        ".weight.absmax",
        ".weight.quant_map",
        ".weight.nested_absmax",
        ".weight.nested_quant_map",
        ".weight.quant_state.bitsandbytes__nf4",
    ),
}
WORDS = {"nf4": "NF4", "int4_g64": "int4", "16bit": "16-bit"}  # others as they are
# compressed-tensors' names, all other formats
PACKED = (".weight_packed", ".weight_scale", ".weight_shape")
ZERO_POINT = ".weight_zero_point"
HEADER_ENTRY = 75  # bytes of one header entry beside its name: dtype, shape, offsets, punctuation
SMALL_TENSORS_PER_BLOCK = 2  # norms: too small to be listed one by one in layers.csv


def check_formats(formats: Sequence[str]) -> tuple[str, ...]:
    """The formats, fewest bits first, without repeats.

    Raises:
        PlanError: an unknown name (with the nearest known one), or fewer than two formats.
    """
    unique = sorted(set(formats), key=nominal_bits)
    if len(unique) < 2:
        raise PlanError(f"a plan chooses between at least two formats; got {', '.join(unique) or 'none'}.")
    return tuple(unique)


def nominal_bits(fmt: str) -> float:
    """A format's bits a weight on a large matrix; PlanError for an unknown format."""
    return format_row(fmt).bits_per_weight


def held_words(formats: Iterable[str]) -> str:
    """Formats as prose names them, fewest bits first: "NF4, int8 and 16-bit"."""
    words = [WORDS.get(fmt, fmt) for fmt in sorted(set(formats), key=nominal_bits)]
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else ""


def payload_bytes(layers: pd.DataFrame, fmt: str, double_quant: bool = False) -> NDArray[np.int64]:
    """Bytes that a saved file holds for each row's tensors in `fmt`, header apart. Shape (rows,).

    Read from the table's `bytes_<fmt>` column where there is one, else computed from the shape. Rows that
    can't be quantized (embeddings, norms, expert stacks), or not in this format (`able`), hold their 16-bit
    size.

    Raises:
        PlanError: the table lacks a quantizable row's size in this format.
    """
    full = 2 * layers["numel"].to_numpy(np.int64)
    if "bytes_16bit" in layers:
        full = layers["bytes_16bit"].fillna(2 * layers["numel"]).to_numpy(np.int64)
    if fmt == "16bit":
        return full
    column = f"bytes_{fmt}_dq" if fmt == "nf4" and double_quant else f"bytes_{fmt}"
    planned = able(layers, fmt)
    if column in layers:
        held = layers[column].to_numpy(float)
        if np.isnan(held[planned]).any():
            name = layers["name"][planned & np.isnan(held)].iloc[0]
            raise PlanError(f"{name}: layers.csv has no {column}. Run notebook 01_analyze again.")
    else:
        shapes = zip(layers["rows"], layers["cols"], planned, strict=True)
        held = np.array(
            [layer_bytes(fmt, int(r), int(c), double_quant=double_quant) if p else 0 for r, c, p in shapes]
        )
    return np.where(planned, held, full).astype(np.int64)


def able(layers: pd.DataFrame, fmt: str) -> NDArray[np.bool_]:
    """Which rows can be held in `fmt`: quantizable, with columns that its groups divide. Shape (rows,)."""
    columns = layers["cols"].to_numpy(np.int64)
    whole = np.array([fits(fmt, int(cols)) for cols in columns], dtype=bool)
    return layers["quantizable"].to_numpy(bool) & whole


def header_bytes(names: Sequence[str], fmt: str, double_quant: bool = False) -> NDArray[np.int64]:
    """Estimated bytes of the safetensors header for each named matrix in `fmt`. Shape (names,)."""
    packed = PACKED if format_row(fmt).symmetric else (*PACKED, ZERO_POINT)
    suffixes = TENSORS.get("nf4_dq" if fmt == "nf4" and double_quant else fmt, packed)
    extra = sum(len(suffix) + HEADER_ENTRY for suffix in suffixes)
    return np.array([len(suffixes) * len(name) + extra for name in names], dtype=np.int64)


def price(layers: pd.DataFrame, formats: Mapping[str, str], double_quant: bool = False) -> dict[str, int]:
    """What a checkpoint with these formats weighs, in bytes.

    Args:
        layers: the layer table, all rows.
        formats: module name -> format; a quantizable layer that is not named is kept in 16-bit.
        double_quant: NF4's absmax values are themselves quantized.

    Returns:
        One entry a format (its planned matrices), `embeddings` (with an untied head), `rest` (norms, biases,
        matrices that no quantizer replaces), `header` (estimated), `total` (their sum), and `total_16bit`,
        the whole model without quantization.

    Raises:
        PlanError: a layer's columns don't divide into its format's groups.
    """
    planned = layers["quantizable"].to_numpy(bool)
    names = layers["name"].to_numpy(str)
    of = np.array([formats.get(name, "16bit") for name in names])
    used = {str(fmt) for fmt in of[planned]} | {"16bit"}
    result = {}
    data, header = fixed_bytes(layers)
    for fmt in sorted(used, key=nominal_bits):
        here = planned & (of == fmt)
        if (here & ~able(layers, fmt)).any():
            row = layers[here & ~able(layers, fmt)].iloc[0]
            raise PlanError(
                f"{row['name']} can't be {fmt}: groups of {format_row(fmt).group} don't divide its "
                f"{row['cols']} columns. Give it a format with smaller groups, int8 or 16bit."
            )
        result[fmt] = int(payload_bytes(layers, fmt, double_quant)[here].sum())
        header += int(header_bytes(names[here], fmt, double_quant).sum())
    full = payload_bytes(layers, "16bit")
    ends = ~planned & layers["role"].isin(("embedding", "head")).to_numpy(bool)
    result["embeddings"] = int(full[ends].sum())
    result["rest"] = data - result["embeddings"]
    result["header"] = header
    result["total"] = sum(result.values())
    result["total_16bit"] = (
        int(full.sum() + header_bytes(names[planned], "16bit").sum()) + fixed_bytes(layers)[1]
    )
    return result


def fixed_bytes(layers: pd.DataFrame) -> tuple[int, int]:
    """`(data, header)` bytes of all that is never planned: embeddings, other matrices, norms, biases."""
    fixed = layers[~layers["quantizable"]]
    typical = len("model.layers.00.post_attention_layernorm.weight") + HEADER_ENTRY
    small = SMALL_TENSORS_PER_BLOCK * layers["depth"].nunique() * typical
    header = int(header_bytes(list(fixed["name"][fixed["rows"] > 0]), "16bit").sum()) + small
    return int(payload_bytes(fixed, "16bit").sum()), header


def bit_rates(layers: pd.DataFrame, formats: Mapping[str, str], double_quant: bool) -> tuple[float, float]:
    """`(bits_per_weight, matrix_bits)` of a plan: over all weights, and over the planned matrices."""
    cost = price(layers, formats, double_quant)
    planned = layers["quantizable"].to_numpy(bool)
    numel = layers["numel"].to_numpy(np.int64)
    fixed = cost["embeddings"] + cost["rest"]
    data = cost["total"] - cost["header"]
    return 8 * data / int(numel.sum()), 8 * (data - fixed) / max(int(numel[planned].sum()), 1)
