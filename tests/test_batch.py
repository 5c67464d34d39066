"""Grids, their processes, and the table over all runs; the processes are stand-ins but for the last test."""

import fcntl
import json
import os
import re
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
from spi_utils.plan import ProtectionPlan
from spi_utils.runs import Run, open_run, run_info
from tests.test_report import make_evaluation
from tests.tiny import make_tiny

ROOT = Path(__file__).resolve().parent.parent
# A notebook's stand-in: notes that it ran and where, and leaves what the notebooks would.
STUB = """
import json, os, pathlib, subprocess, sys, time
folder, kind, run, model, score = pathlib.Path(sys.argv[1]), *sys.argv[2:6]
run, started = pathlib.Path(run), time.time()
behaviour = json.loads((folder / "behaviour.json").read_text()).get(score if kind == "plan" else model, "")
if behaviour == "raise":
    sys.exit("a line before\\nNotebookError: 04_evaluate failed: no such text\\nThe copy: x")
if behaviour == "exit":
    print("only this"); sys.exit(7)
if behaviour == "die":
    os.kill(os.getpid(), 9)
if behaviour == "hang":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], start_new_session=True)
    (folder / f"pids-{score}").write_text(f"{os.getpid()} {child.pid}"); time.sleep(120)
time.sleep(float(behaviour or 0))
run.mkdir(parents=True, exist_ok=True)
if kind == "analyze":
    for name in ("layers.csv", "spectra.safetensors"):
        (run / name).write_text(f"{name} of {model}")
    info = {"schema": 1, "model": {"id": model, "sha256": (model * 64)[:64]}}
    info["stages"] = {"analyze": {}, "spectra": {}}
    (run / "run.json").write_text(json.dumps(info))
else:
    (run / "evaluation.json").write_bytes((folder / "evaluation.json").read_bytes())
shown = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
with open(folder / "ran.txt", "a") as file:
    file.write(json.dumps({"kind": kind, "run": run.name, "span": [started, time.time()], **shown}) + "\\n")
"""


def stub_arguments(folder):
    """What replaces `batch.arguments_of`: the stand-in, told what the notebooks would be told."""

    def arguments(stages, parameters):
        kind = "analyze" if list(stages) == ["01_analyze"] else "plan"
        told = (parameters["run_dir"], parameters["model"], parameters.get("score", "none"))
        return ("-c", STUB, str(folder), kind, *told)

    return arguments


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """A folder with the stand-in's behaviour and a grid of four jobs; `run` runs the batch."""

    class Stubs:
        folder, out = tmp_path, tmp_path / "out"

        def behave(self, **behaviour):
            (tmp_path / "behaviour.json").write_text(json.dumps(behaviour))

        def write(self, **changes):
            grid = {"models": ["a/one", "b/two"], "scores": ["alpha_hill", "fisher"]}
            grid |= {"parameters": {"device": "cpu"}} | changes
            (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))

        def run(self, **options):
            return batch.run_batch(tmp_path / "grid.yaml", self.out, **options)

        def ran(self, kind="plan"):
            file = tmp_path / "ran.txt"
            lines = map(json.loads, file.read_text().splitlines() if file.exists() else [])
            return [one for one in lines if one["kind"] == kind]

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
            "budgets": ["claim", {"matrix_bits": "5.65"}],
            "seeds": [3, 4],
            "axes": {"double_quant": ["no", "yes"]},
            "parameters": {"windows": "12"},
        }
    )
    assert len(jobs) == len({job.name for job in jobs}) == 2**5
    # what any job may use: double quantization has costs of its own
    shared = {"rounding": "guided", "seed": 3, "cost_formats": ["nf4", "int8", "nf4_dq"]}
    assert sorted(analyses.values(), key=str) == [
        {"model": "a/one", **shared},
        {"model": "b/two", "revision": "v2", **shared},
    ]
    last = jobs[-1]
    name = "two.alpha-hill-low.matrix-bits-5.65.seed-4.double-quant-true.revision-v2."
    assert last.name.startswith(name)
    assert analyses[last.analysis]["revision"] == "v2"
    chosen = {"model": "b/two", "revision": "v2", "score": "alpha_hill", "direction": "low", "seed": 4}
    chosen |= {"rule": "matrix_bits", "value": 5.65, "double_quant": True, "windows": 12}
    assert last.parameters == chosen | {"cost_formats": shared["cost_formats"]}


