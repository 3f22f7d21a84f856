"""A monitor's report as metrics of prometheus_client, made anew at each scrape. What is missing is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from qnb.errors import BadInput, QnbError
from qnb.measure.monitor_report import MonitorReport
from qnb.results import one_line

_QUANTILES = (("0.5", "latency_p50_ms"), ("0.95", "latency_p95_ms"), ("0.99", "latency_p99_ms"))
_LAYERS = (
    ("psi", "population stability index of a layer's inputs against the baseline"),
    ("clipped", "share of a layer's input values that its codes clip or saturate, 0 to 1"),
    ("error", "relative error that rounding a layer's inputs to 8-bit codes makes"),
)


class _MissingPrometheus(QnbError, ImportError):
    """prometheus_client, which only the metrics need, is not installed."""


def register(report: Callable[[], MonitorReport], registry: object = None) -> Callable[[], None]:
    """Changes `registry`, by default the process's own: it answers with `report()` until the returned function runs.

    Raises QnbError (also an ImportError) without prometheus_client, BadInput for what is no registry, or for one that
    answers for another monitor already.
    """
    try:
        from prometheus_client import REGISTRY
    except ImportError as error:
        raise _MissingPrometheus(
            f'metrics need prometheus_client, which does not import ({error}): pip install "qnb[monitor]"'
        ) from error
    registry = REGISTRY if registry is None else registry
    if not callable(getattr(registry, "register", None)) or not callable(getattr(registry, "unregister", None)):
        raise BadInput(
            f"registry is {one_line(repr(registry), 60)}: give a prometheus_client.CollectorRegistry, or None for the "
            "process's own"
        )
    collector = _Collector(report)
    try:
        registry.register(collector)
    except ValueError as error:
        raise BadInput(
            "the registry answers for another monitor already: stop that one, or give each a registry of its own"
        ) from error
    return lambda: registry.unregister(collector)


class _Collector:
    def __init__(self, report: Callable[[], MonitorReport]) -> None:
        self._report = report

    def describe(self) -> Iterator[object]:
        """The names that are taken in a registry, whatever can be measured."""
        return iter(_families().values())

    def collect(self) -> Iterator[object]:
        """The metrics of this moment."""
        report, families = self._report(), _families()

        def add(name: str, value: float | None, *labels: str) -> None:
            if value is not None:
                families[name].add_metric(labels, value)

        add("passes", report.passes)
        add("passes_sampled", report.sampled)
        add("tokens", report.tokens)
        for quantile, field in _QUANTILES:
            milliseconds = getattr(report, field)
            add("latency", None if milliseconds is None else milliseconds / 1000, quantile)
        add("energy", None if report.energy_mj is None else report.energy_mj / 1000)
        for row in report.rows:
            for field, _ in _LAYERS:
                add(field, getattr(row, field), row.name, row.scheme)
        standing = {alarm.kind: len(alarm.layers) or 1 for alarm in report.alarms}
        for kind in ("psi", "clipped", "not_finite", "latency_p95_ms"):
            add("alarm", standing.get(kind, 0), kind)
            add("alerts", sum(alert.kind == kind for alert in report.alerts), kind)
        for recipe in report.recipes:
            add("votes", recipe.good, recipe.recipe, "good")
            add("votes", recipe.bad, recipe.recipe, "bad")
            add("recipe_passes", recipe.passes, recipe.recipe, recipe.words)
        return iter(family for family in families.values() if family.samples)


def _families() -> dict[str, object]:
    from prometheus_client.core import CounterMetricFamily as Counter
    from prometheus_client.core import GaugeMetricFamily as Gauge

    layer = ("layer", "scheme")
    return {
        "passes": Counter("qnb_passes", "top-level forwards of the model", labels=()),
        "passes_sampled": Counter("qnb_passes_sampled", "forwards that were looked into", labels=()),
        "tokens": Counter("qnb_tokens", "tokens that went in", labels=()),
        "latency": Gauge("qnb_pass_seconds", "time of the last passes", labels=("quantile",)),
        "energy": Counter("qnb_energy_joules", "energy of the model's devices, idle times included", labels=()),
        **{field: Gauge(f"qnb_layer_{field}", words, labels=layer) for field, words in _LAYERS},
        "alarm": Gauge("qnb_alarm_layers", "layers beyond a threshold now; 1 for latency", labels=("kind",)),
        "alerts": Counter("qnb_alerts", "alerts since the start", labels=("kind",)),
        "votes": Counter("qnb_votes", "users' votes", labels=("recipe", "vote")),
        "recipe_passes": Counter("qnb_recipe_passes", "forwards of each recipe", labels=("recipe", "layers")),
    }
