"""JSON from outside, read strictly: no duplicate keys, no NaN, no file that is absurdly large or deep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qnb.results import one_line

_LARGEST = 64 * 2**20  # bytes; the index of a checkpoint with a million tensors is about as large


def read(path: Path, error: type[Exception], what: str) -> dict[str, Any]:
    """The object that the file holds; raises `error` in one line, which calls the file `what`."""
    try:
        if path.stat().st_size > _LARGEST:
            raise error(f"{what} {path.name} has {path.stat().st_size} bytes: that is no {what}")
        text = path.read_text("utf-8")
    except (OSError, ValueError) as problem:
        raise error(f"{what} {one_line(path, 100)} cannot be read: {one_line(_reason(problem))}") from None
    return parse(text, error, f"{what} {path.name}")


def parse(text: str, error: type[Exception], what: str) -> dict[str, Any]:
    """The object that the text spells; raises `error` in one line."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_constant)
    except (ValueError, RecursionError) as problem:
        raise error(f"{what} is no JSON: {one_line(problem)}") from None
    if not isinstance(value, dict):
        raise error(f"{what} holds a JSON {type(value).__name__}: it must hold an object")
    return value


def _reason(problem: Exception) -> str:
    return getattr(problem, "strerror", None) or str(problem)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key in found if sum(key == k for k, _ in pairs) > 1)
        raise ValueError(f"key {one_line(repr(twice), 60)} stands twice")
    return found


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
