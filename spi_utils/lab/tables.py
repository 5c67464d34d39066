"""The lab's numbers as tables to look at, and as answers: every verdict is computed from intervals.

`supported`, `refuted` or `not separable`, as in the evaluation. An effect counts where its 95 % interval over
seeds excludes zero, three seeds or more stand behind it, and Holm's p (where it was one of a family) is ≤
0.05.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from spi_utils.lab.numeric import collapsed, comparison, stated_shares
from spi_utils.lab.summary import COMPACTNESS
from spi_utils.runs import read_json
from spi_utils.stats import OPEN, REFUTED, SUPPORTED

MIN_SEEDS = 3  # below, an interval's own error is too large for a verdict
FILE = "compactness.json"
Summary = Mapping[str, Any]

# --- the summary's tables --------------------------------------------------------------------------------


def full_grid() -> dict[str, Any]:
    """The summary that `python -m benchmarks.compactness --json docs/compactness.json` wrote."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "docs" / FILE
    path = installed if installed.exists() else package.parent / "docs" / FILE
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


# --- an estimate in words ---------------------------------------------------------------------------------


def sign(one: Mapping[str, Any] | None) -> int:
    """−1 or 1 where an `Estimate.as_dict` is distinguishable from zero, else 0."""
    if one is None or one["clusters"] < MIN_SEEDS or one["low"] is None or one["high"] is None:
        return 0
    if (one.get("p_holm") or 0) > 0.05:
        return 0
    return int(one["low"] > 0) - int(one["high"] < 0)


def ratio(one: Mapping[str, Any] | None) -> str:
    """A logarithm of a ratio as "×0.66 (0.59 … 0.74)"; nothing where there is none."""
    if one is None:
        return ""
    ends = [math.exp(one[key]) if one[key] is not None else math.nan for key in ("low", "high")]
    return f"×{math.exp(one['mean']):.2f} ({ends[0]:.2f} … {ends[1]:.2f})"


def interval(one: Mapping[str, Any] | None) -> str:
    """An estimate as "−0.41 (−0.62 … −0.20)"."""
    if one is None:
        return "none"
    ends = [f"{one[key]:+.2f}" if one[key] is not None else "?" for key in ("low", "high")]
    return f"{one['mean']:+.2f} ({ends[0]} … {ends[1]})".replace("-", "−")


def all_of(signs: Sequence[int], wanted: int) -> str:
    """supported if every sign is the wanted one, refuted if any is the opposite, else not separable."""
    if signs and all(one == wanted for one in signs):
        return SUPPORTED
    return REFUTED if -wanted in signs else OPEN


def of_sign(one: int) -> str:
    """supported for 1, refuted for −1, not separable for 0."""
    return {1: SUPPORTED, 0: OPEN, -1: REFUTED}[one]


# --- answers ---------------------------------------------------------------------------------------------

Row = tuple[str, str, str, str]  # stated; the verdict; the numbers behind it; what follows for a selection


def answered(stated: str, verdict: str, text: str, otherwise: str, **meanings: str) -> Row:
    """A row of the closing table; what follows is said by verdict, or `otherwise`."""
    return stated, verdict, text, meanings.get(verdict, otherwise)


def mass_answer(table: pd.DataFrame) -> Row:
    """Are 82 and 11 the ranks at 90 % of the trace norm?"""
    before, least = (tuple(table[column]) for column in ("strictly before", "at least"))
    return answered(
        "rank at 90 % of trace-norm mass falls from 82 to 11",
        SUPPORTED if before == (82, 11) else REFUTED,
        "{} → {} values stay strictly below 90 %; at least 90 % takes {} → {}".format(*before, *least),
        "a difference between two given spectra; it says nothing about what a layer costs",
    )


