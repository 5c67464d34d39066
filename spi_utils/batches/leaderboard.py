"""All runs of a batch in one table: does the score beat random layers at equal bytes, where, by how much?

Every number is evaluation.json's own and every verdict the audit's, from the interval over windows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pandas as pd

from spi_utils.batches.grid import Job
from spi_utils.claims import Evaluation, generalization
from spi_utils.figures.plotting import (
    BLACK,
    GREEN,
    GREY,
    VERMILLION,
    headline,
    new_figure,
    short_label,
    shorten,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from spi_utils.runs import Run

# What the audit calls "the plan's KL is lower than the random mean's" -> colour, marker, words.
VERDICTS = {
    "supported": (GREEN, "o", "beats random"),
    "refuted": (VERMILLION, "s", "worse than random"),
    "not separable": (GREY, "D", "not separable"),
    "not tested": (BLACK, "x", "no random control"),
}


def leaderboard(runs: Iterable[tuple[Job, Run]]) -> pd.DataFrame:
    """A row a run: by model, by size, the lowest KL first.

    `kl_difference` is the plan's mean KL minus the random controls' mean at equal bytes, in nats a token,
    with its 95 % interval over windows; an unbounded end, and what was not run, is NaN. `beaten` counts the
    controls, of `controls`, whose KL is higher. `ratio` is the plan's KL over the random mean.

    Raises:
        RunError: a run's evaluation can't be read.
    """
    rows = [_row(job, run) for job, run in runs]
    table = pd.DataFrame(rows, columns=list(_EMPTY))
    return table.sort_values(["model", "bytes", "kl_plan"], kind="stable", ignore_index=True)


_EMPTY: dict[str, Any] = dict.fromkeys((
    *("job", "model", "score", "direction", "rule", "value", "seed", "bytes", "matrix_bits", "verdict"),
    *("kl_plan", "kl_random", "ratio", "kl_difference", "kl_low", "kl_high", "p_holm", "beaten", "controls"),
    *("windows", "text", "loss_difference", "loss_low", "loss_high"),
    *("kl_fisher", "kl_fisher_int8", "kl_int8"),
))  # fmt: skip


def _row(job: Job, run: Run) -> dict[str, Any]:
    evaluation = Evaluation.read(run.evaluation_json)
    plan = evaluation.variants["plan"]
    held = generalization([run.path]).iloc[0]
    against = plan.get("vs_random", {})
    kl = against.get("kl", {})
    return _EMPTY | {
        "job": job.name,
        "model": held["model"],
        **{name: evaluation.plan[name] for name in ("score", "direction", "rule")},
        "value": job.parameters.get("value"),
        "seed": evaluation.settings["seed"],
        "bytes": plan["bytes"],
        "matrix_bits": held["matrix bits"],
        "verdict": held["random"],
        "kl_plan": held["KL plan"],
        "kl_random": held["KL random"],
        "ratio": held["KL plan"] / held["KL random"],
        "kl_difference": kl.get("mean"),
        "kl_low": kl.get("low"),
        "kl_high": kl.get("high"),
        "p_holm": kl.get("p_holm"),
        "beaten": against.get("kl_beats"),
        "controls": against.get("controls", 0),
        "windows": held["windows"],
        "text": held["text"],
        "loss_difference": held["Δ loss"],
        "loss_low": held["Δ low"],
        "loss_high": held["Δ high"],
        **{f"kl_{key}": held[f"KL {key}"] for key in ("fisher", "fisher_int8", "int8")},
    }


def sentences(table: pd.DataFrame) -> list[str]:
    """What the table says of each score: on how many models it beats random layers, and by how much.

    A model counts only where every run of it says so.
    """
    return [
        _sentence(f"{short_label(str(score))}, {direction} end,", rows)
        for (score, direction), rows in table.groupby(["score", "direction"], sort=False)
    ]


def _sentence(score: str, rows: pd.DataFrame) -> str:
    tested = rows[rows["verdict"] != "not tested"]
    if tested.empty:
        return f"{score} was not compared with random layers."
    won = tested["verdict"].eq("supported").groupby(tested["model"]).all()
    lost = tested["verdict"].eq("refuted").groupby(tested["model"]).all()
    runs = int(tested["verdict"].eq("supported").sum())
    return (
        f"{score} beats random layers of the same size on {int(won.sum())} of {len(won)} models "
        f"({runs} of {len(tested)} runs; worse on {int(lost.sum())}): "
        f"KL {tested['ratio'].median():.2f} × random's, {_effects(tested)}."
    )


def _effects(rows: pd.DataFrame) -> str:
    """The difference with its interval: the only one, or the best and the worst."""
    ordered = rows.sort_values("kl_difference")
    texts = [_interval(row) for _, row in ordered.iloc[[0, -1]].iterrows()]
    if len(rows) == 1:
        return f"difference {texts[0]} nats a token"
    return f"difference from {texts[0]} to {texts[1]} nats a token"


def _interval(row: pd.Series) -> str:
    ends = ("unbounded" if pd.isna(row[end]) else f"{row[end]:+.4f}" for end in ("kl_low", "kl_high"))
    return f"{row['kl_difference']:+.4f} ({' … '.join(ends)})".replace("-", "−")


@styled
def draw(table: pd.DataFrame) -> Figure:
    """Each run's KL minus the random mean's, with its interval; left of the line the plan is better."""
    rows = table[table["kl_difference"].notna()].reset_index(drop=True)
    figure = new_figure(9.0, 2.2 + 0.34 * max(len(rows), 1))
    axes = figure.subplots()
    axes.axvline(0, color=BLACK, linewidth=1)
    for verdict, (colour, marker, words) in VERDICTS.items():
        some = rows[rows["verdict"] == verdict]
        if some.empty:
            continue
        middle = some["kl_difference"].astype(float)
        ends = [some[end].astype(float).fillna(middle) for end in ("kl_low", "kl_high")]
        axes.errorbar(
            middle, some.index, xerr=[middle - ends[0], ends[1] - middle], fmt=marker, color=colour,
            capsize=3, label=words,
        )  # fmt: skip
    axes.set_yticks(rows.index, [shorten(job, 56) for job in rows["job"]])
    axes.invert_yaxis()
    axes.set_xlabel("KL of the plan − KL of random layers at equal bytes (nats a token)")
    if len(rows):
        axes.legend(loc="best")
    said = sentences(table)
    finding = said[0] if said else "no run is finished"
    headline(
        figure, finding, "Bars: 95 % interval over windows. Left of the line the score's layers are better."
    )
    return figure
