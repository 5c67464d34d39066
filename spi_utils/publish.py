"""A finished run -> a model card, and a repository on the Hub that a stranger can trust.

Nothing is sent unless every gate is passed: every stage finished, the evaluation of this very checkpoint and
plan, the checkpoint used and scored as its readers will load it, the licence known. A rehearsal (the default)
writes the card and the list of what would be sent, and sends nothing.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from spi_utils import runs
from spi_utils.card import Licence, base_of, make_card, read_base, shown_figures
from spi_utils.claims import Evaluation, stock_sentence
from spi_utils.errors import PublishError, RunError
from spi_utils.models import is_transport_error
from spi_utils.plan import ProtectionPlan, nominal_bits
from spi_utils.progress import interactive
from spi_utils.runs import NOTEBOOKS, Run, run_info, sha256_file
from spi_utils.tokens import Token, hub_token, redacted

OWNER = "your-name"  # stands for the token's owner while there is no token
SCHEMA = 1
CARD = "README.md"
RECORD = "environment.json"  # the file by which a repository is known as one of ours
MANIFEST = "manifest.json"
NO_TOKEN = (
    "Saved locally, not published: no Hub token was found. To publish it later, run `hf auth login` (or set "
    'HF_TOKEN, or attach the secret HF_TOKEN) and then `spi-utils publish "{folder}"` with these options.'
)
# Files of the checkpoint's folder that the card or the run's own copies take the place of.
OURS = {CARD, "plan.json", RECORD}


@dataclass(frozen=True)
class Gate:
    """One condition: its name, whether it is met, and what was found (and what to do where it is not)."""

    name: str
    passed: bool
    found: str

    def __str__(self) -> str:
        return f"{'ok     ' if self.passed else 'BLOCKED'} {self.name}: {self.found}"


@dataclass(frozen=True)
class Publication:
    """What would be, or was, published: the card, the files, and the gates passed or not.

    `files` maps each path in the repository to the local file. `url` and `commit` say where something was
    sent; they are empty where nothing was.
    """

    repo_id: str
    private: bool
    card: Path
    files: dict[str, Path]
    gates: tuple[Gate, ...]
    note: str = "Rehearsal: nothing was sent."
    url: str = ""
    commit: str = ""

    @property
    def ready(self) -> bool:
        """True when every gate is passed."""
        return all(gate.passed for gate in self.gates)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: path.stat().st_size for name, path in self.files.items()}

    def preview(self) -> str:
        """The card's Markdown without its YAML, and without pictures, which lie where no notebook is."""
        text = self.card.read_text(encoding="utf-8").split("---", 2)[2]
        return re.sub(r"!\[.*\]\(.*\)\n", "", text)

    def __str__(self) -> str:
        gates = "\n".join(f"  {gate}" for gate in self.gates)
        listed = "\n".join(f"  {size:>14,}  {name}" for name, size in self.sizes.items())
        total = sum(self.sizes.values()) / 1e9
        kind = "private" if self.private else "public"
        return (
            f"{self.note}\n{kind} repository {self.repo_id}\ngates\n{gates}\n"
            f"{len(self.files)} files, {total:.3f} GB\n{listed}\ncard: {self.card}"
        )


