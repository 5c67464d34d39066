"""Many runs: a grid of models, scores, budgets and seeds, a process each, and one table over all of them.

A model is analysed once; each job gets that analysis (by hard links) into a run directory of its own, where
the other four notebooks run. Jobs run side by side in joblib's threads, one at a time on a GPU, or on the
workers of a Dask cluster. A finished job is recognised and skipped; one that fails doesn't stop the others.

    <out>/analyses/<model>/   runs/<job>/   jobs/<job>.log, .json   leaderboard.csv   figures/leaderboard.*
"""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from spi_utils.batches.grid import Grid, Job, Settings, read_grid
from spi_utils.batches.leaderboard import draw, leaderboard, sentences
from spi_utils.batches.sharing import share_analysis
from spi_utils.batches.worker import (
    STOP,
    Outcome,
    Task,
    is_done,
    run_shared,
    run_task,
    visible_gpus,
    wait_for_tasks,
)
from spi_utils.errors import BatchError, SPIError
from spi_utils.figures import save_figure
from spi_utils.headless import MADE, STAGES, parameters_of
from spi_utils.parallel import cores, spread
from spi_utils.runs import Run, atomic_path, fingerprint, layers_fingerprint

ANALYZE, *OTHERS = STAGES
INTERRUPTED = 130  # the shell's exit code for Ctrl-C


@dataclass
class Batch:
    """A grid in its folder, the engine that its tasks run on, and what became of them."""

    grid: Grid
    out: Path
    workers: int | None = None
    scheduler: str | None = None
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Analyses and jobs."""
        return len(self.grid.analyses) + len(self.grid.jobs)


def run_batch(
    grid: str | Path, out: str | Path, *, workers: int | None = None, scheduler: str | None = None
) -> int:
    """Run what isn't finished of a grid, then write its leaderboard; prints a line a job.

    Args:
        grid: a YAML file, see `batches.grid`.
        out: the batch's folder; made if missing. With a scheduler all workers must see it.
        workers: jobs side by side on this machine; None is one a GPU, or one where there is none.
        scheduler: address of a Dask scheduler, e.g. "tcp://host:8786", whose workers run the jobs.

    Returns:
        exit code: 0, 1 if a job failed, 130 if it was interrupted.

    Raises:
        BatchError, ParameterError: a wrong grid or call; nothing has run then.
    """
    if scheduler is not None and workers is not None:
        raise BatchError("--workers and --scheduler exclude each other: a cluster has its own workers.")
    if workers is not None and workers < 1:
        raise BatchError(f"--workers must be 1 or more, got {workers}.")
    batch = Batch(read_grid(grid), Path(out).resolve(), workers, scheduler)
    (batch.out / "jobs").mkdir(parents=True, exist_ok=True)
    with _alone(batch.out), _stoppable(batch.out):
        try:
            _run(batch)
        except KeyboardInterrupt:
            wait_for_tasks()
            print("\nInterrupted; the same command goes on where it stopped.", flush=True)
            return INTERRUPTED
    return _report(batch)


def _run(batch: Batch) -> None:
    analyses = {name: _analysis_task(batch, name, own) for name, own in batch.grid.analyses.items()}
    _run_tasks(batch, list(analyses.values()))
    tasks = []
    for job in batch.grid.jobs:
        made = batch.outcomes[analyses[job.analysis].name]
        try:
            if made.status != "done":
                raise BatchError(f"its analysis failed: {made.error}")
            tasks.append(_job_task(batch, job))
        except SPIError as error:
            _note(batch, Outcome(job.name, "failed", "", 0.0, made.exit_code, str(error), None))
    _run_tasks(batch, tasks)


def _run_tasks(batch: Batch, tasks: Sequence[Task]) -> None:
    """Run the tasks that aren't finished, and note each as it ends."""
    left = []
    for task in tasks:
        if is_done(task):
            _note(batch, Outcome(task.name, "done", task.fingerprint, 0.0, 0, "", None), "already done")
        else:
            left.append(task)
    if not left:
        return
    engine = _on_cluster(left, batch.scheduler) if batch.scheduler else _here(left, batch.workers)
    for outcome in engine:
        _note(batch, outcome)


def _note(batch: Batch, outcome: Outcome, said: str = "") -> None:
    batch.outcomes[outcome.name] = outcome
    what = said or outcome.status
    if outcome.status == "failed" and outcome.exit_code:
        what = f"failed (exit code {outcome.exit_code})"
    place = f"{len(batch.outcomes):>{len(str(batch.total))}}/{batch.total}"
    line = f"{place}  {what:22s} {outcome.seconds:6.0f} s  {outcome.name}"
    print(f"{line}: {outcome.error[:200]}" if outcome.error else line, flush=True)


# --- engines ---------------------------------------------------------------------------------------------


