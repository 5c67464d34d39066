"""What a hybrid checkpoint's files hold, and how to read it back.

A 16-bit matrix is one tensor, a quantized one several: codes, scales and the like. Each kind of checkpoint is
a row of `BACKENDS`, three functions; names are those that transformers' own `save_pretrained` writes.

bitsandbytes: an NF4 matrix as a `Linear4bit` saves it: codes, absmax, the 16 levels, a JSON blob.
compressed-tensors (`pack-quantized`, which vLLM serves): codes packed into int32 words along a row, beside a
16-bit scale for each group or row and the matrix' shape. Each format of a plan is one group of the
configuration, its targets the modules' full names; every other linear module is in `ignore`, heads too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spi_utils.errors import CheckpointError, ModelError
from spi_utils.formats import FORMATS, Packed, bitsandbytes_state, dequantize
from spi_utils.models import Weights, find_recipes, read_header, read_tensor
from spi_utils.runs import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AGAIN = "Run notebook 03_quantize again with force=True."
Parts = Mapping[str, torch.Tensor]  # a packed matrix' tensors, by what follows the module's name in the file


# --- bitsandbytes ----------------------------------------------------------------------------------------

BLOB = "weight.quant_state.bitsandbytes__nf4"


def _bnb_parts(packed: Packed) -> dict[str, torch.Tensor]:
    # bitsandbytes shares one table of levels between matrices, and a file holds no tensor twice
    state = bitsandbytes_state(packed).as_dict(packed=True)
    return {"weight": packed.codes, **{f"weight.{key}": value.clone() for key, value in state.items()}}


def _bnb_values(fmt: str, parts: Parts) -> torch.Tensor:
    from bitsandbytes.functional import QuantState

    stats = {key.removeprefix("weight."): value for key, value in parts.items()}
    codes = stats.pop("weight")
    state = QuantState.from_dict(stats, device=codes.device)
    second = state.state2
    nested = None if second is None else (second.absmax, second.code, state.offset)
    packed = Packed(fmt, tuple(state.shape), state.dtype, codes, state.absmax, nested)
    return dequantize(packed, state.dtype)


def _bnb_config(
    model: nn.Module, formats: Mapping[str, str], double_quant: bool, compute: torch.dtype
) -> Any:
    """The `BitsAndBytesConfig` with which stock transformers makes the planned modules `Linear4bit`."""
    from transformers import BitsAndBytesConfig
    from transformers.pytorch_utils import Conv1D

    # Giving any list of modules to skip drops transformers' own, so heads (tied ones too) must stand in it.
    # Names are plain, not escaped: other loaders match them as they are.
    linear = [name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]
    skipped = [name for name in linear if formats.get(name) != "nf4"]
    how = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double_quant}
    how |= {"bnb_4bit_compute_dtype": compute, "bnb_4bit_quant_storage": torch.uint8}
    return BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped, **how)


# --- compressed-tensors ----------------------------------------------------------------------------------

LAYOUT = "pack-quantized"


def _ct_parts(packed: Packed) -> dict[str, torch.Tensor]:
    """Words (rows, ⌈cols · bits / 32⌉) int32, the first code in the lowest bits, each code + 2^(bits-1).

    int4's bytes hold two codes in that order already; four bytes are a word on a little-endian machine, which
    every one is that torch has wheels for.
    """
    assert packed.scales is not None
    rows, cols = packed.shape
    codes = packed.codes
    if packed.fmt == "int8":
        codes = nn.functional.pad((codes.to(torch.int16) + 128).to(torch.uint8), (0, -cols % 4))
    return {
        "weight_packed": codes.contiguous().view(torch.int32),
        "weight_scale": packed.scales.view(rows, -1),
        "weight_shape": torch.tensor([rows, cols]),
    }


def _ct_values(fmt: str, parts: Parts) -> torch.Tensor:
    from compressed_tensors.compressors import PackedQuantizationCompressor

    held = {name: tensor.cpu() for name, tensor in parts.items()}
    return PackedQuantizationCompressor.decompress(held, ct_scheme(fmt, []))["weight"]


def ct_scheme(fmt: str, targets: list[str]) -> Any:
    """compressed-tensors' `QuantizationScheme` of a symmetric integer format: weights only."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    row = FORMATS[fmt]
    how = {"strategy": "group", "group_size": row.group} if row.group else {"strategy": "channel"}
    weights = QuantizationArgs(num_bits=row.bits, type="int", symmetric=True, **how)
    return QuantizationScheme(targets=targets, weights=weights, format=LAYOUT)


def _ct_config(
    model: nn.Module, formats: Mapping[str, str], double_quant: bool, compute: torch.dtype
) -> dict[str, Any]:
    """The `quantization_config` of config.json: a group a format, targets by full module name."""
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    targets: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            targets.setdefault(formats.get(name, "16bit"), []).append(name)
    ignore = targets.pop("16bit", [])
    groups = {fmt: ct_scheme(fmt, targets[fmt]) for fmt in sorted(targets)}
    compressed = QuantizationStatus.COMPRESSED
    made = QuantizationConfig(
        config_groups=groups, format=LAYOUT, quantization_status=compressed, ignore=ignore
    )
    return made.model_dump(mode="json") | {"version": compressed_tensors.__version__}


# --- the table -------------------------------------------------------------------------------------------


