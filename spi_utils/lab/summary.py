"""Runs of the lab -> numbers with intervals: what each arm cost and suffered, and what went along with it.

The unit of chance is the seed. Intervals are Student's t (n − 1 degrees of freedom) over the few seeds;
damage is compared as logarithms, paired by seed, so that exp(mean) is a ratio.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t

from spi_utils.errors import EvaluationError
from spi_utils.lab.experiment import FORMATS, STATISTICS, Result
from spi_utils.stats import Estimate, holm_family

COMPACTNESS = "nuclear_rank_90_rel"  # the preprint's: the share of singular values that hold 90 % of Σσ
ALONE = ("nf4", "int3")  # formats in which each matrix was judged alone
PREDICTORS = [*STATISTICS, "nf4_error"]


def t_estimate(values: Iterable[float]) -> Estimate:
    """Mean over seeds, standard error, 95 % Student interval, p of "it is 0"; unbounded below two seeds."""
    x = np.array(list(values), dtype=np.float64)
    if len(x) < 2:
        return Estimate(float(x.mean()), math.inf, -math.inf, math.inf, 1.0, len(x))
    mean, se = float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x)))
    half = float(t.ppf(0.975, len(x) - 1)) * se
    p = float(2 * t.sf(abs(mean) / se, len(x) - 1)) if se else float(mean == 0)
    return Estimate(mean, se, mean - half, mean + half, p, len(x))


def over_seeds(values: pd.Series) -> dict[str, Any] | None:
    """Estimate over seeds of each seed's mean; None without a value, and seeds without one are left out."""
    means = values.groupby(level="seed").mean().dropna()
    return t_estimate(means).as_dict() if len(means) else None


def log_ratio(one: pd.Series, base: pd.Series) -> Estimate | None:
    """Estimate of ln(one/base) over the seeds that both have, by which they are indexed; None without any."""
    found = (one / base).map(np.log).dropna()
    return t_estimate(found) if len(found) else None


def rank_correlation(rows: pd.DataFrame, x: str, y: str, same_type: bool = False) -> float:
    """Spearman's ρ over the rows that have both; NaN below four or without spread.

    With `same_type` both are taken relative to the mean of the matrix' type (q, k, …) first.
    """
    pairs = rows.dropna(subset=[x, y])
    values = pairs[[x, y]]
    if same_type:
        values = values - values.groupby(pairs["type"]).transform("mean")
    if len(values) < 4 or values.nunique().min() < 2:
        return math.nan
    return float(values[x].corr(values[y], method="spearman"))


