"""`profile`: how fast, large, hungry and good a model is now. `profile_code`: the same meters over any code."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qnb.env import describe
from qnb.errors import BadInput
from qnb.measure.accuracy import Accuracy, evaluate
from qnb.measure.comparison import Comparison, compare
from qnb.measure.layers import LayerProfile, time_layers, why_no_layers
from qnb.measure.probes import Missing, Reading, choose, window
from qnb.measure.profile_table import METER, notes, value_rows
from qnb.measure.statistics import median, quantile
from qnb.measure.token import Company, alone
from qnb.measure.trace import prepare_trace, where_to_open, write_trace
from qnb.measure.workload import NEW_TOKENS, Timing, Workload, workload_of
from qnb.model.cache import cached_bytes
from qnb.model.defaults import remember_defaults, remembered
from qnb.model.inputs import samples_of
from qnb.model.linear import disk_bytes, held_storages, quantized_layers
from qnb.model.subject import check_model, devices_of, is_compiled, measuring_state
from qnb.progress import progress_bar
from qnb.results import Cell, Result, Table, one_line

__all__ = ["CodeProfile", "Profile", "profile", "profile_code", "remember_defaults"]

_HALVES = (4, 15), (3, 15)  # the fewest and the most timed runs of each half
_SECONDS = 4.0  # for both
# Peak memory and energy are measured apart from the timing, which their threads would disturb.
_WINDOWS = 3
_WINDOW_SECONDS = 5.0


@dataclasses.dataclass(frozen=True, repr=False)
class Profile(Result):
    """What a model costs and how good it is. A field that could not be measured is None; `unavailable` says why.

    latency_ms              median of a run: prompt plus new tokens by `generate`, or one forward; p5 and p95 beside
    prefill_tokens_per_s    prompt tokens by the time to the first new token, or by the time of one forward
    decode_tokens_per_s     the new tokens behind the first, by the time they took; in a batch those of all its rows
    weight_bytes            unique storages that the model really holds; original_bytes those of kept originals alone
    peak_host_bytes         most memory resident in this process during a run; peak_cuda_bytes allocated on its GPUs
    energy_mj               of one run; energy_mj_per_token by its new tokens, or by those of the forward
    accuracy                an Accuracy, see there
    layers                  a LayerProfile, see there, where one was asked for
    trace                   the file that torch's profiler wrote, where one was asked for
    environment             machine, versions, prompt, runs, which meters were used, and in its notes what else ran, or
                            waited to run, meanwhile
    """

    latency_ms: float | None = None
    latency_p5_ms: float | None = None
    latency_p95_ms: float | None = None
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    weight_bytes: int | None = None
    original_bytes: int | None = None
    peak_host_bytes: int | None = None
    peak_cuda_bytes: int | None = None
    energy_mj: float | None = None
    energy_mj_per_token: float | None = None
    accuracy: Accuracy | None = None
    layers: LayerProfile | None = None
    trace: str | None = None
    unavailable: Mapping[str, str] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    _samples: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)

    def against(self, before: Profile) -> Comparison:
        """This profile beside an earlier one: what got worse first, changes with 95 % intervals."""
        if not isinstance(before, Profile):
            raise BadInput(f"a profile of a model is compared with another one, not with a {type(before).__name__}")
        return compare(before, self)

    def _tables(self) -> Sequence[Table]:
        rows = value_rows(self)
        rows += [(title, value, how) for title, value, how in self.accuracy.rows()] if self.accuracy else []
        if self.accuracy is None:
            rows.append(("accuracy", "unavailable", Cell(self.unavailable["accuracy"], "muted")))
        below = notes(self.environment) + ([where_to_open(self.trace)] if self.trace else [])
        table = Table(("quantity", "value", "how measured"), rows, notes=below, numeric=frozenset({1}))
        return [table, *(self.layers.tables() if self.layers else ())]


@dataclasses.dataclass(frozen=True, repr=False)
class CodeProfile(Result):
    """What a piece of code cost: the fields of `Profile` that make sense for any code."""

    latency_ms: float | None = None
    latency_p5_ms: float | None = None
    latency_p95_ms: float | None = None
    peak_host_bytes: int | None = None
    peak_cuda_bytes: int | None = None
    energy_mj: float | None = None
    unavailable: Mapping[str, str] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    _samples: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)

    def against(self, before: CodeProfile) -> Comparison:
        """This run beside an earlier one: what got worse first."""
        if not isinstance(before, CodeProfile):
            raise BadInput(f"a profile of code is compared with another one, not with a {type(before).__name__}")
        return compare(before, self)

    def _tables(self) -> Sequence[Table]:
        table = Table(
            ("quantity", "value", "how measured"),
            value_rows(self),
            notes=notes(self.environment),
            numeric=frozenset({1}),
        )
        return [table]


def profile(
    model: nn.Module,
    tokenizer: object = None,
    *,
    prompt: object = None,
    new_tokens: int = NEW_TOKENS,
    texts: Iterable | None = None,
    inputs: object = None,
    metric: Callable[[nn.Module], float] | None = None,
    repeat: int | None = None,
    layers: bool = False,
    trace: str | os.PathLike | None = None,
    progress: bool = True,
) -> Profile:
    """Measures the model as it is: latency, throughput, memory, energy, and accuracy where there are texts.

    A model that generates text continues `prompt` (a string or ids) greedily by exactly `new_tokens` tokens; without a
    prompt it takes the start of the first text, else a plain one, else random ids. Another model runs `inputs` (a
    tensor, a tuple of arguments or a dict of them) once forward.
    texts, tokenizer, metric  as for `evaluate`; the demo model brings its own
    repeat                    how often to run; by default 7 to 30 times within about four seconds
    layers                    also time each Linear layer, in further runs, and hold it against what the machine can do
    trace                     a folder: torch's profiler writes one further run there, its layers named, as a file that
                              Perfetto and TensorBoard open

    The model is left as it was, also by an interrupt. Another thread's measurement is waited for, and other threads'
    changes of the model wait for this one. Raises BadInput for what cannot be run.
    """
    check_model(model)
    _check_repeat(repeat)
    own_texts, tokenizer = remembered(model, tokenizer)
    texts = own_texts if texts is None else texts
    if isinstance(texts, Sequence):
        samples_of(model, texts, tokenizer)  # what evaluate would refuse is refused before seconds of timing
    work = workload_of(model, tokenizer, prompt, new_tokens, texts, inputs)
    folder = None if trace is None else prepare_trace(trace)
    devices = devices_of(model)
    halves = _HALVES if repeat is None else ((repeat - repeat // 2,) * 2, (repeat // 2,) * 2)
    filled = _Fields()
    with alone(model) as company:
        # Half of the runs before the texts and half behind them, so that intervals see how the machine drifts.
        with measuring_state(model):
            _warm_up(work)
            timings = _time(work, *halves[0], company, progress)
            _fill_memory(filled, work, devices)
            _fill_energy(filled, work, devices)
        filled.values["weight_bytes"], filled.values["original_bytes"] = held_storages(model)
        filled.environment["original_disk_bytes"] = disk_bytes(model)
        filled.environment["cached_bytes"] = cached_bytes()
        if texts is not None or metric is not None:
            filled.values["accuracy"] = evaluate(model, texts, tokenizer, metric=metric, progress=progress)
        else:
            filled.unavailable["accuracy"] = (
                "no texts given: pass texts= (held-out strings; with random weights accuracy means nothing) or metric="
            )
        with measuring_state(model):
            if "accuracy" in filled.values and timings[-1].total < _SECONDS / 2:
                work.run()  # the texts took its place in the caches
            timings += _time(work, *halves[1], company, progress)
            _fill_times(filled, work, timings)
            _fill_layers(filled, model, work, layers, repeat, company, progress)
            _fill_trace(filled, model, work, folder)
        filled.environment.update(_about(model, devices, work, len(timings)))
        company.look()
    filled.note(company, filled.values.get("accuracy"))
    return Profile(
        **filled.values,
        unavailable=filled.unavailable,
        environment=filled.environment,
        _samples={name: tuple(values) for name, values in filled.samples.items()},
    )


def profile_code(run: Callable[[], None], repeat: int = 1) -> CodeProfile:
    """Measures `run()`, which is called `repeat` times and no more; what it raises comes out unchanged.

    Another thread's measurement is waited for.
    """
    if not callable(run):
        raise BadInput(f"run is {one_line(repr(run), 60)}: give a function without arguments")
    _check_repeat(repeat)
    devices = [torch.device("cpu")]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    filled = _Fields()
    readings: list[Mapping[str, Reading]] = []
    with alone() as company, window([choose("energy_mj", devices)]) as energy:
        for _ in range(repeat):
            meters = [choose(quantity, devices) for quantity in ("peak_host_bytes", "peak_cuda_bytes", "latency_ms")]
            with window(meters) as reading:
                run()
            readings.append(reading)
            company.look()
    for quantity in ("latency_ms", "peak_host_bytes", "peak_cuda_bytes"):
        filled.take(quantity, [r[quantity] for r in readings])
    _fill_spread(filled)
    filled.take("energy_mj", [_divided(energy["energy_mj"], repeat)])
    filled.environment.update(describe(), devices=sorted({d.type for d in devices}), runs=repeat)
    filled.note(company)
    return CodeProfile(
        **filled.values,
        unavailable=filled.unavailable,
        environment=filled.environment,
        _samples={name: tuple(values) for name, values in filled.samples.items()},
    )


class _Fields:
    """What is known so far of a profile."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.unavailable: dict[str, str] = {}
        self.samples: dict[str, list[float]] = {}
        self.environment: dict[str, Any] = {}

    def put(self, name: str, samples: Sequence[float]) -> None:
        """Stores a quantity as the median of its samples."""
        self.samples[name] = list(samples)
        self.values[name] = median(samples)

    def take(self, quantity: str, readings: Sequence[Reading]) -> None:
        """Stores a meter's readings, or why there are none."""
        last = readings[-1]
        failed = next((r for r in readings if r.value is None), None)
        if failed is None:
            whole = quantity.endswith("_bytes")
            self.put(quantity, [r.value for r in readings])
            self.values[quantity] = int(self.values[quantity]) if whole else self.values[quantity]
        else:
            self.unavailable[quantity] = failed.reason or "the meter gave no value"
        about = {"source": last.source, "steps": last.steps, "spread": last.spread, "notes": list(last.notes) or None}
        self.environment.update({f"{METER[quantity]}_{k}": v for k, v in about.items() if v is not None})

    def note(self, company: Company, accuracy: Accuracy | None = None) -> None:
        """Adds what else ran meanwhile to the notes of the environment."""
        notes = *self.environment.get("notes", ()), *company.notes, *(accuracy.notes if accuracy else ())
        if notes:
            self.environment["notes"] = list(dict.fromkeys(notes))


