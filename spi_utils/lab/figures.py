"""The lab's figures: damage against compactness, collapse with depth.

They draw from the summary (`summary.summarize`) or from `numeric.depth_table`; titles are computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from spi_utils.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    headline,
    new_figure,
    styled,
)
from spi_utils.lab.numeric import BASES, FLOOR, NORMALISATIONS, collapsed, spectra
from spi_utils.lab.summary import COMPACTNESS
from spi_utils.lab.tables import sign

Summary = Mapping[str, Any]
DASHES: Sequence[Any] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
# Colour and marker of each arm; those of the trace norm's sweep are of one hue, darker with its coefficient.
LOOKS = {
    **{"standard": (BLACK, "s"), "nuclear": (ORANGE, "D"), "both": (PURPLE, "X")},
    **{"frobenius": (GREEN, "v"), "spectral": (VERMILLION, "^"), "low_rank": (GREY, "P")},
}
SWEEP = (BLUE, SKY, "#A9D6F0")


@styled
def damage_against_compactness(summary: Summary, kinds: Sequence[str] = ("nf4", "int3")) -> Figure:
    """KL at equal loss against compactness: a small point a seed, a large one with intervals an arm."""
    figure = new_figure(9.0, 5.4)
    panels = figure.subplots(1, len(kinds), sharex=True, squeeze=False)[0]
    arms = [arm for arm in summary["arms"] if arm["reached"]]
    sweep = [arm["name"] for arm in arms if arm["name"] not in LOOKS]
    blues = dict(zip(reversed(sweep), SWEEP, strict=False))
    looks = [LOOKS.get(arm["name"], (blues.get(arm["name"], BLUE), "o")) for arm in arms]
    for axes, kind in zip(panels, kinds, strict=True):
        for arm, (colour, marker) in zip(arms, looks, strict=True):
            points = [(point[COMPACTNESS], point["kl"][kind]) for point in arm["points"]]
            axes.plot(*zip(*points, strict=True), marker, color=colour, ms=3.5, alpha=0.55, ls="", mew=0)
            x, y = arm[COMPACTNESS], arm["kl"][kind]
            bars = {"xerr": _bars(x), "yerr": _bars(y), "elinewidth": 1.2, "capsize": 2}
            of_arm = {"fmt": marker, "color": colour, "ms": 8, "mec": "white", "mew": 0.8}
            axes.errorbar(x["mean"], y["mean"], **bars, **of_arm)
        axes.set(yscale="log", xlabel="share of singular values that hold 90 % of Σσ")
        axes.set_ylabel(f"KL(16-bit ‖ {kind.upper()}), nats a character")
    handles = [
        Line2D([], [], color=colour, marker=marker, ls="", ms=7, label=arm["label"])
        for arm, (colour, marker) in zip(arms, looks, strict=True)
    ]
    note = f"Large: mean and 95 % interval over {len(summary['seeds'])} seeds; small: one seed. "
    _legend_below(figure, handles, note + "Compact is left, robust down", 3)
    others = [arm for arm in arms if arm["name"] != "standard"]
    compact = [arm for arm in others if sign(arm["compactness_ratio"]) < 0]
    less = [arm for arm in compact if sign(arm["damage_ratio"].get(kinds[0])) < 0]
    headline(
        figure,
        f"{len(compact)} of {len(others)} arms are more compact than standard training at equal loss; "
        f"{len(less)} of these suffer less from {kinds[0].upper()}",
    )
    return figure


@styled
def depth_collapse(table: pd.DataFrame, curves: Mapping[tuple[str, str], NDArray[np.float64]]) -> Figure:
    """log10 of the product's norm against depth; a panel a choice of bases, a line a spectrum and a norm."""
    figure = new_figure(9.0, 4.9)
    panels = figure.subplots(1, len(BASES), sharey=True)
    looks = {"flat": (BLUE, "flat: σₖ = $k^{-1/2}$"), "compact": (VERMILLION, "compact: σₖ = $e^{-0.2k}$")}
    for axes, bases in zip(panels, BASES, strict=True):
        for name, sigma in spectra().items():
            logs = curves[name, bases].max(axis=1)
            steps = np.arange(1, len(logs) + 1)
            for dash, norm in zip(DASHES, NORMALISATIONS.values(), strict=True):
                values = (logs - steps * math.log(norm(sigma))) / math.log(10)
                axes.plot(steps, values, color=looks[name][0], ls=dash, lw=1.6)
        axes.axhspan(-60, math.log10(FLOOR), color="#EEEEEE", zorder=0)
        axes.set_title(bases, fontsize=10, loc="left")
        axes.set(xscale="log", ylim=(-60, 45), xlabel="depth t (layers)")
    panels[0].text(1.2, -57, "float32's floor", fontsize=9, color=GREY)
    panels[0].set_ylabel("log₁₀ of the product's spectral norm")
    handles = [Line2D([], [], color=colour, lw=3, label=text) for colour, text in looks.values()]
    norms = zip(DASHES, NORMALISATIONS, strict=True)
    handles += [Line2D([], [], color=BLACK, ls=dash, label=title) for dash, title in norms]
    _legend_below(figure, handles, "Exact norms, n = 100; what each matrix is divided by:", 4)
    count, both, flat, compact = collapsed(table)
    headline(
        figure,
        f"Of {count} set-ups the flat spectrum reaches the float floor in {both + flat}, the compact one in "
        f"{both + compact}; in {both} both do",
    )
    return figure


def _legend_below(figure: Figure, handles: Sequence[Line2D], note: str, columns: int) -> None:
    """A legend under the panels, with a line on how to read the figure as its title."""
    look: dict[str, Any] = {"loc": "outside lower left", "fontsize": 9, "title_fontsize": 9}
    legend = figure.legend(handles=handles, ncols=columns, title=note, alignment="left", **look)
    legend.get_title().set_color(GREY)


def _bars(one: Mapping[str, Any]) -> list[list[float]]:
    """Lengths below and above the mean; none where the interval is unbounded; none reaches zero."""
    if one["low"] is None or one["high"] is None:
        return [[0.0], [0.0]]
    return [[one["mean"] - max(one["low"], one["mean"] / 3)], [one["high"] - one["mean"]]]