# For each kind of checkpoint three functions: `parts(packed)`, a packed matrix' tensors in the file;
# `values(fmt, parts)`, what the backend's own package reads them as, in the dtype that was quantized; and
# `config(model, formats, double_quant, compute)`, the `quantization_config` that lets transformers load it.
BACKENDS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "bitsandbytes": (_bnb_parts, _bnb_values, _bnb_config),
    "compressed-tensors": (_ct_parts, _ct_values, _ct_config),
}


# --- reading back ----------------------------------------------------------------------------------------

# The tensors that stand beside a packed matrix' codes.
BESIDE = re.compile(r"\.weight(\.(nested_)?(absmax|quant_map)|\.quant_state\..+|_scale|_shape)$")


def weight_files(model_dir: Path) -> list[Path]:
    """The checkpoint's safetensors files in name order; CheckpointError if there is none."""
    files = sorted(path for path in Path(model_dir).glob("*.safetensors") if not path.name.startswith("."))
    if not files:
        raise CheckpointError(f"{model_dir} holds no safetensors file. Run notebook 03_quantize first.")
    return files


def disk_bytes(model_dir: Path) -> int:
    """Bytes of the checkpoint's weight files."""
    return sum(file.stat().st_size for file in weight_files(model_dir))


def saved_files(model_dir: Path) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """Every tensor of a checkpoint, by its name in the files -> (file, safetensors' dtype, shape).

    Raises:
        CheckpointError: no file, or one that is cut or damaged.
    """
    with reading():
        found = ((path, read_header(path)) for path in weight_files(model_dir))
        return {name: (path, *entry) for path, header in found for name, entry in header.items()}


@contextmanager
def reading() -> Iterator[None]:
    """Inside, a file that is cut or damaged is a CheckpointError that says how to write it again."""
    try:
        yield
    except ModelError as error:
        raise CheckpointError(str(error).replace("Fetch it again.", AGAIN)) from error


def read_saved(model_dir: str | Path, model: PreTrainedModel) -> Iterator[tuple[str, str, torch.Tensor]]:
    """The tensors of a checkpoint that `quantize` wrote, one at a time: (name, format, values).

    Names are those of `model` (its modules suffice: it may be on the meta device), and so is the orientation.
    A quantized matrix has its dequantized values in the dtype that was quantized, all else its saved dtype.

    Raises:
        CheckpointError: a file is missing, cut or damaged, or another program wrote it.
    """
    files, conv1d = saved_files(Path(model_dir)), conv1d_modules(model)
    # Codes stand for the plain weight, which the model's rules for names know.
    codes = {name: name.removesuffix("_packed") for name in files if not BESIDE.search(name)}
    recipes = find_recipes(model, {plain: files[name][2] for name, plain in codes.items()})
    weights = Weights(model.dtype, model, files, recipes)
    config = read_json(Path(model_dir) / "config.json", what="configuration")
    quantization = config.get("quantization_config") or {}
    groups = quantization.get("config_groups", {}).items()
    stated = {target: name for name, group in groups for target in group["targets"]}
    for name, recipe in recipes.items():
        module, stem = name.removesuffix(".weight"), recipe.sources[0][1].removesuffix("weight")
        fmt = "nf4" if stem + BLOB in files else stated.get(module, "16bit")
        with reading():
            if fmt == "16bit":
                value = weights.read_source(name)
            else:
                held = {part: path for part, (path, *_) in files.items() if part.startswith(f"{stem}weight")}
                parts = {part.removeprefix(stem): read_tensor(path, part) for part, path in held.items()}
                value = BACKENDS[quantization["quant_method"]][1](fmt, parts)
                value = value.T.contiguous() if module in conv1d else value
        yield name, fmt, value


def conv1d_modules(model: nn.Module) -> frozenset[str]:
    """Names of the modules that keep their weight as (in, out): GPT-2's."""
    from transformers.pytorch_utils import Conv1D

    return frozenset(name for name, module in model.named_modules() if isinstance(module, Conv1D))


def put_saved(
    model: nn.Module, weights: Weights, formats: Mapping[str, str], model_dir: Path
) -> dict[str, int]:
    """Put a saved checkpoint's planned matrices into a loaded model, after checking every tensor of the file.

    The plan is judged by what lies in the file, not by what the writer meant to write.

    Args:
        model: the source's model; only the matrices in `formats` are written to.
        weights: the source's open weights.
        formats: the plan's {module: format}.
        model_dir: the checkpoint.

    Returns how many matrices of each format were found: {"16bit": …, "nf4": …}.

    Raises:
        CheckpointError: a planned matrix is missing or in another format, or a tensor that should be the
            source's own isn't, bit for bit.
    """
    wanted = dict(formats)
    found = dict.fromkeys(("16bit", *sorted(set(formats.values()) - {"16bit"})), 0)
    for name, held, values in read_saved(model_dir, weights.model):
        module = name.removesuffix(".weight")
        planned = module in wanted
        if held != (fmt := wanted.pop(module, "16bit")):
            raise CheckpointError(f"{model_dir}: {name} is saved as {held}, the plan says {fmt}. {AGAIN}")
        if held == "16bit" and name in weights.shapes:
            own = weights.read_source(name)
            if values.shape != own.shape or not bool((values == own.to(values.dtype)).all()):
                raise CheckpointError(f"{model_dir}: {name} differs from the source's weights. {AGAIN}")
        if planned:
            found[held] += 1
            with torch.no_grad():
                model.get_parameter(f"{module}.weight").copy_(values)
    if wanted:
        raise CheckpointError(f"{model_dir}: the file holds no {next(iter(wanted))}.weight. {AGAIN}")
    return found