def test_what_is_left_out_keeps_its_default_and_equal_names_get_folders_of_their_own(tmp_path):
    (job,), _ = expand({"models": "bundled"})
    assert job.name.startswith("bundled.alpha-hill.claim.seed-0.") and job.parameters == {
        "model": "bundled",
        "cost_formats": ["nf4", "int8"],
    }
    names = [job.name for job in expand({"models": ["a/same", "b/same"]})[0]]
    assert len(set(names)) == 2 and all(name.startswith("same.alpha-hill.claim.seed-0.") for name in names)
    assert len(read_grid(ROOT / "examples" / "grid.yaml")[0]) >= 4
    (tmp_path / "model.safetensors").write_bytes(b"first")
    before = expand({"models": [str(tmp_path)]})[1]
    (tmp_path / "model.safetensors").write_bytes(b"trained on")
    assert expand({"models": [str(tmp_path)]})[1].keys() != before.keys()


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ("model: [x]", "unknown key 'model'. Did you mean 'models'"),
        ("scores: [fisher]", "no models"),
        ("models: []", "no models"),
        ("{models: [x], scores: []}", "scores: an empty list"),
        ("{models: [x], axes: {double_qant: [true]}}", "'double_qant'. Did you mean 'double_quant'"),
        ("{models: [x], parameters: [3]}", "expected names with values"),
        ("{models: [x], parameters: {double_quant: maybe}}", "True or False"),
        ("{models: [x], parameters: {windows: abc}}", "a whole number"),
        ("{models: [x], scores: [alpha_hil]}", "score='alpha_hil': .* Did you mean 'alpha_hill'"),
        ("{models: [x], scores: [{score: fisher, direction: up}]}", "direction='up': expected"),
        ("{models: [x], budgets: [matrix_bits]}", "'matrix_bits' needs a value"),
        ("{models: [x], budgets: [{a: 1, b: 2}]}", "expected a rule, or {rule: value}"),
        ("{models: [x], seeds: [1, 1]}", "stands twice"),
        ("{models: [x], seeds: [1], parameters: {seed: 2}}", "'seed' is set twice"),
        ("{models: [x], parameters: {run_dir: y}}", "'run_dir' can't be set for a batch"),
        ("{models: [x], parameters: {dry_run: false}}", "05_publish"),
        ("models: [[7]]", "model="),
        ("[x]", "expected names with values"),
        ("models: [", "can't be read"),
        (None, "can't be read.*examples/grid.yaml"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(grid, said, tmp_path):
    file = tmp_path / "grid.yaml"
    if grid is not None:
        file.write_text(grid)
    with pytest.raises(SPIError, match=f"(?s){said}") as refused:
        read_grid(file)
    assert "grid.yaml" in str(refused.value)


# --- running ---------------------------------------------------------------------------------------------


def most_at_once(ran):
    moments = sorted([(one["span"][0], 1) for one in ran] + [(one["span"][1], -1) for one in ran])
    return int(np.cumsum([change for _, change in moments]).max())


def test_each_model_is_analysed_once_and_jobs_run_side_by_side(stubs, capsys, monkeypatch):
    monkeypatch.setattr(batch, "cores", lambda: 6)
    stubs.behave(alpha_hill="0.5", fisher="0.5")
    assert stubs.run(workers=2) == 0
    said, ran = capsys.readouterr().out, stubs.ran()
    assert len(stubs.ran("analyze")) == 2 and len(ran) == 4 and most_at_once(ran) == 2
    assert {one["OMP_NUM_THREADS"] for one in ran} == {"3"}
    for job in read_grid(stubs.folder / "grid.yaml")[0]:
        assert said.count(f"  {job.name}") == 1
        ours, shared = stubs.out / "runs" / job.name, stubs.out / "analyses" / job.analysis
        for name in ("layers.csv", "spectra.safetensors"):
            assert (ours / name).samefile(shared / name)
        assert run_info(Run(ours))["model"] == run_info(Run(shared))["model"]
        assert json.loads((stubs.out / "jobs" / f"{job.name}.json").read_text())["status"] == "done"
    assert len(pd.read_csv(stubs.out / "leaderboard.csv")) == 4
    assert {"leaderboard.png", "leaderboard.svg"} == {p.name for p in (stubs.out / "figures").iterdir()}


def test_failures_are_isolated_and_listed_with_their_own_error(stubs, capsys):
    stubs.write(scores=["alpha_hill", "fisher", "random", "alpha_pl"])
    stubs.behave(fisher="raise", random="exit", alpha_pl="die", **{"b/two": "raise"})
    assert stubs.run(workers=2) == 1
    listed = capsys.readouterr().out.split("8 of 10 failed")[1]
    for job, said in (
        ("one.fisher", "(exit code 1): NotebookError: 04_evaluate failed: no such text\n"),
        ("one.random", "(exit code 7): only this"),
        ("one.alpha-pl", "(exit code -9): killed by SIGKILL (out of memory?)"),
        *((f"two.{score}", "its analysis failed: NotebookError") for score in ("fisher", "random")),
    ):
        assert re.search(rf"{job}\.claim\.seed-0\.\w+ .*{re.escape(said)}", listed, re.DOTALL)
    assert len(pd.read_csv(stubs.out / "leaderboard.csv")) == 1
    stubs.behave()
    assert stubs.run(workers=2) == 0


def test_a_gpu_has_one_job_at_a_time(stubs, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    stubs.write(parameters={})
    stubs.behave(alpha_hill="0.3", fisher="0.3")
    stubs.run(workers=4)
    by_gpu = [[one for one in stubs.ran() if one["CUDA_VISIBLE_DEVICES"] == gpu] for gpu in "47"]
    assert [most_at_once(jobs) for jobs in by_gpu] == [1, 1] and sum(map(len, by_gpu)) == 4
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert batch.visible_gpus() == []


@pytest.mark.slow
def test_a_dask_cluster_runs_the_jobs_one_a_declared_gpu(stubs, capsys):
    distributed = pytest.importorskip("distributed")
    stubs.write(models=["a/one"], scores=["alpha_hill", "fisher", "random"], parameters={})
    stubs.behave(fisher="raise", alpha_hill="0.3", random="0.3")
    where = {"n_workers": 1, "threads_per_worker": 2, "dashboard_address": None, "resources": {"GPU": 1}}
    with distributed.LocalCluster(**where) as cluster:
        assert stubs.run(scheduler=cluster.scheduler_address) == 1
    assert "1 of 4 failed" in (said := capsys.readouterr().out) and "no such text" in said
    assert len(stubs.ran()) == 2 and most_at_once(stubs.ran()) == 1


def test_a_wrong_call_is_refused(stubs):
    for options in ({"workers": 2, "scheduler": "tcp://127.0.0.1:1"}, {"workers": 0}):
        with pytest.raises(BatchError, match="--workers must be 1 or more"):
            stubs.run(**options)
    stubs.out.mkdir()
    with open(stubs.out / runs.OWNER, "w") as another, pytest.raises(RunError, match="in use by"):
        fcntl.flock(another, fcntl.LOCK_EX)
        stubs.run()
    assert stubs.ran() == []


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "cluster"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_ctrl_c_and_a_termination_end_the_jobs_and_the_same_command_goes_on(stubs, kind, cluster):
    """The batch in a process of its own, interrupted once a job hangs that has a child of its own."""
    stubs.write(models=["a/one"])
    stubs.behave(alpha_hill="hang", fisher="hang")
    if cluster:
        distributed = pytest.importorskip("distributed")
        cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    how = ["--scheduler", cluster.scheduler_address] if cluster else ["--workers", "2"]
    code = (
        "import sys; from spi_utils import batch, __main__; from tests.test_batch import stub_arguments\n"
        "batch.arguments_of = stub_arguments(sys.argv[1]); sys.exit(__main__.main(sys.argv[2:]))"
    )
    call = ["batch", str(stubs.folder / "grid.yaml"), "--out", str(stubs.out), *how]
    here = {
        "cwd": ROOT,
        "stderr": subprocess.PIPE,
        "text": True,
        "env": {**os.environ, "PYTHONPATH": str(ROOT)},
    }
    process = subprocess.Popen([sys.executable, "-c", code, str(stubs.folder), *call], **here)
    file, until = stubs.folder / "pids-alpha_hill", time.monotonic() + 150
    while not (file.exists() and file.read_text()):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    pids = list(map(int, file.read_text().split()))
    process.send_signal(kind)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "goes on where it stopped" in said
    until = time.monotonic() + 10  # a cluster's workers look now and then
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(alive, pids))
    if cluster:
        cluster.close()
    stubs.behave()
    assert stubs.run() == 0 and len(stubs.ran()) == 2


def alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"


def test_a_new_analysis_replaces_the_old_one_and_keeps_the_runs_other_stages(stubs):
    stubs.write(models=["a/one"], scores=["fisher"])
    stubs.run()
    (analysis,), (ours,) = ((stubs.out / name).iterdir() for name in ("analyses", "runs"))
    runs.update_info(Run(ours), lambda info: info["stages"].update(evaluate={"outputs": {}}))
    runs.write_text(analysis / "layers.csv", "a new table")
    batch.share_analysis(Run(analysis), Run(ours))
    assert (ours / "layers.csv").read_text() == "a new table"
    assert set(run_info(Run(ours))["stages"]) == {"spectra", "analyze", "evaluate"}
    other = open_run(stubs.folder / "other", {"id": "b/two", "sha256": "b" * 64})
    with pytest.raises(RunError, match=r"other holds a run of b/two .* not of a/one"):
        batch.share_analysis(Run(analysis), other)


# --- the leaderboard -------------------------------------------------------------------------------------


def finished(folder, evaluation, **parameters):
    run = open_run(folder, evaluation.model)
    evaluation.write(run.evaluation_json)
    return Job(folder.name, {"model": "x", **parameters}, "a"), run


def test_the_leaderboards_numbers(tmp_path):
    evaluation = make_evaluation()
    row = batch.leaderboard([finished(tmp_path / "job", evaluation, value=5.65)]).iloc[0]
    plan = np.array(evaluation.variants["plan"]["window_kl"])
    drawn = np.array([evaluation.variants[f"random_{seed}"]["window_kl"] for seed in range(5)])
    assert row["kl_plan"] == pytest.approx(plan.mean(), abs=1e-7)
    assert row["kl_random"] == pytest.approx(drawn.mean(), abs=1e-7)
    assert row["kl_difference"] == pytest.approx(plan.mean() - drawn.mean(), abs=1e-7)
    assert row["ratio"] == pytest.approx(plan.mean() / drawn.mean(), abs=1e-6)
    assert row["beaten"] == sum(one.mean() > plan.mean() for one in drawn) and row["controls"] == 5
    assert row["kl_low"] < row["kl_difference"] < row["kl_high"] < 0
    assert (row["verdict"], row["rule"], row["value"], row["seed"]) == ("supported", "claim", 5.65, 0)
    assert row["bytes"] == 205e6 and row["windows"] == 24


def test_in_how_many_runs_is_counted_from_the_intervals(tmp_path):
    better = {"mean": -0.03, "low": -0.04, "high": -0.02, "p": 1e-4, "p_holm": 1e-3}
    worse = {"mean": 0.05, "low": 0.03, "high": 0.07, "p": 1e-4, "p_holm": 1e-3}
    open_end = {"mean": -0.01, "low": None, "high": 0.01, "p": 0.4, "p_holm": 0.4}
    jobs = []
    for i, (name, kl) in enumerate(zip("aabbc", (better, better, better, open_end, worse), strict=True)):
        made = make_evaluation(model={"id": name, "kind": "hub", "revision": None, "sha256": "5" * 64})
        made.variants["plan"]["vs_random"]["kl"].update(kl)
        jobs.append(finished(tmp_path / str(i), made))
    table = batch.leaderboard(jobs)
    assert list(table["verdict"]) == ["supported"] * 3 + ["not separable", "refuted"]
    (said,) = batch.sentences(table)
    assert "random layers of the same size in 3 of 5 runs, worse in 1" in said
    labels = [text.get_text() for text in batch.draw(table).axes[0].get_legend().get_texts()]
    assert set(labels) == {"beats random", "worse than random", "not separable"}


def test_a_run_without_random_controls(tmp_path):
    evaluation = make_evaluation()
    for seed in range(5):
        del evaluation.variants[f"random_{seed}"]
    del evaluation.variants["plan"]["vs_random"]
    table = batch.leaderboard([finished(tmp_path / "job", evaluation)])
    assert table["verdict"][0] == "not tested" and np.isnan(table["kl_random"][0])
    assert "in 0 of 0 runs" in batch.sentences(table)[0]
    batch.draw(table)


# --- the real thing --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_batch_of_a_tiny_model_with_mixed_formats_end_to_end(tmp_path, capsys, monkeypatch):
    """int4, int8 and 16-bit in one file: planned by Fisher, merged layers together, judged from the file."""
    monkeypatch.setattr(batch, "cores", lambda: 1)  # threads that wait for one another
    model = make_tiny("llama", tmp_path / "m", num_hidden_layers=2)
    small = {"sensitivity_windows": 2, "sensitivity_length": 16, "texts": "pydoc", "windows": 2, "length": 16}
    small |= {"backend": "compressed-tensors", "random_seeds": 1, "sensitivity": "random"}
    grid = {"models": [str(model)], "scores": ["fisher"], "budgets": [{"matrix_bits": 6.5}]}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({**grid, "parameters": small}))
    call = ["batch", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "out")]
    assert main(call) == 0, capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out" / "leaderboard.csv")
    assert list(table["score"]) == ["fisher"] and table["kl_random"].notna().all()
    ((folder,), (analysis,)) = ((tmp_path / "out" / name).iterdir() for name in ("runs", "analyses"))
    run, plan = Run(folder), ProtectionPlan.read(folder / "plan.json")
    assert plan.options["group"] == "fused" and {"int4_g64", "int8"} <= set(plan.formats.values())
    evaluation = json.loads(run.evaluation_json.read_text())
    assert evaluation["checkpoint"]["int4_g64"] == plan.count("int4_g64")
    assert {"int8", "nf4", "fisher", "random_0"} <= set(evaluation["variants"])
    assert "compressed-tensors" in (run.publish / "README.md").read_text()
    assert run.layers_csv.samefile(analysis / "layers.csv")
    assert main(call) == 0
    log = (tmp_path / "out" / "jobs" / f"{folder.name}.log").read_text()
    assert log.count("already done") == 4
