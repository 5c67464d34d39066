"""A choice of formats posed: which layers may take which format, at what cost and size.

`Problem` joins the layer table, a score, and the wishes of a user (groups that stay together, layers that are
forced or forbidden) into arrays over *items*: single layers, or groups of layers that must share a format.
plan.py's rules decide on items; this module knows nothing about rules.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from spi_utils.errors import PlanError
from spi_utils.formats import format_row
from spi_utils.planning.pricing import able, check_formats, header_bytes, payload_bytes
from spi_utils.planning.scores import (
    additive_cost,
    check_direction,
    predicted_cost,
    score_row,
    score_values,
    suggest,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Patterns = str | Sequence[str] | None

# Matrices that serving engines merge (vLLM's packed modules): with group="fused" they share a format.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
GROUPS = (None, "fused")


@dataclass(frozen=True)
class Problem:
    """Everything a rule needs, over items (I) and formats (F, fewest bits first).

    `value` (I,) is the score, its sign turned so that larger is protected first; NaN where it is missing.
    `raw` (I,) is the same without the turn. `cost` (I, F) are an additive score's nats a token, None for an
    order. `payload` and `header` (I, F) are bytes; `allowed` (I, F) what force and forbid leave open.
    `member` (L,) is each planned layer's item; `count` (I,) the layers in an item.
    """

    names: tuple[str, ...]
    formats: tuple[str, ...]
    tiers: tuple[int, int]
    score: str
    direction: str
    value: Floats
    raw: Floats
    cost: Floats | None
    predicted: Floats
    payload: Ints
    header: Ints
    allowed: Mask
    member: Ints
    count: Ints
    numel: int

    @property
    def order(self) -> Ints:
        """Items from the first protected to the last; ties in model order, missing scores at the end."""
        return np.argsort(np.where(np.isnan(self.value), np.inf, -self.value), kind="stable")

    @property
    def start(self) -> Ints:
        """Each item's smallest allowed format, as an index: the plan before anything is protected."""
        return np.where(self.allowed, self.payload, np.iinfo(np.int64).max).argmin(axis=1)

    @property
    def free(self) -> Mask:
        """Items that may still move between the two tiers."""
        return self.allowed[:, self.tiers[0]] & self.allowed[:, self.tiers[1]]


def pose(
    layers: pd.DataFrame,
    score: str,
    direction: str,
    formats: Sequence[str],
    *,
    double_quant: bool = False,
    group: str | None = None,
    force_16bit: Patterns = None,
    forbid_16bit: Patterns = None,
    seed: int = 0,
) -> Problem:
    """Join the layer table, a score and a user's wishes.

    Raises:
        PlanError: unknown names, nothing to plan, a failed layer that no pattern settles, a pattern that
            matches nothing, or wishes that contradict each other; each says what and where.
    """
    check_direction(direction)
    wanted = check_formats(formats)
    planned = layers["quantizable"].to_numpy(bool)
    if not planned.any():
        raise PlanError("this model has no layer that can be quantized, so there is nothing to plan.")
    _refuse_useless(layers[planned], wanted)
    values = score_values(layers, score, formats=wanted, double_quant=double_quant, seed=seed)
    rows, values = layers[planned].reset_index(drop=True), values[planned]
    names = tuple(rows["name"])
    every, allowed = _choices(rows, wanted, force_16bit, forbid_16bit)
    _refuse_failed(rows[allowed.sum(axis=1) > 1], values[allowed.sum(axis=1) > 1], score)
    member = _members(names, group)
    added = partial(_per_item, member)
    numel = rows["numel"].to_numpy(float)
    raw = added(values * numel) / added(numel)  # a group's score: the mean over its weights
    open_ = added(allowed.astype(int)) == np.bincount(member)[:, None]
    _refuse_contradiction(names, member, open_)
    cost = _costs(layers, score, every, allowed)
    predicted = np.where(allowed, np.stack([predicted_cost(rows, fmt) for fmt in every], 1), 0.0)
    _refuse_unpriced(names, cost, every, score)
    return Problem(
        names=names,
        formats=every,
        tiers=(every.index(wanted[0]), every.index(wanted[-1])),
        score=score,
        direction=direction,
        value=raw if direction == "high" else -raw,
        raw=raw,
        cost=None if cost is None else added(cost),
        predicted=added(predicted),
        payload=added(np.stack([payload_bytes(rows, fmt, double_quant) for fmt in every], 1)),
        header=added(np.stack([header_bytes(names, fmt, double_quant) for fmt in every], 1)),
        allowed=open_,
        member=member,
        count=np.bincount(member),
        numel=int(numel.sum()),
    )


def _choices(
    rows: pd.DataFrame, wanted: tuple[str, ...], force: Patterns, forbid: Patterns
) -> tuple[tuple[str, ...], Mask]:
    """All formats that any layer may take, and which of them each may, (L, F)."""
    names = tuple(rows["name"])
    forced, forbidden = matches(names, force, "force_16bit"), matches(names, forbid, "forbid_16bit")
    every = check_formats((*wanted, "16bit")) if forced.any() else wanted
    allowed = _allowed(names, every, wanted, forced, forbidden)
    allowed &= np.stack([able(rows, fmt) for fmt in every], 1)
    _refuse_homeless(rows, allowed, every)
    return every, allowed


def _per_item(member: Ints, table: NDArray) -> NDArray:
    """Per layer (L, …) -> per item (I, …): sums over each item's layers."""
    result = np.zeros((int(member.max()) + 1, *table.shape[1:]), dtype=table.dtype)
    np.add.at(result, member, table)
    return result


