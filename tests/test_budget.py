"""The arithmetic for a T4, against published and counted numbers; and a T4 that isn't there."""

from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, masking_utils

from benchmarks.budget import LIMITS, qwen35_4b, table
from spi_utils import budget as budgets
from spi_utils.budget import KEPT, MACHINES, Model, announce, beside_actual, budget, check_budget, work_of
from spi_utils.errors import PlatformError
from spi_utils.evaluate import evaluate
from spi_utils.models import chosen_model, resolve, resolve_device, resolve_dtype
from spi_utils.platforms import Gpu
from spi_utils.quantize import Saving, auto_storage, fits_in_memory
from spi_utils.safe_linear import widen
from tests.evaluated_run import ready_run
from tests.test_gpu_check import check
from tests.test_platforms import GIB, P100, T4, fake_cuda

KAGGLE, COLAB = MACHINES["kaggle"], MACHINES["colab"]
WEIGHTS = 8_411_502_592  # bytes of Qwen3.5-4B in float16


def quick(model, machine):
    tokens, variants = work_of("quick")
    return budget(model, machine, tokens=tokens, variants=variants)


# --- the arithmetic ---------------------------------------------------------------------------------------


def test_qwens_shapes_are_the_published_counts():
    model = qwen35_4b()
    assert len(model.shapes) == 248 and model.bytes_16bit / 1e9 == pytest.approx(8.41, abs=5e-3)
    assert model.planned / 1e9 == pytest.approx(3.569, abs=5e-4)
    assert (model.packed("nf4") + 2 * model.other) / 1e9 == pytest.approx(3.28, abs=5e-3)


