"""report.html, a run on one page that can be sent to a colleague; its tables and figures for notebooks too.

The page is self-contained (figures inline, no script, nothing fetched) and readable in light and dark themes.
report.html.jinja holds every table, shared by the page and by what notebooks show. Every sentence with a
number in it is made from the run's own files.
"""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from spi_utils import runs, stats
from spi_utils.claims import (
    QUESTIONS,
    Evaluation,
    audit,
    count_verdicts,
    evaluated_beside,
    generalization,
    headline_of,
    switching_sentence,
)
from spi_utils.errors import SPIError
from spi_utils.evaluation_figures import kl_survival, predicted_and_real, quality_by_bytes, window_differences
from spi_utils.figures import save_figure
from spi_utils.formats import gigabytes
from spi_utils.quantize import proof_by_use

if TYPE_CHECKING:
    from IPython.display import HTML

HEADLINE = "quality_by_bytes"
FIGURES = {
    HEADLINE: quality_by_bytes,
    "window_differences": window_differences,
    "kl_survival": kl_survival,
    "predicted_and_real": predicted_and_real,
}


def figures(run: runs.Run) -> dict[str, Path]:
    """Draw and save the figures of the evaluation as it is now; older ones in the run are replaced.

    Returns:
        Figure name -> its PNG in the run's figures; an SVG lies beside it. `predicted_and_real` is there only
        if a sensitivity was computed.

    Raises:
        RunError: the run has no evaluation.
    """
    evaluation = Evaluation.read(run.evaluation_json)
    with _evaluated(run):
        drawn = {name: draw(evaluation) for name, draw in FIGURES.items()}
    for name, figure in drawn.items():
        if figure is None:  # what an earlier evaluation could show is not this one's
            for kind in ("png", "svg"):
                (run.figures / f"{name}.{kind}").unlink(missing_ok=True)
    return {name: save_figure(figure, run, name) for name, figure in drawn.items() if figure is not None}


def headline_figure(run: runs.Run) -> Path:
    """The PNG of quality against bytes, drawn from the evaluation as it is now."""
    evaluation = Evaluation.read(run.evaluation_json)
    with _evaluated(run):
        figure = quality_by_bytes(evaluation)
    return save_figure(figure, run, HEADLINE)


def headline(run: runs.Run) -> str:
    """The run in a few sentences: size, perplexity, what the selection is worth, and a better mix if any."""
    evaluation = Evaluation.read(run.evaluation_json)
    with _evaluated(run):
        return headline_of(evaluation)


def _evaluated(run: runs.Run) -> AbstractContextManager[None]:
    return runs.believing(run.evaluation_json, "evaluation", runs.NOTEBOOKS["evaluate"])


# --- tables for notebooks --------------------------------------------------------------------------------


def table_html(evaluation: Evaluation) -> HTML:
    """The evaluation's numbers as report.html shows them, the plan highlighted, a legend of columns below."""
    return _shown(_pieces().evaluation_in_notebook(evaluation.variants))


def claims_html(evaluation: Evaluation, speed: Mapping[str, Any] | None = None) -> HTML:
    """The audit as report.html shows it; `speed` is run.json's of the stage "evaluate"."""
    return _shown(_pieces().claims_in_notebook(audit(evaluation, speed)))


def layers_html(rows: pd.DataFrame) -> HTML:
    """Rows of the layer table, its columns and statuses explained below."""

    columns = []
    for name in rows:
        values = rows[name]
        if pd.api.types.is_numeric_dtype(values):
            known = values.dropna().astype(float).abs()
            digits = 0 if (known % 1 == 0).all() else 3 if known.median() >= 0.01 else 6
            columns.append(["–" if pd.isna(value) else f"{value:.{digits}f}" for value in values])
        else:
            columns.append([str(value) for value in values])
    cells = list(zip(*columns, strict=True))
    return _shown(_pieces().layers_in_notebook(list(rows.columns), cells))


def _shown(content: str) -> HTML:
    from IPython.display import HTML

    return HTML(str(content))


# --- the page --------------------------------------------------------------------------------------------


