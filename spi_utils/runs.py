"""The run directory: where each stage finds what the ones before it made.

A stage reads only this directory and its parameters, so any stage can run again alone, on another machine,
after a disconnect. Every write is atomic. `run.json` holds the model's identity, and for every finished stage
its parameters, its outputs' hashes, versions, device, times and memory peaks; no other file holds a time.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spi_utils.errors import RunError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

SCHEMA = 1
# The notebook that a reader must run when a stage's output is missing.
NOTEBOOKS = {
    "analyze": "01_analyze",
    "visualize": "02_visualize",
    "quantize": "03_quantize",
    "evaluate": "04_evaluate",
    "publish": "05_publish",
}
LAYER_KEYS = ("name", "type", "depth", "role", "rows", "cols", "numel", "quantizable", "status")
COUNTS = ("depth", "rows", "cols", "numel")
WORDS = ("name", "type", "role", "status")  # the layer table's columns of text; all others are numbers
PACKAGES = ("spi-utils", "torch", "transformers", "bitsandbytes", "numpy", "scipy", "huggingface_hub")
OWNER, RECORD = ".owner.lock", ".record.lock"  # never removed: another process may hold either already
FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
# A temporary file of `atomic_path`: its target's name between dots, eight characters, the suffix.
TEMPORARY = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}(?P<suffix>\.[^.]+)?")
STALE = 3600  # seconds after which a temporary file outside a stage's own folders has no writer any more
_owned: dict[Path, int] = {}  # run directories that this process owns: how many stages of it are inside
_record_threads = threading.RLock()


@dataclass(frozen=True)
class Run:
    """A run directory and the names of what lies in it."""

    path: Path

    layers_csv = property(lambda self: self.path / "layers.csv")
    spectra = property(lambda self: self.path / "spectra.safetensors")
    plan_json = property(lambda self: self.path / "plan.json")
    evaluation_json = property(lambda self: self.path / "evaluation.json")
    model_dir = property(lambda self: self.path / "model")
    figures = property(lambda self: self.path / "figures")
    explorer = property(lambda self: self.path / "explorer.html")
    report = property(lambda self: self.path / "report.html")
    publish = property(lambda self: self.path / "publish")
    notebooks = property(lambda self: self.path / "notebooks")
    partial = property(lambda self: self.path / "partial")
    rounded = property(lambda self: self.path / "rounded")
    info_json = property(lambda self: self.path / "run.json")


@dataclass
class Stage:
    """What `stage` hands to its body: is there anything to do, and where to note what was measured."""

    name: str
    fingerprint: str
    finished: bool
    notes: dict[str, Any] = field(default_factory=dict)

    def record(self, **values: Any) -> None:
        """Note measured or derived values (JSON-able) for `run.json["stages"][name]`."""
        self.notes.update(values)


# --- files -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`, else removed.

    Raises:
        RunError: the disk is full, or the path is not writable; what stood there before is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # the umask holds
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # what failed above is the error to tell
            temporary.unlink(missing_ok=True)


def write_error(path: Path, error: OSError) -> RunError:
    """What a failed write is called: its own cause, and what mends that cause."""
    if error.errno in FULL:
        advice = "Free some space or choose another `run_dir`, and run it again"
    elif error.errno in FORBIDDEN:
        advice = "Allow this user to write there, or choose another `run_dir`"
    elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        advice = "A file and a folder of one name are in each other's way: move that one away"
    else:
        advice = "Mend that, and run it again"
    where = f" ({error.filename})" if error.filename else ""
    return RunError(
        f"could not write {path}: {error.strerror or error}{where}. {advice}; "
        "nothing that was there has been changed."
    )


def is_temporary(path: Path) -> bool:
    """Whether a file is an unfinished one of `atomic_path`."""
    match = TEMPORARY.fullmatch(path.name)
    return match is not None and match["name"].endswith(match["suffix"] or "")


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically: two-space indent, keys in the order given, NaN refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], **metadata: str) -> None:
    """Write a safetensors file atomically. RunError where it can't be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        try:
            # never without metadata: a file without tensors either would have no readable header
            save_file(dict(tensors), temporary, metadata=metadata or {"format": "pt"})
        except SafetensorError as error:
            cause = re.search(r"os error (\d+)", str(error))
            if cause is None:
                raise
            raise OSError(int(cause[1]), os.strerror(int(cause[1]))) from error


