"""How the project's figures look, and how they become files: shared by every module that draws.

Figures are plain `matplotlib.figure.Figure` objects: no pyplot, no global state, the same bytes for the same
data. Colours are Okabe and Ito's (2008), told apart by the colour-blind; layer types also differ by marker,
so that a figure survives a black-and-white printer.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from spi_utils.formats import FORMATS
from spi_utils.plan import score_row
from spi_utils.runs import atomic_path

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from spi_utils.runs import Run

# Okabe-Ito without its yellow, which is too pale for points on white.
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#000000", "#666666"
CYCLE = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, BLACK)
MARKERS = "os^DvPX*"
# What a layer is stored as. 16-bit stands out, NF4 recedes.
FORMAT_COLOURS = {"16bit": VERMILLION, "int8": ORANGE, "nf4": "#CFE0EC"}
FORMAT_COLOURS |= {name: "#CFE0EC" for name in FORMATS if name.startswith("int4")}

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "spi-utils",
}
DPI = 120

# Axis labels where a score's menu title is too long or lacks the unit.
AXIS_LABELS = {
    "alpha_hill": "α (Hill, top tenth of the eigenvalues)",
    "alpha_pl": "α (Clauset's power-law fit)",
    "alpha_decay": "rank-decay exponent a",
    "alpha_farms": "α (FARMS, 128×128 blocks)",
    "nf4_error": "relative NF4 error ‖Q(W)−W‖/‖W‖",
    "fisher": "predicted KL avoided (nats a token per GB)",
    "refined": "refined KL avoided (nats a token per GB)",
    "measured": "measured KL avoided (nats a token per GB)",
}

# Names short enough for a legend.
SHORT_LABELS = {
    "alpha_hill": "α Hill",
    "alpha_pl": "α Clauset",
    "alpha_farms": "α FARMS",
    "alpha_excess": "α over noise",
    "alpha_decay": "rank decay a",
    "nf4_error": "NF4 error",
    "fisher": "Fisher",
}

Args = ParamSpec("Args")
Result = TypeVar("Result")


class TypeStyle(NamedTuple):
    """Colour and marker of a layer type."""

    colour: str
    marker: str


def styled(draw: Callable[Args, Result]) -> Callable[Args, Result]:
    """Run a drawing function under the project's style, and leave matplotlib's settings as they were."""

    @functools.wraps(draw)
    def inner(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return inner


def new_figure(width: float = 9.0, height: float = 4.6) -> Figure:
    """An empty figure at notebook width (inches), laid out without overlaps."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def headline(figure: Figure, finding: str, detail: str = "") -> None:
    """Title a figure with what it shows, and one smaller line on how to read it."""
    columns = int(figure.get_figwidth() * 10.2)
    # A Greek letter stays as it is; an ordinary sentence begins with a capital.
    sentence = finding if finding.startswith("α") else finding[:1].upper() + finding[1:]
    figure.suptitle(
        balanced(sentence, columns), x=0.01, ha="left", fontsize=12, fontweight="bold", linespacing=1.3
    )
    if detail:
        text = balanced(detail, int(columns * 1.5))
        figure.supxlabel(text, x=0.01, ha="left", fontsize=9, color=GREY, linespacing=1.35)


def balanced(text: str, columns: int) -> str:
    """`text` in as few lines of at most `columns` characters as it needs, of nearly equal length."""
    lines = len(textwrap.wrap(text, columns))
    narrowest = next(width for width in range(1, columns + 1) if len(textwrap.wrap(text, width)) <= lines)
    return textwrap.fill(text, narrowest)


def type_styles(types: pd.Series, limit: int = 14) -> dict[str, TypeStyle]:
    """Colour and marker for each layer type by order of appearance; rare ones beyond `limit` share one."""
    names = list(dict.fromkeys(types))
    common = set(types.value_counts().index[:limit])
    named = [name for name in names if len(names) <= limit or name in common]
    styles = {
        name: TypeStyle(CYCLE[i % len(CYCLE)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(named)
    }
    return {name: styles.get(name, TypeStyle("#AAAAAA", ".")) for name in names}


def legend_labels(styles: Mapping[str, TypeStyle]) -> dict[str, str]:
    """type -> legend label; types that share the grey style stand under one label."""
    rest = sum(style.marker == "." for style in styles.values())
    return {
        name: f"{rest} rarer types" if style.marker == "." else shorten(name, 24)
        for name, style in styles.items()
    }


def shorten(name: str, limit: int = 40) -> str:
    """A long name with its middle left out: both ends of a module path tell more than its middle."""
    if len(name) <= limit:
        return name
    head = (limit - 1) // 2
    return f"{name[:head]}…{name[-(limit - 1 - head) :]}"


def score_label(score: str) -> str:
    """How a score is written on an axis, with its unit where it has one."""
    return AXIS_LABELS.get(score) or score_row(score).title


def failed_note(values: NDArray[np.float64]) -> str:
    """How many of values (L,) are missing or infinite, as a sentence; empty if none is."""
    count = int((~np.isfinite(values)).sum())
    if not count:
        return ""
    return f"Hollow: {count} layer{'s' if count > 1 else ''} without a finite value, set on the bottom edge."


def hollow_row(axes: Axes, positions: NDArray[np.float64]) -> None:
    """Mark layers without a value as hollow points on the bottom edge of `axes`, at x `positions` (n,)."""
    if len(positions):
        axes.plot(
            positions,
            np.full(len(positions), 0.015),
            "o",
            mfc="white",
            mec=BLACK,
            ms=6,
            clip_on=False,
            transform=axes.get_xaxis_transform(),
            zorder=5,
            gid="failed",
        )


def short_label(score: str) -> str:
    """A score's name for a legend."""
    return SHORT_LABELS.get(score, score.replace("_", " "))


def gigabytes(count: float) -> str:
    """Bytes in units of 10⁹ or 10⁶, as the report writes them: "6.41 GB", "205 MB"."""
    return f"{count / 1e9:.2f} GB" if abs(count) >= 999.5e6 else f"{count / 1e6:.3g} MB"


def signed(value: float) -> str:
    """Two decimals with a true minus sign, as the axes write it: "−0.17"."""
    return f"{value:.2f}".replace("-", "−")


def save_figure(figure: Figure, run: Run, name: str) -> Path:
    """Write `name`.png and .svg into the run's figures, atomically; the same figure gives the same bytes.

    Returns:
        The PNG's path.

    Raises:
        RunError: the folder can't be written.
    """
    for suffix, metadata in ((".svg", {"Date": None, "Creator": "spi-utils"}), (".png", {"Software": None})):
        with mpl.rc_context(STYLE), atomic_path(run.figures / f"{name}{suffix}") as path:
            figure.savefig(path, metadata=metadata, dpi=DPI)
    return run.figures / f"{name}.png"
