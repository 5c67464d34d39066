"""The lab's summary as tables to look at, and where the full grid's summary lies."""

from __future__ import annotations

import importlib.resources
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from spi_utils.errors import RunError
from spi_utils.lab.summary import COMPACTNESS
from spi_utils.lab.verdicts import interval, ratio
from spi_utils.runs import read_json

SCHEMA = 1
FILE = "compactness.json"
Summary = Mapping[str, Any]


def full_grid() -> dict[str, Any]:
    """The summary that `python -m benchmarks.compactness --json docs/compactness.json` wrote.

    Raises:
        RunError: neither the checkout nor the installed package holds it.
    """
    folders = [Path(__file__).resolve().parents[2] / "docs"]
    if importlib.util.find_spec("spi_utils.docs") is not None:
        folders.append(Path(str(importlib.resources.files("spi_utils.docs"))))
    found = next((folder / FILE for folder in folders if (folder / FILE).exists()), folders[0] / FILE)
    if not found.exists():
        raise RunError(
            f"{found}: the full grid's summary is missing. Run python -m benchmarks.compactness --json "
            f"{found}."
        )
    return read_json(found, SCHEMA, "summary of the lab")


def arm_frame(summary: Summary) -> pd.DataFrame:
    """A row an arm: steps to the last level, α, effective rank, compactness, KL by format and to standard."""
    rows = []
    for arm in summary["arms"]:
        row: dict[str, Any] = {"arm": arm["label"], "reached": f"{arm['reached']} of {arm['runs']}"}
        if arm["reached"]:
            row |= {
                "steps": round(arm["step"]),
                "α (Hill)": f"{arm['alpha_hill']['mean']:.2f}",
                "effective rank": f"{arm['effective_rank_rel']['mean']:.0%}",
                "90 % of Σσ in": f"{arm[COMPACTNESS]['mean']:.0%}",
            }
            row |= {f"KL {kind}": f"{one['mean']:.4f}" for kind, one in arm["kl"].items()}
            row["Δloss nf4"] = f"{arm['dloss']['nf4']['mean']:+.4f}"
            against = arm["damage_ratio"]
            row |= {f"{k} / standard": ratio(against[k]) if k in against else "" for k in ("nf4", "int3")}
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def correlation_frame(summary: Summary, kind: str = "nf4") -> pd.DataFrame:
    """Spearman's ρ of each statistic with the damage by `kind`, with intervals; a column a view."""
    views = summary["correlations"]
    columns = {view: {key: interval(one[kind]) for key, one in rows.items()} for view, rows in views.items()}
    return pd.DataFrame(columns).rename_axis("statistic").reset_index()


def plan_frame(summary: Summary) -> pd.DataFrame:
    """KL of plans that protect one end of a score, as ratios; a row an arm."""
    rows = [
        {"arm": name, **{key: ratio(one) if one else "" for key, one in pairs.items()}}
        for name, pairs in summary["plans"].items()
    ]
    return pd.DataFrame(rows)


def layer_frame(summary: Summary, statistic: str = COMPACTNESS) -> pd.DataFrame:
    """A statistic by arm and matrix type (rows) through training (columns: the loss levels)."""
    table = pd.DataFrame(summary["through_training"])
    levels = [math.inf if level is None or pd.isna(level) else level for level in table["level"]]
    wide = table.assign(level=levels).pivot_table(
        index=["arm", "type"], columns="level", values=statistic, sort=False
    )
    wide = wide[sorted(wide.columns, reverse=True)]
    titles = {level: "untrained" if level == math.inf else f"loss {level:g}" for level in wide.columns}
    return wide.rename(columns=titles).rename_axis(columns=None).reset_index()


def matched_frame(summary: Summary) -> pd.DataFrame:
    """The reference arm over each control of equal loss: compactness and damage, as ratios paired by seed."""
    labels = {arm["name"]: arm["label"] for arm in summary["arms"]}
    names = {"compactness": "rank at 90 % of Σσ"}
    rows = []
    for control, ratios in summary["matched"].items():
        row = {"ratio": f"{labels[summary['reference']]} / {labels[control]}"}
        rows.append(
            row | {names.get(key, f"KL {key}"): ratio(one) if one else "" for key, one in ratios.items()}
        )
    return pd.DataFrame(rows)
