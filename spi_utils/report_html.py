"""Small pieces of HTML for the report: sections, tables, cells. All text is escaped here."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

CAPTIONS = {"supported": "✓ supported", "refuted": "✗ refuted"}
MANY = 4  # columns; a phone shows no more at once
NEGATIVE = re.compile(r"(?<![\w.\-])-(?=\d)")  # in a date, a range or a name a hyphen stands after something


class Html(str):
    """Text that is HTML already and is not escaped again."""


def text(value: Any) -> str:
    """Escaped text, its negative numbers with a true minus; `Html` stays as it is."""
    return value if isinstance(value, Html) else html.escape(NEGATIVE.sub("−", str(value)), quote=True)


def verbatim(value: str) -> Html:
    """Text escaped and otherwise left alone: a model's own words, a hash."""
    return Html(html.escape(value, quote=True))


def section(title: str, introduction: str, *parts: str) -> str:
    """A heading, a sentence, and HTML parts."""
    lead = f"<p>{text(introduction)}</p>" if introduction else ""
    return f"<section><h2>{text(title)}</h2>{lead}{''.join(parts)}</section>"


def table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], marks: Sequence[str] = (), words: Sequence[int] = ()
) -> str:
    """A table that scrolls sideways where it must.

    Args:
        heads: column titles; none for a table without a head row.
        rows: cells, text or `Html`.
        marks: a class for each row ("plan" is highlighted).
        words: columns that hold prose, aligned left and wrapped.
    """
    top = _row("th", heads, "", words) if heads else ""
    padded = [*marks, *[""] * (len(rows := list(rows)) - len(marks))]
    body = "".join(_row("td", row, mark, words) for row, mark in zip(rows, padded, strict=True))
    kind = "scroll many" if len(heads) > MANY else "scroll"
    return f'<div class="{kind}"><table><thead>{top}</thead><tbody>{body}</tbody></table></div>'


def _row(tag: str, cells: Sequence[str], mark: str, words: Sequence[int]) -> str:
    made = "".join(
        f"<{tag}{' class=words' if index in words else ''}>{text(cell)}</{tag}>"
        for index, cell in enumerate(cells)
    )
    return f"<tr{f' class={mark}' if mark else ''}>{made}</tr>"


def legend(meanings: Mapping[str, str]) -> str:
    """What a table's column titles mean, in small print below it."""
    said = (f"<dt>{text(head)}</dt><dd>{text(meaning)}</dd>" for head, meaning in meanings.items())
    return f'<dl class="legend">{"".join(said)}</dl>'


def verdict_cell(verdict: str) -> Html:
    """A verdict with its sign and colour."""
    kind = verdict if verdict in CAPTIONS else "open"
    return Html(f'<span class="verdict {kind}">{text(CAPTIONS.get(verdict, verdict))}</span>')


def interval_cell(one: Mapping[str, Any] | None, *, plus: bool = True) -> Html:
    """An estimate (`Estimate.as_dict`), its 95 % interval in small print below it; `plus`: signs shown."""
    if one is None:
        return Html("–")
    form = "+.4f" if plus else ".4f"
    low, high = ("unbounded" if one[end] is None else signed(one[end], form) for end in ("low", "high"))
    return Html(f"{signed(one['mean'], form)}<br><small>{low} … {high}</small>")


def signed(value: float, form: str = "+.4f") -> str:
    """A number in a format, its minus as wide as a plus."""
    return format(value, form).replace("-", "−")


def p_cell(value: float | None) -> str:
    """A p-value, bounded where it is tiny."""
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def spread(values: Sequence[float], form: str) -> str:
    """ "median (least–most)"."""
    median, least, most = (format(value, form) for value in values)
    return f"{median} ({least}–{most})"


def picture(path: Path) -> str:
    """A PNG inline, or nothing if it isn't there."""
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{text(path.stem.replace("_", " "))}" src="data:image/png;base64,{data}"></figure>'
    )


def code(sentence: str) -> Html:
    """Escaped text in which `names` in backticks become code."""
    pieces = text(sentence).split("`")
    return Html("".join(f"<code>{p}</code>" if index % 2 else p for index, p in enumerate(pieces)))
