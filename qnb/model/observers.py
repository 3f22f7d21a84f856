"""Observers: the fixed range of a layer's 8-bit activations, read off what calibration saw.

Each is a pure function of the statistics that gives the least and the largest value to be represented. What lies
outside saturates.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from qnb.errors import BadInput
from qnb.rounding import Statistics

Observer = Callable[[Statistics, bool], tuple[float, float]]
_registry: dict[str, Observer] = {}

PERCENT = 99.99  # of the values, which "percentile" represents
_PERCENTILE = re.compile(r"percentile(\d{1,2}(?:\.\d{1,6})?)")
# What the newest text weighs in a moving average.
_NEWEST = 0.1
# Bins of the histogram of |x|, and levels of 8 bits on one side of 0: those of Migacz 2017.
_BINS, _LEVELS = 2048, 128
_FAINT = 1e-4
# Shares of the range that "mse" tries for each end.
_SHARES = tuple(1 - i / 40 for i in range(39))


def register(name: str):
    """Decorator: makes an observer known by its name. It takes the statistics and whether there is a zero point."""

    def add(observer: Observer) -> Observer:
        _registry[name] = observer
        return observer

    return add


def names() -> list[str]:
    """Every observer that can be asked for; a number may follow `percentile`."""
    return sorted(_registry)


def find(name: str) -> Observer:
    """The observer of that name; raises BadInput with the names that exist."""
    if isinstance(name, str) and name in _registry:
        return _registry[name]
    match = _PERCENTILE.fullmatch(name) if isinstance(name, str) else None
    if match is not None and float(match[1]) >= 50:
        return lambda statistics, asym: percentile(statistics, asym, float(match[1]))
    raise BadInput(
        f"no observer is called {name!r}: the observers are {', '.join(names())}; percentile may be followed by a "
        "number from 50 up to below 100, such as percentile99.9"
    )


def fixed_scale(observer: str, statistics: Statistics, asym: bool) -> tuple[float, int]:
    """(scale, zero): value = (code - zero) * scale, code in [-128, 127]; the scale is an f32 number above 0.

    Without a zero point scale = max(|low|, |high|) / 127; with one the 255 steps go from low to high, 0 among them.
    Raises BadInput where calibration saw too little for the observer.
    """
    return scale_of(*find(observer)(statistics, asym), asym)


def scale_of(low: float, high: float, asym: bool) -> tuple[float, int]:
    """(scale, zero) of a range, see `fixed_scale`."""
    low, high = min(low, 0.0), max(high, 0.0)
    if not asym:
        return _positive(max(-low, high) / 127), 0
    scale = _positive((high - low) / 255)
    return scale, max(-128, min(127, round(-128 - low / scale)))


def _positive(scale: float) -> float:
    # A layer that only ever saw zeros: any scale serves.
    return float(torch.tensor(scale, dtype=torch.float32)) or 1.0


@register("minmax")
def minmax(statistics: Statistics, asym: bool) -> tuple[float, float]:
    """The least and the largest value of all: nothing that calibration saw saturates."""
    return float(statistics.low.min()), float(statistics.high.max())


@register("average")
def average(statistics: Statistics, asym: bool) -> tuple[float, float]:
    """Moving averages of each text's least and largest value: one text with an outlier does not decide.

    Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
    arXiv:1712.05877, section 3.1: a <- a + 0.1 * (text - a), begun with the first text. Needs two texts.
    """
    texts = len(statistics.low)
    if texts < 2:
        raise BadInput(f"observer 'average' averages over texts, and {texts} reached it: give two or more, or minmax")

    def averaged(of_texts: Tensor) -> float:
        first, *rest = of_texts.double().tolist()
        for value in rest:
            first += _NEWEST * (value - first)
        return first

    return averaged(statistics.low.amin(1)), averaged(statistics.high.amax(1))


@register("percentile")
def percentile(statistics: Statistics, asym: bool, percent: float = PERCENT) -> tuple[float, float]:
    """The range that holds `percent` % of the sampled values.

    Without a zero point it is symmetric, the quantile of |x|; with one, half of what is left out lies on each side.
    Quantiles are values of the sample, the nearest rank (Hyndman and Fan 1996, definition 1). So many values are needed
    that at least one lies outside on each side.
    """
    values = statistics.sample.reshape(-1)
    outside = (100 - percent) / 100 / (2 if asym else 1)
    needed = round(1 / outside)
    if len(values) < needed:
        raise BadInput(
            f"observer 'percentile{percent:g}' needs {needed:,} values of the inputs, and the calibration texts gave "
            f"{len(values):,}: give longer texts, or minmax"
        )
    if not asym:
        high = _quantile(values.abs(), 1 - outside)
        return -high, high
    return _quantile(values, outside), _quantile(values, 1 - outside)


def _quantile(values: Tensor, share: float) -> float:
    # The share is a difference of decimals: a hair below, so that 0.1 * 10 is rank 1.
    rank = -int(-(share * len(values) * (1 - 1e-12)) // 1)
    return float(values.kthvalue(min(max(rank, 1), len(values))).values)


@register("mse")
def mse(statistics: Statistics, asym: bool) -> tuple[float, float]:
    """The range whose 8-bit codes bring the sampled values back with the least squared error.

    A search over shares of the widest range (Choukroun et al. 2019, arXiv:1902.06822); with a zero point each end is
    searched in turn, the other staying, until neither moves.
    """
    low, high = minmax(statistics, asym)
    values = statistics.sample.reshape(-1)

    def error(ends: tuple[float, float]) -> float:
        scale, zero = scale_of(*ends, asym)
        codes = (values / scale).round_().clamp_(-128 - zero, 127 - zero)
        return float((codes * scale - values).square().sum(dtype=torch.float64))

    if not asym:
        return min(((low * share, high * share) for share in _SHARES), key=error)
    ends = low, high
    while True:
        before = ends
        ends = min(((low * share, ends[1]) for share in _SHARES), key=error)
        ends = min(((ends[0], high * share) for share in _SHARES), key=error)
        if error(ends) >= error(before):
            return before


@register("entropy")
def entropy(statistics: Statistics, asym: bool) -> tuple[float, float]:
    """The symmetric range whose codes keep most of the distribution of |x|: the least KL of histograms.

    Migacz 2017, "8-bit Inference with TensorRT" (GPU Technology Conference, S7310): of 2048 bins the first n are kept,
    what lies beyond is added to the last of them, and n is that of least KL(kept || kept in 128 levels). Both ends are
    cut to it, never widened. Needs as many values as bins.
    """
    low, high = minmax(statistics, asym)
    values = statistics.sample.reshape(-1).abs()
    if len(values) < _BINS:
        raise BadInput(
            f"observer 'entropy' makes a histogram of {_BINS:,} bins, and the calibration texts gave {len(values):,} "
            "values of the inputs: give longer texts, or minmax"
        )
    widest = float(values.max())
    if widest == 0:
        return low, high
    counts = torch.histc(values.float(), _BINS, 0, widest).double().cpu()
    kept = min(range(_LEVELS, _BINS + 1), key=lambda n: divergence(counts, n, _LEVELS))
    # All bins is the whole range, also what the sample missed.
    threshold = widest * kept / _BINS if kept < _BINS else max(-low, high)
    return max(low, -threshold), min(high, threshold)


def divergence(counts: Tensor, kept: int, levels: int) -> float:
    """KL(P || Q) in nats of the first `kept` bins of `counts` (f64): P with all that lies beyond in its last bin.

    Q has each level's count, without what lies beyond, spread evenly over those of its bins where P is not 0. A bin
    that gets nothing so, the last one where a lone outlier lies beyond, gets a ten-thousandth of a count: there the
    slides say nothing, and the divergence would be infinite.
    """
    inside = counts[:kept]
    p = inside.clone()
    p[-1] += counts[kept:].sum()
    level = torch.arange(kept) * levels // kept
    filled = (p > 0).double()
    sums = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, inside)
    places = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, filled)
    q = (sums / places.clamp(min=1))[level].clamp(min=_FAINT) * filled
    p, q = p / p.sum(), q / q.sum()
    seen = p > 0
    return float((p[seen] * (p[seen] / q[seen]).log()).sum())
