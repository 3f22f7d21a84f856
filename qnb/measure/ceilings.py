"""What this machine can do: the ceilings of a roofline, reached by real kernels, measured once and kept.

A ceiling is the best that a large product or a large read reached here: no data sheet's peak, and what a layer can be
asked for. The values are kept in `ceilings.json` of qnb's folder among the user's caches, under processor, threads,
instruction sets and versions; a file that cannot be read or written costs the measurement again, and nothing else.

Source: Williams, Waterman, Patterson, Roofline: an insightful visual performance model, CACM 52(4), 2009.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from qnb import ops
from qnb.env import cpu_name
from qnb.model.subject import synchronize
from qnb.results import one_line

MEMORY = "memory"
# Large enough to be bound by arithmetic, small enough that a weight stays in a cache; the best size counts. The
# smallest is over before a busy machine turns to something else.
_SIZES = {"cpu": ((128, 512), (512, 1024), (512, 2048)), "cuda": ((4096, 4096), (8192, 4096))}  # M, N = K
_PRODUCT_SECONDS, _READ_SECONDS = 0.05, 0.04
_LINE = 1024  # bytes of one weight row where a product of a single row reads a buffer


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The most that a device reaches.

    gops_per_s   arithmetic ("int8", "float32", ...) -> 10^9 operations a second; a multiply and an add are two
    gb_per_s     level ("L2", "L3", "memory") -> 10^9 bytes a second read, with all threads
    level_bytes  what each cache holds, those of all threads together, the smallest first
    unavailable  arithmetic or level -> why it has no value
    """

    device: str
    name: str
    gops_per_s: Mapping[str, float]
    gb_per_s: Mapping[str, float]
    level_bytes: Mapping[str, int]
    unavailable: Mapping[str, str]

    def level_of(self, nbytes: int) -> str:
        """The smallest level that holds so many bytes at once, which are read over and over."""
        return next((level for level, held in self.level_bytes.items() if nbytes <= held), MEMORY)

    def attainable(self, arithmetic: str, level: str, intensity: float) -> tuple[float, str] | None:
        """(Gop/s, what bounds them) for so many operations a byte; None where a ceiling is missing."""
        if arithmetic not in self.gops_per_s or level not in self.gb_per_s:
            return None
        by_bytes = intensity * self.gb_per_s[level]
        return min((by_bytes, level), (self.gops_per_s[arithmetic], arithmetic))


def ceilings(device: torch.device, arithmetics: Iterable[str], *, again: bool = False) -> Ceilings:
    """The ceilings of a CPU or CUDA device for these arithmetics; what is not known yet is measured now.

    `again` measures all anew, once in a process, and keeps the larger: a layer that beat a ceiling has proved that
    something else ran when that was measured.
    """
    levels = _levels(device)
    key = _key(device)
    again = again and key not in _measured_again
    if again:
        _measured_again.add(key)
    known = _known.setdefault(key, _load(key))
    unavailable: dict[str, str] = {}
    before = json.dumps(known)
    for kind, names, measure in (
        ("gops_per_s", list(arithmetics), lambda name: _product(name, device)),
        ("gb_per_s", [*levels, MEMORY], lambda name: _read(name, levels, device)),
    ):
        for name in names:
            if name in known[kind] and not again:
                continue
            try:
                known[kind][name] = max(measure(name), known[kind].get(name, 0.0))
            except (RuntimeError, NotImplementedError) as problem:
                unavailable[name] = one_line(problem)
    if json.dumps(known) != before:
        _save(key, known)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return Ceilings(
        str(device), name, dict(known["gops_per_s"]), _no_slower(known["gb_per_s"], levels), levels, unavailable
    )


_Values = dict[str, dict[str, float]]
_known: dict[str, _Values] = {}
_measured_again: set[str] = set()


def _no_slower(gb_per_s: Mapping[str, float], levels: Mapping[str, int]) -> dict[str, float]:
    """Each level at least as fast as those behind it: in a small one the cost of calling a kernel hides the rate."""
    rates, fastest = {}, 0.0
    for level in reversed((*levels, MEMORY)):
        if level in gb_per_s:
            rates[level] = fastest = max(fastest, gb_per_s[level])
    return dict(reversed(rates.items()))


def _product(arithmetic: str, device: torch.device) -> float:
    """Gop/s of the best of several large products x (M, K) by weight (N, K)."""
    best = 0.0
    for m, n in _SIZES[device.type]:
        for product in _products(arithmetic, m, n, device):
            best = max(best, 2 * m * n * n / _best_seconds(product, _PRODUCT_SECONDS, device) / 1e9)
    return best


def _products(arithmetic: str, m: int, n: int, device: torch.device) -> list[Callable[[], Tensor]]:
    """Every way that there is here: torch's, and qnb's own where it is compiled or torch has none."""
    codes, weight = (torch.ones(rows, n, dtype=torch.int8, device=device) for rows in (m, n))
    if arithmetic == "int8" and device.type == "cuda":
        return [lambda: torch._int_mm(codes, weight.T)]
    packed, scales = torch.ops.qnb.pack_w8(weight), torch.ones(max(m, n), device=device)
    if arithmetic == "int8":
        return [lambda: torch.ops.qnb.gemm_w8a8(codes, scales[:m], packed, scales[:n], None, n, torch.float32)]
    x, floats = (torch.ones(rows, n, dtype=getattr(torch, arithmetic), device=device) for rows in (m, n))
    ways: list[Callable[[], Tensor]] = [lambda: torch.nn.functional.linear(x, floats)]
    if arithmetic == "float32" and ops.kernel_for("linear_w8a16", device) != "reference":
        ways.append(lambda: torch.ops.qnb.linear_w8a16(x, packed, scales[:n], None, n))
    return ways


