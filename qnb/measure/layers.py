"""Where a run's time goes: each linear layer's share, and how near it comes to what the machine can do.

A layer is timed where it works: a clock before and one behind each of its forwards, in runs of the whole model. Timed
alone on kept inputs it would find its weights in a nearer cache than a run leaves them in, and shares of a run would
have to be guessed. What the clocks themselves cost is measured and said.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qnb.measure.ceilings import Ceilings, ceilings
from qnb.measure.statistics import median
from qnb.measure.token import Company
from qnb.measure.workload import Workload
from qnb.model.hooks import around_forwards
from qnb.model.linear import QLinear
from qnb.model.subject import devices_of, is_compiled, synchronize
from qnb.progress import progress_bar
from qnb.results import Cell, Result, Table, format_bytes, format_number

_RUNS, _SECONDS = (3, 10), 2.0  # the fewest and the most runs with clocks
_MOST_LINES, _SLOWEST = 30, 10
_NOISE = 1.05  # what a layer may do better than a ceiling before that is measured again


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One linear layer, in all of a run's calls with about as many rows of activations (within a factor of two).

    rows           the fewest and the most rows M of a call
    calls          in one run; call_us is the median time of one, time_ms that of all of them, share their part of a run
    weight_bytes   weight, scales and bias as they are held
    operations     of one run, 2 M N K a call; moved_bytes: weights, inputs and outputs, each once a call
    gops_per_s     10^9 operations a second reached; gb_per_s 10^9 bytes a second
    arithmetic     whose ceiling bounds them, as is level for the bytes: where the weights of a run lie between two
    attainable_gops_per_s  by the roofline, of_attainable the part of it that was reached, bound its lower ceiling;
                   None where a ceiling is missing (`LayerProfile.ceilings` says why)
    """

    name: str
    shape: tuple[int, int]
    scheme: str
    kernel: str
    device: str
    rows: tuple[int, int]
    calls: int
    call_us: float
    time_ms: float
    share: float
    weight_bytes: int
    operations: int
    moved_bytes: int
    gops_per_s: float
    gb_per_s: float
    arithmetic: str
    level: str
    attainable_gops_per_s: float | None
    of_attainable: float | None
    bound: str | None

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.moved_bytes

    @property
    def kind(self) -> str:
        """The name with its numbers replaced: model.layers.3.mlp.up_proj -> model.layers.*.mlp.up_proj."""
        return ".".join("*" if part.isdigit() else part for part in self.name.split("."))


