"""A finished run -> a model card, and a repository on the Hub that a stranger can trust.

Nothing is sent unless every gate is passed: the evaluation must be of this very checkpoint, every stage
finished, the size what the plan said, the licence known. A rehearsal (the default) writes the card and the
list of what would be sent, and sends nothing.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import disable_progress_bars, get_session, hf_raise_for_status
from safetensors import SafetensorError, safe_open

from spi_utils import runs
from spi_utils.card import Licence, base_of, make_card, read_base, shown_figures
from spi_utils.claims import Evaluation
from spi_utils.errors import PublishError, RunError
from spi_utils.formats import size_tolerance
from spi_utils.models import is_transport_error, server_delay
from spi_utils.notebook import repository_problem
from spi_utils.plan import ProtectionPlan, nominal_bits
from spi_utils.progress import interactive, progress
from spi_utils.runs import NOTEBOOKS, Run, run_info, sha256_file
from spi_utils.tokens import Token, hub_token, redacted

OWNER = "your-name"  # stands for the token's owner while there is no token
SCHEMA = 1
CARD = "README.md"
RECORD = "environment.json"  # the file by which a repository is known as one of ours
# Hidden and temporary files, such as a killed process or an editor leaves.
UNFINISHED = re.compile(r"(^|/)\.|(\.(tmp|temp|part|partial|incomplete|lock|swp|bak)|~)$")
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
class Publication:
    """What would be, or was, published: the card, the files, and the gates passed or not.

    `files` maps each path in the repository to the local file; `total_bytes` is their sum. Where something
    was sent, `url` and `commit` say where.
    """

    repo_id: str
    private: bool
    folder: Path
    files: dict[str, Path]
    gates: tuple[Gate, ...]
    licence: Licence
    total_bytes: int
    note: str = "Rehearsal: nothing was sent."
    url: str = ""
    commit: str = ""

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

        def inside(link: re.Match[str]) -> str:
            data = base64.b64encode(self.files[link[1]].read_bytes()).decode("ascii")
            return f"](data:image/png;base64,{data})"

        text = self.card.read_text(encoding="utf-8").split("---", 2)[2]
        return re.sub(r"\]\((figures/[^)]+\.png)\)", inside, text)

    def __str__(self) -> str:
        gates = "\n".join(f"  {gate}" for gate in self.gates)
        listed = "\n".join(f"  {p.stat().st_size:>14,}  {name}" for name, p in self.files.items())
        visibility = "private" if self.private else "public"
        return (
            f"{self.note}\n{visibility} repository {self.repo_id}\ngates\n{gates}\n"
            f"{len(self.files)} files, {self.total_bytes / 1e9:.3f} GB\n{listed}\ncard: {self.card}"
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
    if repo_id is not None and (problem := repository_problem(repo_id)):
        raise PublishError(f"repo_id={repo_id!r}: expected `name` or `owner/name`; {problem}.")
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
        gates = check_gates(run, plan, evaluation, files, licence)
        sizes = {key: path.stat().st_size for key, path in files.items()}
        done = Publication(name, private, run.publish, files, gates, licence, sum(sizes.values()))
        noted = {"repo_id": name, "ready": done.ready, "total_bytes": done.total_bytes}
        listed = {"licence": asdict(licence), "gates": [asdict(gate) for gate in gates], "files": sizes}
        manifest = {"schema": SCHEMA, "private": private, **noted, **listed}
        runs.write_json(run.publish / "manifest.json", manifest)
        current.record(**noted)
        if dry_run:
            return done
        if not done.ready:
            closed = "\n".join(f"  {gate}" for gate in gates if not gate.passed)
            raise PublishError(f"{run.path} may not be published yet:\n{closed}\nNothing was sent.")
        if token is None:
            flags = "" if private else " --public"
            flags += f" --allow-license {allow_license}" if allow_license else ""
            later = (
                "Saved locally, not published: no Hub token was found. To publish it later, run `hf auth "
                "login` (or set HF_TOKEN, or attach the secret HF_TOKEN) and then\n  python -m "
                f'spi_utils publish "{run.path}" --repo-id {name.removeprefix(f"{OWNER}/")}{flags}'
            )
            return replace(done, note=later)
        done = send(str(card), done, token, overwrite=overwrite, local=run.path)
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
    """Path in the repository -> file, without the card and the record; of the figures those of the card."""
    drawn = {f"figures/{name}": path for name, path in _below(run.figures).items()}
    files = {name: path for name, path in _below(run.model_dir).items() if name not in OURS}
    files |= {path.name: path for path in (run.plan_json, run.layers_csv, run.evaluation_json)}
    files |= {name: drawn[name] for name, _ in shown_figures(sorted(drawn))}
    return dict(sorted(files.items()))


def _below(folder: Path) -> dict[str, Path]:
    """Path within a folder -> file, for files that are whole."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path for name, path in found.items() if not UNFINISHED.search(name)}


