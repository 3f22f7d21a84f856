"""What other threads run at this moment, read off their stacks while they go on.

CPython before 3.12 may collect garbage wherever it allocates an object, and before 3.13 `f_locals` is a dictionary that
each look fills anew, dropping what the last look put there. Collecting, and dropping a tensor, let other threads run:
the frame that is being read may then end, and reading on means reading memory that is no longer the frame's. So no
collection begins during a look, and nothing that a look found stays in the dictionary.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

_Found = TypeVar("_Found")

_SNAPSHOT = sys.version_info < (3, 13)  # from then on `f_locals` reads the frame itself (PEP 667)

_lock = threading.RLock()


def frames(innermost: FrameType | None) -> list[FrameType]:
    """A stack's frames, innermost first."""
    found = []
    while innermost is not None:
        found.append(innermost)
        innermost = innermost.f_back
    return found


def others() -> dict[int, list[FrameType]]:
    """The frames of every other thread, innermost first, by the thread's ident."""
    return _uncollected(_others)


def first_argument(frame: FrameType) -> object:
    """What the first argument of the frame's function is now; None where it has none or was deleted."""
    code = frame.f_code
    if not code.co_argcount:
        return None
    name = code.co_varnames[0]
    if not _SNAPSHOT:
        return frame.f_locals.get(name)
    with _lock:  # one thread's look must not find what another's put there
        variables = _uncollected(lambda: frame.f_locals)
        found = variables.get(name)
        # Held by the frame, by `variables` and by the call: else it is somebody's `locals()`, or a debugger's.
        if sys.getrefcount(variables) == 3 and frame.f_trace is None:
            variables.clear()
    return found


def _others() -> dict[int, list[FrameType]]:
    innermost = sys._current_frames()
    innermost.pop(threading.get_ident(), None)  # a frame that holds itself is freed only by the garbage collector
    return {thread: frames(frame) for thread, frame in innermost.items()}


def _uncollected(look: Callable[[], _Found]) -> _Found:
    with _lock:
        collects = gc.isenabled()
        try:
            gc.disable()
            return look()
        finally:
            if collects:
                gc.enable()
