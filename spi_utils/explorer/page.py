"""The explorer without a kernel: one self-contained HTML file, scripts inline, opens offline.

This module writes the data, charts.py the four Vega-Lite charts; page.js turns the controls
and adds up the consequences with plan.py's sums; page.html holds it all.
"""

from __future__ import annotations

import html
import json
import re
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from spi_utils.explorer.charts import FAILED, chart_specs, threshold_values
from spi_utils.explorer.state import TIES, ExplorerState, three_digits
from spi_utils.figures.plan_figures import FORMAT_LABELS
from spi_utils.figures.plotting import score_label, short_label, shorten
from spi_utils.figures.score_figures import is_wide
from spi_utils.figures.spectrum_figures import density_of, eigenvalues_of
from spi_utils.planning.pricing import header_bytes, payload_bytes
from spi_utils.planning.scores import predicted_cost, score_row
from spi_utils.runs import run_info, write_text

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

    from spi_utils.runs import Run

SCRIPTS = "window.vegaEmbed = vegaEmbed;"  # what the bundle gives the page
SPECTRA_UP_TO = 1000  # layers; beyond, the file would grow past what an e-mail carries
# spectra.py's status in words: what is to be thought of Clauset's α.
FITS = {
    "few_values": "rough: few eigenvalues",
    "short_tail": "rough: few values in the tail",
    "poor_fit": "doubtful: no power law",
    "failed": "analysis failed",
    "listed": "not analysed",
}
DIGITS = 5  # significant digits of what is only shown; scores keep all, as thresholds are compared with them


def write_explorer(run: Run, **options: Any) -> Path:
    """Write the run's explorer.html and return its path.

    Args:
        options: `score`, `direction`, `share`, `lower` and `double_quant` to start from,
            as `ExplorerState.open`.

    Raises:
        RunError: no analysis in this run; says which notebook to run.
    """
    state = ExplorerState.open(run, **options)
    write_text(run.explorer, explorer_html(state, str(run_info(run)["model"]["id"])))
    return run.explorer


def explorer_html(state: ExplorerState, model: str) -> str:
    """The page for one layer table, starting at the state's choice. `model` is its heading."""
    files = resources.files("spi_utils.explorer")
    height = 70 + 24 * len(state.grid.types)
    parts = {
        "__TITLE__": html.escape(f"{model}: what stays in 16-bit"),
        "__UNIT__": state.unit[1],
        "__LOWER__": html.escape(FORMAT_LABELS[state.lower]),
        "__BUNDLE__": _scripts(),
        "__DATA__": _json(page_data(state)),
        "__SPECS__": _json(chart_specs(state, height)),
        "__SCRIPT__": files.joinpath("page.js").read_text(encoding="utf-8"),
    }
    page = files.joinpath("page.html").read_text(encoding="utf-8")
    # One pass, so that nothing inside a part is taken for a mark.
    return re.sub("|".join(parts), lambda mark: parts[mark.group()], page)


@cache
def _scripts() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, about 0.9 MB."""
    import vl_convert

    return vl_convert.javascript_bundle(SCRIPTS).replace("</script", "<\\/script")


def page_data(state: ExplorerState) -> dict[str, Any]:
    """What page.js reads as DATA: layers, scores, and the summands of bytes and KL."""
    chooser = state.chooser
    data_extra, header_extra, kl = _steps(state)
    size_base = int(chooser.file_bytes[0])
    return {
        "rest": state.rest,
        "start": {"score": state.score, "direction": state.direction, "threshold": state.threshold},
        "facts": [[column, title] for column, title, _ in _facts(state)],
        "layers": _layers(state),
        "item": chooser.problem.member.tolist(),
        "scores": {name: _score(state, name, title) for name, title in state.scores.items()},
        "size_base": size_base,
        "size_full": state.choice.total_bytes + state.choice.saved_bytes,
        "size_extra": (data_extra + header_extra).tolist(),
        "header_base": size_base - int(chooser.data_bytes[0]),
        "header_extra": header_extra.tolist(),
        "weights": chooser.all_weights,
        "settled": _settled(state),
        "held": int(chooser.held.sum()),
        "failed": state.wishes.count(),
        "notes": state.notes(),
        "ties": TIES,
        "unit": state.unit,
        "kl": kl.tolist() if np.isfinite(kl).all() else None,
        "frontier": _frontier(state),
        "spectra": _spectra(state),
    }


def _steps(state: ExplorerState) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Per planned layer (L,): bytes of data and of header from the lower format to 16-bit, and its KL.

    Of a layer that a threshold can't move, only what it costs where it is.
    """
    rows, low, dq = state.planned, state.lower, state.double_quant
    names = list(rows["name"])
    data = payload_bytes(rows, "16bit", dq) - payload_bytes(rows, low, dq)
    header = header_bytes(names, "16bit", dq) - header_bytes(names, low, dq)
    kl = np.where(state.chooser.held, 0.0, predicted_cost(rows, low))
    return data, header, kl