def publish(
    run: Run | str | Path,
    *,
    repo_id: str | None = None,
    dry_run: bool = True,
    private: bool = True,
    allow_license: str | None = None,
    overwrite: bool = False,
    force: bool = False,
) -> Publication:
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
        force: as in every notebook; the card and the list are always made anew.

    Raises:
        PublishError: no repository can have that name, a gate is closed (never in a dry run), or the Hub
            refused.
        PlatformError: what was found as a token can be none.
        RunError, PlanError: the run lacks a file, or one is damaged; says which notebook makes it.
    """
    try:
        validate_repo_id(repo_id or OWNER)
    except HFValidationError as error:
        raise PublishError(f"repo_id={repo_id!r}: expected `name` or `owner/name`. {error}") from None
    run = run if isinstance(run, Run) else runs.existing_run(run)
    info, token = run_info(run), None if dry_run else hub_token()
    base = info["model"]
    licence, languages = read_base(base, info.get("location"), allow_license, ask=not dry_run)
    inputs = {"repo_id": repo_id, "dry_run": dry_run, "private": private, "licence": asdict(licence)}
    with runs.stage(run, "publish", inputs, ["publish"], force=True) as current:
        plan, evaluation = ProtectionPlan.read(run.plan_json), Evaluation.read(run.evaluation_json)
        name = repo_id or default_name(plan, base["id"])
        if "/" not in name:
            name = f"{OWNER if token is None else owner_of(token, name, run.path)}/{name}"
        files = collect_files(run)
        card = make_card(name, run, plan, evaluation, licence, languages, list(files))
        record = {
            "schema": SCHEMA,
            "base_model": base_of(base)[1],
            "base_revision": base.get("revision"),
            "base_weights_sha256": base["sha256"],
            "storage_dtype": base["storage_dtype"],
            "checkpoint_sha256": runs.checkpoint_hash(weight_files(run)),
            "licence": {**asdict(licence), "condition": licence.condition},
            "stages": {key: held["environment"] for key, held in info["stages"].items() if key != "publish"},
            "files": {k: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for k, p in files.items()},
        }
        runs.write_text(run.publish / CARD, str(card))
        runs.write_json(run.publish / RECORD, record)
        files = dict(sorted({**files, CARD: run.publish / CARD, RECORD: run.publish / RECORD}.items()))
        gates = check_gates(run, evaluation, files, licence)
        done = Publication(name, private, run.publish / CARD, files, gates)
        noted = {"repo_id": name, "ready": done.ready, "total_bytes": sum(done.sizes.values())}
        listed = {"licence": asdict(licence), "gates": [asdict(gate) for gate in gates], "files": done.sizes}
        runs.write_json(run.publish / MANIFEST, {"schema": SCHEMA, "private": private, **noted, **listed})
        current.record(**noted)
        if dry_run:
            return done
        if not done.ready:
            closed = "\n".join(f"  {gate}" for gate in gates if not gate.passed)
            raise PublishError(f"{run.path} may not be published yet:\n{closed}\nNothing was sent.")
        if token is None:
            return replace(done, note=NO_TOKEN.format(folder=run.path))
        done = send(done, token, overwrite=overwrite, local=run.path)
        current.record(url=done.url, commit=done.commit)
        return done


def default_name(plan: ProtectionPlan, model_id: str) -> str:
    """A repository name that says what the file is, e.g. `Qwen3.5-4B-SPI-nf4-16bit-12.2bpw`."""
    model = re.sub(r"[^A-Za-z0-9_.]+|\.\.+", "-", model_id.rstrip("/").split("/")[-1])
    model = re.sub(r"--+", "-", model).strip("-.") or "model"
    formats = sorted(set(plan.formats.values()), key=nominal_bits)
    return "-".join([model, "SPI", *formats, f"{plan.bits_per_weight:.1f}bpw"])


def weight_files(run: Run) -> list[Path]:
    """The safetensors files of the checkpoint, in name order; hidden ones are unfinished, and nobody's."""
    return sorted(run.model_dir.glob("[!.]*.safetensors"))


def collect_files(run: Run) -> dict[str, Path]:
    """Path in the repository -> file, without the card and the record: what notebook 03 wrote, and no file
    that a killed process, an editor or a person left beside it; of the figures those of the card."""
    made = run_info(run)["stages"].get("quantize", {}).get("outputs", {})
    files = {name.removeprefix("model/"): run.path / name for name in made if name.startswith("model/")}
    files = {name: path for name, path in files.items() if name not in OURS and path.is_file()}
    files |= {path.name: path for path in (run.plan_json, run.layers_csv, run.evaluation_json)}
    drawn = sorted(f"figures/{path.name}" for path in run.figures.glob("[!.]*.png"))
    return dict(sorted({**files, **{name: run.path / name for name, _ in shown_figures(drawn)}}.items()))


# --- the gates -------------------------------------------------------------------------------------------

MEASURED = ("layers.csv", "evaluation.json", "model/")  # a slider or a later stage may redo the others
SECRET = re.compile(r"hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{30,}")
HEADER_LIMIT = 100_000_000  # bytes, the safetensors format's own


