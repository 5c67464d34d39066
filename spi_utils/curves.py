"""What a choice along a score costs, at every threshold and size: the explorer's slider and the frontier.

A `Chooser` sorts a score once and knows each cut's consequences. A `Field` keeps what random selections and
the optimum reach at every size, so that a choice can be told where it stands. `frontier` puts every score,
the random band and the exact optimum into one tidy table. KL here are predictions, sums of the layer table's
`predicted_<fmt>` in nats a token; without sensitivity they are missing and the bytes remain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from spi_utils.plan import DIRECTIONS, Floats, Ints, Mask, Problem, available_scores, least_cost, price

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
COLUMNS = ("kind", "score", "direction", "quantile", "layers", "bytes", "matrix_bits", "predicted_kl")
SEEDS = 100  # random orders behind a band: cheap, as each is one cumulative sum
POINTS = 61  # sizes at which curves are read; a knapsack each for the exact optimum


@dataclass(frozen=True)
class Choice:
    """One choice of layers and its consequences.

    `mask` (planned layers, in table order) marks those in the upper format. `total_bytes` is the file's,
    `saved_bytes` counts from the 16-bit file. `predicted_kl` is None without sensitivity.
    """

    mask: Mask
    layers: int
    total_bytes: int
    saved_bytes: int
    bits_per_weight: float
    matrix_bits: float
    predicted_kl: float | None


class Chooser:
    """One score of one layer table, sorted once: `at_threshold` and `at_count` take microseconds.

    Position k of `data_bytes`, `file_bytes`, `layer_count` and `kl` (free items + 1,) is the choice of the
    first k items of `order`; `cut` holds those items' scores, those without a score left out. `full_bytes` is
    the 16-bit file's size.
    """

    def __init__(self, layers: pd.DataFrame, score: str, direction: str = "high", **options: Any) -> None:
        """Sort a score; `options` are `Problem`'s: formats, double_quant, group, force_16bit, …"""
        p = self.problem = Problem(layers, score, direction, **options)
        (low, top), items, order = p.tiers, np.arange(len(p.start)), p.order
        self.order = order

        def run(table: Any) -> Any:
            """Cumulative sums over the order, from the choice that protects nothing."""
            steps = np.append(0, table[order, top] - table[order, low])
            return table[items, p.start].sum() + np.cumsum(steps)

        self.data_bytes: Ints = run(p.payload) + p.fixed_data
        self.file_bytes: Ints = run(p.payload + p.header) + p.fixed_data + p.fixed_header
        self.kl: Floats = run(p.predicted)
        self.layer_count = p.count[p.start == top].sum() + np.cumsum(np.append(0, p.count[order]))
        self.cut = p.raw[order][~np.isnan(p.raw[order])]
        self.full_bytes = price(layers, {})["total"]

    @property
    def limits(self) -> tuple[float, float]:
        """The least and the greatest finite score: a slider's ends."""
        finite = self.cut[np.isfinite(self.cut)]
        return (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)

    def count_at(self, threshold: float) -> int:
        """How many items of the order a threshold protects: score ≥ it in `high`, ≤ it in `low`."""
        sign = -1.0 if self.problem.direction == "high" else 1.0
        return int(np.searchsorted(sign * self.cut, sign * threshold, side="right"))

    def at_threshold(self, threshold: float) -> Choice:
        """The choice that `make_plan(rule="threshold", value=threshold)` makes."""
        return self.at_count(self.count_at(threshold))

    def at_count(self, k: int) -> Choice:
        """The first k items of the order."""
        p = self.problem
        items = p.start == p.tiers[1]
        items[self.order[:k]] = True
        data, file, kl = int(self.data_bytes[k]), int(self.file_bytes[k]), float(self.kl[k])
        rates = 8 * data / p.all_numel, 8 * (data - p.fixed_data) / p.numel
        size = int(self.layer_count[k]), file, self.full_bytes - file
        return Choice(items[p.member], *size, *rates, kl if np.isfinite(kl) else None)

    def threshold_for(self, total_bytes: float) -> float:
        """The threshold that protects most within a file size: the same choice seen from the byte side.

        Equal scores can't be told apart by a threshold, so they go in together or not at all. A size below
        the smallest plan gives a threshold that protects nothing.
        """
        k = int(np.searchsorted(self.file_bytes[: len(self.cut) + 1], total_bytes, side="right")) - 1
        while 0 < k < len(self.cut) and self.cut[k - 1] == self.cut[k]:
            k -= 1
        if k > 0:
            return float(self.cut[k - 1])
        beyond = np.inf if self.problem.direction == "high" else -np.inf
        return float(np.nextafter(self.cut[0], beyond)) if len(self.cut) else 0.0

    def curve(self, order: Ints | None = None) -> tuple[Floats, Floats]:
        """File size and predicted KL along another order: positions in `order`; None is the order of what a
        byte saves, which no plan lies below where a layer may be split."""
        saved, spent = -np.diff(self.kl), np.diff(self.file_bytes).astype(float)
        if order is None:
            ratio = np.divide(saved, spent, out=np.full(len(saved), np.inf), where=spent > 0)
            order = np.argsort(-ratio, kind="stable")
        size = self.file_bytes[0] + np.cumsum(np.append(0.0, spent[order]))
        return size, self.kl[0] - np.cumsum(np.append(0.0, saved[order]))

    def random_curves(self, grid: Floats, seeds: int) -> Floats:
        """Predicted KL of random orders at each size of `grid`: (seeds, points), sorted over seeds."""
        orders = (np.random.default_rng(seed).permutation(len(self.order)) for seed in range(seeds))
        return np.sort(np.stack([np.interp(grid, *self.curve(order)) for order in orders]), axis=0)

    def grid(self, points: int) -> Floats:
        """File sizes from the smallest plan to the largest, evenly spread."""
        return np.linspace(self.file_bytes[0], self.file_bytes[-1], points)


