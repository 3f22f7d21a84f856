"""What meters of a growing counter share: it moves in steps, it wraps around, and a window must see many steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence

import torch

from qnb.measure.probes import Probe, Reading
from qnb.model.subject import synchronize

# The window's two ends each cut a step in two. Twenty steps leave 5 % open; below five a reading would be a guess.
WANTED_STEPS = 20
FEWEST_STEPS = 5
WANTED_SECONDS = 0.5


class CounterProbe(Probe):
    """Energy in millijoules from named counters; a thread polls them, to count steps and to see every wrap-around.

    A subclass gives `read()` and `source`, and `wraps()` where its counters wrap. `interval_s=None`: polled only when
    asked.
    """

    source = "counter"
    millijoules = 1.0  # of one count
    interval_s: float | None = 0.02

    def __init__(self, devices: Sequence[torch.device]) -> None:
        super().__init__(devices)
        self._lock = threading.Lock()
        self._last: dict[str, float] = {}
        self._counted: dict[str, float] = {}
        self._steps: dict[str, int] = {}
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: str | None = None

    def read(self) -> Mapping[str, float]:
        """The counters as they stand, by name."""
        raise NotImplementedError

    def wraps(self, name: str) -> float | None:
        """The value at which the named counter starts again from 0; None where it does not."""
        return None

    def clock(self) -> float:
        """Seconds, from any origin."""
        return time.perf_counter()

    def start(self) -> None:
        synchronize(self.devices)
        self._began = self.clock()
        self._last = dict(self.read())
        self._counted = dict.fromkeys(self._last, 0.0)
        self._steps = dict.fromkeys(self._last, 0)
        if self.interval_s is not None:
            self._thread = threading.Thread(target=self._keep_polling, name="qnb-energy", daemon=True)
            self._thread.start()

    def enough(self) -> bool:
        if self.interval_s is None:
            self.poll()
        return self._failure is not None or (
            min(self._steps.values()) >= WANTED_STEPS and self.clock() - self._began >= WANTED_SECONDS
        )

    def poll(self) -> None:
        """Adds what the counters moved since the last look."""
        with self._lock:
            if self._failure is not None:
                return
            for name, value in self.read().items():
                moved = value - self._last[name]
                if moved < 0:
                    limit = self.wraps(name)
                    if limit is None:
                        self._failure = f"{name} went backwards, from {self._last[name]:g} to {value:g}"
                        return
                    moved += limit
                if moved:
                    self._counted[name] += moved
                    self._steps[name] += 1
                self._last[name] = value

    def stop(self) -> Reading:
        synchronize(self.devices)
        self._done.set()
        if self._thread is not None:
            self._thread.join()
        if not self._last:
            return Reading(None, self.source, reason="the meter did not start")
        try:
            if self._failure is None:
                self.poll()
        except Exception as error:  # a driver may fail at any reading
            self._failure = f"{type(error).__name__}: {error}"
        seconds = self.clock() - self._began
        steps = min(self._steps.values())
        if self._failure is not None:
            return Reading(None, self.source, reason=f"the counter could not be read ({self._failure})", steps=steps)
        if steps < FEWEST_STEPS:
            reason = f"the counter moved {steps} time(s) in {seconds:.2f} s: the window must be longer, see repeat="
            return Reading(None, self.source, reason=reason, steps=steps)
        value = sum(self._counted.values()) * self.millijoules
        return Reading(value, self.source, steps=steps, spread=value / steps, notes=tuple(self.check(value, seconds)))

    def check(self, value: float, seconds: float) -> Sequence[str]:
        """What a second meter says against the reading; nothing where there is none."""
        return ()

    def _keep_polling(self) -> None:
        while not self._done.wait(self.interval_s):
            try:
                self.poll()
            except Exception as error:  # kept for stop(): an exception in a thread is seen by nobody
                self._failure = f"{type(error).__name__}: {error}"
            if self._failure is not None:
                return
