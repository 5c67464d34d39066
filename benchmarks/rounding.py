"""What guided rounding is worth: KL at equal bytes, nearest against guided, on text that no part has seen.

    python benchmarks/rounding.py                        # the bundled model (its weights were 4-bit once)
    python benchmarks/rounding.py --model DIRECTORY      # another, such as one of small_models.py
    python benchmarks/rounding.py --text FILE            # of the evaluation; default as in the notebooks
    python benchmarks/rounding.py --json out.json

Second moments come from windows that the model writes itself (or random tokens); every matrix is rounded, the
rest stays 16-bit. All numbers are float32, from the codes, not a stock checkpoint as loaded. Intervals: 95 %,
over windows.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from spi_utils.formats import dequantize, layer_bytes, quantize
from spi_utils.models import list_layers, load_model, load_tokenizer, open_weights, resolve
from spi_utils.rounding import guided
from spi_utils.scoring import Switch, reference_states, token_scores
from spi_utils.sensitivity import BlockPass, random_windows, sample_windows
from spi_utils.stats import estimate
from spi_utils.texts import load_text, make_windows, start_token

FORMATS = ("nf4", "int4_g64", "int4_g32")
BATCH = 4  # windows of one backward pass


def moments(switch: Switch, windows: torch.Tensor, *, guide: bool = True) -> dict[str, torch.Tensor]:
    """H of every layer; without `guide` GPTQ's own, Σ x xᵀ."""
    passing = BlockPass(switch, windows, BATCH, 0, split=len(windows))
    if not guide:
        visit = passing._visit

        def plain(block: int, k: int) -> Any:
            return [(name, x, torch.ones_like(g[..., :1])) for name, x, g in visit(block, k)]

        passing.__dict__["_visit"] = plain
    found: dict[str, torch.Tensor] = {}
    for block in reversed(range(len(passing.layers))):
        found |= passing.moments(block)
        passing.descend(block)
    return found


class Bench:
    """One model, its windows of evaluation, and the rows measured so far."""

    def __init__(self, spec: str, text: str, score: int, length: int) -> None:
        self.source = resolve(spec)
        self.model = load_model(self.source, device="cpu", dtype=torch.float32)
        with open_weights(self.source) as weights:
            layers = [
                layer for layer in list_layers(self.source) if layer.quantizable and layer.role == "linear"
            ]
            self.layers = {layer.name: layer for layer in layers}
            self.weights = {name: weights.read(f"{name}.weight") for name in self.layers}
        self.switch = Switch(self.model, None, list(self.layers))
        parameters = dict(self.model.named_parameters())
        self.parameters = {name: parameters[f"{name}.weight"] for name in self.layers}
        tokenizer = load_tokenizer(self.source)
        self.start = start_token(tokenizer, self.model.config)
        self.text = load_text(text)
        windows = make_windows(self.text, tokenizer, score, length, self.start, config=self.model.config)
        self.reference = reference_states(self.model, windows)
        self.windows, self.length = windows, length
        self.rows: list[dict[str, Any]] = []

    def put(self, values: dict[str, torch.Tensor]) -> None:
        """Weights of the named layers, as the file would load them."""
        with torch.no_grad():
            for name, value in values.items():
                self.parameters[name].copy_(value)

    def measure(self, fmt: str, rounding: str, tokens: int, seconds: float, values: dict[str, Any]) -> None:
        """Score one variant and print its row."""
        self.put(values)
        scores = token_scores(self.model, self.windows, self.reference)
        self.put(self.weights)
        assert scores.kl is not None  # there is a reference
        kl = estimate(scores.kl.mean(axis=1))
        bits = sum(layer_bytes(fmt, x.rows, x.cols) for x in self.layers.values()) * 8
        row = {
            "model": self.source.id,
            "format": fmt,
            "rounding": rounding,
            "matrix_bits": bits / sum(x.numel for x in self.layers.values()),
            "kl": kl.mean,
            "kl_ci": [kl.low, kl.high],
            "delta_loss": float((scores.nll - np.asarray(self.reference.nll)).mean()),
            "seconds": round(seconds, 1),
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            "tokens": tokens,
        }
        self.rows.append(row)
        print(
            f"{fmt:10} {rounding:34} {row['matrix_bits']:.2f} bits"
            f"  KL {kl.mean:.4f} ({kl.low:.4f}-{kl.high:.4f})"
            f"  Δ {row['delta_loss']:+.4f}  {seconds:.1f} s",
            flush=True,
        )

    def rounded(self, fmt: str, h: dict[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
        """Every layer's values under guided rounding."""
        return {n: dequantize(guided(w, h[n], fmt, **options)[0]) for n, w in self.weights.items()}


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--text", default="auto")
    parser.add_argument("--own", type=int, default=32, help="windows of own text")
    parser.add_argument("--score", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--curve", action="store_true", help="also few tokens, random tokens, other dampings")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bench = Bench(args.model, args.text, args.score, args.length)
    own = sample_windows(bench.model, args.own, args.length, bench.start, seed=0)
    for fmt in FORMATS:
        for base in (fmt, f"{fmt}_absmax") if fmt != "nf4" else (fmt,):
            t = time.monotonic()
            values = {n: dequantize(quantize(w, base)) for n, w in bench.weights.items()}
            bench.measure(
                fmt,
                "nearest" if base != fmt or fmt == "nf4" else "nearest, searched scales",
                0,
                time.monotonic() - t,
                values,
            )
    started = time.monotonic()
    h = moments(bench.switch, own)
    spent = time.monotonic() - started
    for fmt in FORMATS:
        t = time.monotonic()
        values = bench.rounded(fmt, h)
        bench.measure(fmt, "guided", own.numel(), spent + time.monotonic() - t, values)
    if args.curve:
        for damping in (0.01, 0.2):
            t = time.monotonic()
            bench.measure(
                "nf4",
                f"guided, damping {damping}",
                own.numel(),
                time.monotonic() - t,
                bench.rounded("nf4", h, damping=damping),
            )
        variants = {f"guided, {k} windows": (own[:k], True) for k in (2, 4, 8, 16) if k < args.own}
        variants["guided, random tokens"] = (
            random_windows(bench.model, args.own, args.length, bench.start, 0),
            True,
        )
        variants["GPTQ, own text (no gradient)"] = (own, False)
        for label, (windows, guide) in variants.items():
            t = time.monotonic()
            values = bench.rounded("nf4", moments(bench.switch, windows, guide=guide))
            bench.measure("nf4", label, windows.numel(), time.monotonic() - t, values)
    if args.json:
        args.json.write_text(
            json.dumps(
                {"text": bench.text.name, "windows": args.score, "length": args.length, "rows": bench.rows},
                indent=2,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
