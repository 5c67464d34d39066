"""Many runs: a grid of models, scores, budgets and seeds, a process each, and one table over all of them.

    models: [bundled, Qwen/Qwen3-0.6B]          # or {model: …, revision: …}
    scores: [alpha_hill, {score: alpha_hill, direction: low}]
    budgets: [claim, {matrix_bits: 5.65}]       # {rule: value}
    seeds: [0, 1]
    axes: {double_quant: [false, true]}         # any other parameter of the notebooks
    parameters: {profile: full}                 # the same for every job

Each list is an axis; a job is one choice from each. A model is analysed once; each job gets that analysis (by
hard links) into a run directory of its own, where the other four notebooks run. Jobs run side by side here,
one at a time on a GPU, or on the workers of a Dask cluster. A finished job is recognised and skipped; one
that fails doesn't stop the others.

    <out>/analyses/<model>/   runs/<job>/   jobs/<job>.log, .json   leaderboard.csv   figures/leaderboard.*
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml

from spi_utils import figures, notebook, runs
from spi_utils.claims import Evaluation, generalization
from spi_utils.errors import BatchError, ParameterError, RunError, SPIError, suggest
from spi_utils.notebook import ALL, STAGES, parameters_of
from spi_utils.presets import for_all_stages, resolve
from spi_utils.progress import cores
from spi_utils.runs import Run, fingerprint, slug

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ANALYZE, *OTHERS = STAGES
POLL = 0.3  # seconds between two looks at a child
STOP = "stop"  # a file by which the batch tells its workers, wherever they are, to end their tasks
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# The last error in a log: "SomeError: what was wrong", perhaps over several lines.
ERROR = re.compile(r"^(?:\w+\.)*\w+(?:Error|Exception|Failed): .*", re.MULTILINE)
Settings = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One run of the grid: its name (a folder's), the notebooks' parameters, the analysis that it shares."""

    name: str
    parameters: Settings
    analysis: str


@dataclass(frozen=True)
class Task:
    """A process to run: Python's arguments, and the batch's folder for its log; the paths are absolute."""

    name: str
    arguments: tuple[str, ...]
    gpu: bool
    out: Path
    place: Path  # where relative paths of models start


@dataclass(frozen=True)
class Outcome:
    """What became of a task: "done", "failed" or "stopped"; the error is its own last one."""

    name: str
    status: str
    error: str = ""
    exit_code: int | None = None
    seconds: float = 0.0


def run_batch(
    grid: str | Path, out: str | Path, *, workers: int | None = None, scheduler: str | None = None
) -> int:
    """Run what isn't finished of a grid, then write its leaderboard; prints a line a job.

    Args:
        grid: a YAML file.
        out: the batch's folder; made if missing. With a scheduler all workers must see it.
        workers: jobs side by side on this machine; None is one a GPU, or one where there is none.
        scheduler: address of a Dask scheduler, e.g. "tcp://host:8786", whose workers run the jobs.

    Returns:
        exit code: 0, or 1 if a job failed.

    Raises:
        BatchError, ParameterError: a wrong grid or call; nothing has run then.
        RunError: another batch is running in this folder.
        KeyboardInterrupt: after every task has been ended, here and on a cluster.
    """
    if workers is not None and (workers < 1 or scheduler is not None):
        raise BatchError(f"--workers must be 1 or more, and excludes --scheduler; got {workers}.")
    jobs, analyses = read_grid(grid)
    out, total = Path(out).resolve(), len(analyses) + len(jobs)
    outcomes: dict[str, Outcome] = {}

    def note(one: Outcome) -> None:
        outcomes[one.name] = one
        runs.write_json(out / "jobs" / f"{one.name}.json", asdict(one))
        line = f"{len(outcomes):>{len(str(total))}}/{total}  {one.status:8s} {one.seconds:6.0f} s  {one.name}"
        print(f"{line}: {one.error[:200]}" if one.error else line, flush=True)

    def task(name: str, run: Run, stages: Sequence[str], parameters: Settings) -> Task:
        arguments = arguments_of(stages, {**parameters, "run_dir": str(run.path)})
        return Task(name, arguments, parameters.get("device") != "cpu", out, Path.cwd())

    (out / "jobs").mkdir(parents=True, exist_ok=True)
    with runs.owner_lock(Run(out), "batch"):
        (out / STOP).unlink(missing_ok=True)
        places = {key: Run(out / "analyses" / key) for key in analyses}
        first = [task(f"analysis-{key}", places[key], [ANALYZE], analyses[key]) for key in analyses]
        _run_all(first, workers, scheduler, note)
        ready = []
        for job in jobs:
            made, run = outcomes[f"analysis-{job.analysis}"], Run(out / "runs" / job.name)
            try:
                if made.status != "done":
                    raise BatchError(f"its analysis failed: {made.error}")
                share_analysis(places[job.analysis], run)
                ready.append(task(job.name, run, OTHERS, job.parameters))
            except SPIError as error:
                note(Outcome(job.name, "failed", str(error), made.exit_code))
        _run_all(ready, workers, scheduler, note)

    if done := [(job, Run(out / "runs" / job.name)) for job in jobs if outcomes[job.name].status == "done"]:
        table = leaderboard(done)
        with runs.atomic_path(out / "leaderboard.csv") as path:
            table.to_csv(path, index=False, lineterminator="\n")
        print("", *sentences(table), f"\nleaderboard  {out / 'leaderboard.csv'}", sep="\n")
        print(f"figure       {figures.save_figure(draw(table), Run(out), 'leaderboard')}")
    failed = [one for one in outcomes.values() if one.status != "done"]
    if failed:
        print(f"\n{len(failed)} of {total} failed; their logs are in {out / 'jobs'}:")
    for one in failed:
        print(f"  {one.name} (exit code {one.exit_code}): {one.error}")
    return 1 if failed else 0


