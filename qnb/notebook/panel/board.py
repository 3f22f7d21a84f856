"""`Board`: what a session has to say, and the panels that show it."""

from __future__ import annotations

import dataclasses
import traceback
import weakref
from collections.abc import Callable
from typing import Any

from qnb.errors import QnbError
from qnb.results import one_line


@dataclasses.dataclass(frozen=True)
class Message:
    """What went wrong, for the panel: one line, and a traceback where the fault is not the user's."""

    words: str
    detail: str | None = None


class Board:
    """`status` says what is going on, `message` what went wrong, `found` how the last search went."""

    def __init__(self) -> None:
        self.status = "opening"
        self.message: Message | None = None
        self.found: str | None = None
        self._listeners: weakref.WeakSet = weakref.WeakSet()

    def listen(self, listener: Any) -> None:
        """Calls `listener.show()` after every change, from any thread, until it is collected."""
        self._listeners.add(listener)

    def ignore(self, listener: Any) -> None:
        """No longer calls it."""
        self._listeners.discard(listener)

    def show(self) -> None:
        """Brings every panel up to date."""
        for listener in list(self._listeners):
            listener.show()

    def progress(self, status: str, check: Callable[[], None]) -> None:
        """Shows what comes next, unless `check` raises since it is of no use any more."""
        check()
        self.status = status
        self.show()

    def say(self, problem: BaseException, words: str | None = None) -> None:
        """Shows what went wrong."""
        known = isinstance(problem, QnbError)
        line = words or (str(problem) if known else f"{type(problem).__name__}: {one_line(problem, 200)}")
        self.message = Message(line, None if known else "".join(traceback.format_exception(problem)))
        self.show()
