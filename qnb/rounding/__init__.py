"""The registry of roundings: how the codes of a weight are chosen on a scheme's grid. One file each."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from qnb.errors import UnknownRounding
from qnb.rounding.base import Needs, Rounding, Statistics
from qnb.schemes.base import Rounded, Scheme

__all__ = ["Rounded", "Rounding", "Statistics", "find", "names", "register"]

_registry: dict[str, Rounding] = {}


def register(name: str, needs: Needs = "nothing", why_not=None, uses_inputs: bool = False, divides: bool = False):
    """Decorator: makes a rounding known by its name.

    `choose(weight, grid, dtype, statistics) -> Rounded` is a pure function, see `Rounding`. `why_not(scheme)` says, as
    words, why it makes no sense for a scheme, else None. `uses_inputs`: it needs nothing, but is better with "inputs".
    `divides`: its result has a divisor.
    """

    def add(choose):
        _registry[name] = Rounding(name, needs, choose, why_not or (lambda scheme: None), uses_inputs, divides)
        return choose

    return add


def names() -> list[str]:
    """Every rounding that can be asked for."""
    _import_all()
    return sorted(_registry)


@functools.cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def find(name: str, scheme: Scheme) -> Rounding:
    """The rounding of that name; raises `UnknownRounding` where there is none, or it makes no sense for the scheme."""
    known = names()
    if name not in known:
        raise UnknownRounding(
            f"no rounding is called {name!r} (asked for {scheme.name}): the roundings are {', '.join(known)}"
        )
    rounding = _registry[name]
    reason = None if scheme.grid is None else rounding.why_not(scheme)
    if reason is not None:
        raise UnknownRounding(f"rounding {name!r} does not fit scheme {scheme.name}: {reason}")
    return rounding
