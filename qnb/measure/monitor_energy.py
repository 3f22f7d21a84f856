"""The energy of a model's devices while a monitor runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qnb.measure.probes import Missing, Probe, choose


class Energy:
    """Energy since the start, as a sum of windows of one meter after the other: each ends when it is long enough."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.millijoules, self.tokens = 0.0, 0
        self.reason: str | None = "the meter's window is still too short"
        self._devices, self._before = devices, 0
        self._meter: Probe | None = self._start()

    def look(self, tokens: int | None) -> None:
        """Ends a window that is long enough, and begins the next."""
        if self._meter is not None and self._meter.enough():
            self.end(tokens)
            self._meter = self._start()

    def end(self, tokens: int | None) -> None:
        """Ends the window."""
        meter, self._meter = self._meter, None
        if meter is None:
            return
        reading = meter.stop()
        if reading.value is None:
            if not self.millijoules:
                self.reason = reading.reason
            return
        self.reason = None
        self.millijoules += reading.value
        self.tokens += 0 if tokens is None else tokens - self._before
        self._before = tokens or 0

    def _start(self) -> Probe | None:
        meter = choose("energy_mj", self._devices)
        if isinstance(meter, Missing):
            self.reason = meter.reason
            return None
        meter.start()
        return meter
