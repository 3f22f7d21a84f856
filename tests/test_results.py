"""Tables and results: what a terminal shows, what a browser gets, what JSON takes."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from qnb.results import Cell, Result, Table, format_bytes, format_number, one_line


@dataclasses.dataclass(frozen=True, repr=False)
class Inner(Result):
    value: float
    _hidden: object = None


@dataclasses.dataclass(frozen=True, repr=False)
class Outer(Result):
    name: str
    inner: Inner
    numbers: tuple[float, ...]

    def _tables(self):
        return [Table(("name", "value"), [(self.name, Cell("1.5", "bad"))], ("first",), ("last",), frozenset({1}))]


def test_columns_line_up_and_sentences_stand_around_them():
    table = Table(
        ("layer", "bytes"), [("a", "12"), ("longer name", Cell("3", "good"))], ("lead",), ("note",), frozenset({1})
    )
    assert table.text().splitlines() == [
        "lead",
        "layer        bytes",
        "-----------  -----",
        "a               12",
        "longer name      3",
        "note",
    ]


def test_names_from_outside_are_escaped_in_html_everywhere():
    evil = "<script>alert('x')</script>"
    page = Table((evil,), [(evil,), (Cell(evil, "bad"),)], (evil,), (evil,)).html()
    assert "<script>" not in page
    assert page.count("&lt;script&gt;") == 5


def test_result_shows_text_html_and_dict():
    result = Outer("x", Inner(2.0, "secret"), (1.0, math.nan, math.inf))
    assert str(result) == result.text() == "first\nname  value\n----  -----\nx       1.5\nlast"
    assert "qnb-bad" in result._repr_html_() and "<script" not in result._repr_html_()
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == {
        "name": "x",
        "inner": {"value": 2.0},
        "numbers": [1.0, None, None],
    }


def test_a_result_without_a_layout_says_so():
    with pytest.raises(TypeError, match="Inner must say how it is shown"):
        Inner(1.0).text()


@pytest.mark.parametrize(
    ("n", "words"),
    [
        (None, "unavailable"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (22_956_544, "23.0 MB"),
        (999_600, "1.00 MB"),
        (140 * 10**9, "140 GB"),
        (5 * 10**15, "5000 TB"),
        (-1500, "-1.50 kB"),
    ],
)
def test_format_bytes(n, words):
    assert format_bytes(n) == words


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (None, "unavailable"),
        (0.0, "0"),
        (0.006778, "0.00678"),
        (12.34, "12.3"),
        (9.996, "10.0"),
        (4520.4, "4520"),
        (-0.5, "-0.500"),
        (1e-9, "1.00e-09"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_format_number(x, words):
    assert format_number(x) == words


def test_one_line_folds_and_cuts():
    assert one_line("a\n  b\tc") == "a b c"
    assert one_line("x" * 300, 10) == "x" * 9 + "…"
