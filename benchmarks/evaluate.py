"""What scoring costs beside the bare forward pass, and its memory with a vocabulary of 248,320 tokens.

    python -m benchmarks.evaluate --json evaluate.json     # about 3 minutes on 2 idle cores

`loss_kl_ratio` is tokens a second of `token_scores` (loss, KL, flips and Δp) over those of the model's own
forward pass with logits, on the same windows of the bundled model: medians of alternating repeats in one
process. `peak_extra_gb_248k_vocab` is the peak memory (10⁹ bytes) scoring adds
above a loaded model with Qwen3.5's vocabulary, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from spi_utils.models import load_model, load_tokenizer, resolve, resolve_device, resolve_dtype
from spi_utils.scoring import default_batch, reference_states, token_scores
from spi_utils.texts import load_text, make_windows, start_token

VOCABULARY = 248_320


def seconds(action: Callable[[], Any], device: torch.device) -> float:
    """How long an action takes, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def throughput(model_name: str, windows: int, length: int, repeats: int) -> dict[str, Any]:
    """Scoring against the bare forward pass: each repeat times both, one after the other."""
    device = resolve_device("auto")
    source = resolve(model_name)
    model = load_model(source, device=device, dtype=resolve_dtype("auto", device))
    tokenizer = load_tokenizer(source)
    start = start_token(tokenizer, model.config)
    ids = make_windows(load_text("pydoc"), tokenizer, windows, length, start, config=model.config)
    batch = default_batch(device, length)

    def bare() -> None:
        with torch.inference_mode():
            for rows in ids.split(batch):
                model(input_ids=rows.to(device), use_cache=False)

    reference = reference_states(model, ids)  # also the warm-up
    rows = []
    for _ in range(repeats):
        forward = seconds(bare, device)
        both = seconds(lambda: token_scores(model, ids, reference), device)
        rows.append((forward, forward / both))
    forward, both_ratio = (statistics.median(column) for column in zip(*rows, strict=True))
    return {
        "model": source.id,
        "device": str(device),
        "windows": windows,
        "length": length,
        "repeats": repeats,
        "forward_tokens_per_s": ids.numel() / forward,
        "loss_kl_ratio": both_ratio,
        "loss_kl_ratio_range": [min(row[1] for row in rows), max(row[1] for row in rows)],
    }


def peak_extra_gb() -> float:
    """Peak memory above the loaded model while 8 × 256 tokens are scored, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.evaluate", "--memory-only"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def measure_peak() -> float:
    """The same in this process: a random 2-block model of width 256 with Qwen3.5's vocabulary."""
    device = resolve_device("auto")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=VOCABULARY, num_hidden_layers=2, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(device, resolve_dtype("auto", device)).eval()
    model.requires_grad_(False)
    ids = torch.randint(0, VOCABULARY, (8, 256))
    before = _reset_peak(device)
    token_scores(model, ids, reference_states(model, ids))
    return (_peak(device) - before) / 1e9


def _reset_peak(device: torch.device) -> int:
    """Forget earlier peaks; bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-only", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.memory_only:
        print(measure_peak())
        return
    found = throughput(chosen.model, chosen.windows, chosen.length, chosen.repeats)
    found["peak_extra_gb_248k_vocab"] = peak_extra_gb()
    for name, value in found.items():
        print(f"{name:>26}  {value}")
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
