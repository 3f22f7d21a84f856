"""The progress bar of whatever takes long: shown only once it has run for a second, gone when it ends."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator

# Called with what is done, how much of it is, and of how much where that is known.
Tell = Callable[[str, int, int | None], None]


def progress_bar(total: int | None, what: str, shown: bool):
    """A tqdm bar, to be used as a context manager; `shown=False` gives one that never appears."""
    what = _here.part + what
    if _here.tell is not None:
        return _Told(_here.tell, what, total)
    return _kind()(total=total, desc=what, delay=1, leave=False, disable=not shown)


@contextlib.contextmanager
def told(tell: Tell) -> Iterator[None]:
    """Inside it this thread shows no bar: `tell` hears of each step, and may raise, to stop the work."""
    before, _here.tell = _here.tell, tell
    try:
        yield
    finally:
        _here.tell = before


@contextlib.contextmanager
def part(words: str) -> Iterator[None]:
    """Inside it this thread's bars are about a part of some larger work, which their words begin with."""
    before, _here.part = _here.part, f"{words}: "
    try:
        yield
    finally:
        _here.part = before


class _Here(threading.local):
    tell: Tell | None = None
    part = ""


_here = _Here()


class _Told:
    """Stands for a bar that somebody else shows."""

    def __init__(self, tell: Tell, what: str, total: int | None) -> None:
        self._tell, self._what, self._done, self._total = tell, what, 0, total

    def __enter__(self) -> _Told:
        self.update(0)
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is left to take away."""

    def update(self, n: int = 1) -> None:
        """Says that `n` more steps are done."""
        self._done += n
        self._tell(self._what, self._done, self._total)


@functools.cache
def _kind() -> type:
    with warnings.catch_warnings():
        # Without ipywidgets tqdm falls back to plain text, which needs no advice to the user.
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm

    class Bar(tqdm):
        # tqdm's own lock is taken in Python code, where Ctrl-C can fall between taking it and the block that gives it
        # back: every other thread's bar would then wait for ever. This one is taken by the interpreter in one step.
        _lock = threading.RLock()
        monitor_interval = 0  # no thread that looks after stalled bars, and takes the lock

    return Bar
