"""A checkpoint's weights, one at a time, under the names that transformers gives them.

The names and shapes come from the model built on the meta device; what the files call their tensors (prefixes
of multimodal checkpoints, separate or fused experts) is mapped by transformers' own conversion rules. Nothing
but the tensor asked for is ever in memory.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from spi_utils.checkpoints.tensorfile import TensorReader
from spi_utils.errors import CheckpointError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spi_utils.models import ModelSource

INDEX = "model.safetensors.index.json"
DTYPES = {  # safetensors' names of the floating types that a 16-bit source may hold
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Recipe:
    """How one or several of the model's tensors are made from tensors in the files.

    Args:
        sources: (pattern, name in the files), in the order in which the converter wants them.
        converter: transformers' operation, or None for a plain copy.
        target: the first of the model's names that it makes.
    """

    sources: tuple[tuple[str, str], ...]
    converter: WeightConverter | None
    target: str

    def apply(self, read: Callable[[str], torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Read the sources with `read` and return the model's tensors by name."""
        if self.converter is None:
            return {self.target: read(self.sources[0][1])}
        converter = copy.deepcopy(self.converter)
        for pattern, name in self.sources:
            converter.add_tensor(self.target, name, pattern, partial(read, name))  # type: ignore[arg-type]
        return {
            name: value[0] if isinstance(value, list) else value
            for name, value in converter.convert(self.target, model=model, config=model.config).items()
        }


