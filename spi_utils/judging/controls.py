"""Which format each layer has in every variant that an evaluation compares (no torch, no model).

All variants are choices of formats over one and the same set of weights. Controls have the plan's bytes, so
that a difference between them is the selection's and not the budget's. To add a control, add a row to
`CONTROLS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from spi_utils.errors import EvaluationError, PlanError
from spi_utils.plan import (
    ProtectionPlan,
    able,
    available_scores,
    bit_rates,
    equal_bytes_plan,
    fused_groups,
    held_words,
    matches,
    nominal_bits,
    payload_bytes,
    predicted_kl,
    price,
    score_values,
)

QUICK = ("other_direction", "fisher", "fisher_int8", "fisher_int4", "int8", "int4", "random")
FULL = (*QUICK, "noise", "first_last", "smallest_first", "type_prior")
INT4 = "int4_g64"  # the uniform 4-bit rival, and the low tier of the mixes for vLLM
NEAREST = "_nearest"  # behind a format: rounded to nearest in a run whose rounding is guided
EQUAL_BYTES = 0.005  # "equal bytes": within this share of the model's total bytes


@dataclass(frozen=True)
class Variant:
    """A choice of formats over the planned layers.

    `formats` {module: a row of `formats.FORMATS`, the same with "_nearest", or "noise"}; `bytes` as the saved
    file would hold it (`noise` counts as the NF4 it stands for); `bits_per_weight` over all weights,
    `matrix_bits` over the planned matrices; `predicted_kl` in nats a token, None without sensitivity;
    `equal_bytes` marks the plan and the controls that share its budget, `bytes_miss` their distance from it,
    a share of the 16-bit model's bytes.
    """

    key: str
    label: str
    formats: dict[str, str]
    bytes: int
    bits_per_weight: float
    matrix_bits: float
    predicted_kl: float | None
    equal_bytes: bool
    bytes_miss: float


Choose = Callable[[pd.DataFrame, ProtectionPlan, int], Mapping[str, str]]


@dataclass(frozen=True)
class Control:
    """A control: its label, and what chooses its formats from the table, the plan and a seed.

    "{held}" in the label becomes the formats that were chosen.
    """

    label: str
    choose: Choose
    equal_bytes: bool = True


def make_variants(
    layers: pd.DataFrame,
    plan: ProtectionPlan,
    controls: Sequence[str],
    *,
    random_seeds: int = 5,
    seed: int = 0,
) -> tuple[dict[str, Variant], dict[str, str]]:
    """The 16-bit reference, pure NF4, the plan, and the controls asked for.

    Args:
        layers: the layer table, all rows.
        plan: what is judged.
        controls: keys of `FULL`; "random" stands for `random_0` … `random_{random_seeds − 1}`.
        random_seeds: how many random selections.
        seed: of the first of them, and of the noise.

    Returns the variants in the order in which they are scored, and {control: reason} for those that this
    layer table can't give (no sensitivity column). Raises EvaluationError for an unknown control's name.
    """
    unknown = [key for key in controls if key not in FULL]
    if unknown:
        raise EvaluationError(f"there is no control {unknown[0]!r}; choose from {', '.join(FULL)}.")
    ends = ENDS if plan.rounding == "guided" else {k: v for k, v in ENDS.items() if not k.endswith(NEAREST)}
    rows = {**ends, **{key: CONTROLS[key] for key in FULL if key in controls and key != "random"}}
    seeds = range(seed, seed + random_seeds) if "random" in controls else ()
    rows |= {f"random_{index}": _random(number) for index, number in enumerate(seeds)}
    found: dict[str, Variant] = {}
    skipped: dict[str, str] = {}
    for key, control in rows.items():
        try:
            formats = dict(control.choose(layers, plan, seed))
        except PlanError as error:
            skipped[key] = str(error)
            continue
        found[key] = _priced(layers, plan, key, control, formats)
    return found, skipped


def plan_label(plan: ProtectionPlan) -> str:
    """The plan in a few words: "the plan (alpha_hill, high)"."""
    return f"the plan ({plan.score}, {plan.direction})"


def _priced(
    layers: pd.DataFrame, plan: ProtectionPlan, key: str, control: Control, formats: dict[str, str]
) -> Variant:
    """A variant with its bytes, bit rates and predicted KL."""
    stored = {name: stored_as(fmt) for name, fmt in formats.items()}
    cost = price(layers, stored, plan.double_quant)
    overall, matrix = bit_rates(layers, stored, plan.double_quant)
    return Variant(
        key=key,
        label=plan_label(plan) if key == "plan" else _label(control, formats),
        formats=formats,
        bytes=cost["total"],
        bits_per_weight=overall,
        matrix_bits=matrix,
        # Predictions speak of the run's own rounding; none was ever made for noise.
        predicted_kl=predicted_kl(layers, stored) if stored == formats else None,
        equal_bytes=control.equal_bytes,
        bytes_miss=(cost["total"] - plan.bytes["total"]) / cost["total_16bit"]
        if control.equal_bytes
        else 0.0,
    )


def _label(control: Control, formats: Mapping[str, str]) -> str:
    """A control's label, told by the formats that it holds: what was on its menu may not have been chosen."""
    uniform = control.label.endswith("everywhere") and len(set(formats.values())) > 1
    label = control.label.replace("everywhere", "where it fits") if uniform else control.label
    return label.format(held=held_words({stored_as(fmt) for fmt in formats.values() if fmt != "noise"}))


