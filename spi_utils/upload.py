"""Sending files to the Hub so that it can be interrupted, repeated and trusted.

Uses only what huggingface_hub 1.11, 1.27 and 2.4 share. The repository changes in one commit, after every
large file has arrived: it is never seen half published. A large file that arrived before an interruption is
not sent again (the Hub knows it by its SHA-256), and files that did not change are left out of the commit.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from spi_utils.errors import PublishError
from spi_utils.platforms import Token, transport_errors
from spi_utils.progress import interactive, progress

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelCard

Result = TypeVar("Result")

ATTEMPTS = 5
LONGEST_WAIT = 600  # seconds; the Hub's rate windows are 300
SENT_ALONE = 10_000_000  # bytes; files from here on are sent one by one, before the commit
RECORD = "environment.json"  # the file by which a repository is known as one of ours
FIX_TOKEN = "https://huggingface.co/settings/tokens (type “write”)"
QUOTA = re.compile(r"storage|quota|payment|billing|limit reached|exceed", re.IGNORECASE)
# What an HTTP status means for a publisher.
STATUS = {
    400: "the Hub refused the request ({said}).",
    401: "the Hub does not accept the token from {token} (401): it is mistyped, expired or revoked. Make one "
    "at {tokens}.",
    403: "the token from {token} may not write to {owner} (403). Use a token with write access to it, made "
    "at {tokens}, or another `repo_id`. The Hub said: {said}.",
    404: "there is no user or organisation {owner}, or the token from {token} can't see it (404).",
    409: "the repository changed while this ran (409).",
    412: "the repository changed while this ran (412).",
    429: "too many requests (429), still after waiting as long as the Hub asked.",
    500: "the Hub has trouble of its own ({said}), still after several tries; see "
    "https://status.huggingface.co.",
    507: "the storage of {owner} is full. Free some at https://huggingface.co/settings/billing, or publish "
    "to another owner. The Hub said: {said}.",
}


@dataclass(frozen=True)
class Sent:
    """What one upload did: the commit's address and id, the paths sent, the paths removed."""

    url: str
    commit: str
    uploaded: tuple[str, ...]
    removed: tuple[str, ...]