def _read(level: str, levels: Mapping[str, int], device: torch.device) -> float:
    """GB/s of the best of several ways to read a buffer that lies in this level."""
    size = _buffer_bytes(level, levels)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if size > free // 4:
        raise RuntimeError(f"a buffer of {size // 2**20} MiB does not fit a quarter of the free memory")
    buffer = torch.empty(size // 4, device=device).fill_(1.0)  # written, for pages of zeros may be one and the same
    upper, lower = buffer.view(2, -1)
    ways: list[Callable[[], Any]] = [buffer.sum, buffer.max, lambda: upper.copy_(lower)]
    if device.type == "cpu" and ops.kernel_for("gemm_w8a8") != "reference":
        codes, scale, n = torch.ones(1, _LINE, dtype=torch.int8), torch.ones(size // _LINE), size // _LINE
        packed = buffer.view(torch.int8)
        ways.append(lambda: torch.ops.qnb.gemm_w8a8(codes, scale[:1], packed, scale, None, n, torch.float32))
    return max(size / _best_seconds(way, _READ_SECONDS, device) / 1e9 for way in ways)


def _buffer_bytes(level: str, levels: Mapping[str, int]) -> int:
    """What lies in this level and not in the one before: a multiple of 64 KiB."""
    order = list(levels)
    if level == MEMORY:
        last = levels[order[-1]] if order else 64 * 2**20
        size = min(4 * last, max(2 * last, 512 * 2**20))
    else:
        place = order.index(level)
        size = levels[level] // 2
        if place:
            inside = levels[order[place - 1]]
            if size < 2 * inside:
                raise RuntimeError(f"it is too small beside {order[place - 1]} to be told apart")
            size = min(size, 4 * inside)
    return max(1, size >> 16) << 16


def _best_seconds(run: Callable[[], Any], budget: float, device: torch.device) -> float:
    """Seconds of the fastest of as many runs as the budget allows behind a first one, which counts if it is all.

    On a GPU several runs are given at once: waiting for each would measure the launching.
    """
    at_once = 20 if device.type == "cuda" else 1

    def seconds() -> float:
        began = time.perf_counter()
        for _ in range(at_once):
            run()
        synchronize([device])
        return time.perf_counter() - began

    synchronize([device])
    left = budget - (first := seconds())
    best = math.inf
    while left > 0:
        took = seconds()
        left, best = left - took, min(best, took)
    return (best if math.isfinite(best) else first) / at_once


def _levels(device: torch.device) -> dict[str, int]:
    """Bytes of the caches beyond the first, those that all threads use together; empty where nothing says."""
    if device.type == "cuda":
        return {"L2": torch.cuda.get_device_properties(device).L2_cache_size}
    cpu = Path("/sys/devices/system/cpu/cpu0")
    levels: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        siblings = _count((cpu / "topology/thread_siblings_list").read_text())
        for index in sorted((cpu / "cache").glob("index[0-9]*")):
            level, kind, size, shared = (
                (index / f).read_text().strip() for f in ("level", "type", "size", "shared_cpu_list")
            )
            if kind == "Unified" and int(level) > 1:
                cores = max(1, _count(shared) // siblings)
                unit = {"K": 2**10, "M": 2**20}[size[-1]]
                levels[f"L{level}"] = int(size[:-1]) * unit * math.ceil(torch.get_num_threads() / cores)
    return levels


def _count(cpus: str) -> int:
    """How many a list such as "0-7,64-71" names."""
    ends = [part.split("-") for part in cpus.strip().split(",")]
    return sum(int(e[-1]) - int(e[0]) + 1 for e in ends)


def _key(device: torch.device) -> str:
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device), f"CUDA {torch.version.cuda}"
    else:
        sets = torch.backends.cpu.get_cpu_capability(), ops.kernel_for("gemm_w8a8")
        machine = cpu_name(), f"{torch.get_num_threads()} threads", *sets
    try:
        version = importlib.metadata.version("qnb")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    return " | ".join((*machine, f"torch {torch.__version__}", f"qnb {version}"))


def _cache_file() -> Path:
    """Where the values are kept: the folder that the platform names for what can be made anew."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qnb" / "ceilings.json"


def _entries() -> Iterator[tuple[str, _Values]]:
    """Every entry of the file that is as it should be."""
    try:
        content = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError, RecursionError):  # RuntimeError: there is no home
        return
    for key, values in content.items() if isinstance(content, dict) else ():
        if isinstance(values, dict) and all(_are_rates(values.get(k)) for k in ("gops_per_s", "gb_per_s")):
            yield key, {k: values[k] for k in ("gops_per_s", "gb_per_s")}


def _are_rates(values: object) -> bool:
    return isinstance(values, dict) and all(type(v) is float and 0 < v < math.inf for v in values.values())


def _load(key: str) -> _Values:
    return dict(_entries()).get(key, {"gops_per_s": {}, "gb_per_s": {}})


def _save(key: str, values: _Values) -> None:
    with contextlib.suppress(OSError, RuntimeError):
        file = _cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        try:
            part.write_text(json.dumps({**dict(_entries()), key: values}, indent=1), encoding="utf-8")
            os.replace(part, file)  # whole: another process never reads half of it
        finally:
            part.unlink(missing_ok=True)
