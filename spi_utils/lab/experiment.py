"""The trained experiment: one arm and seed -> its numbers; many of them, resumable.

What low precision costs a network: perturb its matrices, score held-out characters, put them back. Damage is
KL(16-bit ‖ perturbed) and Δloss in nats a character, both on the judge windows. The number formats share
NF4's blocks of 64 entries and their absmax, so that they differ in their levels alone.

A finished run is a small JSON file whose name holds a fingerprint of everything that it depends on: arm,
seed, recipe, sizes and text. What is there is never run again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spi_utils.formats import dequantize, quantize
from spi_utils.lab.training import Arm, Network, Recipe, Shape, load_corpus, token_losses, train
from spi_utils.progress import progress, spread
from spi_utils.runs import fingerprint, read_json, write_json
from spi_utils.spectra import analyze_matrix

SCHEMA = 1
GROUP = 64  # entries that share a scale, as in NF4
FORMATS = ("nf4", "int4", "int3")
RANDOM_PLANS = 4
STATISTICS = (
    *("alpha_hill", "alpha_pl", "alpha_decay", "alpha_excess", "effective_rank_rel"),
    *("nuclear_rank_90_rel", "stable_rank", "log_frobenius_norm", "log_spectral_norm"),
)

Result = dict[str, Any]


# --- damage ----------------------------------------------------------------------------------------------


def rounded(weight: Tensor, fmt: str) -> Tensor:
    """The float32 matrix that `fmt` ("nf4", "int4", "int3") makes of a matrix of float16 values.

    int4, int3: blocks of 64 entries in row-major order, absmax / 7 or / 3 as step, round half to even: levels
    −7…7 and −3…3.
    """
    if fmt == "nf4":
        # As one row, which is the same blocks: bitsandbytes 0.50.2's CPU kernel takes wrong scales for rows
        # whose width isn't a multiple of 64 (relative error .28 instead of .09 at 96 × 96).
        return dequantize(quantize(weight.reshape(1, -1), "nf4")).view(weight.shape)
    largest = 2 ** (int(fmt.removeprefix("int")) - 1) - 1
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % GROUP)).view(-1, GROUP)
    step = flat.abs().amax(dim=1, keepdim=True) / largest
    codes = torch.round(flat / step.clamp(min=torch.finfo(flat.dtype).tiny))
    return (codes * step).flatten()[: weight.numel()].view(weight.shape)


class Judge:
    """One network, its reference output on the judge windows, and its whole weights to come back to."""

    def __init__(self, network: Network, windows: Tensor) -> None:
        self.network, self.windows = network, windows
        self.layers = network.matrices()
        self.weights = {name: layer.weight.clone() for name, layer in self.layers.items()}
        self.logs, self.losses = token_losses(network, windows)

    def damage(self, change: str | Callable[[Tensor], Tensor], names: Iterable[str] | None = None) -> dict:
        """{"kl", "dloss"} with the named matrices (all by default) in a format, or changed by a function."""
        chosen = list(self.layers if names is None else names)
        act = partial(rounded, fmt=change) if isinstance(change, str) else change
        for name in chosen:
            self.layers[name].weight.copy_(act(self.weights[name]))
        logs, losses = token_losses(self.network, self.windows)
        for name in chosen:
            self.layers[name].weight.copy_(self.weights[name])
        kl = (self.logs.exp() * (self.logs - logs)).sum(dim=-1, dtype=torch.float64).mean()
        return {"kl": float(kl), "dloss": float((losses - self.losses).double().mean())}


def layer_statistics(network: Network) -> dict[str, dict[str, float]]:
    """For each matrix: the pipeline's spectral statistics, and NF4's relative error."""
    found: dict[str, dict[str, float]] = {}
    for name, layer in network.matrices().items():
        spectrum = analyze_matrix(layer.weight, farms=False, seed=0)
        error = (rounded(layer.weight, "nf4") - layer.weight).norm() / layer.weight.norm()
        found[name] = {key: spectrum.statistics[key] for key in STATISTICS}
        found[name]["nf4_error"] = float(error)
    return found


def plan_damage(judge: Judge, statistics: Mapping[str, Mapping[str, Any]], seed: int) -> dict[str, float]:
    """KL of hybrids that keep half of the weights in 16-bit and the rest in int3, chosen by a threshold.

    Keys: "high" and "low" protect that end of α (Hill), "flat" and "compact" that end of the effective rank,
    "random" is the mean over a few draws. Layers are taken in order while they fit.
    """

    def plan_kl(order: Iterable[str]) -> float:
        left, low = sum(weight.numel() for weight in judge.weights.values()) / 2, []
        for name in order:
            size = judge.weights[name].numel()
            if size <= left:
                left -= size
            else:
                low.append(name)
        return float(judge.damage("int3", low)["kl"])

    ends = {"high": ("alpha_hill", -1), "low": ("alpha_hill", 1)}
    ends |= {"flat": ("effective_rank_rel", -1), "compact": ("effective_rank_rel", 1)}
    kept = {
        end: plan_kl(sorted(statistics, key=lambda name: way * statistics[name][key]))
        for end, (key, way) in ends.items()
    }
    rng = np.random.default_rng(30_000 + seed)
    draws = [plan_kl(rng.permutation(list(statistics))) for _ in range(RANDOM_PLANS)]
    return {**kept, "random": float(np.mean(draws))}


# --- runs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What all runs of an experiment share."""

    recipe: Recipe = field(default_factory=Recipe)
    shape: Shape = field(default_factory=Shape)
    level_windows: int = 40
    judge_windows: int = 64


