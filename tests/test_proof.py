"""A checkpoint is proven by use: text behind the start token, an answer to a prompt, the dtype that ships."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spi_utils import fresh_check
from spi_utils.checkpoint import put_saved
from spi_utils.errors import CheckpointError
from spi_utils.models import load_model, open_weights, resolve
from spi_utils.quantize import proof_of, quantize
from spi_utils.runs import open_run, run_info
from tests.test_compressed import mixed_plan
from tests.test_quantize import plan_for
from tests.tiny import make_tiny

pytestmark = pytest.mark.slow
START = 257  # <s> of the tiny tokenizer


def hot_behind_start(folder, *, factor=6e4):
    """A Llama in bfloat16 whose activations leave float16's range where the start token stands, and nowhere
    else: its embedding alone has the component that one neuron of an MLP multiplies."""
    directory = make_tiny("llama_untied", folder, dtype="bfloat16")
    tensors = load_file(directory / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    embedding[:, 0] = 0
    embedding[START] = 0
    embedding[START, 0] = 1
    for kind in ("gate_proj", "up_proj"):
        weight = tensors[f"model.layers.0.mlp.{kind}.weight"]
        weight[0] = 0
        weight[0, 0] = 16
    tensors["model.layers.0.self_attn.o_proj.weight"].zero_()
    tensors["model.layers.0.mlp.down_proj.weight"][:, 0] = 0
    tensors["model.layers.0.mlp.down_proj.weight"][5, 0] = factor
    tensors["lm_head.weight"][256:260] = 0  # so that an untrained model doesn't end its answer at once
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_the_old_probe_would_not_have_seen_it(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(hot_behind_start(tmp_path / "hot"), dtype=torch.float16)
    spread = torch.linspace(0, 319, 24).long()[None]
    assert START not in spread
    assert model(spread).logits.isfinite().all()
    assert not model(torch.tensor([[START, 72, 105]])).logits.isfinite().all()


@pytest.mark.parametrize("backend", ["bitsandbytes", "compressed-tensors"])
def test_activations_that_overflow_behind_the_start_token_end_as_bfloat16(backend, tmp_path, capsys):
    if backend == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    source = resolve(str(hot_behind_start(tmp_path / "hot")))
    plan = plan_for(source, keep=1.0)
    if backend == "compressed-tensors":
        plan = mixed_plan(source, ("int4_g64", "int8", "16bit"))
    run = open_run(tmp_path / "run", source.identity())
    quantize(run, source, plan, device="cpu", storage_dtype="float16", backend=backend)
    assert "written again in bfloat16" in capsys.readouterr().out
    proof = run_info(run)["stages"]["quantize"]["proof"]
    assert (proof["dtype"], proof["finite"], proof["rewritten_in_bfloat16"]) == ("bfloat16", True, True)
    assert (proof["windows"], proof["length"], proof["start_token"]) == (4, 256, START)
    loaded = AutoModelForCausalLM.from_pretrained(run.model_dir)
    assert loaded(torch.tensor([[START, 72, 105]])).logits.isfinite().all()
    assert "proven by use: transformers" in proof_of(run)
    refused = open_run(tmp_path / "refused", source.identity())
    with pytest.raises(CheckpointError, match=r"not numbers.*float16.*model\.layers\.0\.mlp.*bfloat16"):
        quantize(
            refused, source, plan, device="cpu", storage_dtype="float16", overflow="error", backend=backend
        )
    assert not refused.model_dir.exists()


def test_a_model_that_bfloat16_cannot_run_either_fails_and_names_the_module(tmp_path):
    directory = hot_behind_start(tmp_path / "hot", factor=3e38)
    tensors = load_file(directory / "model.safetensors")
    for kind in ("gate_proj", "up_proj"):
        tensors[f"model.layers.0.mlp.{kind}.weight"][0, 0] = 1e18
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    source = resolve(str(directory))
    run = open_run(tmp_path / "run", source.identity())
    with pytest.raises(CheckpointError, match=r"bfloat16.*model\.layers\.0\.mlp"):
        quantize(run, source, plan_for(source, keep=1.0), device="cpu")
    assert not run.model_dir.exists()


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_a_source_with_nan_is_named_and_no_dtype_is_advised(name, tmp_path):
    directory = make_tiny("llama", tmp_path / "nan", dtype="bfloat16")
    tensors = load_file(directory / "model.safetensors")
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    source = resolve(str(directory))
    run = open_run(tmp_path / "run", source.identity())
    with pytest.raises(CheckpointError, match=rf"{name} holds 1 values that are NaN.*source") as caught:
        quantize(run, source, plan_for(source), device="cpu")
    assert "storage_dtype" not in str(caught.value)
    assert not run.model_dir.exists()


def test_a_generate_that_ends_at_once_fails_the_gate(tmp_path):
    directory = make_tiny("llama", tmp_path / "mute")
    path = directory / "generation_config.json"
    config = json.loads(path.read_text()) | {"suppress_tokens": [i for i in range(320) if i != 258]}
    path.write_text(json.dumps(config))
    source = resolve(str(directory))
    run = open_run(tmp_path / "run", source.identity())
    with pytest.raises(CheckpointError, match="answer to a prompt is empty"):
        quantize(run, source, plan_for(source), device="cpu")
    assert not run.model_dir.exists()


def test_one_repeated_token_is_judged_by_what_the_16_bit_model_answers(monkeypatch, tmp_path):
    answers = iter(["repeats one token", None])
    monkeypatch.setattr(fresh_check, "generate", lambda model, request: {"problem": next(answers)})
    monkeypatch.setattr(fresh_check, "load", lambda *_, **__: None)
    untrained = iter([False, True])
    monkeypatch.setattr(fresh_check, "guesses", lambda *_: next(untrained))
    model, request = SimpleNamespace(dtype=torch.float16), {"source": "", "windows": []}
    assert fresh_check.use(model, request)["problem"] == "repeats one token"
    answers = iter(["repeats one token"] * 2)
    assert fresh_check.use(model, request)["problem"] is None
    answers = iter(["repeats one token", None])
    assert "untrained" in fresh_check.use(model, request)["note"]


@pytest.mark.parametrize(
    ("files", "config", "expected"),
    [
        ("float32", None, "bfloat16"),
        ("float32", "float16", "float16"),
        ("float16", None, "float16"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float32", "float32", "bfloat16"),
    ],
)
def test_the_storage_dtype_is_the_configurations_else_bfloat16(files, config, expected, tmp_path):
    directory = make_tiny("llama", tmp_path / "m", dtype=files)
    path = directory / "config.json"
    held = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("dtype", "torch_dtype")}
    path.write_text(json.dumps(held | ({"dtype": config} if config else {})))
    assert resolve(str(directory)).storage_dtype == expected


def test_a_float32_source_saved_in_bfloat16_is_recognised_as_its_own(tmp_path):
    """float32 -> float16 -> bfloat16 rounds twice; the file holds what one cast gives."""
    directory = make_tiny("llama", tmp_path / "f32", dtype="float32")
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float16"}))
    source = resolve(str(directory))
    run, plan = open_run(tmp_path / "run", source.identity()), plan_for(source)
    quantize(run, source, plan, device="cpu", storage_dtype="bfloat16")
    original = load_file(directory / "model.safetensors")
    twice = {n: (t.half().bfloat16() != t.bfloat16()).any().item() for n, t in original.items()}
    assert any(twice.values())  # so the check below can fail
    with open_weights(source) as weights:
        model = load_model(source, device="cpu", dtype=torch.float32)
        found = put_saved(model, weights, plan.formats, run.model_dir)
        name = plan.protected[0]
        held = model.get_submodule(name).weight
        assert torch.equal(held, original[f"{name}.weight"].bfloat16().float())
    assert found["16bit"] == len(plan.protected)
