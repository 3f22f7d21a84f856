"""What a monitor reads off the inputs of a layer: their range against a baseline, and what rounding them costs.

The range of a row of inputs is its largest magnitude, the quantity that the scale of activation codes follows. Ranges
are counted in a fixed histogram, eighth-octaves from 2^-20 to 2^20, the same for every layer and every model.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from qnb.model.linear import QLinear

BINS = 322  # 320 eighths of octaves, one bin below and one above
GROUPS = 10
# Below so many rows on either side chance alone moves the index by (GROUPS - 1) * (1/n + 1/m), which is 0.07 here:
# Yurdakul, Statistical properties of the population stability index, 2018.
FEWEST_ROWS = 256

# What `measure` gives for a layer, in this order.
ROWS, NOT_FINITE, VALUES, CLIPPED, ERROR, POWER = range(6)
_SUMS = 6

DYNAMIC, STATIC, NONE = "extreme code", "fixed range", "baseline's range"


@dataclasses.dataclass(frozen=True)
class Activations:
    """How a layer's inputs become codes.

    kind       DYNAMIC: a scale for each row at run time; STATIC: one scale from calibration; NONE: they stay floats
    scale      of STATIC codes: value = (code - zero) * scale, code in [-128, 127]
    divisor    (K,) by which inputs are divided before; None where they are not
    """

    kind: str
    scale: float | None = None
    zero: int = 0
    divisor: Tensor | None = None


def activations_of(layer: nn.Linear) -> Activations:
    """How the layer, quantized or not, takes its inputs."""
    if not isinstance(layer, QLinear):
        return Activations(NONE)
    variant, scheme = layer.variant, layer.variant.scheme
    channels = getattr(variant, "channels", None)
    inputs = getattr(variant if channels is None else variant.base, "inputs", None)
    divisor = getattr(inputs, "divisor", None)
    if channels is not None:  # these stay in the original precision: to the codes they are 0
        ones = torch.ones(layer.in_features, device=channels.device) if divisor is None else divisor
        divisor = ones.index_fill(0, channels, math.inf)
    if scheme.static:
        return Activations(STATIC, inputs.scale, inputs.zero, divisor)
    return Activations(DYNAMIC if getattr(scheme, "activation_bits", None) == 8 else NONE, divisor=divisor)


@dataclasses.dataclass(frozen=True)
class Taken:
    """Rows (R, K) of one layer's inputs, how it takes them, and the baseline's widest range, where there is one."""

    rows: Tensor
    how: Activations
    baseline_range: float | None = None

    def alike(self) -> tuple:
        """What layers that can be measured together have in common."""
        return self.how.kind, self.how.divisor is None, self.rows.shape, self.rows.dtype, self.rows.device


def measure(taken: Sequence[Taken]) -> list[Tensor]:
    """For each layer f64 (R + 6,): the bin of each row's range, -1 for one with NaN or infinity; then the six sums.

    Clipped are, of STATIC codes, values that lie outside the codes' range; of DYNAMIC ones, values at the extreme code,
    of which every row has at least one; of floats, values beyond the widest that the baseline held, which a scale fixed
    by that baseline would clip (none are counted without a baseline). ERROR and POWER are sums of squares of what
    rounding to codes changes and of the inputs; inputs that stay floats are rounded as DYNAMIC codes would. Rows with
    NaN or infinity count as such and take part in nothing else. Layers of one shape are measured together, since for
    few rows each call of torch costs more than its arithmetic. Nothing waits for an accelerator.
    """
    alike: dict[tuple, list[int]] = {}
    for place, one in enumerate(taken):
        alike.setdefault(one.alike(), []).append(place)
    found: dict[int, Tensor] = {}
    for places in alike.values():
        found.update(zip(places, _measure_alike([taken[place] for place in places]).unbind(), strict=True))
    return [found[place] for place in range(len(taken))]


def _measure_alike(taken: Sequence[Taken]) -> Tensor:
    x = torch.stack([one.rows for one in taken]).float()

    def per_layer(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float32).to(x.device).view(-1, 1, 1)

    ranges = x.abs().amax(2)
    finite = ranges.isfinite()
    x = x.where(finite.unsqueeze(2), 0)
    ranges = ranges.where(finite, 0)
    bins = (torch.log2(ranges) * 8 + BINS / 2).clamp_(0, BINS - 1).floor_().where(finite, -1)
    how, scaled, largest = taken[0].how, x, ranges
    if how.divisor is not None:
        scaled = x / torch.stack([one.how.divisor for one in taken]).unsqueeze(1)
        largest = scaled.abs().amax(2)
    if how.kind == STATIC:
        scale, zero = per_layer(one.how.scale for one in taken), per_layer(one.how.zero for one in taken)
        steps = torch.round(scaled / scale) + zero
        codes = steps.clamp(-128, 127)
        beyond = steps != codes
        rounded = (codes - zero) * scale
    else:
        scale = (largest / 127).unsqueeze(2)
        codes = torch.round(scaled / scale.where(scale > 0, 1)).clamp_(-127, 127)
        rounded = codes * scale
        if how.kind == DYNAMIC:
            beyond = codes.abs() == 127
        else:
            beyond = x.abs() > per_layer(math.inf if t.baseline_range is None else t.baseline_range for t in taken)
    rows = finite.sum(1)
    error, power = (scaled - rounded).square_().sum((1, 2)), scaled.square().sum((1, 2))
    sums = (rows, x.shape[1] - rows, rows * x.shape[2], beyond.sum((1, 2)), error, power)
    return torch.cat([bins.double(), torch.stack([s.double() for s in sums], 1)], 1)


def groups_of(baseline: Tensor) -> Tensor:
    """Counts (L, BINS) of a baseline -> the group 0..GROUPS-1 of each bin, s64 (L, BINS), about equal in the baseline.

    A bin lies in the group that the middle of its share of the baseline falls into.
    """
    counts = baseline.double()
    middle = (counts.cumsum(1) - counts / 2) / counts.sum(1, keepdim=True).clamp(min=1)
    return (middle * GROUPS).long().clamp_(0, GROUPS - 1)


def stability(baseline: Tensor, now: Tensor, groups: Tensor) -> Tensor:
    """The population stability index of each layer, f64 (L,): sum over groups of (q - p) ln(q / p).

    baseline, now: counts (L, BINS); p and q their shares in `groups`, half a row added to each group, so that an empty
    one has a finite index. Below 0.1 is read as stable, 0.1 to 0.25 as a shift to look at, above 0.25 as a large one:
    Siddiqi, Credit Risk Scorecards, 2006.
    """
    before, after = (
        torch.zeros(len(groups), GROUPS).double().scatter_add_(1, groups, c.double()) for c in (baseline, now)
    )
    used = (before + after) > 0
    p = (before + 0.5) / (before.sum(1, keepdim=True) + GROUPS / 2)
    q = (after + 0.5) / (after.sum(1, keepdim=True) + GROUPS / 2)
    return ((q - p) * (q / p).log() * used).sum(1)


def upper_edge(bins: Tensor) -> Tensor:
    """The widest range, f64 (L,), that counts (L, BINS) hold: the upper edge of their highest bin."""
    highest = torch.where(bins > 0, torch.arange(BINS), -1).amax(1)
    return torch.exp2((highest.double() + 1 - BINS / 2) / 8)


@dataclasses.dataclass
class _Record:
    """What one pass showed: layers by index (l,), bins (l, R) with -1 where there was no row, sums (l, 6) or None."""

    layers: Tensor
    bins: Tensor
    sums: Tensor | None


class Window:
    """The baseline's histograms and those of the last rows, by layer. Not safe for threads: its owner holds a lock."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.names: list[str] = []
        self.baseline_rows = self._rows = 0
        self.complete = False  # whether the baseline is whole: until then it takes what `add` is given
        self._index: dict[str, int] = {}
        self._records: collections.deque[_Record] = collections.deque()
        self._now = self._base = torch.zeros(0, BINS, dtype=torch.int64)
        self._totals = torch.zeros(0, ERROR, dtype=torch.float64)
        self._groups: Tensor | None = None
        self.ranges: dict[str, float] = {}

    def add(self, seen: dict[str, Tensor]) -> None:
        """Takes what `measure` gave for each layer of one pass, and lets the oldest passes go."""
        if not seen:
            return
        if not self.complete:
            self.add_to_baseline(seen)
            if self.baseline_rows >= self.size:
                self.finish_baseline()
            return
        record = _Record(self._places(seen), *_together(seen.values()))
        self._records.append(record)
        self._weigh(record, 1)
        while self._rows - self._records[0].bins.shape[1] >= self.size:
            self._weigh(self._records.popleft(), -1)

    def add_to_baseline(self, seen: dict[str, Tensor]) -> None:
        """The same, for the baseline."""
        record = _Record(self._places(seen), *_together(seen.values()))
        _count(self._base, record, 1)
        self.baseline_rows += record.bins.shape[1]

    def finish_baseline(self) -> None:
        """What has been gathered is the baseline from now on."""
        self.complete, self._groups = True, groups_of(self._base)
        edges = upper_edge(self._base).tolist()
        held = self._base.sum(1).tolist()
        self.ranges = {name: edges[i] for name, i in self._index.items() if held[i]}

    def forget_sums(self) -> None:
        """The layers run in other codes from now on: what the former ones clipped no longer counts."""
        for record in self._records:
            record.sums = None
        self._totals.zero_()

    def drift(self) -> dict[str, float]:
        """The stability index of each layer that has rows enough on both sides."""
        if self._groups is None:
            return {}
        enough = (self._base.sum(1) >= FEWEST_ROWS) & (self._now.sum(1) >= FEWEST_ROWS)
        values = stability(self._base, self._now, self._groups).tolist()
        return {name: values[i] for name, i in self._index.items() if enough[i]}

    def totals(self) -> dict[str, list[float]]:
        """ROWS, NOT_FINITE, VALUES and CLIPPED of each layer over the window: whole numbers."""
        return dict(zip(self.names, self._totals.tolist(), strict=True))

    def errors(self) -> dict[str, float]:
        """The root of ERROR / POWER of each layer that has any rows; summed anew, as floats that came and went do not
        leave a sum as it was."""
        sums = torch.zeros(len(self.names), 2, dtype=torch.float64)
        for record in self._records:
            if record.sums is not None:
                sums.index_add_(0, record.layers, record.sums[:, ERROR:])
        root = (sums[:, 0] / sums[:, 1].where(sums[:, 1] > 0, 1)).sqrt().tolist()
        return {name: root[i] for i, name in enumerate(self.names) if self._totals[i, ROWS]}

    def counts(self) -> dict[str, tuple[int, int]]:
        """(rows of the baseline, rows of the window) of each layer."""
        base, now = self._base.sum(1).tolist(), self._now.sum(1).tolist()
        return {name: (base[i], now[i]) for name, i in self._index.items()}

    def _weigh(self, record: _Record, sign: int) -> None:
        self._rows += sign * record.bins.shape[1]
        _count(self._now, record, sign)
        if record.sums is not None:
            self._totals.index_add_(0, record.layers, record.sums[:, :ERROR], alpha=sign)

    def _places(self, seen: dict[str, Tensor]) -> Tensor:
        new = [name for name in seen if name not in self._index]
        if new:
            self._index.update((name, len(self.names) + i) for i, name in enumerate(new))
            self.names += new
            more = torch.zeros(len(new), BINS, dtype=torch.int64)
            self._now, self._base = torch.cat([self._now, more]), torch.cat([self._base, more])
            self._totals = torch.cat([self._totals, torch.zeros(len(new), ERROR, dtype=torch.float64)])
            if self._groups is not None:
                self._groups = groups_of(self._base)
        return torch.tensor([self._index[name] for name in seen])


def _together(results: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """All layers' bins, padded by -1, and sums, as two tensors on the host: one transfer from each device."""
    results = list(results)
    rows = max(map(len, results)) - _SUMS
    packed: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for place, values in enumerate(results):
        if len(values) < rows + _SUMS:
            values = torch.nn.functional.pad(values, (rows + _SUMS - len(values), 0), value=-1)
        packed.setdefault(values.device, []).append((place, values))
    both = torch.empty(len(results), rows + _SUMS, dtype=torch.float64)
    for layers in packed.values():
        both[[place for place, _ in layers]] = torch.stack([values for _, values in layers]).cpu()
    return both[:, :rows].long(), both[:, rows:]


def _count(counts: Tensor, record: _Record, sign: int) -> None:
    """Changes `counts` (L, BINS): adds the record's rows, or takes them out."""
    there = record.bins >= 0
    flat = record.layers.unsqueeze(1) * BINS + record.bins
    counts.view(-1).index_add_(0, flat[there], torch.full((int(there.sum()),), sign, dtype=torch.int64))
