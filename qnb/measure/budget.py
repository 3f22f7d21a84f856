"""`check`: holds a model to budgets, and raises where one is broken: a quality gate for a user's own tests."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from qnb.errors import BadInput, BudgetBroken
from qnb.measure.accuracy import Accuracy, evaluate
from qnb.measure.comparison import compare
from qnb.measure.original import ITS_OWN_ORIGINAL, Original
from qnb.measure.profile import Profile
from qnb.measure.statistics import median, ratio_interval
from qnb.measure.token import alone
from qnb.measure.workload import Workload, workload_of
from qnb.model.defaults import remembered
from qnb.model.linear import held_storages, original_pass, quantized_layers
from qnb.model.subject import check_model, devices_of, measuring_state
from qnb.results import Cell, Result, Table, format_number, one_line

_FEWEST_RUNS, _MOST_RUNS = 7, 31  # of the model and of its original, one after the other
_SECONDS = 4.0


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A budget by the name of its keyword: what it bounds, from which side, and in which unit."""

    title: str
    at_most: bool
    unit: str = ""
    highest: float = math.inf

    def words(self, limit: float) -> str:
        return f"{self.title} {'<=' if self.at_most else '>='} {limit:.12g}{self.unit}"


_KINDS = {
    "max_kl": _Kind("KL to the original", True, " nats"),
    "max_perplexity_increase": _Kind("perplexity increase", True, " %"),
    "min_top1": _Kind("same top token as the original", False, highest=1.0),
    "min_metric": _Kind("metric", False),
    "max_megabytes": _Kind("weights held", True, " MB"),
    "min_speedup": _Kind("speedup", False, " x"),
}
_OF_THE_TEXTS = ("max_kl", "max_perplexity_increase", "min_top1")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One budget: the keyword that set it, its limit, what was measured, and whether that keeps it.

    `words` says the budget alone, the same in every run; `how` what was measured, which varies. Where nothing could be
    measured `measured` is None, `how` says why, and the budget counts as broken.
    """

    budget: str
    limit: float
    measured: float | None
    passed: bool
    words: str
    how: str


@dataclasses.dataclass(frozen=True, repr=False)
class Check(Result):
    """Whether a model keeps its budgets. Its text tells what is the same in every run from what was measured.

    rows      a `Verdict` for each budget
    passed    whether all are kept
    accuracy  what was measured on texts or by the metric, or None
    notes     what else is to be known
    """

    rows: tuple[Verdict, ...]
    passed: bool
    accuracy: Accuracy | None = None
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """A line for each budget, then what was measured, each line of which begins with `measured:`."""
        verdicts = [f"{_verdict(row)}: {row.words}" for row in self.rows]
        notes = [f"measured: note: {note}" for note in self.notes]
        return "\n".join([*verdicts, *(f"measured: {row.how}" for row in self.rows), *notes])

    def _tables(self) -> Sequence[Table]:
        rows = [(row.words, Cell(_verdict(row), "good" if row.passed else "bad"), row.how) for row in self.rows]
        return [Table(("budget", "verdict", "measured"), rows, notes=[f"note: {note}" for note in self.notes])]


def check(
    model: nn.Module,
    texts: Iterable | None = None,
    tokenizer: object = None,
    *,
    max_kl: float | None = None,
    max_perplexity_increase: float | None = None,
    min_top1: float | None = None,
    min_metric: float | None = None,
    max_megabytes: float | None = None,
    min_speedup: float | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    reference: nn.Module | None = None,
    vs: Profile | None = None,
    prompt: object = None,
    new_tokens: int = 32,
    inputs: object = None,
    progress: bool = True,
) -> Check:
    """Holds the model to budgets; raises `BudgetBroken`, an AssertionError whose `result` is the Check, if one breaks.

    max_kl                   mean KL(original || now) over the tokens of `texts`, nats
    max_perplexity_increase  of the perplexity over the original's, percent
    min_top1                 share of tokens whose most likely next one is the original's, 0 to 1
    min_metric               what `metric`, a function of the model, returns
    max_megabytes            bytes of the weights really held, kept originals apart, / 10^6
    min_speedup              latency of the original / that of the model, on what `profile` would run by `prompt`,
                             `new_tokens` and `inputs`. Model and original take turns, 7 to 31 times within about four
                             seconds; the original's latency is that in `vs` instead, a profile of the same work. It is
                             a timing: leave room, or the gate breaks when the machine is busy.
    texts, tokenizer, reference, metric  as for `evaluate`; the demo model brings its own texts

    What cannot be measured breaks its budget. A model without a quantized layer is its own original: its KL is 0. Only
    what a budget needs is measured, and the model is left as it was. Raises BadInput without a budget.
    """
    check_model(model)
    given = {
        "max_kl": max_kl,
        "max_perplexity_increase": max_perplexity_increase,
        "min_top1": min_top1,
        "min_metric": min_metric,
        "max_megabytes": max_megabytes,
        "min_speedup": min_speedup,
    }
    limits = {name: _limit(name, value) for name, value in given.items() if value is not None}
    if not limits:
        raise BadInput(f"no budget is given: pass at least one of {', '.join(f'{name}=' for name in _KINDS)}")
    if ("min_metric" in limits) != callable(metric) or not (metric is None or callable(metric)):
        raise BadInput("min_metric= and metric=, a function of the model that returns a number, go together")
    if vs is not None and ("min_speedup" not in limits or not isinstance(vs, Profile)):
        raise BadInput("vs= takes a Profile of the original, and only min_speedup= looks at it")
    own_texts, tokenizer = remembered(model, tokenizer)
    texts = own_texts if texts is None else list(texts) if isinstance(texts, Iterator) else texts
    asked = [name for name in _OF_THE_TEXTS if name in limits]
    if asked and texts is None:
        raise BadInput(f"{asked[0]}= needs texts=: a list of strings with tokenizer=, or an iterable of model inputs")

    measure = _Measurement(model, texts, tokenizer, reference, progress)
    with alone(model, *([] if reference is None else [reference])) as company:
        if "min_speedup" in limits:
            measure.speed(vs, prompt, new_tokens, inputs)
        if asked:
            measure.accuracy_of_texts("max_perplexity_increase" in limits)
        if metric is not None:
            measure.metric(metric)
        measure.found["max_megabytes"] = _megabytes(model)
        company.look()
    rows = tuple(_row(name, limit, *measure.found[name]) for name, limit in limits.items())
    accuracy = measure.accuracy
    notes = [*company.notes, *(accuracy.notes if accuracy else ())]
    if reference is None and not quantized_layers(model):
        notes.append(ITS_OWN_ORIGINAL)
    result = Check(rows, all(row.passed for row in rows), accuracy, tuple(dict.fromkeys(notes)))
    if not result.passed:
        broken = [row for row in rows if not row.passed]
        words = "; ".join(f"broken: {row.words}" for row in broken)
        raise BudgetBroken(f"{words}; measured: {'; '.join(row.how for row in broken)}", result)
    return result


_Found = tuple[float | None, str]  # a value, and the value in words; or None, and why there is none


class _Measurement:
    """What was found of each budget, by its name."""

    def __init__(self, model, texts, tokenizer, reference, progress: bool) -> None:
        self._model, self._texts, self._tokenizer = model, texts, tokenizer
        self._reference, self._progress = reference, progress
        self._original = model if reference is None else reference
        self.found: dict[str, _Found] = {}
        self.accuracy: Accuracy | None = None

    def accuracy_of_texts(self, increase: bool) -> None:
        """Finds what the texts say; the original's own perplexity only where its `increase` is asked for."""
        model, texts, reference = self._model, self._texts, self._reference
        now = evaluate(model, texts, self._tokenizer, reference=reference, progress=self._progress)
        self.accuracy = now
        itself = now.unavailable.get("kl") == ITS_OWN_ORIGINAL
        self.found["max_kl"] = (0.0, "0, by definition") if itself else _value(now, "kl", _KINDS["max_kl"].unit)
        self.found["min_top1"] = (1.0, "1, by definition") if itself else _value(now, "top1", "")
        if increase:
            found = (0.0, "0, by definition") if itself else self._perplexity_increase(now)
            self.found["max_perplexity_increase"] = found

    def metric(self, metric: Callable[[nn.Module], float]) -> None:
        """Finds what the caller's own measure says; `evaluate` would take the texts that a model came with as well."""
        with measuring_state(self._model):
            value = metric(self._model)
        try:
            value = float(value)
        except (TypeError, ValueError) as error:
            raise BadInput(f"metric returned {one_line(repr(value), 60)}: it must return one number") from error
        number = math.isfinite(value)
        self.found["min_metric"] = (value, format_number(value, 4)) if number else (None, f"metric returned {value}")

    def speed(self, vs: Profile | None, prompt: object, new_tokens: int, inputs: object) -> None:
        """Finds how much faster the model is than its original."""
        model, original = self._model, self._original
        work = workload_of(model, self._tokenizer, prompt, new_tokens, self._texts, inputs)
        if vs is not None:
            _check_same_work(vs, work, model)
            why = None if vs.latency_ms is not None else vs.unavailable.get("latency_ms", "vs holds no latency")
        else:
            why = None if original is not model else self._why_no_original_pass()
        if why is not None:
            self.found["min_speedup"] = None, why
            return
        with measuring_state(model), measuring_state(original):
            if vs is not None:
                [now] = _take_turns([(work, contextlib.nullcontext)])
                then = [ms / 1000 for ms in vs._samples.get("latency_ms", (vs.latency_ms,))]
            elif original is model:
                now, then = _take_turns([(work, contextlib.nullcontext), (work, original_pass)])
            else:
                other = workload_of(original, self._tokenizer, prompt, new_tokens, self._texts, inputs)
                now, then = _take_turns([(work, contextlib.nullcontext), (other, contextlib.nullcontext)])
        interval = ratio_interval(now, then)
        ends = "" if interval is None else f" ({format_number(interval[0])} to {format_number(interval[1])})"
        value = median(then) / median(now)
        times = f"{format_number(1000 * median(then))} ms before, {format_number(1000 * median(now))} ms now"
        self.found["min_speedup"] = value, f"{format_number(value)} x{ends}, {times}"

    def _perplexity_increase(self, now: Accuracy) -> _Found:
        if now.perplexity is None:
            return None, now.unavailable["perplexity"]
        if self._reference is None and (why := Original(self._model).reason) is not None:
            return None, why
        with original_pass() if self._reference is None else contextlib.nullcontext():
            then = evaluate(self._original, self._texts, self._tokenizer, progress=self._progress)
        if then.perplexity is None:
            return None, f"of the original: {then.unavailable['perplexity']}"
        changes = compare(Profile(accuracy=then), Profile(accuracy=now)).changes
        change = next(c for c in changes if c.field == "perplexity")
        value = 100 * (now.perplexity / then.perplexity - 1)
        ends = "" if change.low is None else f" ({100 * change.low:.3g} to {100 * change.high:.3g})"
        return value, f"{value:.3g} %{ends}, from {format_number(then.perplexity, 4)}"

    def _why_no_original_pass(self) -> str | None:
        reason = Original(self._model).reason
        if reason is not None and reason != ITS_OWN_ORIGINAL:
            return reason
        for name, layer in quantized_layers(self._model).items():
            if layer.original.weight.device != layer.device:
                return f"the original of {name} lies on {layer.original.weight.device}, where it is slow: pass vs="
        return None


