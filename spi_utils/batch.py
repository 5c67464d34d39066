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
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from spi_utils.presets import DEFAULT, PRESETS, resolve, with_own_windows
from spi_utils.progress import cores
from spi_utils.runs import Run, fingerprint, sha256_file, slug

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ANALYZE, *OTHERS = STAGES
INTERRUPTED = 130  # the shell's exit code for Ctrl-C
POLL = 0.3  # seconds between two looks at a child
STOP = "stop"  # a file by which the batch tells its workers, wherever they are, to end their tasks
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# The last error in a log: "SomeError: what was wrong", perhaps over several lines.
ERROR = re.compile(r"^(?:\w+\.)*\w+(?:Error|Exception|Failed): ", re.MULTILINE)
Settings = dict[str, Any]


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
        exit code: 0, 1 if a job failed, 130 if it was interrupted.

    Raises:
        BatchError, ParameterError: a wrong grid or call; nothing has run then.
        RunError: another batch is running in this folder.
    """
    if scheduler is not None and workers is not None:
        raise BatchError("--workers and --scheduler exclude each other: a cluster has its own workers.")
    if workers is not None and workers < 1:
        raise BatchError(f"--workers must be 1 or more, got {workers}.")
    jobs, analyses = read_grid(grid)
    out, total = Path(out).resolve(), len(analyses) + len(jobs)
    outcomes: dict[str, Outcome] = {}

    def note(outcome: Outcome, said: str = "") -> None:
        outcomes[outcome.name] = outcome
        what = said or outcome.status
        if outcome.status == "failed" and outcome.exit_code:
            what = f"failed (exit code {outcome.exit_code})"
        place = f"{len(outcomes):>{len(str(total))}}/{total}"
        line = f"{place}  {what:22s} {outcome.seconds:6.0f} s  {outcome.name}"
        print(f"{line}: {outcome.error[:200]}" if outcome.error else line, flush=True)

    def run(tasks: Sequence[Task]) -> None:
        left = [task for task in tasks if not is_done(task)]
        for task in tasks:
            if task not in left:
                note(Outcome(task.name, "done", task.fingerprint), "already done")
        if left and scheduler is not None:
            _on_cluster(left, scheduler, note)
        elif left:
            _here(left, workers, note)

    (out / "jobs").mkdir(parents=True, exist_ok=True)
    try:
        with runs.owner_lock(Run(out), "batch"), _stoppable(out):
            first = {name: _analysis_task(out, name, settings) for name, settings in analyses.items()}
            run(list(first.values()))
            tasks = []
            for job in jobs:
                made = outcomes[first[job.analysis].name]
                try:
                    if made.status != "done":
                        raise BatchError(f"its analysis failed: {made.error}")
                    tasks.append(_job_task(out, job))
                except SPIError as error:
                    note(Outcome(job.name, "failed", "", exit_code=made.exit_code, error=str(error)))
            run(tasks)
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on where it stopped.", flush=True)
        return INTERRUPTED

    failed = [one for one in outcomes.values() if one.status != "done"]
    _report(out, [job for job in jobs if outcomes[job.name].status == "done"], failed, total)
    return 1 if failed else 0


@contextlib.contextmanager
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


# --- the grid --------------------------------------------------------------------------------------------

AXES = {"models": "model", "scores": "score", "budgets": "rule", "seeds": "seed"}  # and what an entry sets
KEYS = (*AXES, "axes", "parameters")
NAMED = ("model", "score", "direction", "rule", "value", "seed")  # what every job's name says
# What a batch decides itself, or what makes no sense for many jobs at once.
NOT_HERE = {
    "run_dir": "a batch gives every job a folder of its own below --out",
    "force": "remove a job's folder to do it again",
    "repo_id": "publish the run that you choose with notebook 05_publish",
    "dry_run": "publish the run that you choose with notebook 05_publish",
    "over_budget": "a batch runs the stages without the budget that notebook 00_run_all makes",
}


@dataclass(frozen=True)
class Job:
    """One run of the grid: its name (a folder's), the notebooks' parameters, the analysis that it shares."""

    name: str
    parameters: Settings
    analysis: str


def read_grid(path: str | Path) -> tuple[list[Job], dict[str, Settings]]:
    """Read a grid's file and expand it.

    Returns:
        The jobs, and the analyses that they share: name -> parameters of notebook 01.

    Raises:
        BatchError: no file, not YAML, an unknown key (with the nearest), an empty list, a setting that stands
            twice.
        ParameterError: a parameter that no notebook has, or a value that it can't have (with the nearest).
    """
    path = Path(path)
    try:
        held = yaml.load(path.read_text(encoding="utf-8"), notebook.Untyped)
    except OSError as error:
        advice = "Give a grid such as examples/grid.yaml."
        raise BatchError(f"{path}: can't be read ({error.strerror}). {advice}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BatchError(f"{path}: not YAML: {error}") from error
    return expand(held, str(path))


def expand(held: Any, where: str = "the grid") -> tuple[list[Job], dict[str, Settings]]:
    """The jobs of a grid that is given as a mapping, its values typed or as texts; see `read_grid`."""
    held = _mapping(held, where)
    for key in held:
        if key not in KEYS:
            raise BatchError(
                f"{where}: unknown key {key!r}.{suggest(str(key), KEYS)} Known: {', '.join(KEYS)}."
            )
    fixed = _mapping(held.get("parameters") or {}, f"{where}: parameters")
    more = _mapping(held.get("axes") or {}, f"{where}: axes")
    if not held.get("models"):
        raise BatchError(f"{where}: no models. List at least one: models: [bundled].")
    axes = []
    for axis, name in AXES.items():
        entries = _list(held[axis], f"{where}: {axis}") if held.get(axis) is not None else [{}]
        axes.append([_entry(one, axis, name, where) for one in entries])
    axes += [[{name: one} for one in _list(more[name], f"{where}: axes: {name}")] for name in more]
    chosen = [with_own_windows(_settings([*choice, fixed], where)) for choice in itertools.product(*axes)]

    defaults, analyses, keys, labels, marks = parameters_of(ALL), {}, [], [], []
    own = parameters_of(ANALYZE)
    extra = sorted({name for axis in axes for choice in axis for name in choice} - set(NAMED))
    for settings in chosen:
        # the analysis that a job shares: its own parameters of notebook 01, but one seed for all
        analysis = {name: settings[name] for name in own if name in settings}
        analysis["seed"] = chosen[0].get("seed", defaults["seed"])
        preset = analysis.pop("preset", DEFAULT)  # of an analysis it sets the rounding alone
        rounding = resolve(preset, {"rounding": analysis.pop("rounding", None)})["rounding"]
        if rounding != PRESETS[DEFAULT]["rounding"]:
            analysis["rounding"] = rounding
        keys.append(f"{slug(str(analysis['model']))}-{fingerprint(analysis)[:8]}")
        analyses[keys[-1]] = analysis
        every = {**defaults, **settings}
        labels.append(_label(every | resolve(every["preset"], every), extra))
        marks.append(fingerprint(settings))
    for mark, label in zip(marks, labels, strict=True):
        if marks.count(mark) > 1:
            raise BatchError(f"{where}: the job {label} stands twice; list each value once.")
    names = [  # two jobs of one name get a piece of their fingerprint
        label if labels.count(label) == 1 else f"{label}.{mark[:6]}"
        for label, mark in zip(labels, marks, strict=True)
    ]
    return list(map(Job, names, chosen, keys)), analyses


def _entry(entry: Any, axis: str, name: str, where: str) -> Settings:
    """What one entry of an axis sets."""
    if axis != "budgets":
        return entry if isinstance(entry, dict) else {name: entry}
    if isinstance(entry, str):
        return {"rule": entry, "value": None}
    if isinstance(entry, dict) and len(entry) <= 1:  # none where the grid doesn't say
        return next(({"rule": rule, "value": value} for rule, value in entry.items()), {})
    raise BatchError(f"{where}: budgets: expected a rule, or {{rule: value}}, found {entry!r}.")


def _settings(parts: Sequence[Settings], where: str) -> Settings:
    """One job's settings, checked; no two parts of the grid may set the same parameter."""
    merged: Settings = {}
    for part in parts:
        for name, value in part.items():
            if name in merged:
                raise BatchError(f"{where}: {name!r} is set twice for one job; leave it in one place.")
            merged[name] = notebook.coerce(name, value)
    for name, advice in NOT_HERE.items():
        if name in merged:
            raise BatchError(f"{where}: {name!r} can't be set for a batch: {advice}.")
    if not isinstance(merged.get("model"), str):
        raise BatchError(f"{where}: models: expected a name, or {{model: name, …}}; found {merged!r}.")
    try:
        notebook.check_settings(merged, ALL)
    except ParameterError as error:
        raise ParameterError(f"{where}: {error}") from None
    return merged


def _label(every: Settings, extra: Sequence[str]) -> str:
    budget = every["rule"] if every["value"] is None else f"{every['rule']}-{every['value']}"
    score = every["score"] + ("" if every["direction"] == "high" else f"-{every['direction']}")
    more = [f"{name}-{every[name]}".replace("/", "-") for name in extra]
    return ".".join(map(slug, [str(every["model"]), score, budget, f"seed-{every['seed']}", *more]))


def _mapping(held: Any, where: str) -> Settings:
    if not isinstance(held, dict):
        raise BatchError(f"{where}: expected names with values, found {held!r}.")
    return held


def _list(held: Any, where: str) -> list[Any]:
    values = held if isinstance(held, list) else [held]
    if not values:
        raise BatchError(f"{where}: an empty list; give at least one value, or leave the key out.")
    return values


# --- tasks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A process to run: Python's arguments, and how its outcome is known.

    `fingerprint` is of everything that the outcome depends on; `made` the file that a finished task leaves;
    `out` is the batch's folder, `place` where relative paths of models start. All paths are absolute.
    """

    name: str
    arguments: tuple[str, ...]
    fingerprint: str
    made: str
    out: str
    place: str
    gpu: bool


@dataclass(frozen=True)
class Outcome:
    """What became of a task: "done", "failed" or "stopped"; the error is its own last one."""

    name: str
    status: str
    fingerprint: str
    seconds: float = 0.0
    exit_code: int | None = None
    error: str = ""
    made_sha256: str | None = None


def arguments_of(stages: Sequence[str], parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """Python's arguments for the process that runs these notebooks: the command line of this package."""
    chosen = [part for name in stages for part in ("--only", name)]
    own = {parameter for name in stages for parameter in parameters_of(name)}
    given = [part for name in parameters if name in own for part in ("-p", name, _yaml(parameters[name]))]
    return ("-m", "spi_utils", "run", *chosen, *given)


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _analysis_task(out: Path, name: str, parameters: Settings) -> Task:
    model = Path(str(parameters["model"]))
    # a local model that was trained on is another one
    files = [model] if model.is_file() else sorted(model.glob("*.safetensors"))
    held = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    mark = fingerprint({"parameters": parameters, "files": held})
    return _task(out, f"analysis {name}", Run(out / "analyses" / name), [ANALYZE], parameters, mark)


def _job_task(out: Path, job: Job) -> Task:
    analysis, run = Run(out / "analyses" / job.analysis), Run(out / "runs" / job.name)
    share_analysis(analysis, run)
    mark = fingerprint({"parameters": job.parameters, "layers": runs.layers_fingerprint(analysis)})
    return _task(out, job.name, run, OTHERS, job.parameters, mark)


def _task(out: Path, name: str, run: Run, stages: Sequence[str], parameters: Settings, mark: str) -> Task:
    arguments = arguments_of(stages, {**parameters, "run_dir": str(run.path)})
    made = run.path / notebook.MADE["04_evaluate" if "04_evaluate" in stages else ANALYZE]
    gpu = parameters.get("device", parameters_of(ANALYZE)["device"]) != "cpu"
    return Task(name, arguments, mark, str(made), str(out), os.getcwd(), gpu)


def _job_file(out: str | Path, name: str, suffix: str) -> Path:
    return Path(out, "jobs", name.replace(" ", "-") + suffix)


def share_analysis(analysis: Run, run: Run) -> None:
    """Give a run an analysis that was made elsewhere: hard links to its files, its entries in run.json.

    Every write in a run directory replaces a file, so a link never changes the analysis.

    Raises:
        RunError: the analysis is damaged, or the run belongs to another model.
    """
    made, shared = runs.run_info(analysis), ("spectra", "analyze")
    for name in shared:
        if name not in made["stages"] or not runs.is_intact(analysis, made["stages"][name]):
            raise RunError(f"{analysis.path}: its {name} is missing or was changed. Remove the folder.")
    held: dict[str, Any] = {"stages": {}}
    if run.info_json.exists():
        held = runs.run_info(run)
        if held["model"]["sha256"] != made["model"]["sha256"]:
            raise RunError(
                f"{run.path} holds a run of {held['model']['id']} (weights {held['model']['sha256'][:12]}), "
                f"not of {made['model']['id']} (weights {made['model']['sha256'][:12]}). Remove the folder."
            )
    made_of_it = (analysis.layers_csv, analysis.spectra, analysis.notebooks / "01_analyze.ipynb")
    for path in (*made_of_it, *sorted(analysis.rounded.glob("*.safetensors"))):
        target = run.path / path.relative_to(analysis.path)
        if not path.exists() or (target.exists() and sha256_file(target) == sha256_file(path)):
            continue
        with runs.atomic_path(target) as temporary:
            temporary.unlink()
            try:
                os.link(path, temporary)
            except OSError:  # another file system, or one without links
                shutil.copyfile(path, temporary)
    stages = {**held["stages"], **{name: made["stages"][name] for name in shared}}
    runs.write_json(run.info_json, {**made, "notebooks": {}, **held, "stages": stages})


def is_done(task: Task) -> bool:
    """Whether this very task was finished before and what it made is still there, untouched."""
    try:
        held = runs.read_json(_job_file(task.out, task.name, ".json"))
    except RunError:  # never begun, or killed while this was written
        return False
    return (
        (held.get("status"), held.get("fingerprint")) == ("done", task.fingerprint)
        and Path(task.made).exists()
        and held.get("made_sha256") == sha256_file(task.made)
    )


# --- running them ----------------------------------------------------------------------------------------


def _here(tasks: Sequence[Task], workers: int | None, note: Callable[[Outcome], None]) -> None:
    """On this machine, a thread for each process; a GPU has one at a time."""
    gpus: SimpleQueue[str] = SimpleQueue()
    for gpu in visible_gpus() if any(task.gpu for task in tasks) else ():
        gpus.put(gpu)
    count = min(workers or gpus.qsize() or 1, len(tasks))
    free = None if gpus.empty() else gpus
    with ThreadPoolExecutor(count) as pool:
        for future in as_completed([pool.submit(run_task, task, count, free) for task in tasks]):
            note(future.result())


def _on_cluster(tasks: Sequence[Task], scheduler: str, note: Callable[[Outcome], None]) -> None:
    """On the workers of a Dask cluster; a task whose worker dies for good is that task's failure alone.

    Where workers declare the resource GPU, a task takes one; else a worker has as many tasks as threads.
    """
    try:
        from distributed import Client
        from distributed import as_completed as as_finished
    except ImportError as error:
        raise BatchError("--scheduler needs distributed: pip install 'dask[distributed]'.") from error
    try:
        client = Client(scheduler, timeout=30)
    except (OSError, ValueError) as error:
        raise BatchError(f"no Dask scheduler answers at {scheduler!r}: {error}") from error
    with client:
        members = client.scheduler_info(n_workers=-1)["workers"].values()
        declared = any("GPU" in member["resources"] for member in members)
        hosts: Counter[str] = Counter()
        for member in members:
            hosts[member["host"]] += member["nthreads"]
        most = max(hosts.values(), default=1)
        futures = {}
        for task in tasks:
            needs = {"GPU": 1} if declared and task.gpu else None
            futures[client.submit(run_task, task, most, pure=False, resources=needs)] = task
        try:
            for future in as_finished(futures):
                task, failure = futures[future], future.exception()
                if failure is None:
                    note(future.result())
                else:
                    said = f"{type(failure).__name__}: {failure}"
                    note(Outcome(task.name, "failed", task.fingerprint, error=said))
        finally:
            client.cancel(list(futures))


def run_task(task: Task, side_by_side: int, gpus: SimpleQueue[str] | None = None) -> Outcome:
    """Run a task in a process of its own and record its outcome; whatever fails is the outcome's error.

    Args:
        task: what to run.
        side_by_side: tasks that share this host's cores.
        gpus: names of free GPUs, as CUDA_VISIBLE_DEVICES has them: the process sees the one that it takes.
    """
    environment = dict.fromkeys(THREADS, str(max(1, cores() // side_by_side)))
    gpu = gpus.get() if gpus is not None and task.gpu else None
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    started = time.monotonic()
    code, status, error, digest = None, "stopped", "ended with its batch", None
    try:
        if not Path(task.out).is_dir():
            shared = "The workers of a cluster need --out on a file system that all of them share."
            raise BatchError(f"{task.out} isn't there. {shared}")
        code = _process(task, environment)
        if code == 0 and Path(task.made).exists():
            status, error, digest = "done", "", sha256_file(task.made)
        elif code is not None:
            status, error = "failed", _error(task, code)
    except (SPIError, OSError) as failure:  # of this host, e.g. a full disk: the other tasks go on
        status, error = "failed", f"{type(failure).__name__} on {socket.gethostname()}: {failure}"
    finally:
        if gpus is not None and gpu is not None:
            gpus.put(gpu)
    seconds = round(time.monotonic() - started, 1)
    outcome = Outcome(task.name, status, task.fingerprint, seconds, code, error, digest)
    with contextlib.suppress(SPIError, OSError):  # unrecorded, the task is merely run again next time
        runs.write_json(_job_file(task.out, task.name, ".json"), asdict(outcome))
    return outcome


def _process(task: Task, environment: Mapping[str, str]) -> int | None:
    """The process' exit code; None where the batch was stopped, and the process with it."""
    stop = Path(task.out, STOP)
    if stop.exists():
        return None
    with open(_job_file(task.out, task.name, ".log"), "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, *task.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=task.place,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                if stop.exists():
                    return None
                time.sleep(POLL)
        finally:
            if process.returncode is None:  # once reaped, its number may be a stranger's
                notebook.end_tree(process.pid)
    return process.wait()


def _error(task: Task, code: int) -> str:
    """The task's own error, from the end of what it printed."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (", most likely out of memory" if code == -signal.SIGKILL else "")
    log = _job_file(task.out, task.name, ".log")
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    found = list(ERROR.finditer(text))
    if found:
        return text[found[-1].start() :].splitlines()[0]
    if code == 0:
        return f"ended without making {task.made}"
    return text.splitlines()[-1] if text else "it printed nothing"


def visible_gpus() -> list[str]:
    """This host's GPUs as CUDA_VISIBLE_DEVICES names them; none without a driver."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [one.strip() for one in named.split(",") if one.strip() not in ("", "-1")]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


# --- what came out ---------------------------------------------------------------------------------------


def _report(out: Path, done: Sequence[Job], failed: Sequence[Outcome], total: int) -> None:
    """Write and say what all runs come to, and list what failed."""
    table = leaderboard((job, Run(out / "runs" / job.name)) for job in done)
    with runs.atomic_path(out / "leaderboard.csv") as path:
        table.to_csv(path, index=False, lineterminator="\n")
    print("", *sentences(table), sep="\n")
    print(f"\nleaderboard  {out / 'leaderboard.csv'}")
    print(f"figure       {figures.save_figure(draw(table), Run(out), 'leaderboard')}")
    if failed:
        print(f"\n{len(failed)} of {total} failed:")
    for one in failed:
        log = _job_file(out, one.name, ".log")
        code = "" if one.exit_code is None else f" (exit code {one.exit_code})"
        print(f"  {one.name}{code}: {one.error}" + (f"\n    log: {log}" if log.exists() else ""))


# Does the score beat random layers at equal bytes, where, by how much? Every number is evaluation.json's own
# and every verdict the audit's, from the interval over windows.

# What the audit calls "the plan's KL is lower than the random mean's" -> colour, marker, words.
VERDICTS = {
    "supported": (figures.GREEN, "o", "beats random"),
    "refuted": (figures.VERMILLION, "s", "worse than random"),
    "not separable": (figures.GREY, "D", "not separable"),
    "not tested": (figures.BLACK, "x", "no random control"),
}
COLUMNS = (
    *("job", "model", "score", "direction", "rule", "value", "seed", "bytes", "matrix_bits", "verdict"),
    *("kl_plan", "kl_random", "ratio", "kl_difference", "kl_low", "kl_high", "p_holm", "beaten", "controls"),
    *("windows", "text", "loss_difference", "loss_low", "loss_high"),
    *("kl_fisher", "kl_fisher_int8", "kl_int8"),
)


def leaderboard(finished: Iterable[tuple[Job, Run]]) -> pd.DataFrame:
    """A row a run: by model, by size, the lowest KL first.

    `kl_difference` is the plan's mean KL minus the random controls' mean at equal bytes, in nats a token,
    with its 95 % interval over windows; an unbounded end, and what was not run, is NaN. `beaten` counts the
    controls, of `controls`, whose KL is higher. `ratio` is the plan's KL over the random mean.

    Raises:
        RunError: a run's evaluation can't be read.
    """
    rows = []
    for job, run in finished:
        evaluation, held = Evaluation.read(run.evaluation_json), generalization([run.path]).iloc[0]
        plan = evaluation.variants["plan"]
        against = plan.get("vs_random", {})
        kl = against.get("kl", {})
        row = {
            **{name: evaluation.plan[name] for name in ("score", "direction", "rule")},
            **{name: held[name] for name in ("model", "windows", "text")},
            "job": job.name,
            "value": job.parameters.get("value"),
            "seed": evaluation.settings["seed"],
            "bytes": plan["bytes"],
            "matrix_bits": held["matrix bits"],
            "verdict": held["random"],
            "kl_plan": held["KL plan"],
            "kl_random": held["KL random"],
            "ratio": held["KL plan"] / held["KL random"],
            "kl_difference": kl.get("mean"),
            "kl_low": kl.get("low"),
            "kl_high": kl.get("high"),
            "p_holm": kl.get("p_holm"),
            "beaten": against.get("kl_beats"),
            "controls": against.get("controls", 0),
            "loss_difference": held["Δ loss"],
            "loss_low": held["Δ low"],
            "loss_high": held["Δ high"],
            **{f"kl_{key}": held[f"KL {key}"] for key in ("fisher", "fisher_int8", "int8")},
        }
        rows.append(row)
    table = pd.DataFrame(rows, columns=list(COLUMNS))
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
        if some.empty:
            continue
        middle = some["kl_difference"].astype(float)
        ends = [some[end].astype(float).fillna(middle) for end in ("kl_low", "kl_high")]
        axes.errorbar(
            middle, some.index, xerr=[middle - ends[0], ends[1] - middle], fmt=marker, color=colour,
            capsize=3, label=words,
        )  # fmt: skip
    axes.set_yticks(rows.index, [figures.shorten(job, 56) for job in rows["job"]])
    axes.invert_yaxis()
    axes.set_xlabel("KL of the plan − KL of random layers at equal bytes (nats a token)")
    if len(rows):
        axes.legend(loc="best")
    said = [*sentences(table), "no run is finished"]
    detail = "Bars: 95 % interval over windows. Left of the line the score's layers are better."
    figures.headline(figure, said[0], detail)
    return figure
