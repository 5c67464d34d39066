"""Fetching a model's safetensors from the Hugging Face Hub, with errors a person can act on."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from spi_utils.errors import ModelError
from spi_utils.hub.tokens import hub_token

Result = TypeVar("Result")

ATTEMPTS = 3  # at a request that the Hub limits
LONGEST_WAIT = 320  # seconds; the Hub's rate windows are 300
WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*")
CARD = "README.md"  # not among WANTED: a copy in the cache from before counts as whole without it
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
        token: None uses the session's, as `hub_token` finds it.
        code: fetch Python files too (for `trust_remote_code`).

    Returns:
        the local folder, and the commit it holds.

    Raises:
        ModelError: unknown id or revision, gated or private without a token, unreachable, pickle only.
    """
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = [*WANTED, "*.py"] if code else list(WANTED)
    if token is None and (found := hub_token()) is not None:
        token = found.value
    if token is None and revision is not None and (held := _held(repo_id, revision, patterns)) is not None:
        return held, held.name
    try:
        info = _patiently(lambda: HfApi(token=token).model_info(repo_id, revision=revision))
        _require_safetensors(repo_id, info)
        folder = _patiently(
            lambda: snapshot_download(repo_id, revision=info.sha, allow_patterns=patterns, token=token)
        )
        if any(entry.rfilename == CARD for entry in info.siblings or ()):  # for its licence, when publishing
            _patiently(lambda: hf_hub_download(repo_id, CARD, revision=info.sha, token=token))
    except HfHubHTTPError as error:
        # not chained: a Hub that echoes the request would put its header into the traceback
        raise ModelError(_explain(repo_id, revision, error)) from None
    except HFValidationError as error:
        raise ModelError(f"{repo_id!r} is no Hub id ({error}).") from error
    except Exception as error:
        if not _is_transport_error(error):
            raise
        return _from_cache(repo_id, revision, patterns, error)
    return Path(folder), str(info.sha)


def _held(repo_id: str, commit: str, patterns: list[str]) -> Path | None:
    """The cache's copy of a commit, which never changes: a stage that holds no token need not ask the Hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    from spi_utils.source.weights import shard_paths

    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        return None
    try:
        folder = Path(
            snapshot_download(repo_id, revision=commit, allow_patterns=patterns, local_files_only=True)
        )
        shard_paths(folder)  # older versions of huggingface_hub return what an interrupted download left
    except (LocalEntryNotFoundError, HFValidationError, ModelError):
        return None
    return folder


def _patiently(request: Callable[[], Result]) -> Result:
    """`request()`, repeated after a 429 once the Hub's own delay is over; the last error is raised."""
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(1, ATTEMPTS):
        try:
            return request()
        except HfHubHTTPError as error:
            delay = _asked_delay(error, 2.0**attempt)
            if delay is None or delay > LONGEST_WAIT:
                raise
            print(
                f"the Hub limits this address (429); waiting {delay:.0f} s, then try {attempt + 1}",
                flush=True,
            )
            time.sleep(delay)
    return request()


def _asked_delay(error: Any, otherwise: float | None = None) -> float | None:
    """Seconds that a 429 asks to wait, `otherwise` if it doesn't say; None for any other answer."""
    from spi_utils.hub.hub_calls import server_delay

    response = getattr(error, "response", None)
    if response is None or response.status_code != 429:
        return None
    asked = server_delay(response.headers)
    return otherwise if asked is None else asked


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
        asked = _asked_delay(error)
        wait = "Wait some minutes" if asked is None else f"It asks to wait {asked:.0f} s more"
        return (
            f"{repo_id}: the Hub limits requests from this address (429), as it often does where many share "
            f"one. {wait}, or give a token, with a limit of its own: set HF_TOKEN, add it to Kaggle's or "
            "Colab's secrets, or run `hf auth login`. Then run this again."
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
        ) from None
    print(f"{repo_id}: the Hub can't be reached; using the copy in the cache, commit {folder.name}.")
    return folder, folder.name