def _check_repeat(repeat: object) -> None:
    if repeat is not None and (not isinstance(repeat, int) or isinstance(repeat, bool) or repeat < 1):
        raise BadInput(f"repeat={one_line(repr(repeat), 40)}: give a whole number from 1 on")


def _warm_up(work: Workload) -> None:
    # The first run pays for caches, thread pools and lazy loading; a second one only where it is cheap.
    if work.run().total < _SECONDS / 2:
        work.run()


def _time(work: Workload, fewest: int, most: int, company: Company, progress: bool) -> list[Timing]:
    """Half of the timed runs: from `fewest` to `most`, as half of the seconds allow."""
    began, timings = time.perf_counter(), []
    with progress_bar(most if fewest == most else None, "profiling", progress) as bar:
        while len(timings) < fewest or (len(timings) < most and time.perf_counter() - began < _SECONDS / 2):
            timings.append(work.run())
            company.look()
            bar.update()
    return timings


def _fill_times(filled: _Fields, work: Workload, timings: Sequence[Timing]) -> None:
    filled.put("latency_ms", [1000 * t.total for t in timings])
    _fill_spread(filled)
    filled.environment["clock_source"] = "time.perf_counter, accelerators synchronized"
    if work.prompt_tokens is None:
        filled.unavailable["prefill_tokens_per_s"] = "the inputs hold no token ids"
    else:
        filled.put("prefill_tokens_per_s", [work.prompt_tokens / (t.first or t.total) for t in timings])
    if work.new_tokens is None:
        filled.unavailable["decode_tokens_per_s"] = "one forward was run, nothing was generated"
    elif work.new_tokens == work.rows:
        filled.unavailable["decode_tokens_per_s"] = "one new token: decoding starts with the second"
    else:
        filled.put("decode_tokens_per_s", [(work.new_tokens - work.rows) / t.rest for t in timings])


