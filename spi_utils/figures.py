"""Every figure of the project: functions from data to a matplotlib `Figure`.

First how figures look, are worded and become files, which every module that draws uses; then layers, spectra,
a plan and what a gigabyte buys (notebook 02: `draw_all`); last an evaluation (notebook 04: report.py). No
pyplot, no global state, no model: the same data give the same bytes. Titles state what the data show and are
computed from it. Colours are Okabe and Ito's (2008), told apart by the colour-blind; markers differ as well.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spi_utils import runs, stats
from spi_utils.claims import SURVIVAL, Evaluation, is_random
from spi_utils.curves import frontier
from spi_utils.errors import RunError
from spi_utils.formats import FORMATS, gigabytes
from spi_utils.plan import Floats, ProtectionPlan, nominal_bits, predicted_kl, price, score_row, score_values

Spectra = Mapping[str, Floats]  # name -> singular values, descending

# --- how figures look, are worded, and become files ------------------------------------------------------

# Okabe-Ito without its yellow, which is too pale for points on white.
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#000000", "#666666"
CYCLE = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, BLACK)
MARKERS = "os^DvPX*"
# What a layer is stored as: 16-bit stands out, NF4 recedes; int8 and int4 look so in every figure.
INT4 = [name for name in FORMATS if name.startswith("int4")]
FORMAT_COLOURS = {"16bit": VERMILLION, "int8": ORANGE, "nf4": "#CFE0EC"} | dict.fromkeys(INT4, SKY)
FORMAT_LABELS = {"16bit": "16-bit", "int8": "8-bit (int8)", "nf4": "4-bit (NF4)"}
FORMAT_LABELS |= {name: f"4-bit ({name})" for name in INT4}

STYLE: dict[Any, Any] = {"font.family": "DejaVu Sans", "font.size": 10, "svg.hashsalt": "spi-utils"}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY}
STYLE |= {"axes.grid": True, "axes.axisbelow": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.8}
STYLE |= {"legend.frameon": False, "legend.fontsize": 9}
STYLE |= {"figure.facecolor": "white", "savefig.facecolor": "white"}
DPI = 120
NEGATIVE = re.compile(r"(?<![\w.\-])-(?=\d)")  # in a date, a range or a name a hyphen stands after something

styled = mpl.rc_context(STYLE)  # decorates what draws: the project's style inside, the user's settings after


def new_figure(width: float = 9.0, height: float = 4.6) -> Figure:
    """An empty figure at notebook width (inches), laid out without overlaps."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def headline(figure: Figure, finding: str, detail: str = "") -> None:
    """Title a figure with what it shows, and one smaller line on how to read it."""
    # A Greek letter stays as it is; an ordinary sentence begins with a capital.
    sentence = finding if finding.startswith("α") else finding[:1].upper() + finding[1:]
    look: dict[str, Any] = {"x": 0.01, "ha": "left", "linespacing": 1.35}
    columns = figure.get_figwidth() * 10.2
    figure.suptitle(textwrap.fill(with_minus(sentence), int(columns)), fontsize=12, fontweight="bold", **look)
    if detail:
        figure.supxlabel(
            textwrap.fill(with_minus(detail), int(1.5 * columns)), fontsize=9, color=GREY, **look
        )


def with_minus(text: str) -> str:
    """Text in which negative numbers have a true minus, as the axes write it: "−0.17"."""
    return NEGATIVE.sub("−", text)


