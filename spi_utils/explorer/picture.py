"""The explorer's picture, redrawn in a few milliseconds: only what a threshold changes is drawn again.

Axes, labels and the histogram of all layers are drawn once for a score and direction and kept as a bitmap.
A new threshold moves three artists (the protected part of the histogram, the threshold line, the point on the
frontier), draws just those over the bitmap, paints the map's cells into it, and encodes it.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spi_utils.figures.plan_figures import FORMAT_LABELS, LayerGrid, draw_grid
from spi_utils.figures.plotting import BLACK, BLUE, FORMAT_COLOURS, GREY, VERMILLION, score_label, styled
from spi_utils.figures.score_figures import histogram_edges, is_wide

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D
    from numpy.typing import NDArray

WIDTH, HEIGHT, DPI = 10.0, 6.0, 100  # inches; 1000 × 600 pixels
FRAME = 3  # pixels that are left of a hollow cell's side
KEPT = FORMAT_COLOURS["16bit"]


@dataclass(frozen=True)
class Curves:
    """Predicted KL (nats a token) against the model's size (bytes), for the small frontier of the picture.

    `size` (n,) and `kl` (n,): this score's own choices. At each `grid` (points,) size: the least KL, and the
    median of random selections with the bounds that hold 90 % of them. `unit`: bytes in the axis's unit, and
    its name.
    """

    size: NDArray[np.float64]
    kl: NDArray[np.float64]
    grid: NDArray[np.float64]
    optimum: NDArray[np.float64]
    random_low: NDArray[np.float64]
    random_median: NDArray[np.float64]
    random_high: NDArray[np.float64]
    unit: tuple[float, str] = (1e9, "GB")


class ChoicePicture:
    """Histogram with threshold, frontier with the present choice, and the depth × type map, as one PNG."""

    @styled
    def __init__(
        self,
        grid: LayerGrid,
        values: NDArray[np.float64],
        score: str,
        direction: str,
        curves: Curves | None,
        lower: str = "nf4",
    ) -> None:
        """`values` (L,) is the score of each planned layer; `lower` the format of those not protected."""
        self._grid, self._values, self._high = grid, values, direction == "high"
        self._lower = lower
        self._edges = histogram_edges(values)
        figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
        self._canvas = FigureCanvasAgg(figure)
        top, bottom = figure.subfigures(2, 1, squeeze=False)[:, 0]
        if curves is None:
            histogram, self._point = top.subplots(), None
        else:
            histogram, frontier = top.subplots(1, 2, width_ratios=[1.25, 1])
            self._point, self._unit = _draw_frontier(frontier, curves), curves.unit[0]
        self._draw_histogram(histogram, score)
        below = bottom.subplots()
        _draw_map(below, grid, lower)
        self._canvas.draw()
        self._map = CellPainter(below, grid.shape, HEIGHT * DPI)
        figure.set_layout_engine("none")  # the layout is settled; what follows must not move it
        self._background = self._canvas.copy_from_bbox(figure.bbox)

    def png(self, threshold: float, chosen: NDArray[np.bool_], point: tuple[float, float] | None) -> bytes:
        """The picture of one choice.

        Args:
            threshold: in the score's units.
            chosen: which planned layers are protected, (L,).
            point: size in bytes and predicted KL, where known.
        """
        finite = np.isfinite(self._values)
        counts, _ = np.histogram(self._values[chosen & finite], self._edges)
        self._kept.set_data(counts)
        self._line.set_xdata([threshold, threshold])
        moving: list[Artist] = [self._kept, self._line]
        if self._point is not None and point is not None:
            self._point.set_data([point[0] / self._unit], [point[1]])
            moving.append(self._point)
        self._canvas.restore_region(self._background)
        for artist in moving:
            artist.draw(self._canvas.get_renderer())
        pixels = np.asarray(self._canvas.buffer_rgba())
        cells = self._grid.colours({"16bit": chosen, self._lower: ~chosen})
        self._map.paint(pixels, cells, self._grid.hollow)
        return encode_png(pixels)

    def _draw_histogram(self, axes: Axes, score: str) -> None:
        finite = self._values[np.isfinite(self._values)]
        counts, _ = np.histogram(finite, self._edges)
        axes.stairs(counts, self._edges, fill=True, color=FORMAT_COLOURS[self._lower])
        self._kept = axes.stairs(np.zeros(len(counts)), self._edges, fill=True, color=KEPT, animated=True)
        self._line = axes.axvline(self._edges[0], color=BLACK, lw=2, animated=True)
        axes.set(xlabel=score_label(score), ylabel="layers", ylim=(0, max(counts.max(initial=0), 1) * 1.15))
        if is_wide(self._values):
            axes.set_xscale("log")
        failed = len(self._values) - len(finite)
        note = f" ({failed} without a value)" if failed else ""
        side = "≥" if self._high else "≤"
        axes.set_title(f"Kept in 16-bit: score {side} threshold{note}", loc="left", fontsize=10)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))


class CellPainter:
    """Paints a grid of cells straight into a bitmap: matplotlib's resampling took half of the time."""

    def __init__(self, axes: Axes, shape: tuple[int, int], height: float) -> None:
        """`axes` is drawn and fills its box with `shape` cells, of a bitmap `height` pixels high."""
        box = axes.get_window_extent()
        # Inside the left and the lower spine; a bitmap counts its rows from the top.
        left, right = round(box.x0) + 1, round(box.x1)
        top, bottom = round(height - box.y1), round(height - box.y0) - 1
        self._where = (slice(top, bottom), slice(left, right))
        self._rows, row_gaps = _places(bottom - top, shape[0])
        self._columns, column_gaps = _places(right - left, shape[1])
        self._gaps = row_gaps[:, None] | column_gaps
        self._inside = _inside(row_gaps)[:, None] & _inside(column_gaps)

    def paint(
        self, pixels: NDArray[np.uint8], cells: NDArray[np.uint8], hollow: NDArray[np.bool_] | None = None
    ) -> None:
        """Fill the box in pixels (height, width, 4) with the colours of cells (rows, columns, 3).

        `hollow` (rows, columns) marks cells of which only a frame is filled.
        """
        block = cells[self._rows][:, self._columns]
        block[self._gaps] = 255
        if hollow is not None and hollow.any():
            block[self._inside & hollow[self._rows][:, self._columns]] = 255
        pixels[self._where][..., :3] = block