def _settled(state: ExplorerState) -> list[str | None]:
    """The state of each layer that no threshold moves, as the map names it; None for all others."""
    settled, held = state.chooser.settled, state.chooser.held
    failed = state.planned["name"].isin(state.wishes.held)
    known = np.where(failed, next(iter(FAILED)), np.where(held, "16-bit", state.rest))
    return [str(name) if fixed else None for name, fixed in zip(known, settled, strict=True)]


def _layers(state: ExplorerState) -> list[dict[str, Any]]:
    """A record a layer: its place on the map, and the texts of `_facts`."""
    columns = ["name", "type", "depth"]
    facts = zip(*(texts for _, _, texts in _facts(state)), strict=True)
    rows = state.planned[columns].itertuples(index=False)
    return [
        {"name": name, "label": shorten(str(kind), 24), "depth": depth, "facts": told}
        for (name, kind, depth), told in zip(rows, facts, strict=True)
    ]


def _facts(state: ExplorerState) -> list[tuple[str, str, list[str | None]]]:
    """What a tooltip tells besides the score: column, title, and a text a layer (None: unknown)."""
    table, low = state.planned, state.lower
    name = low.upper() if low == "nf4" else low
    numbers = (
        ("alpha_hill", "α (Hill)"),
        (f"predicted_{low}", f"predicted KL in {name}"),
        (f"measured_{low}", f"measured KL in {name}"),
    )
    known = [
        (column, title, [f"{value:.3g}" if np.isfinite(value) else None for value in table[column]])
        for column, title in numbers
        if column in table
    ]
    pairs = zip(payload_bytes(table, "16bit"), payload_bytes(table, low, state.double_quant), strict=True)
    sizes: list[str | None] = [
        f"{three_digits(top / 1e6)} MB, in {name} {three_digits(few / 1e6)} MB" for top, few in pairs
    ]
    alphas = table["alpha_pl"] if "alpha_pl" in table else np.full(len(table), np.nan)
    fits = [_fit(alpha, status) for alpha, status in zip(alphas, table["status"], strict=True)]
    return [*known, ("status", "α (Clauset)", fits), (f"bytes_{low}", "size", sizes)]


def _fit(alpha: float, status: str) -> str | None:
    """Clauset's α and what is to be thought of it: "6.02, rough: few values in the tail"."""
    parts = ([f"{alpha:.3g}"] if np.isfinite(alpha) else []) + ([FITS[status]] if status in FITS else [])
    return ", ".join(parts) or None


def _score(state: ExplorerState, name: str, title: str) -> dict[str, Any]:
    values = threshold_values(state, name)
    held = [float(value) if np.isfinite(value) else None for value in values]
    return {
        "title": title,
        "axis": score_label(name),
        "short": short_label(name),
        "additive": score_row(name).additive,
        "wide": is_wide(values),
        "values": held,
    }


def _short(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None


def _frontier(state: ExplorerState) -> dict[str, Any] | None:
    if state.field is None:
        return None
    low, median, high = np.quantile(state.field.random, (0.05, 0.5, 0.95), axis=0)
    curves = {"optimum": state.field.optimum, "random_low": low, "random_median": median, "random_high": high}
    return {"size": state.field.file_bytes.round().tolist()} | {
        name: [_short(value) for value in curve] for name, curve in curves.items()
    }


def _spectra(state: ExplorerState) -> list[dict[str, Any] | None] | None:
    if len(state.planned) > SPECTRA_UP_TO:
        return None
    return [_spectrum(row, state.spectra.get(row["name"])) for _, row in state.planned.iterrows()]


def _spectrum(row: pd.Series, singular_values: NDArray[np.float64] | None) -> dict[str, Any] | None:
    """One layer's density and fit; None where there is no spectrum to draw."""
    eigenvalues = eigenvalues_of(np.empty(0) if singular_values is None else singular_values)
    if len(eigenvalues) < 2 or np.ptp(eigenvalues) == 0:
        return None
    edges, density = density_of(eigenvalues)
    fitted = all(np.isfinite(row.get(f"alpha_pl{part}", np.nan)) for part in ("", "_xmin", "_ks", "_tail"))
    return {
        "low": _short(edges[0]),
        "high": _short(edges[-1]),
        "floor": _short(density[density > 0].min() / 3),
        "density": [_short(value) for value in density],
        "alpha": _short(row["alpha_pl"]) if fitted else None,
        "xmin": _short(row["alpha_pl_xmin"]) if fitted else None,
        "ks": _short(row["alpha_pl_ks"]) if fitted else None,
        "tail": int(row["alpha_pl_tail"]) if fitted else None,
        "share": _short(row["alpha_pl_tail"] / len(eigenvalues)) if fitted else None,
    }


def _json(value: Any) -> str:
    """JSON that may stand inside a script element."""
    # In strings alone can "<" stand: "</script>" and "<!--" would both end or change the element.
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")
