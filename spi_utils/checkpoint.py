"""What a hybrid checkpoint's files hold, and how to read it back.

A 16-bit matrix is one tensor, a quantized one several: codes, scales and the like. Each kind of checkpoint is
a row of `BACKENDS`, four functions; names are those that transformers' own `save_pretrained` writes.

bitsandbytes: an NF4 matrix as a `Linear4bit` saves it: codes, absmax, the 16 levels, a JSON blob.
compressed-tensors (`pack-quantized`, which vLLM serves): codes packed into int32 words along a row, beside a
16-bit scale for each group or row, the matrix' shape and, for asymmetric formats, zero points packed along
the column. Each format of a plan is one group of the configuration, its targets the modules' full names;
every other linear module is in `ignore`, heads too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spi_utils.errors import CheckpointError, ModelError
from spi_utils.formats import (
    BLOCK,
    FORMATS,
    NESTED_BLOCK,
    Packed,
    bitsandbytes_state,
    dequantize,
    format_row,
    map_parts,
    nf4_levels,
    one_thread,
)
from spi_utils.models import Weights, find_recipes, read_header, read_tensor, shard_paths
from spi_utils.runs import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AGAIN = "Run notebook 03_quantize again with force=True."
Parts = Mapping[str, torch.Tensor]  # a packed matrix' tensors, by what follows the module's name in the file


# --- bitsandbytes ----------------------------------------------------------------------------------------

BLOB = "weight.quant_state.bitsandbytes__nf4"
NF4_CHUNK = 1 << 20  # weights that bitsandbytes quantizes at once: its CPU path makes many float32 copies


def _bnb_parts(packed: Packed) -> dict[str, torch.Tensor]:
    # bitsandbytes shares one table of levels between matrices, and a file holds no tensor twice
    state = bitsandbytes_state(packed).as_dict(packed=True)
    return {"weight": packed.codes, **{f"weight.{key}": value.clone() for key, value in state.items()}}


def _bnb_packed(fmt: str, parts: Parts) -> Packed:
    from bitsandbytes.functional import QuantState

    stats = {key.removeprefix("weight."): value for key, value in parts.items()}
    codes = stats.pop("weight")
    state = QuantState.from_dict(stats, device=codes.device)
    second = state.state2
    nested = None if second is None else (second.absmax, second.code, state.offset)
    rows, cols = state.shape
    return Packed(fmt, (rows, cols), state.dtype, codes, state.absmax, nested)


def _bnb_check(packed: Packed, parts: Parts, weight: torch.Tensor | None) -> None:
    """Codes rounded to nearest must be the library's own; chosen ones must be read as level times absmax."""
    from bitsandbytes import functional

    if weight is None:
        absmax = packed.scales
        assert absmax is not None
        if packed.nested is not None:
            second, levels, offset = packed.nested
            absmax = functional.dequantize_blockwise(
                absmax, absmax=second, code=levels, blocksize=NESTED_BLOCK
            )
            absmax = absmax + offset
        codes = packed.codes.view(-1)
        index = torch.stack([codes >> 4, codes & 15], dim=1).view(-1).int()
        meant = nf4_levels(codes.device).index_select(0, index).view(-1, BLOCK) * absmax[:, None]
        found = dequantize(_bnb_packed("nf4", parts), packed.dtype)
        if not torch.equal(found, meant.view(packed.shape).to(packed.dtype)):
            raise _misread("bitsandbytes", packed)
        return

    def quantize_part(part: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return functional.quantize_4bit(part, blocksize=BLOCK, quant_type="nf4")

    made = map_parts(quantize_part, weight.reshape(-1).split(NF4_CHUNK))  # blocks don't depend on each other
    state = made[0][1]
    state.absmax = torch.cat([part[1].absmax for part in made])
    state.shape = weight.shape
    if packed.nested is not None:
        with one_thread():
            state.offset = state.absmax.mean()
        state.absmax, state.state2 = functional.quantize_blockwise(
            state.absmax - state.offset, blocksize=NESTED_BLOCK
        )
        state.nested = True
    own = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    own["weight"] = torch.cat([part[0] for part in made])
    if own.keys() != parts.keys() or not all(torch.equal(own[part], parts[part]) for part in own):
        raise _misread("bitsandbytes", packed)


def _bnb_config(
    model: nn.Module, formats: Mapping[str, str], double_quant: bool, compute: torch.dtype
) -> Any:
    """The `BitsAndBytesConfig` with which stock transformers makes the planned modules `Linear4bit`."""
    from transformers import BitsAndBytesConfig
    from transformers.pytorch_utils import Conv1D

    # Giving any list of modules to skip drops transformers' own, so heads (tied ones too) must stand in it.
    # Names are plain, not escaped: other loaders match them as they are.
    skipped = [
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and formats.get(name) != "nf4"
    ]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_storage=torch.uint8,
        llm_int8_skip_modules=skipped,
    )


# --- compressed-tensors ----------------------------------------------------------------------------------

LAYOUT = "pack-quantized"


