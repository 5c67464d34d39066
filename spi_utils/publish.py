"""A finished run -> a model card, and a repository on the Hub that a stranger can trust.

Nothing is sent unless every gate is passed: the evaluation must be of this very checkpoint, every stage
finished, the size what the plan said, the licence known. A rehearsal (the default) writes the card and the
list of what would be sent, and sends nothing.
"""

from __future__ import annotations

import base64
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError, safe_open

from spi_utils import runs
from spi_utils.card import Licence, base_of, make_card, read_base, shown_figures
from spi_utils.claims import Evaluation
from spi_utils.errors import PublishError, RunError
from spi_utils.formats import size_tolerance
from spi_utils.models import is_transport_error, server_delay
from spi_utils.notebook import LONGEST_NAME, repository_problem
from spi_utils.plan import ProtectionPlan, nominal_bits
from spi_utils.progress import interactive, progress
from spi_utils.runs import NOTEBOOKS, Run, run_info, sha256_file
from spi_utils.tokens import Token, hub_token, redacted

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelCard

OWNER = "your-name"  # stands for the token's owner while there is no token
SCHEMA = 1
CARD = "README.md"
RECORD = "environment.json"  # the file by which a repository is known as one of ours
MANIFEST = "manifest.json"
UNFINISHED = {".tmp", ".temp", ".part", ".partial", ".incomplete", ".lock", ".swp", ".bak"}
# Files of the checkpoint's folder that the card or the run's own copies take the place of.
OURS = {CARD, "plan.json", RECORD}


