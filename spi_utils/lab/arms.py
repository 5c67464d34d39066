"""The arms of the experiment: what differs between two networks, and the penalties that make the difference.

Every arm has the same AdamW weight decay, batches and steps; only the initialization, one penalty, or the
parametrization differs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spi_utils.compactness import nuclear_init_, trace_norm_penalty
from spi_utils.errors import AnalysisError
from spi_utils.lab.network import Factored, Network, Shape, initialize, matrices

DECAY = 0.2  # σ_k ~ e^(-0.2k), the preprint's compact spectrum
PENALTIES = ("", "trace", "spectral", "frobenius")


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

    def __post_init__(self) -> None:
        if self.penalty not in PENALTIES:
            raise AnalysisError(f"arm {self.name!r}: penalty {self.penalty!r} is none of {PENALTIES}.")
        if not (math.isfinite(self.coefficient) and self.coefficient >= 0):
            raise AnalysisError(f"arm {self.name!r}: coefficient {self.coefficient!r}; expected 0 or more.")
        if self.rank and self.nuclear:
            raise AnalysisError(
                f"arm {self.name!r}: nuclear initialization fills whole matrices, not factors."
            )


STANDARD = Arm("standard", "standard + weight decay", "standard")
NUCLEAR = Arm("nuclear", "nuclear initialization", nuclear=True)


def trace_arm(coefficient: float) -> Arm:
    """Trace-norm regularization with this coefficient."""
    name = f"trace_{coefficient:g}"
    return Arm(name, f"trace norm, c = {coefficient:g}", penalty="trace", coefficient=coefficient)


def both_arm(coefficient: float) -> Arm:
    """Nuclear initialization and trace-norm regularization."""
    label = f"both, c = {coefficient:g}"
    return Arm("both", label, nuclear=True, penalty="trace", coefficient=coefficient)


def control_arm(penalty: str, coefficient: float) -> Arm:
    """A penalty on σ_1² or on ‖W‖_F²: smaller norms without the preference for few directions."""
    title = {"spectral": "spectral norm", "frobenius": "Frobenius norm"}[penalty]
    label = f"{title}, c = {coefficient:g}"
    return Arm(penalty, label, "control", penalty=penalty, coefficient=coefficient)


def low_rank_arm(rank: int) -> Arm:
    """Every matrix a product of this rank."""
    return Arm("low_rank", f"low rank, r = {rank}", "control", rank=rank)


def make_network(arm: Arm, shape: Shape, symbols: int, generator: torch.Generator) -> Network:
    """An initialized network of this arm; the same generator state gives the same start but for the arm."""
    if arm.rank > shape.width:
        raise AnalysisError(f"arm {arm.name!r}: rank {arm.rank} is above the width {shape.width}.")
    network = Network(shape, symbols, arm.rank or None)
    initialize(network, generator)
    if arm.nuclear:
        for _, layer in matrices(network):
            nuclear_init_(layer.weight, DECAY, generator=generator)
    return network


class Penalty:
    """An arm's penalty on a network's matrices; keeps the power iteration's vectors between steps."""

    def __init__(self, arm: Arm, network: Network, generator: torch.Generator) -> None:
        self.arm = arm
        self.layers = [layer for _, layer in matrices(network)]
        shapes = [_shape(layer) for layer in self.layers]
        self.vectors = [torch.randn(cols, generator=generator) for _, cols in shapes]

    def __call__(self) -> Tensor | float:
        """The penalty at the weights as they are."""
        arm = self.arm
        if not arm.penalty or not arm.coefficient:
            return 0.0
        weights = [layer.weight for layer in self.layers]
        if arm.penalty == "trace":
            return trace_norm_penalty(weights, arm.coefficient)
        if arm.penalty == "frobenius":
            return arm.coefficient * torch.stack([weight.square().sum() for weight in weights]).sum()
        return arm.coefficient * torch.stack(top_singular_values(weights, self.vectors)).square().sum()


def top_singular_values(weights: Sequence[Tensor], vectors: list[Tensor]) -> list[Tensor]:
    """σ_1 of every weight by one step of power iteration from `vectors`, which are updated in place."""
    found = []
    for i, weight in enumerate(weights):
        with torch.no_grad():
            left = torch.nn.functional.normalize(weight @ vectors[i], dim=0)
            vectors[i] = torch.nn.functional.normalize(weight.T @ left, dim=0)
        found.append(left @ weight @ vectors[i])
    return found


def _shape(layer: Any) -> tuple[int, int]:
    if isinstance(layer, Factored):
        return layer.left.shape[0], layer.right.shape[1]
    return layer.weight.shape[0], layer.weight.shape[1]
