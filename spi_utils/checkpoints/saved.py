"""Read back the tensors of a saved hybrid checkpoint, packed ones as the values that they stand for.

The plan is judged by what lies in the file, not by what the writer meant to write: `put_saved` checks every
tensor against the source's weights and the plan, and puts the file's own values into the loaded model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from spi_utils.errors import CheckpointError

STATE = ".quant_state.bitsandbytes__nf4"  # the tensor beside a weight that marks it as bitsandbytes' NF4


def weight_files(model_dir: Path) -> list[Path]:
    """The checkpoint's safetensors files in name order; CheckpointError if there is none."""
    files = sorted(Path(model_dir).glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{model_dir} holds no safetensors file. Run notebook 03_quantize first.")
    return files


def disk_bytes(model_dir: Path) -> int:
    """Bytes of the checkpoint's weight files."""
    return sum(file.stat().st_size for file in weight_files(model_dir))


def saved_tensors(model_dir: Path) -> Iterator[tuple[str, torch.Tensor, str]]:
    """Every weight of a checkpoint as (name, values on the CPU, "nf4" or "16bit"), one at a time.

    NF4 values come from bitsandbytes' own dequantization, (out, in), in the dtype that was quantized.
    Raises CheckpointError for an unreadable file.
    """
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        try:
            for path in weight_files(model_dir):
                opened = stack.enter_context(safe_open(path, framework="pt"))
                files |= dict.fromkeys(opened.keys(), opened)
        except SafetensorError as error:
            raise CheckpointError(
                f"{path} is truncated or corrupt ({error}). Run notebook 03_quantize again with force=True."
            ) from error
        states = {name.removesuffix(STATE) for name in files if name.endswith(STATE)}
        parts = {
            name for name in files if any(name.startswith(f"{owner}.") for owner in _owners(name, states))
        }
        for name in files:
            if name in states:
                held = {part: files[part].get_tensor(part) for part in parts if part.startswith(f"{name}.")}
                yield name, _nf4_values(files[name].get_tensor(name), held), "nf4"
            elif name not in parts:
                yield name, files[name].get_tensor(name), "16bit"


def _owners(name: str, states: set[str]) -> list[str]:
    """The packed weight, if any, whose quantization state `name` belongs to."""
    pieces = name.split(".")
    return [owner for n in (1, 2) if (owner := ".".join(pieces[:-n])) in states]


def _nf4_values(codes: torch.Tensor, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    return dequantize_4bit(codes, QuantState.from_dict(dict(state), device=torch.device("cpu")))


def put_saved(model: Any, weights: Any, formats: Mapping[str, str], model_dir: Path) -> dict[str, Any]:
    """Put a saved checkpoint's planned matrices into a loaded model, after checking every tensor of the file.

    Args:
        model: the source's model; only the matrices in `formats` are written to.
        weights: the source's open `models.Weights`.
        formats: the plan's {module: "16bit" or "nf4"}.
        model_dir: the checkpoint.

    Returns how many matrices of each format were found: {"nf4": …, "16bit": …}.

    Raises:
        CheckpointError: a planned matrix is missing or in another format, or a tensor that should be the
            source's own isn't, bit for bit.
    """
    wanted = {f"{name}.weight": (name, fmt) for name, fmt in formats.items()}
    found = {"nf4": 0, "16bit": 0}
    own = set(weights.names)
    for name, values, held in saved_tensors(model_dir):
        module, fmt = wanted.pop(name, (None, "16bit"))
        if held != fmt:
            raise CheckpointError(f"{model_dir}: {name} is saved as {held}, the plan says {fmt}. {_AGAIN}")
        if held == "16bit" and name in own and not _equal(values, weights.read(name)):
            raise CheckpointError(f"{model_dir}: {name} differs from the source's weights. {_AGAIN}")
        if module is not None:
            found[held] += 1
            _put(model.get_submodule(module), values, transposed=held == "nf4")
    if wanted:
        raise CheckpointError(f"{model_dir}: the file holds no {next(iter(wanted))}. {_AGAIN}")
    return found


_AGAIN = "Run notebook 03_quantize again with force=True."


def _equal(saved: torch.Tensor, own: torch.Tensor) -> bool:
    return saved.shape == own.shape and bool((saved == own.to(saved.dtype)).all())


def _put(module: Any, values: torch.Tensor, *, transposed: bool) -> None:
    """Write (out, in) values into a module; a Conv1D holds (in, out), but its packed form is (out, in)."""
    flip = transposed and type(module).__name__ == "Conv1D"
    with torch.no_grad():
        module.weight.copy_(values.t() if flip else values)