@dataclass(frozen=True)
class Gate:
    """One condition: its name, whether it is met, and what was found (and what to do where it is not).

    `warning`: it is met, with something that whoever publishes should know.
    """

    name: str
    passed: bool
    found: str
    warning: bool = False

    def __str__(self) -> str:
        word = "BLOCKED" if not self.passed else "WARNING" if self.warning else "ok     "
        return f"{word} {self.name}: {self.found}"


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
        held = runs.read_json(run.publish / MANIFEST, SCHEMA, "manifest", NOTEBOOKS["publish"])
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
        RunError, PlanError: the run lacks a file, or one is damaged; says which notebook makes it.
    """
    if repo_id is not None:
        check_name(repo_id)
    run = run if isinstance(run, Run) else runs.existing_run(run)
    info = run_info(run)
    licence, languages = read_base(
        info["model"], run.model_dir, allow_license, location=info.get("location"), ask=not dry_run
    )
    inputs = {
        **{"repo_id": repo_id, "dry_run": dry_run, "private": private, "licence": asdict(licence)},
        **{"languages": languages, "card": sha256_file(Path(__file__).with_name("card.md.jinja"))},
        "stages": {
            name: runs.fingerprint(entry) for name, entry in info["stages"].items() if name != "publish"
        },
        # By hash: a damaged disk changes neither a file's size nor its time.
        "files": {name: sha256_file(path) for name, path in collect_files(run).items() if path.exists()},
    }
    with runs.stage(run, "publish", inputs, ["publish"], force=force or not dry_run) as current:
        if current.finished:
            return Rehearsal.read(run)
        token = None if dry_run else hub_token()
        plan = ProtectionPlan.read(run.plan_json)
        name = repo_id or default_name(plan, info["model"])
        if "/" not in name:
            name = f"{OWNER if token is None else owner_of(token, name, run.path)}/{name}"
        rehearsal, card = rehearse(run, name, plan, licence, languages, private)
        current.record(repo_id=name, ready=rehearsal.ready, total_bytes=rehearsal.total_bytes)
        if dry_run:
            return rehearsal
        if not rehearsal.ready:
            closed = "\n".join(f"  {gate}" for gate in rehearsal.gates if not gate.passed)
            raise PublishError(f"{run.path} may not be published yet:\n{closed}\nNothing was sent.")
        if token is None:
            flags = "" if private else " --public"
            flags += f" --allow-license {allow_license}" if allow_license else ""
            later = (
                "Saved locally, not published: no Hub token was found. To publish it later, run `hf auth "
                "login` (or set HF_TOKEN, or attach the secret HF_TOKEN) and then\n  python -m "
                f'spi_utils publish "{run.path}" --repo-id {name.removeprefix(f"{OWNER}/")}{flags}'
            )
            return replace(rehearsal, note=later)
        url, commit, uploaded, removed = send(
            card, rehearsal.files, name, token, private=private, overwrite=overwrite, local=run.path
        )
        current.record(url=url, commit=commit)
        note = f"Published at {url}" if uploaded or removed else f"Nothing new to send: {url}"
        return Published(
            **{**vars(rehearsal), "note": note}, url=url, commit=commit, uploaded=uploaded, removed=removed
        )


# --- the name --------------------------------------------------------------------------------------------


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


def default_name(plan: ProtectionPlan, identity: Mapping[str, Any]) -> str:
    """A repository name that says what the file is, e.g. `Qwen3.5-4B-SPI-nf4-16bit-12.2bpw`."""
    formats = sorted(set(plan.formats.values()), key=nominal_bits)
    model = _as_name(identity["id"].rstrip("/").split("/")[-1]) or "model"
    return "-".join([model, "SPI", *formats, f"{plan.bits_per_weight:.1f}bpw"])


# --- the rehearsal ---------------------------------------------------------------------------------------


def rehearse(
    run: Run, repo_id: str, plan: ProtectionPlan, licence: Licence, languages: list[str], private: bool
) -> tuple[Rehearsal, ModelCard]:
    """Write `publish/`: the card, the environment record and the manifest of what would be sent."""
    info = run_info(run)
    evaluation = Evaluation.read(run.evaluation_json)
    files, weights = collect_files(run), weight_files(run.model_dir)
    config = run.model_dir / "config.json"
    card = make_card(
        repo_id,
        plan,
        evaluation,
        runs.read_layers(run),
        identity=info["model"],
        licence=licence,
        languages=languages,
        figures=[name for name in files if name.startswith("figures/")],
        file_bytes=sum(path.stat().st_size for path in weights),
        remote_code=config.is_file() and "auto_map" in runs.read_json(config),
    )
    runs.write_text(run.publish / CARD, str(card))
    record = {
        "schema": SCHEMA,
        "base_model": base_of(info["model"])[1],
        "base_revision": info["model"].get("revision"),
        "base_weights_sha256": info["model"]["sha256"],
        "storage_dtype": info["model"]["storage_dtype"],
        "checkpoint_sha256": runs.checkpoint_hash(weights),
        "licence": {**asdict(licence), "condition": licence.condition},
        "stages": {name: held["environment"] for name, held in info["stages"].items() if name != "publish"},
        "files": {name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for name, p in files.items()},
    }
    runs.write_json(run.publish / RECORD, record)
    files = dict(sorted({**files, CARD: run.publish / CARD, RECORD: run.publish / RECORD}.items()))
    gates = check_gates(run, plan, evaluation, files, licence)
    total = sum(path.stat().st_size for path in files.values())
    rehearsal = Rehearsal(repo_id, private, run.publish, files, gates, licence, total)
    manifest = {
        "schema": SCHEMA,
        "repo_id": repo_id,
        "private": private,
        "ready": rehearsal.ready,
        "licence": asdict(licence),
        "gates": [asdict(gate) for gate in gates],
        "total_bytes": total,
        "files": {name: path.stat().st_size for name, path in files.items()},
    }
    runs.write_json(run.publish / MANIFEST, manifest)
    return rehearsal, card


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in name order; hidden ones are unfinished, and nobody's."""
    return sorted(path for path in model_dir.glob("*.safetensors") if not path.name.startswith("."))


def collect_files(run: Run) -> dict[str, Path]:
    """Path in the repository -> file of the run, without the card and the record; of the figures the card's.

    Hidden and temporary files, such as a killed process leaves, are never among them.
    """
    held = {name: path for name, path in _below(run.model_dir).items() if name not in OURS}
    tables = {path.name: path for path in (run.plan_json, run.layers_csv, run.evaluation_json)}
    drawn = {f"figures/{name}": path for name, path in _below(run.figures).items()}
    figures = {name: drawn[name] for name, _ in shown_figures(sorted(drawn))}
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