def _fill_spread(filled: _Fields) -> None:
    latencies = filled.samples["latency_ms"]
    if len(latencies) > 1:
        filled.values["latency_p5_ms"] = quantile(latencies, 0.05)
        filled.values["latency_p95_ms"] = quantile(latencies, 0.95)
    else:
        why = "one run has no percentiles: see repeat="
        filled.unavailable.update(latency_p5_ms=why, latency_p95_ms=why)


def _fill_memory(filled: _Fields, work: Workload, devices: Sequence[torch.device]) -> None:
    readings: list[Mapping[str, Reading]] = []
    began = time.perf_counter()
    while len(readings) < _WINDOWS and (not readings or time.perf_counter() - began < _SECONDS / 2):
        with window([choose("peak_host_bytes", devices), choose("peak_cuda_bytes", devices)]) as reading:
            work.run()
        readings.append(reading)
    for quantity in ("peak_host_bytes", "peak_cuda_bytes"):
        filled.take(quantity, [r[quantity] for r in readings])


def _fill_layers(
    filled: _Fields, model: nn.Module, work: Workload, asked: bool, repeat: int | None, company: Company, progress: bool
) -> None:
    reason = why_no_layers(model) if asked else "not asked for: pass layers=True"
    if reason is not None:
        filled.unavailable["layers"] = reason
        return
    plain_ms = filled.values["latency_ms"]
    filled.values["layers"] = time_layers(model, work, plain_ms, repeat, company, progress)


