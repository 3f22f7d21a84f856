"""hqq: the zero points and scales of groups are moved until the errors of their weights are small and sparse. No data.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models" (Mobius Labs,
https://mobiusml.github.io/hqq_blog/): the sum of |error| ** 0.7 is brought down by half-quadratic splitting, in which
errors that count as outliers are taken out by a shrinkage and the zero point, a real number, becomes a mean. The scale
follows in each round by least squares, which the text leaves open.
"""

import dataclasses

import torch
from torch import Tensor

from qnb.rounding import register
from qnb.rounding.base import Statistics
from qnb.rounding.clipping import grouped
from qnb.schemes.base import Scheme
from qnb.schemes.grid import Grid, IntegerGrid, Rounded, scale_of

# As its authors set them: the norm's power, the weight of the splitting and how it grows, and the rounds.
POWER, BETA, GROWTH, ROUNDS = 0.7, 10.0, 1.01, 20


def why_not(scheme: Scheme) -> str | None:
    """It moves zero points, of groups that stand by themselves."""
    grid = scheme.grid
    if not isinstance(grid, IntegerGrid) or not grid.asym:
        return "it moves zero points, which only -asym schemes have: take one, such as w4a16-g64-asym"
    if grid.group < 0:
        return "it moves each group's zero point, and -tensor has one for all: take -gN or -channel"
    return None


@register("hqq", why_not=why_not)
def hqq(weight: Tensor, grid: Grid, dtype: torch.dtype, statistics: Statistics | None = None) -> Rounded:
    """weight (N, K) -> codes and levels whose zero points are real numbers in `dtype`. `statistics` are not used.

    Each group keeps the round of least error, the first of which is that of `nearest`.
    """
    levels = grid.fit(weight, dtype)
    w = grouped(weight, levels.group)
    inside = grouped(torch.ones_like(weight[:1]), levels.group)  # 0 in what fills a short last group
    count = inside.sum(-1)
    scale, zero, beta = levels.scale, levels.zero, BETA
    least, best_scale, best_zero = None, scale, zero
    for _ in range(ROUNDS + 1):
        step = scale.where(scale > 0, 1).unsqueeze(-1)
        codes = (w / step + zero.unsqueeze(-1)).round_().clamp_(grid.low, grid.high)
        shifted = codes - zero.unsqueeze(-1)
        error = (w - shifted * step) * inside
        size = error.abs()
        found = size.pow(POWER).sum(-1)
        if least is None:
            least = found
        else:
            better = found < least
            least = torch.where(better, found, least)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        # The shrinkage that solves the problem of the outliers: 0 to the power below 0 is infinite, and leaves 0.
        outliers = error.sign() * (size - size.pow(POWER - 1) / beta).clamp_(min=0)
        beta *= GROWTH
        target = (w - outliers) * inside
        moved = (shifted * target).sum(-1) / (shifted.square() * inside).sum(-1).clamp(min=1e-12)
        zero = (((codes - target / step) * inside).sum(-1) / count).to(dtype).float()
        scale = scale_of(moved, 1, dtype).where(moved > 0, scale)
    levels = dataclasses.replace(levels, scale=best_scale, zero=best_zero, zero_dtype=dtype)
    return Rounded(grid.nearest(weight, levels), levels)
