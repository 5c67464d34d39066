"""Grids, their processes, and the table over all runs; the processes are stand-ins but for the last test."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import yaml

from spi_utils import batch, runs
from spi_utils.__main__ import main
from spi_utils.batch import Job, expand, read_grid
from spi_utils.errors import BatchError, RunError, SPIError
from spi_utils.notebook import from_command_line
from spi_utils.runs import Run, open_run, run_info, write_text
from tests.test_report import make_evaluation

ROOT = Path(__file__).resolve().parent.parent
# A notebook's stand-in: notes that it ran and where, and leaves what the notebooks would.
STUB = """
import hashlib, json, os, pathlib, sys, time
folder, kind, run, model, score = pathlib.Path(sys.argv[1]), *sys.argv[2:6]
run = pathlib.Path(run)
shown = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
started = time.time()
behaviour = json.loads((folder / "behaviour.json").read_text()).get(f"{kind} {score}", "")
if behaviour == "raise":
    print("a line before", file=sys.stderr)
    print("NotebookError: 04_evaluate failed: EvaluationError: no such text\\nThe copy: x", file=sys.stderr)
    sys.exit(1)
if behaviour == "exit":
    print("only this"); sys.exit(7)
if behaviour == "die":
    os.kill(os.getpid(), 9)
if behaviour == "nothing":
    sys.exit(0)
if behaviour == "hang":
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], start_new_session=True)
    (folder / f"pids-{score}").write_text(f"{os.getpid()} {child.pid}"); time.sleep(120)
time.sleep(float(behaviour or 0))
run.mkdir(parents=True, exist_ok=True)
if kind == "analyze":
    stages = {}
    for stage, name in (("analyze", "layers.csv"), ("spectra", "spectra.safetensors")):
        (run / name).write_text(f"{name} of {model}")
        data = (run / name).read_bytes()
        held = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        stages[stage] = {"outputs": {name: held}}
    identity = {"id": model, "sha256": (model * 64)[:64]}
    info = {"schema": 1, "model": identity, "location": model, "stages": stages}
    (run / "run.json").write_text(json.dumps(info))
else:
    (run / "evaluation.json").write_bytes((folder / "evaluation.json").read_bytes())
with open(folder / "ran.txt", "a") as file:
    file.write(json.dumps({"kind": kind, "run": run.name, "span": [started, time.time()], **shown}) + "\\n")
"""
GRID = {
    "models": ["a/one", "b/two"],
    "scores": ["alpha_hill", "fisher"],
    "parameters": {"device": "cpu"},
}


def stub_arguments(folder):
    """What replaces `batch.arguments_of`: the stand-in, told what the notebooks would be told."""

    def arguments(stages, parameters):
        kind = "analyze" if list(stages) == ["01_analyze"] else "plan"
        told = (parameters["run_dir"], parameters["model"], parameters.get("score", "none"))
        return ("-c", STUB, str(folder), kind, *told)

    return arguments


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """A folder with the stand-in's behaviour and a grid of four jobs; calling it runs the batch."""

    class Stubs:
        folder, out = tmp_path, tmp_path / "out"

        def behave(self, **behaviour):
            text = json.dumps({key.replace("_", " ", 1): value for key, value in behaviour.items()})
            (tmp_path / "behaviour.json").write_text(text)

        def write(self, **changes):
            (tmp_path / "grid.yaml").write_text(yaml.safe_dump({**GRID, **changes}))

        def run(self, **options):
            return batch.run_batch(tmp_path / "grid.yaml", self.out, **options)

        def ran(self):
            file = tmp_path / "ran.txt"
            lines = file.read_text().splitlines() if file.exists() else []
            file.unlink(missing_ok=True)
            return [json.loads(line) for line in lines]

    made = Stubs()
    made.behave()
    made.write()
    make_evaluation().write(tmp_path / "evaluation.json")
    monkeypatch.setattr(batch, "arguments_of", stub_arguments(tmp_path))
    return made


