"""One measurement at a time in this process: whatever else runs beside it would be in its numbers.

A thread that wants to measure while another one does waits, and can be interrupted; the thread that measures may
measure again inside (`profile` evaluates, and so may a metric). Changes of the measured model wait as well: otherwise
one result would mix two models. Code that is measured must not wait for another thread that measures.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from torch import nn

from qnb.model import stack
from qnb.model.gate import held

_token = threading.RLock()
_holders: list[int] = []

_OURS = "qnb.measure.probes"  # the meters' own threads
_MODULE_CALL = nn.Module.__module__


def measuring() -> bool:
    """Whether a measurement of another thread is under way: then is no time to run anything that can wait."""
    return any(thread != threading.get_ident() for thread in _holders)


def anyone_measures() -> bool:
    """Whether a measurement is under way in this thread or another: passes made now serve nobody."""
    return bool(_holders)


class Company:
    """What else ran in this process beside a measurement: `notes`, one sentence each, for its result."""

    def __init__(self, waited_s: float) -> None:
        self._notes = {f"waited {waited_s:.1f} s for another measurement": None} if waited_s >= 0.05 else {}

    def look(self) -> None:
        """Notes what other threads run of qnb, or wait to run, at this moment, and whether one runs a model."""
        for place in map(_outermost, stack.others().values()):
            if place is not None and not place.startswith(_OURS):
                self._notes[f"meanwhile another thread was in {place}"] = None

    @property
    def notes(self) -> tuple[str, ...]:
        """The sentences, each once."""
        return tuple(self._notes)


@contextlib.contextmanager
def alone(*models: nn.Module) -> Iterator[Company]:
    """Inside it no other thread measures, and none changes the models."""
    asked = time.perf_counter()
    with _token, contextlib.ExitStack() as holding:
        waited_s, outside = time.perf_counter() - asked, list(_holders)
        try:
            _holders.append(threading.get_ident())
            for model in models:
                holding.enter_context(held(model))
            yield Company(waited_s)
        finally:
            _holders[:] = outside  # right also where an interrupt came before the append


def _outermost(frames: Sequence[FrameType]) -> str | None:
    """What this stack entered first, a function of qnb or a module's forward; None where it is in neither."""
    for frame in reversed(frames):
        module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module.partition(".")[0] == "qnb":
            return f"{module}.{function}"
        if module == _MODULE_CALL and function == "_call_impl":
            return f"a forward of {type(stack.first_argument(frame)).__name__}"
    return None