def _take_turns(runs: Sequence[tuple[Workload, Callable]]) -> list[list[float]]:
    """Seconds of each of the workloads, each run inside its context. In turns: a machine that slows down slows all."""

    def once(work: Workload, context: Callable) -> float:
        with context():
            return work.run().total

    for run in runs:
        once(*run)  # the first one pays for caches, thread pools and lazy loading
    seconds: list[list[float]] = [[] for _ in runs]
    began = time.perf_counter()
    while len(seconds[0]) < _FEWEST_RUNS or (len(seconds[0]) < _MOST_RUNS and time.perf_counter() - began < _SECONDS):
        for run, taken in zip(runs, seconds, strict=True):
            taken.append(once(*run))
    return seconds


def _check_same_work(vs: Profile, work: Workload, model: nn.Module) -> None:
    now = {
        "rows": work.rows,
        "prompt_tokens": work.prompt_tokens,
        "new_tokens": work.new_tokens,
        "device": ", ".join(map(str, devices_of(model))),
        "threads": torch.get_num_threads(),
    }
    for name, value in now.items():
        then = vs.environment.get(name)
        if then != value:
            raise BadInput(
                f"vs= is a profile with {name.replace('_', ' ')} {then}, and this check would run with {value}: make "
                "them alike by prompt=, new_tokens= and inputs="
            )