@dataclass(frozen=True)
class Standing:
    """Where a choice stands at its size: predicted KL of random selections and of the best possible one.

    `better_than` is the share of random selections that the choice beats. `gain` is the share of what can be
    gained over the median random selection that it gains: 1 is the optimum, 0 the median, below 0 worse.
    """

    optimum: float
    random_low: float
    random_median: float
    random_high: float
    better_than: float
    gain: float


@dataclass(frozen=True)
class Field:
    """Predicted KL against file size for random selections (seeds, points) and for the optimum (points,).

    The optimum here is the bound that lets one layer be split: no plan lies below it, and the exact optimum
    is at most one layer's cost above.
    """

    file_bytes: Floats
    random: Floats
    optimum: Floats

    @classmethod
    def of(
        cls, layers: pd.DataFrame, seeds: int = SEEDS, points: int = POINTS, **options: Any
    ) -> Field | None:
        """Precompute the field; None where the table holds no predicted KL."""
        base = Chooser(layers, "random", **options)
        if not np.isfinite(base.kl).all():
            return None
        grid = base.grid(points)
        return cls(grid, base.random_curves(grid, seeds), np.interp(grid, *base.curve()))

    @cached_property
    def _bands(self) -> Floats:
        return np.quantile(self.random, (0.05, 0.5, 0.95), axis=0)

    def standing(self, total_bytes: float, predicted_kl: float) -> Standing:
        """Compare a choice with random selections and the optimum of the same size, by interpolation."""
        lines = (self.optimum, *self._bands, np.arange(len(self.file_bytes)))
        best, low, median, high, place = (
            float(np.interp(total_bytes, self.file_bytes, line)) for line in lines
        )
        left, right = self.random[:, int(place)], self.random[:, int(np.ceil(place))]
        better = ((left + place % 1 * (right - left)) > predicted_kl).mean()
        room = median - best
        gain = (median - predicted_kl) / room if room > 1e-12 * max(median, 1e-300) else 0.0
        return Standing(best, low, median, high, float(better), gain)


def frontier(
    layers: pd.DataFrame,
    scores: Sequence[str] | None = None,
    *,
    directions: Sequence[str] = DIRECTIONS,
    formats: Sequence[str] = ("nf4", "16bit"),
    seeds: int = SEEDS,
    points: int = POINTS,
    **options: Any,
) -> pd.DataFrame:
    """What a gigabyte buys: predicted KL against bytes, over the whole range of sizes.

    Args:
        layers: the layer table.
        scores: rows of `SCORES`; default every one that the table holds, random apart.
        formats: with more than two, scores lift layers from the smallest to the largest and the optimum
            uses all of them.
        seeds: random orders in the band; below 20 its ends say little.
        points: sizes at which each curve is read, evenly spread.
        options: group, double_quant, force_16bit, forbid_16bit.

    Returns:
        A row a point: `kind` ("score", "random", "optimum"), `score`, `direction`, `quantile` (of random),
        `layers`, `bytes` (the file's), `matrix_bits`, `predicted_kl`.

    Raises:
        PlanError: as `make_plan`.
    """
    if scores is None:
        scores = [name for name in available_scores(layers, formats) if name != "random"]
    options["formats"] = formats
    base = Chooser(layers, "random", **options)
    grid, p = base.grid(points), base.problem
    rows: list[tuple[Any, ...]] = []  # in the order of `COLUMNS`
    for score, direction in product(scores, directions):
        curve = Chooser(layers, score, direction, **options)
        # The largest choice within each size; equal neighbours are kept once.
        within = np.unique(np.searchsorted(curve.file_bytes, grid, side="right") - 1)
        for at in map(curve.at_count, within[within >= 0]):
            found = (at.layers, at.total_bytes, at.matrix_bits, at.predicted_kl)
            rows.append(("score", score, direction, None, *found))
    if np.isfinite(base.kl).all():
        ends = 8 * (base.data_bytes[[0, -1]] - p.fixed_data) / p.numel
        bits = np.interp(grid, base.file_bytes[[0, -1]], ends)
        bands = np.quantile(base.random_curves(grid, seeds), QUANTILES, axis=0)  # (quantiles, points)
        for quantile, band in zip(QUANTILES, bands, strict=True):
            for at_size in zip(grid.astype(int), bits, band, strict=True):
                rows.append(("random", "random", None, quantile, None, *at_size))
        items, size = np.arange(len(p.start)), p.payload + p.header
        outside = p.fixed_data + p.fixed_header
        for limit in grid:  # the exact least predicted KL within each size, every format allowed
            choice, _ = least_cost(p.predicted, size.astype(float), float(limit - outside), p.allowed)
            data, file, kl = (one[items, choice].sum() for one in (p.payload, size, p.predicted))
            lifted = int(p.count[choice != p.start].sum())
            found = (lifted, outside + int(file), 8 * int(data) / p.numel, float(kl))
            rows.append(("optimum", "optimum", None, None, *found))
    return pd.DataFrame(rows, columns=COLUMNS)
