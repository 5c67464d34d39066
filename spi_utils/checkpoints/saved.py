"""Read back the tensors of a saved hybrid checkpoint, packed ones as the values that they stand for.

The plan is judged by what lies in the file, not by what the writer meant to write: `put_saved` checks every
tensor against the source's weights and the plan, and puts the file's own values into the loaded model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from spi_utils.checkpoints.checkpoint import saved_weights
from spi_utils.errors import CheckpointError, ModelError
from spi_utils.formats import dequantize

_AGAIN = "Run notebook 03_quantize again with force=True."


def weight_files(model_dir: Path) -> list[Path]:
    """The checkpoint's safetensors files in name order; CheckpointError if there is none."""
    files = sorted(Path(model_dir).glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{model_dir} holds no safetensors file. Run notebook 03_quantize first.")
    return files


def disk_bytes(model_dir: Path) -> int:
    """Bytes of the checkpoint's weight files."""
    return sum(file.stat().st_size for file in weight_files(model_dir))


def saved_tensors(model_dir: Path, model: Any = None) -> Iterator[tuple[str, torch.Tensor, str]]:
    """Every weight of a checkpoint as (name, values on the CPU, format), one at a time.

    Names are the model's own. Quantized ones come dequantized, (out, in), in the dtype that was
    quantized. `model`: see `saved_weights`. Raises CheckpointError for an unreadable file.
    """
    try:
        with saved_weights(model_dir, model=model) as saved:
            for name in saved.recipes:
                module = name.removesuffix(".weight")
                fmt = saved.formats.get(module, "16bit") if name != module else "16bit"
                if fmt != "16bit":
                    packed = saved.packed(module)
                    yield name, dequantize(packed, packed.dtype), fmt
                else:
                    yield name, saved.tensor(name), "16bit"
    except (CheckpointError, ModelError) as error:
        raise CheckpointError(f"{error} {_AGAIN}") from error


def put_saved(model: Any, weights: Any, formats: Mapping[str, str], model_dir: Path) -> dict[str, Any]:
    """Put a saved checkpoint's planned matrices into a loaded model, after checking every tensor of the file.

    Args:
        model: the source's model; only the matrices in `formats` are written to.
        weights: the source's open `models.Weights`.
        formats: the plan's {module: format}.
        model_dir: the checkpoint.

    Returns how many matrices of each format were found: {"16bit": …, "nf4": …}.

    Raises:
        CheckpointError: a planned matrix is missing or in another format, or a tensor that should be the
            source's own isn't, bit for bit.
    """
    wanted = {f"{name}.weight": (name, fmt) for name, fmt in formats.items()}
    found = dict.fromkeys(("16bit", *sorted(set(formats.values()) - {"16bit"})), 0)
    own = set(weights.names)
    for name, values, held in saved_tensors(model_dir, weights.model):
        module, fmt = wanted.pop(name, (None, "16bit"))
        if held != fmt:
            raise CheckpointError(f"{model_dir}: {name} is saved as {held}, the plan says {fmt}. {_AGAIN}")
        if held == "16bit" and name in own and not _equal(values, weights.read_source(name)):
            raise CheckpointError(f"{model_dir}: {name} differs from the source's weights. {_AGAIN}")
        if module is not None:
            found[held] += 1
            _put(model.get_submodule(module), values, transposed=held != "16bit")
    if wanted:
        raise CheckpointError(f"{model_dir}: the file holds no {next(iter(wanted))}. {_AGAIN}")
    return found


def _equal(saved: torch.Tensor, own: torch.Tensor) -> bool:
    return saved.shape == own.shape and bool((saved == own.to(saved.dtype)).all())


def _put(module: Any, values: torch.Tensor, *, transposed: bool) -> None:
    """Write (out, in) values into a module; a Conv1D holds (in, out), but its packed form is (out, in)."""
    flip = transposed and type(module).__name__ == "Conv1D"
    with torch.no_grad():
        module.weight.copy_(values.t() if flip else values)
