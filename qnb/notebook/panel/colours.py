"""The look of each cell of the map: words on a colour that colour-blind readers tell apart too."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from qnb.model.quantize import Row
from qnb.results import format_bytes, format_number

# Of Okabe and Ito, which stay apart under every common colour blindness.
_SCHEMES = {
    "w8a8": "#0072b2",
    "w8a16": "#56b4e9",
    "fp8": "#cc79a7",
    "w4a16-g64": "#e69f00",
    "w4a8-g64": "#b8860b",
    "nf4-g64": "#f0e442",
    "kmeans3-g64": "#7fc8a9",
    "kmeans4-g64": "#009e73",
}
_BY_BITS = {8: "#3f8fc4", 4: "#e69f00", 3: "#d55e00", 2: "#8c3a00"}
_OTHER = "#b07cc6"
ORIGINAL = "transparent"
# Cividis: made for colour-blind readers, dark for little and bright for much.
_RAMP = ((0, 32, 76), (46, 70, 108), (92, 99, 110), (140, 131, 116), (190, 168, 104), (238, 210, 80))


@dataclasses.dataclass(frozen=True)
class Face:
    """One cell: what it says, its colours, and what it says at length. An empty `ink` is the page's own."""

    words: str
    paper: str
    ink: str
    title: str


def scheme_colour(scheme: str) -> str:
    """The colour of a scheme; of one that is not known by name, the colour of its bits."""
    if scheme == "none":
        return ORIGINAL
    bits = re.match(r"w(\d)|[a-z]+(\d)", scheme)
    number = int(bits[1] or bits[2]) if bits else 0
    return _SCHEMES.get(scheme) or _BY_BITS.get(number, _OTHER)


def by_scheme(rows: Sequence[Row], refused: Mapping[str, str]) -> list[Face]:
    """A face for each layer: its scheme, or that it cannot have another."""
    faces = []
    for row in rows:
        if row.scheme != "none":
            paper = scheme_colour(row.scheme)
            faces.append(Face(row.scheme, paper, _ink(paper), _title(row)))
        elif row.name in refused:
            faces.append(Face("fixed", ORIGINAL, "", f"{_title(row)}; cannot be quantized: {refused[row.name]}"))
        else:
            faces.append(Face("·", ORIGINAL, "", _title(row)))
    return faces


def by_value(rows: Sequence[Row], values: Mapping[str, float | None], mode: str) -> list[Face]:
    """A face for each layer whose value is known, on a scale of logarithms between the least and the most."""
    known = [v for v in values.values() if v is not None and v > 0 and math.isfinite(v)]
    low, high = (math.log(min(known)), math.log(max(known))) if known else (0.0, 0.0)
    faces = []
    for row in rows:
        value = values.get(row.name)
        if value is None or not math.isfinite(value):
            faces.append(Face("", ORIGINAL, "", f"{row.name}: no {mode} known"))
        elif value <= 0:
            faces.append(Face("0", ORIGINAL, "", f"{_title(row)}; {mode} 0"))
        else:
            share = (math.log(value) - low) / (high - low) if high > low else 0.5
            paper = _ramp(share)
            words = format_bytes(round(value)) if mode == "bytes" else _short(value)
            faces.append(Face(words, paper, _ink(paper), f"{_title(row)}; {mode} {_at_length(value, mode)}"))
    return faces


def _short(value: float) -> str:
    """Two digits that fit into a cell: 0.012, 3.4e-6."""
    if value >= 0.001:
        return format_number(value, 2)
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}e{int(exponent)}"


def _at_length(value: float, mode: str) -> str:
    words = {"time": f"{format_number(value)} ms", "bytes": format_bytes(round(value))}
    return words.get(mode, format_number(value))


def _title(row: Row) -> str:
    how = "original" if row.scheme == "none" else f"{row.scheme}, {row.rounding}, {row.kernel}"
    note = f"; {row.note}" if row.note else ""
    return f"{row.name}: {row.shape[0]} x {row.shape[1]}, {how}, {format_bytes(row.bytes_after)}{note}"


def _ramp(share: float) -> str:
    place = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    left = min(int(place), len(_RAMP) - 2)
    mixed = [round(a + (b - a) * (place - left)) for a, b in zip(_RAMP[left], _RAMP[left + 1], strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def _ink(paper: str) -> str:
    """Black or white, whichever has more contrast on the colour (WCAG relative luminance)."""
    channels = [int(paper[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#ffffff"
