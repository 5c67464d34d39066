"""What SafeFP16Linear costs beside nn.Linear, and what no dequantization is worth: NF4 beside 16-bit.

    python -m benchmarks.safe_linear [--json FILE] [--device cpu] [--rounds 15]

Layers take turns within a round; a ratio is the median of the rounds' ratios: a busy machine hurts both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

from spi_utils.safe_linear import SafeFP16Linear

IN, OUT = 2560, 9216  # Qwen3.5-4B's up_proj
CASES = {"decode": 1, "prefill": 256}  # tokens at once


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "shape": [OUT, IN],
    }
    for dtype in (torch.float16, torch.bfloat16):
        layers = make_layers(device, dtype)
        for case, tokens in CASES.items():
            x = torch.randn(tokens, IN, device=device).to(dtype)
            name = f"{case}_{str(dtype).removeprefix('torch.')}"
            result[name] = compare(layers, x, arguments.rounds)
            print(name, json.dumps(result[name]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def make_layers(device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """One weight as nn.Linear, SafeFP16Linear (shared) and bitsandbytes' Linear4bit."""
    torch.manual_seed(0)
    plain = nn.Linear(IN, OUT, bias=False, device=device, dtype=dtype).requires_grad_(False)
    packed = Linear4bit(IN, OUT, bias=False, compute_dtype=dtype, quant_type="nf4")
    packed.weight = Params4bit(plain.weight.data.cpu(), requires_grad=False, quant_type="nf4")
    return {
        "linear": plain,
        "safe": SafeFP16Linear.from_linear(plain),
        "nf4": packed.to(device).eval(),
    }


@torch.inference_mode()
def compare(layers: dict[str, nn.Module], x: torch.Tensor, rounds: int) -> dict[str, float]:
    """Median milliseconds of each layer, and the median ratios to nn.Linear with their quartiles."""
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(rounds + 2):  # the first two warm up (bitsandbytes repacks weights in its first forward)
        for name, layer in layers.items():
            times[name].append(_milliseconds(partial(layer, x), x.device))
    kept = {name: values[2:] for name, values in times.items()}
    result = {f"{name}_ms": statistics.median(values) for name, values in kept.items()}
    for name in ("safe", "nf4"):
        ratios = [a / b for a, b in zip(kept[name], kept["linear"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result |= {f"{name}_ratio": middle, f"{name}_ratio_q1": low, f"{name}_ratio_q3": high}
    return result


def _milliseconds(work: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    sys.exit(main())
