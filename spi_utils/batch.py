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
import socket
import subprocess
import sys
import time
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
from spi_utils.presets import for_all_stages, formats_to_cost, resolve
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

    def file(self, suffix: str) -> Path:
        """Its log or its record."""
        return self.out / "jobs" / (self.name.replace(" ", "-") + suffix)


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
        said = one.status + (f" (exit code {one.exit_code})" if one.exit_code else "")
        place = f"{len(outcomes):>{len(str(total))}}/{total}"
        line = f"{place}  {said:22s} {one.seconds:6.0f} s  {one.name}"
        print(f"{line}: {one.error[:200]}" if one.error else line, flush=True)

    def task(name: str, run: Run, stages: Sequence[str], parameters: Settings) -> Task:
        arguments = arguments_of(stages, {**parameters, "run_dir": str(run.path)})
        return Task(name, arguments, parameters.get("device") != "cpu", out, Path.cwd())

    (out / "jobs").mkdir(parents=True, exist_ok=True)
    with runs.owner_lock(Run(out), "batch"):
        (out / STOP).unlink(missing_ok=True)
        places = {key: Run(out / "analyses" / key) for key in analyses}
        first = {key: task(f"analysis {key}", places[key], [ANALYZE], analyses[key]) for key in analyses}
        _run_all(list(first.values()), workers, scheduler, note)
        ready = []
        for job in jobs:
            made, run = outcomes[first[job.analysis].name], Run(out / "runs" / job.name)
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
        code = "" if one.exit_code is None else f" (exit code {one.exit_code})"
        print(f"  {one.name}{code}: {one.error}")
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
        held = yaml.load(Path(path).read_text(encoding="utf-8"), notebook.Untyped)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise BatchError(
            f"{path}: can't be read: {error}. Give a grid such as examples/grid.yaml."
        ) from error
    return expand(held, str(path))


def expand(held: Any, where: str = "the grid") -> tuple[list[Job], dict[str, Settings]]:
    """The jobs of a grid that is given as a mapping, its values typed or as texts; see `read_grid`."""
    wrong = f"{where}: expected names with values, also below parameters and axes; found {held!r}."
    if not isinstance(held, dict):
        raise BatchError(wrong)
    for key in held:
        if key not in KEYS:
            known = f"{suggest(str(key), KEYS)} Known: {', '.join(KEYS)}."
            raise BatchError(f"{where}: unknown key {key!r}.{known}")
    fixed, more = held.get("parameters") or {}, held.get("axes") or {}
    if not isinstance(fixed, dict) or not isinstance(more, dict):
        raise BatchError(wrong)
    if not held.get("models"):
        raise BatchError(f"{where}: no models. List at least one: models: [bundled].")
    given = {axis: held[axis] for axis in AXES if held.get(axis) is not None} | more
    axes = []
    for axis, values in given.items():
        if values == []:
            raise BatchError(f"{where}: {axis}: an empty list; give a value, or leave the key out.")
        axes.append([_entry(axis, x, where) for x in (values if isinstance(values, list) else [values])])
    chosen = [_settings([*choice, fixed], where) for choice in itertools.product(*axes)]
    # what any job's plan may hold, so that all share an analysis
    costed = {"cost_formats": list(dict.fromkeys(fmt for one in chosen for fmt in formats_to_cost(one)))}
    chosen = [for_all_stages(costed | settings) for settings in chosen]

    defaults, analyses, keys, labels = parameters_of(ALL), {}, [], []
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
        held = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        keys.append(f"{slug(model.name)}-{fingerprint([analysis, held])[:8]}")
        analyses[keys[-1]] = analysis
        parts = [
            model.name,
            every["score"] + ("" if every["direction"] == "high" else f"-{every['direction']}"),
            every["rule"] if every["value"] is None else f"{every['rule']}-{every['value']}",
            f"seed-{every['seed']}",
            *(f"{name}-{every[name]}".replace("/", "-") for name in extra),
        ]
        labels.append(".".join(map(slug, parts)))
    marks, names = list(map(fingerprint, chosen)), []
    for mark, label in zip(marks, labels, strict=True):
        if marks.count(mark) > 1:
            raise BatchError(f"{where}: the job {label} stands twice; list each value once.")
        names.append(label if labels.count(label) == 1 else f"{label}.{mark[:6]}")
    return list(map(Job, names, chosen, keys)), analyses


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
            names = visible_gpus() if any(task.gpu for task in tasks) else []
            gpus: SimpleQueue[str] = SimpleQueue()
            for name in names:
                gpus.put(name)
            count = max(min(workers or len(names) or 1, len(tasks)), 1)
            pool = stack.enter_context(ThreadPoolExecutor(count))
            futures = {pool.submit(run_task, task, count, gpus if names else None): task for task in tasks}
        else:
            try:
                from distributed import Client

                client = stack.enter_context(Client(scheduler, timeout=30))
            except (ImportError, OSError, ValueError) as error:
                needs = "It needs `pip install 'dask[distributed]'`, here and there."
                raise BatchError(f"no Dask scheduler answers at {scheduler!r}: {error}. {needs}") from error
            futures = {}
            members = client.scheduler_info(n_workers=-1)["workers"].values()
            hosts = [member["host"] for member in members for _ in range(member["nthreads"])]
            declared = any("GPU" in member["resources"] for member in members)
            for task in tasks:
                resources = {"GPU": 1} if declared and task.gpu else None
                cluster = client.get_executor(pure=False, resources=resources)
                futures[cluster.submit(run_task, task, max(map(hosts.count, hosts), default=1))] = task
        try:
            for future in as_completed(futures):
                task, failure = futures[future], future.exception()
                said = f"{type(failure).__name__}: {failure}"
                outcome = future.result() if failure is None else Outcome(task.name, "failed", said)
                runs.write_json(task.file(".json"), asdict(outcome))
                note(outcome)
        except KeyboardInterrupt:
            (tasks[0].out / STOP).touch()
            raise


