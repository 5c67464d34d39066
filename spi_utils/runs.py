"""The run directory: where each stage finds what the ones before it made.

A stage reads only this directory and its parameters, so any stage can run again alone, on another machine,
after a disconnect. Every write is atomic. `run.json` holds the model's identity, and for every finished stage
its parameters, its outputs' hashes, versions, device, times and memory peaks; no other file holds a time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from safetensors import SafetensorError

from spi_utils.errors import RunError
from spi_utils.progress import cores

if TYPE_CHECKING:
    import numpy as np
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
PACKAGES = ("spi-utils", "torch", "transformers", "bitsandbytes", "numpy", "scipy", "huggingface_hub")
OWNER, RECORD = ".owner.lock", ".record.lock"  # never removed: another process may hold either already
FULL = (errno.ENOSPC, errno.EDQUOT)
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}(\.[^.]+)?")  # an unfinished file of `atomic_path`
_owned: set[Path] = set()  # run directories that this process owns


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
        temporary.touch(exist_ok=False)  # the umask holds
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
    """What a failed write is called, and what mends it."""
    where = f" ({error.filename})" if error.filename else ""
    return RunError(
        f"could not write {path}: {error.strerror or error}{where}. Free some space, or choose a "
        "`run_dir` that this user may write to, and run it again; nothing that was there has been changed."
    )


def is_temporary(path: Path) -> bool:
    """Whether a file is an unfinished one of `atomic_path`."""
    return TEMPORARY.fullmatch(path.name) is not None


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically: two-space indent, keys in the order given, NaN refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], **metadata: str) -> None:
    """Write a safetensors file atomically. RunError where it can't be written."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        try:
            # never without metadata: a file without tensors either would have no readable header
            save_file(dict(tensors), temporary, metadata=metadata or {"format": "pt"})
        except SafetensorError as error:
            if (cause := re.search(r"os error (\d+)", str(error))) is None:
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
    again = f" Run notebook {stage} again with force=True." if stage else ""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    except FileNotFoundError:
        first = f" Run notebook {stage} first." if stage else ""
        raise RunError(f"{path}: there is no {what} here.{first}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: this {what} is truncated or damaged ({error}).{again}") from error
    if schema not in (None, held := value.get("schema")):
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
    return hash_files({file.relative_to(package).as_posix(): file for file in package.rglob("*.py")})


def checkpoint_hash(files: Iterable[Path]) -> str:
    """SHA-256 over one line `name sha256` for each of a checkpoint's weight files, in name order."""
    return hash_files({file.name: file for file in files})


def hash_files(files: Mapping[str, Path], of: Callable[[Path], str] = sha256_file) -> str:
    """SHA-256 over a line `name sha256` for each file, in the order of the names."""
    return hashlib.sha256("".join(f"{n} {of(p)}\n" for n, p in sorted(files.items())).encode()).hexdigest()


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
        RunError: the directory holds a run of another model or of another version, or foreign files.
    """
    run = Run(Path(run_dir))
    with _locked(run, RECORD):
        if run.info_json.exists():
            require_same_model(run, run_info(run)["model"], identity)
            return run
        if strangers := {p.name for p in run.path.iterdir()} - {"notebooks", OWNER, RECORD}:
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
        same = held["id"] == identity["id"]
        why = "whose weights have changed since" if same else f"not of {identity['id']}"
        raise RunError(
            f"{run.path} holds a run of {held['id']} (weights {held['sha256'][:12]}), {why} "
            f"(weights {identity['sha256'][:12]}). Choose another `run_dir`."
        )
    if held.get("files_sha256", identity["files_sha256"]) != identity["files_sha256"]:
        raise RunError(
            f"{run.path}: the configuration, tokenizer or code of {held['id']} has changed since this run "
            "began, and with it what the model computes. Choose another `run_dir` for the model as it is."
        )


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
        RunError: missing; damaged, or of another version.
    """
    if not run.info_json.exists():
        raise RunError(
            f"{run.info_json}: there is no run record here. Run notebook {NOTEBOOKS['analyze']} first."
        )
    try:
        info = read_json(run.info_json, SCHEMA, "run record")
        # asked for here, so that nobody who reads the record has to ask
        _ = info["model"]["id"], info["model"]["sha256"]
        for entry in info["stages"].values():
            _ = [(one["bytes"], one["sha256"]) for one in entry.get("outputs", {}).values()]
    except (RunError, LookupError, TypeError, AttributeError) as error:
        raise RunError(
            f"{run.info_json} is damaged, or another version made it ({error}). Choose another `run_dir`, or "
            f"remove this one and run notebook {NOTEBOOKS['analyze']} again."
        ) from error
    return info


