"""Runs of the trained experiment: one arm and seed -> its numbers; many of them, resumable; and the tuning.

A finished run is a small JSON file whose name holds a fingerprint of everything that it depends on: arm,
seed, recipe, sizes and text. What is there is never run again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spi_utils.errors import AnalysisError
from spi_utils.lab.arms import Arm, control_arm, low_rank_arm
from spi_utils.lab.damage import (
    FORMATS,
    Judge,
    formats_damage,
    layer_damage,
    layer_statistics,
    noise_damage,
    plan_damage,
)
from spi_utils.lab.network import Corpus, Shape, load_corpus
from spi_utils.lab.training import Recipe, Snapshot, train
from spi_utils.progress import progress, spread
from spi_utils.runs import fingerprint, read_json, write_json

SCHEMA = 1
TUNING_SEED = 1000  # no seed of the experiment
FROBENIUS_GRID = (3e-4, 6e-4, 1e-3)
SPECTRAL_GRID = (1e-2, 3e-2, 1e-1)
RANK_GRID = (20, 28, 36)

Result = dict[str, Any]


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
    for snapshot in train(arm, seed, setting.recipe, setting.shape, corpus):
        judge = Judge(snapshot.network, corpus.judge)
        statistics = layer_statistics(snapshot.network)
        found["levels"].append(_level(snapshot, judge, statistics))
        if snapshot.level == setting.recipe.levels[-1]:
            found["reached"] = True
            found["final"] = {
                "noise": noise_damage(judge, seed),
                "layers": {fmt: layer_damage(judge, fmt) for fmt in ("nf4", "int3")},
                "plans": plan_damage(judge, statistics, seed),
                "weights": {name: weight.numel() for name, weight in judge.weights.items()},
            }
    return found


def _level(snapshot: Snapshot, judge: Judge, statistics: dict[str, dict[str, Any]]) -> Result:
    sigma = np.array([row["sigma"] for row in statistics.values()])  # (matrices, M)
    layers = {
        name: {key: _plain(value) for key, value in row.items() if key != "sigma"}
        for name, row in statistics.items()
    }
    return {
        "level": snapshot.level,
        "step": snapshot.step,
        "loss": snapshot.loss,
        "judge_loss": float(judge.losses.double().mean()),
        "damage": formats_damage(judge, FORMATS),
        "layers": layers,
        # Mean over the matrices of σ_k/σ_1: the spectrum's shape.
        "shape": [round(float(value), 5) for value in (sigma / sigma[:, :1]).mean(axis=0)],
    }


def _plain(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def run_all(
    arms: Sequence[Arm], seeds: Sequence[int], setting: Setting, folder: Path, *, workers: int | None = None
) -> list[Result]:
    """Every arm with every seed, from `folder` where a run is finished; seeds outermost.

    Args:
        workers: processes; None is one a core. The numbers don't depend on it.

    Raises:
        AnalysisError: two arms with one name.
    """
    if len({arm.name for arm in arms}) != len(arms):
        raise AnalysisError(f"Two arms share a name: {sorted(arm.name for arm in arms)}.")
    corpus = load_corpus(setting.shape.context, setting.level_windows, setting.judge_windows)
    jobs = [(arm, seed, _path(folder, arm, seed, setting, corpus)) for seed in seeds for arm in arms]
    missing = [(arm, seed, setting, path) for arm, seed, path in jobs if not path.exists()]
    done = len(jobs) - len(missing)
    finished: Iterator[None] = spread(_run_and_keep, missing, workers=workers, backend="loky")
    for _ in progress(finished, len(jobs), "runs", done=done):
        pass
    return [read_json(path, SCHEMA, "run of the lab") for _, _, path in jobs]


def _run_and_keep(arm: Arm, seed: int, setting: Setting, path: Path) -> None:
    write_json(path, run_arm(arm, seed, setting))


def _path(folder: Path, arm: Arm, seed: int, setting: Setting, corpus: Corpus) -> Path:
    key = fingerprint({"arm": asdict(arm), "seed": seed, "setting": asdict(setting), "text": corpus.sha256})
    return folder / f"{arm.name}-{seed}-{key[:12]}.json"


# --- controls of equal loss and of equal effective rank ---------------------------------------------------


def last(result: Result) -> Result:
    """A run's numbers at the last level."""
    return result["levels"][-1]


def layer_mean(level: Result, statistic: str) -> float:
    """Mean of a statistic over the matrices that have it."""
    values = [row[statistic] for row in level["layers"].values() if row[statistic] is not None]
    return float(np.mean(values)) if values else math.nan


def tune_controls(
    reference: Arm, setting: Setting, folder: Path, *, workers: int | None = None
) -> tuple[list[Arm], list[dict[str, Any]]]:
    """The control arms that match `reference` on a seed of their own, and the table they were chosen from.

    Spectral and Frobenius penalties: the coefficient that reaches the last level in the number of steps
    nearest to the reference's, so that their loss is equal after equal training. Low rank: the rank whose
    effective rank at the last level is nearest (both as ratios).
    """
    grid = {
        "frobenius": [control_arm("frobenius", c) for c in FROBENIUS_GRID],
        "spectral": [control_arm("spectral", c) for c in SPECTRAL_GRID],
        "low_rank": [low_rank_arm(rank) for rank in RANK_GRID],
    }
    (target,) = run_all([reference], [TUNING_SEED], setting, folder, workers=workers)
    chosen, table = [], [_tuning_row(target)]
    for name, arms in grid.items():
        # One call an arm: the grid's arms share a name, their files don't.
        runs = [run_all([arm], [TUNING_SEED], setting, folder, workers=workers)[0] for arm in arms]
        key = "effective_rank_rel" if name == "low_rank" else "step"
        rows = [_tuning_row(run) for run in runs]
        gaps = [abs(math.log(row[key] / table[0][key])) if row["reached"] else math.inf for row in rows]
        if math.isinf(min(gaps)):
            raise AnalysisError(
                f"No {name} control reached loss {setting.recipe.levels[-1]} in {setting.recipe.limit} "
                "steps; "
                "raise the limit or the last level."
            )
        chosen.append(arms[int(np.argmin(gaps))])
        table += rows
    return chosen, table


def _tuning_row(result: Result) -> dict[str, Any]:
    level = last(result)
    return {
        "arm": result["arm"]["label"],
        "reached": result["reached"],
        "step": level["step"],
        "effective_rank_rel": layer_mean(level, "effective_rank_rel"),
    }