# --- the grid --------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_and_a_model_has_one_analysis():
    jobs, analyses = expand(
        {
            "models": ["a/one", {"model": "b/two", "revision": "v2"}],
            "scores": ["fisher", {"score": "alpha_hill", "direction": "low"}],
            "budgets": ["claim", {"matrix_bits": 5.65}],
            "seeds": [3, 4],
            "axes": {"double_quant": [False, True]},
            "parameters": {"windows": 12, "sensitivity": "random"},
        }
    )
    assert len(jobs) == len({job.name for job in jobs}) == 2 * 2 * 2 * 2 * 2
    assert sorted(analyses.values(), key=str) == [
        {"model": "a/one", "sensitivity": "random", "seed": 3},
        {"model": "b/two", "revision": "v2", "sensitivity": "random", "seed": 3},
    ]
    assert jobs[0].name == "one.fisher.claim.seed-3.double-quant-false.revision"
    last = jobs[-1]
    assert last.name == "two.alpha-hill-low.matrix-bits-5.65.seed-4.double-quant-true.revision-v2"
    assert analyses[last.analysis]["revision"] == "v2"
    assert last.parameters == {
        **{"model": "b/two", "revision": "v2", "score": "alpha_hill", "direction": "low", "seed": 4},
        **{
            "rule": "matrix_bits",
            "value": 5.65,
            "double_quant": True,
            "windows": 12,
            "sensitivity": "random",
        },
    }


def test_what_is_left_out_keeps_the_notebooks_defaults():
    (job,), _ = expand({"models": "bundled"})
    assert job.name == "bundled.alpha-hill.claim.seed-0" and job.parameters == {"model": "bundled"}


