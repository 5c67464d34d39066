"""The two kinds of checkpoint that a plan can become: what their files hold for a quantized matrix.

A backend is one row of `BACKENDS`: names and tensors of a packed matrix, the way back, what its own library
makes of the same weight, and the `quantization_config` that makes stock transformers load it. 16-bit tensors
are the same in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from spi_utils.checkpoints import bnb_parts, ct_parts
from spi_utils.errors import CheckpointError
from spi_utils.formats import FORMATS

if TYPE_CHECKING:
    import torch

    from spi_utils.formats import Packed

ASYMMETRIC_BELOW = Version("0.18")  # of compressed-tensors: see `loadable_formats`
Parts = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class Backend:
    """One kind of checkpoint.

    `suffixes(fmt, double_quant)` are the names of a packed matrix' tensors behind its module's, the codes
    first; `parts(packed)` are these tensors and `packed(fmt, parts)` is the way back. `library(weight, fmt,
    double_quant)` is what the backend's own package makes of a weight, to verify a file by;
    `check_values(packed)` refuses codes that it reads as other values than were meant. `config(model,
    formats, double_quant, compute)` goes into config.json; `read_formats(config)` reads the planned modules
    back from it: {module: format}, None if the file's tensors tell. `package` must be installed.
    """

    name: str
    package: str
    suffixes: Callable[[str, bool], tuple[str, ...]]
    parts: Callable[[Packed], Parts]
    packed: Callable[[str, Mapping[str, torch.Tensor]], Packed]
    library: Callable[[torch.Tensor, str, bool], Parts]
    check_values: Callable[[Packed], None]
    config: Callable[[Any, Mapping[str, str], bool, torch.dtype], Any]
    read_formats: Callable[[Mapping[str, Any]], dict[str, str] | None]


BACKENDS: dict[str, Backend] = {
    "bitsandbytes": Backend(
        "bitsandbytes", "bitsandbytes", bnb_parts.suffixes, bnb_parts.parts, bnb_parts.packed,
        bnb_parts.library, bnb_parts.check_values, bnb_parts.config, lambda config: None,
    ),
    "compressed-tensors": Backend(
        "compressed-tensors", "compressed_tensors", ct_parts.suffixes, ct_parts.parts, ct_parts.packed,
        ct_parts.library, ct_parts.check_values, ct_parts.config, ct_parts.read_formats,
    ),
}  # fmt: skip


def backend_row(name: str) -> Backend:
    """The table's row; CheckpointError with the nearest name if there is none."""
    if name in BACKENDS:
        return BACKENDS[name]
    near = get_close_matches(name, BACKENDS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise CheckpointError(f"unknown backend {name!r}; the backends are {', '.join(BACKENDS)}.{hint}")


def check_installed(name: str) -> None:
    """CheckpointError, with what to install, if the backend's package can't be imported."""
    row = backend_row(name)
    try:
        import_module(row.package)
    except (ImportError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"{row.name} can't be used here ({error}). Install it with `pip install {row.name}` and start "
            "the session again; it needs no CUDA."
        ) from error


def loadable_formats(name: str) -> list[str]:
    """The formats of a backend that stock transformers load with the version that is installed.

    compressed-tensors 0.18 to 0.20 prepare a module for unpacked zero points, so the packed ones of an
    asymmetric checkpoint don't fit (0.15 to 0.17 load it, and so does vLLM by its source).
    """
    held = [fmt for fmt, row in FORMATS.items() if name in row.writers]
    if name == "bitsandbytes" or Version(version(name)) < ASYMMETRIC_BELOW:
        return held
    return [fmt for fmt in held if FORMATS[fmt].symmetric]


def backend_of(quantization: Mapping[str, Any] | None) -> str | None:
    """The backend that wrote a checkpoint, by its `quantization_config`; None for a plain 16-bit one."""
    method = (quantization or {}).get("quant_method")
    return method if method in BACKENDS else None
