"""Time on the wall, with the accelerators' queues empty at both ends."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from qnb.measure.probes import Probe, Reading, probe
from qnb.model.subject import synchronize


@probe
class Clock(Probe):
    """Milliseconds by `time.perf_counter`."""

    quantity = "latency_ms"

    @classmethod
    def covers(cls, devices: Sequence[torch.device]) -> bool:
        return True

    def __init__(self, devices: Sequence[torch.device]) -> None:
        super().__init__(devices)
        self._began = 0.0

    def start(self) -> None:
        synchronize(self.devices)
        self._began = time.perf_counter()

    def stop(self) -> Reading:
        synchronize(self.devices)
        return Reading((time.perf_counter() - self._began) * 1000, "time.perf_counter")