def read_json(
    path: str | Path, schema: int | None = None, what: str = "file", stage: str = ""
) -> dict[str, Any]:
    """Read a JSON object, and check its `schema` number where one is given.

    Raises:
        RunError: missing, truncated or of another schema; says which notebook makes the file again.
    """
    path = Path(path)
    first = f" Run notebook {stage} first." if stage else ""
    again = f" Run notebook {stage} again with force=True." if stage else ""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path}: there is no {what} here.{first}") from None
    except OSError as error:
        raise RunError(
            f"{path}: this {what} can't be read: {error.strerror or error}. Choose another `run_dir`, or "
            "move what is in the way."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: this {what} is truncated or not JSON ({error}).{again}") from error
    if not isinstance(value, dict):
        raise RunError(f"{path}: expected a JSON object, found {type(value).__name__}.{again}")
    if schema is not None and value.get("schema") != schema:
        held = value.get("schema")
        raise RunError(f"{path}: this {what} has schema {held!r}, this version reads {schema}.{again}")
    return value


@contextlib.contextmanager
def believing(path: Path, what: str, stage: str) -> Iterator[None]:
    """Use a file's content as it should be; where it isn't, say so instead of a traceback.

    Args:
        path, what, stage: the file, what it is, and the notebook that makes it again.

    Raises:
        RunError: an entry that the body asked for is missing, or is of another kind than it should be.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        fault = f"it has no entry {error}" if isinstance(error, KeyError) else str(error)
        raise RunError(
            f"{path}: this {what} is damaged: {fault}. Run notebook {stage} again with force=True."
        ) from error


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, in hex. TypeError: JSON can't hold it, so its text may vary."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def code_hash() -> str:
    """SHA-256 over the paths and contents of this package's modules: which code made a number."""
    package = Path(__file__).resolve().parent
    modules = sorted((file.relative_to(package).as_posix(), file) for file in package.rglob("*.py"))
    lines = (f"{name} {sha256_file(file)}\n" for name, file in modules)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def checkpoint_hash(files: Iterable[Path]) -> str:
    """SHA-256 over one line `name sha256` for each of a checkpoint's weight files, in name order."""
    lines = (f"{file.name} {sha256_file(file)}\n" for file in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# --- the directory ---------------------------------------------------------------------------------------


def slug(name: str) -> str:
    """A model's name as a folder: the last part of an id, lower case, `[a-z0-9.-]` only."""
    return re.sub(r"[^a-z0-9.]+", "-", name.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-.") or "model"


def typed_model(identity: Mapping[str, Any]) -> str:
    """What a person types for `model` to get this one; "MODEL" for a folder or file."""
    return {"bundled": "bundled", "hub": str(identity["id"])}.get(identity["kind"], "MODEL")


def run_path(run_dir: str | Path, model_slug: str) -> Path:
    """`run_dir`; for "auto" `runs/<model slug>` below the checkout that holds the working directory, or
    below the working directory itself where there is none."""
    if str(run_dir) != "auto":
        return Path(run_dir)
    here, marks = Path.cwd(), ("pyproject.toml", "spi_utils/runs.py")
    home = next((p for p in (here, *here.parents) if all((p / mark).exists() for mark in marks)), here)
    return (Path() if home == here else home) / "runs" / model_slug


def open_run(run_dir: str | Path, identity: Mapping[str, Any]) -> Run:
    """Make a run directory for a model, or reopen one that belongs to the same model.

    Args:
        run_dir: the directory; made if missing.
        identity: `ModelSource.identity()`.

    Raises:
        RunError: the directory holds a run of another model, or foreign files.
    """
    run = Run(Path(run_dir))
    with _record_locked(run):
        if run.info_json.exists() and (held := _held_record(run)) is not None:
            require_same_model(run, held["model"], identity)
            return run
        strangers = {p.name for p in run.path.iterdir()} - {"notebooks", OWNER, RECORD}
        if strangers and not run.info_json.exists():
            raise RunError(
                f"{run.path} is not a run directory, yet it holds {', '.join(sorted(strangers)[:3])}. "
                "Choose an empty or a new `run_dir`."
            )
        write_json(run.info_json, {"schema": SCHEMA, "model": dict(identity), "stages": {}})
    return run


def require_same_model(run: Run, held: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Refuse a model that is not the one that a run holds, by its weights or by what stands beside them.

    Raises:
        RunError: says which of the two it is.
    """
    if held["sha256"] != identity["sha256"]:
        why = (
            "whose weights have changed since" if held["id"] == identity["id"] else f"not of {identity['id']}"
        )
        raise RunError(
            f"{run.path} holds a run of {held['id']} (weights {held['sha256'][:12]}), {why} "
            f"(weights {identity['sha256'][:12]}). Choose another `run_dir`."
        )
    if held.get("files_sha256", identity["files_sha256"]) != identity["files_sha256"]:
        raise RunError(
            f"{run.path}: the configuration, tokenizer or code of {held['id']} has changed since this run "
            "began, and with it what the model computes. Choose another `run_dir` for the model as it is."
        )


def _held_record(run: Run) -> dict[str, Any] | None:
    """The run's record; None, and said, if it is damaged: its stages are then done again."""
    try:
        return run_info(run)
    except RunError as error:
        schema = None
        with contextlib.suppress(RunError):  # not JSON at all: damaged, and begun again below
            schema = read_json(run.info_json).get("schema")
        if isinstance(schema, int) and schema > SCHEMA:
            newer = f"{run.info_json} has schema {schema}, this version reads {SCHEMA}"
            raise RunError(f"{newer}. Install a newer spi_utils, or choose another `run_dir`.") from error
        print(f"{error} A new record is begun: every stage is done again.", flush=True)
        return None


def run_rounding(run: Run) -> str:
    """How notebook 01_analyze chose the 4-bit codes of this run: "guided" or "nearest"."""
    return str(run_info(run)["stages"].get("analyze", {}).get("rounding", "nearest"))


def existing_run(run_dir: str | Path) -> Run:
    """Open a run directory that an analysis made.

    Raises:
        RunError: there is none; says which notebook makes it.
    """
    run = Run(Path(run_dir))
    run_info(run)
    return run


def run_info(run: Run) -> dict[str, Any]:
    """The content of `run.json`.

    Raises:
        RunError: missing or damaged; notebook 01_analyze begins a damaged one again.
    """
    info = read_json(run.info_json, SCHEMA, "run record", NOTEBOOKS["analyze"])
    fault = _fault(info)
    if fault:
        raise RunError(
            f"{run.info_json}: this run record is damaged: {fault}. "
            f"Run notebook {NOTEBOOKS['analyze']} again."
        )
    return info


def _fault(info: Mapping[str, Any]) -> str:
    """What is wrong with a run record; "" if nothing."""
    model, stages = info.get("model"), info.get("stages")
    if not isinstance(model, dict) or not all(isinstance(model.get(key), str) for key in ("id", "sha256")):
        return "`model` has no `id` and `sha256`"
    if not isinstance(stages, dict):
        return f"`stages` is {type(stages).__name__}, expected an object"
    for name, held in stages.items():
        if not isinstance(held, dict):
            return f"stage {name} is {type(held).__name__}, expected an object"
        outputs = held.get("outputs", {})
        if not isinstance(outputs, dict) or not all(
            isinstance(one, dict) and {"bytes", "sha256"} <= one.keys() for one in outputs.values()
        ):
            return f"stage {name} has outputs without `bytes` and `sha256`"
    return ""


def update_info(run: Run, change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Read `run.json`, change it in place and write it, while no other process does; returns the new content.

    Raises:
        RunError: the record is missing or damaged, or can't be written.
    """
    with _record_locked(run):
        info = run_info(run)
        change(info)
        write_json(run.info_json, info)
    return info


def layers_fingerprint(run: Run) -> str:
    """SHA-256 of `layers.csv`."""
    _require(run.layers_csv, "layer table", "analyze")
    return sha256_file(run.layers_csv)


def _check_unchanged(run: Run, path: Path, stage_name: str) -> None:
    """Refuse a file that is not what its stage wrote, where a stage has entered it."""
    if not run.info_json.exists():
        return
    outputs = run_info(run)["stages"].get(stage_name, {}).get("outputs", {})
    if path.name in outputs and outputs[path.name]["sha256"] != sha256_file(path):
        raise RunError(
            f"{path} is not what the stage {stage_name} wrote: it was changed or truncated. "
            "Run notebook 01_analyze again, which makes it again."
        )


def read_layers(run: Run) -> pd.DataFrame:
    """The layer table, a row a layer in model order.

    Raises:
        RunError: missing, truncated, or not what the stage `analyze` wrote.
    """
    _require(run.layers_csv, "layer table", "analyze")
    _check_unchanged(run, run.layers_csv, "analyze")
    try:
        layers = pd.read_csv(run.layers_csv, float_precision="round_trip")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise RunError(
            f"{run.layers_csv}: truncated or no table ({error}). Run notebook 01_analyze again."
        ) from error
    missing = [column for column in LAYER_KEYS if column not in layers]
    if missing:
        raise RunError(
            f"{run.layers_csv}: no column {', '.join(missing)}. "
            "Run notebook 01_analyze again with force=True."
        )
    words = [x for x in layers if x not in WORDS and not pd.api.types.is_numeric_dtype(layers[x])]
    if not pd.api.types.is_bool_dtype(layers["quantizable"]):
        words.append("quantizable")
    words += [column for column in COUNTS if column not in words and not np.isfinite(layers[column]).all()]
    if layers[["name", "type"]].isna().any(axis=None) or layers["name"].duplicated().any():
        words.append("name or type")
    if words:
        raise RunError(
            f"{run.layers_csv}: column {words[0]} holds something else than it should. "
            "Run notebook 01_analyze again with force=True."
        )
    return layers


def read_spectra(run: Run) -> dict[str, NDArray[np.float64]]:
    """Singular values of every analysed layer: name -> 1-D float64, descending."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    _require(run.spectra, "spectra", "analyze")
    _check_unchanged(run, run.spectra, "spectra")
    try:
        return load_file(run.spectra)
    except SafetensorError as error:
        raise RunError(
            f"{run.spectra}: truncated or corrupt ({error}). Run notebook 01_analyze again."
        ) from error


def _require(path: Path, what: str, made_by: str) -> None:
    if not path.exists():
        raise RunError(f"{path}: there is no {what} here. Run notebook {NOTEBOOKS[made_by]} first.")


# --- stages ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stage(
    run: Run, name: str, inputs: Mapping[str, Any], outputs: Sequence[str], *, force: bool = False
) -> Iterator[Stage]:
    """Run a stage once for given inputs.

    The body finds `finished` true when the same inputs gave the same, still intact outputs before; it then
    only reads them. Otherwise it makes `outputs` (names in the run directory), and on leaving without an
    exception the stage is entered in `run.json`. Unfinished work of a killed body stays in
    `run.partial / name`, which belongs to these inputs alone: it is emptied first when they changed.

    Args:
        inputs: everything that the outputs depend on, JSON-able: parameters, hashes of files read.
        outputs: files and folders that the body must leave in the run directory.
        force: do it again whatever is there.

    Raises:
        RunError: an output is missing after the body ran.
    """
    mark = fingerprint({"stage": name, "model": run_info(run)["model"]["sha256"], "inputs": inputs})
    if not force and _is_finished(run, name, mark):
        yield Stage(name, mark, finished=True)
        return
    with owner_lock(run, name):
        # Another process may have finished it between the question above and the lock.
        current = Stage(name, mark, finished=not force and _is_finished(run, name, mark))
        if current.finished:
            yield current
            return
        try:
            _claim_partial(run, name, mark, force)
            _clean(run, name, outputs)
            started = time.monotonic()
            yield current
            _enter(run, current, inputs, outputs, time.monotonic() - started)
        except OSError as error:
            if error.errno not in (*FULL, errno.EROFS):
                raise
            raise write_error(run.path, error) from error


def _is_finished(run: Run, name: str, mark: str) -> bool:
    held = run_info(run)["stages"].get(name)
    return held is not None and held.get("fingerprint") == mark and is_intact(run, held)


def _enter(
    run: Run, current: Stage, inputs: Mapping[str, Any], outputs: Sequence[str], seconds: float
) -> None:
    """Enter a stage whose body has ended in `run.json`, and drop its unfinished work."""
    name = current.name
    missing = [output for output in outputs if not (run.path / output).exists()]
    if missing:
        raise RunError(f"stage {name} ended without writing {', '.join(missing)} in {run.path}.")
    entry = {
        "fingerprint": current.fingerprint,
        "inputs": dict(inputs),
        "outputs": describe_files(run, outputs),
        "seconds": round(seconds, 3),
        "peak_rss_gb": round(peak_rss_bytes() / 1e9, 3),
        **_gpu_peak(),
        "environment": environment(),
        **current.notes,
    }
    entry = json.loads(json.dumps(entry, default=str))
    update_info(run, lambda info: info["stages"].update({name: entry}))
    shutil.rmtree(run.partial / name, ignore_errors=True)
    if run.partial.exists() and not any(run.partial.iterdir()):
        run.partial.rmdir()


def describe_files(run: Run, outputs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file of some outputs, as `is_intact` compares them."""
    return {
        str(p.relative_to(run.path)): {"bytes": p.stat().st_size, "sha256": sha256_file(p)}
        for p in _files(run, outputs)
    }


def add_outputs(run: Run, name: str, outputs: Sequence[str]) -> None:
    """Enter more outputs of a stage that has finished, so that it counts as undone without them."""
    found = describe_files(run, outputs)
    update_info(run, lambda info: info["stages"].get(name, {}).setdefault("outputs", {}).update(found))


@contextlib.contextmanager
def owner_lock(run: Run, what: str) -> Iterator[None]:
    """Own a run directory: one process at a time makes anything there; stages of one process nest.

    The kernel releases the lock when the owner ends, however it ends. Where the filesystem has no such locks
    that is said, and the work goes on.

    Raises:
        RunError: another process owns it (says which), or the directory can't be written.
    """
    path = run.path.resolve()
    if path in _owned:
        _owned[path] += 1
        try:
            yield
        finally:
            _owned[path] -= 1
        return
    with _opened(run, OWNER) as handle:
        if not _lock(handle, run, wait=False):
            raise RunError(_taken(run))
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "stage": what}
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(owner).encode(), 0)
        _owned[path] = 1
        try:
            yield
        finally:
            del _owned[path]


def _taken(run: Run) -> str:
    try:
        owner = json.loads((run.path / OWNER).read_text(encoding="utf-8"))
        who = "process {pid} on {host}, since {since}, in stage {stage}".format(**owner)
    except (OSError, ValueError, KeyError, TypeError):  # the owner is just writing its name
        who = "another process"
    return f"{run.path} is in use by {who}. Wait until it ends, end it, or choose another `run_dir`."


@contextlib.contextmanager
def _record_locked(run: Run) -> Iterator[None]:
    """No other process or thread changes `run.json` meanwhile; held for moments only, so others wait."""
    with _record_threads, _opened(run, RECORD) as handle:
        _lock(handle, run, wait=True)
        yield


@contextlib.contextmanager
def _opened(run: Run, name: str) -> Iterator[int]:
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(run.path / name, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise write_error(run.path, error) from error
    try:
        yield handle
    finally:
        os.close(handle)


def _lock(handle: int, run: Run, *, wait: bool) -> bool:
    """Lock an open file until it is closed; False if another holds it."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError) as error:
        if not wait:
            print(f"{run.path} can't be locked ({error}): let no other run use it now.", flush=True)
    return True


def _clean(run: Run, name: str, outputs: Sequence[str]) -> None:
    """Remove temporary files of killed writers: in this stage's own folders all, elsewhere the old ones."""
    own = [run.partial / name, *(run.path / output for output in outputs)]
    for path in run.path.rglob(".*"):
        if not is_temporary(path) or not path.is_file():
            continue
        ours = any(path.is_relative_to(folder) for folder in own)
        if ours or time.time() - path.stat().st_mtime > STALE:
            path.unlink(missing_ok=True)


def _gpu_peak() -> dict[str, float]:
    """The most memory that this process' torch has taken on a GPU, where it has used one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {"peak_gpu_gb": round(torch.cuda.max_memory_reserved() / 1e9, 3)}


def _files(run: Run, outputs: Sequence[str]) -> list[Path]:
    paths = [run.path / output for output in outputs]
    found = (p for path in paths for p in ([path] if path.is_file() else path.rglob("*")))
    return sorted(p for p in found if p.is_file() and not is_temporary(p))


def is_intact(run: Run, entry: Mapping[str, Any]) -> bool:
    """Whether a finished stage's outputs still are what it wrote, byte for byte."""
    if "outputs" not in entry:
        return False
    for name, held in entry["outputs"].items():
        path = run.path / name
        if not path.is_file() or path.stat().st_size != held["bytes"] or sha256_file(path) != held["sha256"]:
            return False
    return True


def _claim_partial(run: Run, name: str, mark: str, force: bool) -> None:
    """Leave only pieces that these inputs made in the stage's folder for unfinished work."""
    folder = run.partial / name
    owner = folder / "fingerprint"
    for place in (run.partial, folder):
        if place.exists() and not place.is_dir():
            place.unlink()
    if folder.exists() and (force or not owner.exists() or owner.read_text() != mark):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    owner.write_text(mark)


def peak_rss_bytes() -> int:
    """The process' peak resident memory so far, in bytes.

    On Linux the kernel's VmHWM: getrusage's figure is inherited from the process that forked this one.
    """
    import resource

    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def environment() -> dict[str, Any]:
    """Versions, processor and GPU of this process, as `run.json` and the report show them."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": _gpu_name(),
        "versions": versions,
    }


def _gpu_name() -> str | None:
    import sys

    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name(0) if torch is not None and torch.cuda.is_available() else None
