"""The lab's numbers -> its answers: every verdict is computed from intervals, none is typed.

`supported`, `refuted` or `not separable`, as in the evaluation. An effect counts where its 95 % interval over
seeds excludes zero, three seeds or more stand behind it, and Holm's p (where it was one of a family) is ≤
0.05.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from spi_utils.lab.numeric import comparison, stated_shares
from spi_utils.lab.summary import MIN_SEEDS

SUPPORTED, REFUTED, OPEN = "supported", "refuted", "not separable"
Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """What was stated or asked, the verdict on it, the numbers behind it, what follows for a selection."""

    stated: str
    verdict: str
    reproduced: str
    meaning: str


def sign(one: Mapping[str, Any] | None) -> int:
    """−1 or 1 where an `Estimate.as_dict` is distinguishable from zero, else 0."""
    if one is None or one["clusters"] < MIN_SEEDS or one["low"] is None or one["high"] is None:
        return 0
    if one.get("p_holm") is not None and one["p_holm"] > 0.05:
        return 0
    return int(one["low"] > 0) - int(one["high"] < 0)


def ratio(one: Mapping[str, Any]) -> str:
    """A logarithm of a ratio as "×0.66 (0.59 … 0.74)"."""
    ends = [math.exp(one[key]) if one[key] is not None else math.nan for key in ("low", "high")]
    return f"×{math.exp(one['mean']):.2f} ({ends[0]:.2f} … {ends[1]:.2f})"


def interval(one: Mapping[str, Any] | None) -> str:
    """An estimate as "−0.41 (−0.62 … −0.20)"."""
    if one is None:
        return "none"
    ends = [f"{one[key]:+.2f}" if one[key] is not None else "?" for key in ("low", "high")]
    return f"{one['mean']:+.2f} ({ends[0]} … {ends[1]})".replace("-", "−")


# --- the trained experiment ------------------------------------------------------------------------------


def trainable(summary: Summary) -> Answer:
    """Do nuclear initialization and the trace norm make spectra more compact, at equal loss?"""
    arms = [a for a in summary["arms"] if a["kind"] == "compact" and a["reached"]]
    signs = [sign(a["compactness_ratio"]) for a in arms]
    numbers = ", ".join(f"{a['label']} {ratio(a['compactness_ratio'])}" for a in arms)
    return Answer(
        "nuclear initialization and trace-norm regularization train compact networks",
        all_of(signs, -1),
        f"rank at 90 % of Σσ against standard, at equal loss: {numbers}",
        "compactness can be trained; it is not a property of the layer's task alone"
        if all_of(signs, -1) == SUPPORTED
        else "how compact a layer is depends on its training less than stated",
    )


def causes(summary: Summary, kind: str = "nf4") -> Answer:
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
    for name, control in summary["matched"].items():
        if control["compactness"] and control[kind]:
            text += f". Over {name.replace('_', ' ')} at equal loss: rank {ratio(control['compactness'])}, "
            text += f"damage {ratio(control[kind])}"
    verdict = all_of(list(signs.values()), -1)
    relations = {name: relation(control, kind) for name, control in summary["matched"].items()}
    if REFUTED in relations.values():
        verdict = REFUTED
    elif verdict == SUPPORTED:
        verdict = relations.get("frobenius", SUPPORTED)
    meanings = {
        SUPPORTED: "a compact layer needs protection less, because it is compact",
        REFUTED: "a layer's compactness does not decide what its quantization costs: measure the cost",
        OPEN: "compact layers may be robust for another reason than their compactness: measure the cost",
    }
    return Answer("compact spectra make networks robust to low precision", verdict, text, meanings[verdict])


def relation(control: Mapping[str, Any], kind: str) -> str:
    """Reference arm over a control: is the more compact one less damaged, more damaged, or can't one tell?"""
    rank, cost = sign(control["compactness"]), sign(control[kind])
    return {1: SUPPORTED, 0: OPEN, -1: REFUTED}[rank * cost]