# --- the gates -------------------------------------------------------------------------------------------

BEFORE_PUBLISH = ("analyze", "quantize", "evaluate")  # the plan has a gate of its own
CHECKPOINT_FILES = ("config.json", "tokenizer_config.json", "generate.py")
HEADER_LIMIT = 100_000_000  # bytes, the safetensors format's own
WEIGHT_TYPES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack"}
NOT_SCORED = "not scored as loaded: "
MEASURED = ("layers.csv", "evaluation.json", "model/")  # a slider or a later stage may redo the others
SECRET = re.compile(r"hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{30,}")
# Absolute paths as people's machines and hosted notebooks have them, no part of a web address.
LOCAL_PATH = re.compile(
    r"(?<![\w.:/~<-])/(home|Users|root|tmp|var|mnt|media|opt|scratch|srv|workspace|Volumes|content|kaggle)"
    r"/[^\s\"'<>)]+|(?<![A-Za-z])[A-Za-z]:(\\\\?|/)Users[\\/][^\s\"'<>)]+"
)
# What travels along from the base's own folder.
OF_THE_BASE = re.compile(
    r"(tokenizer|vocab|merges|special_tokens|added_tokens|chat_template|preprocessor|processor|video_|LICEN[CS]E|"
    r"NOTICE|USE_POLICY|.*\.(tiktoken|model|safetensors)$|(?!generate).*\.py$).*",
    re.DOTALL,
)
# Tensors that only a quantized module has beside its weight (bitsandbytes; compressed-tensors).
QUANTIZED = re.compile(r"^(?P<module>.+)\.weight(\.absmax|\.SCB|_packed|_scale)$")
QUANTIZE, EVALUATE = (f"run notebook {NOTEBOOKS[name]}" for name in ("quantize", "evaluate"))


def check_gates(
    run: Run, plan: ProtectionPlan, evaluation: Evaluation, files: Mapping[str, Path], licence: Licence
) -> tuple[Gate, ...]:
    """All gates, in the order in which a person would mend them.

    Each reads what is on the disk now, not what a stage once said: a file that was changed, or made from
    another plan, closes it.
    """
    # what a reader of a damaged file says names the file in full
    return tuple(
        Gate(name, wrong is None, (wrong or found).replace(f"{run.path}/", ""), found.startswith(NOT_SCORED))
        for name, wrong, found in _conditions(run, plan, evaluation, files, licence)
    )


