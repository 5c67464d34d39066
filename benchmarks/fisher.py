"""How gradients should be put together to predict what a layer costs, and on which text.

    python benchmarks/fisher.py                     # the bundled model, about 25 minutes on 2 cores
    python benchmarks/fisher.py --quick             # every third block, less text: about 5 minutes
    python benchmarks/fisher.py --json out.json     # the numbers
    python benchmarks/fisher.py --model DIRECTORY   # another model

The yardstick is the measured ΔKL of each layer alone in NF4, on windows that the gradients never saw. For
each text that gradients are taken on, and each length of the blocks of positions whose slopes are added
before squaring (1 is "per token", the whole length is "per sequence"):
  rho      Spearman's ρ between estimate and yardstick, per weight (the order in which a budget is spent)
  scatter  standard deviation of ln(yardstick / estimate) over layers
  sum      Σ estimate / Σ yardstick
  kept     share of the oracle's summed saving that the estimate's choice keeps, at 10, 30, 55 % of the bytes
  cost     seconds of the gradients over those of a forward pass on the same tokens
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from spi_utils.models import list_layers, load_model, load_tokenizer, open_weights, resolve
from spi_utils.progress import progress
from spi_utils.runs import write_json
from spi_utils.scoring import Switch, mean_kl, reference_states
from spi_utils.sensitivity import (
    IN_BLOCK,
    NEIGHBOURS,
    all_slopes,
    per_block,
    random_windows,
    sample_windows,
)
from spi_utils.texts import load_text, make_windows, start_token

Floats = NDArray[np.float64]
SHARES = (0.10, 0.30, 0.55)
BLOCKS = (1, 4, 8, 16, 32, 64)
BATCH = 4
COUNTS = (4, 8, 16, 32)  # windows, for the question how few suffice


def measured(switch: Switch, windows: torch.Tensor, every: int) -> dict[int, float]:
    """ΔKL of each layer alone, by index; of every `every`-th block."""
    reference = reference_states(switch.model, windows)
    chosen = [i for i, name in enumerate(switch.layers) if _depth(name) % every == 0]
    return {
        i: mean_kl(switch, {switch.layers[i]: "nf4"}, windows, reference, switch.layers[i])
        for i in progress(chosen, len(chosen), "measured, layer by layer")
    }


def _depth(name: str) -> int:
    found = IN_BLOCK.match(name)
    return int(found[2]) if found else 0


def timed_slopes(switch: Switch, windows: torch.Tensor) -> tuple[NDArray[np.float32], float]:
    """Slopes (layers, W, T) in NF4, and their cost in forward passes over the same tokens."""
    switch.restore()
    for name in switch.layers:
        switch.packed(name, "nf4")
    began = time.monotonic()
    with torch.inference_mode():
        for ids in windows.split(BATCH):
            switch.model(input_ids=ids.to(switch.device), use_cache=False)
    middle = time.monotonic()
    found = all_slopes(switch, windows, ("nf4",), batch=BATCH)["nf4"]
    return found, (time.monotonic() - middle) / (middle - began)


def judge(estimate: Floats, truth: Floats, weights: Floats) -> dict[str, Any]:
    """The columns of the table, for layers of `weights` weights each."""

    def saved(score: Floats, share: float) -> float:
        order = np.argsort(-score / weights)
        return float(truth[order][np.cumsum(weights[order]) <= share * weights.sum()].sum())

    return {
        "rho": float(spearmanr(estimate / weights, truth / weights).statistic),
        "scatter": float(np.log(truth / estimate).std()),
        "sum": float(estimate.sum() / truth.sum()),
        "kept": [saved(estimate, share) / saved(truth, share) for share in SHARES],
    }


def rows_for(
    kind: str, found: NDArray[np.float32], truth: dict[int, float], weights: Floats, cost: float
) -> list[dict[str, Any]]:
    """A row for each block length on all windows, and for each smaller number of windows at the default."""
    index = np.array(list(truth))
    values = np.array(list(truth.values()))
    length = found.shape[2]
    settings = [(found.shape[1], block) for block in (*[b for b in BLOCKS if b < length], length)]
    settings += [(count, NEIGHBOURS) for count in COUNTS if count < found.shape[1]]
    return [
        {"text": kind, "windows": count, "length": length, "block": block, "cost": round(cost, 2)}
        | judge(per_block(found[index, :count], block)[0], values, weights[index])
        for count, block in settings
    ]


def show(row: dict[str, Any]) -> str:
    kept = " ".join(f"{share:.3f}" for share in row["kept"])
    return (
        f"{row['text']:7} {row['windows']:3} x {row['length']:3}  block {row['block']:3}  "
        f"rho {row['rho']:.3f}  scatter {row['scatter']:.3f}  sum {row['sum']:.2f}  kept {kept}  "
        f"cost {row['cost']:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    every, count, length, yardstick = (3, 12, 128, 8) if options.quick else (1, 32, 256, 12)
    source = resolve(options.model)
    layers = [layer for layer in list_layers(source) if layer.quantizable]
    weights = np.array([layer.numel for layer in layers], dtype=np.float64)
    with open_weights(source) as stored:
        model = load_model(source, device="cpu", dtype=torch.float32)
        switch = Switch(model, stored, [layer.name for layer in layers])
        tokenizer = load_tokenizer(source)
        start = start_token(tokenizer, model.config)
        cut = make_windows(
            load_text("pydoc"), tokenizer, count + yardstick, length, start, config=model.config
        )
        held_out = torch.zeros(len(cut), dtype=torch.bool)
        held_out[torch.linspace(0, len(cut) - 1, yardstick).round().long()] = True
        texts: dict[str, Callable[[], torch.Tensor]] = {
            "self": lambda: sample_windows(model, count, length, start, seed=0),
            "random": lambda: random_windows(model, count, length, start, seed=0),
            "text": lambda: cut[~held_out],
        }
        found = {kind: timed_slopes(switch, make()) for kind, make in texts.items()}
        truth = measured(switch, cut[held_out], every)
    rows = [row for kind, (made, cost) in found.items() for row in rows_for(kind, made, truth, weights, cost)]
    print("\n".join(map(show, rows)))
    if options.json:
        write_json(options.json, {"model": source.identity(), "layers_measured": len(truth), "rows": rows})


if __name__ == "__main__":
    main()
