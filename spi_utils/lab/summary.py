"""Runs of the lab -> numbers with intervals: what each arm cost and suffered, and what went along with it.

The unit of chance is the seed. Intervals are Student's t (n − 1 degrees of freedom) over the few seeds;
damage is compared as logarithms, paired by seed, so that exp(mean) is a ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import spearmanr, t

from spi_utils.errors import EvaluationError
from spi_utils.lab.experiment import FORMATS, STATISTICS, Result, layer_mean
from spi_utils.lab.network import MATRICES
from spi_utils.stats import Estimate, holm_family

COMPACTNESS = "nuclear_rank_90_rel"  # the preprint's: the share of singular values that hold 90 % of Σσ
DAMAGES = (*FORMATS, "noise")
Arms = dict[str, dict[int, Result]]  # arm -> seed -> run, of the runs that reached the last level


def t_estimate(values: Iterable[float]) -> Estimate:
    """Mean, standard error, 95 % Student interval and p of "the mean is 0" over seeds; unbounded below two.

    Raises:
        EvaluationError: no value, or one that isn't finite.
    """
    x = np.array(list(values), dtype=np.float64)
    if not len(x) or not np.isfinite(x).all():
        raise EvaluationError(f"{len(x)} seeds, all finite: expected at least one; got {x.tolist()}.")
    mean, count = float(x.mean()), len(x)
    if count < 2:
        return Estimate(mean, math.inf, -math.inf, math.inf, 1.0, count)
    se = float(x.std(ddof=1) / math.sqrt(count))
    half = float(t.ppf(0.975, count - 1)) * se
    p = float(2 * t.sf(abs(mean) / se, count - 1)) if se else float(mean == 0)
    return Estimate(mean, se, mean - half, mean + half, p, count)


def over_seeds(values: Iterable[Sequence[float | None]]) -> dict[str, Any] | None:
    """Estimate over seeds of each seed's mean; None without a value, and seeds without one are left out."""
    means = [float(np.mean(held)) for row in values if (held := [v for v in row if v is not None])]
    return t_estimate(means).as_dict() if means else None


def log_ratio(
    runs: Mapping[int, Result], base: Mapping[int, Result], value: Callable[[Result], float]
) -> Estimate | None:
    """Estimate of ln(value/base's value) over the seeds that both have; None without any."""
    shared = sorted(set(runs) & set(base))
    found = [math.log(value(runs[seed]) / value(base[seed])) for seed in shared]
    return t_estimate(found) if found else None


def damage(result: Result, kind: str, key: str = "kl") -> float:
    """KL or Δloss of a run at the last level by format, or by noise ("noise"); nats a character."""
    one = result["final"]["noise"] if kind == "noise" else result["levels"][-1]["damage"][kind]
    return float(one[key])


def last_mean(result: Result, statistic: str = COMPACTNESS) -> float:
    """Mean of a statistic over a run's matrices at the last level; of the compactness low is compact."""
    return layer_mean(result["levels"][-1], statistic)


# --- what goes along with damage -------------------------------------------------------------------------


def rank_correlation(x: Sequence[float | None], y: Sequence[float]) -> float | None:
    """Spearman's ρ over the pairs that have both; None below four or without spread."""
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if a is not None and math.isfinite(a)]
    if len(pairs) < 4 or any(len(set(side)) < 2 for side in zip(*pairs, strict=True)):
        return None
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def across_models(runs: Sequence[Result], statistic: str, kind: str) -> float | None:
    """ρ over the arms of one seed at the last level: mean statistic against damage."""
    return rank_correlation([last_mean(one, statistic) for one in runs], [damage(one, kind) for one in runs])


def across_training(run: Result, statistic: str, kind: str) -> float | None:
    """ρ over the levels of one run: mean statistic against damage; the untrained network left out."""
    levels = [level for level in run["levels"] if level["level"] is not None]
    costs = [level["damage"][kind]["kl"] for level in levels]
    return rank_correlation([layer_mean(level, statistic) for level in levels], costs)


