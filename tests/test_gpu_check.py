"""`make gpu-check` without a GPU. All its steps on a tiny shape: notebooks/test_pipeline.py."""

import importlib.util
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