def shares_answer(grid: pd.DataFrame) -> Row:
    """Where do 36.0 % and 63.6 % come from, and what do they become under one denominator?"""
    rows = stated_shares(grid)
    of_n, of_held = comparison(grid)[["compact wins, of n", "compact wins, of the held"]].mean()
    text = "no quantizer of the grid gives both"
    for one in rows[rows["both"]].head(1).to_dict("records"):
        text = (
            f"{one['flat']} of 100 and {one['compact']} of 11 ({one['bits']} bits, {one['scaling']}, "
            f"{one['steps']} steps, {one['count']}): two denominators. Of n both: {one['flat/n']:.1%} → "
            f"{one['compact/n']:.1%}; of those that hold the mass: {one['flat/held']:.1%} → "
            f"{one['compact/held']:.1%}"
        )
    return answered(
        "distinguishable eigenvalues rise from 36.0 % to 63.6 %",
        REFUTED if of_n < 0.5 < of_held else SUPPORTED if min(of_n, of_held) > 0.95 else OPEN,
        f"{text}. Over the grid the compact one wins in {of_n:.0%} (of n) and {of_held:.0%} (held)",
        refuted="the order of the two spectra depends on the denominator: no ranking of layers follows",
        otherwise="the order of the two spectra depends on quantizer and scaling",
    )


def depth_answer(table: pd.DataFrame) -> Row:
    """Does the flat spectrum collapse to the float floor where the compact one doesn't?"""
    count, both, flat, compact = collapsed(table)
    return answered(
        "at depth 1000 heavy-tailed spectra collapse to the float floor",
        SUPPORTED if flat and not compact else OPEN if flat else REFUTED,
        f"of {count} pairs of bases and normalisation, both spectra collapse in {both}, only the flat one in "
        f"{flat}, only the compact one in {compact}; the rest keep, decay slowly or overflow",
        refuted="the scale of a layer decides whether its product survives, not its spectrum's shape",
        otherwise="collapse depends on bases and normalisation",
    )


def trainable(summary: Summary) -> Row:
    """Do nuclear initialization and the trace norm make spectra more compact, at equal loss?"""
    arms = [a for a in summary["arms"] if a["kind"] == "compact" and a["reached"]]
    numbers = ", ".join(f"{a['label']} {ratio(a['compactness_ratio'])}" for a in arms)
    return answered(
        "nuclear initialization and trace-norm regularization train compact networks",
        all_of([sign(a["compactness_ratio"]) for a in arms], -1),
        f"rank at 90 % of Σσ against standard, at equal loss: {numbers}",
        supported="compactness can be trained; it is not a property of the layer's task alone",
        otherwise="how compact a layer is depends on its training less than stated",
    )


def causes(summary: Summary) -> Row:
    """Does more compact mean less damaged by NF4: for every arm against standard, and against the controls?

    refuted if an arm more compact than standard is more damaged, or if of the reference arm and a control the
    more compact one is the more damaged: then something else decides.
    supported if every arm more compact than standard is less damaged, and the reference arm less than the
    Frobenius control too (compactness, not only a smaller norm).
    """
    arms = [a for a in summary["arms"] if a["reached"] and sign(a.get("compactness_ratio")) < 0]
    signs = {a["label"]: sign(a["damage_ratio"].get("nf4")) for a in arms}
    less = [label for label, one in signs.items() if one < 0]
    rest = [label for label, one in signs.items() if one >= 0]
    text = f"of {len(signs)} arms more compact than standard, {len(less)} suffer less from NF4"
    text += f" ({'; '.join(less)})" if less else ""
    text += f", {len(rest)} don't separably ({'; '.join(rest)})" if rest else ""
    verdict, relations = all_of(list(signs.values()), -1), {}
    for name, control in summary["matched"].items():
        rank, cost = control["compactness"], control["nf4"]
        relations[name] = of_sign(sign(rank) * sign(cost))
        if rank and cost:
            text += f". Over {name.replace('_', ' ')} at equal loss: rank {ratio(rank)}, damage {ratio(cost)}"
    if REFUTED in relations.values():
        verdict = REFUTED
    elif verdict == SUPPORTED:
        verdict = relations.get("frobenius", SUPPORTED)
    return answered(
        "compact spectra make networks robust to low precision",
        verdict,
        text,
        supported="a compact layer needs protection less, because it is compact",
        refuted="a layer's compactness does not decide what its quantization costs: measure the cost",
        otherwise="compact layers may be robust for another reason than their compactness: measure the cost",
    )