def predicts_training(summary: Summary) -> Answer:
    """Has ρ between α and damage through training one sign in every arm?"""
    arms = summary["alpha_through_training"]
    signs = {name: sign(one) for name, one in arms.items() if one is not None}
    verdict = one_sign(list(signs.values()))
    numbers = ", ".join(f"{name} {interval(one)}" for name, one in arms.items() if one is not None)
    meanings = {
        SUPPORTED: "a change of α while a model trains says which way its damage goes",
        REFUTED: "α may fall or rise while damage grows: no threshold on α carries over between models",
        OPEN: "α's course through training is no basis for a threshold",
    }
    return Answer(
        "α predicts robustness across training",
        verdict,
        f"Spearman's ρ of α (Hill) and NF4's KL over the levels of a run: {numbers}",
        meanings[verdict],
    )


def predicts_models(summary: Summary, kind: str = "nf4") -> Answer:
    """Do α, and the other statistics, go along with damage across models of equal loss?"""
    found = {key: row[kind] for key, row in summary["correlations"]["across models"].items()}
    known = {key: one for key, one in found.items() if one is not None}
    if not known:
        return Answer(
            "low α goes with robustness across models of equal loss",
            OPEN,
            "needs four arms or more",
            "not measured here",
        )
    best = max(known, key=lambda key: abs(known[key]["mean"]))
    verdict = {1: SUPPORTED, 0: OPEN, -1: REFUTED}[sign(known.get("alpha_hill"))]
    meanings = {
        SUPPORTED: "of two models of equal loss the one with lower α suffers less",
        REFUTED: "of two models of equal loss the one with higher α suffers less",
        OPEN: "α does not rank models of equal loss",
    }
    return Answer(
        "low α goes with robustness across models of equal loss",
        verdict,
        f"ρ of α (Hill) with NF4's KL {interval(known.get('alpha_hill'))}; strongest: {best} "
        f"{interval(known[best])}",
        meanings[verdict],
    )


def direction(summary: Summary) -> Answer:
    """Which end of α should stay in 16-bit: the plans' real damage at equal bytes."""
    plans = summary["plans"]
    overall, against = plans["all arms"]["high/low"], plans["all arms"]["high/random"]
    arms = {name: sign(row["high/low"]) for name, row in plans.items() if name != "all arms"}
    high, low = (sum(one == which for one in arms.values()) for which in (-1, 1))
    verdict = {-1: SUPPORTED, 0: OPEN, 1: REFUTED}[sign(overall)]
    within = summary["correlations"]["within a type"]["alpha_hill"]["int3"]
    views = summary["correlations"]["within a model"]
    known = {key: row["int3"] for key, row in views.items() if row["int3"] is not None}
    best = max(known, key=lambda key: abs(known[key]["mean"]), default="alpha_hill")
    meanings = {
        SUPPORTED: "on average protect the high end" + (", but not in every model" if low else ""),
        REFUTED: "on average protect the low end" + (", but not in every model" if high else ""),
        OPEN: "neither end of α is the one to protect in general",
    }
    return Answer(
        "a threshold should protect high α (flat spectra)",
        verdict,
        f"KL of int3 plans at half the weights, high α over low α: {ratio(overall)}, over random "
        f"{ratio(against)}; high is better in {high} arms, low in {low} of {len(arms)}. Within a model "
        f"ρ with the cost a weight is {interval(known.get('alpha_hill'))} for α, {interval(within)} "
        "relative to the "
        f"matrix type, and strongest for {best}: {interval(known.get(best))}",
        meanings[verdict],
    )


# --- the synthetic experiments ---------------------------------------------------------------------------


def mass_answer(table: pd.DataFrame) -> Answer:
    """Are 82 and 11 the ranks at 90 % of the trace norm?"""
    before, least = (tuple(int(x) for x in table[column]) for column in ("strictly before", "at least"))
    return Answer(
        "rank at 90 % of trace-norm mass falls from 82 to 11",
        SUPPORTED if before == (82, 11) else REFUTED,
        f"{before[0]} → {before[1]} values stay strictly below 90 %; at least 90 % takes {least[0]} → "
        f"{least[1]}",
        "a difference between two given spectra; it says nothing about what a layer costs",
    )


