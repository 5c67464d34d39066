"""Which format each layer has in every variant that an evaluation compares.

All variants are choices of formats over one and the same set of weights. Controls have the plan's bytes, so
that a difference between them is the selection's and not the budget's. To add a control, add a row to
`CONTROLS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from spi_utils.errors import EvaluationError, PlanError
from spi_utils.plan import (
    ProtectionPlan,
    able,
    bit_rates,
    costs_as_stored,
    fused_groups,
    held_words,
    make_plan,
    matches,
    nominal_bits,
    payload_bytes,
    predicted_kl,
    price,
    score_values,
)
from spi_utils.scoring import NEAREST

QUICK = ("other_direction", "fisher", "int8", "random")
FULL = (*QUICK, "fisher_int8", "fisher_int4", "int4", "noise", "first_last", "smallest_first", "type_prior")
INT4 = "int4_g64"  # the uniform 4-bit rival, and the low tier of the mixes for vLLM
Formats = Mapping[str, str]


@dataclass(frozen=True)
class Variant:
    """A choice of formats over the planned layers.

    `formats` {module: a row of `formats.FORMATS`, the same with "_nearest", or "noise"}; `bytes` as the saved
    file would hold it (`noise` counts as the NF4 it stands for); `bits_per_weight` over all weights,
    `matrix_bits` over the planned matrices; `predicted_kl` in nats a token, None without sensitivity;
    `equal_bytes` marks the plan and the controls that share its budget, `bytes_miss` their distance from it,
    a share of the 16-bit model's bytes.
    """

    label: str
    formats: Formats
    bytes: int
    bits_per_weight: float
    matrix_bits: float
    predicted_kl: float | None
    equal_bytes: bool
    bytes_miss: float


@dataclass(frozen=True)
class Control:
    """What a variant is called, what chooses its formats from the layer table and the plan, and whether the
    choice has the plan's bytes. "{held}" in the label becomes the formats that were chosen."""

    label: str
    choose: Callable[[pd.DataFrame, ProtectionPlan], Formats]
    equal_bytes: bool = True


def make_variants(
    layers: pd.DataFrame, plan: ProtectionPlan, controls: Sequence[str], random_seeds: int = 5, seed: int = 0
) -> tuple[dict[str, Variant], dict[str, str]]:
    """The 16-bit reference, pure NF4, the plan, and the controls asked for.

    Args:
        layers: the layer table, all rows.
        plan: what is judged.
        controls: names of `FULL`; "random" stands for `random_0` … `random_{random_seeds − 1}`.
        random_seeds: how many random selections.
        seed: of the first of them.

    Returns the variants in the order in which they are scored, and {control: reason} for those that this
    layer table can't give (no sensitivity column). Raises EvaluationError for an unknown control's name.
    """
    if unknown := [key for key in controls if key not in FULL]:
        raise EvaluationError(f"there is no control {unknown[0]!r}; choose from {', '.join(FULL)}.")
    rows = {key: one for key, one in ENDS.items() if plan.rounding == "guided" or not key.endswith(NEAREST)}
    rows |= {key: one for key, one in CONTROLS.items() if key in controls}
    for n in range(seed, seed + random_seeds if "random" in controls else seed):
        rows[f"random_{n - seed}"] = _chosen(f"random, seed {n}", score="random", seed=n)
    found: dict[str, Variant] = {}
    skipped: dict[str, str] = {}
    for key, control in rows.items():
        try:
            formats = dict(control.choose(layers, plan))
        except PlanError as error:
            skipped[key] = str(error)
            continue
        # Noise stands for NF4, and how codes were rounded is no format.
        stored = {n: "nf4" if fmt == "noise" else fmt.removesuffix(NEAREST) for n, fmt in formats.items()}
        # Labels name what is held: not all on a menu may have been chosen, nor one format fit every layer.
        held = held_words({stored[name] for name, fmt in formats.items() if fmt != "noise"})
        label = control.label.format(held=held, score=plan.score, direction=plan.direction)
        if len(set(formats.values())) > 1:
            label = label.replace("everywhere", "where it fits")
        cost, rates = price(layers, stored, plan.double_quant), bit_rates(layers, stored, plan.double_quant)
        miss = (cost["total"] - plan.bytes["total"]) / cost["total_16bit"] if control.equal_bytes else 0.0
        # Predictions speak of the run's own rounding; none was ever made for noise.
        known = costs_as_stored(layers, plan.double_quant)
        kl = predicted_kl(known, stored) if stored == formats else None
        found[key] = Variant(label, formats, cost["total"], *rates, kl, control.equal_bytes, miss)
    return found, skipped


def _everywhere(layers: pd.DataFrame, plan: ProtectionPlan, fmt: str) -> Formats:
    planned = layers[layers["quantizable"]]
    rows = zip(planned["name"], able(planned, fmt.removesuffix(NEAREST)), strict=True)
    return {name: fmt if fits else "16bit" for name, fits in rows}


def _plan_nearest(layers: pd.DataFrame, plan: ProtectionPlan) -> Formats:
    return {name: fmt if fmt == "16bit" else fmt + NEAREST for name, fmt in plan.formats.items()}


