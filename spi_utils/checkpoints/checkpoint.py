"""What a hybrid checkpoint's files hold: which tensors, under which names, and how to read them back.

A 16-bit matrix is one tensor. An NF4 matrix is what bitsandbytes saves for a `Linear4bit`: packed codes,
absmax, the 16 levels, and a small JSON blob. Names are those that transformers' own `save_pretrained` writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from spi_utils.checkpoints.tensorfile import DTYPES, PIECE, TensorReader
from spi_utils.errors import CheckpointError
from spi_utils.formats import Packed, bitsandbytes_state, dequantize, layer_bytes, quantize
from spi_utils.models import Weights
from spi_utils.source.weights import find_recipes, shard_paths

BLOB = ".quant_state.bitsandbytes__nf4"
SUFFIXES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", BLOB)
OVERFLOW = ("keep_bf16", "error")


@dataclass(frozen=True)
class Item:
    """One tensor of the model and the format it is saved in; `nbytes` is what that takes."""

    name: str
    fmt: str
    transposed: bool  # GPT-2's Conv1D keeps (in, out); bitsandbytes quantizes and saves (out, in)
    nbytes: int

    @property
    def module(self) -> str:
        """The module that owns the tensor."""
        return self.name.removesuffix(".weight")


@dataclass(frozen=True)
class Saving:
    """How everything is saved: dtypes, double quantization, what to do on overflow, and where to compute."""

    storage: torch.dtype
    compute: torch.dtype
    double_quant: bool
    overflow: str
    device: torch.device


@dataclass(frozen=True)
class Cast:
    """What the cast of one tensor to another dtype would lose."""

    name: str
    overflow: int  # finite values that would become infinite
    underflow: int  # values that would become zero
    largest: float  # magnitude


def list_items(weights: Weights, formats: Mapping[str, str], saving: Saving) -> list[Item]:
    """All tensors of a model in order, each with its format (16-bit where `formats` doesn't name it)."""
    conv1d = conv1d_modules(weights.model)
    items = []
    for name in weights.names:
        module = name.removesuffix(".weight")
        shape = weights.shape(name)
        fmt = formats.get(module, "16bit")
        if fmt == "nf4":
            rows, cols = shape[::-1] if module in conv1d else shape
            size = layer_bytes(
                "nf4", rows, cols, double_quant=saving.double_quant, dtype=plain(saving.storage)
            )
        else:
            size = math.prod(shape) * (4 if name in weights.keep else 2)
        items.append(Item(name, fmt, module in conv1d, size))
    return items


def conv1d_modules(model: Any) -> set[str]:
    """Names of the modules that keep their weight as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return {name for name, module in model.named_modules() if isinstance(module, Conv1D)}


def read_saved(weights: Weights, item: Item, saving: Saving) -> torch.Tensor:
    """A source tensor on the device, in the dtype that it is saved in."""
    value = weights.read_source(item.name).to(saving.device)
    if not value.is_floating_point() or item.name in weights.keep:
        return value
    return _cast(value, saving.storage)


def _cast(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor that nobody else uses, in another dtype; between 16-bit types it keeps its memory."""
    if value.dtype == dtype or value.element_size() != dtype.itemsize:
        return value.to(dtype)
    made = value.view(dtype)
    for source, target in zip(value.view(-1).split(PIECE), made.view(-1).split(PIECE), strict=True):
        target.copy_(source.to(dtype))
    return made


def scan_casts(weights: Weights, items: Sequence[Item], storage: torch.dtype) -> list[Cast]:
    """What casting the source to `storage` would lose, tensor by tensor; lossless tensors are left out."""
    casts = []
    for item in items:
        if item.name in weights.keep or not needs_cast(weights, item.name, storage):
            continue
        cast = _count_lost(item.name, weights.read_source(item.name), storage)
        if cast.overflow or cast.underflow:
            casts.append(cast)
    return casts


def _count_lost(name: str, value: torch.Tensor, storage: torch.dtype) -> Cast:
    over = under = 0
    largest = 0.0
    for part in value.view(-1).split(PIECE):
        cast = part.to(storage)
        over += int((cast.isinf() & part.isfinite()).sum())
        under += int(((cast == 0) & (part != 0)).sum())
        largest = max(largest, part.abs().max().item())
    return Cast(name, over, under, largest)


def needs_cast(weights: Weights, name: str, storage: torch.dtype) -> bool:
    """Whether the files hold a tensor in another floating dtype than `storage`; nothing is read."""
    held = {weights.files[part].entries[part]["dtype"] for _, part in weights.recipes[name].sources}
    return any(DTYPES[dtype].is_floating_point and DTYPES[dtype] != storage for dtype in held)


def settle(saving: Saving, casts: Sequence[Cast]) -> Saving:
    """The dtypes to save with, once it is known what float16 would lose.

    One tensor in bfloat16 or float32 among float16 ones is not possible, so one that overflows moves all.
    Stock loaders keep a quantized checkpoint's dtypes as saved, and then refuse to multiply a float16
    activation by another dtype; a checkpoint without NF4 layers they cast to float16, where the value becomes
    infinite. `test_stock_loaders_cannot_run_one_tensor_in_another_dtype` shows both, for matrices and norms.

    Raises:
        CheckpointError: a finite value would become infinite, and `overflow` is "error".
    """
    over = [cast for cast in casts if cast.overflow]
    if not over:
        return saving
    if saving.overflow == "error":
        worst = max(over, key=lambda cast: cast.largest)
        raise CheckpointError(
            f"{len(over)} tensors hold values too large for {plain(saving.storage)}, such as {worst.name}: "
            f"{worst.overflow} values, the largest {worst.largest:.3g}. Use overflow='keep_bf16', or keep "
            "the checkpoint's own dtype with storage_dtype='auto'."
        )
    compute = torch.bfloat16 if saving.compute == saving.storage else saving.compute
    return replace(saving, storage=torch.bfloat16, compute=compute)


def in_linear_order(value: torch.Tensor, item: Item) -> torch.Tensor:
    """A matrix as (out, in), in which bitsandbytes quantizes it."""
    return value.T.contiguous() if item.transposed else value


def file_names(item: Item, weights: Weights, double_quant: bool) -> list[str]:
    """What the file calls the tensors of one item."""
    from transformers.core_model_loading import revert_weight_conversion

    empty = torch.empty(weights.shape(item.name), device="meta")
    names = list(revert_weight_conversion(weights.model, {item.name: empty}))
    if item.fmt != "nf4":
        return names
    (name,) = names
    second = (".nested_absmax", ".nested_quant_map") if double_quant else ()
    return [name, *(name + suffix for suffix in (".absmax", ".quant_map", *second, BLOB))]


def file_tensors(
    value: torch.Tensor, item: Item, weights: Weights, double_quant: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """The file's tensors for one item, with their names in the file."""
    from transformers.core_model_loading import revert_weight_conversion

    if item.fmt != "nf4":
        # A stack of experts becomes one tensor an expert, as published checkpoints have it.
        yield from revert_weight_conversion(weights.model, {item.name: value}).items()
        return
    name = file_names(item, weights, double_quant)[0]
    packed = quantize(in_linear_order(value, item), "nf4", double_quant=double_quant)
    yield name, packed.codes
    for suffix, tensor in bitsandbytes_state(packed).as_dict(packed=True).items():
        yield f"{name}.{suffix}", tensor


def plain(dtype: torch.dtype) -> str:
    """A dtype's name as configurations write it: "float16"."""
    return str(dtype).removeprefix("torch.")


# --- reading back ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedWeights:
    """A checkpoint's weights by module, one at a time. Iterate for (module, format, tensor)."""

    formats: Mapping[str, str]  # every module with a weight, in model order -> "nf4" | "16bit"
    model: Any  # on the meta device
    recipes: Mapping[str, Any]
    files: Mapping[str, TensorReader]
    conv1d: frozenset[str]

    def read(self, module: str) -> torch.Tensor:
        """A module's weight as the saved file has it, in the module's own orientation, on the CPU.

        NF4 gives bitsandbytes' dequantized values in float32; a 16-bit weight comes in its saved dtype.
        """
        if self.formats[module] == "16bit":
            return self.tensor(f"{module}.weight")
        values = dequantize(self.packed(module))
        return values.T.contiguous() if module in self.conv1d else values

    def tensor(self, name: str) -> torch.Tensor:
        """Any tensor that isn't quantized, by the model's own name for it (biases and norms too)."""
        return self.recipes[name].apply(self._read, self.model)[name].contiguous()

    def packed(self, module: str) -> Packed:
        """An NF4 module's codes and scales, (out, in)."""
        from bitsandbytes.functional import QuantState

        stats = {key.removeprefix("weight."): value for key, value in self.parts(module).items()}
        codes = stats.pop("weight")
        state = QuantState.from_dict(stats, device=torch.device("cpu"))
        second = state.state2
        nested = None if second is None else (second.absmax, second.code, state.offset)
        rows, cols = state.shape
        return Packed("nf4", (rows, cols), state.dtype, codes, state.absmax, nested)

    def parts(self, module: str) -> dict[str, torch.Tensor]:
        """All tensors that the file holds for an NF4 module: "weight", "weight.absmax", …"""
        name = self.recipes[f"{module}.weight"].sources[0][1]
        found = {"weight": self._read(name)}
        for suffix in SUFFIXES:
            if name + suffix in self.files:
                found["weight" + suffix] = self._read(name + suffix)
        return found

    def __iter__(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        for module, fmt in self.formats.items():
            yield module, fmt, self.read(module)

    def _read(self, name: str) -> torch.Tensor:
        return self.files[name].get_tensor(name)


@contextmanager
def saved_weights(
    model_dir: str | Path, *, trust_remote_code: bool = False, model: Any = None
) -> Iterator[SavedWeights]:
    """Open a checkpoint that `quantize` wrote.

    Args:
        model: the model on the meta device, where the caller has it; else it is built from config.json.

    Raises:
        CheckpointError: a file is truncated, or a tensor that the model needs is in none of them.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = Path(model_dir)
    if model is None:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    with ExitStack() as stack:
        files: dict[str, TensorReader] = {}
        for path in shard_paths(directory):
            reader = stack.enter_context(TensorReader(path))
            files.update(dict.fromkeys(reader.keys(), reader))
        recipes = find_recipes(model, {n: files[n] for n in files if not n.endswith(SUFFIXES)})
        names = [name for name in model.state_dict() if name in recipes and name.endswith(".weight")]
        formats = {
            name.removesuffix(".weight"): "nf4" if recipes[name].sources[0][1] + BLOB in files else "16bit"
            for name in names
        }
        yield SavedWeights(formats, model, recipes, files, frozenset(conv1d_modules(model)))
