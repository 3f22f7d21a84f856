"""`monitor`: looks into one forward in N while a model serves, and says when its inputs are no longer what they were.

A monitor is two hooks on the model itself. In a pass that is looked into, each linear layer has one as well, for the
length of that pass, which reads at most 64 rows of its inputs; all other passes are only counted and timed. Nothing
else of the model changes: it can be quantized, restored, copied, compiled and saved meanwhile, and a copy is not
monitored. While anything of qnb measures, the monitor pauses.
"""

from __future__ import annotations

import collections
import math
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qnb.errors import BadInput
from qnb.measure.monitor_alarms import Alarms, Judged
from qnb.measure.monitor_drift import CLIPPED, DYNAMIC, FEWEST_ROWS, NONE, NOT_FINITE, VALUES, Window
from qnb.measure.monitor_energy import Energy
from qnb.measure.monitor_look import Hook, Look, linear_layers, mask_of, tokens_of
from qnb.measure.monitor_recipes import Recipe, Recipes
from qnb.measure.monitor_report import Alert, MonitorReport, MonitorRow, RecipeVotes
from qnb.measure.monitor_view import View
from qnb.measure.statistics import quantile
from qnb.measure.token import alone, anyone_measures
from qnb.model.defaults import remembered
from qnb.model.inputs import samples_of
from qnb.model.subject import check_model, devices_of, is_compiled, measuring_state, synchronize
from qnb.results import one_line

__all__ = ["Alert", "Monitor", "MonitorReport", "MonitorRow", "RecipeVotes", "monitor"]

# Rows of inputs that a pass shows of each layer: more would cost more, and rows of one pass resemble each other.
_MOST_ROWS = 64
_BASELINE_ROWS = 512  # of each baseline text: nobody waits for an answer then
_LATENCIES = 1000
_FEWEST_LATENCIES = 20


def monitor(
    model: nn.Module,
    *,
    every: int = 200,
    baseline: Iterable | None = None,
    tokenizer: object = None,
    window: int = 1000,
    max_psi: float | None = 0.25,
    max_clipped: float | None = 0.01,
    max_latency_ms: float | None = None,
    on_alert: Callable[[Alert], Any] | None = None,
    registry: object = None,
    seed: int = 0,
) -> Monitor:
    """Starts to look at what `model` is given while it serves; `stop()`, or the end of a `with` block, ends that.

    every           one pass in so many is looked into, at random distances, so that no rhythm of the traffic hides one
    baseline        texts (with `tokenizer`) or model inputs like those that it was made for; without them the first
                    `window` rows that it serves are what later ones are compared with
    window          rows of inputs (tokens, in a language model) that are judged together
    max_psi         alarm when a layer's population stability index is at or above: 0.25 is read as a large shift, 0.1
                    as one to look at (Siddiqi, Credit Risk Scorecards, 2006); None for no alarm
    max_clipped     alarm when so large a share of a layer's inputs lies beyond the fixed range of its codes, or, where
                    inputs stay floats, beyond the baseline's. 0.01 is our choice: ranges calibrated by percentile
                    commonly leave 0.001 or less outside
    max_latency_ms  alarm when the 95th percentile of the passes' time is at or above
    on_alert        called with an `Alert` when something crosses its threshold, in the thread that served the pass;
                    what it raises is noted in the report and goes no further
    registry        of prometheus_client, which then answers with this monitor's metrics; see `Monitor.metrics`

    Works for models that are not quantized, too. Of a model that torch.compile runs passes are counted and timed, but
    its layers are not looked into, and the report says so. Raises BadInput for arguments that make no sense.
    """
    return Monitor(
        model,
        every=every,
        baseline=baseline,
        tokenizer=tokenizer,
        window=window,
        max_psi=max_psi,
        max_clipped=max_clipped,
        max_latency_ms=max_latency_ms,
        on_alert=on_alert,
        registry=registry,
        seed=seed,
    )


