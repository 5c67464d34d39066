"""Figures of plans: which layers one protects, by depth and type, and what a gigabyte buys by each score."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from spi_utils.errors import AnalysisError
from spi_utils.figures.plotting import (
    BLACK,
    BLUE,
    FORMAT_COLOURS,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    gigabytes,
    headline,
    new_figure,
    short_label,
    shorten,
    styled,
)
from spi_utils.figures.score_figures import planned_layers
from spi_utils.formats import FORMATS
from spi_utils.plan import nominal_bits

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from spi_utils.plan import ProtectionPlan

FORMAT_LABELS = {"16bit": "16-bit", "int8": "8-bit (int8)", "nf4": "4-bit (NF4)"}
FORMAT_LABELS |= {name: f"4-bit ({name})" for name in FORMATS if name.startswith("int4")}
EMPTY = "#FFFFFF"
OTHER_FORMAT = SKY
MOST_COLUMNS = 400
MOST_LABELS = 40
NEARLY_ALL = 0.9  # of a type's layers


class LayerGrid:
    """The depth × type grid of a layer table: where each planned layer lies, types in order of appearance.

    Several layers in one cell (experts listed one by one) share it by their number of weights.
    """

    def __init__(self, layers: pd.DataFrame) -> None:
        planned = planned_layers(layers)
        self.types = list(dict.fromkeys(planned["type"]))
        depths = np.unique(planned["depth"].to_numpy())
        # A very deep model shares columns between neighbouring blocks.
        self.step = -(-int(depths.max() - depths.min() + 1) // MOST_COLUMNS)
        self.depths = np.arange(depths.min(), depths.max() + 1, self.step)
        row = {name: place for place, name in enumerate(self.types)}
        self.rows = planned["type"].map(row).to_numpy()
        self.columns = (planned["depth"].to_numpy() - self.depths[0]) // self.step
        self.shape = (len(self.types), len(self.depths))
        self._cell = self.rows * self.shape[1] + self.columns
        self._weights = planned["numel"].to_numpy(float)
        self._total = np.bincount(self._cell, self._weights, minlength=self.shape[0] * self.shape[1])
        self._empty = (self._total == 0).reshape(self.shape)
        failed = (planned["status"] == "failed").to_numpy()
        self.hollow = self.share(failed) > 0  # (types, depths): cells with a layer whose analysis failed

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom, top of the map in blocks and rows of types, as `imshow` wants them."""
        return self.depths[0] - 0.5, self.depths[-1] + self.step - 0.5, self.shape[0] - 0.5, -0.5

    def share(self, chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Share of each cell's weights in `chosen` layers (L,). Shape (types, depths), NaN if empty."""
        held = np.bincount(self._cell, self._weights * chosen, minlength=len(self._total))
        with np.errstate(invalid="ignore"):
            return (held / self._total).reshape(self.shape)

    def colours(self, formats: Mapping[str, NDArray[np.bool_]]) -> NDArray[np.uint8]:
        """Cells coloured by the formats of their layers, mixed where they differ. (types, depths, 3)."""
        image = np.zeros((*self.shape, 3), np.float32)
        for name, chosen in formats.items():
            share = np.nan_to_num(self.share(chosen)).astype(np.float32)
            image += share[..., None] * np.array(to_rgb(FORMAT_COLOURS.get(name, OTHER_FORMAT)), np.float32)
        image[self._empty] = to_rgb(EMPTY)
        return (255 * image.clip(0, 1) + 0.5).astype(np.uint8)

    def counts(self, chosen: NDArray[np.bool_]) -> list[str]:
        """ "12/30" for each type: chosen layers (L,) of all."""
        kept = np.bincount(self.rows, chosen, minlength=len(self.types)).astype(int)
        return [f"{k}/{n}" for k, n in zip(kept, np.bincount(self.rows), strict=True)]


def draw_grid(axes: Axes, grid: LayerGrid, most_labels: int = MOST_LABELS) -> None:
    """Set up the axes of a depth × type map: ticks, labels and thin white lines between cells.

    Args:
        most_labels: how many types can be named without overlap; of more, every second, third, … is.
    """
    left, right, bottom, top = grid.extent
    axes.set(xlim=(left, right), ylim=(bottom, top), xlabel="depth (block)")
    named = range(0, grid.shape[0], -(-grid.shape[0] // most_labels))
    axes.set_yticks(named, [shorten(grid.types[row], 24) for row in named])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if grid.shape[1] <= 130:
        axes.vlines(np.arange(left, right + 1), top, bottom, color="white", lw=0.8, zorder=3)
    axes.hlines(np.arange(-0.5, grid.shape[0]), left, right, color="white", lw=1.5, zorder=3)


@styled
def plan_map(layers: pd.DataFrame, plan: ProtectionPlan) -> Figure:
    """The plan as a depth × type map, a cell a layer, coloured by the format that holds it."""
    grid = LayerGrid(layers)
    planned = planned_layers(layers)
    held = np.array([plan.formats.get(name, "16bit") for name in planned["name"]])
    figure = new_figure(height=1.7 + 0.32 * min(len(grid.types), MOST_LABELS))
    axes = figure.add_subplot()
    draw_grid(axes, grid)
    image = grid.colours({name: held == name for name in np.unique(held)})
    axes.imshow(image, aspect="auto", extent=grid.extent, interpolation="nearest")
    _draw_hollow(axes, grid)
    above = held != min(held, key=nominal_bits) if len(set(held)) > 1 else held == "16bit"
    for height, count in enumerate(grid.counts(above)):
        axes.annotate(
            count, (1.01, height), xycoords=("axes fraction", "data"), va="center", fontsize=9, color=GREY
        )
    for name in sorted(set(held), key=nominal_bits, reverse=True):
        colour = FORMAT_COLOURS.get(name, OTHER_FORMAT)
        axes.plot([], [], "s", ms=9, color=colour, label=FORMAT_LABELS.get(name, name))
    if grid.hollow.any():
        label = f"analysis failed ({int((planned['status'] == 'failed').sum())})"
        axes.plot([], [], "s", ms=8, mfc="white", mec=BLACK, mew=1.8, label=label)
    figure.legend(loc="outside lower center", ncols=4)
    headline(figure, _map_finding(plan, grid, above))
    return figure


def _draw_hollow(axes: Axes, grid: LayerGrid) -> None:
    """Leave only a frame of the cells whose layers' analysis failed."""
    for row, column in np.argwhere(grid.hollow):
        left = grid.depths[column] - 0.5 + 0.16 * grid.step
        box = Rectangle((left, row - 0.34), 0.68 * grid.step, 0.68, color="white", zorder=2, gid="failed")
        axes.add_patch(box)


def _map_finding(plan: ProtectionPlan, grid: LayerGrid, above: NDArray[np.bool_]) -> str:
    """Which types are lifted above the smallest format nearly whole, and which not at all."""
    share = np.bincount(grid.rows, above, minlength=len(grid.types)) / np.bincount(grid.rows)
    whole = [name for name, part in zip(grid.types, share, strict=True) if part >= NEARLY_ALL]
    never = [name for name, part in zip(grid.types, share, strict=True) if part == 0]
    tiers = set(plan.formats.values()) - {"16bit"}
    place = "stay in 16-bit" if len(tiers) < 2 else "are above the smallest format"
    kept = f"{int(above.sum())} of {len(above)} layers {place}"
    parts = []
    if whole and len(whole) < len(grid.types):
        parts.append(f"nearly all of {_listed(whole)}")
    if never and len(never) < len(grid.types):
        parts.append(f"none of {_listed(never)}")
    words = f"{kept}: {', '.join(parts)}" if parts else kept
    return f"{words} ({gigabytes(plan.bytes['total'])}, {plan.matrix_bits:.2f} matrix bits)"


def _listed(names: list[str], most: int = 3) -> str:
    """Names in a sentence; of many the first ones and how many more."""
    if len(names) > most:
        return f"{', '.join(shorten(name, 20) for name in names[:most])} and {len(names) - most} more types"
    return " and ".join(shorten(name, 20) for name in names)


# --- what a gigabyte buys --------------------------------------------------------------------------------

# The curves that are named; every other score is a thin grey line, there to be compared with.
NAMED = {
    ("alpha_hill", "high"): (BLUE, "-"),
    ("alpha_hill", "low"): (SKY, "--"),
    ("fisher", "high"): (GREEN, "-"),
    ("measured", "high"): (PURPLE, "-"),
}


@styled
def frontier_figure(curves: pd.DataFrame, plan: ProtectionPlan | None = None) -> Figure:
    """Predicted KL against size for every score, with random's band, the optimum, and the plan.

    Args:
        curves: what `frontier.frontier` returns; rows with `kind == "evaluated"` are drawn as points.
        plan: marked where it stands.

    Raises:
        AnalysisError: the curves hold no predicted KL.
    """
    if curves["predicted_kl"].notna().sum() == 0:
        raise AnalysisError(
            "these curves hold no predicted KL. Run notebook 01_analyze with sensitivity='self' first."
        )
    figure = new_figure(height=5.0)
    axes = figure.add_subplot()
    _draw_scores(axes, curves, plan)
    _draw_random(axes, curves)
    optimum = curves[curves["kind"] == "optimum"]
    axes.plot(
        optimum["bytes"] / 1e9,
        optimum["predicted_kl"],
        color=BLACK,
        lw=1.8,
        ls="--",
        label="least predicted KL",
    )
    real = curves[curves["kind"] == "evaluated"]
    if len(real):
        axes.plot(
            real["bytes"] / 1e9,
            real["measured_kl"],
            "D",
            color=BLACK,
            mfc="white",
            ms=6,
            label="evaluated hybrids",
        )
    if plan is not None and plan.predicted_kl is not None:
        axes.plot(
            plan.bytes["total"] / 1e9, plan.predicted_kl, "o", ms=10, color=VERMILLION, mec="white", mew=1.5,
            zorder=6, label="the plan",
        )  # fmt: skip
    axes.set(xlabel="model size (GB)", ylabel="predicted KL (nats a token)", ylim=(0, None))
    figure.legend(loc="outside right center")
    headline(figure, _frontier_finding(curves, plan), "Thin lines: other scores, in both directions.")
    return figure


def _draw_scores(axes: Axes, curves: pd.DataFrame, plan: ProtectionPlan | None) -> None:
    styles = dict(NAMED)
    if plan is not None and (plan.score, plan.direction) not in styles:
        styles[plan.score, plan.direction] = (ORANGE, "-")
    of_scores = curves[curves["kind"] == "score"]
    for key, curve in of_scores.groupby(["score", "direction"], sort=False):
        if key in styles:
            continue
        axes.plot(curve["bytes"] / 1e9, curve["predicted_kl"], color="#DADADA", lw=0.7)
    for (score, direction), (colour, line) in styles.items():
        curve = of_scores[(of_scores["score"] == score) & (of_scores["direction"] == direction)]
        if len(curve):
            label = f"{short_label(score)}, {direction}"
            axes.plot(curve["bytes"] / 1e9, curve["predicted_kl"], color=colour, lw=2, ls=line, label=label)


def _draw_random(axes: Axes, curves: pd.DataFrame) -> None:
    bands = curves[curves["kind"] == "random"].pivot_table(
        index="bytes", columns="quantile", values="predicted_kl"
    )
    if bands.empty:
        return
    low, high = float(bands.columns.min()), float(bands.columns.max())
    label = f"random, {high - low:.0%}".replace("%", " %")
    axes.fill_between(
        bands.index / 1e9, bands[low], bands[high], color="#A6A6A6", alpha=0.55, lw=0, label=label
    )


def _frontier_finding(curves: pd.DataFrame, plan: ProtectionPlan | None) -> str:
    def at(kind: str, size: float) -> float:
        rows = curves[(curves["kind"] == kind) & curves["predicted_kl"].notna()]
        middle = rows.groupby("bytes")["predicted_kl"].median()
        return float(np.interp(size, middle.index, middle.to_numpy()))

    if plan is None or plan.predicted_kl is None:
        span = curves.loc[curves["kind"] == "optimum", "predicted_kl"]
        return f"What a gigabyte buys: predicted KL from {span.max():.3g} to {span.min():.3g} nats a token"
    size = plan.bytes["total"]
    return (
        f"At {gigabytes(size)} the plan's predicted KL is {plan.predicted_kl:.3g} nats a token; a random "
        f"choice's is {at('random', size):.3g}, the least possible {at('optimum', size):.3g}"
    )
