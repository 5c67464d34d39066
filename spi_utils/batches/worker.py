"""One task of a batch in a process of its own: on one GPU, judged by its outcome, ended with all below it.

Runs in a thread of the batch, or on a worker of a Dask cluster; both see the batch's folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from spi_utils.errors import BatchError, RunError, SPIError
from spi_utils.runs import read_json, sha256_file, write_json

POLL = 0.3  # seconds between two looks at a child
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# The last error in a log: "SomeError: what was wrong", perhaps over several lines.
ERROR = re.compile(r"^(?:\w+\.)*\w+(?:Error|Exception|Failed): ", re.MULTILINE)
SHARED = "The workers of a cluster need --out on a file system that all of them share."
STOP = "stop"  # a file by which the batch tells its workers, wherever they are, to end their tasks
_begun: set[str] = set()  # names of the tasks that threads of this process are at


@dataclass(frozen=True)
class Task:
    """What a worker has to run: Python's arguments, and how the outcome is known.

    `fingerprint` is of everything that the outcome depends on; `made` the file that a finished task leaves;
    `log` takes what it prints and `state` what became of it. All paths are absolute.
    """

    name: str
    arguments: tuple[str, ...]
    fingerprint: str
    made: str
    log: str
    state: str
    folder: str
    place: str
    gpu: bool


@dataclass(frozen=True)
class Outcome:
    """What became of a task: "done", "failed" or "stopped"; the error is its own last one."""

    name: str
    status: str
    fingerprint: str
    seconds: float
    exit_code: int | None
    error: str
    made_sha256: str | None


def is_done(task: Task) -> bool:
    """Whether this very task was finished before and what it made is still there, untouched."""
    held = _held(task)
    made = Path(task.made)
    return (
        held.get("status") == "done"
        and held.get("fingerprint") == task.fingerprint
        and made.exists()
        and held.get("made_sha256") == sha256_file(made)
    )


def run_task(task: Task, threads: int) -> Outcome:
    """Run a task and record its outcome in its state file; whatever fails is the outcome's error.

    Args:
        task: what to run.
        threads: BLAS and OpenMP threads of the process.
    """
    _begun.add(task.name)
    try:
        return _run_task(task, threads)
    finally:
        _begun.discard(task.name)


def run_shared(task: Task, side_by_side: int) -> Outcome:
    """A task on a cluster's worker, whose host's cores are shared by so many tasks."""
    from spi_utils.parallel import cores

    return run_task(task, max(1, cores() // side_by_side))


def wait_for_tasks(seconds: float = 15.0) -> None:
    """Wait until the tasks of this process' threads have seen that the batch is stopped, and have ended."""
    until = time.monotonic() + seconds
    while _begun and time.monotonic() < until:
        time.sleep(POLL)


def _run_task(task: Task, threads: int) -> Outcome:
    started = time.monotonic()
    digest, code = None, None
    try:
        if not Path(task.folder).is_dir():
            raise BatchError(f"{task.folder} isn't there. {SHARED}")
        _end_leftover(task)
        with _gpu(task) as device:
            started = time.monotonic()
            code = _run(task, {**os.environ, **dict.fromkeys(THREADS, str(threads)), **device})
        status, error = _judge(task, code)
        digest = sha256_file(task.made) if status == "done" else None
    except (SPIError, OSError) as failure:  # of this host, e.g. a full disk: the other tasks go on
        status, error = "failed", f"{type(failure).__name__} on {socket.gethostname()}: {failure}"
    seconds = round(time.monotonic() - started, 1)
    outcome = Outcome(task.name, status, task.fingerprint, seconds, code, error, digest)
    with contextlib.suppress(SPIError, OSError):  # unrecorded, the task is merely run again next time
        write_json(task.state, asdict(outcome))
    return outcome


def _judge(task: Task, code: int | None) -> tuple[str, str]:
    if code is None:
        return "stopped", "ended with its batch"
    if code == 0 and Path(task.made).exists():
        return "done", ""
    return "failed", _error(task, code)


def _run(task: Task, environment: dict[str, str]) -> int | None:
    """The process' exit code; None where the batch was stopped, and the process with it."""
    stop = Path(task.folder) / STOP
    if stop.exists():
        return None
    with open(task.log, "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, *task.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=task.place,
            env=environment,
            start_new_session=True,
        )
        try:
            running = {"status": "running", "host": socket.gethostname(), "pid": process.pid}
            write_json(task.state, {**running, "created": psutil.Process(process.pid).create_time()})
            while process.poll() is None:
                if stop.exists():
                    return None
                time.sleep(POLL)
        finally:
            if process.returncode is None:  # once reaped, its number may be a stranger's
                end_tree(process.pid)
    return process.wait()


def end_tree(pid: int) -> None:
    """End a process and all below it: a notebook's kernel has its own session, so its group isn't enough."""
    try:
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:  # the parent first, so that it starts no more
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=5)


def _end_leftover(task: Task) -> None:
    """End the process that a killed batch left behind on this host: two must not write one run."""
    held = _held(task)
    if held.get("status") != "running" or held.get("host") != socket.gethostname():
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        if psutil.Process(held["pid"]).create_time() == held["created"]:
            end_tree(held["pid"])


def _held(task: Task) -> dict[str, Any]:
    """The task's last state; none where it was never begun, or was killed while this was written."""
    try:
        return read_json(task.state)
    except RunError:
        return {}


def _error(task: Task, code: int) -> str:
    """The task's own error, from the end of what it printed."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (", most likely out of memory" if code == -signal.SIGKILL else "")
    text = Path(task.log).read_text(encoding="utf-8", errors="replace").strip()
    found = list(ERROR.finditer(text))
    if found:
        return text[found[-1].start() :].splitlines()[0]
    if code == 0:
        return f"ended without making {task.made}"
    return text.splitlines()[-1] if text else "it printed nothing"


# --- GPUs ------------------------------------------------------------------------------------------------


def visible_gpus() -> list[str]:
    """This host's GPUs as CUDA_VISIBLE_DEVICES names them; none without a driver."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [one.strip() for one in named.split(",") if one.strip() not in ("", "-1")]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


@contextlib.contextmanager
def _gpu(task: Task) -> Iterator[dict[str, str]]:
    """Hold a free GPU of this host alone while a task runs; the environment that shows it only that one.

    The hold is a lock on a file of the host, so that tasks of other workers and other batches respect it,
    and so that a killed worker lets go.
    """
    gpus = visible_gpus() if task.gpu else []
    if not gpus:
        yield {}
        return
    while not (Path(task.folder) / STOP).exists():
        for gpu in gpus:
            name = re.sub(r"\W", "-", gpu)
            with open(Path(tempfile.gettempdir()) / f"spi-gpu-{os.getuid()}-{name}.lock", "w") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield {"CUDA_VISIBLE_DEVICES": gpu}
                return
        time.sleep(POLL)
    yield {}