# --- the gates -------------------------------------------------------------------------------------------

BEFORE_PUBLISH = ("analyze", "quantize", "evaluate")  # the plan has a gate of its own
CHECKPOINT_FILES = ("config.json", "tokenizer_config.json", "generate.py")
HEADER_LIMIT = 100_000_000  # bytes, the safetensors format's own
WEIGHT_TYPES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack"}
NOT_SCORED = "not scored as loaded: "
MEASURED = ("layers.csv", "evaluation.json", "model/")  # a slider or a later stage may redo the others
SECRET = re.compile(r"hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{30,}")
# Tensors that only a quantized module has beside its weight (bitsandbytes; compressed-tensors).
QUANTIZED = re.compile(r"^(?P<module>.+)\.weight(\.absmax|\.SCB|_packed|_scale)$")
QUANTIZE, EVALUATE = (f"run notebook {NOTEBOOKS[name]}" for name in ("quantize", "evaluate"))


def check_gates(  # noqa: PLR0915 - one gate after the other
    run: Run, plan: ProtectionPlan, evaluation: Evaluation, files: Mapping[str, Path], licence: Licence
) -> tuple[Gate, ...]:
    """All gates, in the order in which a person would mend them.

    Each reads what is on the disk now, not what a stage once said: a file that was changed, or made from
    another plan, closes it.
    """
    info, weights = run_info(run), weight_files(run)
    stages, gates = info["stages"], []

    def gate(name: str, passed: bool, found: str, wrong: str) -> None:
        gates.append(Gate(name, passed, found if passed else wrong, passed and found.startswith(NOT_SCORED)))

    odd, recorded = [], set()
    for name in BEFORE_PUBLISH:
        outputs = stages.get(name, {}).get("outputs", {})
        measured = {key: held for key, held in outputs.items() if key.startswith(MEASURED)}
        recorded |= set(measured)
        if not measured or not runs.is_intact(run, {"outputs": measured}):
            odd.append(f"what {name} writes is missing or was changed; run notebook {NOTEBOOKS[name]} again")
    for key in _below(run.model_dir):  # whatever a loader would take weights from
        if Path(key).suffix in WEIGHT_TYPES and f"model/{key}" not in recorded:
            odd.append(f"model/{key} was not written by quantize; remove it, or {QUANTIZE} again")
    gate("stages", not odd, f"{', '.join(BEFORE_PUBLISH)} finished, their files unchanged", "; ".join(odd))

    missing = [name for name in CHECKPOINT_FILES if not (run.model_dir / name).is_file()]
    missing += [] if weights else ["*.safetensors"]
    lacks = f"model/ lacks {', '.join(missing)}; {QUANTIZE}"
    gate("checkpoint", not missing, f"{len(weights)} weight file(s), tokenizer, generate.py", lacks)

    kept, differs = len(plan.protected), unplanned(run, plan)
    found = f"{len(plan.formats) - kept} modules quantized and {kept} kept, as planned"
    gate("plan", differs is None, found, f"{differs}; {QUANTIZE} again")

    own = runs.checkpoint_hash(weights)
    of = {evaluation.checkpoint_sha256, evaluation.hashes.get("checkpoint", own)} - {own}
    passed = not of and evaluation.hashes.get("plan") == sha256_file(run.plan_json)
    other = (
        f"it is of checkpoint {min(of)[:12]}, model/ holds {own[:12]}" if of else "plan.json changed after it"
    )
    gate("evaluation", passed, f"of this very checkpoint, {own[:12]}", f"{other}; {EVALUATE}")

    # A fresh process has used the checkpoint as its readers will (notebook 03).
    proof = stages.get("quantize", {}).get("proof") or {}
    passed = bool(proof.get("finite")) and "generation" in proof
    found = f"{proof.get('tokens')} tokens of {proof.get('text')} in {proof.get('dtype')}, and an answer"
    unused = f"no fresh process has run text through this checkpoint; {QUANTIZE} where it can be loaded"
    gate("proof by use", passed, found, unused)

    # The model as loaded gave the numbers that its file's tensors gave (notebook 04).
    stock = evaluation.stock
    numbers = (stock.get(key) for key in ("kl", "kl_file", "tolerance"))
    loaded, of_file, near = (math.nan if one is None else float(one) for one in numbers)
    found = f"KL {loaded:.4f} as loaded, {of_file:.4f} in float32 from the file, allowed is ±{near:.4f}"
    passed = stock.get("agrees") is True and abs(loaded - of_file) <= near  # NaN is not
    if stock.get("agrees", False) is None and stock.get("reason"):
        passed, found = True, f"{NOT_SCORED}{stock['reason']}"
    wrong = found if "agrees" in stock else "the checkpoint was not scored as stock transformers load it"
    gate("stock score", passed, found, f"{wrong}; {EVALUATE} again")

    size, planned = sum(path.stat().st_size for path in weights), plan.bytes["total"]
    allowed = size_tolerance(planned)
    found = f"{size:,} bytes on disk, {planned:,} planned ({size / planned - 1:+.2%})"
    far = f"{found}; allowed is ±{allowed:,} bytes; {QUANTIZE} again"
    gate("size", abs(size - planned) <= allowed, found, far)

    why = "forbids passing on changed weights" if licence.forbids else "is unknown"
    why = f"the base's licence {why} ({licence.id or licence.found}); if you know that you may publish, "
    why += "pass allow_license='<its id>' (the card will say that you did)"
    gate("licence", licence.usable, f"{licence.id}, {licence.found}", why)

    folders = (run.path.resolve(), run.path.absolute(), Path.home(), Path(info.get("location", "")))
    known = [str(folder) for folder in folders if folder.is_absolute() and len(folder.parts) > 2]
    secrets, places = [], []
    for name, path in files.items():
        with path.open("rb") as content:
            data = content.read(HEADER_LIMIT if path.suffix == ".safetensors" else -1)
        text = data.decode("utf-8", errors="replace")
        if SECRET.search(text):
            secrets.append(name)
        found_at = [text.find(folder) for folder in known if folder in text]
        if found_at:  # the manifest must not name the folder too
            line = text.count("\n", 0, min(found_at)) + 1
            places.append(f"line {line} of {name} names a folder of some machine")
    found = f"none found in {len(files)} files"
    leaks = f"{', '.join(secrets)} holds what looks like an access token; remove it"
    gate("secrets", not secrets, f"{found} (of the weights, in their headers)", leaks)
    gate("local paths", not places, found, f"{'; '.join(places)}; make the file again without it")
    return tuple(gates)


