"""What other threads run at this moment, read off their stacks while they go on.

How a variable of a running function is read depends on CPython's version. Before 3.13 `frame.f_locals` is a dictionary
that each look fills anew, dropping what it held; dropping a tensor lets other threads run, and in 3.11 and 3.12 the
function may then return while its memory is still being read. So 3.12 is asked for the one variable, and in 3.11, which
has no such question, it is read where the interpreter keeps it. Up to 3.11 a garbage collection can begin at any new
object, with the same effect: none does during a look.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable
from types import CellType, FrameType
from typing import TypeVar

_Found = TypeVar("_Found")


def frames(innermost: FrameType | None) -> list[FrameType]:
    """A stack's frames, innermost first."""
    found = []
    while innermost is not None:
        found.append(innermost)
        innermost = innermost.f_back
    return found


def others() -> dict[int, list[FrameType]]:
    """The frames of every other thread, innermost first, by the thread's ident."""
    return _still(_others)


def first_argument(frame: FrameType) -> object:
    """What the first argument of the frame's function is now; None where it has none or was deleted."""
    return _first(frame) if frame.f_code.co_argcount else None


def _others() -> dict[int, list[FrameType]]:
    innermost = sys._current_frames()
    innermost.pop(threading.get_ident(), None)  # a frame that holds itself is freed only by the garbage collector
    return {thread: frames(frame) for thread, frame in innermost.items()}


if sys.version_info >= (3, 12):  # collects between two instructions alone

    def _still(look: Callable[[], _Found]) -> _Found:
        return look()

else:
    _lock = threading.RLock()
    if hasattr(os, "register_at_fork"):  # Windows does not fork
        os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)

    def _still(look: Callable[[], _Found]) -> _Found:
        with _lock:
            collects = gc.isenabled()
            try:
                gc.disable()
                return look()
            finally:
                if collects:
                    gc.enable()


class _InterpreterFrame(ctypes.Structure):
    """_PyInterpreterFrame of CPython 3.11, Include/internal/pycore_frame.h; its variables begin with the arguments."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("func", "globals", "builtins", "locals", "code", "object", "previous")]
        + [("instruction", ctypes.c_void_p), ("stacktop", ctypes.c_int), ("is_entry", ctypes.c_bool)]
        + [("owner", ctypes.c_char), ("first", ctypes.py_object)]
    )


class _Frame(ctypes.Structure):
    """PyFrameObject of CPython 3.11, as far as it is needed; it begins behind a plain object's head."""

    _fields_ = (("back", ctypes.c_void_p), ("interpreter_frame", ctypes.POINTER(_InterpreterFrame)))


def _by_address(frame: FrameType) -> object:
    seen = _Frame.from_address(id(frame) + object.__basicsize__)
    return _still(lambda: _read(seen))


def _read(seen: _Frame) -> object:
    try:
        # No call between the first dot and the last: the interpreter lets another thread run only between calls.
        found = seen.interpreter_frame.contents.first
    except ValueError:  # it was deleted, or the function has returned
        return None
    if type(found) is CellType:  # a function inside uses it
        try:
            return found.cell_contents
        except ValueError:
            return None
    return found


def _by_question(frame: FrameType) -> object:
    try:
        return _get_var(frame, frame.f_code.co_varnames[0])
    except NameError:
        return None


def _by_dictionary(frame: FrameType) -> object:
    return frame.f_locals.get(frame.f_code.co_varnames[0])


def _answers(read: Callable[[FrameType], object]) -> bool:
    """Whether `read` works in this interpreter: not in one that lays its frames out in another way."""

    def plain(first: object) -> bool:
        return read(sys._getframe()) is first

    def captured(first: object) -> bool:
        return (lambda: read(sys._getframe(1)) is first)()

    return plain(object()) and captured(object())


_first = _by_dictionary
if sys.implementation.name == "cpython" and sys.version_info[:2] == (3, 12):
    _get_var = ctypes.pythonapi.PyFrame_GetVar
    _get_var.argtypes, _get_var.restype = (ctypes.py_object, ctypes.py_object), ctypes.py_object
    _first = _by_question
elif sys.implementation.name == "cpython" and sys.version_info[:2] == (3, 11) and not hasattr(sys, "gettotalrefcount"):
    _first = _by_address if _answers(_by_address) else _by_dictionary
