"""What schemes share whose codes index a table, times a scale by group: `nf4-g64`, `kmeans4-g64`."""

from __future__ import annotations

import re
from typing import ClassVar

from qnb.errors import UnknownScheme
from qnb.schemes.base import Family
from qnb.schemes.grammar import GROUPS
from qnb.schemes.grid import Grid, TableGrid
from qnb.schemes.weight_only import ByCodes


class TableFamily(ByCodes, Family):
    """Named `<word>-gN`; the group may be left out when typed and is 64 then."""

    word: ClassVar[str]
    bits: ClassVar[int]

    def __init__(self, group: int = 64) -> None:
        self.name = f"{self.word}-g{group}"
        self.grid = self.grid_of(group)

    @classmethod
    def grid_of(cls, group: int) -> Grid:
        """The grid for groups of this size."""
        return TableGrid(cls.bits, group, cls.table())

    @classmethod
    def table(cls) -> tuple[float, ...]:
        """The rising values of the codes, where they are fixed."""
        raise NotImplementedError

    @classmethod
    def named(cls, name: str) -> TableFamily | None:
        if name == cls.word:
            return cls()
        if not name.startswith(f"{cls.word}-"):
            return None
        match = re.fullmatch(rf"{cls.word}-g(\d+)", name)
        if match is None or int(match[1]) not in GROUPS:
            raise UnknownScheme(
                f"scheme {name!r}: after {cls.word} comes a group, {', '.join(f'-g{g}' for g in GROUPS)}, nothing else"
            )
        return cls(int(match[1]))