@dataclasses.dataclass(frozen=True, repr=False)
class LayerProfile(Result):
    """What each linear layer of a model costs in a run, by `LayerRow`s in the model's order.

    run_ms      median of the runs with clocks in them, of which `runs` were made; slowdown is what the clocks added
    ceilings    what the model's devices reach
    not_called  linear layers that the run passed by, or whose weight other code reads directly
    """

    rows: tuple[LayerRow, ...]
    run_ms: float
    runs: int
    slowdown: float
    ceilings: tuple[Ceilings, ...]
    not_called: tuple[str, ...]

    def tables(self) -> Sequence[Table]:
        """One line for each kind of layer, then the slowest layers, for results that show this one as a part."""
        groups: dict[tuple, list[LayerRow]] = defaultdict(list)
        for row in self.rows:
            groups[(row.kind, row.shape, row.scheme, row.kernel, row.device, row.rows[1].bit_length())].append(row)
        taken, whole = sum(r.time_ms for r in self.rows), self.run_ms
        lead = (
            f"Linear layers take {_percent(taken / whole)} of a run, {format_number(taken)} of {format_number(whole)} "
            "ms; the rest is everything else."
        )
        grouped = len(groups) < len(self.rows)
        listed = sorted(groups.values(), key=lambda g: -sum(r.time_ms for r in g))[:_MOST_LINES]
        lines = [_line(group) for group in groups.values() if group in listed]
        if len(groups) > len(listed):
            left = taken - sum(r.time_ms for group in listed for r in group)
            lines.append((f"{len(groups) - len(listed)} more kinds", *[""] * 5, format_number(left), *[""] * 5))
        tables = [Table(_COLUMNS, lines, [lead], [] if grouped else self._notes(), _RIGHT)]
        if grouped:
            slowest = sorted(self.rows, key=lambda r: -r.time_ms)[:_SLOWEST]
            tables.append(Table(_SLOW_COLUMNS, [_slow_line(r) for r in slowest], (), self._notes(), _SLOW_RIGHT))
        return tables

    def _tables(self) -> Sequence[Table]:
        return self.tables()

    def _notes(self) -> list[str]:
        cost = f"made a run {_percent(self.slowdown)} longer" if self.slowdown > 0 else "made a run no longer"
        notes = [
            f"times: medians of {self.runs} runs with a clock before and behind each layer's forward, which {cost}",
            "Gop/s: a multiply and an add are two; GB/s: weights, inputs and outputs, each once a call",
        ]
        for known in self.ceilings:
            speeds = [f"{name} {format_number(v)}" for name, v in known.gops_per_s.items()]
            reads = [f"{name} {format_number(v)}" for name, v in known.gb_per_s.items()]
            missing = [f"{name} unavailable: {why}" for name, why in known.unavailable.items()]
            reached = "; ".join(filter(None, (_rates(speeds, "Gop/s"), _rates(reads, "GB/s"), *missing)))
            notes.append(f"ceilings, the best that large products and reads reached on {known.name}: {reached}")
        sizes: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
        for row in self.rows:
            sizes[row.device, row.level][row.name] = row.weight_bytes
        for (device, level), by_name in sizes.items():
            held = format_bytes(sum(by_name.values()))
            notes.append(
                f"the weights that a run reads on {device}, {held}, are held to {level}'s rate: it has room for all"
            )
        if self.not_called:
            notes.append(f"not called in this run: {_some(self.not_called)}")
        return notes


def why_no_layers(model: nn.Module) -> str | None:
    """Why its layers cannot be timed one by one; None where they can."""
    if is_compiled(model):
        return "torch.compile runs several layers as one piece: profile the model before it is compiled"
    if not any(isinstance(m, nn.Linear) for m in model.modules()):
        return "the model has no Linear layer"
    other = [d for d in devices_of(model) if d.type not in ("cpu", "cuda")]
    return f"layers are timed on CPU and CUDA, not on {other[0]}" if other else None


def time_layers(
    model: nn.Module, work: Workload, plain_ms: float, repeat: int | None, company: Company, progress: bool
) -> LayerProfile:
    """Runs the work with a clock at each linear layer; `plain_ms` is the median of a run without. Changes nothing."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    modules = list(layers.values())
    clocks = [_clock(_device_of(m)) for m in modules]
    devices = devices_of(model)
    began, totals, runs = time.perf_counter(), [], []
    fewest, most = _RUNS if repeat is None else (repeat, repeat)
    with progress_bar(most if fewest == most else None, "timing layers", progress) as bar:
        while len(runs) < fewest or (len(runs) < most and time.perf_counter() - began < _SECONDS):
            calls, total_s = _one_run(modules, clocks, devices, work)
            totals.append(1000 * total_s)
            runs.append(calls)
            company.look()
            bar.update()
    called = {call.layer for calls in runs for call in calls}
    rows, known = _rows(list(layers.items()), runs, median(totals))
    return LayerProfile(
        rows=rows,
        run_ms=median(totals),
        runs=len(runs),
        slowdown=median(totals) / plain_ms - 1,
        ceilings=known,
        not_called=tuple(name for i, name in enumerate(layers) if i not in called),
    )


@dataclasses.dataclass(frozen=True)
class _Call:
    """One forward of a layer: its number, rows M and type of the activations, seconds."""

    layer: int
    rows: int
    dtype: torch.dtype
    seconds: float


class _HostClock:
    now = staticmethod(time.perf_counter)

    @staticmethod
    def seconds(began: float, ended: float) -> float:
        return ended - began


class _CudaClock:
    """Events in the stream: the time until the GPU has done a layer's work, gaps between its kernels included."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    @staticmethod
    def seconds(began: torch.cuda.Event, ended: torch.cuda.Event) -> float:
        return began.elapsed_time(ended) / 1000