def send(
    card: ModelCard,
    files: Mapping[str, Path],
    repo_id: str,
    token: Token,
    *,
    private: bool,
    overwrite: bool,
    local: Path,
) -> Sent:
    """Make the repository hold `files`, in one commit.

    Args:
        card: the README, which the Hub validates before anything else is sent.
        files: path in the repository -> local file, the README and the record among them.
        repo_id: `owner/name`.
        overwrite: replace what is there even if this project did not put it there.
        local: folder to name in messages: what is safe whatever happens.

    Raises:
        PublishError: refused, unreachable, full, or the name holds something else; says what to do.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not interactive():
        disable_progress_bars()
    api = HfApi(token=token.value)
    call = _Caller(token, repo_id, local)
    call(lambda: _validate(api, card))
    call(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    _require_visibility(bool(call(lambda: api.repo_info(repo_id)).private), private, repo_id)
    before = {entry.path: entry for entry in call(lambda: _tree(api, repo_id))}
    stale = _stale(api, call, repo_id, before, files, overwrite)
    _send_large(api, call, repo_id, files)
    commit = call(lambda: _commit(api, repo_id, files, stale))
    after = {entry.path: entry.blob_id for entry in call(lambda: _tree(api, repo_id))}
    held = {path: entry.blob_id for path, entry in before.items()}
    changed = tuple(sorted(path for path in files if after.get(path) != held.get(path)))
    return Sent(f"{api.endpoint}/{repo_id}", commit, changed, tuple(stale))


def owner_of(token: Token, repo_id: str, local: Path) -> str:
    """The account that a token belongs to.

    Raises:
        PublishError: the token isn't accepted, or there is no connection.
    """
    from huggingface_hub import HfApi

    return str(_Caller(token, repo_id, local)(HfApi(token=token.value).whoami)["name"])


def _validate(api: HfApi, card: ModelCard) -> None:
    """Ask the Hub whether the card's YAML is right.

    `ModelCard.validate` isn't used: in huggingface_hub 1.x it asks huggingface.co whatever HF_ENDPOINT says.
    """
    from huggingface_hub.utils import get_session, hf_raise_for_status

    asked = {"repoType": "model", "content": str(card)}
    answer = get_session().post(f"{api.endpoint}/api/validate-yaml", json=asked)
    if answer.status_code == 400:
        raise PublishError(f"the Hub refuses the card's YAML: {answer.text}. Nothing was sent.")
    hf_raise_for_status(answer)


def _require_visibility(is_private: bool, private: bool, repo_id: str) -> None:
    if private and not is_private:
        raise PublishError(
            f"{repo_id} exists and is public, and a private repository was asked for. Nothing was sent. Pass "
            "private=False to publish there, or choose another `repo_id`."
        )


def _tree(api: HfApi, repo_id: str) -> list[Any]:
    from huggingface_hub.hf_api import RepoFile

    return [entry for entry in api.list_repo_tree(repo_id, recursive=True) if isinstance(entry, RepoFile)]


def _send_large(api: HfApi, call: _Caller, repo_id: str, files: Mapping[str, Path]) -> None:
    """Send large files one at a time: a kill costs at most the one under way."""
    from huggingface_hub import CommitOperationAdd

    large = [name for name, path in files.items() if path.stat().st_size >= SENT_ALONE]
    for name in progress(large, len(large), "large files at the Hub"):
        call(
            lambda name=name: api.preupload_lfs_files(  # type: ignore[misc]
                repo_id, [CommitOperationAdd(name, str(files[name]))], free_memory=False
            )
        )


def _commit(api: HfApi, repo_id: str, files: Mapping[str, Path], stale: list[str]) -> str:
    """One commit of everything that changed; operations are made anew because a call consumes them."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    removals = [CommitOperationDelete(name) for name in stale]
    info = api.create_commit(repo_id, [*removals, *operations], commit_message="Publish a measured run")
    return str(info.oid)


# --- a name that is taken --------------------------------------------------------------------------------


def _stale(
    api: HfApi,
    call: _Caller,
    repo_id: str,
    before: Mapping[str, Any],
    files: Mapping[str, Path],
    overwrite: bool,
) -> list[str]:
    """Paths to remove: what an earlier publication left and this one has no more.

    Raises:
        PublishError: the repository holds something that isn't this model's run, and `overwrite` is off.
    """
    strangers = sorted(set(before) - {".gitattributes"})
    if not strangers:
        return []
    gone = sorted(set(strangers) - set(files))
    if overwrite:
        return gone
    mine = json.loads(files[RECORD].read_text(encoding="utf-8"))
    theirs = call(lambda: _remote_record(api, repo_id)) if RECORD in before else {}
    if theirs.get("base_model") != mine["base_model"]:
        what = (
            f"a model made from {theirs['base_model']}"
            if "base_model" in theirs
            else "files of another origin"
        )
        raise PublishError(
            f"{repo_id} exists and holds {what} ({', '.join(strangers[:4])}, {len(strangers)} files); "
            f"expected it to be new, or a publication of {mine['base_model']}. Nothing was changed. Choose "
            "another `repo_id`, or pass overwrite=True to replace its content (the history keeps it)."
        )
    return [path for path in gone if path in theirs.get("files", {})]


def _remote_record(api: HfApi, repo_id: str) -> dict[str, Any]:
    path = api.hf_hub_download(repo_id, RECORD, force_download=True)
    return json.loads(Path(path).read_text(encoding="utf-8"))


