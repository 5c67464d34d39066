"""Small language models of several families, trained here: weights that never lay on a 4-bit grid.

    python benchmarks/small_models.py gpt2 DIRECTORY             # a transformers directory, a few minutes
    python benchmarks/selection.py --model DIRECTORY             # a benchmark on it

The bundled model's weights come from a 4-bit file, and one family is no evidence for all. These have some
two million weights and read bytes; they learn CPython's own pydoc topics, so they know words and little more.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from spi_utils.texts import load_text, start_token
from tests.tiny import make_tiny

DECODER = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "head_dim": 48}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": DECODER,
    "qwen3_5": {
        **DECODER,
        "num_hidden_layers": 8,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
    },
    "gemma3": {**DECODER, "layer_types": ["sliding_attention", "full_attention"] * 3},
    "phi3": DECODER,
    "gpt2": {"n_embd": 192, "n_layer": 6, "n_head": 4},
}
LENGTH, BATCH, RATE = 128, 16, 2e-3


def train(family: str, directory: Path, steps: int, seed: int = 0) -> float:
    """Write a trained model to `directory`; returns the mean loss of the last tenth, nats a byte."""
    make_tiny(family, directory, **FAMILIES[family])
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).train()
    ids = torch.tensor(tokenizer(load_text("pydoc").text, add_special_tokens=False)["input_ids"])
    start = start_token(tokenizer, model.config)
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    losses = []
    for step in range(steps):
        rows = [ids[at : at + LENGTH] for at in rng.integers(0, len(ids) - LENGTH, BATCH)]
        batch = torch.stack(rows)  # (B, T)
        if start is not None:
            batch[:, 0] = start  # as every window of an evaluation begins
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 49:
            print(f"step {step + 1}/{steps}: {np.mean(losses[-50:]):.3f} nats a byte", flush=True)
    model.eval().to(torch.float16).save_pretrained(directory)
    return float(np.mean(losses[-max(1, steps // 10) :]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    given = parser.parse_args()
    print(f"{given.directory}: {train(given.family, given.directory, given.steps):.3f} nats a byte")


if __name__ == "__main__":
    main()