def _conditions(
    run: Run, plan: ProtectionPlan, evaluation: Evaluation, files: Mapping[str, Path], licence: Licence
) -> Iterator[tuple[str, str | None, str]]:
    """(gate, what is wrong or None, what is found where nothing is)."""
    info, weights = run_info(run), weight_files(run.model_dir)
    yield "stages", _unfinished(run, info), f"{', '.join(BEFORE_PUBLISH)} finished, their files unchanged"

    missing = [name for name in CHECKPOINT_FILES if not (run.model_dir / name).is_file()]
    missing += [] if weights else ["*.safetensors"]
    wrong = f"model/ lacks {', '.join(missing)}; {QUANTIZE}" if missing else None
    yield "checkpoint", wrong, f"{len(weights)} weight file(s), tokenizer, generate.py"

    kept = len(plan.protected)
    found = f"{len(plan.formats) - kept} modules quantized and {kept} kept, as planned"
    yield "plan", unplanned(run, plan), found

    own, wrong = runs.checkpoint_hash(weights), None
    of = {evaluation.checkpoint_sha256, evaluation.hashes.get("checkpoint", own)} - {own}
    if of:
        wrong = f"it is of checkpoint {min(of)[:12]}, model/ holds {own[:12]}; {EVALUATE}"
    elif evaluation.hashes.get("plan") != sha256_file(run.plan_json):
        wrong = f"plan.json changed after it; {EVALUATE}"
    yield "evaluation", wrong, f"of this very checkpoint, {own[:12]}"

    # A fresh process has used the checkpoint as its readers will (notebook 03).
    proof, wrong = info["stages"].get("quantize", {}).get("proof") or {}, None
    if not proof.get("finite") or "generation" not in proof:
        wrong = f"no fresh process has run text through this checkpoint; {QUANTIZE} where it can be loaded"
    used = f"{proof.get('tokens')} tokens of {proof.get('text')} in {proof.get('dtype')}"
    yield "proof by use", wrong, f"{used}, and an answer to a prompt"

    # The model as loaded gave the numbers that its file's tensors gave (notebook 04).
    stock, wrong = evaluation.stock, None
    loaded, own_kl, near = (_number(stock.get(key)) for key in ("kl", "kl_file", "tolerance"))
    found = f"KL {loaded:.4f} as loaded, {own_kl:.4f} in float32 from the file, allowed is ±{near:.4f}"
    if "agrees" not in stock:
        wrong = f"the checkpoint was not scored as stock transformers load it; {EVALUATE} again"
    elif stock["agrees"] is None and stock.get("reason"):
        found = f"{NOT_SCORED}{stock['reason']}"
    elif stock["agrees"] is not True or not abs(loaded - own_kl) <= near:  # NaN too
        wrong = f"{found}; {EVALUATE} again"
    yield "stock score", wrong, found

    size, planned = sum(path.stat().st_size for path in weights), plan.bytes["total"]
    found, allowed = (
        f"{size:,} bytes on disk, {planned:,} planned ({size / planned - 1:+.2%})",
        size_tolerance(planned),
    )
    wrong = (
        f"{found}; allowed is ±{allowed:,} bytes; quantize again" if abs(size - planned) > allowed else None
    )
    yield "size", wrong, found

    why, wrong = "forbids passing on changed weights" if licence.forbids else "is unknown", None
    if not licence.usable:
        wrong = (
            f"the base's licence {why} ({licence.id or licence.found}); if you know that you may publish, "
            "pass allow_license='<its id>' (the card will say that you did)"
        )
    yield "licence", wrong, f"{licence.id}, {licence.found}"

    found = f"none found in {len(files)} files"
    secret = next((name for name, path in files.items() if SECRET.search(_searchable(path))), None)
    wrong = None if secret is None else f"{secret} holds what looks like an access token; remove it"
    yield "secrets", wrong, f"{found} (of the weights, in their headers)"
    yield "local paths", _place(run, info, files), found


def _unfinished(run: Run, info: Mapping[str, Any]) -> str | None:
    """A stage before publishing that has not finished, or whose files are not what it wrote."""
    stages = info["stages"]
    for name in BEFORE_PUBLISH:
        if name not in stages:
            return f"{name} has not finished; run notebook {NOTEBOOKS[name]}"
        for path, held in stages[name].get("outputs", {}).items():
            file = run.path / path
            if path.startswith(MEASURED) and not (file.is_file() and sha256_file(file) == held["sha256"]):
                return f"{path} is not what {name} wrote; run notebook {NOTEBOOKS[name]} again"
    recorded = stages["quantize"].get("outputs", {})
    below = sorted(path.relative_to(run.path) for path in run.model_dir.rglob("*") if path.is_file())
    for path in below:  # whatever a loader would take weights from
        hidden = any(part.startswith(".") for part in path.parts)
        if path.suffix in WEIGHT_TYPES and not hidden and path.as_posix() not in recorded:
            return f"{path.as_posix()} was not written by quantize; remove it, or {QUANTIZE} again"
    return None


def unplanned(run: Run, plan: ProtectionPlan) -> str | None:
    """The quantized modules, read from the files' headers, must be exactly the plan's."""
    planned = {_short(name) for name, form in plan.formats.items() if form != "16bit"}
    try:
        held = {_short(name) for name in quantized_modules(run.model_dir)}
    except PublishError as error:
        return f"{error} {QUANTIZE.capitalize()} again"
    if planned == held:
        return None
    example = sorted(planned ^ held)[0]
    count = f"{len(planned ^ held)} modules differ between plan.json and model/"
    return f"{count}, the first {example}; {QUANTIZE} again"


