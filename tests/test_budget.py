from dataclasses import replace

import pandas as pd
import pytest

from benchmarks.budget import LIMITS, PROFILES, qwen35_4b, table
from spi_utils import footprint
from spi_utils.budget import KEPT, MACHINES, SHARE, Model, beside_actual, budget, check_budget
from spi_utils.errors import PlatformError
from spi_utils.runs import stage

KAGGLE, COLAB = MACHINES["kaggle"], MACHINES["colab"]


def quick(model, machine):
    tokens, variants = PROFILES["quick"]
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
@pytest.mark.parametrize("profile", PROFILES)
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
    assert check_budget(quick(qwen35_4b(), small), small) == ["the run leaves 6.3 GB, Kaggle, T4 has 5"]


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
    stages["analyze"]["seconds"] = 90.0
    text = beside_actual(quick(qwen35_4b(), KAGGLE), stages)
    row = next(line for line in text.splitlines() if line.startswith("| analyze"))
    assert row.split("|")[3].strip() == "1.5" and row.split("|")[6].strip() != "–"
    assert (
        next(line for line in text.splitlines() if line.startswith("| quantize")).split("|")[3].strip() == "–"
    )


def test_the_memory_rule_is_the_sensitivitys_own():
    assert (KEPT, SHARE) == (footprint.KEPT, footprint.SHARE)
