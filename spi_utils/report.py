"""report.html, a run on one page that can be sent to a colleague; its tables and figures for notebooks too.

The page is self-contained (figures inline, no script, nothing fetched) and readable in light and dark themes.
report.html.jinja holds every table, shared by the page and by what notebooks show. Every sentence with a
number in it is made from the run's own files.
"""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from spi_utils import claims, runs, stats
from spi_utils import figures as draw
from spi_utils.claims import Evaluation
from spi_utils.formats import gigabytes
from spi_utils.quantize import proof_by_use

DRAWN = (draw.quality_by_bytes, draw.window_differences, draw.kl_survival, draw.predicted_and_real)
FIGURES = {one.__name__: one for one in DRAWN}
LAYERS = ("plan_map", "score_by_depth", "sensitivity", "frontier")  # notebook 02's, shown in the report


def figures(run: runs.Run, names: Iterable[str] = FIGURES) -> dict[str, Path]:
    """Draw and save the figures of the evaluation as it is now; older ones in the run are replaced.

    Returns:
        Figure name -> its PNG in the run's figures; an SVG lies beside it. `predicted_and_real` is there only
        if a sensitivity was computed.

    Raises:
        RunError: the run has no evaluation.
    """
    evaluation = Evaluation.read(run.evaluation_json)
    with _believing(run):
        drawn = {name: FIGURES[name](evaluation) for name in names}
    for name in (name for name, figure in drawn.items() if figure is None):
        for kind in ("png", "svg"):  # what an earlier evaluation could show is not this one's
            (run.figures / f"{name}.{kind}").unlink(missing_ok=True)
    return {name: draw.save_figure(figure, run, name) for name, figure in drawn.items() if figure is not None}


def headline_figure(run: runs.Run) -> Path:
    """The PNG of quality against bytes, drawn from the evaluation as it is now."""
    return figures(run, ["quality_by_bytes"])["quality_by_bytes"]


def headline(run: runs.Run) -> str:
    """The run in a few sentences: size, perplexity, what the selection is worth, and a better mix if any."""
    evaluation = Evaluation.read(run.evaluation_json)
    with _believing(run):
        return claims.headline_of(evaluation)


def _believing(run: runs.Run) -> AbstractContextManager[None]:
    return runs.believing(run.evaluation_json, "evaluation", runs.NOTEBOOKS["evaluate"])


# --- tables for notebooks --------------------------------------------------------------------------------


def table_html(evaluation: Evaluation) -> Any:
    """The evaluation's numbers as report.html shows them, the plan highlighted, a legend of columns below."""
    return _shown(_pieces().evaluation_in_notebook(evaluation))


def claims_html(evaluation: Evaluation, speed: Mapping[str, Any] | None = None) -> Any:
    """The audit as report.html shows it; `speed` is run.json's of the stage "evaluate"."""
    return _shown(_pieces().claims_in_notebook(claims.audit(evaluation, speed)))


def layers_html(rows: pd.DataFrame) -> Any:
    """Rows of the layer table, its columns and statuses explained below."""
    cells = rows.astype(str)
    for name in rows.select_dtypes("number"):
        known = rows[name].dropna().astype(float).abs()
        digits = 0 if (known % 1 == 0).all() else 3 if known.median() >= 0.01 else 6
        cells[name] = [number(value, digits) for value in rows[name]]
    return _shown(_pieces().layers_in_notebook(list(rows.columns), cells.to_numpy().tolist()))


def _shown(content: str) -> Any:
    from IPython.display import HTML

    return HTML(str(content))


# --- the page --------------------------------------------------------------------------------------------


def write_report(run: runs.Run) -> Path:
    """Write report.html from the run's files, and return its path.

    Raises:
        RunError: the run has no evaluation; says which notebook to run.
    """
    evaluation, pieces = Evaluation.read(run.evaluation_json), _pieces()
    stages = {"analyze": {}, "quantize": {}, "evaluate": {}} | runs.run_info(run)["stages"]
    drawn = figures(run) | {name: run.figures / f"{name}.png" for name in LAYERS}
    files = {name: base64.b64encode(p.read_bytes()).decode() for name, p in drawn.items() if p.exists()}
    with runs.believing(run.info_json, "record of its stages", "03_quantize, then 04_evaluate"):
        made, speed = stages["quantize"], stages["evaluate"].get("speed")
        found = stages["evaluate"].get("environment")
        proven = made.get("proof")
        parts = {
            "proof": proof_by_use(made) if proven else "not proven: run notebook 03_quantize first",
            "said": pieces.answer(proven) if proven else "",
            "timing": pieces.timed(speed) if speed else "",
            "machine": pieces.machine(found) if found else "",
            "rounding": stages["analyze"].get("sensitivity", {}).get("rounding_exceptions", ""),
        }
    with _believing(run):
        parts |= {"headline": claims.headline_of(evaluation), "claims": claims.audit(evaluation, speed)}
        parts |= {"draws": stats.DRAWS, "least": stats.MIN_CLUSTERS, "files": files, "layers": LAYERS}
        page = pieces.page(evaluation=evaluation, **parts)
    runs.write_text(run.report, page.strip() + "\n")
    return run.report


# --- how values are written ------------------------------------------------------------------------------


class Missing(StrictUndefined):
    """An entry that a file lacks: a KeyError, as everywhere else (`runs.believing` tells it)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"exc": KeyError} | kwargs)


@cache
def _pieces() -> Any:
    """The macros of report.html.jinja; all text is escaped, negative numbers get a true minus."""
    text: dict[str, Any] = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    loader = PackageLoader("spi_utils", ".")
    pages = Environment(loader=loader, undefined=Missing, finalize=_with_minus, **text)
    pages.filters |= {"size": gigabytes, "signed": signed, "number": number, "percent": percent, "p": p_value}
    pages.filters |= {"code": code, "verbatim": lambda words: Markup(html.escape(words))}
    pages.filters["lower_verdict"] = lambda one: stats.verdict(stats.Estimate.from_dict(one), "lower")
    return pages.get_template("report.html.jinja").module


def _with_minus(value: Any) -> Any:
    """Text with true minus signs; what is HTML already stays as it is."""
    return value if isinstance(value, Markup) else draw.with_minus(str(value))


def signed(value: float, plus: bool = True, digits: int = 4) -> str:
    """A number with a minus as wide as its plus; `plus`: that is shown too."""
    return f"{value:{'+' if plus else ''}.{digits}f}".replace("-", "−")


def number(value: float | None, digits: int = 4) -> str:
    """A number, or a dash where it is unknown."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def percent(share: float) -> str:
    """A share: "89.9 %", and "100 %" where it is whole."""
    return "100 %" if share == 1 else f"{100 * share:.1f} %"


def p_value(value: float | None) -> str:
    """A p-value, bounded where it is tiny."""
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def code(sentence: str) -> Markup:
    """Escaped text in which `names` in backticks become code."""
    pieces = html.escape(_with_minus(sentence)).split("`")
    return Markup("".join(f"<code>{p}</code>" if index % 2 else p for index, p in enumerate(pieces)))
