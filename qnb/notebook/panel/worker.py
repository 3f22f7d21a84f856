"""`Worker`: a thread that is there while something is new; a newer request stops what an older one made it do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Superseded(Exception):
    """What is being done is of no use any more: it is begun anew."""


class Worker:
    """Takes turns until the last request has had one that came to its end.

    turn    is called with a `check` that raises `Superseded` once a newer request has come; what else it raises goes to
    failed  and ends the turn
    rested  is called when nothing is left to do
    lock    under which requests are made, so that whoever holds it can change what they are about
    """

    def __init__(
        self,
        turn: Callable[[Callable[[], None]], None],
        failed: Callable[[BaseException], None],
        rested: Callable[[], None],
    ) -> None:
        self._turn, self._failed, self._rested = turn, failed, rested
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)
        self._asked, self._done = 0, -1
        self._thread: threading.Thread | None = None
        self.busy = self.closed = False
        self._resting = False  # while `rested` is called

    def request(self) -> None:
        """Asks for a turn; returns at once."""
        with self._changed:
            if self.closed:
                return
            self._asked += 1
            if not self.busy:
                self.busy = True
                self._thread = threading.Thread(target=self._work, args=(self._thread,), name="qnb panel", daemon=True)
                self._thread.start()

    def settle(self, timeout_s: float | None = None) -> bool:
        """Waits until nothing is left to do and `rested` has been called; returns whether that is so."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while self.busy or (self._resting and self._thread is not threading.current_thread()):
                if until is not None and time.monotonic() >= until:
                    return False
                self._changed.wait(0.05)
        return True

    def close(self) -> None:
        """Stops, and waits until the thread has gone."""
        with self._changed:
            self.closed = True
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(10)

    def _work(self, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()  # it may still be showing that it rests
        while True:
            with self._changed:
                if self._done == self._asked or self.closed:
                    self.busy, self._resting = False, True
                    break
                mine = self._asked
            try:
                self._turn(lambda mine=mine: self._check(mine))
                self._done = mine
            except Superseded:
                continue
            except BaseException as problem:
                self._done = mine
                self._failed(problem)
        try:
            self._rested()
        finally:
            with self._changed:
                self._resting = False
                self._changed.notify_all()

    def _check(self, mine: int) -> None:
        if self._asked != mine or self.closed:
            raise Superseded
