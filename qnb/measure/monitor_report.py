"""What a monitor has seen, frozen: rows of layers, alarms, votes by recipe, and the tables that show them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from qnb.results import Cell, Result, Table, format_number

_SHOWN = 10  # layers in a table: those that drifted furthest
_NAMED = 5  # layers that deserve more bits, in a line


@dataclasses.dataclass(frozen=True)
class MonitorRow:
    """One linear layer in the present window. A field that is None has its reason in `unavailable`.

    clipped     share of input values, 0 to 1, that `clipped_as` says: beyond the fixed range of the layer's codes, at
                the extreme code of their row (at least one of each row is), or, for inputs that stay floats, beyond the
                widest of the baseline, which a scale fixed by that baseline would clip
    psi         population stability index of the ranges of its rows of inputs against the baseline
    error       what rounding the inputs to 8-bit codes changes: root of the sum of squares, relative to the inputs'; of
                inputs that stay floats, what codes with a scale for each row would change
    rows        how many rows of inputs the window holds; not_finite how many more held NaN or infinity
    """

    name: str
    scheme: str
    clipped: float | None
    psi: float | None
    error: float | None
    rows: int
    not_finite: int
    clipped_as: str
    unavailable: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Alert:
    """Something crossed its threshold: `kind` is psi, clipped, not_finite or latency_p95_ms.

    layers  the layers that crossed it, worst first; empty for latency
    value   the worst; `recipe` what the model ran then
    """

    kind: str
    layers: tuple[str, ...]
    value: float
    threshold: float
    recipe: str
    message: str


@dataclasses.dataclass(frozen=True)
class RecipeVotes:
    """What users thought of one recipe. `recipe` is a fingerprint of which layer runs in what; `words` sums it up."""

    recipe: str
    words: str
    passes: int
    good: int
    bad: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the share of good votes; None without a vote.

        Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927.
        """
        n = self.good + self.bad
        if not n:
            return None
        z, share = 1.959964, self.good / n
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)


@dataclasses.dataclass(frozen=True, repr=False)
class MonitorReport(Result):
    """What a monitor had seen when it was asked. A field that is None has its reason in `unavailable`.

    rows                 a MonitorRow for each linear layer, in the model's order
    suggestions          layers that deserve more bits, the neediest first; see `Monitor.suggest`
    alarms               what is beyond a threshold now; alerts all that was said since the start
    recipes              RecipeVotes of each recipe that answered, in order of appearance
    baseline             what the inputs are compared with, in words
    passes, sampled      top-level forwards seen, and how many of them were looked into
    paused               forwards left out because a measurement ran
    tokens               that went in; tokens_per_s by the time of the timed passes
    latency_p50_ms, ...  of the last passes that were not looked into
    energy_mj            of the model's devices while the monitor ran, idle times included; energy_mj_per_token beside
    """

    rows: tuple[MonitorRow, ...]
    suggestions: tuple[str, ...]
    alarms: tuple[Alert, ...]
    alerts: tuple[Alert, ...]
    recipes: tuple[RecipeVotes, ...]
    baseline: str
    seconds: float
    passes: int
    sampled: int
    paused: int
    tokens: int | None = None
    tokens_per_s: float | None = None
    latency_p50_ms: float | None = None
    latency_p95_ms: float | None = None
    latency_p99_ms: float | None = None
    energy_mj: float | None = None
    energy_mj_per_token: float | None = None
    unavailable: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def _tables(self) -> Sequence[Table]:
        return [self._traffic(), self._layers(), *([self._votes()] if _has_votes(self.recipes) else [])]

    def _traffic(self) -> Table:
        lead = [Cell(f"Alarm: {alarm.message}", "bad") for alarm in self.alarms]
        if not lead:
            judged = any(row.psi is not None for row in self.rows)
            quiet = "Quiet: nothing is beyond its threshold." if judged else "No layer can be judged yet."
            lead = [Cell(quiet, "good" if judged else "muted")]
        if self.suggestions:
            lead.append(Cell(f"These deserve more bits first: {', '.join(self.suggestions[:_NAMED])}", "head"))
        passes = f"{self.sampled:,} looked into" + (
            f", {self.paused:,} left out while measuring" if self.paused else ""
        )
        rows = [
            ("passes", f"{self.passes:,}", passes),
            self._line("tokens", "tokens", "", "that went in"),
            self._line("throughput", "tokens_per_s", " tokens/s", "tokens by the time of their passes"),
            self._line("latency of a pass", "latency_p50_ms", " ms", "median of the last passes"),
            self._line("latency, 95th percentile", "latency_p95_ms", " ms", ""),
            self._line("latency, 99th percentile", "latency_p99_ms", " ms", ""),
            self._line("energy", "energy_mj", " mJ", "of the devices while the monitor ran, idle times included"),
            self._line("energy per token", "energy_mj_per_token", " mJ", ""),
        ]
        return Table(("serving", "value", "how measured"), rows, lead, numeric=frozenset({1}))

    def _line(self, title: str, field: str, unit: str, how: str) -> tuple[str, str, str | Cell]:
        value = getattr(self, field)
        if value is None:
            return title, "unavailable", Cell(self.unavailable.get(field, ""), "muted")
        return title, (f"{value:,}" if isinstance(value, int) else format_number(value)) + unit, how

    def _layers(self) -> Table:
        worst = sorted(self.rows, key=lambda row: -1 if row.psi is None else row.psi, reverse=True)
        alarmed = {name for alarm in self.alarms for name in alarm.layers}
        rows = [
            (
                row.name,
                row.scheme,
                Cell("unavailable" if row.psi is None else f"{row.psi:.3f}", "bad" if row.name in alarmed else ""),
                "unavailable" if row.clipped is None else f"{100 * row.clipped:.2f} %",
                "unavailable" if row.error is None else f"{100 * row.error:.2f} %",
                Cell(row.clipped_as if row.psi is not None else row.unavailable.get("psi", ""), "muted"),
            )
            for row in worst[:_SHOWN]
        ]
        rest = worst[_SHOWN:]
        notes = [f"drift against {self.baseline}", *(f"note: {n}" for n in self.notes)]
        if rest:
            most = f": drift at most {rest[0].psi:.3f}" if rest[0].psi is not None else ""
            notes.insert(0, f"and {len(rest)} more layers{most}")
        columns = ("layer", "scheme", "drift (PSI)", "clipped", "rounding error", "clipped is")
        return Table(columns, rows, notes=notes, numeric=frozenset({2, 3, 4}))

    def _votes(self) -> Table:
        rows = []
        for recipe in self.recipes:
            share = recipe.interval
            words = "" if share is None else f"{100 * share[0]:.0f} to {100 * share[1]:.0f} % (95 %)"
            rows.append((recipe.recipe, recipe.words, f"{recipe.passes:,}", str(recipe.good), str(recipe.bad), words))
        return Table(("recipe", "layers", "passes", "good", "bad", "good of all"), rows, numeric=frozenset({2, 3, 4}))


def _has_votes(recipes: Sequence[RecipeVotes]) -> bool:
    return len(recipes) > 1 or any(r.good + r.bad for r in recipes)
