"""How integer schemes are spelled: `w4a16-g64-asym` and its kin. One canonical spelling for each format.

    w{2,3,4,8}a{8,16} [-static] [-tensor | -channel | -gN] [-asym] [-aasym] [-outliersN]

Options come in this order, each at most once. At 8 bits the scale is per channel unless said otherwise, and that is not
written; below it is per group of 64, and that is always written.
"""

from __future__ import annotations

import dataclasses
import re

from qnb.errors import UnknownScheme

GROUPS = (32, 64, 128)

_START = re.compile(r"w([2348])a(8|16)(?=-|$)")
_OPTION = {
    "static": re.compile("static"),
    "granularity": re.compile("tensor|channel|g([0-9]+)"),
    "asym": re.compile("asym"),
    "aasym": re.compile("aasym"),
    "outliers": re.compile("outliers([1-9][0-9]*)"),
}
_HELP = "the options are -static, -tensor, -channel or -gN, -asym, -aasym, -outliersN, in this order"


@dataclasses.dataclass(frozen=True)
class Spelling:
    """What an integer scheme's name says. `group` is the inputs that share a scale: 0 per channel, -1 per tensor."""

    weight_bits: int
    activation_bits: int
    static: bool = False
    group: int = 0
    asym: bool = False
    aasym: bool = False
    outliers: int = 0

    def __str__(self) -> str:
        words = [f"w{self.weight_bits}a{self.activation_bits}"]
        words += ["static"] if self.static else []
        if self.group < 0:
            words.append("tensor")
        elif self.group > 0:
            words.append(f"g{self.group}")
        elif self.weight_bits < 8:
            words.append("channel")
        words += ["asym"] if self.asym else []
        words += ["aasym"] if self.aasym else []
        words += [f"outliers{self.outliers}"] if self.outliers else []
        return "-".join(words)


def parse(name: str) -> Spelling | None:
    """The spelling of an integer scheme's name; None where the name begins like none.

    Raises `UnknownScheme` for a name that begins like one and goes on wrongly.
    """
    start = _START.match(name)
    if start is None:
        return None
    given = _options(name, name[start.end() :].split("-")[1:])
    bits = int(start[1])
    group = given.get("granularity", 0 if bits == 8 else 64)
    spelling = Spelling(
        bits,
        int(start[2]),
        "static" in given,
        group,
        "asym" in given,
        "aasym" in given,
        given.get("outliers", 0),
    )
    if spelling.static and spelling.activation_bits == 16:
        raise UnknownScheme(f"scheme {name!r}: -static fixes the scale of 8-bit activations, but a16 has none")
    if spelling.static and spelling.outliers:
        raise UnknownScheme(f"scheme {name!r}: -outliersN leaves few channels that a fixed range could serve: drop one")
    if spelling.aasym and not spelling.static:
        raise UnknownScheme(f"scheme {name!r}: -aasym needs -static, a scale that is fixed by calibration")
    return spelling


def _options(name: str, words: list[str]) -> dict[str, int]:
    given: dict[str, int] = {}
    order = list(_OPTION)
    for word in words:
        key = next((k for k in order if _OPTION[k].fullmatch(word)), None)
        if key is None:
            again = any(pattern.fullmatch(word) for pattern in _OPTION.values())
            what = f"-{word} stands twice or in the wrong place" if again else f"-{word} is no option"
            raise UnknownScheme(f"scheme {name!r}: {what}; {_HELP}")
        order = order[order.index(key) + 1 :]
        number = _OPTION[key].fullmatch(word).groups()
        given[key] = int(number[0]) if number and number[0] else {"tensor": -1, "channel": 0}.get(word, 1)
        if key == "granularity":
            check_group(name, word, given[key])
    return given


def check_group(name: str, word: str, group: int) -> None:
    """Raises `UnknownScheme` for a group size that is none of GROUPS."""
    if word.startswith("g") and group not in GROUPS:
        raise UnknownScheme(f"scheme {name!r}: a group is {', '.join(map(str, GROUPS))} inputs, not {group}")