def check_gates(
    run: Run, evaluation: Evaluation, files: Mapping[str, Path], licence: Licence
) -> tuple[Gate, ...]:
    """All gates, in the order in which a person would mend them.

    Each reads what is on the disk now: that the plan is what the checkpoint holds, 03 and 04 have proved of
    the very bytes that are found here.
    """
    info, odd = run_info(run), []
    for name in ("analyze", "quantize", "evaluate"):
        outputs = info["stages"].get(name, {}).get("outputs", {})
        measured = {key: held for key, held in outputs.items() if key.startswith(MEASURED)}
        if not measured or not runs.is_intact(run, {"outputs": measured}):
            odd.append(f"what {name} writes is missing or was changed; run notebook {NOTEBOOKS[name]} again")

    own, of = runs.checkpoint_hash(weight_files(run)), evaluation.checkpoint_sha256
    same = of == own and evaluation.hashes.get("plan") == sha256_file(run.plan_json)
    proof, stock = info["stages"].get("quantize", {}).get("proof") or {}, evaluation.stock
    used = f"{proof.get('tokens')} tokens of {proof.get('text')} in {proof.get('dtype')}, and an answer"
    fits = stock.get("agrees") is True or (stock.get("agrees", False) is None and "reason" in stock)
    secrets, places = leaks(run, files, info.get("location"))
    why = "forbids passing on changed weights" if licence.forbids else "is unknown"
    rows = [  # name, passed, what was found, what is wrong and how to mend it
        ("stages", not odd, "finished, their files unchanged", "; ".join(odd)),
        (
            *("evaluation", same, f"of this very checkpoint, {own[:12]}"),
            f"it is of checkpoint {of[:12]}, model/ holds {own[:12]}, or plan.json changed; run notebook "
            "04_evaluate again",
        ),
        (  # a fresh process has used the checkpoint as its readers will
            *("proof by use", bool(proof.get("finite")) and "generation" in proof, used),
            "no fresh process has run text through it; run notebook 03_quantize where it can be loaded",
        ),
        (  # the model as loaded gave the numbers that its file's tensors gave
            *("stock score", fits, stock_sentence(stock) if fits else ""),
            "stock transformers did not give the numbers of the file's tensors, or was not asked; run "
            "notebook 04_evaluate again",
        ),
        (
            *("licence", licence.usable, f"{licence.id}, {licence.found}"),
            f"the base's licence {why} ({licence.id or licence.found}); if you know that you may publish, "
            "pass allow_license='<its id>' (the card will say that you did)",
        ),
        (
            *("secrets", not secrets, f"none in {len(files)} files (of the weights, in their headers)"),
            f"{', '.join(secrets)} holds what looks like an access token; remove it",
        ),
        (
            *("local paths", not places, f"none in {len(files)} files"),
            f"{', '.join(places)} names a folder of this machine; make the file again without it",
        ),
    ]
    return tuple(Gate(name, passed, found if passed else wrong) for name, passed, found, wrong in rows)


def leaks(run: Run, files: Mapping[str, Path], location: str | None) -> tuple[list[str], list[str]]:
    """The files that hold what looks like an access token, and those that name a folder of this machine."""
    folders = (run.path.resolve(), run.path.absolute(), Path.home(), Path(location or ""))
    known = [str(folder) for folder in folders if folder.is_absolute() and len(folder.parts) > 2]
    secrets, places = [], []
    for name, path in files.items():
        with path.open("rb") as content:
            data = content.read(HEADER_LIMIT if path.suffix == ".safetensors" else -1)
        text = data.decode("utf-8", errors="replace")
        secrets += [name] if SECRET.search(text) else []
        places += [name] if any(folder in text for folder in known) else []
    return secrets, places


# --- sending ---------------------------------------------------------------------------------------------


