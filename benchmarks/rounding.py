"""What guided rounding is worth: KL at equal bytes, nearest against guided, on text that no part has seen.

    python benchmarks/rounding.py                        # the bundled model (its weights were 4-bit once)
    python benchmarks/rounding.py --model DIRECTORY      # another, such as one of small_models.py
    python benchmarks/rounding.py --text FILE            # of the evaluation; default as in the notebooks
    python benchmarks/rounding.py --curve                # tokens, their source, damping
    python benchmarks/rounding.py --beyond               # what was tried on top of it, or left out
    python benchmarks/rounding.py --beyond sign          # of these the rows that are called so
    python benchmarks/rounding.py --json out.json

Second moments come from windows that the model writes itself (or random tokens); every matrix is rounded, the
rest stays 16-bit. `kl_own` is the KL on further own windows, held out: what a default may be chosen by. All
numbers are float32, from the codes, not a stock checkpoint as loaded. Intervals: 95 %, over windows.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from spi_utils import rounding
from spi_utils.formats import dequantize, layer_bytes, quantize
from spi_utils.models import list_layers, load_model, load_tokenizer, open_weights, resolve
from spi_utils.rounding import DAMPING, _inverse_factor, guided
from spi_utils.scoring import Switch, reference_states, token_scores
from spi_utils.sensitivity import BlockPass, fused_parts, random_windows, sample_windows
from spi_utils.stats import estimate
from spi_utils.texts import load_text, make_windows, start_token

FORMATS = ("nf4", "nf4_dq", "int4_g64", "int4_g32")
TRIED = ("nf4", "int4_g64")  # where ideas are tried
BATCH = 4  # windows of one backward pass


def moments(switch: Switch, windows: torch.Tensor, *, guide: bool = True) -> dict[str, list[torch.Tensor]]:
    """H of every layer's parts; without `guide` GPTQ's own, Σ x xᵀ."""
    found: dict[str, list[torch.Tensor]] = {}
    for passing, block in backwards(switch, windows):
        if guide:
            found |= passing.moments(block)
        for k in () if guide else passing.guiding:
            for name, inputs, _ in passing._visit(block, k):
                x = inputs.flatten(0, -2).float()
                h = found[name][0].addmm_(x.T, x) if name in found else x.T @ x
                found[name] = [h] * len(passing.parts[name])
    return found


def backwards(switch: Switch, windows: torch.Tensor) -> Iterator[tuple[BlockPass, int]]:
    """The pass with the block whose turn it is, last to first."""
    passing = BlockPass(switch, windows, BATCH, 0, split=len(windows))
    for block in reversed(range(len(passing.layers))):
        yield passing, block
        passing.descend(block)


class Bench:
    """One model, its windows of evaluation, and the rows measured so far."""

    def __init__(self, spec: str, text: str, score: int, length: int) -> None:
        self.source = resolve(spec)
        self.model = load_model(self.source, device="cpu", dtype=torch.float32)
        self.layers = {layer.name: layer for layer in list_layers(self.source) if layer.quantizable}
        with open_weights(self.source) as weights:
            self.switch = Switch(self.model, weights, list(self.layers))
            self.weights = {name: self.switch.original(name) for name in self.layers}
        tokenizer = load_tokenizer(self.source)
        self.start = start_token(tokenizer, self.model.config)
        self.text = load_text(text)
        windows = make_windows(self.text, tokenizer, score, length, self.start, config=self.model.config)
        self.reference = reference_states(self.model, windows)
        self.windows, self.length = windows, length
        self.held = sample_windows(self.model, score, length, self.start, seed=1)
        self.held_reference = reference_states(self.model, self.held)
        self.rows: list[dict[str, Any]] = []

    def put(self, values: dict[str, torch.Tensor]) -> None:
        """Weights of the named layers, as the file would load them."""
        for name, value in values.items():
            self.switch._put(name, value)

    def measure(self, fmt: str, rounding: str, tokens: int, seconds: float, values: dict[str, Any]) -> None:
        """Score one variant and print its row."""
        self.put(values)
        scores = token_scores(self.model, self.windows, self.reference)
        own = token_scores(self.model, self.held, self.held_reference).kl
        self.put(self.weights)
        assert own is not None
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
            "kl_own": float(own.mean()),
            "delta_loss": float((scores.nll - np.asarray(self.reference.nll)).mean()),
            "seconds": round(seconds, 1),
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
            "tokens": tokens,
        }
        self.rows.append(row)
        print(
            f"{fmt:10} {rounding:34} {row['matrix_bits']:.2f} bits"
            f"  KL {kl.mean:.4f} ({kl.low:.4f}-{kl.high:.4f})  own {row['kl_own']:.4f}"
            f"  Δ {row['delta_loss']:+.4f}  {seconds:.1f} s",
            flush=True,
        )

    def rounded(self, fmt: str, h: dict[str, list[torch.Tensor]], **options: Any) -> dict[str, torch.Tensor]:
        """Every layer's values under guided rounding."""
        config, values = self.model.config.get_text_config(), {}
        for name, w in self.weights.items():
            parts = fused_parts(name, len(w), config)
            values[name] = dequantize(guided(w, h[name], fmt, parts=parts, **options)[0])
        return values


