"""The KL of the model as stock transformers load it, against a computation of its own; and the gate on it."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from spi_utils import runs
from spi_utils.claims import Evaluation, stock_sentence
from spi_utils.errors import EvaluationError
from spi_utils.evaluate import evaluate
from spi_utils.plan import ProtectionPlan
from spi_utils.quantize import quantize
from spi_utils.texts import load_text, make_windows
from tests.evaluated_run import ready_run
from tests.test_quantize import here  # noqa: F401
from tests.tiny import make_tiny, make_tokenizer

QUICK = {"windows": 12, "length": 40, "texts": "pydoc", "controls": [], "random_seeds": 0, "device": "cpu"}
START = 257


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An evaluated run of a model with a head that says something, so that a change of arithmetic shows, and
    biases on q, k and v: loaded in another dtype than the file's, their products fail."""
    folder = tmp_path_factory.mktemp("stock")
    config = {"model_type": "qwen2", "bos_token_id": None, "tie_word_embeddings": True, "head_dim": 32}
    config |= {"num_hidden_layers": 2}
    run, source = ready_run(
        make_tiny("llama", folder / "m", initializer_range=0.15, **config), folder / "run"
    )
    unproven = evaluate(run, source, speed_repeats=0, **QUICK).stock
    shutil.rmtree(run.model_dir)
    quantize(run, source, ProtectionPlan.read(run.plan_json), device="cpu")
    return run, source, unproven, evaluate(run, source, speed_repeats=1, **QUICK).stock


def divergence(model, reference, windows):
    """Mean KL over all predicted positions, in float64."""
    with torch.inference_mode():
        p, q = (torch.log_softmax(one(windows).logits[:, :-1].double(), -1) for one in (reference, model))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.slow
def test_the_stock_numbers_are_those_of_the_loaded_model(made):
    run, source, unproven, stock = made
    assert unproven["agrees"] is None and "03_quantize" in unproven["reason"]
    assert "was not scored" in stock_sentence(unproven)
    load = AutoModelForCausalLM.from_pretrained
    reference, half = (load(source.directory, dtype=dtype) for dtype in ("float32", "float16"))
    windows = make_windows(load_text("pydoc"), make_tokenizer(), 12, 40, START, config=reference.config)[:4]
    loaded = load(run.model_dir)
    assert stock["kl"] == pytest.approx(divergence(loaded, reference, windows), rel=0.02, abs=1e-6)
    assert stock["kl_16bit"] == pytest.approx(divergence(half, reference, windows), rel=0.05, abs=1e-6)
    assert abs(stock["kl_file"] - stock["kl"]) <= stock["tolerance"] == max(0.005, 2 * stock["kl_16bit"])
    assert (stock["agrees"], stock["windows"], stock["length"], stock["dtype"]) == (True, 4, 40, "float16")
    assert Evaluation.read(run.evaluation_json).stock == stock
    assert f"{stock['kl']:.4f}" in stock_sentence(stock)
    speed = runs.run_info(run)["stages"]["evaluate"]["speed"]  # in the dtype that it ships with
    assert {one["dtype"] for one in speed.values()} == {"float16"}
    assert all(one["decode"][0] > 0 for one in speed.values())


@pytest.mark.slow
def test_a_file_whose_configuration_computes_another_model_is_refused(made, tmp_path):
    """Its tensors are right, so the float32 numbers are too; what users would load is another model."""
    run, source = runs.Run(shutil.copytree(made[0].path, tmp_path / "run")), made[1]
    run.evaluation_json.unlink()
    path = run.model_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1.0}))
    entry = {"sha256": runs.sha256_file(path), "bytes": path.stat().st_size}
    outputs = {"model/config.json": entry}  # as if it had been written so
    runs.update_info(run, lambda info: info["stages"]["quantize"]["outputs"].update(outputs))
    with pytest.raises(EvaluationError, match=r"Loaded by stock transformers in float16.*isn't what users"):
        evaluate(run, source, speed_repeats=0, **QUICK)
    assert not run.evaluation_json.exists()
