"""Standard errors and intervals. The independent unit is a text (or an input row), never a token."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

RESAMPLES = 1000
SEED = 0


def ratio_with_se(sums: Tensor, counts: Tensor) -> tuple[float, float | None]:
    """The ratio R = sum(sums) / sum(counts) over G clusters and its linearised standard error.

    sums, counts: (G,). se^2 = G / (G - 1) * sum((sums - R counts)^2) / sum(counts)^2; None for one cluster.
    Source: Cochran, Sampling Techniques, 3rd ed., section 6.4 (the combined ratio estimate, no finite population).
    """
    sums, counts = sums.double(), counts.double()
    total = counts.sum()
    ratio = sums.sum() / total
    clusters = len(sums)
    if clusters < 2:
        return ratio.item(), None
    residuals = sums - ratio * counts
    return ratio.item(), math.sqrt(clusters / (clusters - 1) * (residuals**2).sum().item()) / total.item()


def percentile_with_se(values: Tensor, clusters: Tensor, share: float) -> tuple[float, float | None]:
    """The smallest value that at least `share` of all values do not exceed, and its standard error.

    values: (T,); clusters: (T,) the number 0..G-1 of the text each value belongs to. The error is the spread over a
    seeded bootstrap of whole texts (200 resamples); None for one text.
    """
    order = values.argsort()
    values, clusters = values[order], clusters[order]
    groups = int(clusters.max()) + 1
    point = values[_rank(torch.ones(len(values), dtype=torch.double), share)].item()
    if groups < 2:
        return point, None
    generator = torch.Generator().manual_seed(SEED)
    points = []
    for _ in range(200):
        times = torch.randint(groups, (groups,), generator=generator).bincount(minlength=groups).double()
        points.append(values[_rank(times[clusters], share)].double())
    return point, torch.stack(points).std().item()


def _rank(weights: Tensor, share: float) -> int:
    cumulated = weights.cumsum(0)
    # A hair below the exact share: cumulated counts are integers, share * total is rounded.
    return int(torch.searchsorted(cumulated, share * cumulated[-1] * (1 - 1e-12)).clamp(max=len(weights) - 1))


def median(samples: Sequence[float]) -> float:
    """The middle of the samples."""
    return quantile(samples, 0.5)


def quantile(samples: Sequence[float], share: float) -> float:
    """The linearly interpolated quantile of the samples."""
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def first_not_finite(values: Sequence[float | None]) -> int | None:
    """Index of the first value that is missing, NaN or infinite; None where all are finite."""
    return next((i for i, v in enumerate(values) if v is None or not math.isfinite(v)), None)


def ratio_interval(
    before: Sequence[float], now: Sequence[float], middle: Callable[[Sequence[float]], float] = median
) -> tuple[float, float] | None:
    """The 95 % interval of middle(now) / middle(before), samples in order of time; None below 3 samples of either.

    The wider of two at each end: a seeded bootstrap, which sees how the samples scatter, and what the two halves of
    each side differ by, which sees how the machine drifts: a t interval of the logarithms, two degrees of freedom.
    """
    if min(len(before), len(now)) < 3 or middle(before) == 0:
        return None
    draw = random.Random(SEED)
    ratios = [middle(_resample(now, draw)) / middle(_resample(before, draw)) for _ in range(RESAMPLES)]
    low, high = quantile(ratios, 0.025), quantile(ratios, 0.975)
    halves = [middle(half) for side in (before, now) for half in (side[: len(side) // 2], side[len(side) // 2 :])]
    if min(halves) <= 0:
        return low, high
    a, b, c, d = map(math.log, halves)
    drift = math.exp(student_95(2) * math.hypot(b - a, d - c) / 2)
    ratio = middle(now) / middle(before)
    return min(low, ratio / drift), max(high, ratio * drift)


def _resample(samples: Sequence[float], draw: random.Random) -> list[float]:
    """As many samples, in runs of neighbours: what a busy machine does to one run it does to the next as well.

    Source: Politis and Romano, A circular block-resampling procedure for stationary data, 1992; block of sqrt(n).
    """
    size = len(samples)
    block = round(math.sqrt(size))
    starts = [draw.randrange(size) for _ in range(-(-size // block))]
    return [samples[(start + i) % size] for start in starts for i in range(block)][:size]


def student_95(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, within 0.2 %: half a 95 % interval is so many standard errors."""
    if degrees <= len(_STUDENT):
        return _STUDENT[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