def shares_answer(grid: pd.DataFrame) -> Answer:
    """Where do 36.0 % and 63.6 % come from, and what do they become under one denominator?"""
    rows = stated_shares(grid)
    both = rows[rows["both"]]
    wins = comparison(grid)[["compact wins, of n", "compact wins, of the held"]].mean()
    text = "no quantizer of the grid gives both"
    if len(both):
        one = both.iloc[0]
        text = (
            f"{one['flat']} of 100 and {one['compact']} of 11 ({one['bits']} bits, {one['scaling']}, "
            f"{one['steps']} steps, {one['count']}): two denominators. Of n both: {one['flat/n']:.1%} → "
            f"{one['compact/n']:.1%}; of those that hold the mass: {one['flat/held']:.1%} → "
            f"{one['compact/held']:.1%}"
        )
    text += f". Over the grid the compact one wins in {wins.iloc[0]:.0%} (of n) and {wins.iloc[1]:.0%} (held)"
    flips = wins.iloc[0] < 0.5 < wins.iloc[1]
    return Answer(
        "distinguishable eigenvalues rise from 36.0 % to 63.6 %",
        REFUTED if flips else SUPPORTED if wins.min() > 0.95 else OPEN,
        text,
        "the order of the two spectra depends on the denominator: no ranking of layers follows"
        if flips
        else "the order of the two spectra depends on quantizer and scaling",
    )


def depth_answer(table: pd.DataFrame) -> Answer:
    """Does the flat spectrum collapse to the float floor where the compact one doesn't?"""
    wide = table.assign(floor=table["float32"].str.startswith("floor")).pivot_table(
        index=["bases", "normalisation"], columns="spectrum", values="floor", aggfunc="first"
    )
    flat, compact = wide["flat"].astype(bool), wide["compact"].astype(bool)
    only_flat, only_compact, both = (flat & ~compact).sum(), (compact & ~flat).sum(), (flat & compact).sum()
    verdict = SUPPORTED if only_flat and not only_compact else REFUTED if not only_flat else OPEN
    return Answer(
        "at depth 1000 heavy-tailed spectra collapse to the float floor",
        verdict,
        f"of {len(wide)} pairs of bases and normalisation, both spectra collapse in {both}, only the "
        "flat one in "
        f"{only_flat}, only the compact one in {only_compact}; the rest keep, decay slowly or overflow",
        "the scale of a layer decides whether its product survives, not its spectrum's shape"
        if verdict == REFUTED
        else "collapse depends on bases and normalisation",
    )


def closing_table(
    summary: Summary, mass: pd.DataFrame, grid: pd.DataFrame, depth: pd.DataFrame
) -> pd.DataFrame:
    """stated · verdict · reproduced · what it means for choosing layers."""
    answers = [
        mass_answer(mass), shares_answer(grid), depth_answer(depth), trainable(summary), causes(summary),
        predicts_models(summary), predicts_training(summary), direction(summary),
    ]  # fmt: skip
    names = {"meaning": "for choosing layers"}
    return pd.DataFrame([vars(answer) for answer in answers]).rename(columns=names)


def all_of(signs: Sequence[int], wanted: int) -> str:
    """supported if every sign is the wanted one, refuted if any is the opposite, else not separable."""
    if signs and all(one == wanted for one in signs):
        return SUPPORTED
    return REFUTED if any(one == -wanted for one in signs) else OPEN


def one_sign(signs: Sequence[int]) -> str:
    """supported if all signs are the same and none is 0, refuted if both signs occur, else not separable."""
    if 1 in signs and -1 in signs:
        return REFUTED
    return SUPPORTED if signs and 0 not in signs else OPEN
