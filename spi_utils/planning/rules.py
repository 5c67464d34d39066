"""The rules that turn scores into a choice of formats: count layers, cut at a threshold, spend a budget.

To add a rule, write one function from an `Ask` to an `Answer` and give it a row of `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
import pandas as pd

from spi_utils.errors import PlanError
from spi_utils.formats import format_row
from spi_utils.planning.choice import Ints, Mask, Problem
from spi_utils.planning.knapsack import GAP, Solution, in_order, least_cost
from spi_utils.planning.pricing import able, fixed_bytes
from spi_utils.planning.scores import suggest

CLAIM_LAYERS, CLAIM_OF = 129, 248  # the SPI's own count, of the matrices of Qwen3.5-4B
CLAIM_SHARE = 0.52
TOLERANCE = 1e-3  # a budget this close below the smallest plan is the smallest plan: "matrix_bits=4.5"
STOCK = "bitsandbytes"  # the checkpoint writer of the claim and of the defaults
EXACT = GAP * (1 + 1e-9)  # a choice proven this near the optimum is called exact
EQUAL = 5e-3  # "equal bytes": within this share of the 16-bit model's bytes


@dataclass(frozen=True)
class Ask:
    """A problem, the rule's number, and a budget's arithmetic: sizes in bytes against a limit in bytes."""

    problem: Problem
    layers: pd.DataFrame
    rule: str
    value: float

    @property
    def sizes(self) -> Ints:
        """(I, F) bytes that count for this rule: with the file's header where the whole file is meant."""
        p = self.problem
        return p.payload + p.header if self.rule == "budget_gb" else p.payload

    @property
    def offset(self) -> int:
        """Bytes that count for this rule and are not planned."""
        data, header = fixed_bytes(self.layers)
        return {"matrix_bits": 0, "budget_gb": data + header}.get(self.rule, data)

    @property
    def unit(self) -> float:
        """Bytes in one unit of the rule's value."""
        weights = {"bits_per_weight": int(self.layers["numel"].sum()), "matrix_bits": self.problem.numel}
        return weights[self.rule] / 8 if self.rule in weights else 1e9

    @property
    def goal(self) -> int:
        """The budget in bytes, what is not planned included."""
        return int(np.floor(self.value * self.unit + 0.5))

    def size(self, choice: Ints) -> int:
        """Bytes of the planned layers in a choice, as this rule counts them."""
        return int(self.sizes[np.arange(len(choice)), choice].sum())


@dataclass(frozen=True)
class Answer:
    """The chosen format's index for every item, one sentence that says why, and the value to record."""

    formats: Ints
    sentence: str
    value: float | None


@dataclass(frozen=True)
class Rule:
    """One row of the table: what it does, in a menu's words, and its value's unit if it is a budget."""

    name: str
    title: str
    choose: Callable[[Ask], Answer]
    unit: str = ""


def check_value(rule: str, value: float | None) -> float:
    """The rule's number; 0 for `claim`, which takes none.

    Raises:
        PlanError: unknown rule (with the nearest), a missing value, or one that is no finite number.
    """
    if rule not in RULES:
        raise PlanError(f"unknown rule {rule!r}.{suggest(rule, RULES)} Known: {', '.join(RULES)}.")
    if rule == "claim":
        if value is not None:
            raise PlanError(f"rule='claim' fixes the number of layers itself; use rule='top_k' for {value}.")
        return 0.0
    wanted = RULES[rule].unit or RULES[rule].title
    if isinstance(value, bool) or not isinstance(value, Real):
        raise PlanError(f"rule={rule!r} needs a value ({wanted}); got {value!r}.")
    if np.isnan(value) or (np.isinf(value) and rule != "threshold"):
        raise PlanError(f"rule={rule!r}: the value must be a finite number ({wanted}); got {value!r}.")
    return float(value)


