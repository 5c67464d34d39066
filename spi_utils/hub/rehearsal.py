"""What would be published, written to `publish/`: the card, the environment record, the list of files."""

from __future__ import annotations

import base64
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spi_utils.hub.card import make_card
from spi_utils.hub.card_facts import Facts
from spi_utils.hub.gates import Gate, check_gates, weight_files
from spi_utils.hub.licences import Licence
from spi_utils.hub.upload import RECORD
from spi_utils.platforms import repository_url
from spi_utils.runs import (
    NOTEBOOKS,
    Run,
    checkpoint_hash,
    read_json,
    read_layers,
    run_info,
    sha256_file,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

SCHEMA = 1
CARD = "README.md"
MANIFEST = "manifest.json"
FIGURE_TYPES = (".png", ".svg")
UNFINISHED = {".tmp", ".temp", ".part", ".partial", ".incomplete", ".lock", ".swp", ".bak"}
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
    note: str = "Rehearsal: nothing was sent."

    @property
    def ready(self) -> bool:
        """True when every gate is passed."""
        return all(gate.passed for gate in self.gates)

    @property
    def card(self) -> Path:
        """The model card on this machine."""
        return self.folder / CARD

    def preview(self) -> str:
        """The card's Markdown without its YAML and with its pictures inside: what a notebook can show."""
        text = self.card.read_text(encoding="utf-8").split("---", 2)[2]

        def inside(link: re.Match[str]) -> str:
            data = base64.b64encode(self.files[link[1]].read_bytes()).decode("ascii")
            return f"](data:image/png;base64,{data})"

        return re.sub(r"\]\((figures/[^)]+\.png)\)", inside, text)

    @classmethod
    def read(cls, run: Run) -> Rehearsal:
        """The rehearsal that `publish/` holds."""
        held = read_json(run.publish / MANIFEST, SCHEMA, "manifest", NOTEBOOKS["publish"])
        own = {name: run.publish / name for name in (CARD, RECORD)}
        return cls(
            held["repo_id"],
            held["private"],
            run.publish,
            dict(sorted({**collect_files(run), **own}.items())),
            tuple(Gate(**gate) for gate in held["gates"]),
            Licence(**held["licence"]),
            held["total_bytes"],
        )

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
    write_json(run.publish / MANIFEST, _manifest(rehearsal))
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
    """Path in the repository -> file of the run, without the card and the record.

    Hidden and temporary files, such as a killed process leaves, are never among them.
    """
    held = {name: path for name, path in _below(run.model_dir).items() if name not in OURS}
    tables = {path.name: path for path in (run.plan_json, run.layers_csv, run.evaluation_json)}
    figures = {
        f"figures/{name}": path
        for name, path in _below(run.figures).items()
        if "/" not in name and path.suffix in FIGURE_TYPES
    }
    return dict(sorted({**held, **tables, **figures}.items()))


def _below(folder: Path) -> dict[str, Path]:
    """Path within a folder -> file, hidden and unfinished ones left out."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        name.as_posix(): path
        for name, path in files.items()
        if not any(part.startswith(".") for part in name.parts)
        if path.suffix not in UNFINISHED and not path.name.endswith("~")
    }


def _record(run: Run, facts: Facts, files: dict[str, Path]) -> dict[str, Any]:
    """What made the published files, and their hashes: for whoever wants to check or repeat it."""
    stages = run_info(run)["stages"]
    return {
        "schema": SCHEMA,
        "base_model": facts.base_name,
        "base_revision": facts.identity.get("revision"),
        "base_weights_sha256": facts.identity["sha256"],
        "storage_dtype": facts.identity["storage_dtype"],
        "checkpoint_sha256": checkpoint_hash(weight_files(run.model_dir)),
        "licence": facts.licence.as_dict(),
        "stages": {name: entry["environment"] for name, entry in stages.items() if name != "publish"},
        "files": {name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for name, p in files.items()},
    }


def _manifest(rehearsal: Rehearsal) -> dict[str, Any]:
    """What would be sent, for people and for `Rehearsal.read`."""
    return {
        "schema": SCHEMA,
        "repo_id": rehearsal.repo_id,
        "private": rehearsal.private,
        "ready": rehearsal.ready,
        "licence": asdict(rehearsal.licence),
        "gates": [asdict(gate) for gate in rehearsal.gates],
        "total_bytes": rehearsal.total_bytes,
        "files": {name: path.stat().st_size for name, path in rehearsal.files.items()},
    }
