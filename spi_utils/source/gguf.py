"""GGUF files: dequantized once, tensor by tensor, into a transformers directory of float16 safetensors."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from spi_utils.errors import ModelError
from spi_utils.progress import progress
from spi_utils.runs import atomic_path, write_json

SHARD_BYTES = 1_000_000_000
CONVERTER = 1  # raise it when this module would make other files of the same GGUF


def cache_key(sha256: str) -> str:
    """A folder name for a converted file: its hash, and the versions of what converts it."""
    return f"{sha256[:16]}-{version('transformers')}-{version('gguf')}-{CONVERTER}"


def convert_gguf(path: Path, directory: Path, *, extra: tuple[Path, ...] = ()) -> Path:
    """Write a GGUF model as a transformers directory, unless it is there already.

    Each tensor is dequantized by gguf-py, brought to transformers' orientation by transformers' own rules,
    cast to float16 and written; at most one shard (1 GB) is in memory.

    Args:
        path: the `.gguf` file.
        directory: where the result goes; it appears whole or not at all.
        extra: further files to put beside it (a licence).

    Raises:
        ModelError: not a GGUF file, truncated, an architecture that transformers can't read, or a value
            beyond float16's range.
    """
    if (directory / "config.json").exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".converting-", dir=directory.parent))
    try:
        _convert_into(path, work)
        for file in extra:
            shutil.copy(file, work / file.name)
        work.chmod(0o755)  # mkdtemp makes it private
        try:
            work.rename(directory)
        except OSError:
            # Another process was first, and may be reading it: theirs stands if it is whole.
            if not (directory / "config.json").exists():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return directory


def _convert_into(path: Path, work: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise ModelError(
            f"{path}: not a GGUF model that transformers can read ({error}). Truncated files and unknown "
            "architectures end here: fetch the file again, or use the model's safetensors repository."
        ) from error
    config.dtype = "float16"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    names = _write_shards(path, work, model)
    expected = {n for n, _ in model.named_parameters()}
    if missing := sorted(expected - names):
        raise ModelError(f"{path}: no tensor for {missing[0]!r} ({len(missing)} of {len(expected)} missing).")
    config.save_pretrained(work)
    tokenizer.save_pretrained(work)
    GenerationConfig.from_model_config(config).save_pretrained(work)


def _write_shards(path: Path, work: Path, model: torch.nn.Module) -> set[str]:
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    total = filled = 0

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        with atomic_path(work / name) as temporary:
            save_file(shard, temporary, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in _tensors(path, model):
        shard[name] = tensor
        total += tensor.nbytes
        if total - filled >= SHARD_BYTES:
            flush()
            filled = total
    if shard:
        flush()
    write_json(
        work / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )
    return set(weight_map)


def _tensors(path: Path, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors in float16, dequantized one at a time.

    Raises:
        ModelError: stacked experts, which transformers assembles only in memory, or an overflow of float16.
    """
    from gguf import GGUFReader, dequantize
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
        read_field,
    )

    try:
        reader = GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise ModelError(f"{path}: truncated or not a GGUF file ({error}). Fetch it again.") from error
    architecture = read_field(reader, "general.architecture")[0]
    parsed = load_gguf_checkpoint(path, return_tensors=False)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=parsed["config"])
    names = get_gguf_hf_weights_map(model, processor)
    assembled: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
    for tensor in progress(reader.tensors, len(reader.tensors), "dequantizing GGUF"):
        result = processor.process(
            weights=dequantize(tensor.data, tensor.tensor_type),
            name=tensor.name,
            tensor_key_mapping=names,
            parsed_parameters=assembled,
        )
        if assembled["tensors"]:
            raise ModelError(
                f"{path}: {tensor.name} holds stacked experts, which are not converted from GGUF here. "
                "Use the model's safetensors repository instead."
            )
        if result.name in names:
            yield names[result.name], _to_float16(result.weights, names[result.name], path)


def _to_float16(weights: np.ndarray, name: str, path: Path) -> torch.Tensor:
    half = torch.from_numpy(np.array(weights, dtype=np.float32)).to(torch.float16)
    lost = int((~torch.isfinite(half)).sum())
    if lost:
        raise ModelError(f"{path}: {name!r} has {lost} values beyond float16's range or not finite.")
    return half
