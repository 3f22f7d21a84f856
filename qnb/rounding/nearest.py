"""nearest: each weight takes the code closest to it, ties to the even code. Needs no data."""

import torch
from torch import Tensor

from qnb.rounding import register
from qnb.rounding.base import Statistics
from qnb.schemes.grid import Grid, Rounded


@register("nearest")
def nearest(weight: Tensor, grid: Grid, dtype: torch.dtype, statistics: Statistics | None = None) -> Rounded:
    """weight (N, K) -> codes and levels; scales are rounded to `dtype` before use.

    Where there are statistics, a grid that learns its levels weighs errors by the mean square of each input.
    """
    levels = grid.fit(weight, dtype, importance=None if statistics is None else statistics.mean_square)
    return Rounded(grid.nearest(weight, levels), levels)
