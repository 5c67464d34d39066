"""Spending a byte budget: exactly where costs add up, in order where a score is only an order.

The exact choice is a multiple-choice knapsack: one format for every item, least total cost within a limit. It
is solved by HiGHS through `scipy.optimize.milp`, after the Lagrangian bound has fixed the formats that no
optimal choice can hold: of thousands of layers only some dozens near the cut remain open.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from spi_utils.errors import PlanError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
GAP = 1e-3  # a choice proven this near the optimum is taken, relative to what it saves over the smallest
FINE = 1e-4  # the gap that HiGHS works towards where the choice is farther away, as in small models
NODES = 20  # of HiGHS' search: a limit that, unlike a time, gives the same plan on every machine
EXCHANGES, MOST_MOVES = 100, 600  # rounds of pairwise improvement, and the most moves to pair


@dataclass(frozen=True)
class Solution:
    """The chosen format's index for each item, (items,), and how far from the optimum it may be at most, as a
    share of what it saves over the smallest choice."""

    choice: Ints
    gap: float


def least_cost(cost: Floats, size: Floats, limit: float, allowed: Mask) -> Solution:
    """One format an item: minimise Σ cost under Σ size ≤ limit.

    Args:
        cost, size: (items, formats), finite, size ≥ 0.
        limit: bound on the chosen sizes' sum.
        allowed: (items, formats), at least one a row.

    Raises:
        PlanError: no choice meets the limit, or the solver gave up.
    """
    cost, size = np.where(allowed, cost, np.inf), np.where(allowed, size, np.inf)
    least = size.min(axis=1, keepdims=True)
    if least.sum() > limit * (1 + 1e-12):
        raise PlanError(f"the smallest possible choice takes {least.sum():g}, the limit is {limit:g}.")
    limit = max(limit, float(least.sum()))
    smallest = np.where(size == least, cost, np.inf).argmin(axis=1)
    extra = size - least
    if not (np.isfinite(extra) & (extra > 0) & (extra <= limit - least.sum())).any():
        return Solution(smallest, 0.0)  # no single upgrade fits, or there are no items
    bound, choice, open_ = _lagrangian(cost, size, limit)
    benefit = _total(cost, smallest) - _total(cost, choice)
    if _total(cost, choice) - bound > GAP * benefit:
        choice, proven = _exact(cost, size, limit, open_, choice)
        bound = max(bound, proven)
        benefit = _total(cost, smallest) - _total(cost, choice)
    excess = max(_total(cost, choice) - bound, 0.0)
    return Solution(choice, excess / benefit if benefit > 0 else 0.0)


def in_order(extra: Ints, order: Ints, budget: int) -> Mask:
    """Take items in order while they fit, skipping those that don't (skip-and-continue). Shape (items,)."""
    taken = np.zeros(len(extra), dtype=bool)
    left = budget
    for item in order:
        if extra[item] <= left:
            taken[item] = True
            left -= int(extra[item])
    return taken


def _total(table: Floats, choice: Ints) -> float:
    return float(table[np.arange(len(choice)), choice].sum())


def _lagrangian(cost: Floats, size: Floats, limit: float) -> tuple[float, Ints, Mask]:
    """A lower bound, a good feasible choice, and the formats that a better choice could still hold.

    For a price λ on size, min_f (cost + λ·size) summed over items, less λ·limit, bounds every choice from
    below. Bisection finds the λ whose choice just meets the limit. A format whose own reduced cost exceeds
    the gap between the feasible choice and the bound can't be part of anything better.
    """
    rows = np.arange(len(cost))
    finite = np.isfinite(cost)

    def priced(multiplier: float) -> Floats:
        return np.where(finite, cost + multiplier * np.where(finite, size, 0.0), np.inf)

    def pick(multiplier: float) -> Ints:
        # Among equal prices the smaller size: the choice then meets the limit whenever some choice does.
        held = priced(multiplier)
        tied = held <= held.min(axis=1, keepdims=True)
        return np.where(tied, size, np.inf).argmin(axis=1)

    low, high = 0.0, 1.0
    choice = pick(0.0)
    if size[rows, choice].sum() <= limit:
        return _total(cost, choice), choice, np.eye(cost.shape[1], dtype=bool)[choice]
    for _ in range(200):
        if size[rows, pick(high)].sum() <= limit:
            break
        high *= 4.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if size[rows, pick(middle)].sum() <= limit else (middle, high)
    choice = _improve(cost, size, limit, pick(high))
    table = priced(high)
    reduced = table - table.min(axis=1, keepdims=True)
    bound = float(table.min(axis=1).sum() - high * limit)

    def contenders(found: Ints) -> Mask:
        gap = _total(cost, found) - bound
        held = reduced <= gap * (1 + 1e-9) + 1e-12 * abs(bound)
        held[rows, found] = True
        return held

    choice = _exchange(cost, size, limit, choice, contenders(choice))
    return bound, choice, contenders(choice)