def write_report(run: runs.Run) -> Path:
    """Write report.html from the run's files, and return its path.

    Raises:
        RunError: the run has no evaluation; says which notebook to run.
    """
    evaluation, pieces = Evaluation.read(run.evaluation_json), _pieces()
    stages = {"quantize": {}, "evaluate": {}} | runs.run_info(run)["stages"]
    figures(run)
    with _evaluated(run):
        facts: dict[str, Any] = {
            "model": f"{evaluation.model['id']} ({evaluation.model['kind']})",
            "revision": evaluation.model.get("revision") or "–",
        }
    with runs.believing(run.info_json, "record of the stage quantize", runs.NOTEBOOKS["quantize"]):
        made = stages["quantize"]
        notebook = runs.NOTEBOOKS["quantize"]
        proof = f"not proven: run notebook {notebook} where stock transformers can run the checkpoint"
        if made.get("proof"):
            proof = proof_by_use(made)
        said = pieces.answer(made["proof"]) if made.get("proof") else ""
    with runs.believing(run.info_json, "record of the stage evaluate", runs.NOTEBOOKS["evaluate"]):
        speed, found = stages["evaluate"].get("speed"), stages["evaluate"].get("environment", {})
        timing = pieces.timed(speed) if speed else ""
        versions = ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items())
        gpu = found.get("gpu") or "none"
        facts["machine"] = f"{found.get('machine')}, {found.get('cores')} cores, GPU: {gpu}"
        facts["versions"] = f"Python {found.get('python')}, {versions}"
    with _evaluated(run):
        facts |= {f"SHA-256 of {name}": value for name, value in evaluation.hashes.items()}
        page = pieces.page(
            title=f"{evaluation.model['id']}: what the hybrid is worth",
            evaluation=evaluation,
            files={path.stem: base64.b64encode(path.read_bytes()).decode() for path in _pictures(run)},
            headline=headline_of(evaluation),
            advice=switching_sentence(evaluation),
            proof=proof,
            claims=audit(evaluation, speed),
            beside=other_runs(run),
            timing=timing,
            said=said,
            surroundings=pieces.environment(facts),
            draws=stats.DRAWS,
            least=stats.MIN_CLUSTERS,
        )
    runs.write_text(run.report, page.strip() + "\n")
    return run.report


def _pictures(run: runs.Run) -> list[Path]:
    return [path for path in run.figures.glob("*.png") if not runs.is_temporary(path)]


def other_runs(run: runs.Run) -> str:
    """The section on the evaluated runs beside this one: does it generalize? Empty if there are none."""
    tables, unread = [], []
    for folder in evaluated_beside(run):
        try:
            tables.append(generalization([folder]))
        # Another run's broken file is no reason to withhold this run's report.
        except (SPIError, LookupError, TypeError, ValueError):
            unread.append(folder.name)
    if len(tables) + len(unread) < 2:
        return ""
    held = pd.concat(tables, ignore_index=True)
    rows = held.to_dict("records")
    for row in rows:
        row |= {end: None for end in ("Δ low", "Δ high") if math.isnan(row[end])}  # None: unbounded
    answers = "; ".join(f"“{words}” is {count_verdicts(held, key)}" for key, words in QUESTIONS.items())
    return _pieces().other_runs(rows, QUESTIONS, answers, unread, run.path.resolve().name)


# --- how values are written ------------------------------------------------------------------------------

NEGATIVE = re.compile(r"(?<![\w.\-])-(?=\d)")  # in a date, a range or a name a hyphen stands after something


class Missing(StrictUndefined):
    """An entry that a file lacks: a KeyError, as everywhere else (`runs.believing` tells it)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"exc": KeyError} | kwargs)


@cache
def _pieces() -> Any:
    """The macros of report.html.jinja; all text is escaped, negative numbers get a true minus."""
    pages = Environment(
        loader=PackageLoader("spi_utils", "."),
        autoescape=True,
        undefined=Missing,
        finalize=_with_minus,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {
        "size": gigabytes,
        "signed": signed,
        "number": number,
        "percent": percent,
        "p": p_value,
        "code": code,
        "verbatim": lambda words: Markup(html.escape(words)),
        "lower_verdict": lambda one: stats.verdict(stats.Estimate.from_dict(one), "lower"),
    }
    return pages.get_template("report.html.jinja").module


def _with_minus(value: Any) -> Any:
    """Text with true minus signs; what is HTML already stays as it is."""
    return value if isinstance(value, Markup) else NEGATIVE.sub("−", str(value))


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