def run_arm(arm: Arm, seed: int, setting: Setting) -> Result:
    """Train one arm with one seed; its spectra and damage at every level, the full damage at the last one.

    `reached` says whether the last level was met. NaN statistics (an exponent that a spectrum doesn't have)
    are None.
    """
    corpus = load_corpus(setting.shape.context, setting.level_windows, setting.judge_windows)
    found: Result = {"schema": SCHEMA, "arm": asdict(arm), "seed": seed, "reached": False, "levels": []}
    for level, step, network in train(arm, seed, setting.recipe, setting.shape, corpus):
        judge, statistics = Judge(network, corpus.judge), layer_statistics(network)
        reached = {
            "level": level,
            "step": step,
            "loss": float(token_losses(network, corpus.level)[1].mean()),
            "judge_loss": float(judge.losses.double().mean()),
            "damage": {fmt: judge.damage(fmt) for fmt in FORMATS},
            "layers": {
                name: {key: float(f"{x:.6g}") if math.isfinite(x) else None for key, x in row.items()}
                for name, row in statistics.items()
            },
        }
        found["levels"].append(reached)
        if level == setting.recipe.levels[-1]:
            found["reached"] = True
            found["final"] = {
                "layers": {
                    fmt: {name: judge.damage(fmt, [name])["kl"] for name in judge.layers}
                    for fmt in ("nf4", "int3")
                },
                "plans": plan_damage(judge, statistics, seed),
                "weights": {name: weight.numel() for name, weight in judge.weights.items()},
            }
    return found


def run_all(
    arms: Sequence[Arm], seeds: Sequence[int], setting: Setting, folder: Path, *, workers: int | None = None
) -> list[Result]:
    """Every arm with every seed, from `folder` where a run is finished; seeds outermost.

    Args:
        workers: processes; None is one a core. The numbers don't depend on it.
    """
    corpus = load_corpus(setting.shape.context, setting.level_windows, setting.judge_windows)
    jobs = []
    for seed in seeds:
        for arm in arms:
            known = {"arm": asdict(arm), "seed": seed, "setting": asdict(setting), "text": corpus.sha256}
            path = folder / f"{arm.name}-{seed}-{fingerprint(known)[:12]}.json"
            jobs.append((arm, seed, setting, path))
    missing = [job for job in jobs if not job[3].exists()]
    finished = spread(_run_and_keep, missing, workers=workers, backend="loky")
    for _ in progress(finished, len(jobs), "runs", done=len(jobs) - len(missing)):
        pass
    return [read_json(path, SCHEMA, "run of the lab") for _, _, _, path in jobs]


def _run_and_keep(arm: Arm, seed: int, setting: Setting, path: Path) -> None:
    write_json(path, run_arm(arm, seed, setting))
