"""The lab's numbers -> its answers: every verdict is computed from intervals, none is typed.

`supported`, `refuted` or `not separable`, as in the evaluation. An effect counts where its 95 % interval over
seeds excludes zero, three seeds or more stand behind it, and Holm's p (where it was one of a family) is ≤
0.05.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from spi_utils.lab.numeric import collapsed, comparison, stated_shares
from spi_utils.stats import OPEN, REFUTED, SUPPORTED

MIN_SEEDS = 3  # below, an interval's own error is too large for a verdict
Summary = Mapping[str, Any]
Found = tuple[str, str]  # a verdict, and the numbers behind it


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


CLAIMS: list[tuple[str, str, Callable[[Any], Found], dict[str, str]]] = []


def claim(source: str, stated: str, *, otherwise: str, **meanings: str) -> Callable[[Any], Any]:
    """Enter an answer in the table of claims.

    Args:
        source: what it reads: the "summary" of trained runs, or `numeric`'s "mass", "grid", "depth".
        stated: what was stated or asked.
        otherwise, meanings: what follows for a selection, by verdict.
    """

    def enter(answer: Callable[[Any], Found]) -> Callable[[Any], Found]:
        CLAIMS.append((source, stated, answer, {OPEN: otherwise, **meanings}))
        return answer

    return enter


# --- the synthetic experiments ---------------------------------------------------------------------------


@claim(
    "mass",
    "rank at 90 % of trace-norm mass falls from 82 to 11",
    otherwise="a difference between two given spectra; it says nothing about what a layer costs",
)
def mass_answer(table: pd.DataFrame) -> Found:
    """Are 82 and 11 the ranks at 90 % of the trace norm?"""
    before, least = (tuple(table[column]) for column in ("strictly before", "at least"))
    text = "{} → {} values stay strictly below 90 %; at least 90 % takes {} → {}".format(*before, *least)
    return SUPPORTED if before == (82, 11) else REFUTED, text


@claim(
    "grid",
    "distinguishable eigenvalues rise from 36.0 % to 63.6 %",
    refuted="the order of the two spectra depends on the denominator: no ranking of layers follows",
    otherwise="the order of the two spectra depends on quantizer and scaling",
)
def shares_answer(grid: pd.DataFrame) -> Found:
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
    text += f". Over the grid the compact one wins in {of_n:.0%} (of n) and {of_held:.0%} (held)"
    return REFUTED if of_n < 0.5 < of_held else SUPPORTED if min(of_n, of_held) > 0.95 else OPEN, text


@claim(
    "depth",
    "at depth 1000 heavy-tailed spectra collapse to the float floor",
    refuted="the scale of a layer decides whether its product survives, not its spectrum's shape",
    otherwise="collapse depends on bases and normalisation",
)
def depth_answer(table: pd.DataFrame) -> Found:
    """Does the flat spectrum collapse to the float floor where the compact one doesn't?"""
    count, both, flat, compact = collapsed(table)
    return SUPPORTED if flat and not compact else OPEN if flat else REFUTED, (
        f"of {count} pairs of bases and normalisation, both spectra collapse in {both}, only the flat one in "
        f"{flat}, only the compact one in {compact}; the rest keep, decay slowly or overflow"
    )


# --- the trained experiment ------------------------------------------------------------------------------


@claim(
    "summary",
    "nuclear initialization and trace-norm regularization train compact networks",
    supported="compactness can be trained; it is not a property of the layer's task alone",
    otherwise="how compact a layer is depends on its training less than stated",
)
def trainable(summary: Summary) -> Found:
    """Do nuclear initialization and the trace norm make spectra more compact, at equal loss?"""
    arms = [a for a in summary["arms"] if a["kind"] == "compact" and a["reached"]]
    numbers = ", ".join(f"{a['label']} {ratio(a['compactness_ratio'])}" for a in arms)
    text = f"rank at 90 % of Σσ against standard, at equal loss: {numbers}"
    return all_of([sign(a["compactness_ratio"]) for a in arms], -1), text


