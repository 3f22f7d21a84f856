"""The words of a magic line: splitting them as a POSIX shell would, and finding the objects that they name."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from IPython.core.error import UsageError

# One word as a POSIX shell reads it: quotes may open and close inside a word, and a # starts a comment only
# where a word could start. shlex alone would cut a word at any #, and fail on an apostrophe in a comment.
_WORD = re.compile(r"""\s*((?:[^\s"'\\]|\\.|'[^']*'|"(?:[^"\\]|\\.)*")+)""")
_STEP = re.compile(r"\.(?P<attribute>[^\W\d]\w*)|\[(?P<item>[^\[\]]+)\]")
_NAME = re.compile(r"[^\W\d]\w*")


def split(line: str) -> tuple[list[str], bool]:
    """Words of the line, and whether it ended in a semicolon, which silences a magic as it does an expression.

    Raises UsageError where a quote is opened and never closed.
    """
    raw: list[str] = []
    at = 0
    while (rest := line[at:].lstrip()) and not rest.startswith("#"):
        match = _WORD.match(line, at)
        if match is None or (match.end() < len(line) and not line[match.end()].isspace()):
            raise UsageError(f"a quote or a backslash ends nowhere in: {rest}")
        raw.append(match[1])
        at = match.end()
    silent = bool(raw) and raw[-1].endswith(";") and not raw[-1].endswith("\\;")
    if silent:
        raw[-1] = raw[-1].rstrip(";")
    return [word for r in raw for word in shlex.split(r)], silent


def find(path: str, namespace: Mapping[str, Any]) -> Any:
    """The object that `path` names: a variable, then attributes and items (`pipe.model`, `models[0]`, `models[base]`).

    Nothing is evaluated: the key of an item is a whole number or the text as it stands. Raises LookupError that names
    the part that is not there.
    """
    name = _NAME.match(path)
    if name is None or name[0] not in namespace:
        raise LookupError(f"no variable is called {name[0] if name else path!r}")
    found, at = namespace[name[0]], name.end()
    while at < len(path):
        step = _STEP.match(path, at)
        if step is None:
            raise LookupError(f"{path!r} is no variable, attribute or item")
        try:
            if step["attribute"]:
                found = getattr(found, step["attribute"])
            else:
                found = found[int(step["item"]) if re.fullmatch(r"-?\d+", step["item"]) else step["item"]]
        except (AttributeError, LookupError, TypeError) as problem:
            raise LookupError(f"{path[:at]} has no {path[at : step.end()]}") from problem
        at = step.end()
    return found
