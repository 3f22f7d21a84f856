"""The energy of the model's NVIDIA GPUs, from the driver's total energy counter (Volta and later).

The counter is in millijoules, of the whole board, and moves every 10 to 100 ms. The driver's power reading, an average
over about a second from Ampere on, is the second meter: where the two disagree the reading says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from qnb.measure.probes import probe
from qnb.measure.probes.counter import CounterProbe
from qnb.results import one_line

# The power reading lags by its own second of averaging: shorter windows say nothing about it.
_CHECK_SECONDS = 3.0
_CHECK_SHARE = 0.15


@probe
class Nvml(CounterProbe):
    """Millijoules of the GPUs that the model lies on; those of other GPUs and of the processor are not in it.

    A slice of a GPU (MIG) has no counter of its own: there is no reading then, as the board's is also its neighbours'.
    """

    quantity = "energy_mj"
    source = "NVML total energy counter"

    @classmethod
    def covers(cls, devices: Sequence[torch.device]) -> bool:
        return any(d.type == "cuda" for d in devices)

    @classmethod
    def why_not(cls, devices: Sequence[torch.device]) -> str | None:
        try:
            import pynvml
        except ImportError:
            return "needs NVIDIA's management library for Python: pip install nvidia-ml-py"
        try:
            for handle in _handles(devices).values():
                pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except (pynvml.NVMLError, _NoHandle) as error:
            return f"NVML gives no energy of this GPU: {one_line(error)}"
        return None

    def __init__(self, devices: Sequence[torch.device]) -> None:
        super().__init__([d for d in devices if d.type == "cuda"])
        self._handles = _handles(self.devices)
        self._watts: list[float] = []
        self.source = f"NVML total energy counter of {', '.join(self._handles)}"

    def read(self) -> Mapping[str, float]:
        import pynvml

        return {name: pynvml.nvmlDeviceGetTotalEnergyConsumption(h) for name, h in self._handles.items()}

    def poll(self) -> None:
        import pynvml

        super().poll()
        try:
            self._watts.append(sum(pynvml.nvmlDeviceGetPowerUsage(h) for h in self._handles.values()) / 1000)
        except pynvml.NVMLError:  # no second meter, then: the energy stands alone
            self._watts.clear()

    def check(self, value: float, seconds: float) -> Sequence[str]:
        if seconds < _CHECK_SECONDS or not self._watts:
            return ()
        # The first second of power readings still averages over what ran before the window.
        watts = self._watts[len(self._watts) // 3 :]
        by_power, by_energy = sum(watts) / len(watts), value / 1000 / seconds
        if abs(by_power - by_energy) <= _CHECK_SHARE * by_energy:
            return ()
        return (
            f"NVML's power reading says {by_power:.1f} W and its energy counter {by_energy:.1f} W over {seconds:.1f} s",
        )


class _NoHandle(Exception):
    pass


def _handles(devices: Sequence[torch.device]) -> dict[str, object]:
    """NVML's handle of each CUDA device, by "cuda:N".

    torch counts the devices that CUDA_VISIBLE_DEVICES leaves, in CUDA's order; NVML counts all, in the bus's order. The
    UUID is the same in both.
    """
    import pynvml

    pynvml.nvmlInit()
    handles = {}
    for device in devices:
        if device.type != "cuda":
            continue
        index = torch.cuda.current_device() if device.index is None else device.index
        properties = torch.cuda.get_device_properties(index)
        handle = _handle(properties)
        if _is_sliced(handle):
            raise _NoHandle(f"{properties.name} is a slice (MIG) of a GPU, whose counter is of the whole board")
        handles[f"cuda:{index}"] = handle
    return handles


def _handle(properties) -> object:
    import pynvml

    uuid = getattr(properties, "uuid", None)
    if uuid is not None:
        try:
            return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{str(uuid).removeprefix('GPU-')}")
        except pynvml.NVMLError:  # a slice of a GPU (MIG) has a UUID of its own: the bus finds what it is a slice of
            pass
    if not hasattr(properties, "pci_bus_id"):
        raise _NoHandle(f"{properties.name} has neither a UUID nor a bus address that NVML knows")
    domain = getattr(properties, "pci_domain_id", 0)
    address = f"{domain:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    return pynvml.nvmlDeviceGetHandleByPciBusId(address)


def _is_sliced(handle: object) -> bool:
    """Whether the GPU is split: then CUDA sees slices of it only, never the whole."""
    import pynvml

    try:
        return pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound):  # a GPU or a driver without slices
        return False
