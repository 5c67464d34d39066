"""What a gigabyte buys: predicted KL against bytes for every score, random selection and the exact optimum.

`frontier` puts all of it into one tidy table. A `Field` keeps what random selections and the optimum reach at
every size, so that a choice can be told where it stands. KL here are predictions, sums of the layer table's
`predicted_<fmt>` in nats a token; without sensitivity they are missing and the bytes remain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from spi_utils.errors import PlanError
from spi_utils.planning.choice import Floats, Ints
from spi_utils.planning.chooser import Chooser
from spi_utils.planning.knapsack import least_cost
from spi_utils.planning.scores import DIRECTIONS, additive_cost, available_scores

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
COLUMNS = (
    *("kind", "score", "direction", "quantile"),
    *("layers", "bytes", "matrix_bits", "predicted_kl", "measured_kl"),
)
SEEDS = 100  # random orders behind a band: cheap, as each is one cumulative sum
POINTS = 61  # sizes at which curves are read; a knapsack each for the exact optimum


@dataclass(frozen=True)
class Standing:
    """Where a choice stands at its size: predicted KL of random selections and of the best possible one.

    `better_than` is the share of random selections that the choice beats. `gain` is the share of what can be
    gained over the median random selection that it gains: 1 is the optimum, 0 the median, below 0 worse.
    """

    predicted_kl: float
    optimum: float
    random_low: float
    random_median: float
    random_high: float
    better_than: float
    gain: float

    def __str__(self) -> str:
        """One line a person can read."""
        band = f"random {self.random_low:.3g}–{self.random_high:.3g}, optimum {self.optimum:.3g}"
        return (
            f"predicted KL {self.predicted_kl:.3g} ({band} at these bytes): better than "
            f"{self.better_than:.0%} of random choices, {self.gain:.0%} of the possible gain"
        )


@dataclass(frozen=True)
class Field:
    """Predicted KL against file size for random selections (seeds, points) and for the optimum (points,)."""

    file_bytes: Floats
    random: Floats
    optimum: Floats

    @classmethod
    def of(
        cls, layers: pd.DataFrame, *, seeds: int = SEEDS, points: int = POINTS, **options: Any
    ) -> Field | None:
        """Precompute the field; None where the table holds no predicted KL.

        The optimum here is the bound that lets one layer be split: no plan lies below it, and the exact
        optimum is at most one layer's cost above.
        """
        base = Chooser.of(layers, "random", **options)
        if not np.isfinite(base.kl).all():
            return None
        grid = np.linspace(base.file_bytes[0], base.file_bytes[-1], points)
        saved, spent = _steps(base)
        ratio = np.divide(saved, spent, out=np.full(len(saved), np.inf), where=spent > 0)
        best = np.interp(grid, *_run(base, np.argsort(-ratio, kind="stable")))
        return cls(grid, _random_table(base, grid, seeds), best)

    @cached_property
    def _bands(self) -> Floats:
        return np.quantile(self.random, (0.05, 0.5, 0.95), axis=0)

    def standing(self, total_bytes: float, predicted_kl: float) -> Standing:
        """Compare a choice with random selections and the optimum of the same size, by interpolation."""
        low, median, high = (float(np.interp(total_bytes, self.file_bytes, band)) for band in self._bands)
        best = float(np.interp(total_bytes, self.file_bytes, self.optimum))
        place = float(np.interp(total_bytes, self.file_bytes, np.arange(len(self.file_bytes))))
        left, right = int(np.floor(place)), int(np.ceil(place))
        at = self.random[:, left] + (place - left) * (self.random[:, right] - self.random[:, left])
        room = median - best
        return Standing(
            predicted_kl=predicted_kl,
            optimum=best,
            random_low=low,
            random_median=median,
            random_high=high,
            better_than=float((at > predicted_kl).mean()),
            gain=(median - predicted_kl) / room if room > 1e-12 * max(median, 1e-300) else 0.0,
        )


def frontier(
    layers: pd.DataFrame,
    scores: Sequence[str] | None = None,
    *,
    directions: Sequence[str] = DIRECTIONS,
    formats: Sequence[str] = ("nf4", "16bit"),
    seeds: int = SEEDS,
    points: int = POINTS,
    evaluated: Iterable[Mapping[str, Any]] = (),
    **options: Any,
) -> pd.DataFrame:
    """Predicted (and where known measured) KL against bytes, over the whole range of sizes.

    Args:
        layers: the layer table.
        scores: rows of `SCORES`; default every one that the table holds, random apart.
        formats: with more than two, scores lift layers from the smallest to the largest and the optimum
            uses all of them.
        seeds: random orders in the band, at least 20.
        points: sizes at which each curve is read, evenly spread.
        evaluated: real hybrids, mappings with `score`, `direction`, `bytes` (total) and `kl`.
        options: group, double_quant, force_16bit, forbid_16bit.

    Returns:
        A row a point: `kind` ("score", "random", "optimum", "evaluated"), `score`, `direction`, `quantile`
        (of random), `layers`, `bytes` (the file's), `matrix_bits`, `predicted_kl`, `measured_kl`: Σ of the
        layers' measured costs (the oracle's view), and for "evaluated" the real hybrid's KL.

    Raises:
        PlanError: as `make_plan`, or fewer than 20 seeds.
    """
    if seeds < 20:
        raise PlanError(f"seeds={seeds}: a random band needs at least 20 seeds.")
    held = [name for name in available_scores(layers, formats) if name != "random"]
    chosen = held if scores is None else list(scores)
    base = Chooser.of(layers, "random", formats=formats, **options)
    grid = np.linspace(base.file_bytes[0], base.file_bytes[-1], points)
    measured = _measured_costs(layers, base.problem.formats)
    rows: list[dict[str, Any]] = []
    for score in chosen:
        for direction in directions:
            curve = Chooser.of(layers, score, direction, formats=formats, **options)
            rows += _curve_rows(curve, grid, measured)
    if np.isfinite(base.kl).all():
        rows += _random_rows(base, grid, seeds) + _optimum_rows(base, grid, measured)
    rows += [_evaluated_row(base, item) for item in evaluated]
    return pd.DataFrame(rows, columns=COLUMNS)


def _curve_rows(curve: Chooser, grid: Floats, measured: Floats | None) -> list[dict[str, Any]]:
    """The largest choice within each size; equal neighbours are kept once."""
    p = curve.problem
    within = np.unique(np.searchsorted(curve.file_bytes, grid, side="right") - 1)
    rows = []
    for k in within[within >= 0]:
        choice = curve.at_count(int(k))
        formats = np.where(choice.mask, p.tiers[1], p.start[p.member])
        rows.append(
            {
                "kind": "score",
                "score": p.score,
                "direction": p.direction,
                "layers": choice.layers,
                "bytes": choice.total_bytes,
                "matrix_bits": choice.matrix_bits,
                "predicted_kl": choice.predicted_kl,
                "measured_kl": _summed(measured, formats),
            }
        )
    return rows


def _random_rows(base: Chooser, grid: Floats, seeds: int) -> list[dict[str, Any]]:
    table = np.quantile(_random_table(base, grid, seeds), QUANTILES, axis=0)  # (quantiles, points)
    return [
        {
            "kind": "random",
            "score": "random",
            "quantile": quantile,
            "bytes": int(size),
            "matrix_bits": _matrix_bits(base, size),
            "predicted_kl": kl,
        }
        for quantile, line in zip(QUANTILES, table, strict=True)
        for size, kl in zip(grid, line, strict=True)
    ]


def _optimum_rows(base: Chooser, grid: Floats, measured: Floats | None) -> list[dict[str, Any]]:
    """The exact least predicted KL within each size, every format allowed."""
    p = base.problem
    size = p.payload + p.header
    outside = int(base.file_bytes[0]) - int(size[np.arange(len(p.start)), p.start].sum())
    rows = []
    for limit in grid:
        chosen = least_cost(p.predicted, size.astype(float), float(limit - outside), p.allowed).choice
        items = np.arange(len(chosen))
        data = int(p.payload[items, chosen].sum())
        rows.append(
            {
                "kind": "optimum",
                "score": "optimum",
                "layers": int(p.count[chosen != p.start].sum()),
                "bytes": outside + int(size[items, chosen].sum()),
                "matrix_bits": 8 * data / p.numel,
                "predicted_kl": float(p.predicted[items, chosen].sum()),
                "measured_kl": _summed(measured, chosen[p.member]),
            }
        )
    return rows


def _evaluated_row(base: Chooser, item: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kind": "evaluated",
        "score": item["score"],
        "direction": item["direction"],
        "bytes": item["bytes"],
        "matrix_bits": _matrix_bits(base, float(item["bytes"])),
        "measured_kl": item["kl"],
    }


# --- helpers ---------------------------------------------------------------------------------------------


def _steps(base: Chooser) -> tuple[Floats, Floats]:
    """What lifting each free item saves (nats) and takes (bytes of the file), in the order of `base`."""
    return -np.diff(base.kl), np.diff(base.file_bytes).astype(float)


def _run(base: Chooser, order: Ints) -> tuple[Floats, Floats]:
    """File size and predicted KL along another order of the free items."""
    saved, spent = _steps(base)
    size = base.file_bytes[0] + np.concatenate([[0.0], np.cumsum(spent[order])])
    return size, base.kl[0] - np.concatenate([[0.0], np.cumsum(saved[order])])


def _random_table(base: Chooser, grid: Floats, seeds: int) -> Floats:
    """Predicted KL of `seeds` random orders at each size: (seeds, points), sorted over seeds."""
    orders = (np.random.default_rng(seed).permutation(len(base.order)) for seed in range(seeds))
    return np.sort(np.stack([np.interp(grid, *_run(base, order)) for order in orders]), axis=0)


def _measured_costs(layers: pd.DataFrame, formats: Sequence[str]) -> Floats | None:
    """Σ-able measured costs (planned layers, formats), scaled as the score's; None if not all are known."""
    columns = [f"measured_{fmt}" for fmt in formats if fmt != "16bit"]
    planned = layers["quantizable"].to_numpy(bool)
    if any(column not in layers or layers.loc[planned, column].isna().any() for column in columns):
        return None
    return np.stack([additive_cost(layers, "measured", fmt)[planned] for fmt in formats], axis=1)


def _summed(measured: Floats | None, formats: Ints) -> float | None:
    return None if measured is None else float(measured[np.arange(len(formats)), formats].sum())


def _matrix_bits(base: Chooser, file_bytes: float) -> float:
    """Matrix bits of a file size, by interpolation between the smallest and the largest plan."""
    ends = 8 * (base.data_bytes[[0, -1]] - base.fixed_data) / base.problem.numel
    return float(np.interp(file_bytes, base.file_bytes[[0, -1]], ends))