def _costs(layers: pd.DataFrame, score: str, formats: Sequence[str], allowed: Mask) -> Floats | None:
    """An additive score's nats a token, (L, F), 0 for what can't be chosen and may be unknown; else None."""
    if not score_row(score).additive:
        return None
    planned = layers["quantizable"].to_numpy(bool)
    return np.where(
        allowed, np.stack([additive_cost(layers, score, fmt)[planned] for fmt in formats], 1), 0.0
    )


def _refuse_contradiction(names: Sequence[str], member: Ints, open_: Mask) -> None:
    """Every group needs a format that all of its layers may take; `open_` is (groups, formats)."""
    stuck = np.flatnonzero(~open_.any(axis=1))
    if len(stuck):
        first = names[int(np.flatnonzero(np.isin(member, stuck))[0])]
        raise PlanError(
            f"{first}: its group has no format that all of its layers may take: patterns force one and keep "
            "another from 16-bit, or 16bit is not among the formats. Change a pattern, or name them all."
        )


def _refuse_useless(rows: pd.DataFrame, formats: Sequence[str]) -> None:
    """A format that can hold no layer at all has no costs either."""
    for fmt in formats:
        if not able(rows, fmt).any():
            raise PlanError(
                f"{fmt} can hold none of the {len(rows)} layers: groups of {format_row(fmt).group} divide "
                "none of their columns. Leave it out, or take one with smaller groups, int8 or nf4."
            )


def _refuse_homeless(rows: pd.DataFrame, allowed: Mask, formats: Sequence[str]) -> None:
    """Every layer needs a format that can hold it."""
    stuck = rows[~allowed.any(axis=1)]
    if len(stuck):
        first = stuck.iloc[0]
        raise PlanError(
            f"{len(stuck)} layers can be held in none of {', '.join(formats)}, such as {first['name']}: the "
            f"groups don't divide its {first['cols']} columns. Add a format with smaller groups, int8 or "
            "16bit."
        )


def _refuse_failed(rows: pd.DataFrame, values: Floats, score: str) -> None:
    failed = rows["name"][(rows["status"] == "failed").to_numpy() & np.isnan(values)]
    if len(failed):
        shown = ", ".join(failed[:5]) + (f" and {len(failed) - 5} more" if len(failed) > 5 else "")
        raise PlanError(
            f"the analysis failed for {len(failed)} layer(s), so {score!r} can't rank them: {shown}. "
            "Look at their weights, run notebook 01_analyze again, choose a score that reads no spectrum, or "
            "decide them yourself: force_16bit with a pattern that matches them keeps them in 16-bit."
        )


def _refuse_unpriced(names: Sequence[str], cost: Floats | None, formats: Sequence[str], score: str) -> None:
    if cost is None or np.isfinite(cost).all():
        return
    layer, fmt = np.argwhere(~np.isfinite(cost))[0]
    raise PlanError(
        f"{names[layer]} has no {score} in {formats[fmt]}, so a sum over layers can't be formed. "
        "Run notebook 01_analyze again; its sensitivity stage resumes where it stopped."
    )


def matches(names: Sequence[str], patterns: Patterns, parameter: str) -> Mask:
    """Which names any of the patterns is found in, (L,).

    Raises:
        PlanError: a pattern that is no regular expression, or that matches no name; says in which parameter.
    """
    hit = np.zeros(len(names), dtype=bool)
    given = [patterns] if isinstance(patterns, str) else list(patterns or ())
    for pattern in filter(None, given):  # an empty pattern is no wish; as an expression it would match all
        try:
            found = np.array([re.search(pattern, name) is not None for name in names])
        except re.error as error:
            raise PlanError(f"{parameter}: {pattern!r} is no regular expression ({error}).") from error
        if not found.any():
            raise PlanError(
                f"{parameter}: {pattern!r} matches none of the {len(names)} planned layers."
                f"{suggest(pattern, names)} Patterns are searched in full module names like {names[0]!r}."
            )
        hit |= found
    return hit


def _allowed(
    names: Sequence[str], every: Sequence[str], wanted: Sequence[str], forced: Mask, forbidden: Mask
) -> Mask:
    both = np.flatnonzero(forced & forbidden)
    if len(both):
        raise PlanError(f"{names[both[0]]} matches force_16bit and forbid_16bit. Change one of the patterns.")
    allowed = np.tile([fmt in wanted for fmt in every], (len(names), 1))
    full = np.array([fmt == "16bit" for fmt in every])
    allowed[forced] = full
    allowed[forbidden] &= ~full
    return allowed


def fused_groups(names: Sequence[str]) -> list[list[int]]:
    """Positions of layers that serving engines merge, one list a merged module (single layers too)."""
    member = _members(names, "fused")
    return [list(map(int, np.flatnonzero(member == item))) for item in range(int(member.max()) + 1)]


def _members(names: Sequence[str], group: str | None) -> Ints:
    """Each layer's item number; with "fused", matrices that engines merge share one."""
    if group not in GROUPS:
        raise PlanError(f"unknown group {group!r}.{suggest(str(group), ['fused'])} Known: None, 'fused'.")
    place = {leaf: number for number, leaves in enumerate(FUSED) for leaf in leaves}
    numbers: dict[tuple[str, str | int], int] = {}
    result = []
    for name in names:
        parent, _, leaf = name.rpartition(".")
        key = (parent, place.get(leaf, leaf)) if group else (parent, leaf)
        result.append(numbers.setdefault(key, len(numbers)))
    return np.array(result, dtype=np.int64)