def tabled(results: Sequence[Result]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The runs that reached the last level, as two tables by arm and seed.

    A row a level: KL and Δloss by kind of damage, means of the statistics over the matrices, and at the last
    level the plans' KL. A row a level and matrix: its type and statistics, and at the last level the
    logarithm of its KL a weight in a format alone (`cost …`). The untrained level is infinite.
    """
    levels, layers = [], []
    for run in (run for run in results if run["reached"]):
        for level in run["levels"]:
            final: dict[str, Any] = run["final"] if level is run["levels"][-1] else {}
            row = {"arm": run["arm"]["name"], "seed": run["seed"]}
            row["level"] = math.inf if level["level"] is None else level["level"]
            own = {key: level[key] for key in ("step", "loss", "judge_loss")}
            hurt = level["damage"].items()
            own |= {f"{key} {kind}": one[key] for kind, one in hurt for key in ("kl", "dloss")}
            levels.append(row | own | final.get("plans", {}))
            for name, statistics in level["layers"].items():
                alone = final.get("layers", {}).items()
                cost = {
                    f"cost {kind}": math.log(max(kl[name], 1e-12) / final["weights"][name])
                    for kind, kl in alone
                }
                layers.append(row | {"type": name.split(".")[1]} | statistics | cost)
    keys = ["arm", "seed", "level"]
    by_layer = pd.DataFrame(layers).astype(dict.fromkeys(PREDICTORS, float))
    means = by_layer.groupby(keys)[PREDICTORS].mean()
    by_level = pd.DataFrame(levels).join(means, on=keys)
    return by_level.set_index(["arm", "seed"]), by_layer.set_index(["arm", "seed"])


def arm_table(results: Sequence[Result], last: pd.DataFrame) -> list[dict[str, Any]]:
    """A row an arm: training, spectra, damage, and all of it against the standard arm (with Holm's p)."""
    nothing = last.iloc[:0].droplevel("arm")
    held = {str(name): rows.droplevel("arm") for name, rows in last.groupby("arm", sort=False)}
    base = held.get("standard", nothing)
    adjusted: dict[str, dict[str, Estimate]] = {}
    for kind in FORMATS:  # Holm's family is the arms
        found = {k: log_ratio(v[f"kl {kind}"], base[f"kl {kind}"]) for k, v in held.items()}
        adjusted[kind] = holm_family({k: one for k, one in found.items() if one and k != "standard"})
    table: dict[str, Any] = {}
    for result in results:
        arm = result["arm"]
        name = arm["name"]
        if name in table:
            table[name]["runs"] += 1
            continue
        runs = held.get(name, nothing)
        row = {key: arm[key] for key in ("name", "label", "kind")} | {"runs": 1, "reached": len(runs)}
        if len(runs):
            row |= {key: float(runs[key].mean()) for key in ("step", "loss", "judge_loss")}
            for key in ("alpha_hill", "effective_rank_rel", COMPACTNESS, "nf4_error"):
                row[key] = t_estimate(runs[key]).as_dict()
            for key in ("kl", "dloss"):
                row[key] = {kind: t_estimate(runs[f"{key} {kind}"]).as_dict() for kind in FORMATS}
            ratio = log_ratio(runs[COMPACTNESS], base[COMPACTNESS])
            row["compactness_ratio"] = ratio.as_dict() if ratio and name != "standard" else None
            row["damage_ratio"] = {k: one[name].as_dict() for k, one in adjusted.items() if name in one}
            row["points"] = [
                {"seed": seed, COMPACTNESS: one[COMPACTNESS], "kl": {k: one[f"kl {k}"] for k in FORMATS}}
                for seed, one in runs.iterrows()
            ]
        table[name] = row
    return list(table.values())


def correlations(levels: pd.DataFrame, last: pd.DataFrame, layers: pd.DataFrame) -> dict[str, Any]:
    """{view: {statistic: {format: Spearman's ρ with the damage, over seeds}}}, four views: over the arms of
    a seed, the levels of a run, the matrices of a run, and these relative to their type."""
    views = {
        "across models": (last, ["seed"], "kl"),
        "across training": (levels, ["arm", "seed"], "kl"),
        "within a model": (layers, ["arm", "seed"], "cost"),
        "within a type": (layers, ["arm", "seed"], "cost"),
    }
    found: dict[str, Any] = {}
    for view, (rows, by, what) in views.items():
        groups, same = rows.groupby(level=by), view == "within a type"
        found[view] = {
            key: {
                kind: over_seeds(groups.apply(rank_correlation, key, f"{what} {kind}", same))
                for kind in ALONE
            }
            for key in PREDICTORS
        }
    return found


def plan_table(last: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """ln of ratios of KL: a threshold's plan to random plans, and the two ends of α; by arm and over all."""
    pairs = [("high", "low"), *((key, "random") for key in ("high", "low", "flat", "compact"))]
    ratios = pd.DataFrame({f"{a}/{b}": np.log(last[a].clip(1e-9) / last[b].clip(1e-9)) for a, b in pairs})
    groups = [*ratios.groupby("arm", sort=False), ("all arms", ratios)]
    return {str(name): {str(pair): over_seeds(rows[pair]) for pair in ratios} for name, rows in groups}


def summarize(results: Sequence[Result], reference: str, **notes: Any) -> dict[str, Any]:
    """Everything that tables, figures and verdicts are made of, JSON-able.

    Args:
        results: runs of `run_all`, the arm "standard" among them.
        reference: the arm that the controls were tuned to.
        notes: what else shall stand in it, first.

    Raises:
        EvaluationError: no run reached the last level.
    """
    if not any(one["reached"] for one in results):
        raise EvaluationError("No run reached the last level: raise it, or train longer.")
    levels, layers = tabled(results)
    last, own = levels.dropna(subset=["high"]), layers.dropna(subset=["cost nf4"])
    trained = levels[np.isfinite(levels["level"])]
    # ln(reference arm / control) of compactness and of each damage, paired by seed
    columns = {"compactness": COMPACTNESS, **{kind: f"kl {kind}" for kind in FORMATS}}
    matched: dict[str, Any] = {}
    for name in sorted({x["arm"]["name"] for x in results if x["arm"]["kind"] == "control" and x["reached"]}):
        ours, theirs = (last.xs(arm, level="arm") for arm in (reference, name))
        found = {key: log_ratio(ours[of], theirs[of]) for key, of in columns.items()}
        matched[name] = {key: one.as_dict() if one else None for key, one in found.items()}
    alpha = trained.groupby(level=["arm", "seed"], sort=False).apply(rank_correlation, "alpha_hill", "kl nf4")
    alpha_by_arm = alpha.groupby(level="arm", sort=False)
    summary = {
        "schema": 1,
        **notes,
        "reference": reference,
        "seeds": sorted({result["seed"] for result in results}),
        "arms": arm_table(results, last),
        "matched": matched,
        "correlations": correlations(trained, last, own),
        "alpha_through_training": {name: over_seeds(values) for name, values in alpha_by_arm},
        "plans": plan_table(last),
    }
    return _short(summary)


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
