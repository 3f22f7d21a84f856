"""The most memory that torch's allocator handed out on the model's GPUs during the window.

What other processes and the CUDA context hold is not in it. The window resets torch's own peak statistics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qnb.measure.probes import Probe, Reading, probe
from qnb.model.subject import synchronize


@probe
class CudaPeak(Probe):
    """Bytes, summed over the GPUs; each GPU's peak may fall at another moment."""

    quantity = "peak_cuda_bytes"

    @classmethod
    def covers(cls, devices: Sequence[torch.device]) -> bool:
        return True

    @classmethod
    def why_not(cls, devices: Sequence[torch.device]) -> str | None:
        return None if any(d.type == "cuda" for d in devices) else "nothing here is on a CUDA device"

    def __init__(self, devices: Sequence[torch.device]) -> None:
        super().__init__(devices)
        self._gpus = [d for d in self.devices if d.type == "cuda"]

    def start(self) -> None:
        synchronize(self._gpus)
        for gpu in self._gpus:
            torch.cuda.reset_peak_memory_stats(gpu)

    def stop(self) -> Reading:
        synchronize(self._gpus)
        peak = sum(torch.cuda.max_memory_allocated(gpu) for gpu in self._gpus)
        return Reading(peak, "torch.cuda.max_memory_allocated, reset at the start of the window")
