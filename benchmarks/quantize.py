"""Speed and memory: NF4 against bitsandbytes, a whole checkpoint, and one larger than its memory budget.

    python -m benchmarks.quantize [--json FILE] [--parts nf4 bundled synthetic] [--gigabytes 4.4]

Each part runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROUNDS = 7
HIDDEN, INTERMEDIATE, VOCABULARY = 2560, 9216, 248_320  # Qwen3.5-4B's matrices, as a llama


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--gigabytes", type=float, default=4.4, help="size of the synthetic checkpoint")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"cores": len(os.sched_getaffinity(0))}
    for part in arguments.parts:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            results[part] = pool.submit(PARTS[part], arguments.gigabytes).result()
        print(part, json.dumps(results[part], indent=1), sep=": ", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


def nf4(gigabytes: float) -> dict[str, Any]:
    """Seconds to quantize one 2560 × 9216 float16 matrix, ours and bitsandbytes' taking turns."""
    import torch
    from bitsandbytes import functional

    from spi_utils.formats import quantize

    weight = (torch.randn(HIDDEN, INTERMEDIATE, generator=torch.Generator().manual_seed(0)) * 0.02).half()
    ours, theirs = [], []
    for _ in range(ROUNDS):
        seconds, packed = _timed(lambda: quantize(weight, "nf4"))
        ours.append(seconds)
        seconds, (codes, state) = _timed(lambda: functional.quantize_4bit(weight, quant_type="nf4"))
        theirs.append(seconds)
    assert packed.scales is not None
    return {
        "equal": torch.equal(packed.codes, codes) and torch.equal(packed.scales, state.absmax),
        "seconds": statistics.median(ours),
        "seconds_bitsandbytes": statistics.median(theirs),
        "ratio": statistics.median(b / a for a, b in zip(ours, theirs, strict=True)),
        "ns_per_weight": statistics.median(ours) / weight.numel() * 1e9,
        "threads": torch.get_num_threads(),
    }


def bundled(gigabytes: float) -> dict[str, Any]:
    """The bundled model, half of its matrices in NF4, every check included."""
    from spi_utils.models import resolve

    with tempfile.TemporaryDirectory() as folder:
        return _quantized(resolve("bundled"), Path(folder), fresh=True)


def synthetic(gigabytes: float, *, vocabulary: int = VOCABULARY, shard: str = "2GB") -> dict[str, Any]:
    """A random llama of this size and vocabulary; the fresh process only builds its modules."""
    from spi_utils.models import resolve

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # its memory isn't ours
            largest = pool.submit(make_checkpoint, source, gigabytes, vocabulary).result()
        result = _quantized(resolve(str(source)), Path(folder), fresh=False, shard=shard)
        return result | {"largest_tensor_gb": largest / 1e9}


def _quantized(source: Any, folder: Path, *, fresh: bool, shard: str = "2GB") -> dict[str, Any]:
    import pandas as pd

    from spi_utils import quantize as q
    from spi_utils.models import list_layers
    from spi_utils.plan import make_plan
    from spi_utils.runs import open_run, peak_rss_bytes, run_info

    layers = pd.DataFrame([dataclasses.asdict(layer) for layer in list_layers(source)]).assign(status="ok")
    half = int(layers["quantizable"].sum()) // 2
    plan = make_plan(layers, score="random", rule="top_k", value=half, model=source.identity())
    run = open_run(folder / "run", source.identity())
    if not fresh:
        q.fits_in_memory = lambda *_: False
    before = peak_rss_bytes()
    seconds, _ = _timed(lambda: q.quantize(run, source, plan, device="cpu", max_shard_size=shard))
    stage = run_info(run)["stages"]["quantize"]
    return {
        "seconds": seconds,
        "source_gb": plan.bytes["total_16bit"] / 1e9,
        "saved_gb": stage["bytes"] / 1e9,
        "planned_gb": stage["bytes_planned"] / 1e9,
        "rss_before_gb": before / 1e9,
        "peak_rss_above_gb": (peak_rss_bytes() - before) / 1e9,
        "nf4_layers": stage["bits"]["nf4"],
        "logit_difference": stage["fresh_process"].get("max_logit_difference"),
    }


def make_checkpoint(directory: Path, gigabytes: float, vocabulary: int) -> int:
    """Write a random float16 llama with a tied embedding; bytes of its largest tensor."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    per_layer = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE)
    layers = max(1, -(-int(gigabytes * 1e9 - 2 * HIDDEN * vocabulary) // per_layer))
    config = AutoConfig.for_model(
        "llama",
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        num_attention_heads=20,
        num_key_value_heads=20,
        tie_word_embeddings=True,
        dtype="float16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {
            name: tensor.shape
            for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()
        }
    directory.mkdir(parents=True)
    shapes.pop("lm_head.weight")
    noise = torch.randn(HIDDEN * INTERMEDIATE, generator=torch.Generator().manual_seed(0)).mul_(0.02).half()
    for number, (name, shape) in enumerate(shapes.items()):
        size = shape.numel()
        values = noise.roll(number).repeat(-(-size // noise.numel()))[:size]
        save_file({name: values.view(shape)}, directory / f"model-{number:05d}.safetensors")
    config.save_pretrained(directory)
    return 2 * max(shape.numel() for shape in shapes.values())


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


PARTS: dict[str, Callable[[float], dict[str, Any]]] = {"nf4": nf4, "bundled": bundled, "synthetic": synthetic}

if __name__ == "__main__":
    sys.exit(main())