def _here(tasks: Sequence[Task], workers: int | None) -> Iterator[Outcome]:
    """On this machine, in joblib's threads: each waits for a process."""
    gpus = len(visible_gpus()) if any(task.gpu for task in tasks) else 0
    count = min(workers or gpus or 1, len(tasks))
    threads = max(1, cores() // count)
    yield from spread(run_task, [(task, threads) for task in tasks], workers=count, backend="threading")


def _on_cluster(tasks: Sequence[Task], scheduler: str | None) -> Iterator[Outcome]:
    """On the workers of a Dask cluster; a task whose worker dies for good is that task's failure alone."""
    try:
        from distributed import Client, as_completed
    except ImportError as error:
        raise BatchError("--scheduler needs distributed: pip install 'dask[distributed]'.") from error
    try:
        client = Client(scheduler, timeout=30)
    except (OSError, ValueError) as error:
        raise BatchError(f"no Dask scheduler answers at {scheduler!r}: {error}") from error
    with client:
        hosts: Counter[str] = Counter()
        for worker in client.scheduler_info(n_workers=-1)["workers"].values():
            hosts[worker["host"]] += worker["nthreads"]
        side_by_side = max(hosts.values(), default=1)
        futures = {client.submit(run_shared, task, side_by_side, pure=False): task for task in tasks}
        try:
            for future in as_completed(futures):
                failure = future.exception()
                if failure is None:
                    yield future.result()
                else:
                    task, said = futures[future], f"{type(failure).__name__}: {failure}"
                    yield Outcome(task.name, "failed", task.fingerprint, 0.0, None, said, None)
        finally:
            client.cancel(list(futures))


# --- tasks -----------------------------------------------------------------------------------------------


def arguments_of(stages: Sequence[str], parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """Python's arguments for the process that runs these notebooks: the command line of this package."""
    chosen = [part for name in stages for part in ("--only", name)]
    own = {parameter for name in stages for parameter in parameters_of(name)}
    given = [part for name in parameters if name in own for part in ("-p", name, _yaml(parameters[name]))]
    return ("-m", "spi_utils", "run", *chosen, *given)


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _analysis_task(batch: Batch, name: str, parameters: Settings) -> Task:
    run = Run(batch.out / "analyses" / name)
    mark = fingerprint({"parameters": parameters, "files": _local_files(str(parameters["model"]))})
    return _task(batch, f"analysis {name}", run, [ANALYZE], parameters, mark)


def _local_files(model: str) -> list[tuple[str, int, int]]:
    """Name, size and time of a local model's weight files: a model that was trained on is another one."""
    path = Path(model)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _job_task(batch: Batch, job: Job) -> Task:
    analysis, run = Run(batch.out / "analyses" / job.analysis), Run(batch.out / "runs" / job.name)
    share_analysis(analysis, run)
    mark = fingerprint({"parameters": job.parameters, "layers": layers_fingerprint(analysis)})
    return _task(batch, job.name, run, OTHERS, job.parameters, mark)


def _task(batch: Batch, name: str, run: Run, stages: Sequence[str], parameters: Settings, mark: str) -> Task:
    made = MADE["04_evaluate" if "04_evaluate" in stages else ANALYZE]
    file = batch.out / "jobs" / name.replace(" ", "-")
    return Task(
        name=name,
        arguments=arguments_of(stages, {**parameters, "run_dir": str(run.path)}),
        fingerprint=mark,
        made=str(run.path / made),
        log=f"{file}.log",
        state=f"{file}.json",
        folder=str(batch.out),
        place=os.getcwd(),
        gpu=parameters.get("device", parameters_of(ANALYZE)["device"]) != "cpu",
    )


# --- the folder ------------------------------------------------------------------------------------------


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One batch at a time in a folder; the lock goes with the process, however it ends."""
    with open(out / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BatchError(
                f"another batch is running in {out}. Wait for it, or give another --out."
            ) from None
        yield


@contextmanager
def _stoppable(out: Path) -> Iterator[None]:
    """Ctrl-C and a termination end every task, here and on a cluster, before the batch itself ends."""
    stop = out / STOP
    stop.unlink(missing_ok=True)

    def interrupt(*_: Any) -> None:
        stop.touch()
        raise KeyboardInterrupt

    here = threading.current_thread() is threading.main_thread()
    before = {kind: signal.signal(kind, interrupt) for kind in (signal.SIGINT, signal.SIGTERM) if here}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


# --- what came out ---------------------------------------------------------------------------------------


def _report(batch: Batch) -> int:
    """Write the leaderboard, list what failed, and return the exit code."""
    done = [job for job in batch.grid.jobs if batch.outcomes[job.name].status == "done"]
    table = leaderboard((job, Run(batch.out / "runs" / job.name)) for job in done)
    with atomic_path(batch.out / "leaderboard.csv") as path:
        table.to_csv(path, index=False, lineterminator="\n")
    print("", *sentences(table), sep="\n")
    print(f"\nleaderboard  {batch.out / 'leaderboard.csv'}")
    print(f"figure       {save_figure(draw(table), Run(batch.out), 'leaderboard')}")
    failed = [one for one in batch.outcomes.values() if one.status != "done"]
    if failed:
        print(f"\n{len(failed)} of {batch.total} failed:")
    for one in failed:
        log = batch.out / "jobs" / f"{one.name.replace(' ', '-')}.log"
        code = "" if one.exit_code is None else f" (exit code {one.exit_code})"
        print(f"  {one.name}{code}: {one.error}" + (f"\n    log: {log}" if log.exists() else ""))
    return 1 if failed else 0
