"""A finished run -> a model card, and a repository on the Hub that a stranger can trust.

Nothing is sent unless every gate is passed: the evaluation must be of this very checkpoint, every stage
finished, the size what the plan said, the licence known. A rehearsal (the default) writes the card and the
list of what would be sent, and sends nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spi_utils.errors import PublishError, SPIError
from spi_utils.hub.licences import find_licence
from spi_utils.hub.rehearsal import Published, Rehearsal, collect_files, rehearse
from spi_utils.hub.upload import owner_of, send
from spi_utils.parameters import LONGEST_NAME, repository_problem
from spi_utils.plan import nominal_bits
from spi_utils.runs import NOTEBOOKS, Run, existing_run, fingerprint, read_json, run_info, sha256_file, stage
from spi_utils.tokens import Token, hub_token

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

OWNER = "your-name"  # stands for the token's owner while there is no token


def publish(
    run: Run | str | Path,
    *,
    repo_id: str | None = None,
    dry_run: bool = True,
    private: bool = True,
    allow_license: str | None = None,
    overwrite: bool = False,
    force: bool = False,
) -> Rehearsal | Published:
    """Write a run's model card and, unless `dry_run`, publish the run on the Hub.

    The token is looked for (environment, Kaggle, Colab, login), never taken as a parameter, printed or
    stored. A second call sends only what changed. Without a token the run stays local, and the result's note
    says how to publish it later.

    Args:
        run: the run directory.
        repo_id: `name` or `owner/name`; made from the model's name and the plan's format if None.
        dry_run: write the card and the list of files, send nothing.
        private: make a new repository private; an existing one that is public is refused.
        allow_license: licence id of the base as you know it, where it was not found or forbids passing on the
            weights; the card records that you stated it.
        overwrite: replace the content of a repository that holds something else.
        force: rehearse again even if nothing changed since the last time.

    Returns:
        A Published, or a Rehearsal where nothing was sent.

    Raises:
        PublishError: no repository can have that name, a gate is closed (never in a dry run), or the Hub
            refused.
        PlatformError: what was found as a token can be none.
        RunError: the run lacks a file; says which notebook makes it.
    """
    if repo_id is not None:
        check_name(repo_id)
    run = run if isinstance(run, Run) else existing_run(run)
    info = run_info(run)
    licence = find_licence(
        info["model"], run.model_dir, allow_license, location=info.get("location"), ask=not dry_run
    )
    asked = {"repo_id": repo_id, "dry_run": dry_run, "private": private, "licence": licence.as_dict()}
    inputs = {**asked, "run": _state(run)}
    with stage(run, "publish", inputs, ["publish"], force=force or not dry_run) as current:
        if current.finished:
            return Rehearsal.read(run)
        token = None if dry_run else hub_token()
        name = repo_id or default_name(run)
        rehearsal, card = rehearse(run, _with_owner(name, token, run), licence, private)
        current.record(repo_id=rehearsal.repo_id, ready=rehearsal.ready, total_bytes=rehearsal.total_bytes)
        if dry_run:
            return rehearsal
        _require_ready(run, rehearsal)
        if token is None:
            return replace(rehearsal, note=_later(run, rehearsal, allow_license))
        published = _send(rehearsal, card, token, overwrite)
        current.record(url=published.url, commit=published.commit)
        return published


def _state(run: Run) -> dict[str, Any]:
    """What a rehearsal depends on: the stages' fingerprints and records, and every file to be sent.

    By hash: a damaged disk changes neither a file's size nor its time.
    """
    stages = run_info(run)["stages"]
    return {
        "stages": {name: fingerprint(entry) for name, entry in stages.items() if name != "publish"},
        "files": {name: sha256_file(path) for name, path in collect_files(run).items() if path.exists()},
    }


def check_name(repo_id: str) -> None:
    """Refuse a repository's name that the Hub can't have; PublishError says what it may hold."""
    if isinstance(repo_id, str) and not repository_problem(repo_id):
        return
    parts = repo_id.split("/") if isinstance(repo_id, str) else []
    advised = "/".join(filter(None, map(_as_name, parts[-2:])))[:LONGEST_NAME].rstrip("-./") or "me/my-model"
    raise PublishError(
        f"repo_id={repo_id!r}: expected `name` or `owner/name` of letters without accents, digits, '-', '_' "
        f"and '.', at most {LONGEST_NAME} characters; no '--' or '..', no '-' or '.' at an end, and no "
        f"'.git' or '.ipynb' as the last part's end, e.g. {advised!r}."
    )


def _as_name(text: str) -> str:
    """A text as a part of a repository's name: what it can't hold becomes a hyphen."""
    name = re.sub(r"[^A-Za-z0-9_.]+|\.\.+", "-", text)
    name = re.sub(r"--+", "-", name).strip("-.")
    return name.removesuffix(".git").removesuffix(".ipynb").strip("-.")


def default_name(run: Run) -> str:
    """A repository name that says what the file is, e.g. `Qwen3.5-4B-SPI-nf4-16bit-12.2bpw`."""
    plan = read_json(run.plan_json, what="plan", stage=NOTEBOOKS["visualize"])
    formats = sorted(set(plan["formats"].values()), key=nominal_bits)
    model = _as_name(run_info(run)["model"]["id"].rstrip("/").split("/")[-1]) or "model"
    return "-".join([model, "SPI", *formats, f"{plan['bits_per_weight']:.1f}bpw"])


def _with_owner(name: str, token: Token | None, run: Run) -> str:
    if "/" in name:
        return name
    return f"{OWNER if token is None else owner_of(token, name, run.path)}/{name}"


def _require_ready(run: Run, rehearsal: Rehearsal) -> None:
    if not rehearsal.ready:
        closed = "\n".join(f"  {gate}" for gate in rehearsal.gates if not gate.passed)
        raise PublishError(f"{run.path} may not be published yet:\n{closed}\nNothing was sent.")


def _later(run: Run, rehearsal: Rehearsal, allow_license: str | None) -> str:
    """How to publish from another place, as a command."""
    flags = "" if rehearsal.private else " --public"
    flags += f" --allow-license {allow_license}" if allow_license else ""
    name = rehearsal.repo_id.removeprefix(f"{OWNER}/")
    return (
        "Saved locally, not published: no Hub token was found. To publish it later, run `hf auth login` (or "
        f'set HF_TOKEN, or attach the secret HF_TOKEN) and then\n  python -m spi_utils.publish "{run.path}" '
        f"--repo-id {name}{flags}"
    )


def _send(rehearsal: Rehearsal, card: ModelCard, token: Token, overwrite: bool) -> Published:
    sent = send(
        card,
        rehearsal.files,
        rehearsal.repo_id,
        token,
        private=rehearsal.private,
        overwrite=overwrite,
        local=rehearsal.folder.parent,
    )
    new = f"Published at {sent.url}" if sent.uploaded or sent.removed else f"Nothing new to send: {sent.url}"
    held = {**vars(rehearsal), "note": new}
    return Published(**held, url=sent.url, commit=sent.commit, uploaded=sent.uploaded, removed=sent.removed)


def main(arguments: list[str] | None = None) -> int:
    """`python -m spi_utils.publish RUN_DIR`: publish a run that was saved locally; 1 where it was refused."""
    parser = argparse.ArgumentParser(prog="python -m spi_utils.publish", description=main.__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--repo-id", help="name or owner/name; made from the model's name if left out")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    parser.add_argument("--allow-license", help="the base's licence id, where you know it and it isn't found")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a repository that holds other things"
    )
    parser.add_argument("--dry-run", action="store_true", help="write the card and the list, send nothing")
    asked = parser.parse_args(arguments)
    try:
        result = publish(
            asked.run_dir,
            repo_id=asked.repo_id,
            dry_run=asked.dry_run,
            private=not asked.public,
            allow_license=asked.allow_license,
            overwrite=asked.overwrite,
        )
    except SPIError as error:
        print(error, file=sys.stderr)
        return 1
    print(result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