def _clock(device: torch.device) -> _HostClock | _CudaClock:
    return _CudaClock(device) if device.type == "cuda" else _HostClock()


def _one_run(
    modules: Sequence[nn.Module], clocks: Sequence[Any], devices: list[torch.device], work: Workload
) -> tuple[list[_Call], float]:
    """The calls of one run, and the seconds that it took."""
    starts: list[Any] = []
    seen: list[tuple[int, int, torch.dtype, Any, Any]] = []

    def before(i: int) -> None:
        starts.append(clocks[i].now())

    def behind(i: int, output: Any) -> None:
        ended, began = clocks[i].now(), starts.pop()
        if isinstance(output, Tensor) and output.numel():
            seen.append((i, output.numel() // output.shape[-1], output.dtype, began, ended))

    with around_forwards(modules, before, behind):
        total_s = work.run().total
    synchronize(devices)
    return [_Call(i, rows, dtype, clocks[i].seconds(a, b)) for i, rows, dtype, a, b in seen], total_s


def _rows(
    layers: Sequence[tuple[str, nn.Linear]], runs: Sequence[Sequence[_Call]], run_ms: float
) -> tuple[tuple[LayerRow, ...], tuple[Ceilings, ...]]:
    """A row for each layer and size of its calls, and the ceilings of the devices that they ran on."""
    groups: dict[tuple[int, int], list[list[_Call]]] = defaultdict(lambda: [[] for _ in runs])
    for number, calls in enumerate(runs):
        for call in calls:
            groups[call.layer, call.rows.bit_length()][number].append(call)
    sizes = {i: _weight_bytes(layers[i][1]) for i, _ in groups}
    on = {i: _device_of(layers[i][1]) for i, _ in groups}
    wanted: dict[torch.device, list[str]] = defaultdict(list)
    for (i, _), by_run in groups.items():
        arithmetic = _arithmetic(layers[i][1], next(c for calls in by_run for c in calls).dtype)
        if arithmetic not in wanted[on[i]]:
            wanted[on[i]].append(arithmetic)

    def placed(again: Iterable[torch.device]) -> tuple[list[LayerRow], dict[torch.device, Ceilings]]:
        known = {d: ceilings(d, names, again=d in again) for d, names in wanted.items()}
        levels = {d: known[d].level_of(sum(n for i, n in sizes.items() if on[i] == d)) for d in known}
        rows = [
            _row(*layers[i], by_run, sizes[i], known[on[i]], levels[on[i]], run_ms)
            for (i, _), by_run in sorted(groups.items())
        ]
        return rows, known

    rows, known = placed(())
    beaten = [d for d in known if any(r.device == str(d) and (r.of_attainable or 0.0) > _NOISE for r in rows)]
    if beaten:
        rows, known = placed(beaten)
    return tuple(rows), tuple(known.values())


def _row(
    name: str,
    layer: nn.Linear,
    runs: Sequence[Sequence[_Call]],
    weight_bytes: int,
    known: Ceilings,
    level: str,
    run_ms: float,
) -> LayerRow:
    calls = [c for run in runs for c in run]
    a_run = max(runs, key=len)  # all alike, but for models that choose layers by chance
    n, k = layer.out_features, layer.in_features
    time_ms = 1000 * _typical_seconds([[c.seconds for c in run] for run in runs])
    operations = sum(2 * c.rows * n * k for c in a_run)
    moved = sum(weight_bytes + c.rows * (n + k) * c.dtype.itemsize for c in a_run)
    gops, gb = (x / (time_ms / 1000) / 1e9 if time_ms else 0.0 for x in (operations, moved))
    arithmetic = _arithmetic(layer, calls[0].dtype)
    attainable, bound = known.attainable(arithmetic, level, operations / moved) or (None, None)
    return LayerRow(
        name=name,
        shape=(n, k),
        scheme=layer.scheme if isinstance(layer, QLinear) else "none",
        kernel=layer.variant.kernel() if isinstance(layer, QLinear) else "torch",
        device=known.device,
        rows=(min(c.rows for c in calls), max(c.rows for c in calls)),
        calls=len(a_run),
        call_us=median([1e6 * c.seconds for c in calls]),
        time_ms=time_ms,
        share=time_ms / run_ms,
        weight_bytes=weight_bytes,
        operations=operations,
        moved_bytes=moved,
        gops_per_s=gops,
        gb_per_s=gb,
        arithmetic=arithmetic,
        level=level,
        attainable_gops_per_s=attainable,
        of_attainable=None if attainable is None else gops / attainable,
        bound=bound,
    )


def _typical_seconds(runs: Sequence[Sequence[float]]) -> float:
    """Seconds of a run's calls together, each by its median over the runs: what disturbed one run is passed over."""
    if len({len(run) for run in runs}) == 1:
        return sum(median(call) for call in zip(*runs, strict=True))
    return median([sum(run) for run in runs])


def _device_of(layer: nn.Linear) -> torch.device:
    return layer.device if isinstance(layer, QLinear) else layer.weight.device


def _weight_bytes(layer: nn.Linear) -> int:
    bias = 0 if layer.bias is None else layer.bias.nbytes
    return (layer.variant.nbytes if isinstance(layer, QLinear) else layer.weight.nbytes) + bias


def _arithmetic(layer: nn.Linear, dtype: torch.dtype) -> str:
    """What the layer multiplies in: integers where activations are 8 bits, f32 in qnb's other kernels, else torch's."""
    if not isinstance(layer, QLinear):
        return str(dtype).removeprefix("torch.")
    return "int8" if re.match(r"w\d+a8(?!\d)", layer.scheme) else "float32"


_COLUMNS = "layers", "count", "N x K", "scheme", "kernel", "rows", "ms", "share", "weights", "Gop/s", "GB/s", "reached"
_RIGHT = frozenset({1, 2, 5, 6, 7, 8, 9, 10})
_SLOW_COLUMNS = "slowest layers", "rows", "calls", "one call", "ms", "share", "Gop/s", "GB/s", "reached"
_SLOW_RIGHT = frozenset({1, 2, 3, 4, 5, 6, 7})


def _line(rows: Sequence[LayerRow]) -> tuple[str | Cell, ...]:
    """One line of the table for layers of one kind."""
    first, seconds = rows[0], sum(r.time_ms for r in rows) / 1000
    operations, moved = sum(r.operations for r in rows), sum(r.moved_bytes for r in rows)
    ideal = [r.operations / r.attainable_gops_per_s / 1e9 for r in rows if r.attainable_gops_per_s]
    return (
        first.name if len(rows) == 1 else first.kind,
        str(len(rows)),
        f"{first.shape[0]} x {first.shape[1]}",
        Cell(first.scheme, "muted" if first.scheme == "none" else ""),
        first.kernel,
        _span((min(r.rows[0] for r in rows), max(r.rows[1] for r in rows))),
        format_number(1000 * seconds),
        _percent(sum(r.share for r in rows)),
        format_bytes(sum(r.weight_bytes for r in rows)),
        format_number(operations / seconds / 1e9 if seconds else None),
        format_number(moved / seconds / 1e9 if seconds else None),
        _reached(sum(ideal) / seconds if seconds and len(ideal) == len(rows) else None, first.bound),
    )


def _slow_line(row: LayerRow) -> tuple[str | Cell, ...]:
    return (
        row.name,
        _span(row.rows),
        str(row.calls),
        f"{format_number(row.call_us)} us",
        format_number(row.time_ms),
        _percent(row.share),
        format_number(row.gops_per_s),
        format_number(row.gb_per_s),
        _reached(row.of_attainable, row.bound),
    )


def _reached(share: float | None, bound: str | None) -> str | Cell:
    return Cell("unavailable", "muted") if share is None else f"{_percent(share)} of {bound}"


def _span(rows: tuple[int, int]) -> str:
    return f"{rows[0]}" if rows[0] == rows[1] else f"{rows[0]} to {rows[1]}"


def _percent(share: float) -> str:
    return f"{format_number(100 * share, 2)} %" if share < 0.0995 else f"{100 * share:.0f} %"


def _rates(words: Sequence[str], unit: str) -> str:
    return f"{', '.join(words)} {unit}" if words else ""


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
