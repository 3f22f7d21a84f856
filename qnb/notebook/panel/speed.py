"""Latency, throughput and energy of a short piece of work, in slices that give way to whoever else wants to measure."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from qnb.env import describe
from qnb.measure.probes import Missing, choose, window
from qnb.measure.statistics import median, quantile
from qnb.measure.token import alone
from qnb.measure.workload import Timing, Workload, workload_of
from qnb.model.inputs import Sample
from qnb.model.linear import original_pass
from qnb.model.subject import devices_of, generates, is_compiled, measuring_state
from qnb.notebook.panel.prefix import stoppable

PROMPT_TOKENS, NEW_TOKENS = 64, 12
_FEWEST, _MOST, _SECONDS = 5, 12, 1.2
_ENERGY_SECONDS = 3.0
COMPILED = "the model is compiled and would compile anew after each change: measure it with %qprofile"


@dataclasses.dataclass(frozen=True)
class Speed:
    """Fields of a `Profile` that tell of speed and energy, with the reason for each that is None."""

    values: Mapping[str, Any]
    unavailable: Mapping[str, str]
    samples: Mapping[str, tuple[float, ...]]
    environment: Mapping[str, Any]


FIELDS = ("latency_ms", "prefill_tokens_per_s", "decode_tokens_per_s", "energy_mj", "energy_mj_per_token")


def measure(model: nn.Module, sample: Sample, check: Callable[[], None], as_original: bool = False) -> Speed:
    """Times the model on the start of a sample: 64 tokens and 12 new ones where it generates, else one forward."""
    if is_compiled(model):
        return Speed({}, dict.fromkeys(FIELDS, COMPILED), {}, {})
    work = _work(model, sample)
    devices = devices_of(model)
    _run(model, work, check, as_original)  # pays for caches
    timings, began = [], time.perf_counter()
    while len(timings) < _FEWEST or (len(timings) < _MOST and time.perf_counter() - began < _SECONDS):
        timings.append(_run(model, work, check, as_original))
        time.sleep(0.001)  # whoever waits for the token gets it
    samples = {"latency_ms": [1000 * t.total for t in timings]}
    if work.prompt_tokens is not None:
        samples["prefill_tokens_per_s"] = [work.prompt_tokens / (t.first or t.total) for t in timings]
    if work.new_tokens is not None and work.new_tokens > work.rows:
        samples["decode_tokens_per_s"] = [(work.new_tokens - work.rows) / t.rest for t in timings]
    values = {name: median(found) for name, found in samples.items()}
    values["latency_p5_ms"] = quantile(samples["latency_ms"], 0.05)
    values["latency_p95_ms"] = quantile(samples["latency_ms"], 0.95)
    unavailable = {}
    energy, why = _energy(model, work, devices, check, as_original)
    if energy is None:
        unavailable.update(energy_mj=why, energy_mj_per_token=why)
    else:
        values["energy_mj"] = energy
        if tokens := work.new_tokens or work.prompt_tokens:
            values["energy_mj_per_token"] = energy / tokens
    for field in FIELDS:
        if field not in values:
            unavailable.setdefault(field, "one forward was run, nothing was generated")
    environment = {
        **describe(),
        "device": ", ".join(map(str, devices)),
        "rows": work.rows,
        "prompt_tokens": work.prompt_tokens,
        "new_tokens": work.new_tokens,
    }
    return Speed(values, unavailable, {name: tuple(found) for name, found in samples.items()}, environment)


def _work(model: nn.Module, sample: Sample) -> Workload:
    if sample.ids is not None and generates(model):
        ids = sample.ids[:1, :PROMPT_TOKENS]
        return workload_of(model, None, ids.cpu(), NEW_TOKENS, None, None)
    return workload_of(model, None, None, 1, None, sample.args or dict(sample.kwargs))


def _run(model: nn.Module, work: Workload, check: Callable[[], None], as_original: bool) -> Timing:
    how = original_pass() if as_original else contextlib.nullcontext()
    with alone(model), measuring_state(model), how, stoppable(model, check):
        check()
        return work.run()


def _energy(
    model: nn.Module, work: Workload, devices: list[torch.device], check: Callable[[], None], as_original: bool
) -> tuple[float | None, str]:
    meter = choose("energy_mj", devices)
    if isinstance(meter, Missing):
        return None, meter.stop().reason
    runs, began = 0, time.perf_counter()
    with alone(model), window([meter]) as reading:
        while runs == 0 or (not meter.enough() and time.perf_counter() - began < _ENERGY_SECONDS):
            _run(model, work, check, as_original)
            runs += 1
    found = reading["energy_mj"]
    return (None, found.reason or "the meter gave no value") if found.value is None else (found.value / runs, "")
