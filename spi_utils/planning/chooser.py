"""One score of a layer table as a slider sees it: sorted once, any threshold's consequences at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from spi_utils.planning.choice import Floats, Ints, Mask, Problem, pose
from spi_utils.planning.pricing import fixed_bytes, price


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


@dataclass(frozen=True)
class Chooser:
    """One score of one layer table, sorted once: `at_threshold` and `at_count` take microseconds.

    Built by `Chooser.of`. Position k of the cumulative arrays (free items + 1,) is the choice of the first k
    items in the score's order; `cut` holds those items' scores, those without a score left out.
    """

    problem: Problem
    order: Ints
    cut: Floats
    data_bytes: Ints
    file_bytes: Ints
    layer_count: Ints
    kl: Floats
    full_bytes: int
    fixed_data: int
    all_weights: int

    @classmethod
    def of(cls, layers: pd.DataFrame, score: str, direction: str = "high", **options: Any) -> Chooser:
        """Sort a score. `options` are `choice.pose`'s: formats, double_quant, group, force_16bit, …"""
        formats = options.pop("formats", ("nf4", "16bit"))
        p = pose(layers, score, direction, formats, **options)
        low, top = p.tiers
        order = p.order[p.free[p.order]]
        start = p.start
        rows = np.arange(len(start))
        fixed_data, fixed_header = fixed_bytes(layers)

        def run(table: Any) -> Any:
            """Cumulative sums over the order, from the choice that protects nothing."""
            steps = table[order, top] - table[order, low]
            return table[rows, start].sum() + np.concatenate([np.zeros(1, steps.dtype), np.cumsum(steps)])

        held = p.count[start == top].sum()
        scores = p.raw[order]
        return cls(
            problem=p,
            order=order,
            cut=scores[~np.isnan(scores)],
            data_bytes=run(p.payload) + fixed_data,
            file_bytes=run(p.payload + p.header) + fixed_data + fixed_header,
            layer_count=held + np.concatenate([[0], np.cumsum(p.count[order])]),
            kl=run(p.predicted),
            full_bytes=price(layers, {})["total"],
            fixed_data=fixed_data,
            all_weights=int(layers["numel"].sum()),
        )

    @property
    def settled(self) -> Mask:
        """Planned layers (L,) that no threshold moves: patterns decide them, or their group's."""
        return ~self.problem.free[self.problem.member]

    @property
    def held(self) -> Mask:
        """Planned layers (L,) that stay in the upper format whatever the threshold."""
        p = self.problem
        return self.settled & (p.start == p.tiers[1])[p.member]

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
        kl = float(self.kl[k])
        return Choice(
            mask=items[p.member],
            layers=int(self.layer_count[k]),
            total_bytes=int(self.file_bytes[k]),
            saved_bytes=self.full_bytes - int(self.file_bytes[k]),
            bits_per_weight=8 * int(self.data_bytes[k]) / self.all_weights,
            matrix_bits=8 * (int(self.data_bytes[k]) - self.fixed_data) / p.numel,
            predicted_kl=kl if np.isfinite(kl) else None,
        )

    def threshold_for(self, total_bytes: float) -> float:
        """The threshold that protects most within a file size: the same choice seen from the byte side.

        Equal scores can't be told apart by a threshold, so they go in together or not at all. A size below
        the smallest plan gives a threshold that protects nothing.
        """
        sign = 1.0 if self.problem.direction == "high" else -1.0
        k = int(np.searchsorted(self.file_bytes[: len(self.cut) + 1], total_bytes, side="right")) - 1
        while 0 < k < len(self.cut) and self.cut[k - 1] == self.cut[k]:
            k -= 1
        if k > 0:
            return float(self.cut[k - 1])
        return float(np.nextafter(self.cut[0], sign * np.inf)) if len(self.cut) else 0.0


def threshold_choice(
    layers: pd.DataFrame, score: str, direction: str, threshold: float, **options: Any
) -> Choice:
    """One threshold's consequences; build a `Chooser` once where many are asked for."""
    return Chooser.of(layers, score, direction, **options).at_threshold(threshold)