def within_model(run: Result, statistic: str, kind: str, *, same_type: bool = False) -> float | None:
    """ρ over the matrices of one run at the last level: statistic against the KL a weight of that matrix
    alone.

    With `same_type` both are taken relative to the mean of the matrix' type (q, k, …) first.
    """
    costs, weights, layers = (
        run["final"]["layers"][kind],
        run["final"]["weights"],
        run["levels"][-1]["layers"],
    )
    names = [name for name in costs if layers[name][statistic] is not None]
    x = [layers[name][statistic] for name in names]
    y = [math.log(max(costs[name], 1e-12) / weights[name]) for name in names]
    if same_type:
        types = np.array([name.split(".", 1)[1] for name in names])
        x, y = (
            [v - np.mean(np.array(of)[types == g]) for v, g in zip(of, types, strict=True)] for of in (x, y)
        )
    return rank_correlation(x, y)


def correlations(arms: Arms, seeds: Sequence[int]) -> dict[str, dict[str, dict[str, Any]]]:
    """{view: {statistic: {format: Spearman's ρ with the damage, over seeds}}}, four views."""
    by_seed = [[runs[seed] for runs in arms.values() if seed in runs] for seed in seeds]
    views: dict[str, Callable[[list[Result], str, str], list[float | None]]] = {
        "across models": lambda runs, key, kind: [across_models(runs, key, kind)],
        "across training": lambda runs, *at: [across_training(one, *at) for one in runs],
        "within a model": lambda runs, *at: [within_model(one, *at) for one in runs],
        "within a type": lambda runs, *at: [within_model(one, *at, same_type=True) for one in runs],
    }
    return {
        view: {
            key: {
                kind: over_seeds(find(runs, key, kind) for runs in by_seed if runs)
                for kind in ("nf4", "int3")
            }
            for key in (*STATISTICS, "nf4_error")
        }
        for view, find in views.items()
    }


# --- the arms --------------------------------------------------------------------------------------------


def arm_table(results: Sequence[Result], arms: Arms) -> list[dict[str, Any]]:
    """A row an arm: training, spectra, damage, and all of it against the standard arm (with Holm's p)."""
    base = arms["standard"]
    adjusted: dict[str, dict[str, Estimate]] = {}
    for kind in DAMAGES:  # Holm's family is the arms
        found = {name: log_ratio(runs, base, partial(damage, kind=kind)) for name, runs in arms.items()}
        adjusted[kind] = holm_family({k: one for k, one in found.items() if one and k != "standard"})
    rows = []
    for name, held in arms.items():
        tried = [one["arm"] for one in results if one["arm"]["name"] == name]
        row: dict[str, Any] = {key: tried[0][key] for key in ("name", "label", "kind")}
        row |= {"runs": len(tried), "reached": len(held)}
        if runs := list(held.values()):
            for key in ("step", "loss", "judge_loss"):
                row[key] = float(np.mean([one["levels"][-1][key] for one in runs]))
            for key in ("alpha_hill", "effective_rank_rel", COMPACTNESS, "nf4_error"):
                row[key] = t_estimate(last_mean(one, key) for one in runs).as_dict()
            for key in ("kl", "dloss"):
                row[key] = {k: t_estimate(damage(one, k, key) for one in runs).as_dict() for k in DAMAGES}
            ratio = log_ratio(held, base, last_mean)
            row["compactness_ratio"] = ratio.as_dict() if ratio and name != "standard" else None
            row["damage_ratio"] = {k: one[name].as_dict() for k, one in adjusted.items() if name in one}
            row["points"] = [
                {"seed": seed, COMPACTNESS: last_mean(one), "kl": {k: damage(one, k) for k in DAMAGES}}
                for seed, one in held.items()
            ]
        rows.append(row)
    return rows


