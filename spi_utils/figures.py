"""Figures of the layers, their spectra and a plan: functions from data to a matplotlib `Figure`.

First how the project's figures look and become files, which every module that draws uses; then one function
a figure; last `draw_all` and `show`, which notebook 02 calls. No pyplot, no global state, no model: the same
data give the same bytes. Titles state what the data show, computed from them. Colours are Okabe and Ito's
(2008), told apart by the colour-blind; layer types also differ by marker.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from spi_utils import runs
from spi_utils.curves import frontier
from spi_utils.errors import AnalysisError, RunError
from spi_utils.formats import FORMATS, gigabytes
from spi_utils.plan import ProtectionPlan, nominal_bits, price, score_row, score_values
from spi_utils.runs import Run

if TYPE_CHECKING:
    from pathlib import Path

    from IPython.display import Image
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Spectra = Mapping[str, Floats]  # name -> singular values, descending

# --- how figures look, and how they become files ---------------------------------------------------------

# Okabe-Ito without its yellow, which is too pale for points on white.
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#000000", "#666666"
CYCLE = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, BLACK)
MARKERS = "os^DvPX*"
# What a layer is stored as: 16-bit stands out, NF4 recedes; int8 and int4 look so in every figure.
FORMAT_COLOURS = {"16bit": VERMILLION, "int8": ORANGE, "nf4": "#CFE0EC"}
FORMAT_COLOURS |= {name: SKY for name in FORMATS if name.startswith("int4")}
FORMAT_LABELS = {"16bit": "16-bit", "int8": "8-bit (int8)", "nf4": "4-bit (NF4)"}
FORMAT_LABELS |= {name: f"4-bit ({name})" for name in FORMATS if name.startswith("int4")}

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

Args = ParamSpec("Args")
Result = TypeVar("Result")


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
    title = {"ha": "left", "fontsize": 12, "fontweight": "bold", "linespacing": 1.3}
    figure.suptitle(balanced(sentence, columns), x=0.01, **title)
    if detail:
        text = balanced(detail, int(columns * 1.5))
        figure.supxlabel(text, x=0.01, ha="left", fontsize=9, color=GREY, linespacing=1.35)


def balanced(text: str, columns: int) -> str:
    """`text` in as few lines of at most `columns` characters as it needs, of nearly equal length."""
    lines = len(textwrap.wrap(text, columns))
    narrowest = next(width for width in range(1, columns + 1) if len(textwrap.wrap(text, width)) <= lines)
    return textwrap.fill(text, narrowest)


def save_figure(figure: Figure, run: Run, name: str) -> Path:
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


# --- how things are called -------------------------------------------------------------------------------

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
SHORT_LABELS = {
    "alpha_hill": "α Hill",
    "alpha_pl": "α Clauset",
    "alpha_farms": "α FARMS",
    "alpha_excess": "α over noise",
    "alpha_decay": "rank decay a",
    "nf4_error": "NF4 error",
    "fisher": "Fisher",
}


def score_label(score: str) -> str:
    """How a score is written on an axis, with its unit where it has one."""
    return AXIS_LABELS.get(score) or score_row(score).title


def short_label(score: str) -> str:
    """A score's name for a legend."""
    return SHORT_LABELS.get(score, score.replace("_", " "))


def score_symbol(score: str) -> str:
    """A score in running text: "α" for the exponents of the spectrum's tail, else its label without unit."""
    return "α" if score.startswith("alpha_") and score != "alpha_decay" else score_label(score).split(" (")[0]


def shorten(name: str, limit: int = 40) -> str:
    """A long name with its middle left out: both ends of a module path tell more than its middle."""
    if len(name) <= limit:
        return name
    head = (limit - 1) // 2
    return f"{name[:head]}…{name[-(limit - 1 - head) :]}"


def signed(value: float) -> str:
    """Two decimals with a true minus sign, as the axes write it: "−0.17"."""
    return f"{value:.2f}".replace("-", "−")


def size_unit(count: float) -> tuple[float, str]:
    """The unit, in bytes and by name, in which `gigabytes` writes a model of this size: for an axis."""
    return (1e9, "GB") if abs(count) >= 999.5e6 else (1e6, "MB")


# --- layers, their types and their scores ----------------------------------------------------------------

LINES_UP_TO = 150  # blocks; above, lines between points only hide each other


class TypeStyle(NamedTuple):
    """Colour, marker and legend label of a layer type."""

    colour: str
    marker: str
    label: str


def planned_layers(layers: pd.DataFrame) -> pd.DataFrame:
    """The rows of a layer table that a plan decides on.

    Raises:
        AnalysisError: there is none.
    """
    planned = layers[layers["quantizable"]].reset_index(drop=True)
    if planned.empty:
        raise AnalysisError(
            f"the layer table has {len(layers)} rows and none that can be quantized: nothing to draw. "
            "Run notebook 01_analyze on a model with linear layers."
        )
    return planned


def planned_values(layers: pd.DataFrame, score: str) -> Floats:
    """A score's values for the rows of `planned_layers`, float64 (L,).

    Raises:
        PlanError: unknown score, or the table lacks its column.
    """
    return score_values(layers, score)[layers["quantizable"].to_numpy(bool)]


def is_wide(values: Floats) -> bool:
    """Whether values (L,) want a logarithmic axis: all positive, most of them in the lowest thirtieth."""
    finite = values[np.isfinite(values)]
    return bool(len(finite) and finite.min() > 0 and finite.max() > 30 * np.quantile(finite, 0.05))


