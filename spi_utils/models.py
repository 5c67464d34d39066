"""A model's weight matrices, and the model as a whole.

Matrices are listed from the model built on the meta device, so their names are those that transformers will
match later. Where a model comes from is in `sources`; how its weights are read one at a time, in `weights`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spi_utils.checkpoints.wide import widen
from spi_utils.errors import ModelError
from spi_utils.source.sources import ModelSource, first_line, has_capable_gpu, resolve
from spi_utils.source.weights import Weights, open_weights, tied_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Layer",
    "ModelSource",
    "Weights",
    "list_layers",
    "load_model",
    "load_tokenizer",
    "open_weights",
    "resolve",
    "resolve_device",
    "resolve_dtype",
]

REST = "(norms, biases and the rest)"


@dataclass(frozen=True)
class Layer:
    """One weight matrix of a model (or one stack of experts, the embedding, the head, or all the rest).

    Args:
        name: the module's full name as transformers builds the model, without ".weight".
        type: its last part ("down_proj"); with the parent where a model has two of them ("mlp.c_proj").
        depth: index of its block, -1 outside the blocks.
        role: "linear", "conv1d" (GPT-2's transposed linear), "experts", "embedding", "head" or "other".
        rows: out_features (0 for "other").
        cols: in_features (0 for "other").
        numel: number of weights; over all layers these add up to the model's parameters.
        quantizable: bitsandbytes can replace it, and it is neither an output nor outside the text decoder.
    """

    name: str
    type: str
    depth: int
    role: str
    rows: int
    cols: int
    numel: int
    quantizable: bool


# --- its layers ------------------------------------------------------------------------------------------


def build_on_meta(source: ModelSource) -> PreTrainedModel:
    """The model's modules without weights, as `AutoModelForCausalLM` builds them.

    Raises:
        ModelError: transformers can't build it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source.directory, trust_remote_code=source.trust_remote_code)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{source.id}: transformers can't build this model: {first_line(error)}") from error
    return model.eval()


def list_layers(source: ModelSource) -> list[Layer]:
    """Every weight matrix in model order, then one entry for all other parameters.

    Raises:
        ModelError: the model has no linear layer.
    """
    model = build_on_meta(source)
    layers = list(_matrices(model))
    if not any(layer.quantizable for layer in layers):
        raise ModelError(f"{source.id}: no linear layer that could be quantized.")
    tied = tied_names(model)
    total = sum(p.numel() for name, p in model.named_parameters(remove_duplicate=False) if name not in tied)
    rest = total - sum(layer.numel for layer in layers)
    return [*_name_types(layers), Layer(REST, "other", -1, "other", 0, 0, rest, False)]


def _matrices(model: PreTrainedModel) -> Iterator[Layer]:
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    decoder = _decoder_prefix(model)
    tied = tied_names(model)
    for name, module in model.named_modules():
        if f"{name}.weight" in tied:
            continue
        depth = _depth(name)
        if module is head:
            yield _layer(name, depth, "head", module.weight, False)
        elif isinstance(module, nn.Embedding):
            yield _layer(name, depth, "embedding", module.weight, False)
        elif isinstance(module, Conv1D):
            yield _layer(name, depth, "conv1d", module.weight.T, type(module) is Conv1D)
        elif isinstance(module, nn.Linear):
            # bitsandbytes replaces nn.Linear itself, never a subclass
            plain = type(module) is nn.Linear
            yield _layer(name, depth, "linear", module.weight, plain and name.startswith(decoder))
        else:
            for local, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3 and "experts" in f"{name}.{local}":
                    yield _layer(f"{name}.{local}", depth, "experts", parameter, False)


def _layer(name: str, depth: int, role: str, weight: torch.Tensor, quantizable: bool) -> Layer:
    rows, cols = weight.shape[-2:]
    return Layer(name, name.rsplit(".", 1)[-1], depth, role, rows, cols, weight.numel(), quantizable)


def _decoder_prefix(model: PreTrainedModel) -> str:
    """Name of the text decoder inside a multimodal model, "" for a plain one."""
    if model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    return next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")


def _depth(name: str) -> int:
    numbers = re.findall(r"\.(\d+)\.", f".{name}.")
    return int(numbers[0]) if numbers else -1


def _name_types(layers: list[Layer]) -> list[Layer]:
    """Put the parent before a leaf name that stands for two things (GPT-2's attn.c_proj, mlp.c_proj)."""
    parents: dict[str, set[str]] = defaultdict(set)
    for layer in layers:
        parents[layer.type].add(layer.name.split(".")[-2] if "." in layer.name else "")
    ambiguous = {leaf for leaf, found in parents.items() if len({p for p in found if not p.isdigit()}) > 1}
    return [
        Layer(**{**vars(layer), "type": ".".join(layer.name.split(".")[-2:])})
        if layer.type in ambiguous
        else layer
        for layer in layers
    ]


# --- whole models ----------------------------------------------------------------------------------------


def load_model(source: ModelSource, *, device: torch.device | str, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model for inference: weights in the storage dtype first, then in the compute dtype.

    Args:
        device: where it goes; on CUDA each tensor goes there straight from the file.
        dtype: compute dtype; in float16 all but the matrix products is float32 (`checkpoints.wide`).

    Raises:
        ModelError: not enough memory, or tensors missing.
    """
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.directory,
            dtype=getattr(torch, source.storage_dtype),
            device_map={"": str(device)},
            trust_remote_code=source.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
        model, info = loaded[0].to(dtype), loaded[1]
    except torch.cuda.OutOfMemoryError as error:
        raise ModelError(
            f"{source.id} does not fit on {device} in {dtype}: {first_line(error)} Free the device "
            "(restart the session) or set device='cpu'."
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{source.id}: no file holds {missing[0]!r}, which the model needs.")
    if dtype == torch.float16:
        widen(model)
    return model.requires_grad_(False).eval()


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ModelError: none there.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.directory, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{source.id}: no tokenizer in {source.directory} ({first_line(error)}).") from error


def resolve_device(device: str = "auto") -> torch.device:
    """ "auto" is the first CUDA device of compute capability 7.5 or more, else the CPU.

    Raises:
        ModelError: CUDA asked for and not there, or no such device name.
    """
    if device == "auto":
        return torch.device("cuda:0" if has_capable_gpu() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"device={device!r}: no such device. Use 'auto', 'cpu' or 'cuda:0'.") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device={device!r}: this machine has no CUDA device. Use 'auto' or 'cpu'.")
    return torch.device("cuda:0") if device == "cuda" else found


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The compute dtype for "auto": float32 on a CPU, bfloat16 from capability 8.0 on, else float16 (T4).

    `torch.cuda.is_bf16_supported()` isn't asked: it says True on a T4, where bfloat16 is emulated.

    Raises:
        ModelError: unknown name.
    """
    if dtype == "auto":
        if device.type != "cuda":
            return torch.float32
        capable = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if capable else torch.float16
    names = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in names:
        raise ModelError(f"dtype={dtype!r}: expected 'auto', {', '.join(map(repr, names))}.")
    return names[dtype]