def predicts_models(summary: Summary) -> Row:
    """Do α, and the other statistics, go along with NF4's damage across models of equal loss?"""
    views = summary["correlations"]["across models"]
    known = {key: row["nf4"] for key, row in views.items() if row["nf4"] is not None}
    alpha, text = known.get("alpha_hill"), "needs four arms or more"
    if known:
        best = max(known, key=lambda key: abs(known[key]["mean"]))
        text = f"ρ of α (Hill) with NF4's KL {interval(alpha)}; strongest: {best} {interval(known[best])}"
    return answered(
        "low α goes with robustness across models of equal loss",
        of_sign(sign(alpha)),
        text,
        supported="of two models of equal loss the one with lower α suffers less",
        refuted="of two models of equal loss the one with higher α suffers less",
        otherwise="α does not rank models of equal loss",
    )


def predicts_training(summary: Summary) -> Row:
    """Has ρ between α and damage through training one sign in every arm?"""
    arms = {name: one for name, one in summary["alpha_through_training"].items() if one is not None}
    signs = {sign(one) for one in arms.values()}
    numbers = ", ".join(f"{name} {interval(one)}" for name, one in arms.items())
    return answered(
        "α predicts robustness across training",
        REFUTED if {-1, 1} <= signs else SUPPORTED if signs and 0 not in signs else OPEN,
        f"Spearman's ρ of α (Hill) and NF4's KL over the levels of a run: {numbers}",
        supported="a change of α while a model trains says which way its damage goes",
        refuted="α may fall or rise while damage grows: no threshold on α carries over between models",
        otherwise="α's course through training is no basis for a threshold",
    )


def direction(summary: Summary) -> Row:
    """Which end of α should stay in 16-bit: the plans' real damage at equal bytes."""
    plans = summary["plans"]
    overall, against = plans["all arms"]["high/low"], plans["all arms"]["high/random"]
    signs = [sign(row["high/low"]) for name, row in plans.items() if name != "all arms"]
    within = summary["correlations"]["within a type"]["alpha_hill"]["int3"]
    views = summary["correlations"]["within a model"]
    known = {key: row["int3"] for key, row in views.items() if row["int3"] is not None}
    best = max(known, key=lambda key: abs(known[key]["mean"]), default="alpha_hill")
    return answered(
        "a threshold should protect high α (flat spectra)",
        of_sign(-sign(overall)),
        f"KL of int3 plans at half the weights, high α over low α: {ratio(overall)}, over random "
        f"{ratio(against)}; high is better in {signs.count(-1)} arms, low in {signs.count(1)} of {len(signs)}"
        f". Within a model ρ with the cost a weight is {interval(known.get('alpha_hill'))} for α, "
        f"{interval(within)} relative to the matrix type, and strongest for {best}: "
        f"{interval(known.get(best))}",
        supported="on average protect the high end, which need not hold in every model",
        refuted="on average protect the low end, which need not hold in every model",
        otherwise="neither end of α is the one to protect in general",
    )


def closing_table(
    summary: Summary, mass: pd.DataFrame, grid: pd.DataFrame, depth: pd.DataFrame
) -> pd.DataFrame:
    """stated · verdict · reproduced · what it means for choosing layers."""
    trained = (trainable, causes, predicts_models, predicts_training, direction)
    rows = [mass_answer(mass), shares_answer(grid), depth_answer(depth), *(of(summary) for of in trained)]
    return pd.DataFrame(rows, columns=["stated", "verdict", "reproduced", "for choosing layers"])
