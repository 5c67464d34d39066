"""The Vega-Lite charts of the kernel-less explorer, made with Altair; the page feeds them data by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from spi_utils.figures.plotting import BLUE, FORMAT_COLOURS, SKY, VERMILLION
from spi_utils.planning.scores import score_values

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from spi_utils.explorer.state import ExplorerState

KEPT, REST, NO_SCORE = FORMAT_COLOURS["16bit"], "#A9C6DA", "#8A8A8A"
FAILED = {"16-bit, analysis failed": "transparent"}  # drawn hollow
KL = "predicted KL (nats a token)"
# Parameters that the page sets to its theme's: dark on light, light on dark. (`top` is the tallest bar.)
INK, LINE = {"expr": "ink"}, {"expr": "line"}
# Vega writes 0.000001; "1e−6" can be read.
LABELS = (
    "datum.label !== '' && datum.value !== 0 && (abs(datum.value) < 0.001 || abs(datum.value) >= 1e5)"
    " ? replace(format(datum.value, '~e'), 'e-', 'e−') : datum.label"
)


def threshold_values(state: ExplorerState, score: str) -> NDArray[np.float64]:
    """A score as a threshold sees it, (L,): a group's mean over its weights; NaN where none can choose."""
    options: dict[str, Any] = {"formats": state.formats, "double_quant": state.double_quant}
    own = score_values(state.layers, score, seed=state.wishes.seed, **options)
    own = own[state.layers["quantizable"].to_numpy(bool)]
    member, weights = state.chooser.problem.member, state.planned["numel"].to_numpy(float)
    mean = np.bincount(member, own * weights) / np.bincount(member, weights)
    return np.where(state.chooser.settled, np.nan, mean[member])


def chart_specs(state: ExplorerState, map_height: int) -> dict[str, Any]:
    """Element id -> Vega-Lite specification, without data; `map_height` in pixels."""
    charts = {"histogram": _histogram(state), "map": _map(state, map_height), "spectrum": _spectrum()}
    if state.field is not None:
        charts["frontier"] = _frontier(state.unit[1])
    fit = {"type": "fit", "contains": "padding"}
    specs = {
        name: chart.properties(width="container", autosize=fit).to_dict() for name, chart in charts.items()
    }
    theme = [{"name": "ink", "value": "black"}, {"name": "line", "value": BLUE}, {"name": "top", "value": 1}]
    return {name: spec | {"params": theme} for name, spec in specs.items()}


def _scale(alt: Any, states: Iterable[str], colours: Iterable[str]) -> Any:
    return alt.Scale(domain=list(states), range=list(colours))


def _histogram(state: ExplorerState) -> Any:
    import altair as alt

    states = {"16-bit": KEPT, state.rest: REST}

    bars = (
        alt.Chart(alt.NamedData("bins"))
        .mark_rect()
        .encode(
            x=alt.X("left:Q", title=None, axis=alt.Axis(labelExpr=LABELS), scale=alt.Scale(nice=False)),
            x2="right:Q",
            y=alt.Y(
                "low:Q",
                title="layers",
                axis=alt.Axis(tickMinStep=1, tickCount=5),
                scale=alt.Scale(domainMin=0, domainMax={"expr": "top"}),
            ),
            y2="high:Q",
            color=alt.Color("state:N", scale=_scale(alt, states, states.values()), legend=None),
            tooltip=[alt.Tooltip("count:Q", title="layers"), "state:N"],
        )
    )
    cut = alt.Chart(alt.NamedData("cut")).mark_rule(strokeWidth=2, color=INK).encode(x=alt.X("threshold:Q"))
    return (bars + cut).properties(height=230)


def _frontier(unit: str) -> Any:
    import altair as alt

    size = alt.X("size:Q", title=f"model size ({unit})", scale=alt.Scale(zero=False))
    kl = alt.Y("kl:Q", title=KL)
    band = alt.Chart(alt.NamedData("band"))
    area = band.mark_area(color="#9A9A9A", opacity=0.45).encode(
        x=size, y=alt.Y("low:Q", title=KL, scale=alt.Scale(domainMin=0)), y2="high:Q"
    )
    best = band.mark_line(strokeDash=[5, 4], strokeWidth=1.8, color=INK).encode(x=size, y="optimum:Q")
    curve = alt.Chart(alt.NamedData("curve")).mark_line(color=LINE, strokeWidth=2.2).encode(x=size, y=kl)
    point = (
        alt.Chart(alt.NamedData("point"))
        .mark_point(filled=True, size=130, color=VERMILLION, opacity=1)
        .encode(
            x=size,
            y=kl,
            tooltip=[alt.Tooltip("size:Q", format=".3~r", title=unit), alt.Tooltip("kl:Q", format=".4g")],
        )
    )
    return (area + best + curve + point).properties(height=230)


def _map(state: ExplorerState, height: int) -> Any:
    import altair as alt

    free = ~state.chooser.settled
    missing = not all(np.isfinite(threshold_values(state, name)[free]).all() for name in state.scores)
    states = {"16-bit": KEPT, state.rest: REST} | ({f"{state.rest}, no score": NO_SCORE} if missing else {})
    states |= FAILED if state.wishes.held else {}
    outlines = [KEPT if name in FAILED else "white" for name in states]
    key = alt.Legend(title=None, orient="top")  # one legend: fill and outline share field and title
    blocks = alt.Axis(labelOverlap=True, labelAngle=0, ticks=False)
    return (
        alt.Chart(alt.NamedData("layers"))
        .mark_rect(
            strokeWidth=alt.expr("indexof(datum.state, 'failed') < 0 ? 0.5 : 2.5"),
            cursor="pointer",
            tooltip=alt.expr("datum.tip"),  # its rows depend on the score, which a list of fields can't
        )
        .encode(
            x=alt.X("depth:O", title="depth (block)", axis=blocks),
            y=alt.Y("label:N", title=None, sort=None, axis=alt.Axis(ticks=False, domain=False)),
            fill=alt.Fill("state:N", scale=_scale(alt, states, states.values()), legend=key),
            stroke=alt.Stroke("state:N", scale=_scale(alt, states, outlines), legend=key),
        )
        .properties(height=height)
    )


def _spectrum() -> Any:
    import altair as alt

    log = alt.Scale(type="log", nice=False)
    axis = alt.Axis(format="~g", tickCount=5, grid=False, labelExpr=LABELS)
    bars = (
        alt.Chart(alt.NamedData("bars"))
        .mark_rect(color=SKY, opacity=0.75)
        .encode(
            x=alt.X("left:Q", scale=log, title="eigenvalue λ = σ²", axis=axis),
            x2="right:Q",
            y=alt.Y("floor:Q", scale=log, title="density", axis=axis),
            y2="density:Q",
        )
    )
    fit = alt.Chart(alt.NamedData("fit")).mark_line(color=VERMILLION, strokeWidth=2.5)
    fit = fit.encode(x=alt.X("x:Q", scale=log), y=alt.Y("density:Q", scale=log))
    return (bars + fit).properties(height=230)
