"""Figures of single layers' spectra: the eigenvalues' density with its fitted tail, and the rank decay."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from spi_utils.errors import AnalysisError
from spi_utils.figures.plotting import (
    BLUE,
    GREY,
    SKY,
    VERMILLION,
    headline,
    new_figure,
    shorten,
    styled,
    type_styles,
)
from spi_utils.figures.score_figures import planned_layers, planned_values

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Spectra = Mapping[str, NDArray[np.float64]]

LINES = ("-", "--", "-.", (0, (1, 1)))
SMALLEST_EIGENVALUE = (
    1e-5  # what the fit drops (WeightWatcher's cut), so that the drawn density is the fitted one
)


def pick_layers(layers: pd.DataFrame, score: str = "alpha_hill", count: int = 3) -> list[str]:
    """Names of `count` layers spread evenly over a score's ranks, the lowest and the highest among them."""
    planned = planned_layers(layers)
    values = planned_values(layers, score)
    order = np.argsort(values, kind="stable")[: int(np.isfinite(values).sum())]
    places = np.unique(np.linspace(0, len(order) - 1, count).round().astype(int)) if len(order) else order
    return [str(planned["name"].iloc[order[place]]) for place in places]


def layer_title(row: pd.Series, limit: int = 30) -> str:
    """A layer by type and block: "down_proj, block 3"."""
    place = f", block {row['depth']}" if row["depth"] >= 0 else ""
    return f"{shorten(str(row['type']), limit)}{place}"