def _places(length: int, cells: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Each pixel's cell along one side, and which pixels are the line between two cells. (length,) each."""
    place = np.arange(length) * cells // max(length, 1)
    gap = np.diff(place, prepend=0) > 0
    return place, gap if length > 4 * cells else np.zeros(length, bool)


def _inside(gaps: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels (length,) that lie deeper in their cell than its frame; none where cells are too small."""
    edge = gaps.copy()
    edge[[0, -1]] = True
    near = np.convolve(edge, np.ones(2 * FRAME + 1), mode="same") > 0
    return ~near if gaps.any() or len(gaps) > 4 * FRAME else np.zeros(len(gaps), bool)


def _draw_map(axes: Axes, grid: LayerGrid, lower: str) -> None:
    draw_grid(axes, grid, most_labels=16)
    axes.set_title("What is kept in 16-bit, a cell a layer", loc="left", fontsize=10)
    axes.plot([], [], "s", ms=8, color=KEPT, label="16-bit")
    axes.plot([], [], "s", ms=8, color=FORMAT_COLOURS[lower], label=FORMAT_LABELS[lower])
    if grid.hollow.any():
        axes.plot([], [], "s", ms=7, mfc="white", mec=KEPT, mew=2, label="analysis failed")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, borderaxespad=0.1)


def _draw_frontier(axes: Axes, curves: Curves) -> Line2D:
    size, name = curves.unit
    grid = curves.grid / size
    axes.fill_between(grid, curves.random_low, curves.random_high, color="#DDDDDD", label="random, 90 %")
    axes.plot(grid, curves.random_median, color=GREY, lw=1)
    axes.plot(curves.size / size, curves.kl, color=BLUE, lw=1.8, label="this score")
    axes.plot(grid, curves.optimum, color=BLACK, lw=1.4, ls="--", label="least predicted")
    axes.set(xlabel=f"model size ({name})", ylabel="predicted KL (nats a token)", ylim=(0, None))
    axes.set_title("What a gigabyte buys", loc="left", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.legend(loc="upper right", fontsize=8)
    (point,) = axes.plot([], [], "o", ms=9, color=VERMILLION, mec="white", mew=1.5, zorder=6, animated=True)
    return point


def png_of(figure: Figure) -> bytes:
    """A whole figure drawn and encoded."""
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(DPI)
    canvas.draw()
    return encode_png(np.asarray(canvas.buffer_rgba()))


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG of pixels (height, width, 4: RGBA), made for speed: each row as its difference to the one above.

    Plots repeat their rows, so the differences are mostly zeros, which zlib's fastest level skips quickly.
    Source: the PNG specification, third edition, sections 5, 9 (filter type 2, "up") and 11.
    """
    height, width = pixels.shape[:2]
    flat = pixels.reshape(height, 4 * width)
    rows = np.empty((height, 1 + 4 * width), np.uint8)
    rows[:, 0] = 2
    rows[0, 1:] = flat[0]
    np.subtract(flat[1:], flat[:-1], out=rows[1:, 1:])  # modulo 256, as the filter wants it
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)  # 8 bits a channel, RGBA
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.data, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