def _improve(cost: Floats, size: Floats, limit: float, choice: Ints) -> Ints:
    """Spend what is left: the single upgrade that saves most, again and again, while one fits."""
    choice = choice.copy()
    rows = np.arange(len(choice))
    left = limit - size[rows, choice].sum()
    for _ in range(len(choice)):
        saved = cost[rows, choice][:, None] - cost
        saved[(size - size[rows, choice][:, None] > left) | ~np.isfinite(cost)] = 0.0
        item, fmt = np.unravel_index(saved.argmax(), saved.shape)
        if saved[item, fmt] <= 0:
            break
        left -= size[item, fmt] - size[item, choice[item]]
        choice[item] = fmt
    return choice


def _exchange(cost: Floats, size: Floats, limit: float, choice: Ints, open_: Mask) -> Ints:
    """Change two items at once while that saves: with many items this alone ends within the gap."""
    choice = choice.copy()
    rows = np.arange(len(choice))
    for _ in range(EXCHANGES):
        moves = open_.copy()
        moves[rows, choice] = False
        item, fmt = np.nonzero(moves)
        if not 1 < len(item) <= MOST_MOVES:
            break
        saved = cost[item, choice[item]] - cost[item, fmt]
        extra = size[item, fmt] - size[item, choice[item]]
        left = limit - size[rows, choice].sum()
        both = np.where(extra[:, None] + extra <= left, saved[:, None] + saved, 0.0)
        both[item[:, None] == item] = 0.0
        one, two = np.unravel_index(both.argmax(), both.shape)
        if both[one, two] <= 1e-15 * abs(_total(cost, choice)):
            break
        choice[item[[one, two]]] = fmt[[one, two]]
    return choice


def _exact(cost: Floats, size: Floats, limit: float, open_: Mask, incumbent: Ints) -> tuple[Ints, float]:
    """The open formats decided by HiGHS, and its bound: each item starts at its smallest open format and may
    take one upgrade."""
    rows = np.arange(len(cost))
    start = np.where(open_, size, np.inf).argmin(axis=1)
    upgrades = open_.copy()
    upgrades[rows, start] = False
    item, fmt = np.nonzero(upgrades)
    extra = size[item, fmt] - size[item, start[item]]
    gain = cost[item, start[item]] - cost[item, fmt]
    left = limit - size[rows, start].sum()
    member = sparse.csr_array(
        (np.ones(len(item)), (item, np.arange(len(item)))), shape=(len(cost), len(item))
    )
    # HiGHS has absolute tolerances: bring gains to the order of one and bytes to that of thousands.
    unit, step = float(np.abs(gain).max()), float(max(extra.max(), 1e-300)) / 1e3
    rivals = member[np.bincount(item, minlength=len(cost)) > 1]
    result = milp(
        -gain / unit,
        integrality=np.ones(len(item)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(rivals, -np.inf, 1),
            LinearConstraint(extra[None, :] / step, -np.inf, left / step),
        ],
        options={"mip_rel_gap": FINE, "node_limit": NODES},
    )
    if result.x is None:
        raise PlanError(f"HiGHS found no plan for this budget: {result.message}")
    choice = start.copy()
    taken = result.x > 0.5
    choice[item[taken]] = fmt[taken]
    bound = _total(cost, start) + unit * float(result.mip_dual_bound)
    within = size[rows, choice].sum() <= limit * (1 + 1e-12)
    return (choice if within and _total(cost, choice) <= _total(cost, incumbent) else incumbent), bound