def unplanned(run: Run, plan: ProtectionPlan) -> str | None:
    """What differs between the plan and the quantized modules that the safetensors headers tell of."""

    def short(name: str) -> str:
        # Files and models of multimodal checkpoints order these prefixes differently.
        return re.sub(r"(^|\.)language_model\.", r"\1", name).removeprefix("model.")

    names: list[str] = []
    for path in weight_files(run):
        try:
            with safe_open(path, framework="numpy") as file:
                names += file.keys()
        except SafetensorError as error:
            return f"model/{path.name}: truncated, or no safetensors file ({error})"
    held = {short(found["module"]) for found in map(QUANTIZED.match, names) if found}
    odd = sorted(held ^ {short(name) for name, fmt in plan.formats.items() if fmt != "16bit"})
    return f"{len(odd)} modules differ between plan.json and model/, the first {odd[0]}" if odd else None


# --- sending ---------------------------------------------------------------------------------------------

SENT_ALONE = 10_000_000  # bytes; files from here on are sent one by one, before the commit


def send(card: str, what: Publication, token: Token, *, overwrite: bool, local: Path) -> Publication:
    """Make the repository hold `what.files`, in one commit that can be interrupted, repeated and trusted.

    The repository changes after every large file has arrived, and only if nobody changed it meanwhile: it is
    never seen half published. A large file that arrived before an interruption is not sent again (the Hub
    knows it by its SHA-256), and huggingface_hub leaves files that did not change out of the commit.

    Args:
        card: the README, which the Hub validates before anything else is sent.
        overwrite: replace what is there even if this project did not put it there.
        local: folder to name in messages: what is safe whatever happens.

    Raises:
        PublishError: refused, unreachable, full, or the name holds something else; says what to do.
    """
    if not interactive():
        disable_progress_bars()
    api, repo_id, files = HfApi(token=token.value), what.repo_id, what.files
    ask = partial(_patiently, token=token, repo_id=repo_id, local=local)
    # Not by `ModelCard.validate`: in huggingface_hub 1.x it asks huggingface.co whatever HF_ENDPOINT says.
    asked = {"repoType": "model", "content": card}
    ask(lambda: hf_raise_for_status(get_session().post(f"{api.endpoint}/api/validate-yaml", json=asked)))
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
    large = [name for name, path in files.items() if path.stat().st_size >= SENT_ALONE]
    for name in progress(large, len(large), "large files at the Hub"):  # a kill costs at most one of them
        one = [CommitOperationAdd(name, str(files[name]))]
        ask(partial(api.preupload_lfs_files, repo_id, one, free_memory=False))
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
    return str(_patiently(HfApi(token=token.value).whoami, token=token, repo_id=repo_id, local=local)["name"])