def update_info(run: Run, change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Read `run.json`, change it in place and write it, while no other process does; returns the new content.

    Raises:
        RunError: the record is missing or damaged, or can't be written.
    """
    with _locked(run, RECORD):
        info = run_info(run)
        change(info)
        write_json(run.info_json, info)
    return info


def layers_fingerprint(run: Run) -> str:
    """SHA-256 of `layers.csv`."""
    with _reading(run, run.layers_csv, "layer table"):
        return sha256_file(run.layers_csv)


@contextlib.contextmanager
def _reading(run: Run, path: Path, what: str) -> Iterator[None]:
    """Read a file of notebook 01_analyze: there, as its stage wrote it, and what it should be."""
    try:
        held = read_json(run.info_json)["stages"] if run.info_json.exists() else {}
        known = {name: one for stage in held.values() for name, one in stage.get("outputs", {}).items()}
        if path.name in known and known[path.name]["sha256"] != sha256_file(path):
            raise ValueError("it is not what its stage wrote, but was changed or truncated")
        yield
    except FileNotFoundError as error:
        raise RunError(f"{path}: there is no {what} here. Run notebook 01_analyze first.") from error
    except (ValueError, SafetensorError) as error:
        raise RunError(f"{path}: this {what} is damaged ({error}). Run notebook 01_analyze again.") from error


def read_layers(run: Run) -> pd.DataFrame:
    """The layer table, a row a layer in model order.

    Raises:
        RunError: missing, truncated, or not what the stage `analyze` wrote.
    """
    kinds = {"quantizable": "bool", **dict.fromkeys(COUNTS, "int64")}
    with _reading(run, run.layers_csv, "layer table"):
        return pd.read_csv(run.layers_csv, float_precision="round_trip", dtype=kinds)


def read_spectra(run: Run) -> dict[str, NDArray[np.float64]]:
    """Singular values of every analysed layer: name -> 1-D float64, descending."""
    from safetensors.numpy import load_file

    with _reading(run, run.spectra, "spectra"):
        return load_file(run.spectra)


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

    def is_finished() -> bool:
        held = run_info(run)["stages"].get(name, {})
        return not force and held.get("fingerprint") == mark and is_intact(run, held)

    done = is_finished()
    with contextlib.nullcontext() if done else owner_lock(run, name):
        # another process may have finished it between the question above and the lock
        current = Stage(done or is_finished())
        if current.finished:
            yield current
            return
        try:
            _tidy(run, name, mark, outputs, force)
            started = time.monotonic()
            yield current
            seconds, gpu = time.monotonic() - started, _gpu()
            if missing := [output for output in outputs if not (run.path / output).exists()]:
                raise RunError(f"stage {name} ended without writing {', '.join(missing)} in {run.path}.")
            entry: dict[str, Any] = {
                "fingerprint": mark,
                "inputs": dict(inputs),
                "outputs": describe_files(run, outputs),
                "seconds": round(seconds, 3),
                "peak_rss_gb": round(peak_rss_bytes() / 1e9, 3),
            }
            if gpu and gpu.is_initialized():
                entry["peak_gpu_gb"] = round(gpu.max_memory_reserved() / 1e9, 3)
            entry |= {"environment": environment(), **current.notes}
            entry = json.loads(json.dumps(entry, default=str))
            update_info(run, lambda info: info["stages"].update({name: entry}))
            shutil.rmtree(run.partial / name, ignore_errors=True)
            if run.partial.exists() and not any(run.partial.iterdir()):
                run.partial.rmdir()
        except OSError as error:
            if error.errno not in (*FULL, errno.EROFS):
                raise
            raise write_error(run.path, error) from error


def _tidy(run: Run, name: str, mark: str, outputs: Sequence[str], force: bool) -> None:
    """Before a stage: only pieces that its inputs made stay in its folder for unfinished work, and killed
    writers' temporary files go."""
    folder, owner = run.partial / name, run.partial / name / "fingerprint"
    if folder.exists() and (force or not owner.exists() or owner.read_text() != mark):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    owner.write_text(mark)
    for place in (folder, *(run.path / output for output in outputs)):
        for path in (*place.rglob(".*"), *place.parent.glob(f".{place.name}.*")):
            if is_temporary(path):
                path.unlink(missing_ok=True)


def describe_files(run: Run, outputs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file of some outputs, as `is_intact` compares them."""
    paths = [run.path / output for output in outputs]
    found = sorted(p for path in paths for p in (path.rglob("*") if path.is_dir() else [path]))
    return {
        str(p.relative_to(run.path)): {"bytes": p.stat().st_size, "sha256": sha256_file(p)}
        for p in found
        if p.is_file() and not is_temporary(p)
    }


def add_outputs(run: Run, name: str, outputs: Sequence[str]) -> None:
    """Enter more outputs of a stage that has finished, so that it counts as undone without them."""
    found = describe_files(run, outputs)
    update_info(run, lambda info: info["stages"].get(name, {}).setdefault("outputs", {}).update(found))


def is_intact(run: Run, entry: Mapping[str, Any]) -> bool:
    """Whether a finished stage's outputs still are what it wrote, byte for byte."""
    held = {run.path / name: one["sha256"] for name, one in entry.get("outputs", {}).items()}
    return "outputs" in entry and all(path.is_file() and sha256_file(path) == held[path] for path in held)


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
        yield
        return
    with _locked(run, OWNER) as handle:
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        owner = f"process {os.getpid()} on {socket.gethostname()}, since {since}, in stage {what}"
        os.ftruncate(handle, 0)
        os.pwrite(handle, owner.encode(), 0)
        _owned.add(path)
        try:
            yield
        finally:
            _owned.discard(path)


@contextlib.contextmanager
def _locked(run: Run, name: str) -> Iterator[int]:
    """Hold one of a run directory's two lock files: RECORD is held for moments, so others wait; OWNER for the
    length of a stage, so that they are refused."""
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(run.path / name, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise write_error(run.path, error) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if name == OWNER else 0))
    except BlockingIOError:
        who = os.pread(handle, 1000, 0).decode()
        os.close(handle)
        raise RunError(
            f"{run.path} is in use by another process ({who}). Wait until it ends, end it, or choose another "
            "`run_dir`."
        ) from None
    except OSError as error:
        if name == OWNER:
            print(f"{run.path} can't be locked ({error}): let no other run use it now.", flush=True)
    try:
        yield handle
    finally:
        os.close(handle)


def _gpu() -> Any:
    """`torch.cuda` where this process has a GPU and torch; this module imports none."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def peak_rss_bytes() -> int:
    """The process' peak resident memory so far, in bytes.

    On Linux the kernel's VmHWM: getrusage's figure is inherited from the process that forked this one.
    """
    import resource

    if (status := Path("/proc/self/status")).exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on macOS in bytes


def environment() -> dict[str, Any]:
    """Versions, processor and GPU of this process, as `run.json` and the report show them."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    gpu = _gpu()
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": cores(),
        "gpu": gpu and gpu.get_device_name(0),
        "versions": versions,
    }
