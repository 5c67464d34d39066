"""What quantizing a layer would cost, from gradients: every layer and format in one backward pass, no data.

For a small change ΔW of one layer's weight, and labels y that the model itself gives, to second order

    E KL(p_W ‖ p_{W + ΔW}) ≈ ½ E_{y ~ p} [⟨∇_W ln p(y), ΔW⟩²]          (the Fisher information along ΔW)

and the inner product needs no weight gradient: with x_t the layer's input and g_t the gradient of the whole
sequence's ln p(y) at its output at position t, it is Σ_t s_t with the *slopes* s_t = g_t · (ΔW x_t). A
forward hook keeps x, a backward hook takes g, and ΔW is made from the format's codes and dropped again.

How the slopes of a sequence are put together is a choice between bias and variance. (Σ_t s_t)² is unbiased,
but one number a sequence: noisy. Σ_t s_t² averages over positions and drops their products, which are not
zero between neighbours. `per_block`, the default, keeps the products within blocks of 8 positions: on the
model's own text it ranks layers better than either (benchmarks/fisher.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from spi_utils.errors import AnalysisError
from spi_utils.scoring import Head, as_head_takes, final_hidden
from spi_utils.variants import Switch

BLOCK = 8  # neighbouring positions whose slopes are added before squaring (measured: 4 to 16 do as well)
SCALES = tuple(
    2.0**k for k in (10, 6, 2, -2, -6, -10)
)  # of a float16 gradient, tried until nothing overflows

Steps = Callable[[range], Iterable[int]]


# --- from slopes to costs ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """Nats a token of each layer, with the standard error over windows; both (layers,) float64."""

    value: np.ndarray
    error: np.ndarray


def per_block(slopes: np.ndarray, block: int = BLOCK) -> Estimate:
    """½ Σ_b (Σ_{t in block b} s_t)² / T, for slopes (layers, windows, T); the last block may be shorter."""
    starts = np.arange(0, slopes.shape[2], block)
    sums = np.add.reduceat(slopes.astype(np.float64), starts, axis=2)  # (layers, windows, blocks)
    windows = 0.5 * np.square(sums).sum(axis=2) / slopes.shape[2]
    count = windows.shape[1]
    error = windows.std(axis=1, ddof=1) / np.sqrt(count) if count > 1 else np.full(len(windows), np.nan)
    return Estimate(windows.mean(axis=1), error)


def per_token(slopes: np.ndarray) -> Estimate:
    """½ Σ_t s_t² / T: the least variance; without the products of different positions."""
    return per_block(slopes, 1)


def per_sequence(slopes: np.ndarray) -> Estimate:
    """½ (Σ_t s_t)² / T: unbiased to second order, and the most variance."""
    return per_block(slopes, slopes.shape[2])


# --- from a model to slopes -------------------------------------------------------------------------------


def slopes(
    model: Any, switch: Switch, windows: torch.Tensor, formats: Sequence[str], generator: torch.Generator
) -> dict[str, np.ndarray]:
    """Slopes of one batch of windows: one forward and one backward pass for all layers and formats.

    Args:
        model: a causal LM with its 16-bit weights in place and no gradients on parameters.
        switch: of that model; its layers are scored.
        windows: LongTensor (B, T).
        formats: e.g. ("nf4", "int8").
        generator: CPU generator of the sampled labels.

    Returns:
        For each format float32 (layers, B, T): s_t of each layer and position; NaN for a layer that the
        format can't hold.

    Raises:
        AnalysisError: gradients that overflow at every scale, or a layer that doesn't see every token once.
        torch.OutOfMemoryError: the GPU is too small for so many tokens at once.
    """
    state = generator.get_state()
    for scale in SCALES if model.dtype == torch.float16 else (1.0,):
        generator.set_state(state)
        found = _slopes_at(scale, model, switch, windows, formats, generator)
        able = {fmt: [switch.able(name, fmt) for name in switch.layers] for fmt in formats}
        if all(np.isfinite(values[able[fmt]]).all() for fmt, values in found.items()):
            return found
    raise AnalysisError(
        f"The gradients of {type(model).__name__} are not numbers in {model.dtype}, at any scale; "
        "use dtype='bfloat16' or 'float32', or sensitivity='none'."
    )


def _slopes_at(
    scale: float,
    model: Any,
    switch: Switch,
    windows: torch.Tensor,
    formats: Sequence[str],
    generator: torch.Generator,
) -> dict[str, np.ndarray]:
    """`slopes` with gradients multiplied by `scale` on their way."""
    with _Directional(switch, formats) as hooks:
        with torch.enable_grad(), inputs_need_gradient(model):
            hidden = final_hidden(model, windows)  # (B, T, d)
            pull = label_gradient(Head(model), hidden.detach().flatten(0, 1), generator)
            hidden.backward((pull * scale).view_as(hidden))
        return hooks.collect(windows.shape, scale)


class _Directional:
    """Hooks on a Switch's layers; while entered, a forward and backward pass leaves slopes in `found`."""

    def __init__(self, switch: Switch, formats: Sequence[str]) -> None:
        self.switch, self.formats = switch, formats
        self.found: dict[tuple[str, str], torch.Tensor] = {}

    def __enter__(self) -> _Directional:
        module = self.switch.model.get_submodule
        self.handles = [
            module(name).register_forward_hook(partial(self._forward, name)) for name in self.switch.layers
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _forward(
        self, name: str, module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> None:
        # Under gradient checkpointing the first pass has no graph; the recomputed one does.
        if output.requires_grad:
            output.register_hook(partial(self._backward, name, inputs[0].detach()))

    @torch.no_grad()
    def _backward(self, name: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
        weight = self.switch.live(name)
        for fmt in self.formats:
            if not self.switch.able(name, fmt):
                continue
            delta = self.switch.values(name, fmt).to(weight.dtype).sub_(weight)  # (out, in)
            moved = _product(x, delta)  # ΔW x, (B, T, out)
            value = torch.linalg.vecdot(moved.float(), gradient.float())
            self.found[name, fmt] = self.found.get((name, fmt), 0) + value

    def collect(self, shape: Sequence[int], scale: float) -> dict[str, np.ndarray]:
        """The slopes as (layers, B, T) arrays, layers in the Switch's order."""
        tokens = shape[0] * shape[1]
        for name in self.switch.layers:
            able = [fmt for fmt in self.formats if self.switch.able(name, fmt)]
            first = self.found.get((name, able[0])) if able else None
            seen = 0 if first is None else first.numel()
            if able and seen != tokens:
                raise AnalysisError(
                    f"Layer {name} saw {seen} of {tokens} tokens: expected each once. Its sensitivity can't "
                    "be taken from gradients; use sensitivity='measured' or 'none'."
                )
        nothing = torch.full(tuple(shape), torch.nan)
        return {
            fmt: np.stack(
                [self.found.get((n, fmt), nothing).view(*shape).cpu().numpy() for n in self.switch.layers]
            )
            / scale
            for fmt in self.formats
        }


def _product(x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """ΔW x, in the weight's dtype where a wider x fits into it."""
    moved = F.linear(x.to(delta.dtype), delta)
    if x.dtype == delta.dtype or bool(moved.isfinite().all()):
        return moved
    return F.linear(x, delta.to(x.dtype))


@contextlib.contextmanager
def inputs_need_gradient(model: Any) -> Iterator[None]:
    """Start the graph at the embedding's output: no parameter needs a gradient."""
    handle = model.get_input_embeddings().register_forward_hook(lambda m, i, out: out.requires_grad_(True))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def label_gradient(head: Head, hidden: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gradient of ln p(y), y ~ p sampled at every position, at the final hidden states; both (N, d)."""
    uniform = torch.rand(len(hidden), 1, generator=generator).to(hidden.device)
    result = torch.empty_like(hidden)
    for first in range(0, len(hidden), head.chunk):
        rows = slice(first, first + head.chunk)
        raw = head.raw(hidden[rows], "variant")  # (rows, V), overwritten by its gradient
        for part, u in zip(raw.split(head.rows), uniform[rows].split(head.rows), strict=True):
            part.copy_(_logit_gradient(head, part, u))
        torch.mm(raw.to(head.weight.dtype), head.weight, out=result[rows])
    return result


def _logit_gradient(head: Head, raw: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """e_y - p with y ~ p, taken back through the scaling and capping of logits where there is any."""
    with torch.set_grad_enabled(bool(head.adjust)):
        leaf = raw.float().detach().requires_grad_(bool(head.adjust))
        logits = head.finish(leaf)
    p = torch.softmax(logits.detach(), dim=-1)
    labels = pick(p, uniform)
    gradient = p.neg_().scatter_add_(1, labels, torch.ones_like(labels, dtype=p.dtype))
    return torch.autograd.grad(logits, leaf, gradient)[0] if head.adjust else gradient


# --- text -------------------------------------------------------------------------------------------------


def pick(p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Sample an index a row: p (N, V) of any positive sum, uniform (N, 1) in [0, 1); returns (N, 1)."""
    total = p.cumsum(dim=-1)
    return torch.searchsorted(total, uniform * total[:, -1:], right=True).clamp_(max=p.shape[1] - 1)


@torch.inference_mode()
def sample_windows(
    model: Any, n: int, length: int, start: int | None, seed: int, steps: Steps = iter
) -> torch.Tensor:
    """Text that the model writes itself: LongTensor (n, length), from the start token, temperature 1.

    Args:
        model: a causal LM with a key-value cache.
        n: windows, sampled together.
        length: tokens in each, the start token included.
        start: first token, or None: the first token is drawn evenly from the vocabulary.
        seed: of the samples.
        steps: wraps the range of columns to sample, to show progress.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    head = Head(model)
    ids = torch.full((n, 1), start) if start is not None else random_windows(model, n, 1, None, seed)
    columns, cache = [ids], None
    for _ in steps(range(1, length)):
        output = model.base_model(input_ids=columns[-1].to(device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        drawn = torch.rand(n, 1, generator=generator).to(device)
        last = as_head_takes(model, output.last_hidden_state[:, -1])
        rows = zip(last.split(head.chunk), drawn.split(head.chunk), strict=True)
        tokens = [pick(torch.softmax(head.finish(head.raw(h, "variant")), -1), u) for h, u in rows]
        columns.append(torch.cat(tokens).cpu())
    return torch.cat(columns, dim=1)


def random_windows(
    model: Any, n: int, length: int, start: int | None, seed: int, steps: Steps = iter
) -> torch.Tensor:
    """Tokens drawn evenly from the vocabulary behind the start token: LongTensor (n, length), at once."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (n, length), generator=generator)
    if start is not None:
        ids[:, 0] = start
    return ids