# --- what was tried on top ---------------------------------------------------------------------------------


def output_factor(
    bench: Bench, own: torch.Tensor, h: dict[str, list[torch.Tensor]], fmt: str
) -> dict[str, Any]:
    """Feedback across rows as well (YAQA, arXiv 2505.22988): the second moments as H ⊗ G, G of the outputs.

    G = Σ_t (x_tᵀ H x_t) g_t g_tᵀ, one step of the power iteration for the nearest Kronecker product. Rows go
    in blocks of 64; what a block's rounding breaks, the rows below it mend.
    """
    outer: dict[str, torch.Tensor] = {}
    for passing, block in backwards(bench.switch, own):
        for k in passing.guiding:
            for name, inputs, gradient in passing._visit(block, k):
                x = inputs.flatten(0, -2).float()
                scaled = (
                    gradient.flatten(0, -2)
                    * ((x @ h[name][0]) * x).sum(dim=1, keepdim=True).clamp(min=0).sqrt()
                )
                outer[name] = outer[name].addmm_(scaled.T, scaled) if name in outer else scaled.T @ scaled
    values = {}
    for name, weight in bench.weights.items():
        upper, _ = _inverse_factor(outer[name], DAMPING)
        w, made = weight.float().clone(), []
        for first in range(0, len(w), 64):
            rows, below = slice(first, first + 64), slice(first + 64, None)
            made.append(dequantize(guided(w[rows].to(weight.dtype), [h[name][0]], fmt)[0]))
            error = torch.linalg.solve_triangular(
                upper[rows, rows].T, w[rows] - made[-1].float(), upper=False
            )
            w[below] -= upper[rows, below].T @ error
        values[name] = torch.cat(made)
    return values


def sequential(bench: Bench, own: torch.Tensor, fmt: str, *, asymmetric: bool) -> dict[str, Any]:
    """Inputs as the rounded blocks below give them, first block to last; gradients of the 16-bit model.

    `asymmetric` also moves the target, W C (H')⁻¹ with C = Σ ‖g‖² x x'ᵀ, so that what the blocks below
    broke is mended (GPTAQ, arXiv 2504.02692).
    """
    norms: dict[tuple[str, int], torch.Tensor] = {}
    passing = BlockPass(bench.switch, own, BATCH, 0, split=len(own))
    clean = [passing.inputs[0][k] for k in passing.guiding]
    for block in reversed(range(len(passing.layers))):
        for k in passing.guiding:
            for name, _, g in passing._visit(block, k):
                norms[name, k] = g.flatten(0, -2).square().sum(dim=1)
        passing.descend(block)
    broken, values = list(clean), {}
    for block, names in enumerate(passing.layers):
        second: dict[str, torch.Tensor] = {}
        cross: dict[str, torch.Tensor] = {}
        for k in passing.guiding:
            seen: list[dict[str, torch.Tensor]] = []
            for stream in (clean, broken):
                inputs: dict[str, torch.Tensor] = {}
                handles = [
                    bench.model.get_submodule(name).register_forward_pre_hook(
                        lambda module, args, name=name, inputs=inputs: inputs.update(
                            {name: args[0].flatten(0, -2)}
                        )
                    )
                    for name in names
                ]
                with torch.no_grad():
                    out = passing._call(block, k, stream[k])
                for handle in handles:
                    handle.remove()
                seen.append(inputs)
                if stream is clean:
                    clean[k] = out[0] if isinstance(out, tuple) else out
            for name in names:
                scaled = seen[1][name] * norms[name, k][:, None]
                second[name] = second.get(name, 0) + scaled.T @ seen[1][name]
                cross[name] = cross.get(name, 0) + seen[0][name].T @ scaled
        for name in names:
            weight, h = bench.weights[name], second[name]
            target = weight.float()
            if asymmetric:
                damped = h + DAMPING * h.diagonal().mean() * torch.eye(len(h))
                target = target + torch.linalg.solve(damped, (target @ (cross[name] - h)).T).T
            values[name] = dequantize(guided(target.to(weight.dtype), [h], fmt)[0])
        bench.put({name: values[name] for name in names})
        with torch.no_grad():
            for k in passing.guiding:
                out = passing._call(block, k, broken[k])
                broken[k] = out[0] if isinstance(out, tuple) else out
    bench.put(bench.weights)
    return values