def between_share(values: Floats, groups: pd.Series) -> float:
    """Share of the variance of values (L,) that lies between groups (L,), η²; NaN where all are equal."""
    finite = np.isfinite(values)
    values, groups = values[finite], groups[finite]
    total = ((values - values.mean()) ** 2).sum() if len(values) else 0.0
    if total <= 1e-12 * max(1.0, float((values**2).sum())):
        return float("nan")
    means = pd.Series(values).groupby(groups.to_numpy()).transform("mean").to_numpy()
    return float(((means - values.mean()) ** 2).sum() / total)


def rank_correlation(x: Floats, y: Floats) -> float:
    """Spearman's ρ of the pairs in x (L,) and y (L,) that are finite; NaN below three or without spread."""
    both = np.isfinite(x) & np.isfinite(y)
    if both.sum() < 3 or np.ptp(x[both]) == 0 or np.ptp(y[both]) == 0:
        return float("nan")
    return float(pd.Series(x[both]).rank().corr(pd.Series(y[both]).rank()))


def type_styles(types: pd.Series, limit: int = 14) -> dict[str, TypeStyle]:
    """A style for each layer type by order of appearance; rare ones beyond `limit` share a grey one."""
    names = list(dict.fromkeys(types))
    common = set(types.value_counts().index[:limit])
    named = [name for name in names if len(names) <= limit or name in common]
    styles = dict.fromkeys(names, TypeStyle("#AAAAAA", ".", f"{len(names) - len(named)} rarer types"))
    for i, name in enumerate(named):
        styles[name] = TypeStyle(CYCLE[i % len(CYCLE)], MARKERS[i % len(MARKERS)], shorten(name, 24))
    return styles


def draw_types(
    axes: Axes, types: pd.Series, x: Floats, y: Floats, *, size: float, joined: bool = False, **look: Any
) -> None:
    """A point for each layer (L,) that has both values, in its type's style, labelled once for the legend.

    Args:
        size: marker size in points.
        joined: draw lines through a type that has one layer a block.
    """
    said: set[str] = set()
    for name, style in type_styles(types).items():
        here = (types == name).to_numpy() & np.isfinite(x) & np.isfinite(y)
        line = "-" if joined and len(set(x[here])) == here.sum() <= LINES_UP_TO else ""
        (drawn,) = axes.plot(
            x[here], y[here], style.marker, color=style.colour, ls=line, lw=0.8, ms=size, **look
        )
        drawn.set_rasterized(len(types) > 2000)
        if style.label not in said:
            drawn.set_label(style.label)
        said.add(style.label)


def failed_note(values: Floats) -> str:
    """How many of values (L,) are missing or infinite, as a sentence; empty if none is."""
    count = int((~np.isfinite(values)).sum())
    if not count:
        return ""
    return f"Hollow: {count} layer{'s' if count > 1 else ''} without a finite value, set on the bottom edge."


# --- a score by depth, its histogram, and against what quantizing costs ----------------------------------


@styled
def score_by_depth(layers: pd.DataFrame, score: str = "alpha_hill") -> Figure:
    """A score against depth, a colour and marker for each layer type; failed layers hollow at the bottom."""
    planned, values = planned_layers(layers), planned_values(layers, score)
    depth, finite = planned["depth"].to_numpy(float), np.isfinite(values)
    figure = new_figure()
    axes = figure.add_subplot()
    size = float(np.clip(900 / len(planned), 1.5, 5))
    draw_types(axes, planned["type"], depth, values, size=size, joined=True)
    if not finite.all():
        look: dict[str, Any] = {"mfc": "white", "mec": BLACK, "ms": 6, "clip_on": False, "zorder": 5}
        bottom = np.full(int((~finite).sum()), 0.015)
        axes.plot(depth[~finite], bottom, "o", transform=axes.get_xaxis_transform(), gid="failed", **look)
    axes.set(xlabel="depth (block)", ylabel=score_label(score), yscale="log" if is_wide(values) else "linear")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.legend(loc="outside right center")
    share, name = between_share(values, planned["type"]), score_symbol(score)
    if np.isfinite(share):
        finding = f"{share:.0%} of the spread of {name} lies between layer types, {1 - share:.0%} within them"
    elif finite.any():
        count = int(finite.sum())
        who = f"All {count} layers have" if count > 1 else "The only layer has"
        finding = f"{who} {name} = {values[finite][0]:.4g}"
    else:
        finding = f"No layer has a finite {name}"
    headline(figure, finding, failed_note(values))
    return figure


SHAPES_SHOWN = 10