def send(what: Publication, token: Token, *, overwrite: bool, local: Path) -> Publication:
    """Make the repository hold `what.files`, in one commit that can be interrupted, repeated and trusted.

    The repository changes after every file has arrived, and only if nobody changed it meanwhile: it is never
    seen half published. huggingface_hub sends no large file again that arrived before an interruption (the
    Hub knows it by its SHA-256), and leaves files that did not change out of the commit.

    Args:
        overwrite: replace what is there even if this project did not put it there.
        local: folder to name in messages: what is safe whatever happens.

    Raises:
        PublishError: refused, unreachable, full, or the name holds something else; says what to do.
    """
    if not interactive():
        disable_progress_bars()
    api, repo_id, files = HfApi(token=token.value), what.repo_id, what.files

    def ask(function: Callable[[], Result]) -> Result:
        return _patiently(function, token, repo_id, local)

    ask(lambda: api.create_repo(repo_id, private=what.private, exist_ok=True))
    found = ask(lambda: api.model_info(repo_id))
    if what.private and not found.private:
        raise PublishError(
            f"{repo_id} exists and is public, and a private repository was asked for. Nothing was sent. Pass "
            "private=False to publish there, or choose another `repo_id`."
        )
    there = {file.rfilename for file in found.siblings or ()} - {".gitattributes"}
    stale = there - set(files)
    if there and not overwrite:
        theirs: dict[str, Any] = {}
        if RECORD in there:
            held = ask(lambda: api.hf_hub_download(repo_id, RECORD, force_download=True))
            with contextlib.suppress(RunError):  # a file of that name, and none of ours
                theirs = runs.read_json(held)
        mine, base = runs.read_json(files[RECORD])["base_model"], theirs.get("base_model")
        if base != mine:
            holds = f"a model made from {base}" if base else "files of another origin"
            raise PublishError(
                f"{repo_id} exists and holds {holds} ({', '.join(sorted(there)[:4])}, {len(there)} files); "
                f"expected it to be new, or a publication of {mine}. Nothing was changed. Choose another "
                "`repo_id`, or pass overwrite=True to replace its content (the history keeps it)."
            )
        stale &= set(theirs.get("files", ()))  # what an earlier publication left, and nobody else
    commit = ask(
        lambda: api.create_commit(
            repo_id,
            [  # made anew in each try: a call consumes them
                *(CommitOperationDelete(name) for name in sorted(stale)),
                *(CommitOperationAdd(name, str(path)) for name, path in files.items()),
            ],
            commit_message="Publish a measured run",
            parent_commit=found.sha,
        )
    )
    url = f"{api.endpoint}/{repo_id}"
    note = f"Nothing new to send: {url}" if commit.oid == found.sha else f"Published at {url}"
    return replace(what, note=note, url=url, commit=str(commit.oid))


def owner_of(token: Token, repo_id: str, local: Path) -> str:
    """The account that a token belongs to; PublishError if it isn't accepted, or there is no connection."""
    return str(_patiently(HfApi(token=token.value).whoami, token, repo_id, local)["name"])


# --- a Hub that is busy or refuses -----------------------------------------------------------------------

Result = TypeVar("Result")
WAITS = (1, 4, 15, 45)  # seconds before each further try
UNREACHABLE = 0  # no HTTP status: nothing answered
NO_ACCESS = (
    "the token from {token} can't write to {owner} ({said}). If no storage is full, make a token "
    "that can write at https://huggingface.co/settings/tokens, or choose another `repo_id`."
)
CHANGED = (
    "the repository changed while this ran: somebody else committed to it ({said}). That change stands, and "
    "nothing was committed. See at the repository's page what it was before publishing again."
)
BUSY = "the Hub is busy or in trouble ({said}), still after several tries; see https://status.huggingface.co."
OFFLINE = "no connection to the Hub ({said}). On Kaggle, switch Internet on in the right-hand panel."
# What a failure means for a publisher, by HTTP status.
ADVICE = {
    UNREACHABLE: OFFLINE,
    **dict.fromkeys((401, 402, 403, 404), NO_ACCESS),
    **dict.fromkeys((409, 412), CHANGED),
    **dict.fromkeys((408, 429, 500, 502, 503, 504), BUSY),
}


def _patiently(function: Callable[[], Result], token: Token, repo_id: str, local: Path) -> Result:
    """`function()`, repeated after 408, 429, 5xx and broken connections.

    huggingface_hub (1.11 to 2.4, read in its source) waits by itself only while it sends files and asks how:
    an account, a new repository, the listing and the commit itself are asked once.

    Raises:
        PublishError: it failed for good, in plain words and without the token.
    """
    for wait in (*WAITS, None):
        try:
            return function()
        except Exception as error:
            code = _status(error)
            said = " ".join(redacted(f"{type(error).__name__}: {error}", token).split())
        advice = ADVICE.get(code, "it was refused ({said}).")
        if wait is None or advice not in (BUSY, OFFLINE):
            break
        print(f"the Hub is busy (HTTP {code or 'none'}); waiting {wait} s")
        time.sleep(wait)
    # Outside of `except`: an error of a Hub that echoes the request holds its header, and the token.
    advice = advice.format(token=token.source, owner=repo_id.partition("/")[0], said=said)
    raise PublishError(
        f"publishing to {repo_id} failed: {advice} The local files are untouched in {local}; the same call "
        "goes on where this one ended."
    )


def _status(error: BaseException | None) -> int:
    """The HTTP status behind an error, through the wrappers of upload threads; 0 for a broken connection,
    which xet, who carries large files, tells by a RuntimeError; else 400."""
    if error is None:
        return 400
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code
    if type(error).__name__ == "XetAuthenticationError":
        return 401
    if is_transport_error(error) or type(error) is RuntimeError:
        return UNREACHABLE
    return _status(error.__cause__ or error.__context__)
