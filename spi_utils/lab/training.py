"""The trained experiment's networks: a small character-level transformer, its arms, and their training.

The text is CPython's own `help()` topics. Pre-norm blocks without biases: q, k, v, o, up, down are the
matrices that the lab makes compact and quantizes; embedding and head are one tensor and stay as they are.

Networks are compared at *equal 16-bit loss*: training runs at a constant rate after a warm-up; where the
held-out loss passes a level between two checks, the level is met on the straight line between the weights of
these checks, by bisection. What is handed out is rounded to float16, as a checkpoint would be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spi_utils.compactness import nuclear_init_, trace_norm_penalty
from spi_utils.errors import AnalysisError, EvaluationError
from spi_utils.texts import load_text

PIECE = 4096  # characters; every HELD-th piece of the text is held out
HELD = 8
# (rows, cols) of each matrix, in widths
MATRICES = {"q": (1, 1), "k": (1, 1), "v": (1, 1), "o": (1, 1), "up": (4, 1), "down": (1, 4)}
DECAY = 0.2  # σ_k ~ e^(-0.2k), the preprint's compact spectrum
BISECTIONS = 7  # of a check's interval: levels are met to about 0.001 nats


# --- the text --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Character ids: `train` (characters,), and disjoint held-out windows (windows, context + 1).

    `level` decides when a model has reached a loss, `judge` measures damage: no window is in both.
    """

    train: Tensor
    level: Tensor
    judge: Tensor
    symbols: int
    sha256: str


def load_corpus(context: int, level: int = 40, judge: int = 64) -> Corpus:
    """The pydoc topics as characters, held-out windows spread evenly over every eighth piece.

    Raises:
        EvaluationError: the held-out part is too short for so many windows.
    """
    text = load_text("pydoc")
    table = {symbol: i for i, symbol in enumerate(sorted(set(text.text)))}
    pieces = torch.tensor([table[symbol] for symbol in text.text]).split(PIECE)
    held = torch.cat(pieces[HELD - 1 :: HELD])
    train = torch.cat([piece for i, piece in enumerate(pieces) if i % HELD != HELD - 1])
    windows = held[: len(held) // (context + 1) * (context + 1)].view(-1, context + 1)
    wanted = level + judge
    if len(windows) < wanted:
        raise EvaluationError(
            f"The held-out text has {len(windows)} windows of {context} characters, and {wanted} are asked "
            "for; ask for fewer or shorter ones."
        )
    chosen = windows[torch.linspace(0, len(windows) - 1, wanted).long()]
    order = torch.randperm(wanted, generator=torch.Generator().manual_seed(0))
    return Corpus(train, chosen[order[:level]], chosen[order[level:]], len(table), text.sha256)


# --- the network -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The network's sizes. The defaults make 0.33 M weights in matrices."""

    width: int = 96
    depth: int = 3
    heads: int = 4
    context: int = 64


class Factored(nn.Module):
    """A linear layer that is the product of two thinner ones: W = A B of rank r at most."""

    def __init__(self, cols: int, rows: int, rank: int) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.empty(rows, rank))
        self.right = nn.Parameter(torch.empty(rank, cols))

    @property
    def weight(self) -> Tensor:
        """A B, (rows, cols)."""
        return self.left @ self.right

    def forward(self, x: Tensor) -> Tensor:
        """x (…, cols) -> (…, rows)."""
        return functional.linear(functional.linear(x, self.right), self.left)


class Block(nn.Module):
    """Attention and an MLP, each behind an RMS norm and beside a residual."""

    def __init__(self, shape: Shape, rank: int) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norms = nn.ModuleList([nn.RMSNorm(shape.width), nn.RMSNorm(shape.width)])
        self.layers = nn.ModuleDict()
        for name, (tall, wide) in MATRICES.items():
            rows, cols = tall * shape.width, wide * shape.width
            self.layers[name] = Factored(cols, rows, rank) if rank else nn.Linear(cols, rows, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, width) -> (B, T, width)."""
        batch, length, width = x.shape
        layers, y = self.layers, self.norms[0](x)
        split = (batch, length, self.heads, width // self.heads)
        q, k, v = (layers[name](y).view(split).transpose(1, 2) for name in ("q", "k", "v"))
        q, k = rotated(q), rotated(k)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, head width)
        x = x + layers["o"](mixed.transpose(1, 2).reshape(batch, length, width))
        return x + layers["down"](functional.gelu(layers["up"](self.norms[1](x))))


class Network(nn.Module):
    """The transformer; a `rank` above 0 makes every matrix a product of that rank."""

    def __init__(self, shape: Shape, symbols: int, rank: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, shape.width)
        self.blocks = nn.ModuleList([Block(shape, rank) for _ in range(shape.depth)])
        self.norm = nn.RMSNorm(shape.width)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> logits (B, T, symbols)."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.embedding.weight)

    def matrices(self) -> dict[str, Any]:
        """{"0.q": its nn.Linear or Factored, …}: every matrix that the lab looks at."""
        blocks = enumerate(self.blocks)
        return {f"{i}.{name}": block.layers[name] for i, block in blocks for name in MATRICES}  # type: ignore[index, union-attr]


def rotated(x: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): pairs of x (B, heads, T, even width) turned by angles."""
    half = x.shape[-1] // 2
    rates = 10000.0 ** (-torch.arange(half) / half)
    angles = torch.arange(x.shape[-2])[:, None] * rates  # (T, half)
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