def stored_as(fmt: str) -> str:
    """The row of `FORMATS` behind a variant's format: noise stands for NF4, and rounding is no format."""
    return "nf4" if fmt == "noise" else fmt.removesuffix(NEAREST)


def in_plans_formats(
    layers: pd.DataFrame, plan: ProtectionPlan, score: str, seed: int, flip: bool
) -> dict[str, str]:
    """The plan's own formats, each with the bytes that the plan spends on it, given out in a score's order.

    For plans with a format between 4-bit and 16-bit: what differs from the plan is then which layers get
    what, not how many bits there are of each kind. Merged layers stay together if the plan's do, and layers
    that the plan's patterns force into 16-bit, or forbid it, obey them here too. The highest format goes
    first.
    """
    low = tiers(plan)[0]
    rows = layers[layers["quantizable"]].reset_index(drop=True)
    names = list(rows["name"])
    groups = fused_groups(names) if plan.options.get("group") else [[place] for place in range(len(names))]
    values = score_values(layers, score, formats=tiers(plan), seed=seed)[layers["quantizable"].to_numpy(bool)]
    own = [plan.formats[name] for name in names]
    patterns = _patterns(plan)
    forced = matches(names, patterns["force_16bit"], "force_16bit")
    forbidden = matches(names, patterns["forbid_16bit"], "forbid_16bit")
    movable = able(rows, low) & ~forced  # others keep the plan's format, and so do those merged with them
    for group in groups:
        movable[group] = movable[group].all()
    groups = [group for group in groups if movable[group[0]]]
    mean = np.array([np.nanmean(values[group]) for group in groups])
    order = np.argsort(mean if flip else -mean, kind="stable")
    chosen = [low if held else fmt for held, fmt in zip(movable, own, strict=True)]
    base = payload_bytes(rows, low, plan.double_quant)
    left = 0
    for fmt in sorted(set(own) - {low}, key=nominal_bits, reverse=True):
        extra = payload_bytes(rows, fmt, plan.double_quant) - base
        left += sum(int(extra[place]) for place, held in enumerate(own) if held == fmt and movable[place])
        for group in (groups[place] for place in order):
            cost = int(extra[group].sum())
            barred = fmt == "16bit" and forbidden[group].any()
            fitting = cost <= left and able(rows.iloc[group], fmt).all()
            if chosen[group[0]] == low and fitting and not barred:
                left -= cost
                for place in group:
                    chosen[place] = fmt
    return dict(zip(names, chosen, strict=True))


def _everything(fmt: str) -> Choose:
    def choose(layers: pd.DataFrame, plan: ProtectionPlan, seed: int) -> Mapping[str, str]:
        planned = layers["quantizable"].to_numpy(bool)
        held = able(layers, fmt.removesuffix(NEAREST))
        return {
            name: fmt if fits else "16bit"
            for name, fits in zip(layers.loc[planned, "name"], held[planned], strict=True)
        }

    return choose