class Monitor:
    """A running monitor, made by `qnb.monitor`. It shows itself as its report does, with the fields of this moment."""

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int,
        baseline: Iterable | None,
        tokenizer: object,
        window: int,
        max_psi: float | None,
        max_clipped: float | None,
        max_latency_ms: float | None,
        on_alert: Callable[[Alert], Any] | None,
        registry: object,
        seed: int,
    ) -> None:
        check_model(model)
        _check_whole("every", every, 1)
        _check_whole("window", window, FEWEST_ROWS)
        for name, value in (("max_psi", max_psi), ("max_clipped", max_clipped), ("max_latency_ms", max_latency_ms)):
            _check_threshold(name, value)
        if on_alert is not None and not callable(on_alert):
            raise BadInput(f"on_alert is {one_line(repr(on_alert), 60)}: give a function that takes an alert, or None")
        if getattr(model, "_compiled_call_impl", None) is not None:
            raise BadInput(
                "the model was compiled in place by model.compile(), which hooks cannot look past: serve it through "
                "torch.compile(model), and monitor what that returns"
            )
        inner = getattr(model, "_orig_mod", model)
        self._compiled = is_compiled(model) and inner is not model
        # Weakly: a monitor keeps no model alive, and the model's hooks keep the monitor.
        self._model, self._inner = weakref.ref(model), weakref.ref(inner)
        self._tokenizer = remembered(inner, tokenizer)[1]
        self._every, self._draw = every, random.Random(seed)
        self._alarms = Alarms(
            {"psi": max_psi, "clipped": max_clipped, "latency_p95_ms": max_latency_ms, "not_finite": 1}
        )
        self._on_alert = on_alert
        self._devices = devices_of(inner)
        self._accelerated = any(d.type != "cpu" for d in self._devices)

        self._lock = threading.RLock()
        self._here = _Here()
        self._window = Window(window)
        self._baseline_words = f"the first {window:,} rows of inputs that it served"
        self._countdown = self._draw.randint(1, every)
        self._recipes = Recipes()
        self._last_recipe: str | None = None
        self._clipped_as: dict[str, str] = {}
        self._passes = self._sampled = self._paused = 0
        self._tokens: int | None = 0
        self._latencies: collections.deque[tuple[float, int]] = collections.deque(maxlen=_LATENCIES)
        self._notes: dict[str, None] = {}
        self._view: View | None = None
        self._unregister: Callable[[], None] | None = None
        self._ended: float | None = None

        self._recipe_of(inner)
        if baseline is not None:
            self.baseline(baseline)
        if registry is not None:
            self.metrics(registry)
        self._began = time.perf_counter()
        self._energy = Energy(self._devices)
        self._handles = []
        # The inner one as well: a compiled model's `generate` runs that, and inside compiled code hooks do nothing.
        for module in dict.fromkeys((model, inner)):
            self._handles += [
                module.register_forward_pre_hook(Hook(self._begin, self._note), with_kwargs=True),
                module.register_forward_hook(Hook(self._end, self._note), always_call=True),
            ]

    @property
    def rows(self) -> tuple[MonitorRow, ...]:
        """What is known of each linear layer at this moment: `name`, `clipped`, `psi` and more, see MonitorRow."""
        return self.report().rows

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """Every alert since the start, oldest first."""
        return tuple(self._alarms.told)

    @property
    def recipe(self) -> str | None:
        """The fingerprint of the recipe that made this thread's last pass, else the last of any thread's; None before.

        A server keeps it beside an answer, and hands it to `feedback` when the user's vote comes.
        """
        return self._here.recipe or self._last_recipe

    def feedback(self, *, good: bool, recipe: str | None = None) -> None:
        """Counts a user's vote for the recipe that answered: by default that of this thread's last pass.

        Raises BadInput where no pass has been seen, or none by that recipe.
        """
        if not isinstance(good, bool):
            raise BadInput(f"good={one_line(repr(good), 40)}: give True or False")
        asked = self.recipe if recipe is None else recipe
        if asked is None:
            raise BadInput("no pass has been seen yet, so there is no answer to vote on: call the model first")
        with self._lock:
            self._recipes.vote(asked, good)

    def baseline(self, texts: Iterable, tokenizer: object = None) -> None:
        """Runs the model on `texts`, and compares what it serves with them from now on; what was seen is forgotten.

        texts  strings (with `tokenizer`) or model inputs, like those that the model was made for. The more different
               ones, the better: rows of one text resemble each other.
        Other measurements are waited for, and changes of the model wait for this one. Raises BadInput for texts that
        cannot be run, or hold fewer than 256 rows.
        """
        inner = self._inner()
        if inner is None:
            raise BadInput("the monitored model is gone, so it cannot run a baseline: monitor a model that is there")
        if self._compiled:
            raise BadInput("the layers of a compiled model are not looked into: give a baseline to one that is not")
        samples, _ = samples_of(inner, texts, self._tokenizer if tokenizer is None else tokenizer, words="baseline")
        gathered, count = Window(self._window.size), 0
        with alone(inner), measuring_state(inner):
            for sample in samples:
                look = Look(linear_layers(inner), self._draw, mask_of(sample.args, sample.kwargs), _BASELINE_ROWS, {})
                with look:
                    inner(*sample.args, **sample.kwargs)
                gathered.add_to_baseline(look.seen())
                count += 1
        if gathered.baseline_rows < FEWEST_ROWS:
            raise BadInput(
                f"the baseline holds {gathered.baseline_rows} rows of inputs, too few to compare with: give texts of "
                f"at least {FEWEST_ROWS} tokens together"
            )
        gathered.finish_baseline()
        with self._lock:
            self._window = gathered
            self._alarms.forget()
            self._baseline_words = f"{count} given text{'' if count == 1 else 's'}, {gathered.baseline_rows:,} rows"

    def suggest(self, count: int | None = None) -> list[str]:
        """Names of layers that deserve more bits, the neediest first: at most `count`; none while no alarm stands.

        The half of the layers that take their inputs as codes which rounding changes most, of what comes in now. Which
        layers drifted furthest is another order, and a worse one: an input may be new and still fit its codes. Where no
        layer takes codes, what codes would do is said.
        """
        if count is not None:
            _check_whole("count", count, 1)
        return list(self.report().suggestions[:count])

    def report(self) -> MonitorReport:
        """What has been seen so far, frozen."""
        with self._lock:
            rows = self._rows()
            alarms = self._alarms.standing(*self._state())
            unavailable: dict[str, str] = {}
            fields = {**self._speed(unavailable), **self._spent(unavailable)}
            inner = self._inner()
            notes = dict(self._notes)
            if inner is None:
                notes["the model is gone"] = None
            if self._ended is not None:
                notes["the monitor was stopped"] = None
            if self._compiled:
                notes["the model is compiled: its passes are timed, its layers are not looked into"] = None
            return MonitorReport(
                rows=rows,
                suggestions=_suggestions(rows, alarms),
                alarms=alarms,
                alerts=tuple(self._alarms.told),
                recipes=self._recipes.votes(),
                baseline=self._baseline_words,
                seconds=(self._ended or time.perf_counter()) - self._began,
                passes=self._passes,
                sampled=self._sampled,
                paused=self._paused,
                tokens=self._tokens,
                unavailable=unavailable,
                notes=tuple(notes),
                **fields,
            )

    def metrics(self, registry: object = None) -> None:
        """Lets `registry` of prometheus_client answer with this monitor's metrics; by default the process's own.

        Serve them by `prometheus_client.start_http_server(8000)`. Raises BadInput without that package, or where
        another monitor answers in the same registry.
        """
        from qnb.measure.monitor_metrics import register

        if self._unregister is not None:
            raise BadInput("this monitor's metrics are registered already: one registry is enough")
        self._unregister = register(self.report, registry)

    def live(self, seconds: float = 1.0) -> None:
        """Shows the report below the cell, and keeps it up to date while passes are made, at most once in `seconds`.

        Raises BadInput outside IPython.
        """
        if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not seconds > 0:
            raise BadInput(f"seconds={one_line(repr(seconds), 40)}: give a number above 0")
        self._view = View(self.report(), seconds)

    def stop(self) -> MonitorReport:
        """Ends it: takes hooks and metrics away, and returns the last report. Stopping again changes nothing."""
        with self._lock:
            if self._ended is None:
                self._ended = time.perf_counter()
                for handle in self._handles:
                    handle.remove()
                self._energy.end(self._tokens)
            if self._unregister is not None:
                self._unregister()
                self._unregister = None
        report = self.report()
        if self._view is not None:
            self._view.show(report)
            self._view = None
        return report

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return self.report().text()

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()

    def _repr_pretty_(self, printer, cycle: bool) -> None:
        printer.text(self.report().text())

    # In a pass.

    def _begin(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        here = self._here
        if here.open is not None:  # an interrupt cut it off, or the model calls itself: the inner pass is the one
            here.open.drop()
            here.open = None
        if self._ended is not None or (module is not self._model() and module is not self._inner()):
            return
        if anyone_measures():
            with self._lock:
                self._paused += 1
            return
        if self._accelerated and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        inner = self._inner()
        with self._lock:
            self._countdown -= 1
            sampled = self._countdown <= 0
            # On an accelerator a pass is timed only where the queue may be emptied for it: the one before each sample.
            timed = not sampled and (not self._accelerated or self._countdown == 1)
            if sampled:
                self._countdown = self._draw.randint(1, 2 * self._every - 1)
            recipe = None if sampled else self._recipes.unchanged()
            if recipe is None:
                recipe = self._recipe_of(inner)
            look = None
            if sampled and not self._compiled:
                mask = mask_of(args, kwargs)
                look = Look(self._recipes.layers(), self._draw, mask, _MOST_ROWS, self._window.ranges)
        if timed and self._accelerated:
            synchronize(self._devices)
        here.open = _Pass(recipe, tokens_of(args, kwargs), look, timed, time.perf_counter())
        if look is not None:
            look.__enter__()

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        here = self._here
        this, here.open = here.open, None
        if this is None:
            return
        if this.timed and self._accelerated:
            synchronize(self._devices)
        seconds = time.perf_counter() - this.began
        this.drop()
        if output is None:  # the pass failed: it answered nothing
            return
        seen = {} if this.look is None else this.look.seen()
        here.recipe = self._last_recipe = this.recipe.fingerprint
        alerts: list[Alert] = []
        with self._lock:
            self._passes += 1
            this.recipe.passes += 1
            self._tokens = None if this.tokens is None or self._tokens is None else self._tokens + this.tokens
            if this.timed:
                self._latencies.append((seconds, this.tokens or 0))
            if this.look is not None:
                self._sampled += 1
                self._clipped_as.update(this.look.kinds)
                self._window.add(seen)
                alerts = self._alarms.news(*self._state())
        for alert in alerts:
            self._tell(alert)
        if self._view is not None and self._view.due():
            self._view.show(self.report())

    def _recipe_of(self, inner: nn.Module) -> Recipe:
        """The recipe that the model runs now. What was summed up of other codes than its layers' is forgotten."""
        before = self._recipes.standing
        found = self._recipes.now(inner)
        if found is not before:
            self._window.forget_sums()
        return found

    # What has been seen.

    def _rows(self) -> tuple[MonitorRow, ...]:
        window = self._window
        drift, totals, errors, counts = window.drift(), window.totals(), window.errors(), window.counts()
        clipped = self._clipped(totals)
        rows = []
        for name in dict.fromkeys((*self._recipes.schemes, *window.names)):
            base, now = counts.get(name, (0, 0))
            why = self._why_no_rows(name, base, now) or "no row since the layer's codes changed"
            measured = {"clipped": clipped.get(name), "psi": drift.get(name), "error": errors.get(name)}
            unavailable = {field: why for field, value in measured.items() if value is None}
            rows.append(
                MonitorRow(
                    name=name,
                    scheme=self._recipes.schemes.get(name, ("none",))[0],
                    **measured,
                    rows=now,
                    not_finite=int(totals[name][NOT_FINITE]) if name in totals else 0,
                    clipped_as=self._clipped_as.get(name, NONE),
                    unavailable=unavailable,
                )
            )
        return tuple(rows)

    def _clipped(self, totals: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """The clipped share of each layer that has rows, and, where its inputs stay floats, a baseline's range."""
        return {
            name: total[CLIPPED] / total[VALUES]
            for name, total in totals.items()
            if total[VALUES] and (self._clipped_as.get(name) != NONE or name in self._window.ranges)
        }

    def _why_no_rows(self, name: str, base: int, now: int) -> str | None:
        if self._compiled:
            return "the model is compiled: no hook is called for a layer inside compiled code"
        if not self._sampled:
            return f"no pass has been looked into yet: one in {self._every} is"
        if name not in self._window.names:
            return "no pass that was looked into called it; a layer inside compiled code is not seen"
        if not self._window.complete:
            return f"the baseline is being gathered: {self._window.baseline_rows:,} of {self._window.size:,} rows"
        if base < FEWEST_ROWS:
            return f"the baseline has {base} rows of its inputs, and it takes {FEWEST_ROWS}"
        if now < FEWEST_ROWS:
            return f"the window holds {now} rows of its inputs, and it takes {FEWEST_ROWS}"
        return None

    def _speed(self, unavailable: dict[str, str]) -> dict[str, float]:
        """Latency percentiles and throughput. Changes `unavailable`."""
        fields: dict[str, float] = {}
        times = [seconds for seconds, _ in self._latencies]
        names = {"latency_p50_ms": 0.5, "latency_p95_ms": 0.95, "latency_p99_ms": 0.99}
        if len(times) >= _FEWEST_LATENCIES:
            fields.update({name: 1000 * quantile(times, share) for name, share in names.items()})
        else:
            why = f"{len(times)} passes were timed, and percentiles take {_FEWEST_LATENCIES}"
            why += "; with every=1 all passes are looked into and none is timed" if self._every == 1 else ""
            unavailable.update(dict.fromkeys(names, why))
        if self._tokens is None:
            unavailable["tokens"] = unavailable["tokens_per_s"] = "the inputs hold no token ids"
        elif not times:
            unavailable["tokens_per_s"] = "no pass was timed yet"
        else:
            fields["tokens_per_s"] = sum(tokens for _, tokens in self._latencies) / sum(times)
        return fields

    def _spent(self, unavailable: dict[str, str]) -> dict[str, float]:
        """Energy. Changes `unavailable`."""
        if self._ended is None:
            self._energy.look(self._tokens)
        energy = self._energy
        if energy.reason is not None:
            unavailable["energy_mj"] = unavailable["energy_mj_per_token"] = energy.reason
            return {}
        if not energy.tokens:
            unavailable["energy_mj_per_token"] = unavailable.get("tokens", "no tokens in the windows of the meter")
            return {"energy_mj": energy.millijoules}
        return {"energy_mj": energy.millijoules, "energy_mj_per_token": energy.millijoules / energy.tokens}

    def _state(self) -> tuple[Judged, str, str]:
        """(what thresholds are compared with, the baseline in words, the recipe at present)."""
        totals = self._window.totals()
        judged = {
            "psi": self._window.drift(),
            # At the extreme code of its row each row has a value: that is no alarm.
            "clipped": {n: c for n, c in self._clipped(totals).items() if self._clipped_as.get(n) != DYNAMIC},
            "not_finite": {name: total[NOT_FINITE] for name, total in totals.items()},
            "latency_p95_ms": {},
        }
        if self._alarms.limits["latency_p95_ms"] is not None and len(self._latencies) >= _FEWEST_LATENCIES:
            judged["latency_p95_ms"] = {"": 1000 * quantile([seconds for seconds, _ in self._latencies], 0.95)}
        standing = self._recipes.standing
        return judged, self._baseline_words, "" if standing is None else standing.fingerprint

    def _tell(self, alert: Alert) -> None:
        if self._on_alert is None:
            return
        try:
            self._on_alert(alert)
        except Exception as problem:  # whoever waits for the model's answer has no part in it
            self._note(f"on_alert raised {type(problem).__name__}: {one_line(problem)}")

    def _note(self, words: str) -> None:
        self._notes[words] = None


class _Here(threading.local):
    """What a thread is in the middle of, and what it last got its answer from."""

    open: _Pass | None = None
    recipe: str | None = None


class _Pass:
    __slots__ = ("recipe", "tokens", "look", "timed", "began")

    def __init__(self, recipe: Recipe, tokens: int | None, look: Look | None, timed: bool, began: float) -> None:
        self.recipe, self.tokens, self.look, self.timed, self.began = recipe, tokens, look, timed, began

    def drop(self) -> None:
        """Takes its hooks out of the layers."""
        if self.look is not None:
            self.look.__exit__()


def _suggestions(rows: Sequence[MonitorRow], alarms: Sequence[Alert]) -> tuple[str, ...]:
    if not any(alarm.layers for alarm in alarms):
        return ()
    coded = any(row.clipped_as != NONE for row in rows)
    judged = [r for r in rows if r.error is not None and (r.clipped_as != NONE or not coded)]
    order = sorted(judged, key=lambda row: -row.error)
    return tuple(row.name for row in order[: -(-len(order) // 2)])


def _check_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise BadInput(f"{name}={one_line(repr(value), 40)}: give a whole number from {least} on")


def _check_threshold(name: str, value: object) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and math.isfinite(value) and value > 0):
        raise BadInput(f"{name}={one_line(repr(value), 40)}: give a number above 0, or None for no alarm")