def _ct_parts(packed: Packed) -> dict[str, torch.Tensor]:
    """Words (rows, ⌈cols · bits / 32⌉) int32, the first code in the lowest bits, each code + 2^(bits-1).

    int4's bytes hold two codes in that order already; four bytes are a word on a little-endian machine, which
    every one is that torch has wheels for.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    assert packed.scales is not None
    rows, cols = packed.shape
    codes = packed.codes
    if packed.fmt == "int8":
        codes = (codes.to(torch.int16) + 128).to(torch.uint8)
        codes = nn.functional.pad(codes, (0, -cols % 4))
    made = {
        "weight_packed": codes.contiguous().view(torch.int32),
        "weight_scale": packed.scales.view(rows, -1),
        "weight_shape": torch.tensor([rows, cols]),
    }
    if packed.zeros is not None:
        made["weight_zero_point"] = pack_to_int32(packed.zeros, 4, packed_dim=0)
    return made


def _ct_packed(fmt: str, parts: Parts) -> Packed:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    rows, cols = (int(size) for size in parts["weight_shape"])
    codes = parts["weight_packed"].contiguous().view(torch.uint8)
    scales = parts["weight_scale"]
    if fmt == "int8":
        codes = (codes[:, :cols].to(torch.int16) - 128).to(torch.int8)
        return Packed(fmt, (rows, cols), scales.dtype, codes, scales.view(rows))
    zeros = parts.get("weight_zero_point")
    if zeros is not None:
        zeros = unpack_from_int32(zeros, 4, torch.Size(scales.shape), packed_dim=0)
    return Packed(fmt, (rows, cols), scales.dtype, codes, scales, zeros=zeros)


def _ct_check(packed: Packed, parts: Parts, weight: torch.Tensor | None) -> None:
    """No library searches these codes and scales; what it decompresses them to must be our values."""
    from compressed_tensors.compressors import PackedQuantizationCompressor

    held = {name: tensor.cpu() for name, tensor in parts.items()}
    theirs = PackedQuantizationCompressor.decompress(held, ct_scheme(packed.fmt, []))["weight"]
    if not torch.equal(theirs, dequantize(packed, packed.dtype).cpu()):
        raise _misread("compressed-tensors", packed)


def ct_scheme(fmt: str, targets: list[str]) -> Any:
    """compressed-tensors' `QuantizationScheme` of a format: weights only."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    row = format_row(fmt)
    how = {"strategy": "group", "group_size": row.group} if row.group else {"strategy": "channel"}
    weights = QuantizationArgs(num_bits=row.bits, type="int", symmetric=row.symmetric, **how)
    return QuantizationScheme(targets=targets, weights=weights, format=LAYOUT)


def _ct_config(
    model: nn.Module, formats: Mapping[str, str], double_quant: bool, compute: torch.dtype
) -> dict[str, Any]:
    """The `quantization_config` of config.json: a group a format, targets by full module name."""
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    used = sorted({fmt for fmt in formats.values() if fmt != "16bit"})
    made = QuantizationConfig(
        config_groups={fmt: ct_scheme(fmt, [n for n in linear if formats.get(n) == fmt]) for fmt in used},
        format=LAYOUT,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[name for name in linear if formats.get(name, "16bit") == "16bit"],
    )
    return made.model_dump(mode="json") | {"version": compressed_tensors.__version__}


def ct_formats(quantization: Mapping[str, Any]) -> dict[str, str]:
    """{module: format} of a `quantization_config` that this project wrote for compressed-tensors.

    Raises:
        CheckpointError: a group whose name is no format of ours: another program's checkpoint.
    """
    ours = {name: (row.bits, row.group, row.symmetric) for name, row in FORMATS.items() if row.bits}
    formats: dict[str, str] = {}
    for name, group in quantization["config_groups"].items():
        weights = group["weights"]
        said = (weights["num_bits"], weights.get("group_size"), weights.get("symmetric", True))
        if said != ours.get(name):
            raise CheckpointError(
                f"config.json: the group {name!r} of compressed-tensors is none of {', '.join(ours)}: "
                "this checkpoint was not written by notebook 03_quantize."
            )
        formats |= dict.fromkeys(group["targets"], name)
    return formats


# --- the table -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """One kind of checkpoint.

    `parts(packed)` are a packed matrix' tensors in the file, the codes first; `packed(fmt, parts)` is the way
    back. `check(packed, parts, weight)` lets the backend's own package judge the tensors and raises
    CheckpointError; `weight` is what was rounded to nearest, None where the codes were chosen otherwise.
    `config(model, formats, double_quant, compute)` is the `quantization_config` that makes stock transformers
    load it.
    """

    parts: Callable[[Packed], dict[str, torch.Tensor]]
    packed: Callable[[str, Parts], Packed]
    check: Callable[[Packed, Parts, torch.Tensor | None], None]
    config: Callable[[Any, Mapping[str, str], bool, torch.dtype], Any]


BACKENDS = {
    "bitsandbytes": Backend(_bnb_parts, _bnb_packed, _bnb_check, _bnb_config),
    "compressed-tensors": Backend(_ct_parts, _ct_packed, _ct_check, _ct_config),
}


def _misread(package: str, packed: Packed) -> CheckpointError:
    return CheckpointError(
        f"{package} reads {packed.fmt} as other values than were meant for a {packed.shape} matrix. Please "
        f"report this with the version of {package}."
    )


# --- reading back ----------------------------------------------------------------------------------------

# Endings of the tensors that stand beside a packed matrix' codes.
BESIDE = (
    *(".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4"),
    *(".weight_scale", ".weight_shape", ".weight_zero_point"),
)


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
        CheckpointError: a file is missing, cut or damaged.
    """
    try:
        return {
            name: (path, *entry)
            for path in shard_paths(model_dir)
            if not path.name.startswith(".")
            for name, entry in read_header(path).items()
        }
    except ModelError as error:
        raise _damaged(error) from error


