"""A small character-level transformer and the text that it learns: CPython's own `help()` topics.

Pre-norm blocks without biases: q, k, v, o, up, down are the matrices that the lab makes compact and
quantizes; embedding and head are one tensor and stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spi_utils.errors import EvaluationError
from spi_utils.texts import load_text

PIECE = 4096  # characters; every HELD-th piece of the text is held out
HELD = 8
# (rows, cols) of each matrix, in widths
MATRICES = {"q": (1, 1), "k": (1, 1), "v": (1, 1), "o": (1, 1), "up": (4, 1), "down": (1, 4)}


@dataclass(frozen=True)
class Shape:
    """The network's sizes. The defaults make 0.33 M weights in matrices."""

    width: int = 96
    depth: int = 3
    heads: int = 4
    context: int = 64


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


def rotated(x: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): pairs of x (B, heads, T, even width) turned by angles."""
    half = x.shape[-1] // 2
    rates = 10000.0 ** (-torch.arange(half) / half)
    angles = torch.arange(x.shape[-2])[:, None] * rates  # (T, half)
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def matrices(network: Network) -> Iterator[tuple[str, Any]]:
    """("0.q", its nn.Linear or Factored), … for every matrix that the lab looks at."""
    for depth, block in enumerate(network.blocks):
        for name, layer in block.layers.items():  # type: ignore[operator, union-attr]
            yield f"{depth}.{name}", layer


@torch.no_grad()
def initialize(network: Network, generator: torch.Generator) -> None:
    """Independent Gaussian entries of variance 1/cols; a product gets that variance through its factors."""
    factors = [network.embedding.weight]
    for _, layer in matrices(network):
        factors += [layer.right, layer.left] if isinstance(layer, Factored) else [layer.weight]
    for factor in factors:
        nn.init.normal_(factor, std=factor.shape[1] ** -0.5, generator=generator)


@torch.no_grad()
def token_losses(network: Network, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (windows, T, symbols) and losses (windows, T) in nats a character."""
    logs = functional.log_softmax(network(windows[:, :-1]), dim=-1)
    return logs, -logs.gather(2, windows[:, 1:, None])[..., 0]
