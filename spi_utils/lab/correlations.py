"""What goes along with damage: Spearman's ρ across models, across training, and within a model; over seeds.

The unit of chance is the seed. Intervals are Student's t (n − 1 degrees of freedom) over the few seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr, t

from spi_utils.errors import EvaluationError
from spi_utils.lab.damage import FORMATS, STATISTICS
from spi_utils.lab.experiment import Result, last, layer_mean
from spi_utils.stats import Estimate

DAMAGES = (*FORMATS, "noise")
PREDICTORS = (*STATISTICS, "nf4_error")


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


def damage(result: Result, kind: str, key: str = "kl") -> float:
    """KL or Δloss of a run at the last level by format, or by noise ("noise"); nats a character."""
    one = result["final"]["noise"] if kind == "noise" else last(result)["damage"][kind]
    return float(one[key])


def rank_correlation(x: Sequence[float | None], y: Sequence[float]) -> float | None:
    """Spearman's ρ over the pairs that have both; None below four or without spread."""
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if a is not None and math.isfinite(a)]
    if len(pairs) < 4 or len({a for a, _ in pairs}) < 2 or len({b for _, b in pairs}) < 2:
        return None
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def across_models(runs: Sequence[Result], statistic: str, kind: str) -> float | None:
    """ρ over the arms of one seed at the last level: mean statistic against damage."""
    return rank_correlation(
        [layer_mean(last(one), statistic) for one in runs], [damage(one, kind) for one in runs]
    )


def across_training(run: Result, statistic: str, kind: str) -> float | None:
    """ρ over the levels of one run: mean statistic against damage; the untrained network left out."""
    levels = [level for level in run["levels"] if level["level"] is not None]
    return rank_correlation(
        [layer_mean(level, statistic) for level in levels], [level["damage"][kind]["kl"] for level in levels]
    )


def within_model(run: Result, statistic: str, kind: str, *, same_type: bool = False) -> float | None:
    """ρ over the matrices of one run at the last level: statistic against the KL a weight of that matrix
    alone.

    With `same_type` both are taken relative to the mean of the matrix' type (q, k, …) first.
    """
    costs, weights = run["final"]["layers"][kind], run["final"]["weights"]
    names = [name for name in costs if last(run)["layers"][name][statistic] is not None]
    x = [last(run)["layers"][name][statistic] for name in names]
    y = [math.log(max(costs[name], 1e-12) / weights[name]) for name in names]
    if same_type:
        types = [name.split(".", 1)[1] for name in names]
        x, y = _centred(x, types), _centred(y, types)
    return rank_correlation(x, y)


def _centred(values: Sequence[float], groups: Sequence[str]) -> list[float]:
    means = {g: np.mean([v for v, h in zip(values, groups, strict=True) if h == g]) for g in set(groups)}
    return [float(value - means[group]) for value, group in zip(values, groups, strict=True)]


def over_seeds(values: Mapping[int, Sequence[float | None]]) -> Estimate | None:
    """Estimate over seeds of each seed's mean; seeds without a value are left out."""
    means = [float(np.mean(held)) for row in values.values() if (held := [v for v in row if v is not None])]
    return t_estimate(means) if means else None


def correlations(results: Sequence[Result]) -> dict[str, dict[str, dict[str, Any]]]:
    """{view: {statistic: {format: Spearman's ρ with the damage, over seeds}}}, four views."""
    seeds: dict[int, list[Result]] = {}
    for result in results:
        if result["reached"]:
            seeds.setdefault(result["seed"], []).append(result)
    views: dict[str, Callable[[list[Result], str, str], list[float | None]]] = {
        "across models": lambda runs, key, kind: [across_models(runs, key, kind)],
        "across training": lambda runs, key, kind: [across_training(one, key, kind) for one in runs],
        "within a model": lambda runs, key, kind: [within_model(one, key, kind) for one in runs],
        "within a type": lambda runs, key, kind: [
            within_model(one, key, kind, same_type=True) for one in runs
        ],
    }
    return {
        view: {
            key: {
                kind: found.as_dict() if found else None
                for kind in ("nf4", "int3")
                for found in [over_seeds({seed: find(runs, key, kind) for seed, runs in seeds.items()})]
            }
            for key in PREDICTORS
        }
        for view, find in views.items()
    }
