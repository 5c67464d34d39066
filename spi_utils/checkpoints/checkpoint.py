"""What a hybrid checkpoint's files hold: which tensors, under which names, and how to read them back.

A 16-bit matrix is one tensor, a quantized one several: codes, scales and the like, as its backend has them
(`backends.py`). Names are those that transformers' own `save_pretrained` writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from spi_utils.checkpoints.backends import BACKENDS, Backend, backend_of
from spi_utils.checkpoints.tensorfile import DTYPES, PIECE, TensorReader
from spi_utils.errors import CheckpointError
from spi_utils.formats import Packed, dequantize, double_quantized, in_dtype, layer_bytes, quantize
from spi_utils.models import Weights, find_recipes, shard_paths
from spi_utils.runs import read_json

# Endings of the tensors that stand beside a packed matrix' codes, and what backends call the codes.
BESIDE = (
    *(".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4"),
    *(".weight_scale", ".weight_shape", ".weight_zero_point"),
)
PACKED = ".weight_packed"
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
    backend: str = "bitsandbytes"
    codes: Mapping[tuple[str, str], Packed] = field(default_factory=dict)  # by guided rounding


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
        if fmt != "16bit":
            rows, cols = shape[::-1] if module in conv1d else shape
            size = layer_bytes(fmt, rows, cols, double_quant=saving.double_quant, dtype=plain(saving.storage))
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
    """What casting the source to `storage` would lose, tensor by tensor; lossless tensors are left out.

    Raises:
        CheckpointError: a tensor of the source holds NaN or infinity.
    """
    casts = []
    for item in items:
        value = weights.read_source(item.name)
        if bad := sum(int((~part.isfinite()).sum()) for part in value.reshape(-1).split(PIECE)):
            raise CheckpointError(
                f"{item.name} holds {bad} values that are NaN or infinite, in the source model itself: no "
                "dtype mends that. Fetch the model again, or ask those who made it."
            )
        if item.name in weights.keep or not needs_cast(weights, item.name, storage):
            continue
        cast = _count_lost(item.name, value, storage)
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
    held = weights.held_dtypes(name)
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
    return in_bfloat16(saving)


def in_bfloat16(saving: Saving) -> Saving:
    """The same, saved in bfloat16, and computed in it too unless another dtype was asked for."""
    compute = torch.bfloat16 if saving.compute == saving.storage else saving.compute
    return replace(saving, storage=torch.bfloat16, compute=compute)


def in_linear_order(value: torch.Tensor, item: Item) -> torch.Tensor:
    """A matrix as (out, in), in which it is quantized."""
    return value.T.contiguous() if item.transposed else value


def file_names(item: Item, weights: Weights, saving: Saving) -> list[str]:
    """What the file calls the tensors of one item."""
    from transformers.core_model_loading import revert_weight_conversion

    empty = torch.empty(weights.shape(item.name), device="meta")
    names = list(revert_weight_conversion(weights.model, {item.name: empty}))
    if item.fmt == "16bit":
        return names
    stem = names[0].removesuffix("weight")
    return [stem + part for part in BACKENDS[saving.backend].suffixes(item.fmt, saving.double_quant)]


def file_tensors(
    value: torch.Tensor, item: Item, weights: Weights, saving: Saving
) -> Iterator[tuple[str, torch.Tensor]]:
    """The file's tensors for one item, with their names in the file."""
    from transformers.core_model_loading import revert_weight_conversion

    if item.fmt == "16bit":
        # A stack of experts becomes one tensor an expert, as published checkpoints have it.
        yield from revert_weight_conversion(weights.model, {item.name: value}).items()
        return
    packed = packed_item(value, item, saving)
    stem = file_names(item, weights, saving)[0].removesuffix(_codes(saving.backend, item.fmt))
    for part, tensor in BACKENDS[saving.backend].parts(packed).items():
        yield stem + part, tensor


def packed_item(value: torch.Tensor, item: Item, saving: Saving) -> Packed:
    """A matrix as it is saved: by the codes that were chosen for it, or rounded to nearest."""
    double = saving.double_quant and item.fmt == "nf4"
    chosen = saving.codes.get((item.module, item.fmt))
    if chosen is None:
        return quantize(in_linear_order(value, item), item.fmt, double_quant=double)
    chosen = in_dtype(chosen, saving.storage).to(saving.device)
    return double_quantized(chosen) if double else chosen


