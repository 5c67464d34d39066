"""Train one arm until its held-out loss reaches given levels; hand out the weights at exactly those losses.

Networks are compared at *equal 16-bit loss*: training runs at a constant rate after a warm-up; where the
held-out loss passes a level between two checks, the level is met on the straight line between the weights of
these checks, by bisection. What is handed out is rounded to float16, as a checkpoint would be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from spi_utils.errors import AnalysisError
from spi_utils.lab.arms import Arm, Penalty, make_network
from spi_utils.lab.network import Corpus, Network, Shape, matrices, token_losses

State = dict[str, Tensor]
BISECTIONS = 7  # of a check's interval: levels are met to about 0.001 nats


@dataclass(frozen=True)
class Recipe:
    """How every arm is trained.

    `levels` are held-out losses in nats a character, descending; the last one is where arms are compared.
    Checks stand `every` steps; a run that hasn't met the last level after `limit` steps ends without it.
    """

    levels: tuple[float, ...] = (2.4, 2.25, 2.1, 2.0, 1.95)
    batch: int = 16
    rate: float = 3e-3
    decay: float = 0.1
    warmup: int = 30
    every: int = 10
    limit: int = 700

    def __post_init__(self) -> None:
        if not self.levels or any(a <= b for a, b in zip(self.levels, self.levels[1:], strict=False)):
            raise AnalysisError(f"levels={self.levels!r}: expected held-out losses in falling order.")


@dataclass(frozen=True)
class Snapshot:
    """The weights at a level: an nn.Linear network whose parameters are float16 values held in float32.

    `level` is None before training. `loss` is measured on the level windows, nats a character.
    """

    level: float | None
    step: int
    loss: float
    network: Network


def train(arm: Arm, seed: int, recipe: Recipe, shape: Shape, corpus: Corpus) -> Iterator[Snapshot]:
    """The network before training and at each level that it meets, in order. Same seed, same weights.

    The batches depend on the seed alone, so that arms of one seed see the same text.
    """
    generator = torch.Generator().manual_seed(seed)
    network = make_network(arm, shape, corpus.symbols, generator)
    penalty = Penalty(arm, network, generator)
    batches = _batches(corpus.train, recipe.batch, shape.context, seed)
    optimizer = torch.optim.AdamW(network.parameters(), recipe.rate, (0.9, 0.98), weight_decay=recipe.decay)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / recipe.warmup))
    probe = Network(shape, corpus.symbols, arm.rank or None)
    before = _state(network)
    yield _snapshot(None, 0, before, probe, corpus)
    left = list(recipe.levels)
    for step in range(1, recipe.limit + 1):
        windows = next(batches)
        logits = network(windows[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()) + penalty()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        warm.step()
        if step % recipe.every:
            continue
        after = _state(network)
        reached = _loss(probe, after, corpus.level)
        while left and reached <= left[0]:
            met = _meet(left[0], before, after, probe, corpus.level)
            yield _snapshot(left.pop(0), step, met, probe, corpus)
        if not left:
            return
        before = after


def _meet(level: float, before: State, after: State, probe: Network, windows: Tensor) -> State:
    """The weights on the line from `before` (loss above the level) to `after` whose loss is the level."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if _loss(probe, _between(before, after, middle), windows) <= level:
            high = middle
        else:
            low = middle
    return _between(before, after, high)


def _snapshot(level: float | None, step: int, state: State, probe: Network, corpus: Corpus) -> Snapshot:
    probe.load_state_dict(state)
    network = dense(probe)
    return Snapshot(level, step, float(token_losses(network, corpus.level)[1].mean()), network)


@torch.no_grad()
def dense(network: Network) -> Network:
    """A copy whose matrices are whole (products multiplied out), every parameter rounded to float16."""
    blocks: Any = network.blocks
    width = network.embedding.weight.shape[1]
    shape = Shape(width, len(blocks), blocks[0].heads)
    copy = Network(shape, network.embedding.num_embeddings)
    copy.embedding.weight.copy_(network.embedding.weight)
    copy.norm.weight.copy_(network.norm.weight)
    copied: Any = copy.blocks
    for block, source in zip(copied, blocks, strict=True):
        block.norms.load_state_dict(source.norms.state_dict())
    for (_, layer), (_, source) in zip(matrices(copy), matrices(network), strict=True):
        layer.weight.copy_(source.weight)
    for parameter in copy.parameters():
        parameter.copy_(parameter.half().float())
    return copy.requires_grad_(False)


def _batches(text: Tensor, batch: int, context: int, seed: int) -> Iterator[Tensor]:
    """Endless (batch, context + 1) windows at random places."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    offsets = torch.arange(context + 1)
    while True:
        at = torch.randint(0, len(text) - context - 1, (batch, 1), generator=generator)
        yield text[at + offsets]


def _state(network: Network) -> State:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def _between(before: State, after: State, share: float) -> State:
    return {name: torch.lerp(before[name], after[name], share) for name in before}


def _loss(probe: Network, state: State, windows: Tensor) -> float:
    probe.load_state_dict(state)
    return float(token_losses(probe, windows)[1].mean())