def tiers(plan: ProtectionPlan) -> tuple[str, str]:
    """The two formats of the plan's 16-bit hybrids: its smallest one (NF4 if there is none) and 16-bit."""
    lower = {fmt for fmt in plan.formats.values() if fmt != "16bit"}
    return min(lower, key=nominal_bits, default="nf4"), "16bit"


def _by_score(
    score: str,
    formats: Sequence[str] = (),
    number: int = 0,
    flip: bool = False,
    group: str | None = None,
) -> Choose:
    """What a score chooses at the plan's bytes; `score` "" is the plan's own, `flip` its other end, and no
    formats are the plan's two tiers."""

    def choose(layers: pd.DataFrame, plan: ProtectionPlan, seed: int) -> Mapping[str, str]:
        chosen = formats or tiers(plan)
        if not formats and score != "fisher" and set(plan.formats.values()) - set(chosen):
            return in_plans_formats(layers, plan, score or plan.score, number, flip)
        if score and score not in available_scores(layers, chosen):
            raise PlanError(
                f"layers.csv lacks {score}'s column for {', '.join(chosen)}. Run notebook 01_analyze with "
                "sensitivity='self' and these among its cost_formats."
            )
        other = "low" if plan.direction == "high" else "high"
        return equal_bytes_plan(
            layers,
            total_bytes=plan.bytes["total"],
            score=score or plan.score,
            direction=other if flip else "high",
            formats=chosen,
            double_quant=plan.double_quant,
            seed=number,
            group=group if formats else plan.options.get("group"),
            **_patterns(plan),
        ).formats

    return choose


def _patterns(plan: ProtectionPlan) -> dict[str, Any]:
    """What the plan's user settled: a control that chose there too would differ in more than the score."""
    return {name: plan.options.get(name) for name in ("force_16bit", "forbid_16bit")}


def _nearest(plan: ProtectionPlan) -> dict[str, str]:
    return {name: fmt if fmt == "16bit" else fmt + NEAREST for name, fmt in plan.formats.items()}


def _noise(layers: pd.DataFrame, plan: ProtectionPlan, seed: int) -> Mapping[str, str]:
    if "nf4" not in plan.formats.values():
        raise PlanError("the plan has no NF4 layer that noise could stand for.")
    return {name: "noise" if fmt == "nf4" else fmt for name, fmt in plan.formats.items()}


def _random(number: int) -> Control:
    return Control(f"random, seed {number}", _by_score("random", number=number))


ENDS: dict[str, Control] = {
    "reference": Control("16-bit reference", _everything("16bit"), equal_bytes=False),
    "nf4": Control("pure NF4", _everything("nf4"), equal_bytes=False),
    "plan": Control("the plan", lambda layers, plan, seed: plan.formats),
    # What bitsandbytes would have made of the same weights: the claim as stated.
    "nf4_nearest": Control("pure NF4, nearest", _everything("nf4" + NEAREST), equal_bytes=False),
    "plan_nearest": Control(
        "the plan, nearest", lambda layers, plan, seed: _nearest(plan), equal_bytes=False
    ),
}
CONTROLS: dict[str, Control] = {
    "other_direction": Control("the score's other end", _by_score("", flip=True)),
    "fisher": Control("Fisher's optimum", _by_score("fisher")),
    # Above all-int8 the optimum keeps the layers in 16-bit that gain most.
    "fisher_int8": Control("Fisher's optimum of {held}", _by_score("fisher", ("nf4", "int8", "16bit"))),
    # What vLLM serves: merged layers share a format.
    "fisher_int4": Control(
        "Fisher for vLLM: {held}", _by_score("fisher", (INT4, "int8", "16bit"), group="fused")
    ),
    "int8": Control("int8 everywhere", _everything("int8"), equal_bytes=False),
    "int4": Control("int4 (groups of 64) everywhere", _everything(INT4), equal_bytes=False),
    "noise": Control("the plan, noise for NF4", _noise),
    "first_last": Control("first and last blocks", _by_score("first_last")),
    "smallest_first": Control("smallest layers first", _by_score("smallest")),
    "type_prior": Control("type prior", _by_score("type_prior")),
}