def _codes(backend: str, fmt: str) -> str:
    return BACKENDS[backend].suffixes(fmt, False)[0]


def plain(dtype: torch.dtype) -> str:
    """A dtype's name as configurations write it: "float16"."""
    return str(dtype).removeprefix("torch.")


# --- reading back ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedWeights:
    """A checkpoint's weights by module, one at a time. Iterate for (module, format, tensor)."""

    formats: Mapping[str, str]  # every module with a weight, in model order -> "nf4", …, "16bit"
    model: Any  # on the meta device
    recipes: Mapping[str, Any]
    files: Mapping[str, TensorReader]
    conv1d: frozenset[str]
    backend: Backend | None

    def read(self, module: str) -> torch.Tensor:
        """A module's weight as the saved file has it, in the module's own orientation, on the CPU.

        A quantized one gives its dequantized values in float32; a 16-bit weight comes in its saved dtype.
        """
        if self.formats[module] == "16bit":
            return self.tensor(f"{module}.weight")
        values = dequantize(self.packed(module))
        return values.T.contiguous() if module in self.conv1d else values

    def tensor(self, name: str) -> torch.Tensor:
        """Any tensor that isn't quantized, by the model's own name for it (biases and norms too)."""
        return self.recipes[name].apply(self._read, self.model)[name].contiguous()

    def packed(self, module: str) -> Packed:
        """A quantized module's codes and scales, (out, in)."""
        assert self.backend is not None
        return self.backend.packed(self.formats[module], self.parts(module))

    def parts(self, module: str) -> dict[str, torch.Tensor]:
        """All tensors that the file holds for a quantized module: "weight", "weight.absmax", …"""
        assert self.backend is not None
        stem = self.recipes[f"{module}.weight"].sources[0][1].removesuffix("weight")
        possible = {part for dq in (False, True) for part in self.backend.suffixes(self.formats[module], dq)}
        return {part: self._read(stem + part) for part in sorted(possible) if stem + part in self.files}

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
        CheckpointError: a file is truncated, a tensor that the model needs is in none of them, or another
            program wrote it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = Path(model_dir)
    if model is None:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    quantization = read_json(directory / "config.json", what="configuration").get("quantization_config")
    method = backend_of(quantization)
    backend = None if method is None else BACKENDS[method]
    with ExitStack() as stack:
        files: dict[str, TensorReader] = {}
        for path in shard_paths(directory):
            reader = stack.enter_context(TensorReader(path))
            files.update(dict.fromkeys(reader.keys(), reader))
        held = [name for name in files if not name.endswith(BESIDE)]
        recipes = find_recipes(model, {_weight_name(n): tuple(files[n].entries[n]["shape"]) for n in held})
        stated = None if backend is None else backend.read_formats(quantization or {})
        names = [name for name in model.state_dict() if name in recipes and name.endswith(".weight")]
        formats = {
            name.removesuffix(".weight"): _format_of(name, recipes, files, stated, backend) for name in names
        }
        yield SavedWeights(formats, model, recipes, files, frozenset(conv1d_modules(model)), backend)


def _weight_name(name: str) -> str:
    """The name that a packed matrix' codes would have as a plain weight."""
    return name.removesuffix("_packed") if name.endswith(PACKED) else name


def _format_of(
    name: str,
    recipes: Mapping[str, Any],
    files: Mapping[str, TensorReader],
    stated: Mapping[str, str] | None,
    backend: Backend | None,
) -> str:
    """A weight's format: what config.json states if the file holds its tensors, NF4 if it holds NF4's."""
    if backend is None:
        return "16bit"
    stem = recipes[name].sources[0][1].removesuffix("weight")
    fmt = "nf4" if stated is None else stated.get(name.removesuffix(".weight"), "16bit")
    if fmt == "16bit" or not all(stem + part in files for part in backend.suffixes(fmt, False)):
        return "16bit"
    return fmt