# --- a Hub that is busy or refuses -----------------------------------------------------------------------

Result = TypeVar("Result")
ATTEMPTS = 5
LONGEST_WAIT = 600  # seconds; the Hub's rate windows are 300
OFFLINE, UNREACHABLE = -1, 0  # no HTTP status: nothing was asked, nothing answered
# What a failure means for a publisher, by HTTP status.
NO_ACCESS = (
    "the token from {token} can't write to {owner} ({said}). If no storage is full, make a token "
    "that can write at https://huggingface.co/settings/tokens, or choose another `repo_id`."
)
CHANGED = (
    "the repository changed while this ran: somebody else committed to it ({said}). That change stands, and "
    "nothing was committed. See at the repository's page what it was before publishing again."
)
BUSY = "the Hub is busy or in trouble ({said}), still after several tries; see https://status.huggingface.co."
ADVICE = {
    OFFLINE: "HF_HUB_OFFLINE is set, so nothing may be sent. Unset it and restart the session.",
    UNREACHABLE: "no connection to the Hub ({said}). On Kaggle, switch Internet on in the right-hand panel.",
    **dict.fromkeys((401, 402, 403, 404), NO_ACCESS),
    **dict.fromkeys((409, 412), CHANGED),
    **dict.fromkeys((408, 429, 500, 502, 503, 504), BUSY),
}


def _patiently(function: Callable[[], Result], *, token: Token, repo_id: str, local: Path) -> Result:
    """`function()`, repeated after 408, 429, 5xx and broken connections.

    huggingface_hub (1.11 to 2.4, read in its source) waits by itself only while it sends files and asks how:
    an account, a new repository, the listing and the commit itself are asked once. 1.11 does not read
    `Retry-After`, and 2.4 no dates in it.

    Raises:
        PublishError: it failed for good, in plain words and without the token.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return function()
        except Exception as error:
            code, headers = _status(error)
            said = " ".join(redacted(f"{type(error).__name__}: {error}", token).split())
        if (code != UNREACHABLE and ADVICE.get(code) != BUSY) or attempt == ATTEMPTS:
            advice = ADVICE.get(code, "it was refused ({said}).")
            advice = advice.format(token=token.source, owner=repo_id.partition("/")[0], said=said)
            # Outside of `except`: an error of a Hub that echoes the request holds its header, and the token.
            raise PublishError(
                f"publishing to {repo_id} failed: {advice} The local files are untouched in {local}; the "
                "same call goes on where this one ended."
            )
        delay = server_delay(headers)
        delay = min(2.0 ** (attempt - 1) if delay is None else delay, LONGEST_WAIT)
        label = f"HTTP {code}" if code else "no connection"
        print(f"the Hub is busy ({label}); waiting {delay:.0f} s, then try {attempt + 1}")
        time.sleep(delay)
    raise AssertionError("unreachable")


def _status(error: BaseException) -> tuple[int, Mapping[str, str]]:
    """The HTTP status behind an error, through the wrappers of upload threads, and the answer's headers;
    without an answer a status of the same meaning, and 400 for whatever isn't the connection's fault."""
    links = [error]
    while (cause := links[-1].__cause__ or links[-1].__context__) is not None:
        links.append(cause)
    for link in links:
        if isinstance(link, HfHubHTTPError):
            return link.response.status_code, link.response.headers
        if own := {"OfflineModeIsEnabled": OFFLINE, "XetAuthenticationError": 401}.get(type(link).__name__):
            return own, {}
    # xet, which carries large files, raises plain RuntimeError and OSError where HTTP raises its own; those
    # that speak of a file of ours mean what they say.
    plain = isinstance(error, RuntimeError | OSError | json.JSONDecodeError)
    plain = plain and not isinstance(error, FileNotFoundError | PermissionError)
    return UNREACHABLE if plain or any(map(is_transport_error, links)) else 400, {}
