"""Sending files to the Hub so that it can be interrupted, repeated and trusted.

Uses only what huggingface_hub 1.11, 1.27 and 2.4 share. The repository changes in one commit, after every
large file has arrived and only if nobody changed it meanwhile: it is never seen half published. A large file
that arrived before an interruption is not sent again (the Hub knows it by its SHA-256), and files that did
not change are left out of the commit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spi_utils.errors import PublishError
from spi_utils.hub.hub_calls import Caller
from spi_utils.progress import interactive, progress
from spi_utils.tokens import Token, redacted

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelCard


SENT_ALONE = 10_000_000  # bytes; files from here on are sent one by one, before the commit
RECORD = "environment.json"  # the file by which a repository is known as one of ours


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
    call = Caller(token, repo_id, local)
    call(lambda: _validate(api, card))
    call(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    found = call(lambda: api.repo_info(repo_id))
    _require_visibility(bool(found.private), private, repo_id)
    before = {entry.path: entry for entry in call(lambda: _tree(api, repo_id, found.sha))}
    stale = _stale(api, call, repo_id, before, files, overwrite)
    _send_large(api, call, repo_id, files)
    commit = call(lambda: _commit(api, repo_id, files, stale, found.sha))
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

    return str(Caller(token, repo_id, local)(HfApi(token=token.value).whoami)["name"])


def _validate(api: HfApi, card: ModelCard) -> None:
    """Ask the Hub whether the card's YAML is right.

    `ModelCard.validate` isn't used: in huggingface_hub 1.x it asks huggingface.co whatever HF_ENDPOINT says.
    """
    from huggingface_hub.utils import get_session, hf_raise_for_status

    asked = {"repoType": "model", "content": str(card)}
    answer = get_session().post(f"{api.endpoint}/api/validate-yaml", json=asked)
    if answer.status_code == 400:
        raise PublishError(f"the Hub refuses the card's YAML: {redacted(answer.text)}. Nothing was sent.")
    hf_raise_for_status(answer)


def _require_visibility(is_private: bool, private: bool, repo_id: str) -> None:
    if private and not is_private:
        raise PublishError(
            f"{repo_id} exists and is public, and a private repository was asked for. Nothing was sent. Pass "
            "private=False to publish there, or choose another `repo_id`."
        )


def _tree(api: HfApi, repo_id: str, revision: str | None = None) -> list[Any]:
    from huggingface_hub.hf_api import RepoFile

    entries = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    return [entry for entry in entries if isinstance(entry, RepoFile)]


def _send_large(api: HfApi, call: Caller, repo_id: str, files: Mapping[str, Path]) -> None:
    """Send large files one at a time: a kill costs at most the one under way."""
    large = [name for name, path in files.items() if path.stat().st_size >= SENT_ALONE]
    for name in progress(large, len(large), "large files at the Hub"):
        call(partial(_preupload, api, repo_id, name, files[name]))


def _preupload(api: HfApi, repo_id: str, name: str, path: Path) -> None:
    from huggingface_hub import CommitOperationAdd

    api.preupload_lfs_files(repo_id, [CommitOperationAdd(name, str(path))], free_memory=False)


def _commit(api: HfApi, repo_id: str, files: Mapping[str, Path], stale: list[str], parent: str | None) -> str:
    """One commit of everything that changed, on top of what was looked at, or none.

    Operations are made anew because a call consumes them.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    removals = [CommitOperationDelete(name) for name in stale]
    info = api.create_commit(
        repo_id, [*removals, *operations], commit_message="Publish a measured run", parent_commit=parent
    )
    return str(info.oid)


# --- a name that is taken --------------------------------------------------------------------------------


def _stale(
    api: HfApi,
    call: Caller,
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
