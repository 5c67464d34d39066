"""An NF4 matrix as bitsandbytes saves it for a `Linear4bit`: codes, absmax, the 16 levels, a JSON blob."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from spi_utils.errors import CheckpointError
from spi_utils.formats import (
    BLOCK,
    NESTED_BLOCK,
    Packed,
    bitsandbytes_state,
    dequantize,
    map_parts,
    nf4_levels,
    one_thread,
)

if TYPE_CHECKING:
    from torch import nn

BLOB = ".quant_state.bitsandbytes__nf4"
CHUNK = 1 << 20  # weights that bitsandbytes quantizes at once: its CPU path makes many float32 copies


def suffixes(fmt: str, double_quant: bool) -> tuple[str, ...]:
    """ "weight", "weight.absmax", …"""
    second = (".nested_absmax", ".nested_quant_map") if double_quant else ()
    return ("weight", *("weight" + part for part in (".absmax", ".quant_map", *second, BLOB)))


def parts(packed: Packed) -> dict[str, torch.Tensor]:
    """The file's tensors of a packed matrix."""
    state = bitsandbytes_state(packed).as_dict(packed=True)
    return {"weight": packed.codes, **{f"weight.{key}": value for key, value in state.items()}}


def packed(fmt: str, held: Mapping[str, torch.Tensor]) -> Packed:
    """A packed matrix from the file's tensors."""
    from bitsandbytes.functional import QuantState

    stats = {key.removeprefix("weight."): value for key, value in held.items()}
    codes = stats.pop("weight")
    state = QuantState.from_dict(stats, device=torch.device("cpu"))
    second = state.state2
    nested = None if second is None else (second.absmax, second.code, state.offset)
    rows, cols = state.shape
    return Packed(fmt, (rows, cols), state.dtype, codes, state.absmax, nested)


def library(weight: torch.Tensor, fmt: str, double_quant: bool) -> dict[str, torch.Tensor]:
    """What bitsandbytes' own functions make of a matrix, in parts: its blocks don't depend on each other."""
    from bitsandbytes import functional

    def quantize_part(part: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return functional.quantize_4bit(part, blocksize=BLOCK, quant_type="nf4")

    made = map_parts(quantize_part, weight.reshape(-1).split(CHUNK))
    state = made[0][1]
    state.absmax = torch.cat([part[1].absmax for part in made])
    state.shape = weight.shape
    if double_quant:
        with one_thread():
            state.offset = state.absmax.mean()
        state.absmax, state.state2 = functional.quantize_blockwise(
            state.absmax - state.offset, blocksize=NESTED_BLOCK
        )
        state.nested = True
    rest = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {"weight": torch.cat([part[0] for part in made]), **rest}


def check_values(packed: Packed) -> None:
    """Refuse codes that bitsandbytes dequantizes to anything but level times absmax."""
    from bitsandbytes import functional

    absmax = packed.scales
    assert absmax is not None
    if packed.nested is not None:
        second, levels, offset = packed.nested
        absmax = functional.dequantize_blockwise(absmax, absmax=second, code=levels, blocksize=NESTED_BLOCK)
        absmax = absmax + offset
    codes = packed.codes.view(-1)
    index = torch.stack([codes >> 4, codes & 15], dim=1).view(-1).int()
    meant = nf4_levels(codes.device).index_select(0, index).view(-1, BLOCK) * absmax[:, None]
    if not torch.equal(dequantize(packed, packed.dtype), meant.view(packed.shape).to(packed.dtype)):
        raise CheckpointError(
            f"bitsandbytes dequantizes a {packed.shape} matrix to other values than were chosen for it. "
            "Please report this with the version of bitsandbytes."
        )


def config(model: nn.Module, formats: Mapping[str, str], double_quant: bool, compute: torch.dtype) -> Any:
    """The `BitsAndBytesConfig` with which stock transformers makes the planned modules `Linear4bit`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_storage=torch.uint8,
        llm_int8_skip_modules=skip_modules(model, formats),
    )


def skip_modules(model: nn.Module, formats: Mapping[str, str]) -> list[str]:
    """Full names of all modules that bitsandbytes would replace and the plan doesn't make NF4.

    Giving any list drops transformers' own, so heads (tied ones too) must stand in it. Names are plain, not
    escaped: other loaders match them as they are.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return [
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and formats.get(name) != "nf4"
    ]
