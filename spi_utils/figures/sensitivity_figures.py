"""How far a score tells which layers are costly to quantize: over all layers, and within each layer type."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spi_utils.errors import AnalysisError
from spi_utils.figures.plotting import (
    GREY,
    headline,
    new_figure,
    score_label,
    shorten,
    signed,
    styled,
    type_styles,
)
from spi_utils.figures.score_figures import planned_layers, planned_values, rank_correlation, score_symbol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray


# Sensitivity columns, the best first, as an axis names them.
COST_NAMES = {"measured_nf4": "measured", "refined_nf4": "refined", "fisher_nf4": "Fisher"}


def sensitivity_column(layers: pd.DataFrame) -> str | None:
    """The best sensitivity that the table holds: measured before refined before Fisher; None without any."""
    for name in COST_NAMES:
        if name in layers and np.isfinite(layers.loc[layers["quantizable"], name]).sum() >= 1:
            return name
    return None


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
    values, cost = planned_values(layers, score), planned[column].to_numpy(float)
    cost = np.where(cost > 0, cost, np.nan)  # the axis is logarithmic
    figure = new_figure(height=4.8)
    left, right = figure.subplots(1, 2, width_ratios=[1.7, 1])
    _scatter_by_type(left, planned, values, cost)
    left.set(xlabel=score_label(score), ylabel=f"{COST_NAMES[column]} cost in NF4 (nats a token)")
    if (np.isfinite(cost) & np.isfinite(values)).any():
        left.set_yscale("log")
    within = _correlations_by_type(planned, values, cost)
    overall = rank_correlation(values, cost)
    _draw_correlations(right, planned, within, overall)
    lost = ~(np.isfinite(values) & np.isfinite(cost))
    note = f"{lost.sum()} layers without both values are left out. " if lost.any() else ""
    headline(
        figure,
        _correlation_finding(score_symbol(score), overall, within),
        f"{note}ρ is Spearman's; colours are those of the right panel.",
    )
    return figure


def _scatter_by_type(
    axes: Axes, planned: pd.DataFrame, values: NDArray[np.float64], cost: NDArray[np.float64]
) -> None:
    size = float(np.clip(1200 / len(planned), 1.5, 5))
    for name, style in type_styles(planned["type"]).items():
        of_type = (planned["type"] == name).to_numpy()
        axes.plot(
            values[of_type],
            cost[of_type],
            style.marker,
            color=style.colour,
            ms=size,
            alpha=0.85,
            rasterized=len(planned) > 2000,
        )


def _correlations_by_type(
    planned: pd.DataFrame, values: NDArray[np.float64], cost: NDArray[np.float64]
) -> dict[str, float]:
    types = planned["type"].to_numpy()
    return {
        name: rank_correlation(values[types == name], cost[types == name]) for name in dict.fromkeys(types)
    }


def _draw_correlations(
    axes: Axes, planned: pd.DataFrame, within: Mapping[str, float], overall: float
) -> None:
    styles = type_styles(planned["type"])
    shown = [name for name in within if styles[name].marker != "."][::-1]
    for height, name in enumerate(shown):
        axes.plot([0, within[name]], [height, height], color=styles[name].colour, lw=2)
        axes.plot(within[name], height, styles[name].marker, color=styles[name].colour, ms=7)
    # Hollow and grey: no type looks so, though black is down_proj's.
    axes.plot([0, overall], [len(shown)] * 2, color=GREY, lw=4, alpha=0.5)
    axes.plot(overall, len(shown), "o", color=GREY, mfc="white", mew=2, ms=9)
    counts = planned["type"].value_counts()
    labels = [f"{shorten(name, 22)} ({counts[name]})" for name in shown]
    axes.set_yticks(range(len(shown) + 1), [*labels, f"all layers ({len(planned)})"])
    axes.axvline(0, color=GREY, lw=1)
    axes.set(xlim=(-1.05, 1.05), xlabel="Spearman's ρ")
    axes.grid(axis="y", visible=False)


def _correlation_finding(name: str, overall: float, within: Mapping[str, float]) -> str:
    inside = [rho for rho in within.values() if np.isfinite(rho)]
    if not np.isfinite(overall):
        return f"Too few layers, or no spread: no rank correlation between {name} and cost"
    if not inside:
        return f"{name} ranks the layers' cost with ρ = {signed(overall)}"
    middle = float(np.median(inside))
    end = ": it mostly tells types apart" if abs(middle) < abs(overall) / 2 else ""
    return (
        f"{name} ranks the layers' cost with ρ = {signed(overall)} overall, but {signed(min(inside))} to "
        f"{signed(max(inside))} within a type (median {signed(middle)}){end}"
    )
