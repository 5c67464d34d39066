import re
from dataclasses import replace

import pandas as pd
import pytest

from benchmarks.budget import LIMITS, qwen35_4b, table
from spi_utils import budget as budgets
from spi_utils.budget import (
    MACHINES,
    Model,
    announce,
    beside_actual,
    budget,
    check_budget,
    work_of,
)
from spi_utils.errors import PlatformError
from spi_utils.platforms import Gpu
from spi_utils.runs import stage

KAGGLE, COLAB = MACHINES["kaggle"], MACHINES["colab"]


def quick(model, machine):
    tokens, variants = work_of("quick")
    return budget(model, machine, tokens=tokens, variants=variants)


def test_qwens_shapes_are_the_published_counts():
    model = qwen35_4b()
    assert len(model.shapes) == 248
    assert model.planned / 1e9 == pytest.approx(3.569, abs=5e-4)
    assert model.bytes_16bit / 1e9 == pytest.approx(8.41, abs=5e-3)
    assert (model.packed("nf4") + 2 * model.other) / 1e9 == pytest.approx(3.28, abs=5e-3)


def test_the_operations_are_those_that_torch_counts():
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.long))  # two tokens: attention itself is next to nothing
    linear = [
        m.weight.shape for n, m in model.named_modules() if type(m).__name__ == "Linear" and n != "lm_head"
    ]
    counted = Model(tuple(map(tuple, linear)), 0, 320, 128).forward
    assert counter.get_total_flops() / 2 == pytest.approx(counted, rel=0.01)


def test_the_table_gives_the_same_model_as_the_shapes():
    rows = [["a", "linear", 64, 32, 2048, True], ["b", "linear", 32, 64, 2048, True]]
    rows += [["emb", "embedding", 320, 32, 10240, False], ["rest", "other", 0, 0, 99, False]]
    frame = pd.DataFrame(rows, columns=["name", "role", "rows", "cols", "numel", "quantizable"])
    assert Model.of_layers(frame) == Model(((64, 32), (32, 64)), 10240 + 99, 320, 32)
    with pytest.raises(PlatformError, match="no head and no embedding"):
        Model.of_layers(frame[frame["role"] != "embedding"])


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("profile", LIMITS)
def test_qwen_fits_a_t4_in_the_promised_time(machine, profile):
    costs, _ = table(qwen35_4b(), machine, profile, None)
    assert check_budget(costs, machine) == []
    assert sum(cost.minutes for cost in costs) < LIMITS[profile]


def test_what_does_not_fit_is_said():
    model = replace(qwen35_4b(), shapes=qwen35_4b().shapes * 3)
    problems = check_budget(quick(model, COLAB), COLAB)
    assert any("analyze needs about" in line and "GPU memory" in line for line in problems)
    assert any("evaluate needs about" in line and "GB of memory" in line for line in problems)
    small = replace(KAGGLE, disk_bytes=5_000_000_000)
    assert check_budget(quick(qwen35_4b(), small), small) == ["the run leaves 10.2 GB, Kaggle, T4 has 5"]


def test_the_profiles_work_is_counted():
    assert work_of("quick") == (
        24 * 256,
        16,
    )  # reference, nf4 and plan twice; other end, fisher thrice, int8, int4; 5 random
    assert work_of("full", random_seeds=2) == (2 * 96 * 512, 17)


def test_a_run_is_announced_on_a_t4_only_and_warned_of_where_it_does_not_fit(tiny, monkeypatch, capsys):
    from spi_utils.models import resolve

    source = resolve(str(tiny("llama")))
    assert announce(source, "quick") == [] and capsys.readouterr().out == ""
    monkeypatch.setattr(budgets, "platform_name", lambda: "colab")
    monkeypatch.setattr(budgets, "find_gpus", lambda: (Gpu("Tesla T4", (7, 5), COLAB.gpu_bytes),))
    costs = announce(source, "quick")
    assert "Budget on Colab, Tesla T4" in capsys.readouterr().out
    assert next(c for c in costs if c.stage == "fetch").disk == 2 * 631_936
    monkeypatch.setattr(budgets, "memory_bytes", lambda: 1)
    with pytest.raises(PlatformError, match=r"does not fit: fetch needs about 3\.0 GB of memory.*'warn'"):
        announce(source, "quick", over_budget="stop")
    capsys.readouterr()
    assert announce(source, "quick") == costs
    assert re.search(
        r"\nWarning: .* does not fit: fetch needs about 3\.0 GB.*factor of two.*goes on; over_budget='stop'",
        capsys.readouterr().out,
    )


def test_twice_the_windows_cost_no_more_than_twice_the_evaluation():
    once, twice = (budget(qwen35_4b(), KAGGLE, tokens=n, variants=11) for n in (6144, 12288))
    by_stage = {cost.stage: cost.minutes for cost in once}
    for cost in twice:
        most = 2 * by_stage[cost.stage] if cost.stage == "evaluate" else by_stage[cost.stage]
        assert by_stage[cost.stage] <= cost.minutes <= most


def test_the_budget_stands_beside_what_a_stage_took(tmp_path):
    from spi_utils.runs import open_run, run_info

    run = open_run(tmp_path, {"id": "x", "sha256": "0"})
    with stage(run, "analyze", {}, []):
        pass
    stages = run_info(run)["stages"]
    stages["analyze"] |= {"seconds": 90.0, "peak_gpu_gb": 9.3}
    stages["spectra"] = stages["analyze"] | {"seconds": 30.0, "peak_gpu_gb": 2.0}
    text = beside_actual(quick(qwen35_4b(), KAGGLE), stages)
    row = next(line for line in text.splitlines() if line.startswith("| analyze"))
    cells = [cell.strip() for cell in row.split("|")]
    assert (cells[3], cells[5]) == ("2.0", "9.3") and cells[7] != "–"
    assert "| **2.0** |" in text.splitlines()[-1]
    assert (
        next(line for line in text.splitlines() if line.startswith("| quantize")).split("|")[3].strip() == "–"
    )


def test_a_larger_gpu_is_not_held_to_a_t4s_memory(tiny, monkeypatch, capsys):
    from spi_utils.models import resolve

    monkeypatch.setattr(budgets, "platform_name", lambda: "colab")
    monkeypatch.setattr(budgets, "find_gpus", lambda: (Gpu("NVIDIA A100", (8, 0), 40 * 2**30),))
    big = replace(qwen35_4b(), shapes=qwen35_4b().shapes * 2)
    monkeypatch.setattr(budgets.Model, "of_layers", lambda frame: big)
    monkeypatch.setattr(budgets, "memory_bytes", lambda: 80 * 2**30)
    assert announce(resolve(str(tiny("llama"))), "quick")
    assert "Budget on Colab, NVIDIA A100" in capsys.readouterr().out
    monkeypatch.setattr(budgets, "find_gpus", lambda: (Gpu("Tesla T4", (7, 5), COLAB.gpu_bytes),))
    with pytest.raises(PlatformError, match=r"analyze needs about .* of GPU memory, Colab, Tesla T4 has"):
        announce(resolve(str(tiny("llama"))), "quick", over_budget="stop")