def run_task(task: Task, side_by_side: int, gpus: SimpleQueue[str] | None = None) -> Outcome:
    """Run a task in a process of its own; whatever fails is the outcome's error.

    Args:
        task: what to run.
        side_by_side: tasks that share this host's cores.
        gpus: names of free GPUs, as CUDA_VISIBLE_DEVICES has them: the process sees the one that it takes.
    """
    environment = {**os.environ, **dict.fromkeys(THREADS, str(max(1, cores() // side_by_side)))}
    gpu = gpus.get() if gpus is not None and task.gpu else None
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    started, stop, log = time.monotonic(), task.out / STOP, task.file(".log")
    code = None
    try:
        with log.open("w", encoding="utf-8") as file:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
            command, how = [sys.executable, *task.arguments], {"start_new_session": True, **streams}
            process = subprocess.Popen(command, cwd=task.place, env=environment, **how)
            try:
                while process.poll() is None and not stop.exists():
                    time.sleep(POLL)
                code = process.poll()
            finally:
                if code is None:  # once reaped, its number may be a stranger's
                    notebook.end_tree(process.pid)
        error = "ended with its batch" if code is None else _error(log, code)
    except OSError as failure:  # of this host, e.g. a full disk: the other tasks go on
        error = f"{type(failure).__name__} on {socket.gethostname()}: {failure}"
    finally:
        if gpus is not None and gpu is not None:
            gpus.put(gpu)
    status = "failed" if error and not stop.exists() else "stopped" if error else "done"
    return Outcome(task.name, status, error, code, round(time.monotonic() - started, 1))


def _error(log: Path, code: int) -> str:
    """A process' own error, from the end of what it printed; "" of one that ended well."""
    if code == 0:
        return ""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (", most likely out of memory" if code == -signal.SIGKILL else "")
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


def leaderboard(finished: Iterable[tuple[Job, Run]]) -> pd.DataFrame:
    """A row a run (one or more): by model, by size, the lowest KL first.

    `kl_difference` is the plan's mean KL minus the random controls' mean at equal bytes, in nats a token,
    with its 95 % interval over windows; an unbounded end, and what was not run, is NaN. `beaten` counts the
    controls, of `controls`, whose KL is higher. `ratio` is the plan's KL over the random mean.

    Raises:
        RunError: a run's evaluation can't be read.
    """
    rows = []
    for job, run in finished:
        evaluation, held = Evaluation.read(run.evaluation_json), generalization([run.path]).iloc[0]
        plan, chosen = evaluation.variants["plan"], evaluation.plan
        against = plan.get("vs_random", {})
        kl = {"mean": None, "low": None, "high": None, "p_holm": None} | against.get("kl", {})
        row = {"job": job.name, "model": held["model"], "score": chosen["score"]}
        row |= {
            "direction": chosen["direction"],
            "rule": chosen["rule"],
            "value": job.parameters.get("value"),
        }
        row |= {"seed": evaluation.settings["seed"], "bytes": plan["bytes"]}
        row |= {"matrix_bits": held["matrix bits"], "verdict": held["random"]}
        row |= {"kl_plan": held["KL plan"], "kl_random": held["KL random"]}
        row |= {"ratio": held["KL plan"] / held["KL random"], "kl_difference": kl["mean"]}
        row |= {"kl_low": kl["low"], "kl_high": kl["high"], "p_holm": kl["p_holm"]}
        row |= {"beaten": against.get("kl_beats"), "controls": against.get("controls", 0)}
        row |= {"windows": held["windows"], "text": held["text"], "loss_difference": held["Δ loss"]}
        row |= {"loss_low": held["Δ low"], "loss_high": held["Δ high"]}
        row |= {f"kl_{control}": held[f"KL {control}"] for control in ("fisher", "fisher_int8", "int8")}
        rows.append(row)
    table = pd.DataFrame(rows).astype(dict.fromkeys(("kl_difference", "kl_low", "kl_high"), float))
    return table.sort_values(["model", "bytes", "kl_plan"], kind="stable", ignore_index=True)


def sentences(table: pd.DataFrame) -> list[str]:
    """What the table says of each score: on how many models it beats random layers, and by how much.

    A model counts only where every run of it says so.
    """
    said = []
    for (score, direction), rows in table.groupby(["score", "direction"], sort=False):
        who = f"{figures.short_label(str(score))}, {direction} end,"
        tested = rows[rows["verdict"] != "not tested"].sort_values("kl_difference")
        if tested.empty:
            said.append(f"{who} was not compared with random layers.")
            continue
        won, lost = (tested["verdict"].eq(verdict) for verdict in ("supported", "refuted"))
        all_won, all_lost = (one.groupby(tested["model"]).all() for one in (won, lost))
        best, worst = (_interval(row) for _, row in tested.iloc[[0, -1]].iterrows())
        effect = f"difference {best}" if len(tested) == 1 else f"difference from {best} to {worst}"
        said.append(
            f"{who} beats random layers of the same size on {all_won.sum()} of {len(all_won)} models "
            f"({won.sum()} of {len(tested)} runs; worse on {all_lost.sum()}): "
            f"KL {tested['ratio'].median():.2f} × random's, {effect} nats a token."
        )
    return said


def _interval(row: pd.Series) -> str:
    ends = ("unbounded" if pd.isna(row[end]) else f"{row[end]:+.4f}" for end in ("kl_low", "kl_high"))
    return f"{row['kl_difference']:+.4f} ({' … '.join(ends)})".replace("-", "−")


@figures.styled
def draw(table: pd.DataFrame) -> Figure:
    """Each run's KL minus the random mean's, with its interval; left of the line the plan is better."""
    rows = table[table["kl_difference"].notna()].reset_index(drop=True)
    figure = figures.new_figure(9.0, 2.2 + 0.34 * max(len(rows), 1))
    axes = figure.subplots()
    axes.axvline(0, color=figures.BLACK, linewidth=1)
    for verdict, (colour, marker, words) in VERDICTS.items():
        some = rows[rows["verdict"] == verdict]
        if len(some):
            middle = some["kl_difference"]
            look: dict[str, Any] = {"fmt": marker, "color": colour, "label": words}
            error = [middle - some["kl_low"].fillna(middle), some["kl_high"].fillna(middle) - middle]
            axes.errorbar(middle, some.index, xerr=error, capsize=3, **look)
    axes.set_yticks(rows.index, [figures.shorten(job, 56) for job in rows["job"]])
    axes.invert_yaxis()
    axes.set_xlabel("KL of the plan − KL of random layers at equal bytes (nats a token)")
    if len(rows):
        axes.legend(loc="best")
    detail = "Bars: 95 % interval over windows. Left of the line the score's layers are better."
    figures.headline(figure, sentences(table)[0], detail)
    return figure
