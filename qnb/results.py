"""Result objects' common ground: a table that reads well in a terminal and in a notebook.

Every public result is a frozen dataclass (`repr=False`: it shows itself as text) that derives from `Result` and says
how it is laid out in `_tables()`; text, HTML and `to_dict()` follow from that. Whatever came from outside (names of
layers, texts, reasons) is escaped in HTML here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

Tone = Literal["", "good", "bad", "muted", "head"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell: its words and a tone, which is shown as colour and never carries meaning alone."""

    words: str
    tone: Tone = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns, rows and the sentences around them. `lead` comes first, `notes` last; `numeric` columns align right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    lead: Sequence[str | Cell] = ()
    notes: Sequence[str] = ()
    numeric: frozenset[int] = frozenset()

    def text(self) -> str:
        """The table in plain characters, columns aligned, no line longer than its cells need."""
        grid = [[_words(c) for c in row] for row in [self.columns, *self.rows]]
        widths = [max(len(row[i]) for row in grid) for i in range(len(self.columns))]
        lines = [_words(s) for s in self.lead]
        for number, row in enumerate(grid):
            cells = [
                w.rjust(n) if i in self.numeric else w.ljust(n)
                for i, (w, n) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
            if number == 0:
                lines.append("  ".join("-" * n for n in widths))
        return "\n".join([*lines, *self.notes])

    def html(self) -> str:
        """The table as HTML: no script, nothing fetched, every word escaped, styles that an untrusted page keeps."""
        head = "".join(
            f"<th{self._look(i, 'head', 'border-bottom:1px solid #999999')}>{html.escape(c)}</th>"
            for i, c in enumerate(self.columns)
        )
        body = "".join(
            "<tr>"
            + "".join(f"<td{self._look(i, _tone(c))}>{html.escape(_words(c))}</td>" for i, c in enumerate(row))
            + "</tr>"
            for row in self.rows
        )
        lead = "".join(f"<p{_attributes(_tone(s), 'margin:2px 0')}>{html.escape(_words(s))}</p>" for s in self.lead)
        notes = "".join(f"<p{_attributes('muted', 'margin:2px 0')}>{html.escape(s)}</p>" for s in self.notes)
        table = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
        return f'{lead}<table style="border-collapse:collapse;margin:4px 0 6px 0">{table}</table>{notes}'

    def _look(self, column: int, tone: Tone, *styles: str) -> str:
        right = column in self.numeric
        wraps = "max-width:30em" if tone == "muted" else "white-space:nowrap" if right else ""
        align = f"text-align:{'right' if right else 'left'}"
        return _attributes(tone, "padding:3px 12px 3px 0;vertical-align:top", align, wraps, *styles)


# Colours hold on light and dark pages. They stand in each element: a page that does not trust a notebook, as JupyterLab
# before its cells have been run, drops style sheets and keeps these.
_TONES = {
    "good": "color:#1a7f37;font-weight:600",
    "bad": "color:#cf222e;font-weight:600",
    "muted": "color:#777777",
    "head": "font-weight:600",
}


def _attributes(tone: Tone, *styles: str) -> str:
    style = ";".join(s for s in (*styles, _TONES.get(tone, "")) if s)
    return f' style="{style}"' + (f' class="qnb-{tone}"' if tone else "")


class Result:
    """Base of the public results: `text()`, HTML and `to_dict()` from one description of the tables."""

    def _tables(self) -> Sequence[Table]:
        raise TypeError(f"{type(self).__name__} must say how it is shown")

    def text(self) -> str:
        """What a terminal shows."""
        return "\n\n".join(t.text() for t in self._tables())

    def __repr__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        return f'<div class="qnb" style="overflow-x:auto">{"".join(t.html() for t in self._tables())}</div>'

    def _repr_pretty_(self, printer, cycle: bool) -> None:
        printer.text(self.text())

    def to_dict(self) -> dict[str, Any]:
        """Fields and nested results as plain Python values that `json.dumps` takes; no NaN, which JSON has not."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if not f.name.startswith("_")}


def format_bytes(n: int | None) -> str:
    """Bytes in decimal units, three digits: 22956544 -> '23.0 MB'."""
    if n is None:
        return "unavailable"
    size, unit = float(n), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 999.5 or unit == "TB":
            break
        size /= 1000
    return f"{int(size)} B" if unit == "B" else f"{format_number(size)} {unit}"


def format_number(x: float | None, digits: int = 3) -> str:
    """`digits` significant digits without an exponent where that stays short: 0.00678, 12.3, 4520."""
    if x is None:
        return "unavailable"
    if x == 0 or not math.isfinite(x):
        return "0" if x == 0 else str(x)
    magnitude = math.floor(math.log10(abs(float(f"{x:.{digits - 1}e}"))))
    if magnitude < -6 or magnitude > 9:
        return f"{x:.{digits - 1}e}"
    return f"{x:.{max(0, digits - 1 - magnitude)}f}"


def one_line(words: object, limit: int = 160) -> str:
    """Anything as one line of at most `limit` characters, for messages and cells."""
    line = " ".join(str(words).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _words(c: str | Cell) -> str:
    return c.words if isinstance(c, Cell) else c


def _tone(c: str | Cell) -> str:
    return c.tone if isinstance(c, Cell) else ""


def _plain(value: Any) -> Any:
    if isinstance(value, Result):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if not f.name.startswith("_")}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Iterable):
        return [_plain(v) for v in value]
    return str(value)
