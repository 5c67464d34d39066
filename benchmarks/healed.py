"""The bundled model taken off its 4-bit grid: noise, then a short full-precision training.

    python benchmarks/healed.py DIRECTORY      # about 15 CPU minutes; a transformers directory in float16

The bundled model's weights come from a file of 4-bit codes, so methods that find its grid again look better
than they are. Here every matrix of the blocks gets uniform noise of ± half a step of its own grid (groups of
32 weights of a row; a step is a fifteenth of a group's range, as Q4_1 stores it), and all weights are then
trained on the docstrings of Python's own library. No evaluation reads those: modules of the text `pycode` are
left out, and `pydoc` and WikiText are other texts. What comes out is a model of its own, and its own 16-bit
reference. `made.json` says how it was made, and how far the original is from it: the KL that a method would
have that found the old grid.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from spi_utils.models import list_layers, load_model, load_tokenizer, resolve
from spi_utils.scoring import reference_states, token_scores
from spi_utils.texts import CODE_MODULES, load_text, make_windows, start_token

GROUP, STEPS = 32, 15  # of Q4_1
LENGTH, BATCH, RATE, WARM_UP = 256, 4, 1e-4, 8


def docstrings() -> Iterator[str]:
    """Docstrings of Python's library, module by module, without those that an evaluation may read."""
    root = Path(inspect.__file__).parent
    named = sorted(name for name in sys.stdlib_module_names if name not in CODE_MODULES)
    for path in (p for n in named for p in [*sorted((root / n).rglob("*.py")), root / f"{n}.py"]):
        if not path.is_file() or "test" in str(path.relative_to(root)) or "site-packages" in path.parts:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 200:
                    yield text


def step_sizes(weight: torch.Tensor) -> torch.Tensor:
    """The step of each weight's group on the 4-bit grid, in the weight's shape (out, in)."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    step = (groups.amax(dim=2, keepdim=True) - groups.amin(dim=2, keepdim=True)) / STEPS
    return step.expand_as(groups).flatten(1)


def train(model: Any, rows: torch.Tensor) -> list[float]:
    """One pass over the windows (N, T); the loss of every step, nats a token."""
    steps = len(rows) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1.0, (k + 1) / WARM_UP) * max(0.02, 1 - k / steps)
    )
    losses = []
    model.requires_grad_(True).train()
    for step, batch in enumerate(rows.split(BATCH)):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 4 == 3:
            print(f"step {step + 1}/{steps}: {np.mean(losses[-4:]):.3f} nats a token", flush=True)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=56, help=f"of {BATCH} windows of {LENGTH} tokens")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.process_time()
    source = resolve("bundled")
    tokenizer = load_tokenizer(source)
    model: Any = load_model(source, device="cpu", dtype=torch.float32)
    start = start_token(tokenizer, model.config)
    pydoc = make_windows(load_text("pydoc"), tokenizer, 12, LENGTH, start)
    original = reference_states(model, pydoc)

    torch.manual_seed(args.seed)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for layer in list_layers(source):
            if layer.quantizable and layer.cols % GROUP == 0:
                weight = parameters[f"{layer.name}.weight"]
                weight.add_((torch.rand_like(weight) - 0.5) * step_sizes(weight))
    noisy = token_scores(model, pydoc, original)

    found = list(dict.fromkeys(docstrings()))
    order = np.random.default_rng(args.seed).permutation(len(found))
    ids = tokenizer("\n\n".join(found[i] for i in order), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    body = LENGTH - (start is not None)
    wanted = args.steps * BATCH
    rows = torch.tensor(ids[: wanted * body]).view(wanted, body)
    if start is not None:
        rows = torch.cat([torch.full((wanted, 1), start), rows], dim=1)
    losses = train(model, rows)
    model.eval()
    model.to(torch.float16).save_pretrained(args.directory)
    tokenizer.save_pretrained(args.directory)

    model.to(torch.float32)
    healed = reference_states(model, pydoc)
    back: Any = load_model(source, device="cpu", dtype=torch.float32)
    grid = token_scores(back, pydoc, healed)
    assert grid.kl is not None  # there is a reference
    made = {
        "from": source.id,
        "noise": "uniform, ± half a step of the 4-bit grid",
        "training": f"{args.steps} steps of {BATCH} × {LENGTH} tokens of docstrings of Python "
        f"{sys.version.split()[0]}'s library; AdamW, rate {RATE}, float32, saved in float16",
        "training_loss": [float(np.mean(losses[:4])), float(np.mean(losses[-4:]))],
        "pydoc_loss": {
            "original": float(original.nll.mean()),
            "with noise": float(noisy.nll.mean()),
            "healed": float(healed.nll.mean()),
        },
        "kl_of_the_original": float(grid.kl.mean()),
        "cpu_seconds": round(time.process_time() - started),
    }
    (args.directory / "made.json").write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(json.dumps(made, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
