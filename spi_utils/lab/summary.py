"""Runs of the lab -> numbers with intervals: what each arm cost and suffered, and what went along with it.

The unit of chance is the seed. Intervals are Student's t (n − 1 degrees of freedom) over the few seeds;
damage is compared as logarithms, paired by seed, so that exp(mean) is a ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from spi_utils.lab.correlations import (
    DAMAGES,
    across_training,
    correlations,
    damage,
    over_seeds,
    t_estimate,
)
from spi_utils.lab.experiment import Result, last, layer_mean
from spi_utils.lab.network import MATRICES
from spi_utils.stats import Estimate, holm_family

COMPACTNESS = "nuclear_rank_90_rel"  # the preprint's: the share of singular values that hold 90 % of Σσ
MIN_SEEDS = 3  # below, an interval's own error is too large for a verdict


def by_arm(results: Sequence[Result]) -> dict[str, dict[int, Result]]:
    """{arm: {seed: run}} of the runs that reached the last level, arms in the order of the results."""
    found: dict[str, dict[int, Result]] = {}
    for result in results:
        runs = found.setdefault(result["arm"]["name"], {})
        if result["reached"]:
            runs[result["seed"]] = result
    return found


def compactness(result: Result) -> float:
    """Mean over the matrices of the share of singular values that hold 90 % of Σσ; low is compact."""
    return layer_mean(last(result), COMPACTNESS)


def log_ratio(
    runs: Mapping[int, Result], base: Mapping[int, Result], value: Callable[[Result], float]
) -> Estimate | None:
    """Estimate of ln(value/base's value) over the seeds that both have; None without any."""
    shared = sorted(set(runs) & set(base))
    if not shared:
        return None
    return t_estimate(math.log(value(runs[seed]) / value(base[seed])) for seed in shared)


def arm_table(results: Sequence[Result], base: str = "standard") -> list[dict[str, Any]]:
    """A row an arm: training, spectra, damage, and all of it against the arm `base` (with Holm's p)."""
    arms = by_arm(results)
    adjusted = {kind: _against(arms, base, kind) for kind in DAMAGES}
    rows = []
    for name, runs in arms.items():
        arm = next(one["arm"] for one in results if one["arm"]["name"] == name)
        tried = sum(one["arm"]["name"] == name for one in results)
        row: dict[str, Any] = {key: arm[key] for key in ("name", "label", "kind")}
        row |= {"runs": tried, "reached": len(runs)}
        if runs:
            row |= _arm_numbers(list(runs.values()))
            found = log_ratio(runs, arms[base], compactness)
            row["compactness_ratio"] = found.as_dict() if found and name != base else None
            row["damage_ratio"] = {k: found[name].as_dict() for k, found in adjusted.items() if name in found}
            row["points"] = [
                {"seed": seed, COMPACTNESS: compactness(one), "kl": {k: damage(one, k) for k in DAMAGES}}
                for seed, one in runs.items()
            ]
        rows.append(row)
    return rows


def _against(arms: Mapping[str, Mapping[int, Result]], base: str, kind: str) -> dict[str, Estimate]:
    """ln(arm / base) of one damage for every other arm; Holm's family is the arms."""
    found = {
        name: log_ratio(runs, arms[base], partial(damage, kind=kind))
        for name, runs in arms.items()
        if name != base
    }
    return holm_family({name: one for name, one in found.items() if one is not None})


def _arm_numbers(runs: Sequence[Result]) -> dict[str, Any]:
    return {
        "step": float(np.mean([last(one)["step"] for one in runs])),
        "loss": float(np.mean([last(one)["loss"] for one in runs])),
        "judge_loss": float(np.mean([last(one)["judge_loss"] for one in runs])),
        **{
            key: t_estimate(layer_mean(last(one), key) for one in runs).as_dict()
            for key in ("alpha_hill", "effective_rank_rel", COMPACTNESS, "nf4_error")
        },
        "kl": {kind: t_estimate(damage(one, kind) for one in runs).as_dict() for kind in DAMAGES},
        "dloss": {kind: t_estimate(damage(one, kind, "dloss") for one in runs).as_dict() for kind in DAMAGES},
    }


def alpha_through_training(results: Sequence[Result], kind: str = "nf4") -> dict[str, dict[str, Any] | None]:
    """For each arm: ρ between α (Hill) and damage over the levels of a run, over seeds."""
    found = {}
    for name, runs in by_arm(results).items():
        one = over_seeds({seed: [across_training(run, "alpha_hill", kind)] for seed, run in runs.items()})
        found[name] = one.as_dict() if one else None
    return found


def plan_table(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """ln of ratios of KL: a threshold's plan to random plans, and the two ends of α; by arm and over all."""

    def ratio(run: Result, key: str, base: str) -> float:
        plans = run["final"]["plans"]
        return math.log(max(plans[key], 1e-9) / max(plans[base], 1e-9))

    pairs = [("high", "low"), *((key, "random") for key in ("high", "low", "flat", "compact"))]
    arms = by_arm(results)
    groups = {name: {seed: [run] for seed, run in runs.items()} for name, runs in arms.items() if runs}
    seeds = sorted({seed for runs in arms.values() for seed in runs})
    groups["all arms"] = {seed: [runs[seed] for runs in arms.values() if seed in runs] for seed in seeds}
    return {
        name: {
            f"{key}/{base}": found.as_dict() if found else None
            for key, base in pairs
            for found in [
                over_seeds({s: [ratio(run, key, base) for run in runs] for s, runs in held.items()})
            ]
        }
        for name, held in groups.items()
    }


def layer_costs(results: Sequence[Result], kind: str = "nf4") -> list[dict[str, Any]]:
    """For each arm: mean KL of one matrix of each type alone in `kind`, the sum of all, all at once."""
    rows = []
    for name, runs in by_arm(results).items():
        alone = [one["final"]["layers"][kind] for one in runs.values()]
        if not alone:
            continue
        row: dict[str, Any] = {"arm": name}
        for title in MATRICES:
            row[title] = float(
                np.mean([v for one in alone for k, v in one.items() if k.endswith("." + title)])
            )
        row["sum of all matrices alone"] = float(np.mean([sum(one.values()) for one in alone]))
        row["all at once"] = float(np.mean([damage(one, kind) for one in runs.values()]))
        rows.append(row)
    return rows


def through_training(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row for each arm, level and matrix type: mean α, effective rank, compactness; the arm's damage."""
    rows = []
    for name, runs in by_arm(results).items():
        for i, level in enumerate(next(iter(runs.values()))["levels"] if runs else []):
            levels = [run["levels"][i] for run in runs.values()]
            for kind in MATRICES:
                row: dict[str, Any] = {"arm": name, "level": level["level"], "type": kind}
                for key in ("alpha_hill", "effective_rank_rel", COMPACTNESS):
                    row[key] = _type_mean(levels, kind, key)
                row["kl_nf4"] = float(f"{np.mean([one['damage']['nf4']['kl'] for one in levels]):.4g}")
                rows.append(row)
    return rows


def _type_mean(levels: Sequence[Result], kind: str, key: str) -> float | None:
    found = [
        row[key] for level in levels for name, row in level["layers"].items() if name.endswith("." + kind)
    ]
    held = [value for value in found if value is not None]
    return float(f"{np.mean(held):.4g}") if held else None


def shapes(results: Sequence[Result], points: int = 24) -> dict[str, Any]:
    """Mean over matrices and seeds of σ_k/σ_1 at `points` ranks k, for every arm and level; for a figure."""
    size = len(results[0]["levels"][0]["shape"])
    ranks = np.unique(np.linspace(0, size - 1, points).round().astype(int))
    found: dict[str, Any] = {"size": size, "ranks": [int(k) + 1 for k in ranks], "arms": {}}
    for name, runs in by_arm(results).items():
        found["arms"][name] = [
            {
                "level": levels[0]["level"],
                "sigma": [
                    float(f"{x:.4g}") for x in np.mean([one["shape"] for one in levels], axis=0)[ranks]
                ],
                COMPACTNESS: float(np.mean([layer_mean(one, COMPACTNESS) for one in levels])),
            }
            for levels in zip(*(run["levels"] for run in runs.values()), strict=True)
        ]
    return found


def matched(results: Sequence[Result], reference: str) -> dict[str, dict[str, Any]]:
    """ln(reference arm / control) of compactness and of each damage, paired by seed, for every control."""
    arms = by_arm(results)
    controls = {one["arm"]["name"] for one in results if one["arm"]["kind"] == "control"}
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(controls & {name for name, runs in arms.items() if runs}):
        values: dict[str, Callable[[Result], float]] = {
            "compactness": compactness,
            **{kind: partial(damage, kind=kind) for kind in DAMAGES},
        }
        ratios = {key: log_ratio(arms[reference], arms[name], value) for key, value in values.items()}
        found[name] = {key: one.as_dict() if one else None for key, one in ratios.items()}
    return found


def summarize(results: Sequence[Result], reference: str, **notes: Any) -> dict[str, Any]:
    """Everything that tables, figures and verdicts are made of, JSON-able.

    Args:
        results: runs of `run_all`, the arm "standard" among them.
        reference: the arm that the controls were tuned to.
        notes: what else shall stand in it, first.
    """
    found = {
        "schema": 1,
        **notes,
        "reference": reference,
        "seeds": sorted({result["seed"] for result in results}),
        "arms": arm_table(results),
        "matched": matched(results, reference),
        "correlations": correlations(results),
        "alpha_through_training": alpha_through_training(results),
        "plans": plan_table(results),
        "layer_costs": layer_costs(results),
        "through_training": through_training(results),
        "shapes": shapes(results),
    }
    return _short(found)


def _short(value: Any) -> Any:
    """The same with numbers of five digits, and estimates without what their interval already says."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        dropped = {"se", "p"} if "clusters" in value else set()
        if value.get("p_holm", 0) is None:
            dropped.add("p_holm")
        return {key: _short(one) for key, one in value.items() if key not in dropped}
    return [_short(one) for one in value] if isinstance(value, list | tuple) else value
