"""The most memory that this process held resident during the window.

On Linux the kernel keeps the peak itself (VmHWM) and forgets it on request (a 5 written to clear_refs): exact, and
without a cost while the window runs. Elsewhere a thread looks every few milliseconds, which can miss a short peak.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from qnb.measure.probes import Probe, Reading, probe

_PROC = Path("/proc/self")


@probe
class KernelPeak(Probe):
    """Bytes, as Linux itself keeps the peak."""

    quantity = "peak_host_bytes"
    order = 1

    @classmethod
    def covers(cls, devices: Sequence[torch.device]) -> bool:
        return (_PROC / "clear_refs").exists()

    @classmethod
    def why_not(cls, devices: Sequence[torch.device]) -> str | None:
        try:
            _forget_peak()
            _peak()
        except (OSError, ValueError) as error:
            return f"the kernel's peak cannot be reset ({error})"
        return None

    def start(self) -> None:
        _forget_peak()

    def stop(self) -> Reading:
        return Reading(_peak(), "VmHWM, reset at the start of the window")


@probe
class SampledPeak(Probe):
    """Bytes, by looking every few milliseconds."""

    quantity = "peak_host_bytes"
    order = 2
    interval_s = 0.005

    @classmethod
    def covers(cls, devices: Sequence[torch.device]) -> bool:
        return True

    @classmethod
    def why_not(cls, devices: Sequence[torch.device]) -> str | None:
        try:
            import psutil
        except ImportError:
            return "needs psutil: pip install psutil"
        try:
            psutil.Process().memory_info()
        except psutil.Error as error:
            return f"psutil cannot read this process: {error}"
        return None

    def __init__(self, devices: Sequence[torch.device]) -> None:
        import psutil

        super().__init__(devices)
        self._process, self._peak = psutil.Process(), 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, name="qnb-memory", daemon=True)

    def start(self) -> None:
        self._peak = self._process.memory_info().rss
        self._thread.start()

    def stop(self) -> Reading:
        self._done.set()
        if self._thread.ident is not None:
            self._thread.join()
        peak = max(self._peak, self._process.memory_info().rss)
        return Reading(
            peak, f"resident set looked at every {1000 * self.interval_s:.0f} ms, which can miss a short peak"
        )

    def _look(self) -> None:
        while not self._done.wait(self.interval_s):
            self._peak = max(self._peak, self._process.memory_info().rss)


def _forget_peak() -> None:
    (_PROC / "clear_refs").write_text("5")


def _peak() -> int:
    for line in (_PROC / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{_PROC / 'status'} has no VmHWM")
