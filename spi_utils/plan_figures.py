"""Figures of plans: which layers one protects, by depth and type, and what a gigabyte buys by each score."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.ticker import MaxNLocator

from spi_utils.plotting import FORMAT_COLOURS, GREY, gigabytes, headline, new_figure, shorten, styled
from spi_utils.score_figures import planned_layers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from spi_utils.plan import ProtectionPlan

FORMAT_LABELS = {"16bit": "16-bit", "int8": "8-bit (int8)", "nf4": "4-bit (NF4)"}
EMPTY = "#FFFFFF"
MOST_COLUMNS = 400


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

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom, top of the map in blocks and rows of types, as `imshow` wants them."""
        return self.depths[0] - 0.5, self.depths[-1] + self.step - 0.5, self.shape[0] - 0.5, -0.5

    def share(self, chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Share of each cell's weights in `chosen` layers (L,). Shape (types, depths), NaN if empty."""
        held = np.bincount(self._cell, self._weights * chosen, minlength=len(self._total))
        with np.errstate(invalid="ignore"):
            return (held / self._total).reshape(self.shape)

    def colours(self, formats: Mapping[str, NDArray[np.bool_]]) -> NDArray[np.float32]:
        """Cells coloured by the formats of their layers, mixed where they differ. (types, depths, 3), 0…1."""
        image = np.zeros((*self.shape, 3), np.float32)
        for name, chosen in formats.items():
            share = np.nan_to_num(self.share(chosen)).astype(np.float32)
            image += share[..., None] * np.array(to_rgb(FORMAT_COLOURS.get(name, GREY)), np.float32)
        image[self._empty] = to_rgb(EMPTY)
        return image.clip(0, 1)

    def counts(self, chosen: NDArray[np.bool_]) -> list[str]:
        """ "12/30" for each type: chosen layers (L,) of all."""
        kept = np.bincount(self.rows, chosen, minlength=len(self.types)).astype(int)
        return [f"{k}/{n}" for k, n in zip(kept, np.bincount(self.rows), strict=True)]


def draw_grid(axes: Axes, grid: LayerGrid) -> None:
    """Set up the axes of a depth × type map: ticks, labels and thin white lines between cells."""
    left, right, bottom, top = grid.extent
    axes.set(xlim=(left, right), ylim=(bottom, top), xlabel="depth (block)")
    axes.set_yticks(range(grid.shape[0]), [shorten(name, 24) for name in grid.types])
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
    figure = new_figure(height=1.7 + 0.32 * len(grid.types))
    axes = figure.add_subplot()
    draw_grid(axes, grid)
    image = grid.colours({name: held == name for name in np.unique(held)})
    axes.imshow(image, aspect="auto", extent=grid.extent, interpolation="nearest")
    above = held != "nf4"
    for height, count in enumerate(grid.counts(above)):
        axes.annotate(
            count, (1.01, height), xycoords=("axes fraction", "data"), va="center", fontsize=9, color=GREY
        )
    for name in sorted(set(held), key=list(FORMAT_COLOURS).index):
        axes.plot([], [], "s", ms=9, color=FORMAT_COLOURS[name], label=FORMAT_LABELS[name])
    figure.legend(loc="outside lower center", ncols=3)
    headline(figure, _map_finding(plan, held))
    return figure


def _map_finding(plan: ProtectionPlan, held: NDArray[np.str_]) -> str:
    kept = int((held == "16bit").sum())
    return (
        f"{kept} of {len(held)} layers stay in 16-bit: {gigabytes(plan.bytes['total'])} in all, "
        f"{plan.bits_per_weight:.2f} bits a weight"
    )