def test_two_models_of_one_name_get_folders_of_their_own():
    names = [job.name for job in expand({"models": ["a/same", "b/same"]})[0]]
    assert len(set(names)) == 2 and all(name.startswith("same.alpha-hill.claim.seed-0.") for name in names)


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({"model": ["x"]}, "unknown key 'model'. Did you mean 'models'"),
        ({"scores": ["fisher"]}, "no models"),
        ({"models": []}, "no models"),
        ({"models": ["x"], "scores": []}, "scores: an empty list"),
        (
            {"models": ["x"], "axes": {"double_qant": [True]}},
            "no parameter 'double_qant'. Did you mean 'double_quant'",
        ),
        ({"models": ["x"], "parameters": {"windwos": 3}}, "Did you mean 'windows'"),
        ({"models": ["x"], "parameters": [3]}, r"parameters: expected names with values, found \['3'\]"),
        ({"models": ["x"], "scores": ["alpha_hil"]}, "score='alpha_hil': .* Did you mean 'alpha_hill'"),
        ({"models": ["x"], "scores": [{"score": "fisher", "direction": "up"}]}, "direction='up': expected"),
        ({"models": ["x"], "budgets": ["matrix_bits"]}, "'matrix_bits' needs a value"),
        ({"models": ["x"], "budgets": [{"a": 1, "b": 2}]}, "expected a rule, or {rule: value}"),
        ({"models": ["x"], "seeds": [1, 1]}, "stands twice"),
        ({"models": ["x"], "seeds": [1], "parameters": {"seed": 2}}, "'seed' is set twice"),
        ({"models": ["x"], "parameters": {"run_dir": "y"}}, "'run_dir' can't be set for a batch"),
        ({"models": ["x"], "parameters": {"dry_run": False}}, "05_publish"),
        ({"models": [[7]]}, "models: expected a name"),
        (["x"], "expected names with values"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(grid, said, tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(grid))
    with pytest.raises(SPIError, match=said) as refused:
        read_grid(file)
    assert "grid.yaml" in str(refused.value)


def test_a_file_that_is_no_grid(tmp_path):
    with pytest.raises(BatchError, match=r"can't be read .*examples/grid\.yaml"):
        read_grid(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("models: [")
    with pytest.raises(BatchError, match="not YAML"):
        read_grid(tmp_path / "bad.yaml")


def test_the_example_is_a_grid():
    jobs, analyses = read_grid(ROOT / "examples" / "grid.yaml")
    assert len(analyses) == 1 and len(jobs) >= 4


def test_parameters_survive_the_command_line():
    given = {
        "windows": 3,
        "value": 1e-05,
        "model": "null",
        "layers": "a: [b",
        "rivals": ["x", "y z"],
        "force": True,
    }
    arguments = batch.arguments_of(
        ["01_analyze", "02_visualize", "04_evaluate"], {**given, "group": None, "revision": ""}
    )
    stages = ("--only", "01_analyze", "--only", "02_visualize", "--only", "04_evaluate")
    assert arguments[:9] == ("-m", "spi_utils", "run", *stages)
    told = zip(arguments[10::3], arguments[11::3], strict=True)
    read = {name: from_command_line(name, text) for name, text in told}
    assert read == {**given, "group": None, "revision": ""}


# --- running ---------------------------------------------------------------------------------------------


def test_a_local_model_that_was_trained_on_is_analysed_again(stubs, capsys):
    model = stubs.folder / "mine"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"first")
    stubs.write(models=[str(model)], scores=["fisher"])
    assert stubs.run() == 0 and len(stubs.ran()) == 2
    assert stubs.run() == 0 and stubs.ran() == []
    (model / "model.safetensors").write_bytes(b"second, longer")
    capsys.readouterr()
    assert stubs.run() == 0
    assert stubs.ran()[0]["kind"] == "analyze"


def test_each_model_is_analysed_once_and_a_second_call_runs_nothing(stubs, capsys):
    assert stubs.run(workers=2) == 0
    ran = stubs.ran()
    assert [one["kind"] for one in ran].count("analyze") == 2 and len(ran) == 6
    said = capsys.readouterr().out
    for job in read_grid(stubs.folder / "grid.yaml")[0]:
        assert said.count(f"  {job.name}") == 1
        ours, shared = stubs.out / "runs" / job.name, stubs.out / "analyses" / job.analysis
        for name in ("layers.csv", "spectra.safetensors"):
            assert (ours / name).samefile(shared / name)
        assert run_info(Run(ours))["model"] == run_info(Run(shared))["model"]
    assert len(pd.read_csv(stubs.out / "leaderboard.csv")) == 4
    assert {"leaderboard.png", "leaderboard.svg"} == {p.name for p in (stubs.out / "figures").iterdir()}
    assert stubs.run() == 0 and stubs.ran() == []
    assert capsys.readouterr().out.count("already done") == 6


def test_only_what_changed_runs_again(stubs):
    stubs.run()
    stubs.ran()
    touched = stubs.out / "runs" / "one.fisher.claim.seed-0" / "evaluation.json"
    write_text(touched, "{}")
    assert stubs.run() == 0
    assert [one["run"] for one in stubs.ran()] == ["one.fisher.claim.seed-0"]
    stubs.write(scores=["alpha_hill", "fisher", "random"])
    stubs.run()
    assert sorted(one["run"] for one in stubs.ran()) == ["one.random.claim.seed-0", "two.random.claim.seed-0"]
    stubs.write(parameters={"device": "cpu", "windows": 20})
    stubs.run()
    assert [one["kind"] for one in stubs.ran()] == ["plan"] * 4


def test_failures_are_isolated_and_listed_with_their_own_error(stubs, capsys):
    stubs.write(models=["a/one"], scores=["alpha_hill", "fisher", "random", "alpha_pl", "swan"])
    stubs.behave(plan_fisher="raise", plan_random="exit", plan_alpha_pl="die", plan_swan="nothing")
    assert stubs.run() == 1
    said = capsys.readouterr().out
    listed = said.split("4 of 6 failed:")[1]
    log = stubs.out / "jobs" / "one.fisher.claim.seed-0.log"
    error = "NotebookError: 04_evaluate failed: EvaluationError: no such text"
    assert f"one.fisher.claim.seed-0 (exit code 1): {error}\n    log: {log}\n" in listed
    assert "one.random.claim.seed-0 (exit code 7): only this" in listed
    assert "(exit code -9): killed by SIGKILL, most likely out of memory" in listed
    assert "one.swan.claim.seed-0 (exit code 0): ended without making" in listed
    assert len(pd.read_csv(stubs.out / "leaderboard.csv")) == 1
    stubs.ran()
    stubs.behave()
    assert stubs.run() == 0 and len(stubs.ran()) == 4


def test_a_failed_analysis_fails_its_own_jobs_alone(stubs, capsys):
    stubs.write(models=["a/one", {"model": "b/two", "sensitivity": "none"}])
    stub = batch.arguments_of
    broken = ("-c", "raise ValueError('a broken shard')")
    batch.arguments_of = lambda stages, given: (
        broken if "sensitivity" in given and len(stages) == 1 else stub(stages, given)
    )
    assert stubs.run() == 1
    said = capsys.readouterr().out
    assert (
        said.count("its analysis failed: ValueError: a broken shard") == 4
    )  # two status lines, two in the list
    assert sorted(pd.read_csv(stubs.out / "leaderboard.csv")["job"]) == [
        "one.alpha-hill.claim.seed-0.sensitivity-self",
        "one.fisher.claim.seed-0.sensitivity-self",
    ]


def test_the_cores_are_divided_and_jobs_run_side_by_side(stubs, monkeypatch):
    monkeypatch.setattr(batch, "cores", lambda: 6)
    stubs.behave(plan_alpha_hill="1", plan_fisher="1")
    stubs.run(workers=2)
    ran = [one for one in stubs.ran() if one["kind"] == "plan"]
    assert {one["OMP_NUM_THREADS"] for one in ran} == {"3"}
    assert most_at_once(ran) == 2


def most_at_once(ran):
    moments = sorted([(one["span"][0], 1) for one in ran] + [(one["span"][1], -1) for one in ran])
    return int(np.cumsum([change for _, change in moments]).max())


def test_a_gpu_has_one_job_at_a_time(stubs, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    stubs.write(parameters={})
    stubs.behave(plan_alpha_hill="0.5", plan_fisher="0.5")
    stubs.run(workers=4)
    ran = [one for one in stubs.ran() if one["kind"] == "plan"]
    by_gpu = {gpu: [one for one in ran if one["CUDA_VISIBLE_DEVICES"] == gpu] for gpu in ("4", "7")}
    assert [most_at_once(jobs) for jobs in by_gpu.values()] == [1, 1]
    assert sum(map(len, by_gpu.values())) == 4


def test_without_workers_there_is_one_job_a_gpu(stubs, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    seen = []
    pool = batch.ThreadPoolExecutor
    monkeypatch.setattr(batch, "ThreadPoolExecutor", lambda count: seen.append(count) or pool(count))
    stubs.write(parameters={})
    stubs.run()
    stubs.write(parameters={"device": "cpu"})
    stubs.run()
    assert seen == [2, 2, 1, 1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert batch.visible_gpus() == []


@pytest.mark.slow
def test_a_dask_cluster_runs_the_jobs_given_its_address(stubs, capsys):
    distributed = pytest.importorskip("distributed")
    stubs.behave(plan_fisher="raise", plan_alpha_hill="0.3")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        assert stubs.run(scheduler=cluster.scheduler_address) == 1
        ran, said = stubs.ran(), capsys.readouterr().out
        assert [one["kind"] for one in ran] == ["analyze", "analyze", "plan", "plan"]
        assert "2 of 6 failed:" in said and "EvaluationError: no such text" in said
        stubs.behave()
        assert stubs.run(scheduler=cluster.scheduler_address) == 0
    assert len(stubs.ran()) == 2 and len(pd.read_csv(stubs.out / "leaderboard.csv")) == 4


@pytest.mark.slow
def test_workers_that_declare_a_gpu_take_one_job_at_a_time(stubs):
    distributed = pytest.importorskip("distributed")
    stubs.write(models=["a/one"], parameters={})
    stubs.behave(plan_alpha_hill="0.5", plan_fisher="0.5")
    where = {"n_workers": 1, "threads_per_worker": 2, "dashboard_address": None}
    with distributed.LocalCluster(**where, resources={"GPU": 1}) as cluster:
        assert stubs.run(scheduler=cluster.scheduler_address) == 0
        assert most_at_once([one for one in stubs.ran() if one["kind"] == "plan"]) == 1
        stubs.write(models=["a/one"], parameters={"device": "cpu"})
        stubs.behave(plan_alpha_hill="2", plan_fisher="2")
        assert stubs.run(scheduler=cluster.scheduler_address) == 0
    assert most_at_once([one for one in stubs.ran() if one["kind"] == "plan"]) == 2


def test_a_wrong_call_is_refused(stubs):
    with pytest.raises(BatchError, match="exclude each other"):
        stubs.run(workers=2, scheduler="tcp://127.0.0.1:1")
    with pytest.raises(BatchError, match="1 or more"):
        stubs.run(workers=0)
    (stubs.out / "jobs").mkdir(parents=True)
    with open(stubs.out / runs.OWNER, "w") as another, pytest.raises(RunError, match="in use by"):
        fcntl.flock(another, fcntl.LOCK_EX)
        stubs.run()
    assert stubs.ran() == []


# --- stopping and going on -------------------------------------------------------------------------------


def start(stubs, **options):
    """The batch in a process of its own."""
    code = (
        "import sys; from spi_utils import batch; from tests.test_batch import stub_arguments\n"
        "from pathlib import Path; folder = Path(sys.argv[1])\n"
        "batch.arguments_of = stub_arguments(folder)\n"
        f"sys.exit(batch.run_batch(folder / 'grid.yaml', folder / 'out', **{options}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(stubs.folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return process


def wait_for(file, process, seconds=60):
    until = time.monotonic() + seconds
    while not (file.exists() and file.read_text()):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    return [int(pid) for pid in file.read_text().split()]


def alive(pids):
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_the_jobs_and_the_same_command_goes_on(stubs, workers):
    stubs.write(models=["a/one"])
    stubs.behave(plan_alpha_hill="hang", plan_fisher="hang")
    process = start(stubs, workers=workers)
    assert_ctrl_c_ends(stubs, process)


@pytest.mark.slow
def test_ctrl_c_ends_the_jobs_on_a_cluster_too(stubs):
    distributed = pytest.importorskip("distributed")
    stubs.write(models=["a/one"])
    stubs.behave(plan_alpha_hill="hang", plan_fisher="hang")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        assert_ctrl_c_ends(stubs, start(stubs, scheduler=cluster.scheduler_address))


def assert_ctrl_c_ends(stubs, process):
    """Ctrl-C once a job hangs: the batch and its jobs end, and the same command goes on."""
    pids = wait_for(stubs.folder / "pids-alpha_hill", process)
    assert alive(pids) == pids
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == batch.INTERRUPTED and "goes on where it stopped" in said
    until = time.monotonic() + 10  # a cluster's workers look now and then
    while alive(pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert alive(pids) == []
    stubs.behave()
    stubs.ran()
    assert stubs.run() == 0 and [one["kind"] for one in stubs.ran()] == ["plan", "plan"]


# --- sharing ---------------------------------------------------------------------------------------------


def test_an_analysis_is_not_given_to_another_models_run(stubs):
    stubs.write(models=["a/one"], scores=["fisher"])
    stubs.run()
    (analysis,) = (stubs.out / "analyses").iterdir()
    other = open_run(stubs.folder / "other", {"id": "b/two", "sha256": "b" * 64})
    with pytest.raises(RunError, match=r"other holds a run of b/two .* not of a/one"):
        batch.share_analysis(Run(analysis), other)
    write_text(analysis / "layers.csv", "changed")
    with pytest.raises(RunError, match="its analyze is missing or was changed"):
        batch.share_analysis(Run(analysis), Run(stubs.folder / "new"))


def test_a_new_analysis_replaces_the_old_one_and_keeps_the_runs_other_stages(stubs):
    stubs.write(models=["a/one"], scores=["fisher"])
    stubs.run()
    (analysis,), (ours,) = ((stubs.out / name).iterdir() for name in ("analyses", "runs"))
    info = run_info(Run(ours))
    info["stages"]["evaluate"] = {"outputs": {}}
    write_text(ours / "run.json", json.dumps(info))
    info = run_info(Run(analysis))
    write_text(analysis / "layers.csv", "a new table")
    entry = {"bytes": 11, "sha256": batch.sha256_file(analysis / "layers.csv")}
    info["stages"]["analyze"]["outputs"]["layers.csv"] = entry
    write_text(analysis / "run.json", json.dumps(info))
    batch.share_analysis(Run(analysis), Run(ours))
    assert (ours / "layers.csv").read_text() == "a new table"
    assert set(run_info(Run(ours))["stages"]) == {"spectra", "analyze", "evaluate"}
    assert run_info(Run(ours))["stages"]["analyze"] == info["stages"]["analyze"]


# --- the leaderboard -------------------------------------------------------------------------------------


def finished(folder, evaluation, **parameters):
    run = open_run(folder, evaluation.model)
    evaluation.write(run.evaluation_json)
    return Job(folder.name, {"model": "x", **parameters}, "a"), run


def with_model(name, **verdict):
    """The drawn evaluation, of another model; `verdict` replaces its comparison with random layers."""
    made = make_evaluation(model={"id": name, "kind": "hub", "revision": None, "sha256": "5" * 64})
    made.variants["plan"]["vs_random"]["kl"].update(verdict)
    return made


def test_the_leaderboards_numbers(tmp_path):
    evaluation = make_evaluation()
    table = batch.leaderboard([finished(tmp_path / "job", evaluation, value=5.65)])
    row = table.iloc[0]
    plan = np.array(evaluation.variants["plan"]["window_kl"])
    drawn = np.array([evaluation.variants[f"random_{seed}"]["window_kl"] for seed in range(5)])
    assert row["kl_plan"] == pytest.approx(plan.mean(), abs=1e-7)
    assert row["kl_random"] == pytest.approx(drawn.mean(), abs=1e-7)
    assert row["kl_difference"] == pytest.approx(plan.mean() - drawn.mean(), abs=1e-7)
    assert row["ratio"] == pytest.approx(plan.mean() / drawn.mean(), abs=1e-6)
    assert row["beaten"] == sum(one.mean() > plan.mean() for one in drawn) and row["controls"] == 5
    # the interval is about ±2 standard errors of the paired differences
    paired = plan - drawn.mean(axis=0)
    half = 2.07 * paired.std(ddof=1) / np.sqrt(len(paired))
    assert row["kl_low"] == pytest.approx(paired.mean() - half, abs=0.3 * half)
    assert row["kl_high"] == pytest.approx(paired.mean() + half, abs=0.3 * half)
    assert (row["verdict"], row["rule"], row["value"], row["seed"]) == ("supported", "claim", 5.65, 0)
    assert row["bytes"] == 205e6 and row["windows"] == 24


def test_on_how_many_models_is_counted_from_the_intervals(tmp_path):
    better = {"mean": -0.03, "low": -0.04, "high": -0.02, "p": 1e-4, "p_holm": 1e-3}
    worse = {"mean": 0.05, "low": 0.03, "high": 0.07, "p": 1e-4, "p_holm": 1e-3}
    open_end = {"mean": -0.01, "low": None, "high": 0.01, "p": 0.4, "p_holm": 0.4}
    made = [("a", better), ("a", better), ("b", better), ("b", open_end), ("c", worse)]
    runs = [finished(tmp_path / f"{i}", with_model(name, **kl)) for i, (name, kl) in enumerate(made)]
    table = batch.leaderboard(runs)
    assert list(table["verdict"]) == ["supported", "supported", "supported", "not separable", "refuted"]
    (said,) = batch.sentences(table)
    assert said.startswith(
        "α Hill, high end, beats random layers of the same size on 1 of 3 models (3 of 5 runs; worse on 1)"
    )
    assert "from −0.0300 (−0.0400 … −0.0200) to +0.0500 (+0.0300 … +0.0700) nats a token" in said
    figure = batch.draw(table)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["beats random", "worse than random", "not separable"]


def test_runs_without_random_controls_and_no_runs_at_all(tmp_path):
    evaluation = make_evaluation()
    for seed in range(5):
        del evaluation.variants[f"random_{seed}"]
    del evaluation.variants["plan"]["vs_random"]
    table = batch.leaderboard([finished(tmp_path / "job", evaluation)])
    assert table["verdict"][0] == "not tested" and np.isnan(table["kl_random"][0])
    assert batch.sentences(table) == ["α Hill, high end, was not compared with random layers."]
    batch.draw(table)
    empty = batch.leaderboard([])
    assert list(empty.columns) == list(table.columns) and batch.sentences(empty) == []
    batch.draw(empty)


# --- the real thing --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_batch_of_a_tiny_model_end_to_end(tiny, tmp_path, capsys):
    grid = {
        "models": [str(tiny("llama"))],
        "scores": ["fisher"],
        "parameters": {
            **{"sensitivity_windows": 2, "sensitivity_length": 32, "texts": "pydoc"},
            **{"windows": 12, "length": 32, "random_seeds": 2},
        },
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    call = ["batch", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "out"), "--workers", "2"]
    code, said = main(call), capsys.readouterr().out
    assert code == 0, said
    table = pd.read_csv(tmp_path / "out" / "leaderboard.csv")
    assert list(table["score"]) == ["fisher"] and table["kl_difference"].notna().all()
    for run in (tmp_path / "out" / "runs").iterdir():
        assert (run / "model" / "config.json").exists() and (run / "publish" / "README.md").exists()
        analyzed = next((tmp_path / "out" / "analyses").iterdir())
        assert (run / "layers.csv").samefile(analyzed / "layers.csv")
        assert "analyze" in run_info(Run(run))["stages"]
    assert main(call) == 0
    assert capsys.readouterr().out.count("already done") == 2
