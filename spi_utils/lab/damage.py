"""What low precision costs a network: perturb its matrices, score held-out characters, put them back.

Damage is KL(16-bit ‖ perturbed) and Δloss in nats a character, both on the judge windows. The number formats
share NF4's blocks of 64 entries and their absmax, so that they differ in their levels alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spi_utils.errors import AnalysisError
from spi_utils.formats import dequantize, quantize
from spi_utils.lab.network import Network, matrices, token_losses
from spi_utils.spectra import analyze_matrix

GROUP = 64  # entries that share a scale, as in NF4
FORMATS = ("nf4", "int4", "int3")
NOISE_DRAWS = 4
RANDOM_PLANS = 4
STATISTICS = (
    "alpha_hill",
    "alpha_pl",
    "alpha_decay",
    "alpha_excess",
    "effective_rank_rel",
    "nuclear_rank_90_rel",
    "stable_rank",
    "log_frobenius_norm",
    "log_spectral_norm",
)


def rounded(weight: Tensor, fmt: str) -> Tensor:
    """The float32 matrix that `fmt` ("nf4", "int4", "int3") makes of a matrix of float16 values.

    int4, int3: blocks of 64 entries in row-major order, absmax / 7 or / 3 as step, round half to even: levels
    −7…7 and −3…3.
    """
    if fmt == "nf4":
        # As one row, which is the same blocks: bitsandbytes 0.50.2's CPU kernel takes wrong scales for rows
        # whose width isn't a multiple of 64 (relative error .28 instead of .09 at 96 × 96).
        return dequantize(quantize(weight.reshape(1, -1), "nf4")).view(weight.shape)
    if fmt not in FORMATS:
        raise AnalysisError(f"Unknown format {fmt!r}; the lab has {', '.join(FORMATS)}.")
    largest = 2 ** (int(fmt.removeprefix("int")) - 1) - 1
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % GROUP)).view(-1, GROUP)
    step = flat.abs().amax(dim=1, keepdim=True) / largest
    codes = torch.round(flat / step.clamp(min=torch.finfo(flat.dtype).tiny))
    return (codes * step).flatten()[: weight.numel()].view(weight.shape)


@dataclass
class Judge:
    """One network, its reference output on the judge windows, and its whole weights to come back to."""

    network: Network
    windows: Tensor

    def __post_init__(self) -> None:
        self.layers = dict(matrices(self.network))
        self.weights = {name: layer.weight.clone() for name, layer in self.layers.items()}
        self.logs, self.losses = token_losses(self.network, self.windows)

    def damage(self, change: Callable[[str, Tensor], Tensor], names: Iterable[str] | None = None) -> dict:
        """{"kl", "dloss"} with `change(name, weight)` in place of the named matrices (all by default)."""
        chosen = list(self.layers if names is None else names)
        for name in chosen:
            self.layers[name].weight.copy_(change(name, self.weights[name]))
        logs, losses = token_losses(self.network, self.windows)
        for name in chosen:
            self.layers[name].weight.copy_(self.weights[name])
        kl = (self.logs.exp() * (self.logs - logs)).sum(dim=-1, dtype=torch.float64).mean()
        return {"kl": float(kl), "dloss": float((losses - self.losses).double().mean())}


def formats_damage(judge: Judge, formats: Sequence[str] = FORMATS) -> dict[str, dict]:
    """Damage of every format on all matrices."""
    return {fmt: judge.damage(partial(_rounded, fmt)) for fmt in formats}


def noise_damage(judge: Judge, seed: int) -> dict:
    """Mean damage of Gaussian noise with the Frobenius norm of NF4's error, matrix by matrix."""
    generator = torch.Generator().manual_seed(20_000 + seed)

    def noisy(_: str, weight: Tensor) -> Tensor:
        noise = torch.randn(weight.shape, generator=generator)
        return weight + noise * ((rounded(weight, "nf4") - weight).norm() / noise.norm())

    draws = [judge.damage(noisy) for _ in range(NOISE_DRAWS)]
    return {key: float(np.mean([draw[key] for draw in draws])) for key in draws[0]}


def layer_damage(judge: Judge, fmt: str) -> dict[str, float]:
    """KL of each matrix in `fmt` alone, all others in 16-bit."""
    return {name: judge.damage(partial(_rounded, fmt), [name])["kl"] for name in judge.layers}


def layer_statistics(network: Network, seed: int = 0) -> dict[str, dict[str, Any]]:
    """For each matrix: the pipeline's spectral statistics, NF4's relative error, and σ (M,) descending."""
    found: dict[str, dict[str, Any]] = {}
    for name, layer in matrices(network):
        spectrum = analyze_matrix(layer.weight, farms=False, seed=seed)
        values: dict[str, Any] = {key: spectrum.statistics[key] for key in STATISTICS}
        error = (rounded(layer.weight, "nf4") - layer.weight).norm() / layer.weight.norm()
        found[name] = {**values, "nf4_error": float(error), "sigma": spectrum.singular_values}
    return found


def plan_damage(judge: Judge, statistics: Mapping[str, Mapping[str, Any]], seed: int) -> dict[str, float]:
    """KL of hybrids that keep half of the weights in 16-bit and the rest in int3, chosen by a threshold.

    Keys: "high" and "low" protect that end of α (Hill), "flat" and "compact" that end of the effective rank,
    "random" is the mean over a few draws. Layers are taken in order while they fit.
    """
    alpha = {name: row["alpha_hill"] for name, row in statistics.items()}
    rank = {name: row["effective_rank_rel"] for name, row in statistics.items()}
    orders = {
        "high": sorted(alpha, key=lambda name: -alpha[name]),
        "low": sorted(alpha, key=lambda name: alpha[name]),
        "flat": sorted(rank, key=lambda name: -rank[name]),
        "compact": sorted(rank, key=lambda name: rank[name]),
    }
    kept = {key: _plan_kl(judge, order) for key, order in orders.items()}
    rng = np.random.default_rng(30_000 + seed)
    draws = [_plan_kl(judge, list(rng.permutation(list(alpha)))) for _ in range(RANDOM_PLANS)]
    return {**kept, "random": float(np.mean(draws))}


def _plan_kl(judge: Judge, order: Sequence[str]) -> float:
    """KL with the first matrices of `order` in 16-bit, as many as fit into half of all weights."""
    left = sum(weight.numel() for weight in judge.weights.values()) / 2
    low = []
    for name in order:
        size = judge.weights[name].numel()
        if size <= left:
            left -= size
        else:
            low.append(name)
    return judge.damage(partial(_rounded, "int3"), low)["kl"]


def _rounded(fmt: str, _: str, weight: Tensor) -> Tensor:
    return rounded(weight, fmt)