def finished(axes: Any, finding: str, detail: str = "", **look: Any) -> Figure:
    """Complete the figure of `axes`: a legend beside its panels with each label once, and the `headline`."""
    figure = axes.figure
    labelled: dict[str, Any] = {}
    for panel in figure.axes:
        handles, labels = panel.get_legend_handles_labels()
        labelled |= dict(zip(labels, handles, strict=True))
    if labelled:
        look = {"loc": "outside right center", "ncols": -(-len(labelled) // 20)} | look
        figure.legend(list(labelled.values()), list(labelled), **look)
    headline(figure, finding, detail)
    return figure


def save_figure(figure: Figure, run: runs.Run, name: str) -> Path:
    """Write `name`.png and .svg into the run's figures, atomically; the same figure gives the same bytes.

    Returns:
        The PNG's path.

    Raises:
        RunError: the folder can't be written.
    """
    for suffix, metadata in ((".svg", {"Date": None, "Creator": "spi-utils"}), (".png", {"Software": None})):
        with mpl.rc_context(STYLE), runs.atomic_path(run.figures / f"{name}{suffix}") as path:
            figure.savefig(path, metadata=metadata, dpi=DPI)
    return run.figures / f"{name}.png"


# A score's name in a legend, and on an axis where its menu title is too long or lacks the unit.
LABELS = {
    "alpha_hill": ("α Hill", "α (Hill, top tenth of the eigenvalues)"),
    "alpha_pl": ("α Clauset", "α (Clauset's power-law fit)"),
    "alpha_farms": ("α FARMS", "α (FARMS, 128×128 blocks)"),
    "alpha_decay": ("rank decay a", "rank-decay exponent a"),
    "nf4_error": ("NF4 error", "relative NF4 error ‖Q(W)−W‖/‖W‖"),
    "fisher": ("Fisher", "predicted KL avoided (nats a token per GB)"),
}


def short_label(score: str) -> str:
    """A score's name for a legend and a title."""
    return LABELS.get(score, (score.replace("_", " "),))[0]


def score_label(score: str) -> str:
    """How a score is written on an axis, with its unit where it has one."""
    row = score_row(score)
    generic = f"{score} KL avoided (nats a token per GB)" if row.additive else row.title
    return LABELS.get(score, ("", generic))[1]


def shorten(name: str, limit: int = 40) -> str:
    """A long name with its middle left out: both ends of a module path tell more than its middle."""
    head = (limit - 1) // 2
    return name if len(name) <= limit else f"{name[:head]}…{name[-(limit - 1 - head) :]}"


def size_unit(count: float) -> tuple[float, str]:
    """The unit, in bytes and by name, in which `gigabytes` writes a model of this size: for an axis."""
    return (1e9, "GB") if abs(count) >= 999.5e6 else (1e6, "MB")


# --- layers, their types and their scores ----------------------------------------------------------------


def scored(layers: pd.DataFrame, score: str) -> tuple[pd.DataFrame, Floats]:
    """The rows of a layer table that a plan decides on, and a score's values for them, (L,).

    Raises:
        PlanError: unknown score, or the table lacks its column.
    """
    planned = layers["quantizable"].to_numpy(bool)
    return layers[planned].reset_index(drop=True), score_values(layers, score)[planned]


def scale_of(values: Floats) -> str:
    """The axis that values (L,) want: "log" if all are positive and most lie in the lowest thirtieth."""
    finite = values[np.isfinite(values)]
    wide = len(finite) and finite.min() > 0 and finite.max() > 30 * np.quantile(finite, 0.05)
    return "log" if wide else "linear"


def between_share(values: Floats, groups: pd.Series) -> float:
    """Share of the variance of values (L,) that lies between groups (L,), η²; NaN where all are equal."""
    held = pd.Series(values)[np.isfinite(values)]
    spread, means = held.var(ddof=0), held.groupby(groups).transform("mean")
    return float(means.var(ddof=0) / spread) if spread > 1e-12 * max(1, (held**2).mean()) else np.nan


def rank_correlation(x: Any, y: Any) -> float:
    """Spearman's ρ of the pairs in x (L,) and y (L,) that are finite; NaN below three or without spread."""
    pairs = pd.DataFrame({"x": x, "y": y}).replace([np.inf, -np.inf], np.nan)
    return float(pairs.corr("spearman", min_periods=3).to_numpy()[0, 1])


def histogram_edges(values: Floats, bins: int = 40) -> Floats:
    """Bin edges (bins+1,) over the finite values (L,); a narrow range around a single value."""
    finite = values[np.isfinite(values)]
    if scale_of(values) == "log":
        return np.geomspace(finite.min(), finite.max(), bins + 1)
    return np.histogram_bin_edges(finite, bins)


def type_styles(types: pd.Series) -> dict[str, dict[str, Any]]:
    """Colour, marker and legend label of each layer type, by order of appearance."""
    looks = zip(cycle(CYCLE), cycle(MARKERS), dict.fromkeys(types), strict=False)
    return {name: {"color": c, "marker": m, "label": shorten(name, 24)} for c, m, name in looks}


def draw_types(axes: Axes, types: pd.Series, x: Floats, y: Floats, **look: Any) -> None:
    """A point for each layer (L,) that has both values, in its type's style."""
    look = {"ls": "", "lw": 0.8, "ms": float(np.clip(1000 / len(types), 1.5, 5))} | look
    for name, style in type_styles(types).items():
        here = (types == name).to_numpy() & np.isfinite(x) & np.isfinite(y)
        axes.plot(x[here], y[here], **style | look)


@styled
def score_by_depth(layers: pd.DataFrame, score: str = "alpha_hill") -> Figure:
    """A score against depth, a colour and marker for each layer type."""
    planned, values = scored(layers, score)
    axes, lost = new_figure().subplots(), ~np.isfinite(values)
    draw_types(axes, planned["type"], planned["depth"].to_numpy(float), values, ls="-")
    axes.set(xlabel="depth (block)", ylabel=score_label(score), yscale=scale_of(values))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    share, finding = between_share(values, planned["type"]), f"{short_label(score)} has no spread"
    if np.isfinite(share):
        finding = f"{share:.0%} of the spread of {short_label(score)} lies between layer types"
    return finished(axes, finding, f"Not drawn: {lost.sum()} without a finite value." if lost.any() else "")


@styled
def score_histogram(
    layers: pd.DataFrame, score: str = "alpha_hill", threshold: float | None = None, direction: str = "high"
) -> Figure:
    """The histogram of a score with the threshold; for Hill's α also what Gaussian noise of each shape gives.

    Args:
        threshold: score units; layers at it or beyond, in `direction`, are protected.
    """
    planned, values = scored(layers, score)
    types, name, sign, parts = planned["type"], short_label(score), "≥" if direction == "high" else "≤", []
    noise = (
        score == "alpha_hill" and "alpha_excess" in planned and bool(planned["alpha_excess"].notna().any())
    )
    panels = new_figure(height=6.2 if noise else 4.0).subplots(1 + noise, 1, sharex=True, squeeze=False)[:, 0]
    styles = type_styles(types)
    bars = [values[(types == kind).to_numpy() & np.isfinite(values)] for kind in styles]
    look = {key: [style[key] for style in styles.values()] for key in ("color", "label")}
    panels[0].hist(bars, bins=histogram_edges(values), stacked=True, edgecolor="white", lw=0.4, **look)
    panels[0].set_ylabel("layers")
    panels[-1].set(xlabel=score_label(score), xscale=scale_of(values))
    if threshold is not None:
        for panel in panels:
            panel.axvline(threshold, color=VERMILLION, lw=1.8, zorder=4, label=f"{sign} kept in 16-bit")
        kept = (values >= threshold if sign == "≥" else values <= threshold).sum()
        parts.append(f"{name} {sign} {threshold:.4g} keeps {kept} of {len(values)} layers in 16-bit")
    if noise:
        _draw_noise(panels[1], planned, values)
        rho = rank_correlation(values, planned["alpha_hill"] - planned["alpha_excess"])
        told = f"its rank correlation with Gaussian noise of the same shapes is ρ = {rho:.2f}"
        parts += [told] if np.isfinite(rho) else []
    detail = "Diamonds: mean of Gaussian matrices of that shape, bar ±2 sd." if noise else ""
    return finished(panels[0], "; ".join(parts) or f"{name} of {len(values)} layers", detail)


def _draw_noise(axes: Axes, planned: pd.DataFrame, values: Floats) -> None:
    """A row for each of the ten commonest shapes: its layers' α, a diamond where noise of that shape lies."""
    shape = planned["rows"].astype(str) + "×" + planned["cols"].astype(str)
    mean = planned["alpha_hill"] - planned["alpha_excess"]
    reach = 2 * (planned["alpha_excess"] / planned["alpha_excess_z"]).abs().replace(np.inf, np.nan)
    counts = shape.value_counts().head(10)
    noise = pd.DataFrame({"mean": mean, "reach": reach}).groupby(shape).median().loc[counts.index]
    noise = noise.sort_values("mean").fillna({"reach": 0.0})
    rows = {name: row for row, name in enumerate(noise.index)}
    draw_types(axes, planned["type"], values, shape.map(rows).to_numpy(float), ms=3.5, zorder=6)
    look: dict[str, Any] = {"color": BLACK, "mfc": "white", "elinewidth": 1.6, "capsize": 3, "ms": 6}
    axes.errorbar(noise["mean"], range(len(rows)), xerr=noise["reach"], fmt="D", zorder=7, **look)
    axes.set_yticks(range(len(rows)), [f"{name}  ({counts[name]})" for name in rows])
    axes.set(ylabel="shape (layers)", ylim=(-0.6, len(rows) - 0.4))


# Sensitivity columns, the best first, as an axis names them.
COST_NAMES = {"measured_nf4": "measured", "refined_nf4": "refined", "fisher_nf4": "Fisher"}


def sensitivity_column(layers: pd.DataFrame) -> str | None:
    """The best sensitivity that the table holds: measured before refined before Fisher; None without any."""
    return next((name for name in COST_NAMES if name in layers and layers[name].notna().any()), None)


@styled
def score_against_sensitivity(layers: pd.DataFrame, score: str, column: str) -> Figure:
    """A score against each layer's cost in NF4, and Spearman's ρ over all layers and within each type.

    Args:
        column: the sensitivity column (nats a token), one of `COST_NAMES`.
    """
    planned, values = scored(layers, score)
    types, styles = planned["type"], type_styles(planned["type"])
    cost = planned[column].where(planned[column] > 0).to_numpy(float)  # the axis is logarithmic
    left, right = new_figure(height=max(4.8, 1.5 + 0.18 * len(styles))).subplots(1, 2, width_ratios=[1.7, 1])
    draw_types(left, types, values, cost, label="_")  # the bars' names are the legend
    cost_label = f"{COST_NAMES[column]} cost in NF4 (nats a token)"
    left.set(xlabel=score_label(score), ylabel=cost_label, yscale="log")
    overall = rank_correlation(values, cost)
    within = {kind: rank_correlation(values[types == kind], cost[types == kind]) for kind in styles}
    labels = [f"{style['label']} ({(types == kind).sum()})" for kind, style in styles.items()]
    colours = [GREY, *(style["color"] for style in styles.values())]
    right.barh([f"all layers ({len(planned)})", *labels], [overall, *within.values()], color=colours)
    right.axvline(0, color=GREY, lw=1)
    right.set(xlim=(-1.05, 1.05), xlabel="Spearman's ρ")
    right.invert_yaxis()
    right.grid(axis="y", visible=False)
    finding = f"{short_label(score)} ranks the layers' cost with ρ = {overall:.2f} overall, and a median of "
    finding += f"{pd.Series(within).median():.2f} within a type"
    if np.isnan(overall):
        finding = f"Too few layers, or no spread: {short_label(score)} ranks no cost"
    lost = (~np.isfinite(values) | ~np.isfinite(cost)).sum()
    note = f"{lost} layers without both values are left out. " if lost else ""
    return finished(left, finding, f"{note}ρ is Spearman's; colours are those of the right panel.")


# --- single layers' spectra ------------------------------------------------------------------------------

FIT = ["alpha_pl", "alpha_pl_xmin", "alpha_pl_tail", "alpha_pl_ks", "alpha_pl_sigma"]
# What the fit drops (WeightWatcher's cut), so that the drawn density is the fitted one.
SMALLEST_EIGENVALUE = 1e-5


def layer_title(row: Any) -> str:
    """A layer by type and block: "down_proj, block 3"."""
    return shorten(str(row["type"]), 30) + (f", block {row['depth']}" if row["depth"] >= 0 else "")


def density_of(row: pd.Series, singular_values: Floats) -> dict[str, Any]:
    """A layer's eigenvalue density (ESD) and the tail that Clauset's fit put there.

    Args:
        row: of the layer table, whose `alpha_pl` columns hold the fit.

    Returns:
        `edges` (36,) evenly spaced in the logarithm, `density` (35,), `fit` the line's ends (λ, density),
        each (2,), or None; none of them where the eigenvalues have no spread. `words` on the fit, always.
    """
    eigenvalues = np.square(np.asarray(singular_values, dtype=np.float64))
    eigenvalues = eigenvalues[np.isfinite(eigenvalues) & (eigenvalues > SMALLEST_EIGENVALUE)]
    if len(eigenvalues) < 2 or np.ptp(eigenvalues) == 0:
        return {"words": ["no spread of eigenvalues"]}
    edges = np.geomspace(eigenvalues.min(), eigenvalues.max() * (1 + 1e-9), 36)
    found = {"edges": edges, "density": np.histogram(eigenvalues, edges, density=True)[0]}
    alpha, xmin, tail, distance, sigma = row[FIT].to_numpy(float)
    if not (np.isfinite([alpha, xmin, tail]).all() and xmin > 0):
        return found | {"fit": None, "words": ["no fit"]}
    ends = np.array([xmin, edges[-1]])
    # A power law from xmin on, scaled to the tail's share of all eigenvalues.
    law = tail / len(eigenvalues) * (alpha - 1) / xmin * (ends / xmin) ** -alpha
    told = f"Clauset's α {alpha:.2f} ± {sigma:.2f}, Hill's {row.get('alpha_hill', np.nan):.2f}"
    fit = f"KS {distance:.3f}, xmin {xmin:.3g}, tail {tail:.0f} of {len(eigenvalues)}"
    return found | {"fit": (ends, law), "words": [told, fit]}


@styled
def spectra_figure(layers: pd.DataFrame, spectra: Spectra) -> Figure:
    """The eigenvalue density (ESD) of three layers, log-log, with the fitted tail, xmin and KS distance.

    They are the most compact, a middling and the flattest of those with a sound fit.

    Args:
        spectra: name -> singular values, descending; a layer that it lacks is shown without any.
    """
    ranked = layers[np.isfinite(layers["alpha_pl"])].sort_values("alpha_pl", kind="stable")
    sound = ranked[ranked["status"] == "ok"]  # a tail of nine values has no α
    ranked = sound if len(sound) >= 3 else ranked
    chosen = ranked.iloc[sorted({0, len(ranked) // 2, len(ranked) - 1})]
    rows = [row for _, row in chosen.iterrows()]
    panels = new_figure().subplots(1, len(rows), squeeze=False)[0]
    for axes, row in zip(panels, rows, strict=True):
        found = density_of(row, spectra.get(row["name"], np.empty(0)))
        axes.set(xlabel="eigenvalue λ = σ²", ylabel="density of eigenvalues" if row is rows[0] else "")
        # Title and numbers stand above the axes, where they cover nothing.
        words = "\n".join([layer_title(row), *found["words"]])
        axes.set_title(words, fontsize=9, loc="left", linespacing=1.35)
        if "density" in found:
            filled = found["density"][found["density"] > 0]
            axes.set(xscale="log", yscale="log", ylim=(filled.min() / 4, filled.max() * 4))
            axes.stairs(found["density"], found["edges"], fill=True, color=SKY, ec=BLUE, alpha=0.6)
        if found.get("fit"):
            axes.plot(*found["fit"], color=VERMILLION, lw=2)
            axes.axvline(found["fit"][0][0], color=VERMILLION, lw=1, ls="--")
    first, last = (f"{row['alpha_pl']:.2f} in {layer_title(row)}" for row in (rows[0], rows[-1]))
    finding = f"From compact to flat: Clauset's α is {first} and {last}"
    reading = "Of the layers whose fit is sound. Dashed: xmin, where the fitted tail begins. KS: largest "
    reading += "distance of fit and data. Other figures show Hill's α, of the top tenth."
    return finished(panels[0], finding, reading)


# --- a plan as a map -------------------------------------------------------------------------------------


class LayerGrid:
    """The depth × type grid of a layer table: where each planned layer lies, types in order of appearance.

    Several layers in one cell (experts listed one by one) share it by their number of weights.
    """

    def __init__(self, layers: pd.DataFrame) -> None:
        planned = layers[layers["quantizable"]]
        self.types = list(dict.fromkeys(planned["type"]))
        self.depths = np.arange(planned["depth"].min(), planned["depth"].max() + 1)
        rows = planned["type"].map({name: row for row, name in enumerate(self.types)})
        self.cell = (rows * len(self.depths) + planned["depth"] - self.depths[0]).to_numpy()
        self.weights = planned["numel"].to_numpy(float)

    def colours(self, rgb: Floats) -> Any:
        """Cells in the colours, 0 to 1, of their layers (L, 3), mixed: (types, depths, 3), 8-bit."""
        shape = (len(self.types), len(self.depths), 1)
        channels = [np.bincount(self.cell, self.weights * part, np.prod(shape)) for part in (1, *rgb.T)]
        held, *sums = (channel.reshape(shape) for channel in channels)
        image = np.where(held > 0, np.concatenate(sums, axis=2) / np.maximum(held, 1), 1.0)
        return (255 * image + 0.5).astype(np.uint8)

    def draw(self, axes: Axes, rgb: Floats) -> Any:
        """Draw the map on `axes` and return its cells."""
        axes.set_yticks(range(len(self.types)), [shorten(name, 24) for name in self.types])
        axes.set_xlabel("depth (block)")
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        x, y = np.append(self.depths, self.depths[-1] + 1) - 0.5, np.arange(len(self.types) + 1) - 0.5
        width = 0.6 if len(self.depths) <= 130 else 0.0  # of the white lines between cells
        cells = axes.pcolormesh(x, y, self.colours(rgb), edgecolors="white", lw=width)
        axes.invert_yaxis()
        return cells


@styled
def plan_map(layers: pd.DataFrame, plan: ProtectionPlan) -> Figure:
    """The plan as a depth × type map, a cell a layer, coloured by the format that holds it."""
    grid, planned = LayerGrid(layers), layers[layers["quantizable"]]
    held = planned["name"].map(plan.formats)
    tiers = sorted(set(held), key=nominal_bits)
    above = held != tiers[0] if len(tiers) > 1 else held == "16bit"
    axes = new_figure(height=1.7 + 0.32 * len(grid.types)).subplots()
    grid.draw(axes, np.array([to_rgb(FORMAT_COLOURS[name]) for name in held]))
    by_type = above.groupby(planned["type"], sort=False).agg(["sum", "size"])
    beside: Any = ("axes fraction", "data")
    for row, (kept, count) in enumerate(zip(by_type["sum"], by_type["size"], strict=True)):
        axes.annotate(f"{kept}/{count}", (1.01, row), xycoords=beside, va="center", fontsize=9, color=GREY)
    for name in reversed(tiers):
        axes.plot([], [], "s", ms=9, color=FORMAT_COLOURS[name], label=FORMAT_LABELS[name])
    place = "are above the smallest format" if len({*held} - {"16bit"}) > 1 else "stay in 16-bit"
    finding = f"{above.sum()} of {len(above)} layers {place}"
    size = f"({gigabytes(plan.bytes['total'])}, {plan.matrix_bits:.2f} matrix bits)"
    return finished(axes, f"{finding} {size}", loc="outside lower center", ncols=4)


# --- what a gigabyte buys --------------------------------------------------------------------------------

# The curves that are named, beside the plan's; every other score is a thin grey line to compare with.
POINT: dict[str, Any] = {"ms": 9, "mec": "white", "zorder": 5}
NAMED = {("alpha_hill", "high"): BLUE, ("fisher", "high"): GREEN, ("measured", "high"): PURPLE}


@styled
def frontier_figure(layers: pd.DataFrame, plan: ProtectionPlan, curves: pd.DataFrame) -> Figure:
    """Predicted KL against size for every score, with random's band, the optimum, and the plan.

    int8 everywhere is marked too, where the layer table predicts its cost; NF4 everywhere begins each curve.

    Args:
        plan: one with a predicted KL.
        curves: what `curves.frontier` returns, with predicted KL.
    """
    unit, unit_name = size_unit(curves["bytes"].max())
    kinds: Any = dict(list(curves.assign(size=curves["bytes"] / unit).groupby("kind")))
    axes = new_figure(height=5.0).subplots()
    colours = {(plan.score, plan.direction): VERMILLION} | NAMED
    for key, curve in kinds["score"].groupby(["score", "direction"]):
        line: Any = {"color": "#DADADA", "lw": 0.7}
        if key in colours:
            line = {"color": colours[key], "lw": 2, "label": f"{short_label(key[0])}, {key[1]}"}
        axes.plot(curve["size"], curve["predicted_kl"], **line)
    bands = kinds["random"].pivot_table("predicted_kl", "size", "quantile")
    low, high = min(bands), max(bands)
    look: Any = {"color": "#A6A6A6", "alpha": 0.55, "lw": 0, "label": f"random, {100 * (high - low):.0f} %"}
    axes.fill_between(bands.index, bands[low], bands[high], **look)
    optimum = kinds["optimum"].groupby("size")["predicted_kl"].median()
    axes.plot(optimum, color=BLACK, lw=1.8, ls="--", label="least predicted KL")
    size, kl = plan.bytes["total"], plan.predicted_kl or 0.0
    axes.plot(size / unit, kl, "o", color=VERMILLION, **POINT, label="the plan")
    int8 = dict.fromkeys(layers["name"][layers["quantizable"]], "int8")
    if (cost := predicted_kl(layers, int8)) is not None:
        everywhere = price(layers, int8)["total"]
        axes.plot(everywhere / unit, cost, "D", color=ORANGE, **POINT, label="int8 everywhere")
    middle = bands.median(axis=1)
    finding = (
        f"At {gigabytes(size)} the plan's predicted KL is {kl:.3g} nats a token, a random "
        f"choice's {np.interp(size / unit, middle.index, middle):.3g}"
    )
    axes.set(xlabel=f"model size ({unit_name})", ylabel="predicted KL (nats a token)", ylim=(0, None))
    reading = "All KL here are predictions, sums over layers; notebook 04 measures the plan's."
    return finished(axes, finding, f"{reading} Thin lines: other scores, in both directions.")


# --- a run's figures -------------------------------------------------------------------------------------


def draw_all(run: runs.Run, plan: ProtectionPlan) -> dict[str, Path]:
    """Draw and save every figure that the run's data allow (`all_figures`).

    Returns:
        Figure name -> its PNG in the run's figures; an SVG lies beside it.

    Raises:
        RunError: no analysis in this run; says which notebook to run.
    """
    layers, spectra = runs.read_layers(run), runs.read_spectra(run)
    inputs = {"layers": runs.layers_fingerprint(run), "plan": plan.fingerprint}
    outputs: list[str] = []
    with runs.stage(run, "visualize", inputs, outputs, force=True):
        drawn = all_figures(layers, spectra, plan)
        saved = {name: save_figure(figure, run, name) for name, figure in drawn.items()}
        outputs += [f"figures/{name}{suffix}" for name in saved for suffix in (".png", ".svg")]
    return saved


def all_figures(layers: pd.DataFrame, spectra: Spectra, plan: ProtectionPlan) -> dict[str, Figure]:
    """Every figure by name; those on spectra and sensitivity only if the layer table holds them."""
    figures = {"score_by_depth": score_by_depth(layers, plan.score)}
    if np.isfinite(layers["alpha_pl"]).any():
        figures["spectra"] = spectra_figure(layers, spectra)
    figures["histogram"] = score_histogram(layers, plan.score, cut_of(layers, plan), plan.direction)
    figures["plan_map"] = plan_map(layers, plan)
    if column := sensitivity_column(layers):
        figures["sensitivity"] = score_against_sensitivity(layers, plan.score, column)
        wishes: Any = {name: plan.options.get(name) for name in ("group", "force_16bit", "forbid_16bit")}
        used = {*plan.formats.values(), "16bit"}
        formats = tuple(used) if len(used) > 1 else ("nf4", "16bit")
        curves = frontier(layers, formats=formats, double_quant=plan.double_quant, **wishes)
        if curves["predicted_kl"].notna().any():
            figures["frontier"] = frontier_figure(layers, plan, curves)
    return figures


def cut_of(layers: pd.DataFrame, plan: ProtectionPlan) -> float | None:
    """The score where a plan's protected layers begin; None if no threshold separates them from the rest."""
    planned, values = scored(layers, plan.score)
    kept, sign = planned["name"].isin(plan.protected).to_numpy(), 1 if plan.direction == "high" else -1
    kept_values, rest = (sign * values[here & np.isfinite(values)] for here in (kept, ~kept))
    if not len(kept_values) or (rest >= kept_values.min()).any():
        return None
    return float(sign * kept_values.min())


def show(figures: Mapping[str, Path], name: str) -> Any:
    """A saved figure, to be the last line of a notebook cell.

    Raises:
        RunError: this run's data don't allow that figure; says what to run.
    """
    from IPython.display import Image

    if name not in figures:
        raise RunError(f"this run has no figure {name!r}: run notebook 01_analyze with sensitivity='self'.")
    return Image(filename=str(figures[name]))


# --- an evaluation ---------------------------------------------------------------------------------------

WHOSE = "float32, from the file's tensors"  # what every KL of an evaluation's variants is
WINE = "#882255"  # Tol's muted palette: told apart from the others by the colour-blind too


BESIDE_RANDOM = {
    "supported": "lower than random layers'",
    "refuted": "higher than random layers'",
    "not separable": "not separable from random's",
}


def _look(colour: str, marker: str, size: float = 7.0, line: str = "-", full: bool = True) -> dict[str, Any]:
    """Matplotlib's words for a variant's point and curve; large markers lie below small ones."""
    edge = {"mec": "white", "mew": 0.6} if full else {"mfc": "none", "mew": 1.6}
    return {"color": colour, "marker": marker, "ms": size, "ls": line, "zorder": 4 - size / 20, **edge}


LOOKS = {
    "reference": _look(BLACK, "*", 11, ":"),
    "nf4": _look(BLACK, "s"),
    "nf4_nearest": _look(BLACK, "s", line="--", full=False),
    "int8": _look(ORANGE, "D"),
    "plan": _look(VERMILLION, "o", 10),
    "plan_nearest": _look(VERMILLION, "o", 10, "--", full=False),
    "other_direction": _look(PURPLE, "v", 11, "--", full=False),
    "fisher": _look(GREEN, "^", 9),
    "fisher_int8": _look(GREEN, "P", 7, "--"),
    # A wide rim: at low budgets int4 gets few layers, and the point lies on that of fisher_int8.
    "fisher_int4": _look(BLUE, "s", 11, full=False),
    "int4": _look(SKY, "d", 9),
    "noise": _look(GREY, "X", line="--"),
    "first_last": _look(BLUE, "<", line="--"),
    "smallest_first": _look(BLUE, ">", line=":"),
    "type_prior": _look(BLUE, "h", line="-."),
}
RANDOM = _look(GREY, "o", 4, full=False) | {"mew": 0.9, "zorder": 2, "label": "random, equal bytes"}
RIVAL = _look(WINE, "p", 9)
WINDOWED = ("nf4", "plan", "plan_nearest", "other_direction", "fisher", "fisher_int8", "fisher_int4", "int8")
FLOOR = 1e-6  # nats a token: the smallest KL that is drawn


def drawn_as(key: str, one: Mapping[str, Any]) -> dict[str, Any]:
    """How a variant is drawn, and its name in a legend: all random controls alike, all rivals alike."""
    return RANDOM if is_random(key) else LOOKS.get(key, RIVAL) | {"label": one["label"]}


def _windows(evaluation: Evaluation) -> str:
    return "{windows} windows of {window_length} tokens of {name}.".format_map(evaluation.text)


@styled
def quality_by_bytes(evaluation: Evaluation) -> Figure:
    """Perplexity and KL against the size of the weights, every variant with its 95 % interval."""
    variants = evaluation.variants
    base = variants["reference"]["perplexity"]
    unit, unit_name = size_unit(variants["reference"]["bytes"])
    left, right = new_figure(10.0, 5.2).subplots(1, 2, sharex=True)
    # The legend's order is that of the KL.
    for key, one in sorted(variants.items(), key=lambda item: -item[1]["kl_mean"]):
        panels = {left: [base * ratio for ratio in one.get("perplexity_ratio", [1.0, 1.0, 1.0])]}
        if "kl" in one:
            ends = stats.Estimate.from_dict(one["kl"])
            panels[right] = [max(x, FLOOR) for x in (ends.mean, ends.low, ends.high)]
        bars = {"elinewidth": 0.8, "capsize": 0} if is_random(key) else {"elinewidth": 1.2, "capsize": 2}
        look = drawn_as(key, one) | bars | {"ls": "none"}
        for axes, (value, low, high) in panels.items():
            error = [[max(value - low, 0)], [max(high - value, 0)]]
            axes.errorbar(one["bytes"] / unit, value, yerr=error, **look)
    left.axhline(base, color=BLACK, lw=0.8, ls=":")
    left.locator_params(axis="x", nbins=5)
    size = f"weights on disk ({unit_name})"
    left.set(xlabel=size, ylabel=f"perplexity on {evaluation.text['name']}")
    right.set(xlabel=size, ylabel="mean KL(16-bit ‖ variant), nats a token", yscale="log")
    reading = "Bars: 95 % intervals over windows (perplexity: of the paired ratio to 16-bit)."
    finding = f"The plan's KL is {variants['plan']['kl_mean']:.3g} ({WHOSE})"
    if beside := variants["plan"].get("vs_random"):
        held = stats.Estimate.from_dict(beside["kl"])
        random_kl = np.mean([one["kl_mean"] for key, one in variants.items() if is_random(key)])
        finding += f", {BESIDE_RANDOM[stats.verdict(held, 'lower')]} ({random_kl:.3g}) at equal bytes"
    if "int8" in variants:
        finding += f"; int8 everywhere: {variants['int8']['kl_mean']:.2g}"
    return finished(left, finding, f"{reading} {_windows(evaluation)}")


@styled
def window_differences(evaluation: Evaluation) -> Figure:
    """Loss minus the 16-bit reference's for every window, sorted within each variant."""
    variants, windows = evaluation.variants, evaluation.text["windows"]
    reference = np.array(variants["reference"]["window_nll"])
    losses = {key: np.array(variants[key]["window_nll"]) for key in WINDOWED if key in variants}
    axes = new_figure(10.0, 4.8).subplots()
    for key, loss in losses.items():
        look = drawn_as(key, variants[key]) | {"ms": 5.0, "lw": 1.2}
        look["label"] += with_minus(f": {variants[key]['delta']['mean']:+.4f}")
        axes.plot(range(1, len(loss) + 1), np.sort(loss - reference), **look)
    axes.axhline(0, color=BLACK, lw=1)
    axes.set(xlabel="windows, sorted for each variant", ylabel="loss − 16-bit loss, nats a token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    effect, reading = variants["plan"]["effect"], "Below the line: better than in 16-bit."
    finding = (
        f"Under the plan {round(effect['share_improved'] * windows)} of {windows} windows have a lower loss "
        f"than in 16-bit; {len(effect['carriers'])} windows carry half of the mean difference"
    )
    return finished(axes, finding, f"{reading} {_windows(evaluation)}", title="mean difference")


@styled
def kl_survival(evaluation: Evaluation) -> Figure:
    """Share of tokens whose KL reaches a value, for the ends, the plan and its main controls."""
    axes, variants = new_figure(10.0, 4.8).subplots(), evaluation.variants
    for key, one in variants.items():
        if key != "reference":
            # The share 1 stands at the least KL of all tokens, decades below the next: no curve, an outlier.
            curve = np.maximum(one["kl_survival"][1:], FLOOR)
            look = drawn_as(key, one) | {"marker": "", "lw": 0.8 if is_random(key) else 1.8}
            axes.plot(curve, SURVIVAL[1 : len(curve) + 1], **look)
    axes.set(xscale="log", xlabel="KL(16-bit ‖ variant) of one token, nats")
    axes.set(yscale="log", ylabel="share of tokens with at least this KL")
    plan, nf4 = variants["plan"]["kl_p999"], variants["nf4"]["kl_p999"]
    finding = f"The worst token in a thousand moves by {plan:.2g} nats under the plan, by {nf4:.2g} in NF4"
    reading = "A mean hides rare, large changes; this curve doesn't. Further left is better."
    return finished(axes, f"{finding} ({WHOSE})", f"{reading} {_windows(evaluation)}")


@styled
def predicted_and_real(evaluation: Evaluation) -> Figure | None:
    """Predicted against real KL; None where no sensitivity was computed."""
    variants = evaluation.variants
    pairs = {key: (one["predicted_kl"] or 0, one["kl_mean"]) for key, one in variants.items()}
    pairs = {key: pair for key, pair in pairs.items() if min(pair) > 0}
    if not pairs:
        return None
    axes = new_figure(10.0, 4.8).subplots()
    for key, pair in pairs.items():
        axes.plot(*pair, **drawn_as(key, variants[key]) | {"ls": "none"})
    ends = [0.7 * min(map(min, pairs.values())), 1.4 * max(map(max, pairs.values()))]
    axes.plot(ends, ends, color=GREY, lw=1, ls=":", label="predicted = real", zorder=1)
    axes.set(xscale="log", xlim=ends, xlabel="predicted KL, nats a token")
    axes.set(yscale="log", ylim=ends, ylabel="real KL, nats a token")
    off = [abs(predicted / real - 1) for predicted, real in pairs.values()]
    finding = f"Predicted KL is off by {np.median(off):.0%} (median of {len(off)} variants)"
    if "plan" in pairs:
        finding += "; the plan's is {:.3g}, and {:.3g} in truth".format(*pairs["plan"]) + f" ({WHOSE})"
    reading = "The prediction is a sum over layers, scaled a format by all of them and by their cheaper half."
    return finished(axes, finding, f"{reading} {_windows(evaluation)}")
