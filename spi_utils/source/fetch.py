"""Fetching a model's safetensors from the Hugging Face Hub, with errors a person can act on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spi_utils.errors import ModelError

WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*")
PICKLE = (
    "{where}: only pickle weights ({file}), which can run code when opened, so they are never loaded. "
    "Convert them once on a machine you trust: "
    "`AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)`, then give that folder as `model`."
)


def download(
    repo_id: str, revision: str | None = None, *, token: str | None = None, code: bool = False
) -> tuple[Path, str]:
    """Fetch a model repository's safetensors, configuration and tokenizer into the Hub's cache.

    A repository that is in the cache already is used when the Hub can't be reached, and that is said.

    Args:
        repo_id: e.g. "Qwen/Qwen3.5-4B".
        revision: branch, tag or commit; None is the main branch.
        token: None uses HF_TOKEN or the login.
        code: fetch Python files too (for `trust_remote_code`).

    Returns:
        the local folder, and the commit it holds.

    Raises:
        ModelError: unknown id or revision, gated or private without a token, unreachable, pickle only.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = [*WANTED, "*.py"] if code else list(WANTED)
    try:
        info = HfApi(token=token).model_info(repo_id, revision=revision)
        _require_safetensors(repo_id, info)
        folder = snapshot_download(repo_id, revision=info.sha, allow_patterns=patterns, token=token)
    except HfHubHTTPError as error:
        raise ModelError(_explain(repo_id, revision, error)) from error
    except HFValidationError as error:
        raise ModelError(f"{repo_id!r} is no Hub id ({error}).") from error
    except Exception as error:
        if not _is_transport_error(error):
            raise
        return _from_cache(repo_id, revision, patterns, error)
    return Path(folder), str(info.sha)


def _require_safetensors(repo_id: str, info: Any) -> None:
    names = [entry.rfilename for entry in info.siblings or ()]
    if any(name.endswith(".safetensors") for name in names):
        return
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        raise ModelError(PICKLE.format(where=repo_id, file=pickles[0]))
    ggufs = [name for name in names if name.endswith(".gguf")]
    hint = f" It holds {ggufs[0]}: download that file and give its path as `model`." if ggufs else ""
    raise ModelError(f"{repo_id}: no safetensors files in this repository.{hint}")


def _explain(repo_id: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        return (
            f"{repo_id} is gated. Accept its terms on its page, then give a token: set HF_TOKEN, add it to "
            "Kaggle's or Colab's secrets, or run `hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}. Leave `revision` empty for the main branch."
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return (
            f"{repo_id}: the Hub knows no such model, or it is private and no token was given (HF_TOKEN, "
            "Kaggle's or Colab's secrets, `hf auth login`). Check the spelling."
        )
    if status == 429:
        return (
            f"{repo_id}: the Hub limits this address (429). Set HF_TOKEN to a token of yours and try again."
        )
    return f"{repo_id}: the Hub answered {status or error}. Try again in a few minutes."


def _is_transport_error(error: Exception) -> bool:
    """No connection: Python's own errors, or those of the HTTP library under hub 1.x or 2.x."""
    modules = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
    libraries = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}
    return isinstance(error, ConnectionError | TimeoutError) or bool(modules & libraries)


def _from_cache(
    repo_id: str, revision: str | None, patterns: list[str], cause: Exception
) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=patterns, local_files_only=True)
        )
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{repo_id}: the Hub can't be reached ({type(cause).__name__}) and the model isn't in this "
            "machine's cache. Check the connection (on Kaggle: Settings, Internet on), or use "
            "model='bundled', which needs none."
        ) from cause
    print(f"{repo_id}: the Hub can't be reached; using the copy in the cache, commit {folder.name}.")
    return folder, folder.name
