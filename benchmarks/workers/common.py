"""What every worker of benchmarks/rivals.py shares. It runs in a rival's own environment.

A worker is called with a job, a JSON file:

    model     a transformers directory with 16-bit weights
    layers    module -> [rows, columns]: the matrices that may be quantized; the rest stays 16-bit
    ids       JSON file of token windows for calibration, or null;  texts: the same as a list of strings
    settings  of this rival
    out       folder for `weights.safetensors` (dequantized, by parameter) and `worker.json`
"""

from __future__ import annotations

import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


class Job:
    """One call: what is asked for, and where the answer goes."""

    def __init__(self) -> None:
        held = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        self.model_dir: str = held["model"]
        self.layers: dict[str, tuple[int, int]] = {k: tuple(v) for k, v in held["layers"].items()}
        self.ids_file, self.texts_file = held["ids"], held["texts"]
        self.settings: dict[str, Any] = held["settings"]
        self.out = Path(held["out"])
        self.started = time.monotonic()

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        """The 16-bit model on the CPU; the clock starts again when it is loaded."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.model_dir, dtype=dtype, device_map={"": "cpu"})
        self.started = time.monotonic()
        return model.eval()

    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model_dir)

    def windows(self) -> torch.Tensor:
        """Token windows for calibration, (windows, length)."""
        return torch.tensor(json.loads(Path(self.ids_file).read_text(encoding="utf-8")))

    def weights(self) -> dict[str, torch.Tensor]:
        """The matrices that may be quantized, float32, by module."""
        model = self.model()
        return {name: model.get_submodule(name).weight.detach() for name in self.layers}

    def finish(self, values: dict[str, torch.Tensor], bits: float, package: str, **notes: Any) -> None:
        """Write the answer.

        Args:
            values: parameter -> dequantized tensor; of the planned matrices by module name.
            bits: that all planned matrices take together, scales and zero points included.
            package: whose version is told.
            notes: whatever else the table may want: `bytes` of a file, `allocation`, `remark`.
        """
        seconds = time.monotonic() - self.started
        named = {f"{k}.weight" if k in self.layers else k: v for k, v in values.items()}
        save_file(
            {k: v.detach().to(torch.float16).contiguous() for k, v in named.items()},
            self.out / "weights.safetensors",
        )
        held = {
            "version": f"{package} {metadata.version(package)}",
            "bits": bits,
            "seconds": seconds,
            **notes,
        }
        (self.out / "worker.json").write_text(json.dumps(held), encoding="utf-8")


def integer_bits(job: Job, held: dict[str, tuple[int, int]], zero_bits: int = 0) -> float:
    """Bits of integer formats with 16-bit scales; module -> (bits, group), group 0: a row, bits 16: kept."""
    total = 0.0
    for name, (rows, cols) in job.layers.items():
        bits, group = held.get(name, (16, 0))
        groups = 0 if bits == 16 else rows * (cols // group if group > 0 else 1)
        total += bits * rows * cols + groups * (16 + zero_bits)
    return total