def _short(name: str) -> str:
    """A module's name without the prefixes that files and models of multimodal checkpoints order differently
    ("language_model.model.layers…", "model.language_model.layers…")."""
    return re.sub(r"(^|\.)language_model\.", r"\1", name).removeprefix("model.")


def quantized_modules(model_dir: Path) -> set[str]:
    """Names of the modules whose weights are stored quantized, from the safetensors headers alone.

    Raises:
        PublishError: a file is truncated or no safetensors file.
    """
    names: list[str] = []
    for path in weight_files(model_dir):
        try:
            with safe_open(path, framework="numpy") as file:
                names += file.keys()
        except SafetensorError as error:
            raise PublishError(f"{path}: truncated, or no safetensors file ({error}).") from error
    return {found["module"] for found in map(QUANTIZED.match, names) if found}


def _number(value: object) -> float:
    """A record's number; NaN, which no comparison passes, where there is none."""
    return float(value) if isinstance(value, int | float) else math.nan


def _place(run: Run, info: Mapping[str, Any], files: Mapping[str, Path]) -> str | None:
    """No file may name a folder of this machine.

    Files that came with the base are searched for the run's and the base's own folders only: a vocabulary
    may hold words like "/home/".
    """
    location = str(info.get("location", ""))
    folders = {str(run.path.resolve()), str(run.path.absolute()), str(Path.home()), location}
    known = [folder for folder in folders if Path(folder).is_absolute() and len(Path(folder).parts) > 2]
    for name, path in files.items():
        text = _searchable(path)
        places = [text.find(folder) for folder in known if folder in text]
        if not places and not OF_THE_BASE.fullmatch(name) and (match := LOCAL_PATH.search(text)):
            places = [match.start()]
        if places:
            line = text.count("\n", 0, min(places)) + 1  # the manifest must not name the folder too
            return f"line {line} of {name} names a folder of some machine; make the file again without it"
    return None


def _searchable(path: Path) -> str:
    """A file's bytes as text, whatever it is called; of a safetensors file the header."""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            return file.read(8 + int.from_bytes(file.read(8), "little") % HEADER_LIMIT).decode("latin-1")
        return file.read().decode("utf-8", errors="replace")


# --- sending ---------------------------------------------------------------------------------------------

SENT_ALONE = 10_000_000  # bytes; files from here on are sent one by one, before the commit