@dataclass(frozen=True)
class Weights:
    """Lazy access to a checkpoint: `names`, `shape(name)`, `read(name)`.

    Names are those of the built model's state dict (parameters and saved buffers; a tied head is not listed).
    """

    directory: Path
    storage_dtype: torch.dtype
    shapes: Mapping[str, tuple[int, ...]]
    recipes: Mapping[str, Recipe]
    files: Mapping[str, TensorReader]  # name in the files -> the open file that holds it
    model: PreTrainedModel  # on the meta device
    keep: frozenset[str]  # tensors that transformers keeps in float32

    @property
    def names(self) -> tuple[str, ...]:
        """The model's tensor names in the model's own order."""
        return tuple(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as the model holds it, without reading it."""
        return self.shapes[name]

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, in the storage dtype (float32 where transformers insists on it).

        Raises:
            ModelError: unknown name, or the bytes can't be read.
        """
        value = self.read_source(name)
        if not value.is_floating_point() or name in self.keep:
            return value
        return value.to(self.storage_dtype)

    def read_source(self, name: str) -> torch.Tensor:
        """One tensor as the files hold it, before the cast to the storage dtype."""
        if name not in self.recipes:
            raise ModelError(f"{self.directory}: the model has no tensor {name!r}.")
        value = self.recipes[name].apply(self._read_file, self.model)[name]
        return value.contiguous()

    def _read_file(self, name: str) -> torch.Tensor:
        try:
            return self.files[name].get_tensor(name)
        except (CheckpointError, OSError) as error:
            raise ModelError(
                f"{self.directory}: tensor {name!r} can't be read ({error}). Fetch the file again."
            ) from error


@contextmanager
def open_weights(source: ModelSource) -> Iterator[Weights]:
    """Open a model source's weights; every tensor of the model is accounted for, with its shape checked.

    Raises:
        ModelError: a missing or truncated shard, a tensor that the model needs and no file holds, or another
            shape than the model's.
    """
    from spi_utils.models import build_on_meta

    model = build_on_meta(source)
    with ExitStack() as stack:
        files = _open_files(source.directory, stack)
        recipes = find_recipes(model, files)
        shapes = _checked_shapes(source.directory, model, recipes, files)
        keep = frozenset(_kept_in_float32(model, shapes, source.storage_dtype))
        dtype = getattr(torch, source.storage_dtype)
        yield Weights(source.directory, dtype, shapes, recipes, files, model, keep)


def shard_paths(directory: Path) -> list[Path]:
    """The safetensors files that make up a checkpoint, in name order.

    Raises:
        ModelError: none there, or the index names a file that is missing.
    """
    index = directory / INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            outside = next((name for name in names if Path(name).name != name), None)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: truncated or not an index ({error}). Fetch it again.") from error
        if outside is not None:
            raise ModelError(f"{index}: names {outside!r}, which is no file of this folder. Fetch it again.")
    else:
        names = sorted(path.name for path in directory.glob("*.safetensors"))
    if not names:
        raise ModelError(f"{directory}: no safetensors file here.")
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        raise ModelError(
            f"{directory}: shard {missing[0]} is missing ({len(missing)} of {len(names)}). Fetch it again."
        )
    return [directory / name for name in names]


def _open_files(directory: Path, stack: ExitStack) -> dict[str, TensorReader]:
    files: dict[str, TensorReader] = {}
    for path in shard_paths(directory):
        file = stack.enter_context(_open_file(path))
        files.update(dict.fromkeys(file.keys(), file))
    return files


def _open_file(path: Path) -> TensorReader:
    # not safetensors' own reader: what it has read counts as resident memory until the file is closed
    try:
        return TensorReader(path)
    except (CheckpointError, OSError) as error:
        raise ModelError(str(error)) from error


def tensor_dtypes(directory: Path) -> dict[str, int]:
    """Bytes of the checkpoint's tensors by safetensors dtype name, e.g. {"BF16": 8411510272}."""
    sizes: dict[str, int] = defaultdict(int)
    for path in shard_paths(directory):
        with _open_file(path) as file:
            for entry in file.entries.values():
                begin, end = entry["data_offsets"]
                sizes[entry["dtype"]] += end - begin
    return dict(sizes)


def find_recipes(model: PreTrainedModel, files: Mapping[str, Any]) -> dict[str, Recipe]:
    """For each of the model's tensor names, how to make it from the files' tensors.

    transformers' rules: every renaming that matches, then at most one converter, then the base's prefix.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    wanted = model.state_dict()
    grouped: dict[str, list[tuple[str | None, str]]] = defaultdict(list)
    for name in sorted(files, key=_natural):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = name, None
        if target in wanted:
            grouped[target].append((pattern, name))
    recipes: dict[str, Recipe] = {}
    for target, sources in grouped.items():
        pattern = sources[0][0]
        converter = by_pattern[pattern] if pattern is not None else None
        recipe = Recipe(tuple((p or n, n) for p, n in sources), converter, target)
        made = [target] if converter is None else recipe.apply(_as_meta(files), model)
        recipes.update(dict.fromkeys(made, recipe))
    return recipes


def _as_meta(files: Mapping[str, Any]) -> Callable[[str], torch.Tensor]:
    def read(name: str) -> torch.Tensor:
        return torch.empty(files[name].get_slice(name).get_shape(), device="meta")

    return read


def _natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key in which layer 2 comes before layer 10: experts are stacked in this order."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in name.split("."))


def _checked_shapes(
    directory: Path, model: PreTrainedModel, recipes: Mapping[str, Recipe], files: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Shapes by name, tied names left out; raises for anything missing or of another shape."""
    tied = tied_names(model)
    shapes: dict[str, tuple[int, ...]] = {}
    meta = _as_meta(files)
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        if name not in recipes:
            raise ModelError(f"{directory}: no file holds {name!r}, which {type(model).__name__} needs.")
        found = tuple(recipes[name].apply(meta, model)[name].shape)
        if found != tuple(tensor.shape):
            raise ModelError(
                f"{directory}: {name!r} has shape {found}, but config.json asks for {tuple(tensor.shape)}."
            )
        shapes[name] = found
    return shapes


def tied_names(model: PreTrainedModel) -> set[str]:
    """Names in the state dict that are another name's tensor (a head tied to the embedding)."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return set()
    head = model.get_output_embeddings()
    return {f"{name}.weight" for name, module in model.named_modules() if module is head}


def _kept_in_float32(
    model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], storage_dtype: str
) -> Iterator[str]:
    patterns = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if storage_dtype == "float16":
        patterns |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name in shapes:
        if any(pattern in name.split(".") for pattern in patterns):
            yield name
