"""Spending few measurements where they decide: the layers whose estimate straddles a budget's cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Z = 1.96  # half-width of an interval, in standard errors
MODEL_ERROR = 0.3  # relative error of the estimate that its standard error doesn't know of (measured)
AT_ONCE = 4  # measurements between two looks at the plan
REST = 2  # looks in a row that must find the plan unchanged before it counts as settled
SHARE = 0.15  # of the oracle's evaluations that may be spent


@dataclass(frozen=True)
class Refinement:
    """Costs after refining (layers,), which of them were measured, and whether every cut came to rest."""

    values: Floats
    measured: NDArray[np.bool_]
    settled: bool


def refine(
    values: Floats,
    errors: Floats,
    extra: Floats,
    budgets: Sequence[float],
    measure: Callable[[int], float],
    limit: int | None = None,
) -> Refinement:
    """Measure the layers whose cost per extra byte can't be told from the cut's, nearest first, until none
    is left, the plan stops changing, or the limit is reached.

    Layers are lifted from the highest cost per extra byte on until a budget is spent; the cut is the cost
    per byte where that ends. A layer is open while its interval holds a cut. Layers that were not measured
    are scaled by what the measured ones turned out to be against their estimate.

    Args:
        values, errors: estimated cost of each layer in the low format and its standard error.
        extra: bytes that lifting each layer costs.
        budgets: extra bytes to spend, one a budget.
        measure: cost of the layer with this index.
        limit: most measurements; by default 15 % of the layers, at least 4.
    """
    limit = most_measurements(len(values)) if limit is None else limit
    measured: dict[int, float] = {}
    plans: list[list[bytes]] = []
    while True:
        current = _merged(values, measured)
        plans.append([lifted(current, extra, budget).tobytes() for budget in budgets])
        open_layers = _open(current, errors, values, extra, budgets, measured)
        at_rest = not open_layers or (len(plans) > REST and all(p == plans[-1] for p in plans[-1 - REST :]))
        room = limit - len(measured)
        if at_rest or room <= 0:
            done = np.isin(np.arange(len(values)), list(measured))
            return Refinement(current, done, settled=at_rest)
        for index in open_layers[: min(AT_ONCE, room)]:
            measured[index] = measure(index)


def most_measurements(layers: int) -> int:
    """15 % of the layers, at least 4."""
    return max(AT_ONCE, math.floor(SHARE * layers))


def lifted(values: Floats, extra: Floats, budget: float) -> NDArray[np.bool_]:
    """Which layers the budget reaches, from the highest cost per extra byte on, up to the first too large."""
    order = np.argsort(-values / extra, kind="stable")
    reached = np.zeros(len(values), dtype=bool)
    reached[order] = np.cumsum(extra[order]) <= budget
    return reached


def cut(values: Floats, extra: Floats, budget: float) -> float:
    """Highest cost per extra byte among the layers that the budget doesn't reach; 0 if it reaches all."""
    left = ~lifted(values, extra, budget)
    return float((values[left] / extra[left]).max()) if left.any() else 0.0


def _merged(values: Floats, measured: Mapping[int, float]) -> Floats:
    """Measured costs, and for the rest the estimate times measured/estimated over the measured ones."""
    if not measured:
        return values.copy()
    index = np.fromiter(measured, dtype=np.int64)
    found = np.fromiter(measured.values(), dtype=np.float64)
    estimated = values[index].sum()
    merged = values * (found.sum() / estimated if estimated > 0 else 1.0)
    merged[index] = found
    return merged


def _open(
    current: Floats,
    errors: Floats,
    values: Floats,
    extra: Floats,
    budgets: Sequence[float],
    measured: Mapping[int, float],
) -> list[int]:
    """Layers not yet measured whose interval holds a cut, the nearest (in widths) first."""
    relative = np.divide(errors, values, out=np.ones_like(errors), where=values > 0)
    width = Z * current * np.hypot(np.nan_to_num(relative, nan=1.0), MODEL_ERROR) / extra
    cuts = [cut(current, extra, budget) for budget in budgets]
    distance = np.min([np.abs(current / extra - c) for c in cuts], axis=0)
    near = np.divide(distance, width, out=np.full_like(width, np.inf), where=width > 0)
    near[list(measured)] = np.inf
    return [int(i) for i in np.argsort(near, kind="stable") if near[i] < 1]
