"""A T4 that isn't there: its capability, its memory and float16, and what the project decides by them."""

import types
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

from benchmarks.budget import qwen35_4b
from spi_utils.budget import KEPT, MACHINES, budget
from spi_utils.evaluate import evaluate
from spi_utils.models import chosen_model, resolve_device, resolve_dtype
from spi_utils.quantize import Saving, auto_storage, fits_in_memory
from spi_utils.safe_linear import widen
from tests.evaluated_run import ready_run
from tests.test_platforms import GIB, P100, T4, fake_cuda
from tests.tiny import CONFIGS

WEIGHTS = 8_411_502_592  # bytes of Qwen3.5-4B in float16
# The published shapes of its text part.
QWEN = {
    **CONFIGS["qwen3_5"],
    **{"vocab_size": 248_320, "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32},
    **{"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 4096},
    **{"linear_num_key_heads": 16, "linear_num_value_heads": 32},
    **{"linear_key_head_dim": 128, "linear_value_head_dim": 128},
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 8,
}


@pytest.fixture
def t4(monkeypatch):
    """Two T4, as on Kaggle; the function that is returned says how many bytes of device 0 are in use."""
    fake_cuda(monkeypatch, T4, T4)
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)

    def use(count):
        free = T4.memory_bytes - count
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, T4.memory_bytes))

    use(0)
    return use


@pytest.fixture
def qwen(monkeypatch):
    """Qwen3.5-4B's modules in float16, without their weights, on what calls itself cuda:0."""
    # It reads values, which these tensors don't have; a batch of whole texts isn't packed.
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda places: None, raising=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**QWEN), dtype=torch.float16)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    names = [name for name in linear if name != "lm_head"]
    assert len(names) == 248 and 2 * sum(p.numel() for p in model.parameters()) == WEIGHTS
    assert widen(model)  # as load_model does in float16
    model.eval().requires_grad_(False)
    return types.SimpleNamespace(
        model=model,
        layers=names,
        live=lambda name: model.get_submodule(name).weight,
        device=torch.device("cuda:0"),
    )


def test_auto_is_qwen_in_float16_on_device_0(t4):
    device = resolve_device("auto")
    assert (str(device), resolve_dtype("auto", device)) == ("cuda:0", torch.float16)
    assert chosen_model("auto") == "Qwen/Qwen3.5-4B"


def test_on_a_p100_auto_is_the_bundled_model_in_float32_on_the_cpu(monkeypatch):
    fake_cuda(monkeypatch, P100)
    device = resolve_device("auto")
    assert (str(device), resolve_dtype("auto", device)) == ("cpu", torch.float32)
    assert chosen_model("auto") == "bundled"


def test_what_a_graph_of_qwen_keeps_is_what_the_budget_says(qwen):
    """Counted by autograd's own saved tensors, on shapes alone: 256 tokens through every kind of block."""
    held = (*qwen.model.parameters(), *qwen.model.buffers())
    seen = {tensor.untyped_storage()._cdata: tensor for tensor in held}
    kept = [0]

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = tensor  # alive, so that no storage is counted twice
            kept[0] += storage.nbytes()
        return tensor

    def starts(module, inputs, output):
        return output.requires_grad_(True)

    handle = qwen.model.get_input_embeddings().register_forward_hook(starts)
    ids = torch.zeros((1, 256), dtype=torch.long, device="meta")
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        qwen.model.base_model(input_ids=ids, use_cache=False)
    handle.remove()
    wide = sum(sum(qwen.live(name).shape) for name in qwen.layers)
    assert 3 < kept[0] / (256 * 2 * wide) < KEPT


def test_the_pass_through_qwen_fits_a_t4_with_the_rounding():
    costs = {one.stage: one for one in budget(qwen35_4b(), MACHINES["colab"], tokens=6144, variants=16)}
    assert WEIGHTS + GIB < costs["analyze"].gpu < 0.85 * T4.memory_bytes
    assert all(one.gpu < T4.memory_bytes for one in costs.values())


def test_a_checkpoint_made_on_a_t4_is_float16_for_it(t4):
    source = SimpleNamespace(storage_dtype="bfloat16")
    assert auto_storage(source, torch.device("cuda:0")) == "float16"
    assert auto_storage(source, torch.device("cpu")) == "bfloat16"


def test_a_checkpoint_is_loaded_for_its_check_only_where_it_fits(t4, tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(6_000_000_000)  # a hole: no byte is written
    weights = SimpleNamespace(shapes={"a.weight": (60_000, 50_000)})  # 6 GB in 16-bit
    half = torch.float16
    stock = Saving(None, "bitsandbytes", half, half, half, torch.device("cuda:0"), {})
    assert fits_in_memory(tmp_path, weights, stock)
    # compressed-tensors unpacks at the first forward pass: the packed file and the 16-bit weights at once
    assert not fits_in_memory(tmp_path, weights, replace(stock, backend="compressed-tensors"))
    t4(10 * GIB)
    assert not fits_in_memory(tmp_path, weights, stock)


@pytest.mark.slow
def test_an_evaluation_in_float16_agrees_with_one_in_float32(tiny, tmp_path):
    small = {"texts": "pydoc", "windows": 12, "length": 32, "controls": ["random"], "speed_repeats": 0}
    found = {}
    for dtype in ("float16", "float32"):
        run, source = ready_run(tiny("llama"), tmp_path / dtype)
        found[dtype] = evaluate(run, source, dtype=dtype, device="cpu", **small).variants
    for key, numbers in found["float16"].items():
        exact = found["float32"][key]
        assert numbers["nll"] == pytest.approx(exact["nll"], abs=2e-3), key
        assert numbers["kl_mean"] == pytest.approx(exact["kl_mean"], rel=0.05, abs=2e-5), key