def send(
    card: ModelCard,
    files: Mapping[str, Path],
    repo_id: str,
    token: Token,
    *,
    private: bool,
    overwrite: bool,
    local: Path,
) -> tuple[str, str, tuple[str, ...], tuple[str, ...]]:
    """Make the repository hold `files`, in one commit that can be interrupted, repeated and trusted.

    The repository changes after every large file has arrived, and only if nobody changed it meanwhile: it is
    never seen half published. A large file that arrived before an interruption is not sent again (the Hub
    knows it by its SHA-256), and huggingface_hub leaves files that did not change out of the commit.

    Args:
        card: the README, which the Hub validates before anything else is sent.
        files: path in the repository -> local file, the README and the record among them.
        repo_id: `owner/name`.
        overwrite: replace what is there even if this project did not put it there.
        local: folder to name in messages: what is safe whatever happens.

    Returns:
        The repository's address, the commit's id, the paths sent and the paths removed.

    Raises:
        PublishError: refused, unreachable, full, or the name holds something else; says what to do.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not interactive():
        disable_progress_bars()
    api = HfApi(token=token.value)
    ask = partial(_patiently, token=token, repo_id=repo_id, local=local)
    ask(lambda: _validate(api, card))
    ask(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    found = ask(lambda: api.repo_info(repo_id))
    if private and not found.private:
        raise PublishError(
            f"{repo_id} exists and is public, and a private repository was asked for. Nothing was sent. Pass "
            "private=False to publish there, or choose another `repo_id`."
        )
    before = ask(lambda: _tree(api, repo_id, found.sha))
    theirs = ask(lambda: _record_there(api, repo_id)) if RECORD in before and not overwrite else {}
    stale = _stale(repo_id, set(before), files, theirs, overwrite)
    large = [name for name, path in files.items() if path.stat().st_size >= SENT_ALONE]
    for name in progress(large, len(large), "large files at the Hub"):  # a kill costs at most one of them
        ask(partial(_send_alone, api, repo_id, name, files[name]))
    commit = ask(
        lambda: api.create_commit(
            repo_id,
            [  # made anew in each try: a call consumes them
                *(CommitOperationDelete(name) for name in stale),
                *(CommitOperationAdd(name, str(path)) for name, path in files.items()),
            ],
            commit_message="Publish a measured run",
            parent_commit=found.sha,
        )
    )
    after = ask(lambda: _tree(api, repo_id))
    changed = tuple(sorted(path for path in files if after.get(path) != before.get(path)))
    return f"{api.endpoint}/{repo_id}", str(commit.oid), changed, tuple(stale)


def owner_of(token: Token, repo_id: str, local: Path) -> str:
    """The account that a token belongs to.

    Raises:
        PublishError: the token isn't accepted, or there is no connection.
    """
    from huggingface_hub import HfApi

    who = _patiently(HfApi(token=token.value).whoami, token=token, repo_id=repo_id, local=local)
    return str(who["name"])


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


def _send_alone(api: HfApi, repo_id: str, name: str, path: Path) -> None:
    from huggingface_hub import CommitOperationAdd

    api.preupload_lfs_files(repo_id, [CommitOperationAdd(name, str(path))], free_memory=False)


def _tree(api: HfApi, repo_id: str, revision: str | None = None) -> dict[str, str]:
    """Path -> git's id of the content, of every file in the repository."""
    from huggingface_hub.hf_api import RepoFile

    entries = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    return {entry.path: entry.blob_id for entry in entries if isinstance(entry, RepoFile)}


def _record_there(api: HfApi, repo_id: str) -> dict[str, Any]:
    """The record of an earlier publication; empty where the file of that name is none."""
    path = api.hf_hub_download(repo_id, RECORD, force_download=True)
    try:
        return runs.read_json(path)
    except RunError:
        return {}


def _stale(
    repo_id: str, there: set[str], files: Mapping[str, Path], theirs: Mapping[str, Any], overwrite: bool
) -> list[str]:
    """Paths to remove: what an earlier publication left and this one has no more.

    Raises:
        PublishError: the repository holds something that isn't this model's run, and `overwrite` is off.
    """
    strangers = sorted(there - {".gitattributes"})
    gone = sorted(set(strangers) - set(files))
    if overwrite or not strangers:
        return gone
    mine = json.loads(files[RECORD].read_text(encoding="utf-8"))
    if theirs.get("base_model") != mine["base_model"]:
        other = f"a model made from {theirs.get('base_model')}"
        what = other if "base_model" in theirs else "files of another origin"
        raise PublishError(
            f"{repo_id} exists and holds {what} ({', '.join(strangers[:4])}, {len(strangers)} files); "
            f"expected it to be new, or a publication of {mine['base_model']}. Nothing was changed. Choose "
            "another `repo_id`, or pass overwrite=True to replace its content (the history keeps it)."
        )
    return [path for path in gone if path in theirs.get("files", {})]


# --- a Hub that is busy or refuses -----------------------------------------------------------------------