def curve(bench: Bench, own: torch.Tensor, h: dict[str, list[torch.Tensor]], real: torch.Tensor) -> None:
    """Damping; how many tokens; where they come from."""
    for fmt, damping in product(TRIED, (0.01, 0.1, 0.2)):
        t = time.monotonic()
        values = bench.rounded(fmt, h, damping=damping)
        bench.measure(fmt, f"guided, damping {damping}", own.numel(), time.monotonic() - t, values)
    variants = {f"guided, {k} own windows": (own[:k], True) for k in (2, 4, 8, 16) if k < len(own)}
    more = sample_windows(bench.model, 128, bench.length, bench.start, seed=2)
    variants["guided, 128 own windows"] = (more, True)
    variants[f"guided, {len(own)} windows of random tokens"] = (
        random_windows(bench.model, len(own), bench.length, bench.start, 0),
        True,
    )
    variants[f"guided, {len(real)} windows of real text"] = (real, True)
    variants["GPTQ, own text (no gradient)"] = (own, False)
    for label, (windows, guide) in variants.items():
        t = time.monotonic()
        values = bench.rounded("nf4", moments(bench.switch, windows, guide=guide))
        bench.measure("nf4", label, windows.numel(), time.monotonic() - t, values)


def with_shares(bench: Bench, h: dict[str, list[torch.Tensor]], fmt: str, keep: Any, **more: Any) -> Any:
    """Of the searched scales those that `keep` takes."""
    all_of_them, fine = rounding.SHARES, rounding.FINE
    try:
        rounding.SHARES = tuple(filter(keep, all_of_them))
        rounding.FINE = fine if len(rounding.SHARES) > 1 else 0.0
        return bench.rounded(fmt, h, **more)
    finally:
        rounding.SHARES, rounding.FINE = all_of_them, fine


def beyond(bench: Bench, own: torch.Tensor, h: dict[str, list[torch.Tensor]], wanted: str) -> None:
    """What was tried on top of guided rounding, and what it is without a part, in both formats; of these
    the rows whose name contains `wanted`."""
    for fmt in TRIED:
        tried: dict[str, Any] = {
            "guided, scales of one sign": lambda fmt=fmt: with_shares(bench, h, fmt, lambda x: x > 0),
            "GPTQ, absmax scales (no gradient, no sweep)": lambda fmt=fmt: with_shares(
                bench,
                moments(bench.switch, own, guide=False),
                fmt,
                lambda x: x == 1,
                sweeps=0,
                damping=0.01,
            ),
            "guided, no sweep": lambda fmt=fmt: bench.rounded(fmt, h, sweeps=0),
            "guided, 4 sweeps": lambda fmt=fmt: bench.rounded(fmt, h, sweeps=4),
            "guided, output factor": lambda fmt=fmt: output_factor(bench, own, h, fmt),
            "guided, rounded inputs": lambda fmt=fmt: sequential(bench, own, fmt, asymmetric=False),
            "guided, rounded inputs, moved target": lambda fmt=fmt: sequential(
                bench, own, fmt, asymmetric=True
            ),
        }
        for label, make in ((label, make) for label, make in tried.items() if wanted in label):
            t = time.monotonic()
            values = make()
            bench.measure(fmt, label, own.numel(), time.monotonic() - t, values)


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
    parser.add_argument(
        "--beyond", nargs="?", const="", metavar="PART", help="also what was tried, or of it one"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bench = Bench(args.model, args.text, args.score, args.length)
    own = sample_windows(bench.model, args.own, args.length, bench.start, seed=0)
    for fmt in FORMATS:
        for base in (fmt, f"{fmt}_absmax") if fmt.startswith("int4") else (fmt,):
            t = time.monotonic()
            values = {n: dequantize(quantize(w, base)) for n, w in bench.weights.items()}
            bench.measure(
                fmt,
                "nearest" if base != fmt or not fmt.startswith("int4") else "nearest, searched scales",
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
        real = make_windows(
            load_text("pydoc"), load_tokenizer(bench.source), args.own, args.length, bench.start
        )
        curve(bench, own, h, real)
    if args.beyond is not None:
        beyond(bench, own, h, args.beyond)
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
