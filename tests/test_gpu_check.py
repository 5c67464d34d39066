"""`make gpu-check` here, on a tiny shape: it must not rot between two GPUs. Its notebooks: test_pipeline."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_starts_nothing(capsys, tmp_path):
    assert check.main(["--out", str(tmp_path / "x")]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_step_runs_and_is_skipped_the_second_time(tmp_path, capsys):
    assert check.main(["--tiny", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "| hybrid |" in page and "Zero dequantization overhead" in page and "passed" in page
    held = json.loads((tmp_path / "notebooks.json").read_text())
    assert held["proof"] and held["stock"]["agrees"] and 0 < held["peak_ram_gb"] < 12.7
    rates = json.loads((tmp_path / "speed.json").read_text())
    assert set(rates) == {"16-bit", "NF4", "hybrid"} and all(one["decode"][0] > 0 for one in rates.values())
    capsys.readouterr()
    assert check.main(["--tiny", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("done already") == len(check.STEPS)