@torch.no_grad()
def token_losses(network: Network, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (windows, T, symbols) and losses (windows, T) in nats a character."""
    logs = functional.log_softmax(network(windows[:, :-1]), dim=-1)
    return logs, -logs.gather(2, windows[:, 1:, None])[..., 0]


# --- the arms --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One way to train: an initialization, one penalty, or a parametrization.

    Every arm has the same AdamW weight decay, batches and steps.

    Attributes:
        name: key in files and tables.
        label: for figures.
        kind: "standard", "compact" (meant to be compact) or "control".
        nuclear: start from `nuclear_init_` with κ = 0.2.
        penalty: "trace" (c Σ‖W‖_*), "spectral" (c Σσ_1²), "frobenius" (c Σ‖W‖_F²) or "".
        coefficient: c ≥ 0.
        rank: train every matrix as a product of this rank; 0 is none.
    """

    name: str
    label: str
    kind: str = "compact"
    nuclear: bool = False
    penalty: str = ""
    coefficient: float = 0.0
    rank: int = 0


STANDARD = Arm("standard", "standard + weight decay", "standard")
NUCLEAR = Arm("nuclear", "nuclear initialization", nuclear=True)


def trace_arm(c: float) -> Arm:
    """Trace-norm regularization with this coefficient."""
    return Arm(f"trace_{c:g}", f"trace norm, c = {c:g}", penalty="trace", coefficient=c)


@torch.no_grad()
def make_network(arm: Arm, shape: Shape, symbols: int, generator: torch.Generator) -> Network:
    """An initialized network of this arm; the same generator state gives the same start but for the arm.

    Independent Gaussian entries of variance 1/cols; a product gets that variance through its factors.
    """
    network = Network(shape, symbols, arm.rank)
    layers = network.matrices().values()
    factors = [network.embedding.weight]
    for layer in layers:
        factors += [layer.right, layer.left] if arm.rank else [layer.weight]
    for factor in factors:
        nn.init.normal_(factor, std=factor.shape[1] ** -0.5, generator=generator)
    for layer in layers if arm.nuclear else ():
        nuclear_init_(layer.weight, DECAY, generator=generator)
    return network


def make_penalty(arm: Arm, network: Network, generator: torch.Generator) -> Callable[[], Tensor | float]:
    """An arm's penalty at a network's matrices as they are when it is called.

    σ_1 comes from one step of power iteration a call, from vectors that are kept between the calls.
    """
    layers, c = list(network.matrices().values()), arm.coefficient
    vectors = [torch.randn(layer.weight.shape[1], generator=generator) for layer in layers]

    def spectral() -> Tensor:
        found = []
        for i, weight in enumerate(layer.weight for layer in layers):
            with torch.no_grad():
                left = functional.normalize(weight @ vectors[i], dim=0)
                vectors[i] = functional.normalize(weight.T @ left, dim=0)
            found.append(left @ weight @ vectors[i])
        return c * torch.stack(found).square().sum()

    kinds: dict[str, Callable[[], Tensor | float]] = {
        "": lambda: 0.0,
        "trace": lambda: trace_norm_penalty([layer.weight for layer in layers], c),
        "frobenius": lambda: c * torch.stack([layer.weight.square().sum() for layer in layers]).sum(),
        "spectral": spectral,
    }
    return kinds[arm.penalty]


# --- training --------------------------------------------------------------------------------------------


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


def train(
    arm: Arm, seed: int, recipe: Recipe, shape: Shape, corpus: Corpus
) -> Iterator[tuple[float | None, int, Network]]:
    """(level, step, network) before training (level None) and at each level that it meets, in order.

    The networks' layers are all nn.Linear, their parameters float16 values held in float32. Same seed, same
    weights; the batches depend on the seed alone, so that arms of one seed see the same text.
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

    def between(share: float) -> dict[str, Tensor]:
        return {key: torch.lerp(before[key], after[key], share) for key in before}

    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    yield None, 0, dense(before, shape, corpus.symbols)
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
                low, high = (low, middle) if loss_at(between(middle)) <= left[0] else (middle, high)
            yield left.pop(0), step, dense(between(high), shape, corpus.symbols)
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
