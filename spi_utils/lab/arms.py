"""The arms of the experiment: what differs between two networks, and the penalties that make the difference.

Every arm has the same AdamW weight decay, batches and steps; only the initialization, one penalty, or the
parametrization differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from spi_utils.compactness import nuclear_init_, trace_norm_penalty
from spi_utils.errors import AnalysisError
from spi_utils.lab.network import Network, Shape, initialize, matrices

DECAY = 0.2  # σ_k ~ e^(-0.2k), the preprint's compact spectrum


@dataclass(frozen=True)
class Arm:
    """One way to train.

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


def both_arm(c: float) -> Arm:
    """Nuclear initialization and trace-norm regularization."""
    return Arm("both", f"both, c = {c:g}", nuclear=True, penalty="trace", coefficient=c)


def control_arm(penalty: str, c: float) -> Arm:
    """A penalty on σ_1² or on ‖W‖_F²: smaller norms without the preference for few directions."""
    title = {"spectral": "spectral norm", "frobenius": "Frobenius norm"}[penalty]
    return Arm(penalty, f"{title}, c = {c:g}", "control", penalty=penalty, coefficient=c)


def low_rank_arm(rank: int) -> Arm:
    """Every matrix a product of this rank."""
    return Arm("low_rank", f"low rank, r = {rank}", "control", rank=rank)


def make_network(arm: Arm, shape: Shape, symbols: int, generator: torch.Generator) -> Network:
    """An initialized network of this arm; the same generator state gives the same start but for the arm."""
    if arm.rank > shape.width:
        raise AnalysisError(f"arm {arm.name!r}: rank {arm.rank} is above the width {shape.width}.")
    network = Network(shape, symbols, arm.rank)
    initialize(network, generator)
    if arm.nuclear:
        for _, layer in matrices(network):
            nuclear_init_(layer.weight, DECAY, generator=generator)
    return network


def make_penalty(arm: Arm, network: Network, generator: torch.Generator) -> Callable[[], Tensor | float]:
    """An arm's penalty at a network's matrices as they are when it is called.

    σ_1 comes from one step of power iteration a call, from vectors that are kept between the calls.
    """
    layers = [layer for _, layer in matrices(network)]
    c, vectors = arm.coefficient, [torch.randn(x.weight.shape[1], generator=generator) for x in layers]

    def spectral() -> Tensor:
        found = []
        for i, weight in enumerate(layer.weight for layer in layers):
            with torch.no_grad():
                left = normalize(weight @ vectors[i], dim=0)
                vectors[i] = normalize(weight.T @ left, dim=0)
            found.append(left @ weight @ vectors[i])
        return c * torch.stack(found).square().sum()

    kinds: dict[str, Callable[[], Tensor | float]] = {
        "": lambda: 0.0,
        "trace": lambda: trace_norm_penalty([layer.weight for layer in layers], c),
        "frobenius": lambda: c * torch.stack([layer.weight.square().sum() for layer in layers]).sum(),
        "spectral": spectral,
    }
    return kinds[arm.penalty]
