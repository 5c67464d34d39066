"""A finished run -> a model card, and a repository on the Hub that a stranger can trust.

Nothing is sent unless every gate is passed: the evaluation must be of this very checkpoint, every stage
finished, the size what the plan said, the licence known. A rehearsal (the default) writes the card and the
list of what would be sent, and sends nothing.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spi_utils.card import Facts, make_card
from spi_utils.errors import PublishError, SPIError
from spi_utils.gates import Gate, check_gates, checkpoint_hash, weight_files
from spi_utils.licences import Licence, find_licence
from spi_utils.platforms import Token, hub_token, repository_url
from spi_utils.runs import (
    NOTEBOOKS,
    Run,
    existing_run,
    read_json,
    read_layers,
    run_info,
    sha256_file,
    stage,
    write_json,
    write_text,
)
from spi_utils.upload import RECORD, owner_of, send

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

SCHEMA = 1
OWNER = "your-name"  # stands for the token's owner while there is no token
CARD = "README.md"
FIGURE_TYPES = (".png", ".svg")
# Files of the checkpoint's folder that the card or the run's own copies take the place of.
OURS = {CARD, "plan.json", RECORD}


@dataclass(frozen=True)
class Rehearsal:
    """What would be published: the card, the files, and the gates passed or not.

    `files` maps each path in the repository to the local file; `total_bytes` is their sum.
    """

    repo_id: str
    private: bool
    folder: Path
    files: dict[str, Path]
    gates: tuple[Gate, ...]
    licence: Licence
    total_bytes: int
    note: str = ""

    @property
    def ready(self) -> bool:
        """True when every gate is passed."""
        return all(gate.passed for gate in self.gates)

    @property
    def card(self) -> Path:
        """The model card on this machine."""
        return self.folder / CARD

    def __str__(self) -> str:
        gates = "\n".join(f"  {gate}" for gate in self.gates)
        listed = "\n".join(f"  {p.stat().st_size:>14,}  {name}" for name, p in self.files.items())
        visibility = "private" if self.private else "public"
        return (
            f"{self.note}\n{visibility} repository {self.repo_id}\ngates\n{gates}\n"
            f"{len(self.files)} files, {self.total_bytes / 1e9:.3f} GB\n{listed}\ncard: {self.card}"
        )


@dataclass(frozen=True)
class Published(Rehearsal):
    """What was published: where, as which commit, and which paths the call sent or removed."""

    url: str = ""
    commit: str = ""
    uploaded: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def publish(
    run: Run | str | Path,
    *,
    repo_id: str | None = None,
    dry_run: bool = True,
    private: bool = True,
    allow_license: str | None = None,
    overwrite: bool = False,
) -> Rehearsal | Published:
    """Write a run's model card and, unless `dry_run`, publish the run on the Hub.

    The token is looked for (environment, Kaggle, Colab, login), never taken as a parameter, printed or
    stored. A second call sends only what changed. Without a token the run stays local, and the result's note
    says how to publish it later.

    Args:
        run: the run directory.
        repo_id: `name` or `owner/name`; made from the model's name and the plan's format if None.
        dry_run: write the card and the list of files, send nothing.
        private: make a new repository private; an existing one stays as it is.
        allow_license: licence id of the base as you know it, where it was not found or forbids passing on the
            weights; the card records that you stated it.
        overwrite: replace the content of a repository that holds something else.

    Returns:
        A Published, or a Rehearsal where nothing was sent.

    Raises:
        PublishError: a gate is closed (never in a dry run), or the Hub refused.
        RunError: the run lacks a file; says which notebook makes it.
    """
    run = run if isinstance(run, Run) else existing_run(run)
    inputs = {"repo_id": repo_id, "dry_run": dry_run, "private": private, "allow_license": allow_license}
    with stage(run, "publish", inputs, ["publish"], force=True) as current:
        licence = find_licence(run_info(run)["model"], run.model_dir, allow_license)
        token = None if dry_run else hub_token()
        name = repo_id or default_name(run)
        rehearsal, card = rehearse(run, _with_owner(name, token, run), licence, private)
        current.record(repo_id=rehearsal.repo_id, ready=rehearsal.ready, total_bytes=rehearsal.total_bytes)
        if dry_run:
            return replace(rehearsal, note="Rehearsal: nothing was sent.")
        _require_ready(run, rehearsal)
        if token is None:
            return replace(rehearsal, note=_later(run, rehearsal, allow_license))
        published = _send(rehearsal, card, token, overwrite)
        current.record(url=published.url, commit=published.commit)
        return published


def default_name(run: Run) -> str:
    """A repository name from the base's and the plan's lower formats, e.g. `Qwen3.5-4B-SPI-nf4`."""
    plan = read_json(run.plan_json, what="plan", stage=NOTEBOOKS["visualize"])
    formats = sorted(set(plan["formats"].values()) - {"16bit"})
    return "-".join([run_info(run)["model"]["id"].rstrip("/").split("/")[-1], "SPI", *formats])


def _with_owner(name: str, token: Token | None, run: Run) -> str:
    if "/" in name:
        return name
    return f"{OWNER if token is None else owner_of(token, name, run.path)}/{name}"


def _require_ready(run: Run, rehearsal: Rehearsal) -> None:
    if not rehearsal.ready:
        closed = "\n".join(f"  {gate}" for gate in rehearsal.gates if not gate.passed)
        raise PublishError(f"{run.path} may not be published yet:\n{closed}\nNothing was sent.")


def rehearse(run: Run, repo_id: str, licence: Licence, private: bool) -> tuple[Rehearsal, ModelCard]:
    """Write `publish/`: the card, the environment record and the manifest of what would be sent."""
    facts = _facts(run, repo_id, licence)
    card = make_card(facts)
    write_text(run.publish / CARD, str(card))
    files = collect_files(run)
    write_json(run.publish / RECORD, _record(run, facts, files))
    files = dict(sorted({**files, CARD: run.publish / CARD, RECORD: run.publish / RECORD}.items()))
    total = sum(path.stat().st_size for path in files.values())
    rehearsal = Rehearsal(
        repo_id, private, run.publish, files, check_gates(run, files, licence), licence, total
    )
    write_json(run.publish / "manifest.json", _manifest(rehearsal))
    return rehearsal, card


def _facts(run: Run, repo_id: str, licence: Licence) -> Facts:
    return Facts(
        repo_id=repo_id,
        identity=run_info(run)["model"],
        plan=read_json(run.plan_json, what="plan", stage=NOTEBOOKS["visualize"]),
        evaluation=read_json(run.evaluation_json, what="evaluation", stage=NOTEBOOKS["evaluate"]),
        layers=read_layers(run),
        licence=licence,
        file_bytes=sum(path.stat().st_size for path in weight_files(run.model_dir)),
        figures=tuple(name for name in collect_files(run) if name.startswith("figures/")),
        repository=repository_url(),
    )


def collect_files(run: Run) -> dict[str, Path]:
    """Path in the repository -> file of the run, without the card and the record."""
    model = {
        path.relative_to(run.model_dir).as_posix(): path
        for path in run.model_dir.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
    held = {name: path for name, path in model.items() if name not in OURS}
    tables = {path.name: path for path in (run.plan_json, run.layers_csv, run.evaluation_json)}
    figures = {f"figures/{path.name}": path for path in run.figures.glob("*") if path.suffix in FIGURE_TYPES}
    return dict(sorted({**held, **tables, **figures}.items()))


def _record(run: Run, facts: Facts, files: dict[str, Path]) -> dict[str, Any]:
    """What made the published files, and their hashes: for whoever wants to check or repeat it."""
    stages = run_info(run)["stages"]
    return {
        "schema": SCHEMA,
        "base_model": facts.base_name,
        "base_revision": facts.identity.get("revision"),
        "base_weights_sha256": facts.identity["sha256"],
        "storage_dtype": facts.identity["storage_dtype"],
        "checkpoint_sha256": checkpoint_hash(run.model_dir),
        "licence": facts.licence.as_dict(),
        "stages": {name: entry["environment"] for name, entry in stages.items() if name != "publish"},
        "files": {name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for name, p in files.items()},
    }


def _manifest(rehearsal: Rehearsal) -> dict[str, Any]:
    """What would be sent, for people: nothing reads it back."""
    return {
        "schema": SCHEMA,
        "repo_id": rehearsal.repo_id,
        "private": rehearsal.private,
        "ready": rehearsal.ready,
        "gates": [asdict(gate) for gate in rehearsal.gates],
        "total_bytes": rehearsal.total_bytes,
        "files": {name: path.stat().st_size for name, path in rehearsal.files.items()},
    }


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