def _fill_trace(filled: _Fields, model: nn.Module, work: Workload, folder: Path | None) -> None:
    if folder is None:
        filled.unavailable["trace"] = "not asked for: pass trace=, a folder"
    else:
        filled.values["trace"] = str(write_trace(model, work, folder))


def _fill_energy(filled: _Fields, work: Workload, devices: Sequence[torch.device]) -> None:
    readings: list[Reading] = []
    while len(readings) < _WINDOWS:
        meter = choose("energy_mj", devices)
        if isinstance(meter, Missing):
            readings = [meter.stop()]
            break
        began, runs = time.perf_counter(), 0
        with window([meter]) as reading:
            while runs == 0 or (not meter.enough() and time.perf_counter() - began < _WINDOW_SECONDS):
                work.run()
                runs += 1
        readings.append(_divided(reading["energy_mj"], runs))
        if readings[-1].value is None:
            break
    filled.take("energy_mj", readings)
    tokens = work.new_tokens or work.prompt_tokens
    if "energy_mj" not in filled.values:
        filled.unavailable["energy_mj_per_token"] = filled.unavailable["energy_mj"]
    elif tokens is None:
        filled.unavailable["energy_mj_per_token"] = "the inputs hold no token ids"
    else:
        filled.put("energy_mj_per_token", [e / tokens for e in filled.samples["energy_mj"]])


def _divided(reading: Reading, runs: int) -> Reading:
    if reading.value is None:
        return reading
    spread = None if reading.spread is None else reading.spread / runs
    return dataclasses.replace(reading, value=reading.value / runs, spread=spread)


def _about(model: nn.Module, devices: Sequence[torch.device], work: Workload, runs: int) -> dict[str, Any]:
    layers = quantized_layers(model).values()
    dtypes = Counter(p.dtype for p in model.parameters() if p.is_floating_point())
    return {
        **describe(),
        "device": ", ".join(map(str, devices)),
        "dtype": str(dtypes.most_common(1)[0][0]).removeprefix("torch.") if dtypes else "none",
        "schemes": dict(Counter(q.scheme for q in layers)),
        "kernels": dict(Counter(q.variant.kernel() for q in layers)),
        "compiled": is_compiled(model),
        "prompt": work.prompt,
        "rows": work.rows,
        "prompt_tokens": work.prompt_tokens,
        "new_tokens": work.new_tokens,
        "runs": runs,
        **_compiled_aside(model, work),
    }


def _compiled_aside(model: nn.Module, work: Workload) -> dict[str, Any]:
    # The wrapper hands `generate` on to the module inside it, whose forward is not the compiled one.
    if not hasattr(model, "_orig_mod") or work.new_tokens is None:
        return {}
    return {"notes": ["generate passes torch.compile's wrapper by, so the times are uncompiled: use model.compile()"]}
