"""Beside the rivals: what they leave is checked, what fails is listed, what is done is kept."""

import json
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import rivals
from spi_utils.models import open_weights, resolve
from tests.tiny import make_tiny

WORKER = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file, save_file
job = json.loads(Path(sys.argv[1]).read_text())
held = load_file(Path(job["model"]) / "model.safetensors")
values = {f"{n}.weight": held[f"{n}.weight"] * (1 + job["settings"]["off"]) for n in job["layers"]}
if job["settings"].get("fails"):
    raise SystemExit("no kernel for this machine")
out = Path(job["out"])
save_file(values, out / "weights.safetensors")
bits = 4.5 * sum(value.numel() for value in values.values())
(out / "worker.json").write_text(json.dumps({"version": "toy 1", "bits": bits}))
(Path(job["out"]).parents[1] / "calls.txt").open("a").write(Path(job["out"]).name + "\\n")
"""


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rivals")
    make_tiny("llama", folder / "model")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 400, encoding="utf-8")
    given = {"model": str(folder / "model"), "text": str(folder / "text.txt"), "real": "pydoc", "windows": 3}
    given |= {"length": 32, "own": 2, "only": "", "checkpoint": [], "folder": folder / "out", "envs": folder}
    return Namespace(**given, base=None, pip_args="", minutes=1, threads=1)


@pytest.fixture(scope="module")
def judge(args):
    return rivals.Judge(args)


@pytest.fixture
def toys(monkeypatch, tmp_path, args):
    (tmp_path / "toy.py").write_text(WORKER, encoding="utf-8")
    monkeypatch.setattr(rivals, "WORKERS", tmp_path)
    monkeypatch.setitem(rivals.ENVIRONMENTS, "broken", (("no-such-package-of-spi-utils==9",),))
    rows = [
        rivals.Rival("exact", "exact", "main", "toy", {"off": 0.0}),
        rivals.Rival("off", "a little off", "main", "toy", {"off": 0.1}),
        rivals.Rival("fails", "fails", "main", "toy", {"off": 0.0, "fails": True}),
        rivals.Rival("broken", "no environment", "broken", "toy", {"off": 0.0}),
        rivals.Rival("needs", "needs another", "main", "toy", {"off": 0.0}, "", "fails"),
    ]
    monkeypatch.setattr(rivals, "table", lambda: iter(rows))
    args.folder, args.pip_args = tmp_path / "out", "--no-index"
    return tmp_path


def test_a_failure_is_listed_and_a_killed_run_goes_on(toys, args):
    args.only = "exact"
    rivals.benchmark(args)
    args.only, args.checkpoint = "", [str(toys / "nothing-here")]
    found = {row["key"]: row for row in rivals.benchmark(args)["rows"]}
    args.checkpoint = []
    assert found["exact"]["kl"] < 1e-5 < found["off"]["kl"]
    assert found["exact"]["matrix_bits"] == pytest.approx(4.5)
    assert "no kernel" in found["fails"]["error"] and "environment" in found["broken"]["error"]
    assert "fails is missing" in found["needs"]["error"]
    assert "nothing-here" in found[str(toys / "nothing-here")]["error"]
    calls = next((toys / "out").glob("*/calls.txt")).read_text(encoding="utf-8").split()
    assert calls == ["exact", "off"]  # the finished one once, in two runs


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.pop(next(iter(v))), "no weights of"),
        (lambda v: v.update({"model.embed_tokens.weight": torch.zeros(999, 128)}), "another vocabulary"),
        (lambda v: v.update({"model.norms.weight": torch.zeros(2)}), "no parameter"),
        (lambda v: next(iter(v.values())).fill_(torch.nan), "no numbers"),
    ],
)
def test_weights_of_another_model_are_refused(judge, tmp_path, change, words):
    with open_weights(resolve(judge.args.model)) as weights:
        values = {f"{name}.weight": weights.read(f"{name}.weight") for name in judge.layers}
    change(values)
    save_file(values, tmp_path / "weights.safetensors")
    with pytest.raises(rivals.RivalError, match=words):
        judge.score(tmp_path)
    kl = rivals.token_scores(judge.model, judge.windows, judge.reference).kl
    assert kl.max() < 1e-6  # whatever was put in is out again


def test_a_checkpoint_of_another_vocabulary_is_refused(judge, tmp_path):
    make_tiny("llama", tmp_path, vocab_size=384)
    with pytest.raises(rivals.EvaluationError, match="vocabulary of 384"):
        judge.checkpoint(str(tmp_path))


def test_a_checkpoint_in_an_unknown_format_is_named(judge, tmp_path):
    make_tiny("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "ultracompress"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(rivals.EvaluationError, match="ultracompress"):
        judge.checkpoint(str(tmp_path))


def test_the_evaluations_own_text_is_no_calibration(args):
    with pytest.raises(rivals.EvaluationError, match="evaluation"):
        rivals.Judge(Namespace(**vars(args) | {"real": args.text}))


def test_every_row_has_its_worker_and_a_name_of_its_own():
    rows = list(rivals.table())
    keys = [row.key for row in rows]
    assert len(set(keys)) == len(keys)
    for place, row in enumerate(rows):
        assert (rivals.WORKERS / f"{row.worker}.py").is_file()
        assert row.env == "main" or row.env in rivals.ENVIRONMENTS
        assert not row.after or row.after in keys[:place]
    assert {key for _, *two in rivals.PAIRS for key in two} - {"awq_kind"} <= set(keys)


def test_a_worker_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)", encoding="utf-8")
    monkeypatch.setattr(rivals, "WORKERS", tmp_path)
    with pytest.raises(rivals.RivalError, match="minutes"):
        rivals.call(sys.executable, "slow", tmp_path / "job.json", tmp_path / "log", 0.2, 1)
    assert "slow.py" not in subprocess.run(["ps", "ax"], capture_output=True, text=True, check=True).stdout