def plan_table(arms: Arms, seeds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """ln of ratios of KL: a threshold's plan to random plans, and the two ends of α; by arm and over all."""

    def ratio(run: Result, key: str, base: str) -> float:
        plans = run["final"]["plans"]
        return math.log(max(plans[key], 1e-9) / max(plans[base], 1e-9))

    pairs = [("high", "low"), *((key, "random") for key in ("high", "low", "flat", "compact"))]
    groups = {name: [[run] for run in runs.values()] for name, runs in arms.items() if runs}
    groups["all arms"] = [[runs[seed] for runs in arms.values() if seed in runs] for seed in seeds]
    return {
        name: {f"{a}/{b}": over_seeds([ratio(run, a, b) for run in runs] for runs in held) for a, b in pairs}
        for name, held in groups.items()
    }


def layer_costs(arms: Arms, kind: str = "nf4") -> list[dict[str, Any]]:
    """For each arm: mean KL of one matrix of each type alone in `kind`, the sum of all, all at once."""
    rows = []
    for name, runs in arms.items():
        if not runs:
            continue
        alone = [one["final"]["layers"][kind] for one in runs.values()]
        row: dict[str, Any] = {"arm": name}
        for title in MATRICES:
            row[title] = float(
                np.mean([v for one in alone for k, v in one.items() if k.endswith(f".{title}")])
            )
        row["sum of all matrices alone"] = float(np.mean([sum(one.values()) for one in alone]))
        row["all at once"] = float(np.mean([damage(one, kind) for one in runs.values()]))
        rows.append(row)
    return rows


def through_training(arms: Arms) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """How the spectra change: for each arm and level.

    Returns:
        A row for each arm, level and matrix type: mean α, effective rank, compactness; the arm's damage. And
        {arm: levels, each with σ_k/σ_1 as a mean over matrices and seeds, and the compactness}.
    """
    rows: list[dict[str, Any]] = []
    shapes: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for name, runs in arms.items():
        for levels in zip(*(run["levels"] for run in runs.values()), strict=True):
            for kind in MATRICES:
                row: dict[str, Any] = {"arm": name, "level": levels[0]["level"], "type": kind}
                layers = [v for one in levels for k, v in one["layers"].items() if k.endswith(f".{kind}")]
                for key in ("alpha_hill", "effective_rank_rel", COMPACTNESS):
                    held = [layer[key] for layer in layers if layer[key] is not None]
                    row[key] = float(f"{np.mean(held):.4g}") if held else None
                row["kl_nf4"] = float(f"{np.mean([one['damage']['nf4']['kl'] for one in levels]):.4g}")
                rows.append(row)
            mean = float(np.mean([layer_mean(one, COMPACTNESS) for one in levels]))
            sigma = np.mean([one["shape"] for one in levels], axis=0)
            shapes[name].append({"level": levels[0]["level"], "sigma": sigma, COMPACTNESS: mean})
    return rows, shapes


def matched(arms: Arms, reference: str, controls: Iterable[str]) -> dict[str, dict[str, Any]]:
    """ln(reference arm / control) of compactness and of each damage, paired by seed, for every control."""
    values: dict[str, Callable[[Result], float]] = {"compactness": last_mean}
    values |= {kind: partial(damage, kind=kind) for kind in DAMAGES}
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(controls):
        ratios = {key: log_ratio(arms[reference], arms[name], value) for key, value in values.items()}
        found[name] = {key: one.as_dict() if one else None for key, one in ratios.items()}
    return found


def summarize(results: Sequence[Result], reference: str, points: int = 24, **notes: Any) -> dict[str, Any]:
    """Everything that tables, figures and verdicts are made of, JSON-able.

    Args:
        results: runs of `run_all`, the arm "standard" among them.
        reference: the arm that the controls were tuned to.
        points: ranks k at which the spectra's shapes are kept, for the figure.
        notes: what else shall stand in it, first.
    """
    arms: Arms = {}
    for one in results:
        runs = arms.setdefault(one["arm"]["name"], {})
        if one["reached"]:
            runs[one["seed"]] = one
    seeds = sorted({seed for runs in arms.values() for seed in runs})
    controls = {one["arm"]["name"] for one in results if one["arm"]["kind"] == "control" and one["reached"]}
    rows, shapes = through_training(arms)
    size = len(results[0]["levels"][0]["shape"])
    ranks = np.unique(np.linspace(0, size - 1, points).round().astype(int))
    for level in (level for levels in shapes.values() for level in levels):
        level["sigma"] = [float(f"{x:.4g}") for x in level["sigma"][ranks]]
    found = {
        "schema": 1,
        **notes,
        "reference": reference,
        "seeds": sorted({result["seed"] for result in results}),
        "arms": arm_table(results, arms),
        "matched": matched(arms, reference, controls),
        "correlations": correlations(arms, seeds),
        "alpha_through_training": {
            name: over_seeds([across_training(run, "alpha_hill", "nf4")] for run in runs.values())
            for name, runs in arms.items()
        },
        "plans": plan_table(arms, seeds),
        "layer_costs": layer_costs(arms),
        "through_training": rows,
        "shapes": {"size": size, "ranks": [int(k) + 1 for k in ranks], "arms": shapes},
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
