"""The KL of the model as stock transformers load it, against a computation of its own; and the gate on it."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from spi_utils import report, runs
from spi_utils.claims import Evaluation, stock_sentence
from spi_utils.errors import EvaluationError, RunError
from spi_utils.evaluate import evaluate
from spi_utils.plan import ProtectionPlan
from spi_utils.quantize import quantize
from spi_utils.texts import load_text, make_windows
from tests.evaluated_run import ready_run
from tests.tiny import make_tiny, make_tokenizer

QUICK = {"windows": 12, "length": 40, "texts": "pydoc", "controls": [], "random_seeds": 0, "device": "cpu"}
START = 257


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with a head that says something, so that a change of arithmetic shows."""
    return make_tiny("llama", tmp_path_factory.mktemp("stock") / "m", initializer_range=0.15)


@pytest.fixture
def made(model, tmp_path):
    run, source = ready_run(model, tmp_path / "run")
    for path in sorted(run.model_dir.glob("*")):
        path.unlink()
    quantize(run, source, ProtectionPlan.read(run.plan_json), device="cpu")
    return run, source


def divergence(model, reference, windows):
    """Mean KL over all predicted positions, in float64."""
    with torch.inference_mode():
        p, q = (torch.log_softmax(one(windows).logits[:, :-1].double(), -1) for one in (reference, model))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.slow
def test_the_stock_numbers_are_those_of_the_loaded_model(made):
    run, source = made
    stock = evaluate(run, source, speed_repeats=0, **QUICK).stock
    reference = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float32)
    windows = make_windows(load_text("pydoc"), make_tokenizer(), 12, 40, START, config=reference.config)[:4]
    loaded = AutoModelForCausalLM.from_pretrained(run.model_dir)
    half = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float16)
    assert stock["kl"] == pytest.approx(divergence(loaded, reference, windows), rel=0.02, abs=1e-6)
    assert stock["kl_16bit"] == pytest.approx(divergence(half, reference, windows), rel=0.05, abs=1e-6)
    assert abs(stock["kl_file"] - stock["kl"]) <= stock["tolerance"] == max(0.005, 2 * stock["kl_16bit"])
    assert (stock["agrees"], stock["windows"], stock["length"], stock["dtype"]) == (True, 4, 40, "float16")
    assert Evaluation.read(run.evaluation_json).stock == stock
    assert f"{stock['kl']:.4f}" in stock_sentence(stock)


@pytest.mark.slow
def test_a_file_whose_configuration_computes_another_model_is_refused(made):
    """Its tensors are right, so the float32 numbers are too; what users would load is another model."""
    run, source = made
    path = run.model_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1.0}))

    def as_if_written_so(info):
        info["stages"]["quantize"]["outputs"]["model/config.json"]["sha256"] = runs.sha256_file(path)

    runs.update_info(run, as_if_written_so)
    with pytest.raises(EvaluationError, match=r"Loaded by stock transformers in float16.*isn't what users"):
        evaluate(run, source, speed_repeats=0, **QUICK)
    assert not run.evaluation_json.exists()


def test_a_checkpoint_that_could_not_be_run_here_is_not_said_to_agree(model, tmp_path):
    run, source = ready_run(model, tmp_path / "run")
    stock = evaluate(run, source, speed_repeats=0, **QUICK).stock
    assert stock["agrees"] is None and "03_quantize" in stock["reason"]
    assert "was not scored" in stock_sentence(stock)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    model = make_tiny("llama", tmp_path_factory.mktemp("eval") / "m")
    run, source = ready_run(model, tmp_path_factory.mktemp("eval") / "run")
    evaluate(run, source, speed_repeats=0, **QUICK)
    return json.loads(run.evaluation_json.read_text())


@pytest.mark.parametrize("key", ["model", "plan", "variants", "other_texts", "checkpoint_sha256", "hashes"])
@pytest.mark.parametrize("value", [None, 5, "gone"])
def test_a_damaged_evaluation_is_named_with_the_notebook_that_makes_it_again(written, key, value, tmp_path):
    path = tmp_path / "evaluation.json"
    held = dict(written)
    if value == "gone":
        del held[key]
    else:
        held[key] = value
    path.write_text(json.dumps(held))
    with pytest.raises(RunError, match=rf"{key}.*04_evaluate again"):
        Evaluation.read(path)


def test_an_entry_that_is_unknown_is_named(written, tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(written | {"from_the_future": 1}))
    with pytest.raises(RunError, match="from_the_future"):
        Evaluation.read(path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16"])
def test_what_ships_is_timed_in_the_dtype_that_it_ships_with(dtype, tmp_path):
    """Biases on q, k and v: loaded in another dtype than the file's, their products fail."""
    config = {"model_type": "qwen2", "bos_token_id": None, "tie_word_embeddings": True, "head_dim": 32}
    directory = make_tiny("llama", tmp_path / "m", dtype=dtype, **config)
    run, source = ready_run(directory, tmp_path / "run")
    for path in sorted(run.model_dir.glob("*")):
        path.unlink()
    quantize(run, source, ProtectionPlan.read(run.plan_json), device="cpu")
    weights = AutoModelForCausalLM.from_pretrained(run.model_dir).state_dict()
    assert weights["model.layers.0.self_attn.q_proj.bias"].dtype == getattr(torch, dtype)
    evaluate(run, source, speed_repeats=1, **QUICK)
    speed = runs.run_info(run)["stages"]["evaluate"]["speed"]
    assert {one["dtype"] for one in speed.values()} == {dtype}
    assert all(one["decode"][0] > 0 for one in speed.values())


def test_the_report_shows_the_answer_that_proved_the_checkpoint():
    said = {"prompt": "Why <b>?", "chat_template": True, "text": "It is 1 < 2 & so.", "tokens": 9}
    html = report._pieces().answer({"generation": said, "dtype": "bfloat16"})
    assert "It is 1 &lt; 2 &amp; so." in html and "Why &lt;b&gt;?" in html and "bfloat16" in html
