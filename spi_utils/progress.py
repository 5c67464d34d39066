"""Long work: side by side, on one BLAS thread a job, with a sign of life.

tqdm's notebook bar freezes at 0 % under papermill and its plain bar floods the log, so headless runs print
a line at most every few seconds.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

Item = TypeVar("Item")


def interactive() -> bool:
    """True in a terminal, or in a notebook that a person drives."""
    ipython = sys.modules.get("IPython")  # a kernel has imported it
    shell = None if ipython is None else ipython.get_ipython()
    if shell is None:
        return sys.stderr.isatty()
    # nbclient and papermill execute with allow_stdin=False; a browser allows it.
    return bool(getattr(getattr(shell, "kernel", None), "_allow_stdin", False))


def progress(
    items: Iterable[Item], total: int, label: str, *, done: int = 0, every: float = 5.0
) -> Iterator[Item]:
    """Yield `items`, showing how many of `total` are finished and the time left.

    Args:
        items: what to iterate over; only what is left to do.
        total: number of all items, `done` included.
        label: what is being done, e.g. "spectra".
        done: how many were finished earlier (a resumed run).
        every: seconds between two lines when headless.
    """
    if interactive():
        from tqdm.auto import tqdm

        yield from tqdm(items, total=total, initial=done, desc=label)
        return
    start = last = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= every or done + count == total:
            left = (now - start) / count * (total - done - count)
            print(f"{label}: {done + count}/{total}, about {left:.0f} s left", flush=True)
            last = now


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Hold torch, BLAS and OpenMP to one thread in this process."""
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def spread(
    function: Callable[..., Any],
    jobs: Iterable[tuple[Any, ...]],
    *,
    workers: int | None = None,
    backend: str = "threading",
) -> Iterator[Any]:
    """Yield `function(*job)` for every job as it finishes, in any order.

    BLAS, LAPACK and torch get one thread a job: sums are then added in one order, so that runs agree to the
    last bit whatever the number of workers. Layers side by side also use the cores better than threads inside
    one decomposition do. Jobs are taken from the iterable only when a worker is free, so that few of them are
    in memory at once.

    Args:
        function: picklable for "loky".
        jobs: argument tuples.
        workers: jobs at a time; None is one a core.
        backend: "threading" shares this process, "loky" starts processes.
    """
    import joblib

    work = function if backend == "threading" else partial(_alone, function)
    tasks = (joblib.delayed(work)(*job) for job in jobs)
    how: dict[str, Any] = {"return_as": "generator_unordered", "pre_dispatch": "n_jobs", "backend": backend}
    with one_thread():
        yield from joblib.Parallel(n_jobs=workers or cores(), **how)(tasks)


def _alone(function: Callable[..., Any], *job: Any) -> Any:
    """One job in a process of its own, which has its own thread settings."""
    with one_thread():
        return function(*job)