def remarks(ask: Ask, answer: Answer, weight: Mapping[str, int], writer: str = STOCK) -> list[str]:
    """What else a reader of the plan must know: layers without a score, wishes, what the checkpoint `writer`
    can't hold, a missed budget."""
    p = ask.problem
    said = []
    missing = int(p.count[np.isnan(p.value) & p.free].sum())
    if missing:
        said.append(f"{missing} layers have no {p.score} and come last.")
    held = {fmt: able(ask.layers, fmt)[ask.layers["quantizable"].to_numpy(bool)] for fmt in p.formats}
    fixed = np.isin(p.member, np.flatnonzero(~p.allowed[:, list(p.tiers)].all(axis=1)))
    decided = int((fixed & held[p.formats[p.tiers[0]]] & held[p.formats[p.tiers[1]]]).sum())
    if decided:
        said.append(f"{decided} layers are decided by force_16bit or forbid_16bit.")
    said += [
        f"{int((~mask).sum())} layers can't be {fmt}: {format_row(fmt).group} doesn't divide their columns."
        for fmt, mask in held.items()
        if not mask.all()
    ]
    used = [p.formats[place] for place in np.unique(answer.formats)]
    foreign = [fmt for fmt in used if writer not in format_row(fmt).writers]
    if foreign:
        said.append(f"A stock {writer} checkpoint can't hold {', '.join(foreign)}{_writer(used)}.")
    miss = weight.get("miss", 0)
    share = miss / weight["total_16bit"]
    if abs(share) > EQUAL:
        said.append(
            f"The plan misses its budget by {miss / 1e6:.2f} MB ({share:.2%} of the 16-bit model): no whole "
            "layer fits in what is left."
        )
    return said


def _writer(used: Sequence[str]) -> str:
    """'; backend=… can', if some writer holds all of these formats."""
    able_ = frozenset.intersection(*(format_row(fmt).writers for fmt in used))
    return f"; backend={sorted(able_)[0]!r} can" if able_ else ", and no writer holds all of these formats"


# --- counting layers -------------------------------------------------------------------------------------


def _top_k(ask: Ask) -> Answer:
    k = int(ask.value)
    planned = len(ask.problem.names)
    if k != ask.value or not 0 <= k <= planned:
        raise PlanError(
            f"top_k={ask.value:g}: this model has {planned} layers that can be protected (0…{planned})."
        )
    return _first(ask, k)


def _claim(ask: Ask) -> Answer:
    planned = len(ask.problem.names)
    k = CLAIM_LAYERS if planned >= CLAIM_OF else round(CLAIM_SHARE * planned)
    answer = _first(ask, k)
    if planned >= CLAIM_OF:
        return answer
    note = f"(The claim's {CLAIM_LAYERS} of {CLAIM_OF}, scaled: round({CLAIM_SHARE}·{planned}) = {k}.)"
    return Answer(answer.formats, f"{answer.sentence} {note}", answer.value)


def _first(ask: Ask, k: int) -> Answer:
    """The first k layers in the score's order; forced ones count, whole groups only."""
    p = _two_formats(ask)
    unfit = _unfit(ask)  # in 16-bit whatever is asked for; not among those that are counted
    forced = int(p.count[~p.allowed[:, p.tiers[0]] & ~unfit].sum())
    free = int(p.count[p.free].sum())
    if k > forced + free and unfit.any():
        raise PlanError(
            f"{k} layers can't be chosen: {int(p.count[unfit].sum())} of {len(p.names)} can't be "
            f"{p.formats[p.tiers[0]]} and stay in {_top(p)} anyway, {forced + free} are left."
        )
    if not forced <= k <= forced + free:
        raise PlanError(
            f"{k} layers can't be protected: force_16bit and forbid_16bit leave {forced}…{forced + free}."
        )
    count = np.where(p.free, p.count, k + 1)
    taken = in_order(count, p.order, k - forced)
    protected = forced + int(p.count[taken].sum())
    least = "" if protected == k else f" (a {k}th would tear a group apart)"
    sentence = (
        f"The {protected} of {len(p.names)} layers with the {_end(p)} {p.score} stay in {_top(p)}{least}."
    )
    return Answer(_lift(p, taken), sentence, float(k))


