"""The lab's three figures: spectra through training, damage against compactness, collapse with depth.

All draw from the summary (`summary.summarize`) or from `numeric.depth_table`; titles are computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, ScalarFormatter

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
from spi_utils.lab.numeric import BASES, FLOOR, NORMALISATIONS, spectra
from spi_utils.lab.summary import COMPACTNESS
from spi_utils.lab.verdicts import sign

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

Summary = Mapping[str, Any]
DASHES: Sequence[Any] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
TITLES = {"nf4": "NF4", "int4": "int4", "int3": "int3", "noise": "Gaussian noise"}


@styled
def spectra_through_training(summary: Summary, arms: Sequence[str]) -> Figure:
    """σ_k/σ_1 by rank at each loss level, a panel an arm: from pale (untrained) to dark (the last level)."""
    held = summary["shapes"]
    figure = new_figure(9.0, 4.3)
    panels = figure.subplots(1, len(arms), sharex=True, sharey=True, squeeze=False)[0]
    shades = LinearSegmentedColormap.from_list("levels", ["#9FC9E3", BLUE, "#001A2B"])
    labels = {arm["name"]: arm["label"] for arm in summary["arms"]}
    for axes, name in zip(panels, arms, strict=True):
        levels = held["arms"][name]
        for i, level in enumerate(levels):
            axes.plot(held["ranks"], level["sigma"], color=shades(i / max(1, len(levels) - 1)), lw=1.8)
        first, final = (f"{100 * levels[i][COMPACTNESS]:.0f}" for i in (0, -1))
        axes.set_title(f"{labels[name]}: {first} → {final} %", fontsize=9, loc="left")
        axes.set_yscale("log")
        axes.set_ylim(2e-4, 1.3)
        axes.set_xlabel("rank k of the singular value")
    panels[0].set_ylabel("σₖ / σ₁, mean over the matrices")
    levels = held["arms"][arms[0]]
    titles = ["untrained" if x["level"] is None else f"at loss {x['level']:g}" for x in levels]
    handles = [
        Line2D([], [], color=shades(i / max(1, len(levels) - 1)), lw=2.5, label=title)
        for i, title in enumerate(titles)
    ]
    note = f"Mean over {_seeds(summary)}; loss in nats a character, on held-out text"
    _legend_below(figure, handles, note, len(handles))
    headline(figure, _training_finding(summary, arms))
    return figure


def _legend_below(figure: Figure, handles: Sequence[Line2D], note: str, columns: int) -> None:
    """A legend under the panels, with a line on how to read the figure as its title."""
    legend = figure.legend(
        handles=handles, loc="outside lower left", ncols=columns, fontsize=9, title=note, title_fontsize=9
    )
    legend._legend_box.align = "left"  # type: ignore[attr-defined]
    legend.get_title().set_color(GREY)


def _training_finding(summary: Summary, arms: Sequence[str]) -> str:
    levels = {name: summary["shapes"]["arms"][name] for name in arms}
    final = {name: rows[-1][COMPACTNESS] for name, rows in levels.items()}
    labels = {arm["name"]: arm["label"] for arm in summary["arms"]}
    low, high = min(final, key=final.__getitem__), max(final, key=final.__getitem__)
    return (
        f"At equal loss 90 % of Σσ takes {100 * final[low]:.0f} % of the singular values with {labels[low]}, "
        f"{100 * final[high]:.0f} % with {labels[high]}"
    )


@styled
def damage_against_compactness(summary: Summary, kinds: Sequence[str] = ("nf4", "int3")) -> Figure:
    """KL at equal loss against compactness: a small point a seed, a large one with intervals an arm."""
    figure = new_figure(9.0, 5.4)
    panels = figure.subplots(1, len(kinds), sharex=True, squeeze=False)[0]
    arms = [arm for arm in summary["arms"] if arm["reached"]]
    looks = _looks(arms)
    for axes, kind in zip(panels, kinds, strict=True):
        for i, arm in enumerate(arms):
            _draw_arm(axes, arm, kind, *looks[i])
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        low, high = axes.get_ylim()
        axes.set_yticks([t for t in _ticks() if low <= t <= high])
        axes.set_xlabel("share of singular values that hold 90 % of Σσ")
        axes.set_ylabel(f"KL(16-bit ‖ {TITLES[kind]}), nats a character")
        axes.set_title(TITLES[kind], fontsize=10, loc="left")
    handles = [
        Line2D([], [], color=colour, marker=marker, ls="", ms=7, label=arm["label"])
        for arm, (colour, marker) in zip(arms, looks, strict=True)
    ]
    note = (
        f"Large: mean and 95 % interval over {_seeds(summary)}; small: one seed. Compact is left, robust down"
    )
    _legend_below(figure, handles, note, 3)
    headline(figure, _damage_finding(summary, kinds[0]))
    return figure


def _looks(arms: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Colour and marker of each arm: one hue for the sweep of the trace norm, darker with its coefficient."""
    fixed = {
        "standard": (BLACK, "s"), "nuclear": (ORANGE, "D"), "both": (PURPLE, "X"),
        "frobenius": (GREEN, "v"), "spectral": (VERMILLION, "^"), "low_rank": (GREY, "P"),
    }  # fmt: skip
    sweep = [arm["name"] for arm in arms if arm["name"] not in fixed]
    blues = dict(zip(reversed(sweep), (BLUE, SKY, "#A9D6F0"), strict=False))
    return [fixed.get(arm["name"], (blues.get(arm["name"], BLUE), "o")) for arm in arms]