# --- calls that may fail ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Caller:
    """Calls the Hub: waits and repeats where that helps, and explains the failure where it doesn't."""

    token: Token
    repo_id: str
    local: Path

    def __call__(self, function: Callable[[], Result]) -> Result:
        """`function()`, repeated after 408, 429, 5xx and broken connections.

        Raises:
            PublishError: it failed for good.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return function()
            except Exception as error:
                delay = _delay(error, attempt)
                if delay is None or attempt == ATTEMPTS:
                    self._explain(error)
                    raise
                print(f"the Hub is busy ({_label(error)}); waiting {delay:.0f} s, then try {attempt + 1}")
                time.sleep(delay)
        raise AssertionError("unreachable")

    def _explain(self, error: Exception) -> None:
        """Raise a PublishError that says what to do; an error that isn't the Hub's passes through."""
        advice = _advice(error, self.repo_id, self.token)
        if advice is not None:
            raise PublishError(
                f"publishing to {self.repo_id} failed: {advice} The local files are untouched in "
                f"{self.local}; the same call goes on where this one ended."
            ) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _response(error: Exception) -> Any:
    """The HTTP response behind an error, through the wrappers of upload threads; None if there was none."""
    from huggingface_hub.errors import HfHubHTTPError

    found = (link.response for link in _chain(error) if isinstance(link, HfHubHTTPError))
    return next(found, None)


def _unreachable(error: Exception) -> bool:
    """True for a connection that failed or broke."""
    return any(isinstance(link, transport_errors()) for link in _chain(error))


def _label(error: Exception) -> str:
    """Why a call is repeated, in a word."""
    response = _response(error)
    if response is not None:
        return f"HTTP {response.status_code}"
    return "no connection" if _unreachable(error) else "an answer that is no JSON"


def _delay(error: Exception, attempt: int) -> float | None:
    """Seconds to wait before the next try, the server's own where it names one; None: trying is no use."""
    response = _response(error)
    own = 2.0 ** (attempt - 1)
    if response is None:
        broken = _unreachable(error) or isinstance(error, json.JSONDecodeError)
        return own if broken and not _offline(error) else None
    if response.status_code not in (408, 429, 500, 502, 503, 504):
        return None
    asked = _server_delay(response.headers)
    return min(own if asked is None else asked, LONGEST_WAIT)


def _server_delay(headers: Mapping[str, str]) -> float | None:
    """Seconds from `Retry-After` (a number or a date) or the `RateLimit` header's `t=`."""
    after, limit = (
        headers.get("retry-after", "").strip(),
        re.search(r"\bt\s*=\s*(\d+)", headers.get("ratelimit", "")),
    )
    if after.isdigit():
        return float(after)
    if after:
        return max(0.0, parsedate_to_datetime(after).timestamp() - time.time())
    return float(limit.group(1)) if limit else None


def _offline(error: Exception) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    return any(isinstance(link, OfflineModeIsEnabled) for link in _chain(error))


def _advice(error: Exception, repo_id: str, token: Token) -> str | None:
    """What went wrong and what to do, in plain words; None for an error that isn't the Hub's."""
    said = " ".join(str(error).replace(token.value, "***").split())
    if _offline(error):
        return "HF_HUB_OFFLINE is set, so nothing may be sent. Unset it and restart the session."
    status = _status(error, said)
    if status is not None:
        owner, _, _ = repo_id.partition("/")
        return STATUS[status].format(token=token.source, owner=owner, tokens=FIX_TOKEN, said=said)
    if _unreachable(error):
        return f"no connection to the Hub ({said}). On Kaggle, switch Internet on in the right-hand panel."
    return None


def _status(error: Exception, said: str) -> int | None:
    """The row of STATUS that an error belongs to; None where the Hub gave no answer."""
    response = _response(error)
    if response is None:  # huggingface_hub raises ValueError for a card or an LFS object that is refused
        return (507 if QUOTA.search(said) else 400) if isinstance(error, ValueError) else None
    if response.status_code in (402, 403, 413) and QUOTA.search(said):
        return 507
    if response.status_code in STATUS:
        return int(response.status_code)
    return 500 if response.status_code >= 500 else 400
