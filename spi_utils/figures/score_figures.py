"""Figures of a score over the layers: by depth and type, its histogram, and against what quantizing costs.

Titles state what these data show, computed from them. Layers whose score failed are drawn hollow and counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spi_utils.errors import AnalysisError
from spi_utils.figures.plotting import (
    BLACK,
    VERMILLION,
    failed_note,
    headline,
    hollow_row,
    legend_labels,
    new_figure,
    score_label,
    signed,
    styled,
    type_styles,
)
from spi_utils.plan import score_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from spi_utils.figures.plotting import TypeStyle

SHAPES_SHOWN = 10
LINES_UP_TO = 150  # blocks; above, lines between points only hide each other


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


def planned_values(layers: pd.DataFrame, score: str) -> NDArray[np.float64]:
    """A score's values for the rows of `planned_layers`, float64 (L,).

    Raises:
        PlanError: unknown score, or the table lacks its column.
    """
    return score_values(layers, score)[layers["quantizable"].to_numpy(bool)]


def is_wide(values: NDArray[np.float64]) -> bool:
    """Whether values (L,) want a logarithmic axis: all positive, most of them in the lowest thirtieth."""
    finite = values[np.isfinite(values)]
    return bool(len(finite) and finite.min() > 0 and finite.max() > 30 * np.quantile(finite, 0.05))


def between_share(values: NDArray[np.float64], groups: pd.Series) -> float:
    """Share of the variance of values (L,) that lies between groups (L,), η²; NaN where all are equal."""
    finite = np.isfinite(values)
    values, groups = values[finite], groups[finite]
    total = ((values - values.mean()) ** 2).sum() if len(values) else 0.0
    if total <= 1e-12 * max(1.0, float((values**2).sum())):
        return float("nan")
    means = pd.Series(values).groupby(groups.to_numpy()).transform("mean").to_numpy()
    return float(((means - values.mean()) ** 2).sum() / total)


def rank_correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Spearman's ρ of the pairs in x (L,) and y (L,) that are finite; NaN below three or without spread."""
    both = np.isfinite(x) & np.isfinite(y)
    if both.sum() < 3 or np.ptp(x[both]) == 0 or np.ptp(y[both]) == 0:
        return float("nan")
    return float(pd.Series(x[both]).rank().corr(pd.Series(y[both]).rank()))


# --- the score over depth, type and shape ----------------------------------------------------------------


@styled
def score_by_depth(layers: pd.DataFrame, score: str = "alpha_hill") -> Figure:
    """A score against depth, a colour and marker for each layer type."""
    planned = planned_layers(layers)
    values = planned_values(layers, score)
    figure = new_figure()
    axes = figure.add_subplot()
    _points_by_type(axes, planned, values)
    hollow_row(axes, planned["depth"].to_numpy(float)[~np.isfinite(values)])
    axes.set(xlabel="depth (block)", ylabel=score_label(score), yscale="log" if is_wide(values) else "linear")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.legend(loc="outside right center")
    share = between_share(values, planned["type"])
    name = score_symbol(score)
    finding = (
        f"{share:.0%} of the spread of {name} lies between layer types, {1 - share:.0%} within them"
        if np.isfinite(share)
        else _no_spread(values, score)
    )
    headline(figure, finding, failed_note(values))
    return figure


def _points_by_type(axes: Axes, planned: pd.DataFrame, values: NDArray[np.float64]) -> None:
    styles = type_styles(planned["type"])
    labels = legend_labels(styles)
    said: set[str] = set()
    size = float(np.clip(900 / len(planned), 1.5, 5))
    for name, style in styles.items():
        of_type = (planned["type"] == name).to_numpy() & np.isfinite(values)
        depth, value = planned["depth"].to_numpy()[of_type], values[of_type]
        axes.plot(
            depth,
            value,
            style.marker,
            color=style.colour,
            ls="-" if len(set(depth)) == len(depth) <= LINES_UP_TO else "",
            lw=0.8,
            ms=size,
            label=labels[name] if labels[name] not in said else None,
            rasterized=len(planned) > 2000,
        )
        said.add(labels[name])


def _no_spread(values: NDArray[np.float64], score: str) -> str:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return f"No layer has a finite {score_symbol(score)}"
    same = f"All {len(finite)} layers have" if len(finite) > 1 else "The only layer has"
    return f"{same} {score_symbol(score)} = {finite[0]:.4g}"


def score_symbol(score: str) -> str:
    """A score in running text: "α" for the exponents of the spectrum's tail, else its label without unit."""
    return "α" if score.startswith("alpha_") and score != "alpha_decay" else score_label(score).split(" (")[0]


@styled
def score_histogram(
    layers: pd.DataFrame, score: str = "alpha_hill", threshold: float | None = None, direction: str = "high"
) -> Figure:
    """The histogram of a score with the threshold; for Hill's α also what Gaussian noise of each shape gives.

    Args:
        threshold: score units; layers at it or beyond, in `direction`, are protected.
    """
    planned = planned_layers(layers)
    values = planned_values(layers, score)
    null = _gaussian_null(planned) if score == "alpha_hill" else None
    figure = new_figure(height=6.2 if null is not None else 4.0)
    ratios = [1.0] if null is None else [1.25, 1.0]
    panels = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios, squeeze=False)[:, 0]
    _stacked_histogram(panels[0], planned, values)
    figure.legend(loc="outside right center")
    panels[0].set(ylabel="layers")
    panels[-1].set(xlabel=score_label(score), xscale="log" if is_wide(values) else "linear")
    detail = failed_note(values)
    if null is not None:
        _shapes_against_null(panels[1], planned, values, null)
        detail = f"Diamonds: mean of Gaussian matrices of that shape, bar ±2 sd. {detail}".strip()
    if threshold is not None:
        for panel in panels:
            panel.axvline(threshold, color=VERMILLION, lw=1.8, zorder=4)
        _name_side(panels[0], threshold, direction)
    headline(figure, _histogram_finding(planned, values, null, score, threshold, direction), detail)
    return figure