def _noise(layers: pd.DataFrame, plan: ProtectionPlan) -> Formats:
    if "nf4" not in plan.formats.values():
        raise PlanError("the plan has no NF4 layer that noise could stand for.")
    return {name: "noise" if fmt == "nf4" else fmt for name, fmt in plan.formats.items()}


def _by_score(
    layers: pd.DataFrame, plan: ProtectionPlan, score: str = "", seed: int = 0, flip: bool = False, **mix: Any
) -> Formats:
    """What a score chooses at the plan's bytes; `score` "" is the plan's own, `flip` its other end. `mix`:
    formats and group; none are the plan's group, its smallest format (NF4 if there is none) and 16-bit."""
    low = min(set(plan.formats.values()) - {"16bit"}, key=nominal_bits, default="nf4")
    if not mix and score != "fisher" and set(plan.formats.values()) - {low, "16bit"}:
        return _in_plans_formats(layers, plan, score or plan.score, low, seed, flip)
    # What the plan's user settled: a control that chose there too would differ in more than the score.
    asked: dict[str, Any] = {
        name: plan.options.get(name) for name in ("group", "force_16bit", "forbid_16bit")
    }
    asked |= {"formats": (low, "16bit"), "double_quant": plan.double_quant, "seed": seed}
    asked |= {"direction": "low" if flip and plan.direction == "high" else "high"}
    asked |= {"group": None, **mix} if mix else {}
    asked |= {"score": score or plan.score, "rule": "budget_gb", "value": plan.bytes["total"] / 1e9}
    return make_plan(layers, **asked).formats


def _in_plans_formats(
    layers: pd.DataFrame, plan: ProtectionPlan, score: str, low: str, seed: int, flip: bool
) -> Formats:
    """The plan's own formats, each with the bytes that the plan spends on it, given out in a score's order.

    For plans with a format between 4-bit and 16-bit: what differs from the plan is then which layers get
    what, not how many bits there are of each kind. Merged layers stay together if the plan's do, and layers
    that the plan's patterns force into 16-bit, or forbid it, obey them here too. The highest format goes
    first.
    """
    planned = layers["quantizable"].to_numpy(bool)
    rows = layers[planned].reset_index(drop=True)
    names = list(rows["name"])
    own = np.array([plan.formats[name] for name in names])
    values = score_values(layers, score, formats=(low, "16bit"), seed=seed)[planned]
    forced, forbidden = (
        matches(names, plan.options.get(one), one) for one in ("force_16bit", "forbid_16bit")
    )
    movable = able(rows, low) & ~forced  # others keep the plan's format, and so do those merged with them
    together = fused_groups(names) if plan.options.get("group") else [[place] for place in range(len(names))]
    groups = [group for group in together if movable[group].all()]
    mean = np.array([np.nanmean(values[group]) for group in groups])
    order = np.argsort(mean if flip else -mean, kind="stable")
    chosen = own.astype(object)
    moved = [place for group in groups for place in group]
    chosen[moved] = low
    left = 0
    for fmt in sorted({*own} - {low}, key=nominal_bits, reverse=True):
        extra = payload_bytes(rows, fmt, plan.double_quant) - payload_bytes(rows, low, plan.double_quant)
        left += int(extra[moved][own[moved] == fmt].sum())
        for group in (groups[place] for place in order):
            barred = (fmt == "16bit" and forbidden[group].any()) or not able(rows.iloc[group], fmt).all()
            if chosen[group[0]] == low and extra[group].sum() <= left and not barred:
                left -= int(extra[group].sum())
                chosen[group] = fmt
    return dict(zip(names, chosen.tolist(), strict=True))


def _uniform(label: str, fmt: str) -> Control:
    return Control(label, partial(_everywhere, fmt=fmt), equal_bytes=False)


def _chosen(label: str, **asked: Any) -> Control:
    return Control(label, partial(_by_score, **asked))


# What bitsandbytes would have made of the same weights, where rounding is guided, is the claim as stated.
ENDS: dict[str, Control] = {
    "reference": _uniform("16-bit reference", "16bit"),
    "nf4": _uniform("pure NF4", "nf4"),
    "plan": Control("the plan ({score}, {direction})", lambda layers, plan: plan.formats),
    "nf4_nearest": _uniform("pure NF4, nearest", "nf4" + NEAREST),
    "plan_nearest": Control("the plan, nearest", _plan_nearest, equal_bytes=False),
}
MIX, SERVED = ("nf4", "int8", "16bit"), (INT4, "int8", "16bit")  # vLLM serves the second: merged layers share
CONTROLS: dict[str, Control] = {
    "other_direction": _chosen("the score's other end", flip=True),
    "fisher": _chosen("Fisher's optimum", score="fisher"),
    # Above all-int8 the optimum keeps the layers in 16-bit that gain most.
    "fisher_int8": _chosen("Fisher's optimum of {held}", score="fisher", formats=MIX),
    "fisher_int4": _chosen("Fisher for vLLM: {held}", score="fisher", formats=SERVED, group="fused"),
    "int8": _uniform("int8 everywhere", "int8"),
    "int4": _uniform("int4 (groups of 64) everywhere", INT4),
    "noise": Control("the plan, noise for NF4", _noise),
    "first_last": _chosen("first and last blocks", score="first_last"),
    "smallest_first": _chosen("smallest layers first", score="smallest"),
    "type_prior": _chosen("type prior", score="type_prior"),
}