def _draw_arm(axes: Axes, arm: Mapping[str, Any], kind: str, colour: str, marker: str) -> None:
    points = arm["points"]
    axes.plot(
        [p[COMPACTNESS] for p in points], [p["kl"][kind] for p in points],
        marker, color=colour, ms=3.5, alpha=0.55, ls="", mew=0,
    )  # fmt: skip
    x, y = arm[COMPACTNESS], arm["kl"][kind]
    axes.errorbar(
        x["mean"], y["mean"], xerr=_bars(x), yerr=_bars(y), fmt=marker, color=colour, ms=8,
        mec="white", mew=0.8, elinewidth=1.2, capsize=2,
    )  # fmt: skip


def _bars(one: Mapping[str, Any]) -> list[list[float]]:
    """Lengths below and above the mean; none where the interval is unbounded; none reaches zero."""
    if one["low"] is None or one["high"] is None:
        return [[0.0], [0.0]]
    return [[one["mean"] - max(one["low"], one["mean"] / 3)], [one["high"] - one["mean"]]]


def _ticks() -> list[float]:
    return [round(m * 10.0**e, 6) for e in range(-5, 2) for m in (1, 1.5, 2, 3, 4, 5, 6, 8)]


def _damage_finding(summary: Summary, kind: str) -> str:
    arms = [arm for arm in summary["arms"] if arm["reached"] and arm["name"] != "standard"]
    compact = [arm for arm in arms if sign(arm["compactness_ratio"]) < 0]
    less = [arm for arm in compact if sign(arm["damage_ratio"].get(kind)) < 0]
    return (
        f"{len(compact)} of {len(arms)} arms are more compact than standard training at equal loss; "
        f"{len(less)} of these suffer less from {TITLES[kind]}"
    )


@styled
def depth_collapse(table: pd.DataFrame, curves: Mapping[tuple[str, str], NDArray[np.float64]]) -> Figure:
    """log10 of the product's norm against depth; a panel a choice of bases, a line a spectrum and a norm."""
    figure = new_figure(9.0, 4.9)
    panels = figure.subplots(1, len(BASES), sharey=True)
    colours = {"flat": BLUE, "compact": VERMILLION}
    for axes, bases in zip(panels, BASES, strict=True):
        for name, sigma in spectra().items():
            logs = curves[name, bases].max(axis=1)
            steps = np.arange(1, len(logs) + 1)
            for dash, norm in zip(DASHES, NORMALISATIONS.values(), strict=True):
                values = (logs - steps * math.log(norm(sigma))) / math.log(10)
                axes.plot(steps, values, color=colours[name], ls=dash, lw=1.6)
        axes.axhspan(-60, math.log10(FLOOR), color="#EEEEEE", zorder=0)
        axes.set_xscale("log")
        axes.set_ylim(-60, 45)
        axes.set_title(bases, fontsize=10, loc="left")
        axes.set_xlabel("depth t (layers)")
    panels[0].text(1.2, -57, "float32's floor", fontsize=9, color=GREY)
    panels[0].set_ylabel("log₁₀ of the product's spectral norm")
    _depth_legend(figure, colours)
    headline(figure, _depth_finding(table))
    return figure


def _depth_legend(figure: Figure, colours: Mapping[str, str]) -> None:
    names = {"flat": "flat: σₖ = $k^{-1/2}$", "compact": "compact: σₖ = $e^{-0.2k}$"}
    handles = [Line2D([], [], color=colours[key], lw=3, label=text) for key, text in names.items()]
    handles += [
        Line2D([], [], color=BLACK, ls=dash, label=title)
        for dash, title in zip(DASHES, NORMALISATIONS, strict=True)
    ]
    note = "Exact norms, n = 100; what each matrix is divided by:"
    _legend_below(figure, handles, note, 4)


def _depth_finding(table: pd.DataFrame) -> str:
    floor = table.assign(floor=table["float32"].str.startswith("floor"))
    wide = floor.pivot_table(
        index=["bases", "normalisation"], columns="spectrum", values="floor", aggfunc="first"
    )
    flat, compact = wide["flat"].astype(bool), wide["compact"].astype(bool)
    return (
        f"Of {len(wide)} set-ups the flat spectrum reaches the float floor in {flat.sum()}, the compact "
        "one in "
        f"{compact.sum()}; in {(flat & compact).sum()} both do"
    )


def _seeds(summary: Summary) -> str:
    count = len(summary["seeds"])
    return f"{count} seed{'s' if count != 1 else ''}"
