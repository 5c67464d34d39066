"""A checkpoint is proven by use: text behind the start token, an answer to a prompt, the dtype that ships."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spi_utils import fresh_check
from spi_utils.checkpoint import put_saved
from spi_utils.errors import CheckpointError
from spi_utils.models import load_model, open_weights, resolve
from spi_utils.quantize import proof_of, quantize
from spi_utils.runs import open_run, run_info
from tests.test_compressed import mixed_plan
from tests.test_quantize import edit, here, plan_for  # noqa: F401
from tests.tiny import make_tiny

START = 257  # <s> of the tiny tokenizer


def hot_behind_start(folder, *, factor=6e4, gate=16):
    """A Llama in bfloat16 whose activations leave float16's range where the start token stands, and nowhere
    else: its embedding alone has the component that one neuron of an MLP multiplies."""

    def change(tensors):
        embedding, mlp = tensors["model.embed_tokens.weight"], "model.layers.0.mlp"
        embedding[:, 0] = embedding[START] = 0
        embedding[START, 0] = 1
        for kind in ("gate_proj", "up_proj"):
            tensors[f"{mlp}.{kind}.weight"][0] = 0
            tensors[f"{mlp}.{kind}.weight"][0, 0] = gate
        tensors["model.layers.0.self_attn.o_proj.weight"].zero_()
        tensors[f"{mlp}.down_proj.weight"][:, 0] = 0
        tensors[f"{mlp}.down_proj.weight"][5, 0] = factor
        tensors["lm_head.weight"][256:260] = 0  # so that an untrained model doesn't end its answer at once

    return edit(make_tiny("llama_untied", folder, dtype="bfloat16"), change)


@pytest.mark.parametrize("backend", ["bitsandbytes", "compressed-tensors"])
def test_activations_that_overflow_behind_the_start_token_end_as_bfloat16(backend, tmp_path, capsys):
    source = resolve(str(hot_behind_start(tmp_path / "hot")))
    half = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float16)
    assert half(torch.linspace(0, 319, 24).long()[None]).logits.isfinite().all()  # without the start token
    plan = plan_for(source, keep=1.0)
    if backend == "compressed-tensors":
        plan = mixed_plan(source, ("int4_g64", "int8", "16bit"))
    run, refused = (open_run(tmp_path / name, source.identity()) for name in ("run", "refused"))
    options = {"device": "cpu", "storage_dtype": "float16", "backend": backend}
    quantize(run, source, plan, **options)
    assert "activations overflow float16" in capsys.readouterr().out
    proof = run_info(run)["stages"]["quantize"]["proof"]
    assert (proof["dtype"], proof["finite"], proof["rewritten_in_bfloat16"]) == ("bfloat16", True, True)
    assert (proof["windows"], proof["length"], proof["start_token"]) == (4, 256, START)
    loaded = AutoModelForCausalLM.from_pretrained(run.model_dir)
    assert loaded(torch.tensor([[START, 72, 105]])).logits.isfinite().all()
    assert "proven by use: transformers" in proof_of(run)
    with pytest.raises(CheckpointError, match=r"not numbers.*float16.*model\.layers\.0\.mlp.*bfloat16"):
        quantize(refused, source, plan, overflow="error", **options)
    assert not refused.model_dir.exists()


def nan(tensors):
    tensors["model.norm.weight"].view(-1)[3] = float("nan")


def mute(folder):
    path = make_tiny("llama", folder) / "generation_config.json"
    config = json.loads(path.read_text()) | {"suppress_tokens": [i for i in range(320) if i != 258]}
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda folder: hot_behind_start(folder, factor=3e38, gate=1e18), r"bfloat16.*model\.layers\.0\.mlp"),
        (lambda folder: edit(make_tiny("llama", folder), nan), r"model\.norm\.weight holds 1 .* NaN.*source"),
        (mute, "answer to a prompt is empty"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused(make, match, tmp_path):
    source = resolve(str(make(tmp_path / "m")))
    run = open_run(tmp_path / "run", source.identity())
    with pytest.raises(CheckpointError, match=match):
        quantize(run, source, plan_for(source, keep=1.0), device="cpu")
    assert not run.model_dir.exists()


def test_one_repeated_token_is_judged_by_what_the_16_bit_model_answers(monkeypatch):
    scores = torch.zeros(4, 8)
    monkeypatch.setattr(fresh_check, "generate", lambda model, request: {"problem": next(answers)})
    monkeypatch.setattr(fresh_check, "load", lambda *_, **__: None)
    monkeypatch.setattr(fresh_check, "run", lambda *_: scores)
    model, request = SimpleNamespace(dtype=torch.float16), {"source": "", "windows": [[1, 2, 3, 4]]}
    answers = iter(["repeats one token", None])  # evenly spread scores: an untrained model
    assert "untrained" in fresh_check.use(model, request)["note"]
    scores[torch.arange(3), torch.tensor([2, 3, 4])] = 9
    answers = iter(["repeats one token", None])
    assert fresh_check.use(model, request)["problem"] == "repeats one token"
    answers = iter(["repeats one token"] * 2)
    assert fresh_check.use(model, request)["problem"] is None


def test_a_float32_source_saved_in_bfloat16_is_recognised_as_its_own(tmp_path):
    """float32 -> float16 -> bfloat16 rounds twice; the file holds what one cast gives."""
    directory = make_tiny("llama", tmp_path / "f32", dtype="float32")
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float16"}))
    source = resolve(str(directory))
    run, plan = open_run(tmp_path / "run", source.identity()), plan_for(source)
    quantize(run, source, plan, device="cpu", storage_dtype="bfloat16")
    original = load_file(directory / "model.safetensors")
    assert any((t.half().bfloat16() != t.bfloat16()).any() for t in original.values())  # or nothing is tested
    with open_weights(source) as weights:
        model = load_model(source, device="cpu", dtype=torch.float32)
        found = put_saved(model, weights, plan.formats, run.model_dir)
    name = plan.protected[0]
    assert torch.equal(model.get_submodule(name).weight, original[f"{name}.weight"].bfloat16().float())
    assert found["16bit"] == len(plan.protected)