Result = TypeVar("Result")
ATTEMPTS = 5
LONGEST_WAIT = 600  # seconds; the Hub's rate windows are 300
RETRIED = (408, 429, 500, 502, 503, 504)
QUOTA = re.compile(r"storage|quota|payment|billing|limit reached|exceed", re.IGNORECASE)
OFFLINE, UNREACHABLE = -1, 0  # no HTTP status: nothing was asked, nothing answered
CHANGED = (
    "the repository changed while this ran ({status}): somebody else committed to it. That change stands, "
    "and nothing was committed. See at the repository's page what it was before publishing again."
)
# What a failure means for a publisher, by HTTP status.
STATUS = {
    OFFLINE: "HF_HUB_OFFLINE is set, so nothing may be sent. Unset it and restart the session.",
    UNREACHABLE: "no connection to the Hub ({said}). On Kaggle, switch Internet on in the right-hand panel.",
    400: "the Hub refused the request ({said}).",
    401: "the Hub does not accept the token from {token} (401): it is mistyped, expired or revoked. Make one "
    "at https://huggingface.co/settings/tokens (type “write”).",
    403: "the token from {token} may not write to {owner} (403). Use a token with write access to it, made "
    "at https://huggingface.co/settings/tokens (type “write”), or another `repo_id`. The Hub said: {said}.",
    404: "there is no user or organisation {owner}, or the token from {token} can't see it (404).",
    409: CHANGED,
    412: CHANGED,
    429: "too many requests (429), still after waiting as long as the Hub asked.",
    500: "the Hub has trouble of its own ({said}), still after several tries; see "
    "https://status.huggingface.co.",
    507: "the storage of {owner} is full. Free some at https://huggingface.co/settings/billing, or publish "
    "to another owner. The Hub said: {said}.",
}


def _patiently(function: Callable[[], Result], *, token: Token, repo_id: str, local: Path) -> Result:
    """`function()`, repeated after 408, 429, 5xx and broken connections.

    huggingface_hub (1.11 to 2.4, read in its source) waits by itself only while it sends files and asks how:
    an account, a new repository, the listing and the commit itself are asked once. 1.11 does not read
    `Retry-After`, and 2.4 no dates in it.

    Raises:
        PublishError: it failed for good, in plain words and without the token. An error that isn't the Hub's
            passes through.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return function()
        except Exception as error:
            texts = [str(link) for link in _chain(error)]
            said = " ".join(redacted(texts[0], token).split())
            status, response = _status(error, said)
            code = status if response is None else response.status_code
            if code not in (UNREACHABLE, *RETRIED) or attempt == ATTEMPTS:
                if status is not None:
                    words = {"token": token.source, "owner": repo_id.partition("/")[0], "said": said}
                    advice = STATUS[status].format(**words, status=status)
                elif any(text != redacted(text, token) for text in texts):
                    advice = f"{type(error).__name__}: {said}."
                else:
                    raise
                raise PublishError(
                    f"publishing to {repo_id} failed: {advice} The local files are untouched in {local}; the "
                    "same call goes on where this one ended."
                ) from None  # a Hub that echoes the request would put its header, and the token, into it
            asked = None if response is None else server_delay(response.headers)
            delay = min(2.0 ** (attempt - 1) if asked is None else asked, LONGEST_WAIT)
            label = f"HTTP {code}" if response is not None else "no connection"
        print(f"the Hub is busy ({label}); waiting {delay:.0f} s, then try {attempt + 1}")
        time.sleep(delay)
    raise AssertionError("unreachable")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: Exception, said: str) -> tuple[int | None, Any]:
    """The row of STATUS that an error belongs to, None for one that isn't the Hub's; and the HTTP response
    behind it, through the wrappers of upload threads, None if there was none."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    links = list(_chain(error))
    response = next((link.response for link in links if isinstance(link, HfHubHTTPError)), None)
    full = QUOTA.search(said) is not None
    if response is not None:
        status = 507 if full and response.status_code in (402, 403, 413) else int(response.status_code)
        return (status if status in STATUS else 500 if status >= 500 else 400), response
    # xet, which carries large files, raises plain RuntimeError and OSError where HTTP raises its own; those
    # that speak of a file of ours or of a refusal mean what they say.
    plain = isinstance(error, RuntimeError | OSError)
    plain = plain and not isinstance(error, FileNotFoundError | PermissionError)
    rows = (
        (any(isinstance(link, OfflineModeIsEnabled) for link in links), OFFLINE),
        (any(type(link).__name__ == "XetAuthenticationError" for link in links), 401),
        (any(map(is_transport_error, links)) or isinstance(error, json.JSONDecodeError), UNREACHABLE),
        (isinstance(error, ValueError), 507 if full else 400),  # a card or a file that the Hub refuses
        (plain, UNREACHABLE),
    )
    return next((status for holds, status in rows if holds), None), None