@styled
def score_histogram(
    layers: pd.DataFrame, score: str = "alpha_hill", threshold: float | None = None, direction: str = "high"
) -> Figure:
    """The histogram of a score with the threshold; for Hill's α also what Gaussian noise of each shape gives.

    Args:
        threshold: score units; layers at it or beyond, in `direction`, are protected.
    """
    planned, values = planned_layers(layers), planned_values(layers, score)
    null = _gaussian_null(planned) if score == "alpha_hill" else None
    high, name, detail, parts = direction == "high", score_symbol(score), failed_note(values), []
    figure = new_figure(height=4.0 if null is None else 6.2)
    ratios = [1.0] if null is None else [1.25, 1.0]
    panels = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios, squeeze=False)[:, 0]
    groups: dict[tuple[str, str], list[Floats]] = {}
    for kind, style in type_styles(planned["type"]).items():
        of_type = values[(planned["type"] == kind).to_numpy() & np.isfinite(values)]
        groups.setdefault((style.colour, style.label), []).append(of_type)
    panels[0].hist(
        [np.concatenate(of_types) for of_types in groups.values()],
        bins=list(histogram_edges(values)),
        stacked=True,
        color=[colour for colour, _ in groups],
        label=[label for _, label in groups],
        edgecolor="white",
        linewidth=0.4,
    )
    figure.legend(loc="outside right center")
    panels[0].set_ylabel("layers")
    panels[-1].set(xlabel=score_label(score), xscale="log" if is_wide(values) else "linear")
    if threshold is not None:
        for panel in panels:
            panel.axvline(threshold, color=VERMILLION, lw=1.8, zorder=4)
        words, side = ("kept in 16-bit →", "left") if high else ("← kept in 16-bit", "right")
        look: dict[str, Any] = {"color": VERMILLION, "fontsize": 9, "fontweight": "bold", "va": "bottom"}
        above = panels[0].get_xaxis_transform()  # written above the axes, where no bar is
        panels[0].text(threshold, 1.01, words, transform=above, ha=side, **look)
        kept = int((values >= threshold if high else values <= threshold).sum())
        sign = "≥" if high else "≤"
        parts.append(f"{name} {sign} {threshold:.4g} keeps {kept} of {len(values)} layers in 16-bit")
    if null is not None:
        _shapes_against_null(panels[1], planned["type"], values, null)
        detail = f"Diamonds: mean of Gaussian matrices of that shape, bar ±2 sd. {detail}".strip()
        rho = rank_correlation(values, null["mean"].to_numpy(float))
        if np.isfinite(rho):
            parts.append(f"its rank correlation with Gaussian noise of the same shapes is ρ = {signed(rho)}")
        else:
            parts.append("all layers have one shape, so shape explains nothing here")
    finite = values[np.isfinite(values)]
    ends = (finite.min(), finite.max()) if len(finite) else (np.nan, np.nan)
    headline(figure, "; ".join(parts) or f"{name} runs from {ends[0]:.3g} to {ends[1]:.3g}", detail)
    return figure


def histogram_edges(values: Floats, bins: int = 40) -> Floats:
    """Bin edges (bins+1,) over the finite values (L,); a narrow range around a single value."""
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        pad = max(abs(low) * 0.05, 1e-12)
        low, high = low - pad, high + pad
    return (np.geomspace if is_wide(values) else np.linspace)(low, high, bins + 1)


def _gaussian_null(planned: pd.DataFrame) -> pd.DataFrame | None:
    """Mean and standard deviation of Hill's α on Gaussian matrices of each layer's shape, from the table."""
    if not {"alpha_excess", "alpha_excess_z"} <= set(planned) or planned["alpha_excess"].isna().all():
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        sd = planned["alpha_excess"] / planned["alpha_excess_z"]
    shape = planned["rows"].astype(str) + "×" + planned["cols"].astype(str)
    mean = planned["alpha_hill"] - planned["alpha_excess"]
    return pd.DataFrame({"shape": shape, "mean": mean, "sd": sd.where(np.isfinite(sd))})


def _shapes_against_null(axes: Axes, types: pd.Series, values: Floats, null: pd.DataFrame) -> None:
    """A row for each of the commonest shapes: its layers' α, and a diamond where noise of that shape lies."""
    counts = null["shape"].value_counts()
    means = null.groupby("shape")["mean"].median().loc[counts.index[:SHAPES_SHOWN]].sort_values()
    rows = pd.Series(range(len(means)), means.index)
    # A fixed sawtooth keeps equal values apart without randomness.
    jitter = 0.28 * ((null.groupby("shape").cumcount() * 0.618) % 1 - 0.5)
    height = np.asarray(null["shape"].map(rows) + jitter, np.float64)
    draw_types(axes, types, values, height, size=3.5, alpha=0.8, zorder=6)
    spread = 2 * null["sd"].abs().groupby(null["shape"]).median().reindex(means.index).fillna(0.0)
    for colour, width, cap in (("white", 5.0, 0.0), (BLACK, 1.6, 3.0)):
        look: dict[str, Any] = {"color": colour, "elinewidth": width, "capsize": cap, "ms": 6, "mfc": "white"}
        for row, (mean, reach) in enumerate(zip(means, spread, strict=True)):
            axes.errorbar(mean, row, xerr=reach, fmt="D", zorder=5, **look)
    axes.set_yticks(rows, [f"{shape}  ({counts[shape]})" for shape in rows.index])
    axes.set(ylabel="shape (layers)", ylim=(-0.6, len(rows) - 0.4))


# Sensitivity columns, the best first, as an axis names them.
COST_NAMES = {"measured_nf4": "measured", "refined_nf4": "refined", "fisher_nf4": "Fisher"}


def sensitivity_column(layers: pd.DataFrame) -> str | None:
    """The best sensitivity that the table holds: measured before refined before Fisher; None without any."""
    planned = layers[layers["quantizable"]]
    held = (name for name in COST_NAMES if name in layers and np.isfinite(planned[name]).any())
    return next(held, None)


