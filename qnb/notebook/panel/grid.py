"""Where each linear layer stands on the map: blocks are rows, kinds of layer are columns."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase


@dataclasses.dataclass(frozen=True)
class Place:
    """One layer on the map; `alone` where it stands outside all blocks and has a row to itself."""

    name: str
    row: int
    column: int
    alone: bool = False


@dataclasses.dataclass(frozen=True)
class Grid:
    """`rows` and `columns` are what to write beside and above; `places` are in the order of the model's layers."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    places: tuple[Place, ...]


def grid_of(names: Sequence[str]) -> Grid:
    """The map of layers of these names: `model.layers.3.mlp.up_proj` stands in row 3 and column `up_proj`.

    The number that splits a name is its first; names without one stand alone, in rows below.
    """
    split = [_split(name) for name in names]
    stems = list(dict.fromkeys(block[0] for block, _ in split if block is not None))
    blocks = list(dict.fromkeys(block for block, _ in split if block is not None))
    blocks.sort(key=lambda block: (stems.index(block[0]), block[1]))
    kinds = list(dict.fromkeys(kind for block, kind in split if block is not None))
    several = len(stems) > 1
    rows = [f"{stem} {number}" if several else str(number) for stem, number in blocks]
    row_of, column_of = {b: i for i, b in enumerate(blocks)}, {k: i for i, k in enumerate(kinds)}
    places = []
    for name, (block, kind) in zip(names, split, strict=True):
        if block is None:
            places.append(Place(name, len(rows), 0, alone=True))
            rows.append(name)
        else:
            places.append(Place(name, row_of[block], column_of[kind]))
    return Grid(tuple(rows), _shortened(kinds) or ("",), tuple(places))


def patterns(names: Collection[str], every: Sequence[str]) -> list[str]:
    """Names and globs that mean exactly `names` among `every` name: `*.mlp.up_proj` where all blocks have it."""
    wanted = set(names)
    kinds = dict.fromkeys(kind for block, kind in map(_split, names) if block is not None and kind)
    found: list[str] = []
    for kind in kinds:
        pattern = f"*.{glob.escape(kind)}"
        matched = {n for n in every if fnmatchcase(n, pattern)}
        if len(matched) > 1 and matched <= wanted:
            found.append(pattern)
            wanted -= matched
    return [*found, *(glob.escape(name) for name in names if name in wanted)]


def _split(name: str) -> tuple[tuple[str, int] | None, str]:
    """((what is before the first number, the number), what is behind it); (None, name) without a number."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isascii() and part.isdigit():
            return (".".join(parts[:i]), int(part)), ".".join(parts[i + 1 :])
    return None, name


def _shortened(kinds: Sequence[str]) -> tuple[str, ...]:
    """Each kind by as few of its last parts as tell it from the others."""
    short = []
    for kind in kinds:
        parts = kind.split(".")
        for n in range(1, len(parts) + 1):
            ending = parts[-n:]
            if sum(other.split(".")[-n:] == ending for other in kinds) == 1:
                break
        short.append(".".join(ending) or "layer")
    return tuple(short)