def read_part(path: Path, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """One tensor of the files, by their own name for it; CheckpointError if its bytes can't be read."""
    try:
        return read_tensor(path, name, shape)
    except ModelError as error:
        raise _damaged(error) from error


def _damaged(error: ModelError) -> CheckpointError:
    return CheckpointError(str(error).replace("Fetch it again.", AGAIN))


@dataclass(frozen=True)
class SavedWeights:
    """A checkpoint's weights by module, one at a time. Iterate for (module, format, tensor)."""

    formats: Mapping[str, str]  # every module with a weight, in model order -> "nf4", …, "16bit"
    weights: Weights  # the files' tensors under the model's names; of a packed matrix the name alone
    conv1d: frozenset[str]
    backend: Backend | None

    def read(self, module: str, dtype: torch.dtype | None = torch.float32) -> torch.Tensor:
        """A module's weight as the saved file has it, in the module's own orientation, on the CPU.

        A quantized one gives its dequantized values in `dtype`, or in the dtype that was quantized (None); a
        16-bit weight comes in its saved dtype.
        """
        if self.formats[module] == "16bit":
            return self.tensor(f"{module}.weight")
        packed = self.packed(module)
        values = dequantize(packed, dtype or packed.dtype)
        return values.T.contiguous() if module in self.conv1d else values

    def tensor(self, name: str) -> torch.Tensor:
        """Any tensor that isn't quantized, by the model's own name for it (biases and norms too)."""
        try:
            return self.weights.read_source(name)
        except ModelError as error:
            raise _damaged(error) from error

    def packed(self, module: str) -> Packed:
        """A quantized module's codes and scales, (out, in)."""
        assert self.backend is not None
        stem = self.weights.recipes[f"{module}.weight"].sources[0][1].removesuffix("weight")
        parts = {
            name.removeprefix(stem): read_part(path, name, shape)
            for name, (path, _, shape) in self.weights.files.items()
            if name.startswith(f"{stem}weight")
        }
        return self.backend.packed(self.formats[module], parts)

    def __iter__(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        for module, fmt in self.formats.items():
            yield module, fmt, self.read(module)


def saved_weights(
    model_dir: str | Path, *, trust_remote_code: bool = False, model: PreTrainedModel | None = None
) -> SavedWeights:
    """Open a checkpoint that `quantize` wrote.

    Args:
        model: the model on the meta device, where the caller has it; else it is built from config.json.

    Raises:
        CheckpointError: a file is missing, cut or damaged, or another program wrote it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = Path(model_dir)
    if model is None:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    files = saved_files(directory)
    # Codes stand for the plain weight, which the model's rules for names know.
    shapes = {
        name.removesuffix("_packed") if name.endswith(".weight_packed") else name: shape
        for name, (_, _, shape) in files.items()
        if not name.endswith(BESIDE)
    }
    weights = Weights(model.dtype, model, files, find_recipes(model, shapes))
    quantization = read_json(directory / "config.json", what="configuration").get("quantization_config") or {}
    method = quantization.get("quant_method")
    stated = ct_formats(quantization) if method == "compressed-tensors" else {}
    formats = {}
    for name in model.state_dict():
        if name not in weights.recipes or not name.endswith(".weight"):
            continue
        module = name.removesuffix(".weight")
        stem = weights.recipes[name].sources[0][1].removesuffix("weight")
        formats[module] = "16bit"
        if method == "bitsandbytes" and stem + BLOB in files:
            formats[module] = "nf4"
        elif f"{stem}weight_packed" in files:
            if module not in stated:
                raise CheckpointError(f"{directory}: config.json names no format for {module}. {AGAIN}")
            formats[module] = stated[module]
    return SavedWeights(formats, weights, conv1d_modules(model), BACKENDS.get(str(method)))


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
    saved = saved_weights(model_dir, model=weights.model)
    wanted = dict(formats)
    found = dict.fromkeys(("16bit", *sorted(set(formats.values()) - {"16bit"})), 0)
    for name in saved.weights.recipes:
        module = name.removesuffix(".weight")
        held, planned = saved.formats.get(module, "16bit"), module in wanted
        if held != (fmt := wanted.pop(module, "16bit")):
            raise CheckpointError(f"{model_dir}: {name} is saved as {held}, the plan says {fmt}. {AGAIN}")
        values = saved.read(module, None) if module in saved.formats else saved.tensor(name)
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