@claim(
    "summary",
    "compact spectra make networks robust to low precision",
    supported="a compact layer needs protection less, because it is compact",
    refuted="a layer's compactness does not decide what its quantization costs: measure the cost",
    otherwise="compact layers may be robust for another reason than their compactness: measure the cost",
)
def causes(summary: Summary, kind: str = "nf4") -> Found:
    """Does more compact mean less damaged: for every arm against standard, and against the controls?

    refuted if an arm more compact than standard is more damaged, or if of the reference arm and a control the
    more compact one is the more damaged: then something else decides.
    supported if every arm more compact than standard is less damaged, and the reference arm less than the
    Frobenius control too (compactness, not only a smaller norm).
    """
    arms = [a for a in summary["arms"] if a["reached"] and sign(a.get("compactness_ratio")) < 0]
    signs = {a["label"]: sign(a["damage_ratio"].get(kind)) for a in arms}
    less = [label for label, one in signs.items() if one < 0]
    rest = [label for label, one in signs.items() if one >= 0]
    text = f"of {len(signs)} arms more compact than standard, {len(less)} suffer less from {kind.upper()}"
    text += f" ({'; '.join(less)})" if less else ""
    text += f", {len(rest)} don't separably ({'; '.join(rest)})" if rest else ""
    verdict, relations = all_of(list(signs.values()), -1), {}
    for name, control in summary["matched"].items():
        rank, cost = control["compactness"], control[kind]
        relations[name] = of_sign(sign(rank) * sign(cost))
        if rank and cost:
            text += f". Over {name.replace('_', ' ')} at equal loss: rank {ratio(rank)}, damage {ratio(cost)}"
    if REFUTED in relations.values():
        verdict = REFUTED
    elif verdict == SUPPORTED:
        verdict = relations.get("frobenius", SUPPORTED)
    return verdict, text


@claim(
    "summary",
    "low α goes with robustness across models of equal loss",
    supported="of two models of equal loss the one with lower α suffers less",
    refuted="of two models of equal loss the one with higher α suffers less",
    otherwise="α does not rank models of equal loss",
)
def predicts_models(summary: Summary, kind: str = "nf4") -> Found:
    """Do α, and the other statistics, go along with damage across models of equal loss?"""
    views = summary["correlations"]["across models"]
    known = {key: row[kind] for key, row in views.items() if row[kind] is not None}
    if not known:
        return OPEN, "needs four arms or more"
    alpha, best = known.get("alpha_hill"), max(known, key=lambda key: abs(known[key]["mean"]))
    text = f"ρ of α (Hill) with NF4's KL {interval(alpha)}; strongest: {best} {interval(known[best])}"
    return of_sign(sign(alpha)), text


@claim(
    "summary",
    "α predicts robustness across training",
    supported="a change of α while a model trains says which way its damage goes",
    refuted="α may fall or rise while damage grows: no threshold on α carries over between models",
    otherwise="α's course through training is no basis for a threshold",
)
def predicts_training(summary: Summary) -> Found:
    """Has ρ between α and damage through training one sign in every arm?"""
    arms = {name: one for name, one in summary["alpha_through_training"].items() if one is not None}
    signs = {sign(one) for one in arms.values()}
    numbers = ", ".join(f"{name} {interval(one)}" for name, one in arms.items())
    text = f"Spearman's ρ of α (Hill) and NF4's KL over the levels of a run: {numbers}"
    return REFUTED if {-1, 1} <= signs else SUPPORTED if signs and 0 not in signs else OPEN, text


@claim(
    "summary",
    "a threshold should protect high α (flat spectra)",
    supported="on average protect the high end, which need not hold in every model",
    refuted="on average protect the low end, which need not hold in every model",
    otherwise="neither end of α is the one to protect in general",
)
def direction(summary: Summary) -> Found:
    """Which end of α should stay in 16-bit: the plans' real damage at equal bytes."""
    plans = summary["plans"]
    overall, against = plans["all arms"]["high/low"], plans["all arms"]["high/random"]
    signs = [sign(row["high/low"]) for name, row in plans.items() if name != "all arms"]
    within = summary["correlations"]["within a type"]["alpha_hill"]["int3"]
    views = summary["correlations"]["within a model"]
    known = {key: row["int3"] for key, row in views.items() if row["int3"] is not None}
    best = max(known, key=lambda key: abs(known[key]["mean"]), default="alpha_hill")
    return of_sign(-sign(overall)), (
        f"KL of int3 plans at half the weights, high α over low α: {ratio(overall)}, over random "
        f"{ratio(against)}; high is better in {signs.count(-1)} arms, low in {signs.count(1)} of {len(signs)}"
        f". Within a model ρ with the cost a weight is {interval(known.get('alpha_hill'))} for α, "
        f"{interval(within)} relative to the matrix type, and strongest for {best}: "
        f"{interval(known.get(best))}"
    )


def closing_table(
    summary: Summary, mass: pd.DataFrame, grid: pd.DataFrame, depth: pd.DataFrame
) -> pd.DataFrame:
    """stated · verdict · reproduced · what it means for choosing layers."""
    sources = {"summary": summary, "mass": mass, "grid": grid, "depth": depth}
    rows = []
    for source, stated, answer, meanings in CLAIMS:
        verdict, text = answer(sources[source])
        rows.append((stated, verdict, text, meanings.get(verdict, meanings[OPEN])))
    return pd.DataFrame(rows, columns=["stated", "verdict", "reproduced", "for choosing layers"])
