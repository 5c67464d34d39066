"""The report's section on other runs: does what this run found generalize?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from spi_utils import runs
from spi_utils.claims import QUESTIONS, count_verdicts, evaluated_beside, generalization
from spi_utils.errors import SPIError
from spi_utils.report_html import interval_cell, section, table, text, verdict_cell


def other_runs(run: runs.Run) -> str:
    """The section on the evaluated runs beside this one; empty if there are none."""
    tables, unread = [], []
    for folder in evaluated_beside(run):
        try:
            tables.append(generalization([folder]))
        except (
            SPIError,
            LookupError,
            TypeError,
            ValueError,
        ):  # another run's broken file is no reason to withhold this run's report
            unread.append(folder.name)
    if len(tables) + len(unread) < 2:
        return ""
    held = pd.concat(tables, ignore_index=True)
    rows = held.to_dict("records")
    marks = ["plan" if row["run"] == run.path.resolve().name else "" for row in rows]
    answers = "; ".join(f"“{words}” is {count_verdicts(held, key)}" for key, words in QUESTIONS.items())
    return section(
        "Does it generalize?",
        f"The evaluated runs that lie beside each other, each judged at its own plan's bytes: {answers}.",
        table(RUN_HEADS, [_run_row(row) for row in rows], marks, words=(0,)),
        table(
            ["run", *QUESTIONS.values()],
            [[row["run"], *(verdict_cell(row[key]) for key in QUESTIONS)] for row in rows],
            marks,
            words=(0,),
        ),
        *(f'<p class="note">{text(name)}: its evaluation can\'t be read.</p>' for name in unread),
    )


RUN_HEADS = (
    *(
        "run: model, plan, text",
        "matrix bits",
        "Δ loss",
        "KL plan",
        "random",
        "Fisher",
        "Fisher (NF4, int8 or 16-bit)",
    ),
    "Fisher (int4, int8 or 16-bit)",
    "int8",
)


def _run_row(row: Mapping[Any, Any]) -> list[str]:
    delta = {"mean": row["Δ loss"], "low": row["Δ low"], "high": row["Δ high"]}
    delta = {name: None if math.isnan(value) else value for name, value in delta.items()}  # None: unbounded
    losses = (row[f"KL {key}"] for key in ("plan", "random", "fisher", "fisher_int8", "fisher_int4", "int8"))
    return [
        f"{row['run']}: {row['model']}, {row['plan']}, {row['windows']} windows of {row['text']}",
        f"{row['matrix bits']:.2f}",
        interval_cell(delta),
        *("–" if math.isnan(loss) else f"{loss:.4f}" for loss in losses),
    ]
