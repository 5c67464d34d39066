"""The layer table -> a ProtectionPlan: which format every layer gets, why, and what that weighs.

`make_plan` joins a score (scores.py), a rule (rules.py) and the user's wishes (choice.py). The rules `claim`
and `top_k` count layers, `threshold` cuts the score, `budget_gb`, `bits_per_weight` and `matrix_bits` spend
bytes, `max_kl` buys the smallest plan with a predicted KL. Where the score is additive and `high`, a budget
is spent exactly (knapsack.py); otherwise in the score's order, skipping what doesn't fit. Plans are written,
read and compared in protection.py. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from spi_utils.errors import PlanError
from spi_utils.planning.choice import Patterns, Problem, pose
from spi_utils.planning.pricing import bit_rates, nominal_bits, price
from spi_utils.planning.protection import PlanDiff, ProtectionPlan, check_plan, check_writer, diff
from spi_utils.planning.rules import RULES, STOCK, Answer, Ask, check_value, remarks
from spi_utils.planning.scores import SCORES, predicted_cost, score_values

__all__ = [
    "RULES",
    "SCORES",
    "PlanDiff",
    "ProtectionPlan",
    "check_plan",
    "check_writer",
    "diff",
    "equal_bytes_plan",
    "make_plan",
    "price",
    "random_plan",
    "score_values",
]


def make_plan(
    layers: pd.DataFrame,
    *,
    score: str = "alpha_hill",
    direction: str = "high",
    rule: str = "claim",
    value: float | None = None,
    formats: Sequence[str] = ("nf4", "16bit"),
    double_quant: bool = False,
    group: str | None = None,
    force_16bit: Patterns = None,
    forbid_16bit: Patterns = None,
    seed: int = 0,
    model: Mapping[str, Any] | None = None,
    layers_fingerprint: str = "",
    origin: str = "parameters",
    writer: str = STOCK,
) -> ProtectionPlan:
    """Decide every layer's format.

    Args:
        layers: the layer table (`runs.read_layers`), all rows.
        score: a row of `SCORES`. direction: "high" or "low", the end of the score that is protected.
        rule: a key of `RULES`. value: the rule's number (layers, score, GB of 10⁹ bytes, bits, or nats a
            token); None for `claim`.
        formats: what to choose from; more than two need an additive score, `high`, and a budget.
        double_quant: NF4 with double quantization.
        group: "fused" keeps q,k,v of one attention, gate,up of one MLP and Qwen3.5's in_proj pairs together.
        force_16bit, forbid_16bit: patterns (`re.search` in module names) for layers to keep in, or out of,
            16-bit whatever the score says.
        seed: for the score `random`.
        model, layers_fingerprint, origin: recorded in the plan.
        writer: the checkpoint writer that is meant; the plan's reason says what it can't hold.

    Raises:
        PlanError: unknown names (with the nearest match), a value out of range (with the possible range),
            failed layers, or a score that the table doesn't hold.
    """
    number = check_value(rule, value)
    wishes: dict[str, Any] = {"force_16bit": force_16bit, "forbid_16bit": forbid_16bit, "seed": seed}
    wishes |= {"double_quant": double_quant}
    problem = pose(layers, score, direction, formats, group=group, **wishes)
    ask = Ask(problem, layers, rule, number)
    answer = RULES[rule].choose(ask)
    assigned = _assigned(problem, answer)
    worth = _worth(ask, answer, assigned, double_quant)
    said = [answer.sentence, *remarks(ask, answer, worth["bytes"], writer)]
    if group and worth["predicted_kl"] is not None:
        free = replace(ask, problem=pose(layers, score, direction, formats, **wishes))
        said.append(_price_of_groups(worth, free, double_quant))
    return ProtectionPlan(
        model=dict(model or {}),
        score=score,
        direction=direction,
        rule=rule,
        value=answer.value,
        formats=assigned,
        protected=tuple(name for name, fmt in assigned.items() if fmt == "16bit"),
        double_quant=double_quant,
        layers_fingerprint=layers_fingerprint,
        origin=origin,
        reason=" ".join(said),
        options=_options(group, force_16bit, forbid_16bit, seed),
        **worth,
    )


def _assigned(problem: Problem, answer: Answer) -> dict[str, str]:
    """{layer: format} of an answer, which speaks of items."""
    chosen = answer.formats[problem.member]
    return {name: problem.formats[place] for name, place in zip(problem.names, chosen, strict=True)}


def _worth(ask: Ask, answer: Answer, assigned: Mapping[str, str], double_quant: bool) -> dict[str, Any]:
    """The fields of a plan that say what it weighs and what it is predicted to cost."""
    weight = dict.fromkeys(ask.problem.formats, 0) | price(ask.layers, assigned, double_quant)
    if RULES[ask.rule].unit:
        weight |= {"budget": ask.goal, "miss": ask.goal - ask.size(answer.formats) - ask.offset}
    overall, matrix = bit_rates(ask.layers, assigned, double_quant)
    cost = predicted_kl(ask.layers, assigned)
    return {"bytes": weight, "bits_per_weight": overall, "matrix_bits": matrix, "predicted_kl": cost}


def _price_of_groups(worth: Mapping[str, Any], free: Ask, double_quant: bool) -> str:
    """What keeping merged layers together costs, beside the same choice made layer by layer (`free`)."""
    formats = _assigned(free.problem, RULES[free.rule].choose(free))
    bits, kl = bit_rates(free.layers, formats, double_quant)[1], predicted_kl(free.layers, formats)
    return (
        f"Layers that engines merge share a format: predicted KL {worth['predicted_kl']:.4g} at "
        f"{worth['matrix_bits']:.3f} matrix bits, "
        f"layer by layer {'unknown' if kl is None else f'{kl:.4g}'} at {bits:.3f}."
    )


def predicted_kl(layers: pd.DataFrame, formats: Mapping[str, str]) -> float | None:
    """Σ `predicted_<fmt>` over the quantized layers, nats a token; None where one is unknown."""
    names = layers["name"].to_numpy(str)
    held = np.array([formats.get(name, "16bit") for name in names])
    total = sum(float(predicted_cost(layers, fmt)[held == fmt].sum()) for fmt in set(formats.values()))
    return float(total) if np.isfinite(total) else None


def equal_bytes_plan(
    layers: pd.DataFrame,
    *,
    total_bytes: int | None = None,
    extra_bytes: int | None = None,
    score: str = "fisher",
    direction: str = "high",
    formats: Sequence[str] = ("nf4", "16bit"),
    double_quant: bool = False,
    **options: Any,
) -> ProtectionPlan:
    """The plan by `score` that weighs the same: at most `total_bytes`, and as near as whole layers allow.

    Args:
        total_bytes: another plan's `bytes["total"]`; or
        extra_bytes: bytes to spend above the smallest plan.

    Raises:
        PlanError: neither or both given; else as `make_plan`.
    """
    if (total_bytes is None) == (extra_bytes is None):
        raise PlanError("give either total_bytes (a plan's bytes['total']) or extra_bytes (above all-NF4).")
    if total_bytes is None:
        least = dict.fromkeys(layers["name"][layers["quantizable"]], min(formats, key=nominal_bits))
        total_bytes = price(layers, least, double_quant)["total"] + int(extra_bytes or 0)
    return make_plan(
        layers, score=score, direction=direction, rule="budget_gb", value=total_bytes / 1e9,
        formats=formats, double_quant=double_quant, **options,
    )  # fmt: skip


def random_plan(layers: pd.DataFrame, total_bytes: int, seed: int, **options: Any) -> ProtectionPlan:
    """A random selection of the same weight, for the control; `seed` decides it."""
    return equal_bytes_plan(layers, total_bytes=total_bytes, score="random", seed=seed, **options)


def _options(group: str | None, force: Patterns, forbid: Patterns, seed: int) -> dict[str, Any]:
    def plain(patterns: Patterns) -> Any:
        return patterns if patterns is None or isinstance(patterns, str) else list(patterns)

    return {"group": group, "force_16bit": plain(force), "forbid_16bit": plain(forbid), "seed": seed}