@styled
def score_against_sensitivity(
    layers: pd.DataFrame, score: str = "alpha_hill", column: str | None = None
) -> Figure:
    """A score against each layer's cost in NF4, and Spearman's ρ over all layers and within each type.

    Args:
        column: the sensitivity column (nats a token); the best that the table holds by default.

    Raises:
        AnalysisError: the table holds no sensitivity.
    """
    planned = planned_layers(layers)
    column = column or sensitivity_column(layers)
    if column not in COST_NAMES or column not in planned:
        raise AnalysisError(
            f"the layer table has no sensitivity column ({column or 'fisher_nf4, measured_nf4'}). "
            "Run notebook 01_analyze with sensitivity='self'."
        )
    types, values, cost = planned["type"], planned_values(layers, score), planned[column].to_numpy(float)
    cost = np.where(cost > 0, cost, np.nan)  # the axis is logarithmic
    both = np.isfinite(values) & np.isfinite(cost)
    figure = new_figure(height=4.8)
    left, right = figure.subplots(1, 2, width_ratios=[1.7, 1])
    draw_types(left, types, values, cost, size=float(np.clip(1200 / len(planned), 1.5, 5)), alpha=0.85)
    left.set(xlabel=score_label(score), ylabel=f"{COST_NAMES[column]} cost in NF4 (nats a token)")
    left.set_yscale("log" if both.any() else "linear")

    styles, counts, overall = type_styles(types), types.value_counts(), rank_correlation(values, cost)
    within = {name: rank_correlation(values[types == name], cost[types == name]) for name in styles}
    shown = [name for name in within if styles[name].marker != "."][::-1]
    for height, name in enumerate(shown):
        right.plot([0, within[name]], [height, height], color=styles[name].colour, lw=2)
        right.plot(within[name], height, styles[name].marker, color=styles[name].colour, ms=7)
    # Hollow and grey: no type looks so, though black is down_proj's.
    right.plot([0, overall], [len(shown)] * 2, color=GREY, lw=4, alpha=0.5)
    right.plot(overall, len(shown), "o", color=GREY, mfc="white", mew=2, ms=9)
    labels = [f"{shorten(name, 22)} ({counts[name]})" for name in shown]
    right.set_yticks(range(len(shown) + 1), [*labels, f"all layers ({len(planned)})"])
    right.axvline(0, color=GREY, lw=1)
    right.set(xlim=(-1.05, 1.05), xlabel="Spearman's ρ")
    right.grid(axis="y", visible=False)

    inside, name = [rho for rho in within.values() if np.isfinite(rho)], score_symbol(score)
    if not np.isfinite(overall):
        finding = f"Too few layers, or no spread: no rank correlation between {name} and cost"
    elif not inside:
        finding = f"{name} ranks the layers' cost with ρ = {signed(overall)}"
    else:
        middle = float(np.median(inside))
        end = ": it mostly tells types apart" if abs(middle) < abs(overall) / 2 else ""
        finding = (
            f"{name} ranks the layers' cost with ρ = {signed(overall)} overall, but {signed(min(inside))} to "
            f"{signed(max(inside))} within a type (median {signed(middle)}){end}"
        )
    lost = f"{(~both).sum()} layers without both values are left out. " if not both.all() else ""
    headline(figure, finding, f"{lost}ρ is Spearman's; colours are those of the right panel.")
    return figure


# --- single layers' spectra ------------------------------------------------------------------------------

LINES = ("-", "--", "-.", (0, (1, 1)))
# What the fit drops (WeightWatcher's cut), so that the drawn density is the fitted one.
SMALLEST_EIGENVALUE = 1e-5


def pick_layers(layers: pd.DataFrame, score: str = "alpha_hill", count: int = 3) -> list[str]:
    """Names of `count` layers spread evenly over a score's ranks, the lowest and the highest among them."""
    planned, values = planned_layers(layers), planned_values(layers, score)
    order = np.argsort(values, kind="stable")[: int(np.isfinite(values).sum())]
    places = np.unique(np.linspace(0, len(order) - 1, count).round().astype(int)) if len(order) else order
    return [str(planned["name"].iloc[order[place]]) for place in places]


def layer_title(row: pd.Series, limit: int = 30) -> str:
    """A layer by type and block: "down_proj, block 3"."""
    place = f", block {row['depth']}" if row["depth"] >= 0 else ""
    return f"{shorten(str(row['type']), limit)}{place}"


def _rows(layers: pd.DataFrame, spectra: Spectra, names: Sequence[str]) -> list[pd.Series]:
    known = layers.set_index("name", drop=False)
    if not names:
        raise AnalysisError("no layer has a finite score, so there is no spectrum to choose.")
    if missing := [name for name in names if name not in known.index or name not in spectra]:
        raise AnalysisError(
            f"no spectrum of layer {missing[0]!r} in this run: choose names from layers.csv whose status is "
            "not 'failed' or 'listed'."
        )
    return [row for _, row in known.loc[list(names)].iterrows()]