# --- the grid --------------------------------------------------------------------------------------------

AXES = {"models": "model", "scores": "score", "budgets": "rule", "seeds": "seed"}  # and what an entry sets
KEYS = (*AXES, "axes", "parameters")
NAMED = ("model", "score", "direction", "rule", "value", "seed")  # what every job's name says
# What a batch decides itself, or what makes no sense for many jobs at once.
NOT_HERE = ("run_dir", "force", "repo_id", "dry_run", "over_budget")


def read_grid(path: str | Path) -> tuple[list[Job], dict[str, Settings]]:
    """Read a grid's file and expand it.

    Returns:
        The jobs, and the analyses that they share: name -> parameters of notebook 01.

    Raises:
        BatchError: no file, not YAML, an unknown key (with the nearest), an empty list, a setting that stands
            twice.
        ParameterError: a parameter that no notebook has, or a value that it can't have (with the nearest).
    """
    try:
        return expand(yaml.load(Path(path).read_text(encoding="utf-8"), notebook.Untyped), str(path))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise BatchError(
            f"{path}: can't be read: {error}. Give a grid such as examples/grid.yaml."
        ) from error


def expand(held: Any, where: str = "the grid") -> tuple[list[Job], dict[str, Settings]]:
    """The jobs of a grid that is given as a mapping, its values typed or as texts; see `read_grid`."""
    fixed, more = (
        (held.get(key) or {}) if isinstance(held, dict) else None for key in ("parameters", "axes")
    )
    if not isinstance(fixed, dict) or not isinstance(more, dict):
        raise BatchError(
            f"{where}: expected names with values, also below parameters and axes; found {held!r}."
        )
    if odd := [str(key) for key in held if key not in KEYS]:
        known = f"{suggest(odd[0], KEYS)} Known: {', '.join(KEYS)}."
        raise BatchError(f"{where}: unknown key {odd[0]!r}.{known}")
    if not held.get("models"):
        raise BatchError(f"{where}: no models. List at least one: models: [bundled].")
    given = {axis: held[axis] for axis in AXES if held.get(axis) is not None} | more
    axes = []
    for axis, values in given.items():
        if values == []:
            raise BatchError(f"{where}: {axis}: an empty list; give a value, or leave the key out.")
        axes.append([_entry(axis, x, where) for x in (values if isinstance(values, list) else [values])])
    chosen = [_settings([*choice, fixed], where) for choice in itertools.product(*axes)]
    # what any job's plan may hold, so that all share an analysis; nf4_dq last, as `for_all_stages` has it
    formats = dict.fromkeys(fmt for one in chosen for fmt in for_all_stages(one)["cost_formats"])
    costed = {"cost_formats": sorted(formats, key="nf4_dq".__eq__)}
    chosen = [for_all_stages(costed | settings) for settings in chosen]

    defaults, jobs, analyses = parameters_of(ALL), [], {}
    extra = sorted({name for axis in axes for choice in axis for name in choice} - set(NAMED))
    for settings in chosen:
        every = {**defaults, **settings}
        every |= resolve(every["preset"], every)
        # the analysis that a job shares: its own parameters of notebook 01, but one seed for all
        analysis = {name: settings[name] for name in parameters_of(ANALYZE) if name in settings}
        analysis |= {"rounding": every["rounding"], "seed": chosen[0].get("seed", defaults["seed"])}
        analysis.pop("preset", None)  # of an analysis it sets the rounding alone
        model = Path(str(every["model"]))  # a local one that was trained on is another one
        files = [model] if model.is_file() else sorted(model.glob("*.safetensors"))
        weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        key = f"{slug(model.name)}-{fingerprint([analysis, weights])[:8]}"
        analyses[key] = analysis
        parts = [
            model.name,
            every["score"] + ("" if every["direction"] == "high" else f"-{every['direction']}"),
            every["rule"] if every["value"] is None else f"{every['rule']}-{every['value']}",
            f"seed-{every['seed']}",
            *(f"{name}-{every[name]}".replace("/", "-") for name in extra),
        ]
        jobs.append(Job(f"{'.'.join(map(slug, parts))}.{fingerprint(settings)[:6]}", settings, key))
    names = [job.name for job in jobs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise BatchError(f"{where}: the job {twice[0]} stands twice; list each value once.")
    return jobs, analyses


def _entry(axis: str, entry: Any, where: str) -> Settings:
    """What one entry of an axis sets."""
    if axis != "budgets":
        return entry if axis in AXES and isinstance(entry, dict) else {AXES.get(axis, axis): entry}
    pair = {entry: None} if isinstance(entry, str) else entry
    if not isinstance(pair, dict) or len(pair) != 1:
        raise BatchError(f"{where}: budgets: expected a rule, or {{rule: value}}, found {entry!r}.")
    return next({"rule": rule, "value": value} for rule, value in pair.items())


def _settings(parts: Sequence[Settings], where: str) -> Settings:
    """One job's settings, checked; no two parts of the grid may set the same parameter."""
    merged: Settings = {}
    for name, value in itertools.chain.from_iterable(part.items() for part in parts):
        if name in merged:
            raise BatchError(f"{where}: {name!r} is set twice for one job; leave it in one place.")
        if name in NOT_HERE:
            raise BatchError(
                f"{where}: {name!r} can't be set for a batch, which gives every job a folder below --out and "
                "publishes none. Publish the run that you choose with notebook 05_publish."
            )
        merged[name] = notebook.coerce(name, value)
    try:
        notebook.check_settings(merged, ALL)
    except ParameterError as error:
        raise ParameterError(f"{where}: {error}") from None
    return merged


# --- tasks -----------------------------------------------------------------------------------------------


def arguments_of(stages: Sequence[str], parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """Python's arguments for the process that runs these notebooks: the command line of this package."""
    own = {parameter for name in stages for parameter in parameters_of(name)}
    chosen = [part for name in stages for part in ("--only", name)]
    for name in parameters:
        if name in own:
            chosen += ["-p", name, json.dumps(parameters[name], ensure_ascii=False)]
    return ("-m", "spi_utils", "run", *chosen)


def share_analysis(analysis: Run, run: Run) -> None:
    """Give a run an analysis that was made elsewhere: hard links to its files, its entries in run.json.

    Every write in a run directory replaces a file, so a link never changes the analysis.

    Raises:
        RunError: the run belongs to another model.
    """
    made = runs.run_info(analysis)
    held: dict[str, Any] = runs.run_info(run) if run.info_json.exists() else {**made, "stages": {}}
    if held["model"]["sha256"] != made["model"]["sha256"]:
        other, this = (f"{x['model']['id']} (weights {x['model']['sha256'][:12]})" for x in (held, made))
        raise RunError(f"{run.path} holds a run of {other}, not of {this}. Remove the folder.")
    more = (*analysis.rounded.glob("*"), *analysis.notebooks.glob("*"))
    for path in (analysis.layers_csv, analysis.spectra, *more):
        with runs.atomic_path(run.path / path.relative_to(analysis.path)) as temporary:
            temporary.unlink()
            try:
                os.link(path, temporary)
            except OSError:  # another file system, or one without links
                shutil.copyfile(path, temporary)
    stages = held["stages"] | {name: made["stages"][name] for name in ("spectra", "analyze")}
    runs.write_json(run.info_json, {**made, "notebooks": {}, **held, "stages": stages})


# --- running them ----------------------------------------------------------------------------------------


def _run_all(
    tasks: Sequence[Task], workers: int | None, scheduler: str | None, note: Callable[[Outcome], None]
) -> None:
    """On this machine, a thread for each process, a GPU having one at a time; or on a Dask cluster.

    Where a cluster's workers declare the resource GPU, a task takes one; else a worker has as many tasks as
    threads. A task whose worker dies for good is that task's failure alone.
    """
    with contextlib.ExitStack() as stack:
        if scheduler is None:
            gpus: SimpleQueue[str] = SimpleQueue()
            for name in (names := visible_gpus()):
                gpus.put(name)
            count = workers or len(names) or 1
            pool = stack.enter_context(ThreadPoolExecutor(count))
            side_by_side = max(min(count, len(tasks)), 1)
            free = gpus if names else None
            futures = {pool.submit(run_task, task, side_by_side, free): task for task in tasks}
        else:
            try:
                from distributed import Client

                client = stack.enter_context(Client(scheduler, timeout=30))
            except (ImportError, OSError, ValueError) as error:
                needs = "It needs `pip install 'dask[distributed]'`, here and there."
                raise BatchError(f"no Dask scheduler answers at {scheduler!r}: {error}. {needs}") from error
            members = client.scheduler_info(n_workers=-1)["workers"].values()
            hosts = Counter(host for one in members for host in [one["host"]] * one["nthreads"])
            declared = any("GPU" in member["resources"] for member in members)
            futures = {}
            for task in tasks:
                resources = {"GPU": 1} if declared and task.gpu else None
                cluster = client.get_executor(pure=False, resources=resources)
                futures[cluster.submit(run_task, task, max(hosts.values(), default=1))] = task
        try:
            for future in as_completed(futures):
                name, failure = futures[future].name, future.exception()
                said = f"{type(failure).__name__}: {failure}"
                note(future.result() if failure is None else Outcome(name, "failed", said))
        except KeyboardInterrupt:
            (tasks[0].out / STOP).touch()
            raise


def run_task(task: Task, side_by_side: int, gpus: SimpleQueue[str] | None = None) -> Outcome:
    """Run a task in a process of its own; a process that fails is the outcome's error.

    Args:
        task: what to run.
        side_by_side: tasks that share this host's cores.
        gpus: names of free GPUs, as CUDA_VISIBLE_DEVICES has them: the process sees the one that it takes.
    """
    environment = {**os.environ, **dict.fromkeys(THREADS, str(max(1, cores() // side_by_side)))}
    gpu = gpus.get() if gpus is not None and task.gpu else None
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    started, stop, log = time.monotonic(), task.out / STOP, task.out / "jobs" / f"{task.name}.log"
    code = None
    try:
        with log.open("w", encoding="utf-8") as file:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
            how = {"cwd": task.place, "env": environment, "start_new_session": True, **streams}
            process = subprocess.Popen([sys.executable, *task.arguments], **how)
            try:
                while process.poll() is None and not stop.exists():
                    time.sleep(POLL)
                code = process.poll()
            finally:
                if code is None:  # once reaped, its number may be a stranger's
                    notebook.end_tree(process.pid)
    finally:
        if gpus is not None and gpu is not None:
            gpus.put(gpu)
    status = "done" if code == 0 else "stopped" if stop.exists() else "failed"
    return Outcome(task.name, status, _error(log, code), code, round(time.monotonic() - started, 1))


def _error(log: Path, code: int | None) -> str:
    """A process' own error, from the end of what it printed; "" of one that ended well."""
    if not code:
        return "" if code == 0 else "ended with its batch"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}" + " (out of memory?)" * (code == -signal.SIGKILL)
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    return [*text.splitlines()[-1:], *ERROR.findall(text)][-1] if text else "it printed nothing"


def visible_gpus() -> list[str]:
    """This host's GPUs as CUDA_VISIBLE_DEVICES names them; none without a driver."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [one.strip() for one in named.split(",") if one.strip() not in ("", "-1")]
    import torch

    return list(map(str, range(torch.cuda.device_count())))


# --- what came out ---------------------------------------------------------------------------------------
# Does the score beat random layers at equal bytes, where, by how much? Every number is evaluation.json's own
# and every verdict the audit's, from the interval over windows.

# What the audit calls "the plan's KL is lower than the random mean's" -> colour, marker, words.
VERDICTS = {
    "supported": (figures.GREEN, "o", "beats random"),
    "refuted": (figures.VERMILLION, "s", "worse than random"),
    "not separable": (figures.GREY, "D", "not separable"),
}
# `generalization`'s columns -> the leaderboard's
COLUMNS = {
    **{"model": "model", "text": "text", "windows": "windows", "matrix bits": "matrix_bits"},
    **{f"KL {key}": f"kl_{key}" for key in ("plan", "random", "fisher", "fisher_int8", "int8")},
    **{"random": "verdict", "Δ loss": "loss_difference", "Δ low": "loss_low", "Δ high": "loss_high"},
}


def leaderboard(finished: Iterable[tuple[Job, Run]]) -> pd.DataFrame:
    """A row a run (one or more): by model, by size, the lowest KL first.

    `kl_difference` is the plan's mean KL minus the random controls' mean at equal bytes, in nats a token,
    with its 95 % interval over windows; an unbounded end, and what was not run, is NaN. `beaten` counts the
    controls, of `controls`, whose KL is higher. `ratio` is the plan's KL over the random mean.

    Raises:
        RunError: a run's evaluation can't be read.
    """
    rows, finished = [], list(finished)
    for job, run in finished:
        evaluation = Evaluation.read(run.evaluation_json)
        row = {"job": job.name, **{name: evaluation.plan[name] for name in ("score", "direction", "rule")}}
        row |= {"value": job.parameters.get("value"), "seed": evaluation.settings["seed"]}
        plan = evaluation.variants["plan"]
        against = plan.get("vs_random", {})
        kl = against.get("kl", {})
        row |= {"bytes": plan["bytes"], "kl_difference": kl.get("mean"), "kl_low": kl.get("low")}
        row |= {"kl_high": kl.get("high"), "p_holm": kl.get("p_holm")}
        rows.append(row | {"beaten": against.get("kl_beats"), "controls": against.get("controls", 0)})
    held = generalization(run.path for _, run in finished).rename(columns=COLUMNS)
    table = pd.concat([pd.DataFrame(rows), held[list(COLUMNS.values())]], axis=1)
    table = table.assign(ratio=table["kl_plan"] / table["kl_random"])
    table = table.astype(dict.fromkeys(("kl_difference", "kl_low", "kl_high"), float))
    return table.sort_values(["model", "bytes", "kl_plan"], kind="stable", ignore_index=True)


def sentences(table: pd.DataFrame) -> list[str]:
    """What the table says of each score: in how many runs it beats random layers, and by how much."""
    said = []
    for (score, direction), rows in table.groupby(["score", "direction"], sort=False):
        counts, tested = rows["verdict"].value_counts(), rows["kl_difference"].notna().sum()
        said.append(
            f"{figures.short_label(str(score))}, {direction} end: better than random layers of the same size "
            f"in {counts.get('supported', 0)} of {tested} runs, worse in {counts.get('refuted', 0)}; median "
            f"KL {rows['ratio'].median():.2f} × random's."
        )
    return said


@figures.styled
def draw(table: pd.DataFrame) -> Figure:
    """Each run's KL minus the random mean's, with its interval; left of the line the plan is better."""
    rows = table[table["kl_difference"].notna()].reset_index(drop=True)
    figure = figures.new_figure(9.0, 2.2 + 0.34 * max(len(rows), 1))
    axes = figure.subplots()
    axes.axvline(0, color=figures.BLACK, linewidth=1)
    for verdict, some in rows.groupby("verdict"):
        colour, marker, words = VERDICTS[str(verdict)]
        middle, (low, high) = some["kl_difference"], (some[end] for end in ("kl_low", "kl_high"))
        error = [(middle - low).fillna(0), (high - middle).fillna(0)]
        axes.errorbar(middle, some.index, xerr=error, fmt=marker, color=colour, label=words)
    axes.set_yticks(rows.index, [figures.shorten(job, 56) for job in rows["job"]])
    axes.invert_yaxis()
    axes.set_xlabel("KL of the plan − KL of random layers at equal bytes (nats a token)")
    axes.legend(loc="best")
    detail = "Bars: 95 % interval over windows. Left of the line the score's layers are better."
    figures.headline(figure, sentences(table)[0], detail)
    return figure
