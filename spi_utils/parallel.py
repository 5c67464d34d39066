"""The same work in this thread, in several threads, in processes, or on a Dask cluster, with the same result.

BLAS, LAPACK and torch get one thread a job wherever it runs: sums are then added in one order, so that
serial and distributed runs agree to the last bit. Layers side by side also use the cores better than
threads inside one decomposition do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import joblib
import torch
from threadpoolctl import threadpool_limits

from spi_utils.errors import AnalysisError

BACKENDS = ("threading", "loky", "dask")


@contextmanager
def one_thread() -> Iterator[None]:
    """Hold torch, BLAS and OpenMP to one thread in this process."""
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
    scheduler: str | None = None,
) -> Iterator[Any]:
    """Yield `function(*job)` for every job as it finishes, in any order.

    Jobs are taken from the iterable only when a worker is free, so that few of them are in memory at once.

    Args:
        function: picklable for "loky" and "dask".
        jobs: argument tuples.
        workers: jobs at a time; None is one a core (on a cluster its own number).
        backend: "threading" shares this process, "loky" starts processes, "dask" uses a cluster.
        scheduler: address of a Dask scheduler ("tcp://host:8786"); None starts one here with `workers`
            processes of one thread each.

    Raises:
        AnalysisError: unknown backend, or Dask isn't installed.
    """
    if backend not in BACKENDS:
        raise AnalysisError(f"backend={backend!r}; expected one of {', '.join(map(repr, BACKENDS))}.")
    count = workers or cores()
    parallel: dict[str, Any] = {"return_as": "generator_unordered", "pre_dispatch": "n_jobs"}
    with one_thread():
        if backend == "dask":
            with _cluster(count, scheduler), joblib.parallel_config(backend="dask"):
                tasks = (joblib.delayed(_alone)(function, job) for job in jobs)
                yield from joblib.Parallel(n_jobs=workers or -1, **parallel)(tasks)
        elif backend == "loky" and count > 1:
            tasks = (joblib.delayed(_alone)(function, job) for job in jobs)
            yield from joblib.Parallel(n_jobs=count, backend="loky", **parallel)(tasks)
        else:
            tasks = (joblib.delayed(function)(*job) for job in jobs)
            yield from joblib.Parallel(n_jobs=count, backend="threading", **parallel)(tasks)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _alone(function: Callable[..., Any], job: tuple[Any, ...]) -> Any:
    """One job in a process of its own, which has its own thread settings."""
    with one_thread():
        return function(*job)


@contextmanager
def _cluster(workers: int, scheduler: str | None) -> Iterator[None]:
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise AnalysisError(
            "backend='dask' needs the package distributed: pip install 'dask[distributed]'."
        ) from error
    if scheduler is not None:
        with Client(scheduler):
            yield
        return
    with (
        LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster),
    ):
        yield