def _stacked_histogram(axes: Axes, planned: pd.DataFrame, values: NDArray[np.float64]) -> None:
    styles = type_styles(planned["type"])
    labels = legend_labels(styles)
    finite = np.isfinite(values)
    groups: dict[str, list[NDArray[np.float64]]] = {label: [] for label in labels.values()}
    for name, label in labels.items():
        groups[label].append(values[(planned["type"] == name).to_numpy() & finite])
    colours = {labels[name]: style.colour for name, style in styles.items()}
    axes.hist(
        [np.concatenate(parts) for parts in groups.values()],
        bins=list(histogram_edges(values)),
        stacked=True,
        color=[colours[label] for label in groups],
        label=list(groups),
        edgecolor="white",
        linewidth=0.4,
    )
    axes.margins(y=0.18)  # room for the threshold's label


def histogram_edges(values: NDArray[np.float64], bins: int = 40) -> NDArray[np.float64]:
    """Bin edges (bins+1,) over the finite values (L,); a narrow range around a single value."""
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        pad = max(abs(low) * 0.05, 1e-12)
        low, high = low - pad, high + pad
    if is_wide(values):
        return np.geomspace(low, high, bins + 1)
    return np.linspace(low, high, bins + 1)


def _name_side(axes: Axes, threshold: float, direction: str) -> None:
    high = direction == "high"
    axes.annotate(
        f"kept in 16-bit {'→' if high else ''}" if high else "← kept in 16-bit",
        (threshold, 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(6 if high else -6, 0),
        textcoords="offset points",
        ha="left" if high else "right",
        va="top",
        color=VERMILLION,
        fontsize=9,
        fontweight="bold",
        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5},
    )


def _gaussian_null(planned: pd.DataFrame) -> pd.DataFrame | None:
    """Mean and standard deviation of Hill's α on Gaussian matrices of each layer's shape, from the table."""
    if not {"alpha_excess", "alpha_excess_z"} <= set(planned) or planned["alpha_excess"].isna().all():
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        sd = planned["alpha_excess"] / planned["alpha_excess_z"]
    return pd.DataFrame(
        {
            "shape": planned["rows"].astype(str) + "×" + planned["cols"].astype(str),
            "mean": planned["alpha_hill"] - planned["alpha_excess"],
            "sd": sd.where(np.isfinite(sd)),
        }
    )


def _shapes_against_null(
    axes: Axes, planned: pd.DataFrame, values: NDArray[np.float64], null: pd.DataFrame
) -> None:
    by_shape = null.assign(value=values, type=planned["type"]).groupby("shape", sort=False)
    shapes = by_shape["mean"].median().loc[by_shape.size().nlargest(SHAPES_SHOWN).index].sort_values()
    styles = type_styles(planned["type"])
    for height, shape in enumerate(shapes.index):
        group = by_shape.get_group(shape)
        # A fixed sawtooth keeps equal values apart without randomness.
        jitter = 0.28 * ((np.arange(len(group)) * 0.618) % 1 - 0.5)
        for name, members in group.assign(y=height + jitter).groupby("type", sort=False):
            style: TypeStyle = styles[str(name)]
            axes.plot(
                members["value"], members["y"], style.marker, color=style.colour, ms=3.5, alpha=0.8, zorder=6
            )
        spread = 2 * float(np.nan_to_num(group["sd"].abs().median()))
        for colour, width in (("white", 5.0), (BLACK, 1.6)):
            axes.errorbar(
                shapes[shape],
                height,
                xerr=spread,
                fmt="D",
                color=colour,
                elinewidth=width,
                ms=6,
                mfc="white",
                capsize=3 * (colour == BLACK),
                zorder=5,
            )
    counts = by_shape.size()
    axes.set_yticks(range(len(shapes)), [f"{shape}  ({counts[shape]})" for shape in shapes.index])
    axes.set(ylabel="shape (layers)", ylim=(-0.6, len(shapes) - 0.4))


def _histogram_finding(
    planned: pd.DataFrame,
    values: NDArray[np.float64],
    null: pd.DataFrame | None,
    score: str,
    threshold: float | None,
    direction: str,
) -> str:
    parts = []
    if threshold is not None:
        beyond = values >= threshold if direction == "high" else values <= threshold
        kept = int(beyond.sum())
        sign = "≥" if direction == "high" else "≤"
        parts.append(
            f"{score_symbol(score)} {sign} {threshold:.4g} keeps {kept} of {len(values)} layers in 16-bit"
        )
    if null is not None:
        rho = rank_correlation(values, null["mean"].to_numpy(float))
        parts.append(
            f"its rank correlation with Gaussian noise of the same shapes is ρ = {signed(rho)}"
            if np.isfinite(rho)
            else "all layers have one shape, so shape explains nothing here"
        )
    if not parts:
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if len(finite) else (np.nan, np.nan)
        parts.append(f"{score_symbol(score)} runs from {low:.3g} to {high:.3g}")
    return "; ".join(parts)