@styled
def spectra_figure(layers: pd.DataFrame, spectra: Spectra, names: Sequence[str] | None = None) -> Figure:
    """The eigenvalue density (ESD) of layers on log-log axes, with the fitted tail, xmin and KS distance.

    Args:
        spectra: name -> singular values, descending.
        names: layers to draw; by default the most compact, a middling and the flattest with a sound fit.

    Raises:
        AnalysisError: a name has no spectrum.
    """
    detail = "Dashed: xmin, where the fitted tail begins. KS: largest distance of fit and data."
    if names is None:
        sound = layers[layers["status"] == "ok"]  # a tail of nine values has no α
        names = pick_layers(sound if sound["quantizable"].sum() >= 3 else layers, "alpha_pl")
        detail = f"Of the layers whose fit is sound. {detail} Other figures show Hill's α, of the top tenth."
    rows = _rows(layers, spectra, names)
    columns = min(len(rows), 3)
    lines = -(-len(rows) // columns)
    figure = new_figure(height=1.0 + 3.5 * lines)
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes, row in zip(panels.flat, rows, strict=False):
        draw_density(axes, spectra[row["name"]], row, layer_title(row))
    for axes in panels.flat[len(rows) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("density of eigenvalues")
    fitted = [row for row in rows if np.isfinite(row["alpha_pl"])]
    sound_rows = [row for row in fitted if row["status"] == "ok"]
    ranked = sorted(sound_rows if len(sound_rows) > 1 else fitted, key=lambda row: row["alpha_pl"])
    finding = f"The spectrum of {layer_title(rows[0])}"
    if len(ranked) > 1:
        low, high = (f"{row['alpha_pl']:.2f} in {layer_title(row)}" for row in (ranked[0], ranked[-1]))
        finding = f"From compact to flat: Clauset's α is {low} and {high}"
    headline(figure, finding, detail)
    return figure


def draw_density(axes: Axes, singular_values: Floats, row: pd.Series, title: str = "") -> None:
    """Draw one layer's ESD and its fit, taken from the layer table's `alpha_pl` columns, on `axes`.

    Args:
        title: stands above the fit's numbers, which stand above the axes: they must not cover the density.
    """
    eigenvalues = eigenvalues_of(singular_values)
    axes.set(xlabel="eigenvalue λ = σ²")
    said = [title] if title else []
    alpha, xmin, tail = (float(row[f"alpha_pl{part}"]) for part in ("", "_xmin", "_tail"))
    if len(eigenvalues) < 2 or np.ptp(eigenvalues) == 0:
        axes.text(0.5, 0.5, "no spread of eigenvalues", transform=axes.transAxes, ha="center", color=GREY)
    else:
        edges, density = density_of(eigenvalues)
        filled = density[density > 0]
        axes.set(xscale="log", yscale="log", ylim=(filled.min() / 4, filled.max() * 4))
        axes.stairs(density, edges, fill=True, color=SKY, alpha=0.45)
        axes.stairs(density, edges, color=BLUE, lw=1)
        if np.isfinite([alpha, xmin, tail]).all() and xmin > 0:
            x = np.geomspace(xmin, eigenvalues.max(), 50)
            # A power law from xmin on, scaled to the tail's share of all eigenvalues.
            y = tail / len(eigenvalues) * (alpha - 1) / xmin * (x / xmin) ** -alpha
            axes.plot(x, y, color=VERMILLION, lw=2)
            axes.axvline(xmin, color=VERMILLION, lw=1, ls="--")
            sigma, hill = (row.get(name, np.nan) for name in ("alpha_pl_sigma", "alpha_hill"))
            error = f" ± {sigma:.2f}" if np.isfinite(sigma) else ""
            also = f", Hill {hill:.2f}" if np.isfinite(hill) else ""
            short = " (short)" if tail < 50 else ""
            said.append(f"α Clauset {alpha:.2f}{error}{also}")
            fit = f"KS {row['alpha_pl_ks']:.3f}, xmin {xmin:.3g}"
            said.append(f"{fit}, tail {int(tail)} of {len(eigenvalues)}{short}")
        else:
            said.append("no fit")
    axes.set_title("\n".join(said), fontsize=9, loc="left", linespacing=1.35)


def eigenvalues_of(singular_values: Floats) -> Floats:
    """The eigenvalues that a fit sees: squares of the singular values, finite and not vanishing."""
    eigenvalues = np.square(np.asarray(singular_values, dtype=np.float64))
    return eigenvalues[np.isfinite(eigenvalues) & (eigenvalues > SMALLEST_EIGENVALUE)]


def density_of(eigenvalues: Floats, bins: int = 35) -> tuple[Floats, Floats]:
    """Edges (bins+1,), evenly spaced in the logarithm, and the density in each bin (bins,)."""
    edges = np.geomspace(eigenvalues.min(), eigenvalues.max() * (1 + 1e-9), bins + 1)
    counts, _ = np.histogram(eigenvalues, edges)
    return edges, counts / (len(eigenvalues) * np.diff(edges))


@styled
def rank_decay(layers: pd.DataFrame, spectra: Spectra, names: Sequence[str] | None = None) -> Figure:
    """Singular values against their rank on log-log axes, each with its power law and how well that fits.

    Args:
        spectra: name -> singular values, descending.
        names: layers to draw; by default five spread over the decay exponents.

    Raises:
        AnalysisError: a name has no spectrum.
    """
    rows = _rows(layers, spectra, pick_layers(layers, "alpha_decay", 5) if names is None else names)
    styles, found = type_styles(planned_layers(layers)["type"]), {}
    figure = new_figure()
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        name, colour = layer_title(row), styles[row["type"]].colour
        # Two layers of one type share its colour, as in every figure, and differ by their line.
        line = LINES[[other["type"] for other in rows[:place]].count(row["type"]) % len(LINES)]
        exponent, fit = draw_decay(axes, spectra[row["name"]], colour, colour, line=line, relative=True)
        axes.lines[-1].set_label(f"{name}: a = {exponent:.2f}, R² {fit:.2f}")
        if np.isfinite(exponent):
            found[name] = (exponent, fit)
    axes.set_ylabel("singular value σₖ / σ₁")
    figure.legend(loc="outside right center")
    finding = f"Rank decay of {', '.join(map(layer_title, rows))}"
    if len(found) > 1:
        fast, *_, slow = sorted(found, key=lambda name: -found[name][0])
        worst, best = min(fit for _, fit in found.values()), max(fit for _, fit in found.values())
        finding = (
            f"Singular values fall with exponent {found[fast][0]:.2f} in {fast} and {found[slow][0]:.2f} in "
            f"{slow}, the flatter one; a power law explains {worst:.0%} to {best:.0%} of the fall"
        )
    detail = "Dotted: slope −a, least squares over k = 2 … M/2. R²: of log σ there, 1 is a power law."
    headline(figure, finding, f"{detail} Large a: compact.")
    return figure


def draw_decay(
    axes: Axes, sigma: Floats, colour: str, fit_colour: str, *, line: Any = "-", relative: bool = False
) -> tuple[float, float]:
    """Draw singular values by rank over their least-squares power law σ ~ k^-a, fitted for k = 2 … M/2.

    Args:
        relative: divide by the largest.

    Returns:
        a, and the R² of log σ over those ranks; NaN below four values. The curve is the last of the lines.
    """
    sigma = np.asarray(sigma, dtype=np.float64)
    sigma = sigma[np.isfinite(sigma) & (sigma > 0)]
    sigma = sigma / sigma[0] if relative and len(sigma) else sigma
    ranks = np.arange(1, len(sigma) + 1, dtype=np.float64)
    exponent = fit = float("nan")
    k, y = ranks[1 : len(sigma) // 2], np.log(sigma[1 : len(sigma) // 2])
    if len(k) > 1:
        slope, level = np.polyfit(np.log(k), y, 1)
        law, spread = level + slope * np.log(k), float(y.var())
        exponent, fit = -float(slope), 1 - float(np.mean((y - law) ** 2)) / spread if spread else 1.0
        axes.plot(k, np.exp(law), color=fit_colour, lw=1.2, ls=":")
    axes.plot(ranks, sigma, color=colour, lw=1.8, ls=line)
    axes.set(xscale="log", yscale="log", xlabel="rank k")
    return exponent, fit


@styled
def single_spectrum(layers: pd.DataFrame, spectra: Spectra, name: str) -> Figure:
    """One layer's eigenvalue density with its fit, and its rank decay; says so where the analysis failed."""
    figure = new_figure(10.0, 3.4)
    row = layers[layers["name"] == name].iloc[0]
    left, right = figure.subplots(1, 2)
    if name in spectra:
        draw_density(left, spectra[name], row)
        left.set_ylabel("density of eigenvalues")
        exponent, fit = draw_decay(right, spectra[name], BLUE, VERMILLION)
        right.set_ylabel("singular value σₖ")
        said = f"slope −a with a = {exponent:.2f}, R² {fit:.2f}" if np.isfinite(fit) else "too few for a fit"
        right.set_title(said, fontsize=9, loc="left")
    else:
        said = f"no spectrum: the analysis of this layer is marked {row['status']!r}"
        left.text(0.0, 0.5, said, color=GREY)
        left.set_axis_off()
        right.set_axis_off()
    headline(figure, f"Layer {shorten(name, 64)}  ({row['rows']} × {row['cols']}, {row['status']})")
    return figure


# --- a plan as a map -------------------------------------------------------------------------------------

MOST_COLUMNS = 400
MOST_LABELS = 40
NEARLY_ALL = 0.9  # of a type's layers


class LayerGrid:
    """The depth × type grid of a layer table: where each planned layer lies, types in order of appearance.

    Several layers in one cell (experts listed one by one) share it by their number of weights. `shape` is
    (types, depths), `hollow` marks cells with a layer whose analysis failed.
    """

    def __init__(self, layers: pd.DataFrame) -> None:
        planned = planned_layers(layers)
        self.types = list(dict.fromkeys(planned["type"]))
        depths = np.unique(planned["depth"].to_numpy())
        # A very deep model shares columns between neighbouring blocks.
        self.step = -(-int(depths.max() - depths.min() + 1) // MOST_COLUMNS)
        self.depths = np.arange(depths.min(), depths.max() + 1, self.step)
        self.rows = planned["type"].map({name: row for row, name in enumerate(self.types)}).to_numpy()
        self.columns = (planned["depth"].to_numpy() - self.depths[0]) // self.step
        self.shape = (len(self.types), len(self.depths))
        self._cell = self.rows * self.shape[1] + self.columns
        self._weights = planned["numel"].to_numpy(float)
        self._total = np.bincount(self._cell, self._weights, minlength=self.shape[0] * self.shape[1])
        self._empty = (self._total == 0).reshape(self.shape)
        self.hollow = self.share((planned["status"] == "failed").to_numpy()) > 0

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom, top of the map in blocks and rows of types, as `imshow` wants them."""
        return self.depths[0] - 0.5, self.depths[-1] + self.step - 0.5, self.shape[0] - 0.5, -0.5

    def share(self, chosen: NDArray[np.bool_]) -> Floats:
        """Share of each cell's weights in `chosen` layers (L,). Shape (types, depths), NaN if empty."""
        held = np.bincount(self._cell, self._weights * chosen, minlength=len(self._total))
        with np.errstate(invalid="ignore"):
            return (held / self._total).reshape(self.shape)

    def colours(self, formats: Mapping[str, NDArray[np.bool_]]) -> NDArray[np.uint8]:
        """Cells coloured by the formats of their layers, mixed where they differ. (types, depths, 3)."""
        image = np.zeros((*self.shape, 3), np.float32)
        for name, chosen in formats.items():
            share = np.nan_to_num(self.share(chosen)).astype(np.float32)
            image += share[..., None] * np.array(to_rgb(FORMAT_COLOURS.get(name, GREY)), np.float32)
        image[self._empty] = 1.0
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
    grid, planned = LayerGrid(layers), planned_layers(layers)
    held = np.array([plan.formats.get(name, "16bit") for name in planned["name"]])
    tiers = sorted(set(held), key=nominal_bits)
    above = held != tiers[0] if len(tiers) > 1 else held == "16bit"
    figure = new_figure(height=1.7 + 0.32 * min(len(grid.types), MOST_LABELS))
    axes = figure.add_subplot()
    draw_grid(axes, grid)
    image = grid.colours({name: held == name for name in tiers})
    axes.imshow(image, aspect="auto", extent=grid.extent, interpolation="nearest")
    for row, column in np.argwhere(grid.hollow):  # only a frame is left of a cell whose analysis failed
        left = grid.depths[column] - 0.5 + 0.16 * grid.step
        box = Rectangle((left, row - 0.34), 0.68 * grid.step, 0.68, color="white", zorder=2, gid="failed")
        axes.add_patch(box)
    for height, count in enumerate(grid.counts(above)):
        where: Any = ("axes fraction", "data")
        axes.annotate(count, (1.01, height), xycoords=where, va="center", fontsize=9, color=GREY)
    for name in reversed(tiers):
        colour, label = FORMAT_COLOURS.get(name, GREY), FORMAT_LABELS.get(name, name)
        axes.plot([], [], "s", ms=9, color=colour, label=label)
    if grid.hollow.any():
        label = f"analysis failed ({int((planned['status'] == 'failed').sum())})"
        axes.plot([], [], "s", ms=8, mfc="white", mec=BLACK, mew=1.8, label=label)
    figure.legend(loc="outside lower center", ncols=4)

    share = np.bincount(grid.rows, above, minlength=len(grid.types)) / np.bincount(grid.rows)
    place = "are above the smallest format" if len(set(held) - {"16bit"}) > 1 else "stay in 16-bit"
    whole = [name for name, part in zip(grid.types, share, strict=True) if part >= NEARLY_ALL]
    never = [name for name, part in zip(grid.types, share, strict=True) if part == 0]
    parts = [
        f"{words} {_listed(names)}"
        for words, names in (("nearly all of", whole), ("none of", never))
        if 0 < len(names) < len(grid.types)
    ]
    kept = ": ".join(filter(None, (f"{int(above.sum())} of {len(above)} layers {place}", ", ".join(parts))))
    headline(figure, f"{kept} ({gigabytes(plan.bytes['total'])}, {plan.matrix_bits:.2f} matrix bits)")
    return figure


def _listed(names: Sequence[str], most: int = 3) -> str:
    """Names in a sentence; of many the first ones and how many more."""
    if len(names) > most:
        return f"{', '.join(shorten(name, 20) for name in names[:most])} and {len(names) - most} more types"
    return " and ".join(shorten(name, 20) for name in names)


# --- what a gigabyte buys --------------------------------------------------------------------------------

# The curves that are named; every other score is a thin grey line, there to be compared with.
NAMED = {
    ("alpha_hill", "high"): (BLUE, "-"),
    ("alpha_hill", "low"): (BLUE, "--"),
    ("fisher", "high"): (GREEN, "-"),
    ("measured", "high"): (PURPLE, "-"),
}
EVERYWHERE = {"nf4": ("s", BLACK), "int8": ("D", ORANGE)}  # marker and colour, as in the evaluation's figures


@styled
def frontier_figure(layers: pd.DataFrame, plan: ProtectionPlan, curves: pd.DataFrame) -> Figure:
    """Predicted KL against size for every score, with random's band, the optimum, and the plan.

    NF4 and int8 everywhere are marked too, where the layer table predicts their cost.

    Args:
        curves: what `curves.frontier` returns.

    Raises:
        AnalysisError: the curves hold no predicted KL.
    """
    if curves["predicted_kl"].notna().sum() == 0:
        raise AnalysisError(
            "these curves hold no predicted KL. Run notebook 01_analyze with sensitivity='self' first."
        )
    unit, unit_name = size_unit(curves["bytes"].max())
    figure = new_figure(height=5.0)
    axes = figure.add_subplot()

    def line(rows: pd.DataFrame, **look: Any) -> None:
        axes.plot(rows["bytes"] / unit, rows["predicted_kl"], **look)

    def point(size: float, kl: float, marker: str, **look: Any) -> None:
        axes.plot(size / unit, kl, marker, mec="white", **look)

    styles = {(plan.score, plan.direction): (VERMILLION, "-")} | NAMED
    scores = dict(list(curves[curves["kind"] == "score"].groupby(["score", "direction"], sort=False)))
    for key, curve in scores.items():
        if key not in styles:
            line(curve, color="#DADADA", lw=0.7)
    for (score, direction), (colour, dashes) in styles.items():
        if (score, direction) in scores:
            label = f"{short_label(score)}, {direction}"
            line(scores[score, direction], color=colour, lw=2, ls=dashes, label=label)
    bands = curves[curves["kind"] == "random"].pivot_table("predicted_kl", "bytes", "quantile")
    if len(bands):
        low, high = float(bands.columns.min()), float(bands.columns.max())
        look: dict[str, Any] = {"color": "#A6A6A6", "alpha": 0.55, "lw": 0}
        look["label"] = f"random, {100 * (high - low):.0f} %"
        axes.fill_between(bands.index / unit, bands[low], bands[high], **look)
    optimum = curves[curves["kind"] == "optimum"]
    line(optimum, color=BLACK, lw=1.8, ls="--", label="least predicted KL")
    planned = planned_layers(layers)
    for fmt, (marker, colour) in EVERYWHERE.items():
        cost = planned.get(f"predicted_{fmt}")
        if cost is not None and np.isfinite(cost).all():
            size = price(layers, dict.fromkeys(planned["name"], fmt), plan.double_quant)["total"]
            label = f"NF4 everywhere, {plan.rounding}" if fmt == "nf4" else f"{fmt} everywhere"
            point(size, cost.sum(), marker, color=colour, ms=8, mew=0.8, zorder=5, label=label)
    finding = "Predicted KL by size"
    if plan.predicted_kl is not None:
        size = plan.bytes["total"]
        point(size, plan.predicted_kl, "o", color=VERMILLION, ms=10, mew=1.5, zorder=6, label="the plan")
        at = {}
        for kind in ("random", "optimum"):
            rows = curves[(curves["kind"] == kind) & curves["predicted_kl"].notna()]
            middle = rows.groupby("bytes")["predicted_kl"].median()
            at[kind] = float(np.interp(size, middle.index, middle.to_numpy()))
        finding = (
            f"At {gigabytes(size)} the plan's predicted KL is {plan.predicted_kl:.3g} nats a token; a random "
            f"choice's is predicted at {at['random']:.3g}, the least with its formats at {at['optimum']:.3g}"
        )
    axes.set(xlabel=f"model size ({unit_name})", ylabel="predicted KL (nats a token)", ylim=(0, None))
    figure.legend(loc="outside right center")
    note = "All KL here are predictions, sums over layers; notebook 04 measures the plan's."
    headline(figure, finding, f"{note} Thin lines: other scores, in both directions.")
    return figure


# --- a run's figures -------------------------------------------------------------------------------------


def draw_all(run: Run, plan: ProtectionPlan | None = None) -> dict[str, Path]:
    """Draw and save every figure that the run's data allow (`all_figures`).

    Args:
        plan: whose score, threshold and map are drawn; read from plan.json by default.

    Returns:
        Figure name -> its PNG in the run's figures; an SVG lies beside it.

    Raises:
        RunError: no analysis or no plan in this run; says which notebook to run.
    """
    layers, spectra = runs.read_layers(run), runs.read_spectra(run)
    if plan is None:
        plan = ProtectionPlan.read(run.plan_json, model=runs.run_info(run)["model"])
    inputs = {"layers": runs.layers_fingerprint(run), "plan": plan.fingerprint}
    outputs: list[str] = []
    with runs.stage(run, "visualize", inputs, outputs, force=True):
        saved = {
            name: save_figure(figure, run, name)
            for name, figure in all_figures(layers, spectra, plan).items()
        }
        outputs += [f"figures/{name}{suffix}" for name in saved for suffix in (".png", ".svg")]
    return saved


def all_figures(layers: pd.DataFrame, spectra: Spectra, plan: ProtectionPlan) -> dict[str, Figure]:
    """Every figure by name; `sensitivity` and `frontier` only if the layer table holds a sensitivity."""
    figures = {
        "score_by_depth": score_by_depth(layers, plan.score),
        "spectra": spectra_figure(layers, spectra),
        "rank_decay": rank_decay(layers, spectra),
        "histogram": score_histogram(layers, plan.score, cut_of(layers, plan), plan.direction),
        "plan_map": plan_map(layers, plan),
    }
    if sensitivity_column(layers) is not None:
        figures["sensitivity"] = score_against_sensitivity(layers, plan.score)
        used = {*plan.formats.values(), "16bit"}
        formats = tuple(used if len(used) > 1 else {"nf4", "16bit"})
        wishes: dict[str, Any] = {
            name: plan.options.get(name) for name in ("group", "force_16bit", "forbid_16bit")
        }
        curves = frontier(layers, formats=formats, double_quant=plan.double_quant, **wishes)
        if curves["predicted_kl"].notna().any():
            figures["frontier"] = frontier_figure(layers, plan, curves)
    return figures


def cut_of(layers: pd.DataFrame, plan: ProtectionPlan) -> float | None:
    """The score where a plan's protected layers begin; None if no threshold separates them from the rest."""
    values = planned_values(layers, plan.score)
    scored = np.isfinite(values)
    kept = planned_layers(layers)["name"].isin(plan.protected).to_numpy()[scored]
    values = values[scored]
    if not kept.any():
        return None
    cut = float(values[kept].min() if plan.direction == "high" else values[kept].max())
    beyond = values >= cut if plan.direction == "high" else values <= cut
    return cut if (beyond == kept).all() else None


def show(figures: Mapping[str, Path], name: str) -> Image:
    """A saved figure, to be the last line of a notebook cell.

    Raises:
        RunError: this run's data don't allow that figure; says what to run.
    """
    from IPython.display import Image

    if name not in figures:
        raise RunError(
            f"there is no figure {name!r} in this run; it has {', '.join(figures)}. `sensitivity` and "
            "`frontier` need notebook 01_analyze with sensitivity='self'."
        )
    return Image(filename=str(figures[name]))