def _rows(layers: pd.DataFrame, spectra: Spectra, names: Sequence[str]) -> list[pd.Series]:
    known = layers.set_index("name", drop=False)
    missing = [name for name in names if name not in known.index or name not in spectra]
    if not names:
        raise AnalysisError("no layer has a finite score, so there is no spectrum to choose.")
    if missing:
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
    rows = _rows(layers, spectra, pick_layers(_sound(layers), "alpha_pl") if names is None else names)
    columns = min(len(rows), 3)
    lines = -(-len(rows) // columns)
    figure = new_figure(height=1.0 + 3.3 * lines)
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes, row in zip(panels.flat, rows, strict=False):
        draw_density(axes, spectra[row["name"]], row)
        axes.set_title(layer_title(row), fontsize=10, loc="left")
    for axes in panels.flat[len(rows) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("density of eigenvalues")
    headline(
        figure,
        _density_finding(rows),
        "Of the layers whose fit is sound. Dashed: xmin, where the fitted tail begins. KS: largest distance "
        "of fit and data. Hill's α, of the top tenth, is what the other figures show."
        if names is None
        else "Dashed: xmin, where the fitted tail begins. KS: largest distance of fit and data.",
    )
    return figure


def draw_density(axes: Axes, singular_values: NDArray[np.float64], row: pd.Series) -> None:
    """Draw one layer's ESD and its fit, taken from the layer table's `alpha_pl` columns, on `axes`."""
    eigenvalues = eigenvalues_of(singular_values)
    axes.set(xlabel="eigenvalue λ = σ²")
    if len(eigenvalues) < 2 or np.ptp(eigenvalues) == 0:
        axes.text(0.5, 0.5, "no spread of eigenvalues", transform=axes.transAxes, ha="center", color=GREY)
        return
    edges, density = density_of(eigenvalues)
    filled = density > 0
    axes.set(xscale="log", yscale="log", ylim=(density[filled].min() / 4, density.max() * 4))
    axes.stairs(density, edges, fill=True, color=SKY, alpha=0.45)
    axes.stairs(density, edges, color=BLUE, lw=1)
    alpha, xmin, tail = (float(row[f"alpha_pl{part}"]) for part in ("", "_xmin", "_tail"))
    if not np.isfinite([alpha, xmin, tail]).all() or xmin <= 0:
        _note(axes, "no fit")
        return
    x = np.geomspace(xmin, eigenvalues.max(), 50)
    # A power law from xmin on, scaled to the tail's share of all eigenvalues.
    axes.plot(
        x,
        tail / len(eigenvalues) * (alpha - 1) / xmin * (x / xmin) ** -alpha,
        color=VERMILLION,
        lw=2,
    )
    axes.axvline(xmin, color=VERMILLION, lw=1, ls="--")
    _note(axes, _fit_text(row, len(eigenvalues)))


def eigenvalues_of(singular_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The eigenvalues that a fit sees: squares of the singular values, finite and not vanishing."""
    eigenvalues = np.square(np.asarray(singular_values, dtype=np.float64))
    return eigenvalues[np.isfinite(eigenvalues) & (eigenvalues > SMALLEST_EIGENVALUE)]


def density_of(
    eigenvalues: NDArray[np.float64], bins: int = 35
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Edges (bins+1,), evenly spaced in the logarithm, and the density in each bin (bins,)."""
    edges = np.geomspace(eigenvalues.min(), eigenvalues.max() * (1 + 1e-9), bins + 1)
    counts, _ = np.histogram(eigenvalues, edges)
    return edges, counts / (len(eigenvalues) * np.diff(edges))


def _fit_text(row: pd.Series, count: int) -> str:
    sigma = row.get("alpha_pl_sigma", np.nan)
    error = f" ± {sigma:.2f}" if np.isfinite(sigma) else ""
    hill = f"α Hill {row['alpha_hill']:.2f}\n" if np.isfinite(row.get("alpha_hill", np.nan)) else ""
    short = " (short)" if row["alpha_pl_tail"] < 50 else ""
    return (
        f"α Clauset {row['alpha_pl']:.2f}{error}\n{hill}"
        f"KS {row['alpha_pl_ks']:.3f}, xmin {row['alpha_pl_xmin']:.3g}\n"
        f"tail {int(row['alpha_pl_tail'])} of {count}{short}"
    )


def _note(axes: Axes, text: str) -> None:
    box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 2}
    axes.text(0.04, 0.04, text, transform=axes.transAxes, fontsize=9, va="bottom", bbox=box, linespacing=1.3)


def _density_finding(rows: Sequence[pd.Series]) -> str:
    """The ends of Clauset's α among the layers drawn, sound fits only where there are two."""
    fitted = [row for row in rows if np.isfinite(row["alpha_pl"])]
    sound = [row for row in fitted if row["status"] == "ok"]
    ranked = sorted(sound if len(sound) > 1 else fitted, key=lambda row: row["alpha_pl"])
    if len(ranked) < 2:
        return f"The spectrum of {layer_title(rows[0])}"
    low, high = ranked[0], ranked[-1]
    return (
        f"From compact to flat: Clauset's α is {low['alpha_pl']:.2f} in {layer_title(low)} "
        f"and {high['alpha_pl']:.2f} in {layer_title(high)}"
    )


def _sound(layers: pd.DataFrame) -> pd.DataFrame:
    """The layers whose fit is sound, if at least three are, else all: a tail of nine values has no α."""
    sound = layers[layers["status"] == "ok"]
    return sound if sound["quantizable"].sum() >= 3 else layers


@styled
def rank_decay(layers: pd.DataFrame, spectra: Spectra, names: Sequence[str] | None = None) -> Figure:
    """Singular values against their rank on log-log axes, with the least-squares decay of each layer.

    Args:
        spectra: name -> singular values, descending.
        names: layers to draw; by default five spread over the decay exponents.

    Raises:
        AnalysisError: a name has no spectrum.
    """
    rows = _rows(layers, spectra, pick_layers(layers, "alpha_decay", 5) if names is None else names)
    figure = new_figure()
    axes = figure.add_subplot()
    decays = {}
    styles = type_styles(planned_layers(layers)["type"])
    for place, row in enumerate(rows):
        sigma = np.asarray(spectra[row["name"]], dtype=np.float64)
        sigma = sigma[np.isfinite(sigma) & (sigma > 0)]
        colour, relative = styles[row["type"]].colour, sigma / sigma[0]
        # Two layers of one type share its colour, as in every figure, and differ by their line.
        line_style = LINES[[other["type"] for other in rows[:place]].count(row["type"]) % len(LINES)]
        exponent, line = _decay(relative)
        decays[layer_title(row)] = exponent
        label = f"{layer_title(row)}: a = {exponent:.2f}"
        axes.plot(np.arange(1, len(sigma) + 1), relative, color=colour, lw=1.8, ls=line_style, label=label)
        axes.plot(*line, color=colour, lw=1, ls=":")
    axes.set(xscale="log", yscale="log", xlabel="rank k", ylabel="singular value σₖ / σ₁")
    figure.legend(loc="outside right center")
    headline(
        figure,
        _decay_finding(decays),
        "Dotted: slope −a, fitted over k = 2 … M/2. Large a: compact.",
    )
    return figure


def _decay(sigma: NDArray[np.float64]) -> tuple[float, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Exponent a of sigma (M,) ~ k^-a over k = 2…M/2, and the fitted line's points; NaN below four values."""
    ranks = np.arange(2, len(sigma) // 2 + 1, dtype=np.float64)
    if len(ranks) < 2:
        return float("nan"), (np.empty(0), np.empty(0))
    slope, level = np.polyfit(np.log(ranks), np.log(sigma[1 : len(sigma) // 2]), 1)
    return -float(slope), (ranks, np.exp(level) * ranks**slope)


def _decay_finding(decays: Mapping[str, float]) -> str:
    finite = {name: value for name, value in decays.items() if np.isfinite(value)}
    if len(finite) < 2:
        return f"Rank decay of {', '.join(decays)}"
    fast, slow = max(finite, key=lambda name: finite[name]), min(finite, key=lambda name: finite[name])
    return (
        f"Singular values fall with exponent {finite[fast]:.2f} in {fast} "
        f"and {finite[slow]:.2f} in {slow}: the second spectrum is the flatter one"
    )


@styled
def single_spectrum(layers: pd.DataFrame, spectra: Spectra, name: str) -> Figure:
    """One layer's eigenvalue density with its fit, and its rank decay; says so where the analysis failed."""
    figure = new_figure(10.0, 3.4)
    row = layers[layers["name"] == name].iloc[0]
    left, right = figure.subplots(1, 2)
    if name not in spectra:
        for axes in (left, right):
            axes.set_axis_off()
        left.text(
            0.0, 0.5, f"no spectrum: the analysis of this layer is marked {row['status']!r}", color=GREY
        )
    else:
        draw_density(left, spectra[name], row)
        left.set_ylabel("density of eigenvalues")
        _draw_decay(right, spectra[name])
    headline(figure, f"Layer {shorten(name, 64)}  ({row['rows']} × {row['cols']}, {row['status']})")
    return figure


def _draw_decay(axes: Axes, singular_values: NDArray[np.float64]) -> None:
    sigma = np.asarray(singular_values, dtype=np.float64)
    sigma = sigma[np.isfinite(sigma) & (sigma > 0)]
    exponent, (ranks, line) = _decay(sigma)
    axes.plot(np.arange(1, len(sigma) + 1), sigma, color=BLUE, lw=1.8)
    axes.plot(ranks, line, color=VERMILLION, lw=1.5, ls="--")
    axes.set(xscale="log", yscale="log", xlabel="rank k", ylabel="singular value σₖ")
    _note(axes, f"slope −a with a = {exponent:.2f}" if np.isfinite(exponent) else "too few values for a fit")