def _threshold(ask: Ask) -> Answer:
    p = _two_formats(ask)  # layers that can't be in the lower format stay out of the count
    cut = ask.value if p.direction == "high" else -ask.value
    taken = p.free & (p.value >= cut)  # a missing score is never above a threshold
    sign = "≥" if p.direction == "high" else "≤"
    layers = int(p.count[taken].sum())
    sentence = f"The {layers} of {len(p.names)} layers with {p.score} {sign} {ask.value:g} stay in {_top(p)}."
    if not taken.any():
        sentence += f" That is none: {_range(p)}."
    elif taken[p.free].all():
        sentence += f" That is all of them: {_range(p)}."
    return Answer(_lift(p, taken), sentence, ask.value)


def _unfit(ask: Ask) -> Mask:
    """Items (I,) with a layer that the lower format can't hold."""
    p = ask.problem
    held = able(ask.layers, p.formats[p.tiers[0]])[ask.layers["quantizable"].to_numpy(bool)]
    return np.bincount(p.member, weights=~held) > 0


def _range(p: Problem) -> str:
    known = p.raw[~np.isnan(p.raw)]
    return (
        f"{p.score} lies between {known.min():.4g} and {known.max():.4g}"
        if len(known)
        else "no layer has one"
    )


# --- spending bytes --------------------------------------------------------------------------------------


def _budget(ask: Ask) -> Answer:
    p = ask.problem
    limit = _check_budget(ask)
    sentence = f"Within {ask.value:.6g} {RULES[ask.rule].unit}: "
    if p.cost is not None and p.direction == "high":
        found = least_cost(p.cost, ask.sizes.astype(float), float(limit), p.allowed)
        return Answer(found.choice, f"{sentence}the least summed {p.score}, {_proof(found)}.", ask.value)
    _two_formats(ask)
    start = _lift(p, np.zeros(len(p.value), dtype=bool))
    extra = ask.sizes[:, p.tiers[1]] - ask.sizes[:, p.tiers[0]]
    order = p.order[p.free[p.order]]
    taken = in_order(extra, order, limit - ask.size(start))
    sentence += f"layers with the {_end(p)} {p.score} first, in {_top(p)}, skipping those that don't fit."
    return Answer(_lift(p, taken), sentence, ask.value)


def _check_budget(ask: Ask) -> int:
    """The limit in bytes for the planned layers; the smallest plan's where the budget is a hair below it."""
    p = ask.problem
    floor = ask.size(_lift(p, np.zeros(len(p.value), dtype=bool)))
    exact = p.cost is not None and p.direction == "high"
    largest = np.where(p.allowed, ask.sizes, -1).argmax(axis=1)
    ceiling = ask.size(largest if exact else _lift(p, p.free))
    limit = ask.goal - ask.offset
    low, high = ((side + ask.offset) / ask.unit for side in (floor, ceiling))
    if low * (1 - TOLERANCE) <= ask.value < low:
        return floor
    if not low <= ask.value <= high * (1 + TOLERANCE):
        name, small = RULES[ask.rule].unit, p.formats[p.tiers[0]]
        raise PlanError(
            f"{ask.rule}={ask.value:g} can't be had: this model takes {low:.4f} {name} with every layer in "
            f"{small} and {high:.4f} {name} with every layer in {_top(p)}{_but(p)}. Choose a value between."
        )
    return max(limit, floor)


