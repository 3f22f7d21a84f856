"""What this machine has, as plain facts that results carry: processor, threads, memory, GPUs, versions, and why not."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


@functools.cache
def cpu_name() -> str:
    """The processor's model name as the operating system gives it, else the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cpus() -> int:
    """Hardware threads that this process may run on; a container or `taskset` can make them fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cores() -> int | None:
    """Cores of the machine, hyperthreads not counted; None where the operating system does not say."""
    import psutil

    return psutil.cpu_count(logical=False)


def host_memory() -> tuple[int, int]:
    """(total, available) bytes for this process: the machine's, or its control group's where that allows less.

    Available is what can be had without swapping: caches that the system would give up are counted in.
    """
    import psutil

    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for limit, used in _cgroup_limits():
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def available_bytes(device: object) -> int:
    """Bytes that can still be had on a torch device: the host's, or a GPU's with what torch's allocator holds free."""
    import torch

    device = torch.device(device)
    if device.type != "cuda":
        return host_memory()[1]
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def nvidia_driver() -> tuple[str | None, tuple[str, ...], str | None]:
    """(version of NVIDIA's driver, names of its GPUs, None), or (None, (), why there is none)."""
    try:
        import pynvml
    except ImportError:
        return None, (), "needs NVIDIA's management library for Python: pip install nvidia-ml-py"
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        names = tuple(_text(pynvml.nvmlDeviceGetName(handle)) for handle in handles)
        return _text(pynvml.nvmlSystemGetDriverVersion()), names, None
    except pynvml.NVMLError as error:
        return None, (), f"no NVIDIA driver answers ({error})"


def package_version(name: str) -> str | None:
    """The installed version of a distribution, which is not imported; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, object]:
    """Processor, threads, versions and accelerators, for `Profile.environment` and for reports."""
    import torch

    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """(limit, bytes used and not given up on demand) of each control group above this process that has a limit."""
    try:
        lines = _OWN_CGROUP.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            root, files = _CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            root = _CGROUPS / "memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inside = root / path.lstrip("/")
        for group in (inside, *(p for p in inside.parents if p.is_relative_to(root))):
            try:
                limit, used = (group / files[0]).read_text().strip(), int((group / files[1]).read_text())
                statistics = (group / "memory.stat").read_text().splitlines()
            except OSError:  # a container sees its own group alone, as the root
                continue
            if limit != "max":
                cached = next((int(s.split()[1]) for s in statistics if s.split()[0] == files[2]), 0)
                yield int(limit), used - cached


def _text(words: str | bytes) -> str:
    return words.decode() if isinstance(words, bytes) else words
