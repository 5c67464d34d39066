"""The lab's summary as tables to look at, and where the full grid's summary lies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from spi_utils.errors import RunError
from spi_utils.lab.summary import COMPACTNESS
from spi_utils.lab.verdicts import interval, ratio
from spi_utils.runs import read_json

FILE = "compactness.json"
Summary = Mapping[str, Any]


def full_grid() -> dict[str, Any]:
    """The summary that `python -m benchmarks.compactness --json docs/compactness.json` wrote.

    Raises:
        RunError: neither the checkout nor the installed package holds it.
    """
    package = Path(__file__).resolve().parents[1]
    path = next(filter(Path.exists, (package / "docs" / FILE, package.parent / "docs" / FILE)), None)
    if path is None:
        raise RunError(f"{FILE} is missing: run python -m benchmarks.compactness --json docs/{FILE}.")
    return read_json(path, 1, "summary of the lab")


def arm_frame(summary: Summary) -> pd.DataFrame:
    """A row an arm: steps to the last level, α, effective rank, compactness, KL by format and to standard."""
    rows = []
    for arm in summary["arms"]:
        row: dict[str, Any] = {"arm": arm["label"], "reached": f"{arm['reached']} of {arm['runs']}"}
        if arm["reached"]:
            row["steps"] = round(arm["step"])
            row["α (Hill)"] = f"{arm['alpha_hill']['mean']:.2f}"
            row["effective rank"] = f"{arm['effective_rank_rel']['mean']:.0%}"
            row["90 % of Σσ in"] = f"{arm[COMPACTNESS]['mean']:.0%}"
            row |= {f"KL {kind}": f"{one['mean']:.4f}" for kind, one in arm["kl"].items()}
            row["Δloss nf4"] = f"{arm['dloss']['nf4']['mean']:+.4f}"
            row |= {f"{kind} / standard": ratio(arm["damage_ratio"].get(kind)) for kind in ("nf4", "int3")}
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def correlation_frame(summary: Summary, kind: str = "nf4") -> pd.DataFrame:
    """Spearman's ρ of each statistic with the damage by `kind`, with intervals; a column a view."""
    views = summary["correlations"]
    columns = {view: {key: interval(one[kind]) for key, one in rows.items()} for view, rows in views.items()}
    return pd.DataFrame(columns).rename_axis("statistic").reset_index()


def plan_frame(summary: Summary) -> pd.DataFrame:
    """KL of plans that protect one end of a score, as ratios; a row an arm."""
    plans = {name: {key: ratio(one) for key, one in row.items()} for name, row in summary["plans"].items()}
    return pd.DataFrame.from_dict(plans, orient="index").rename_axis("arm").reset_index()


def matched_frame(summary: Summary) -> pd.DataFrame:
    """The reference arm over each control of equal loss: compactness and damage, as ratios paired by seed."""
    labels = {arm["name"]: arm["label"] for arm in summary["arms"]}
    rows = []
    for control, ratios in summary["matched"].items():
        row = {"ratio": f"{labels[summary['reference']]} / {labels[control]}"}
        row["rank at 90 % of Σσ"] = ratio(ratios["compactness"])
        rows.append(row | {f"KL {key}": ratio(one) for key, one in ratios.items() if key != "compactness"})
    return pd.DataFrame(rows)
