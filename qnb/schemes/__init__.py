"""The registry of schemes. A scheme is one file in this folder, or a decorated class in a user's own cell."""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil

from qnb.errors import UnknownScheme
from qnb.schemes.base import Family, How, Inputs, Rounded, Scheme, Variant

__all__ = ["Family", "How", "Inputs", "Rounded", "Scheme", "Variant", "find", "names", "register"]

_registry: dict[str, Scheme] = {}
_families: list[type[Family]] = []
_found: dict[str, Scheme] = {}  # members of families, by canonical name


def register(cls: type[Scheme]) -> type[Scheme]:
    """Class decorator: makes a scheme known by its name, in place of an earlier one of that name, or a family."""
    if issubclass(cls, Family) and "name" not in vars(cls):
        _families[:] = [*(family for family in _families if family.__name__ != cls.__name__), cls]
        _found.clear()
    else:
        _registry[cls.name] = cls()
    return cls


def names() -> list[str]:
    """The usual schemes, `none` first; families have more than they list here."""
    _import_all()
    usual = [name for family in _families for name in family.usual]
    return sorted({*_registry, *usual}, key=_order)


def find(scheme: str | Scheme) -> Scheme:
    """The scheme of that name; raises `UnknownScheme` with what is wrong with the name, or the names that exist."""
    if isinstance(scheme, Scheme):
        return scheme
    known = names()
    if not isinstance(scheme, str):
        raise UnknownScheme(f"scheme is a {type(scheme).__name__}: give one of the names {', '.join(known)}")
    if scheme in _registry:
        return _registry[scheme]
    for family in _families:
        found = family.named(scheme)
        if found is not None:
            return _found.setdefault(found.name, found)
    close = difflib.get_close_matches(scheme, known, 1, 0.5)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise UnknownScheme(f"no scheme is called {scheme!r}{hint}: the schemes are {', '.join(known)}")


def _order(name: str) -> tuple:
    # The original first, then by falling bits of the weight.
    bits = next((int(c) for c in name if c.isdigit()), 0)
    return name != "none", not name.startswith("w"), -bits, len(name), name


@functools.cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