def _megabytes(model: nn.Module) -> _Found:
    weight_bytes, _ = held_storages(model)
    return weight_bytes / 1e6, f"{weight_bytes / 1e6:.6g} MB"


def _value(accuracy: Accuracy, field: str, unit: str) -> _Found:
    value = getattr(accuracy, field)
    if value is None:
        return None, accuracy.unavailable[field]
    error = getattr(accuracy, f"{field}_se", None)
    spread = "" if error is None else f" ± {format_number(error, 2)} standard error"
    return value, f"{format_number(value, 5 if field == 'top1' else 3)}{unit}{spread}"


def _row(name: str, limit: float, value: float | None, how: str) -> Verdict:
    kind = _KINDS[name]
    if value is None:
        return Verdict(name, limit, None, False, kind.words(limit), f"{kind.title} unavailable: {how}")
    passed = value <= limit if kind.at_most else value >= limit
    return Verdict(name, limit, value, passed, kind.words(limit), f"{kind.title} {how}")


def _verdict(row: Verdict) -> str:
    return "passed" if row.passed else "broken"


def _limit(name: str, value: object) -> float:
    kind = _KINDS[name]
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    lowest = -math.inf if name == "min_metric" else 0.0
    if not number or not lowest <= value <= kind.highest:
        allowed = f"from 0 to {kind.highest:g}" if kind.highest < math.inf else "from 0 on"
        allowed = "of any size" if lowest < 0 else allowed
        raise BadInput(f"{name}={one_line(repr(value), 40)}: give a number {allowed} ({kind.title}{kind.unit})")
    return float(value)
