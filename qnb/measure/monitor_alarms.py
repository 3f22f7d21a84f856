"""What is beyond its threshold in what a monitor sees, and what of that is news."""

from __future__ import annotations

from collections.abc import Mapping

from qnb.measure.monitor_report import Alert
from qnb.results import format_number

# An alarm that was raised is raised anew only after its value fell this far below the threshold.
_REARM = 0.8

# Kind of alarm -> layer -> what its threshold is compared with; the latency stands under an empty name.
Judged = Mapping[str, Mapping[str, float]]


class Alarms:
    """`limits` are the thresholds by kind of alarm, None for no alarm; `told` is every alert so far, oldest first."""

    def __init__(self, limits: Mapping[str, float | None]) -> None:
        self.limits = limits
        self.told: list[Alert] = []
        self._raised: dict[str, set[str]] = {}

    def forget(self) -> None:
        """Nothing stands any more: what crosses its threshold next is news."""
        self._raised.clear()

    def standing(self, judged: Judged, baseline: str, recipe: str) -> tuple[Alert, ...]:
        """What is at or beyond its threshold, against a baseline in words, while that recipe ran."""
        alarms = []
        for kind, by_layer in judged.items():
            limit = self.limits[kind]
            beyond = {name: value for name, value in by_layer.items() if limit is not None and value >= limit}
            if beyond:
                alarms.append(_alarm(kind, beyond, limit, len(by_layer), baseline, recipe))
        return tuple(alarms)

    def news(self, judged: Judged, baseline: str, recipe: str) -> list[Alert]:
        """Alarms in which a layer is new. Changes what stands, and what was told."""
        now = {alarm.kind: alarm for alarm in self.standing(judged, baseline, recipe)}
        told = []
        for kind, limit in self.limits.items():
            standing = self._raised.get(kind, set())
            beyond = set(now[kind].layers or ("",)) if kind in now else set()
            if beyond - standing:
                told.append(now[kind])
            held = {n for n in standing if limit is not None and judged[kind].get(n, 0.0) >= _REARM * limit}
            self._raised[kind] = beyond | held
        self.told += told
        return told


def _alarm(kind: str, beyond: Mapping[str, float], limit: float, judged: int, baseline: str, recipe: str) -> Alert:
    order = sorted(beyond, key=lambda name: -beyond[name])
    value = beyond[order[0]]
    of = f"of {len(order)} of {judged} layers"
    worst = f"most in {order[0]}"
    message = {
        "psi": f"the inputs {of} drifted from {baseline}, {worst}: PSI {format_number(value)}, threshold {limit:g}",
        "clipped": f"inputs {of} lie beyond their range, {worst}: "
        f"{format_number(100 * value)} % of the values, threshold {100 * limit:g} %",
        "not_finite": f"inputs {of} hold NaN or infinity, {worst}: {value:g} rows",
        "latency_p95_ms": f"95 % of the passes take up to {format_number(value)} ms, threshold {limit:g} ms",
    }[kind]
    return Alert(kind, tuple(n for n in order if n), float(value), float(limit), recipe, message)