def _max_kl(ask: Ask) -> Answer:
    """The smallest plan whose predicted KL is at most the value."""
    p = ask.problem
    if not np.isfinite(p.predicted).all():
        raise PlanError(
            "rule='max_kl' needs predicted KL for every layer and format, which layers.csv lacks. "
            "Run notebook 01_analyze with a sensitivity, and with these formats."
        )
    sizes = ask.sizes.astype(float)
    exact = p.cost is not None and p.direction == "high"
    least = float(np.where(p.allowed, p.predicted, np.inf).min(axis=1).sum())
    if ask.value < least:
        raise PlanError(
            f"max_kl={ask.value:g} can't be had: the best plan of these formats is predicted at {least:.4g} "
            "nats a token. Allow a higher KL, or add a format with more bits."
        )
    sentence = f"The smallest plan with a predicted KL of at most {ask.value:g} nats a token"
    if exact:  # the limit is on what is predicted, whichever additive score was named
        found = least_cost(sizes, p.predicted, ask.value, p.allowed)
        return Answer(found.choice, f"{sentence}, {_proof(found)}.", ask.value)
    sentence += f", by {p.score}"
    _two_formats(ask)
    order = p.order[p.free[p.order]]
    start = _lift(p, np.zeros(len(p.value), dtype=bool))
    saved = p.predicted[order, p.tiers[0]] - p.predicted[order, p.tiers[1]]
    left = float(p.predicted[np.arange(len(start)), start].sum()) - np.concatenate([[0.0], np.cumsum(saved)])
    reached = np.flatnonzero(left <= ask.value)
    if not len(reached):
        raise PlanError(
            f"max_kl={ask.value:g} can't be had: with every allowed layer protected it is {left[-1]:.4g}."
        )
    taken = np.zeros(len(start), dtype=bool)
    taken[order[: reached[0]]] = True
    return Answer(_lift(p, taken), f"{sentence}: the {_end(p)} first.", ask.value)


# --- helpers ---------------------------------------------------------------------------------------------


def _two_formats(ask: Ask) -> Problem:
    """The problem, if the rule can decide it: an order tells which layers, not which of several formats."""
    p = ask.problem
    between = [fmt for place, fmt in enumerate(p.formats) if p.tiers[0] < place < p.tiers[1]]
    if between:
        wanted = ", ".join((p.formats[p.tiers[0]], *between, p.formats[p.tiers[1]]))
        raise PlanError(
            f"{p.score} in direction {p.direction!r} under rule {ask.rule!r} chooses between two formats, "
            f"not {wanted}. Name two, or use score='fisher', direction='high' and a budget."
        )
    return p


def _lift(p: Problem, taken: Mask) -> Ints:
    """Format indices with the taken items in the upper tier and all others as low as they may be."""
    choice = p.start.copy()
    choice[taken] = p.tiers[1]
    return choice


def _but(p: Problem) -> str:
    """', patterns and groups apart' where some layers may not take both ends."""
    return "" if p.free.all() else ", as far as patterns and groups allow"


def _proof(found: Solution) -> str:
    """What is known about the optimum: HiGHS stops at a node limit, so that plans don't depend on time."""
    return "chosen exactly" if found.gap < EXACT else f"at most {found.gap:.1%} short of the best saving"


def _end(p: Problem) -> str:
    return "highest" if p.direction == "high" else "lowest"


def _top(p: Problem) -> str:
    """The upper format as prose writes it."""
    return p.formats[p.tiers[1]].replace("16bit", "16-bit")


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("claim", "129 layers by the score (52 % of a smaller model's)", _claim),
        Rule("top_k", "a number of layers", _top_k),
        Rule("threshold", "a threshold on the score", _threshold),
        Rule("budget_gb", "the file's size, in GB of 10⁹ bytes", _budget, "GB"),
        Rule("bits_per_weight", "bits a weight over all weights", _budget, "bits a weight"),
        Rule("matrix_bits", "bits a weight over the planned matrices", _budget, "matrix bits"),
        Rule("max_kl", "a predicted KL, in nats a token", _max_kl),
    )
}
