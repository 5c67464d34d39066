"""Train one arm until its held-out loss reaches given levels; hand out the weights at exactly those losses.

Networks are compared at *equal 16-bit loss*: training runs at a constant rate after a warm-up; where the
held-out loss passes a level between two checks, the level is met on the straight line between the weights of
these checks, by bisection. What is handed out is rounded to float16, as a checkpoint would be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from spi_utils.errors import AnalysisError
from spi_utils.lab.arms import Arm, make_network, make_penalty
from spi_utils.lab.network import Corpus, Network, Shape, token_losses

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
        if list(self.levels) != sorted(set(self.levels), reverse=True):
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
    penalty = make_penalty(arm, network, generator)
    optimizer = torch.optim.AdamW(network.parameters(), recipe.rate, (0.9, 0.98), weight_decay=recipe.decay)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / recipe.warmup))
    probe = Network(shape, corpus.symbols, arm.rank)
    offsets, draws = torch.arange(shape.context + 1), torch.Generator().manual_seed(10_000 + seed)

    def loss_at(state: dict[str, Tensor]) -> float:
        probe.load_state_dict(state)
        return float(token_losses(probe, corpus.level)[1].mean())

    def snapshot(level: float | None, step: int, state: dict[str, Tensor]) -> Snapshot:
        whole = dense(state, shape, corpus.symbols)
        return Snapshot(level, step, float(token_losses(whole, corpus.level)[1].mean()), whole)

    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    yield snapshot(None, 0, before)
    left = list(recipe.levels)
    for step in range(1, recipe.limit + 1):
        at = torch.randint(0, len(corpus.train) - shape.context - 1, (recipe.batch, 1), generator=draws)
        windows = corpus.train[at + offsets]  # (batch, context + 1), at random places
        logits = network(windows[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()) + penalty()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        warm.step()
        if step % recipe.every:
            continue
        after = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        reached = loss_at(after)
        while left and reached <= left[0]:
            low, high = 0.0, 1.0  # shares of the way from `before`, which is above the level, to `after`
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                met = loss_at({key: torch.lerp(before[key], after[key], middle) for key in before}) <= left[0]
                low, high = (low, middle) if met else (middle, high)
            line = {key: torch.lerp(before[key], after[key], high) for key in before}
            yield snapshot(left.pop(0), step, line)
        if not left:
            return
        before = after


@torch.no_grad()
def dense(state: dict[str, Tensor], shape: Shape, symbols: int) -> Network:
    """The network of a state, its products multiplied out, every parameter rounded to float16."""
    whole = Network(shape, symbols)
    for name, parameter in whole.named_parameters():
        stem = name.removesuffix("weight")
        value = state[name] if name in state else state[f"{stem}left"] @ state[f"{stem}right"]
        parameter.copy_(value.half().float())
    return whole.requires_grad_(False)