def test_the_operations_are_those_that_torch_counts():
    sizes = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.long))  # two tokens: attention itself is next to nothing
    linear = [tuple(m.weight.shape) for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
    counted = Model(tuple(linear), 0, 320, 128).forward
    assert counter.get_total_flops() / 2 == pytest.approx(counted, rel=0.01)


def test_the_table_gives_the_same_model_as_the_shapes():
    rows = [["a", "linear", 64, 32, 2048, True], ["b", "linear", 32, 64, 2048, True]]
    rows += [["emb", "embedding", 320, 32, 10240, False], ["rest", "other", 0, 0, 99, False]]
    frame = pd.DataFrame(rows, columns=["name", "role", "rows", "cols", "numel", "quantizable"])
    assert Model.of_layers(frame) == Model(((64, 32), (32, 64)), 10240 + 99, 320, 32)
    with pytest.raises(PlatformError, match="no head and no embedding"):
        Model.of_layers(frame[frame["role"] != "embedding"])


def test_qwen_fits_a_t4_in_the_promised_time_and_a_larger_model_does_not():
    for machine in MACHINES.values():
        for profile, limit in LIMITS.items():
            costs, _ = table(qwen35_4b(), machine, profile, None)
            assert check_budget(costs, machine) == [] and sum(cost.minutes for cost in costs) < limit
    problems = " ".join(
        check_budget(quick(replace(qwen35_4b(), shapes=qwen35_4b().shapes * 3), COLAB), COLAB)
    )
    assert "analyze needs about" in problems and "GPU memory" in problems and "GB of memory" in problems
    small = replace(KAGGLE, disk_bytes=5_000_000_000)
    assert check_budget(quick(qwen35_4b(), small), small) == ["the run leaves 8.3 GB, Kaggle, T4 has 5"]


def test_the_profiles_work_is_counted():
    # reference, nf4 and plan twice; other end, fisher, int8; 5 random
    assert work_of("quick") == (24 * 256, 13)
    assert work_of("full", random_seeds=2) == (2 * 96 * 512, 17)


def test_a_run_is_announced_on_a_t4_only_and_warned_of_where_it_does_not_fit(tiny, monkeypatch, capsys):
    source = resolve(str(tiny("llama")))
    assert announce(source, "quick", formats=("nf4",)) == [] and capsys.readouterr().out == ""
    monkeypatch.setattr(budgets, "platform_name", lambda: "colab")
    monkeypatch.setattr(budgets, "find_gpus", lambda: (Gpu("Tesla T4", (7, 5), COLAB.gpu_bytes),))
    costs = announce(source, "quick", formats=("nf4",))
    assert "Budget on Colab, Tesla T4" in capsys.readouterr().out
    assert next(c for c in costs if c.stage == "fetch").disk == 2 * 631_936
    big = replace(qwen35_4b(), shapes=qwen35_4b().shapes * 2)
    monkeypatch.setattr(budgets.Model, "of_layers", lambda frame: big)
    monkeypatch.setattr(budgets, "memory_bytes", lambda: 80 * GIB)
    with pytest.raises(
        PlatformError, match=r"analyze needs .* GPU memory, Colab, Tesla T4 has 15\.8.*'warn'"
    ):
        announce(source, "quick", formats=("nf4",), over_budget="stop")
    assert announce(source, "quick", formats=("nf4",))
    assert "Warning: " in (said := capsys.readouterr().out) and "factor of two" in said
    monkeypatch.setattr(budgets, "find_gpus", lambda: (Gpu("NVIDIA A100", (8, 0), 40 * GIB),))
    # a larger GPU is not held to a T4's memory
    announce(source, "quick", formats=("nf4",), over_budget="stop")
    assert "Budget on Colab, NVIDIA A100" in capsys.readouterr().out


def test_the_budget_stands_beside_what_a_stage_took():
    stages = {"analyze": {"seconds": 90.0, "peak_gpu_gb": 9.3, "peak_rss_gb": 1.5}}
    stages["spectra"] = {"seconds": 30.0, "peak_gpu_gb": 2.0, "peak_rss_gb": 1.0}
    lines = beside_actual(quick(qwen35_4b(), KAGGLE), stages).splitlines()
    cells = {line.split(" | ")[0]: line.split(" | ") for line in lines}
    assert [cells["| analyze"][place] for place in (2, 4, 6)] == ["2.0", "9.3", "1.5"]
    assert cells["| quantize"][2] == "–" and "| **2.0** |" in lines[-1]


# --- a simulated T4 ---------------------------------------------------------------------------------------


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


def test_what_auto_means_on_a_t4_and_on_a_p100(t4, monkeypatch):
    device = resolve_device("auto")
    assert torch.cuda.is_bf16_supported()  # torch says so on a T4, through emulation
    assert (str(device), resolve_dtype("auto", device)) == ("cuda:0", torch.float16)
    assert chosen_model("auto") == "Qwen/Qwen3.5-4B"
    source = SimpleNamespace(storage_dtype="bfloat16")
    assert [auto_storage(source, torch.device(x)) for x in ("cuda:0", "cpu")] == ["float16", "bfloat16"]
    fake_cuda(monkeypatch, P100)
    device = resolve_device("auto")
    assert (str(device), resolve_dtype("auto", device)) == ("cpu", torch.float32)
    assert chosen_model("auto") == "bundled"


def test_what_a_graph_of_qwen_keeps_is_what_the_budget_says(monkeypatch):
    """Counted by autograd's own saved tensors, on shapes alone: 256 tokens through every kind of block."""
    # It reads values, which these tensors don't have; a batch of whole texts isn't packed.
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda places: None, raising=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**check.SHAPE), dtype=torch.float16)
    linear = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    wide = sum(sum(module.weight.shape) for module in linear)
    assert len(linear) == 248 and 2 * sum(p.numel() for p in model.parameters()) == WEIGHTS
    assert sum(m.weight.numel() for m in linear) == qwen35_4b().planned
    assert widen(model)  # as load_model does in float16
    model.eval().requires_grad_(False)
    seen = {tensor.untyped_storage()._cdata: tensor for tensor in (*model.parameters(), *model.buffers())}
    kept = [0]

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = tensor  # alive, so that no storage is counted twice
            kept[0] += storage.nbytes()
        return tensor

    model.get_input_embeddings().register_forward_hook(lambda module, x, output: output.requires_grad_(True))
    ids = torch.zeros((1, 256), dtype=torch.long, device="meta")
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model.base_model(input_ids=ids, use_cache=False)
    assert 3 < kept[0] / (256 * 2 * wide) < KEPT
    costs = {one.stage: one for one in budget(qwen35_4b(), COLAB, tokens=6144, variants=16)}
    assert WEIGHTS + GIB < costs["analyze"].gpu < 0.85 * T4.memory_bytes


def test_a_checkpoint_is_loaded_for_its_check_only_where_it_fits(t4, tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(6_000_000_000)  # a hole: no byte is written
    weights = SimpleNamespace(shapes={"a.weight": (60_000, 50_000)})  # 6 GB in 16-bit
    stock = Saving(None, "bitsandbytes", "float16", torch.device("cuda:0"), {})
    assert fits_in_memory(tmp_path, weights, stock)
    # compressed-tensors unpacks at the first forward pass: the packed file and the 16-bit weights at once
    assert not fits_in_memory(tmp_path, weights, replace(stock, backend="compressed-tensors"))
    t4(10 * GIB)
    assert not fits_in_memory(tmp_path, weights, stock)


@pytest.mark.slow
def test_an_evaluation_in_float16_agrees_with_one_in_float32(tiny, tmp_path):
    small = {"texts": "pydoc", "windows": 12, "length": 32, "controls": [], "speed_repeats": 0}
    found = {}
    for dtype in ("float16", "float32"):
        run, source = ready_run(tiny("llama"), tmp_path / dtype)
        found[dtype] = evaluate(run, source, dtype=dtype, device="cpu", **small).variants
    for key, numbers in found["float16"].items():
        exact = found["float32"][key]
        assert numbers["nll"] == pytest.approx(exact["nll"], abs=2e-3), key
        assert numbers["kl_mean"] == pytest.approx(exact["kl_mean"], rel=0.05, abs=2e-5), key
