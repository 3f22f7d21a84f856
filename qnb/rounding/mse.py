"""mse: each group's range is clipped so that the squared error of its weights is least, then as `nearest`.

The search is that of OMSE (Choukroun et al. 2019, "Low-bit quantization of neural networks for efficient inference",
arXiv:1902.06822), over shares of the range, and goes on from the best of them by least squares. Below 8 bits a
symmetric grid has a level more below 0 than above; a negative scale gives it to the weights above, where that is
better. With calibration, errors are weighted by the mean square of each input: the diagonal of the outputs' error.
"""

import torch
from torch import Tensor

from qnb.rounding import register
from qnb.rounding.base import Statistics
from qnb.rounding.clipping import clipped, grouped
from qnb.schemes.base import Scheme
from qnb.schemes.grid import Grid, Levels, Rounded


def why_not(scheme: Scheme) -> str | None:
    """A learned table is already that of least squared error."""
    return "its levels are learned by least squared error: take nearest" if scheme.grid.learns else None


@register("mse", uses_inputs=True, why_not=why_not)
def mse(weight: Tensor, grid: Grid, dtype: torch.dtype, statistics: Statistics | None = None) -> Rounded:
    """weight (N, K) -> codes and levels. Each group minimises sum over its inputs k of m[k] * (w[k] - q(w[k]))^2.

    m is the mean square of input k, or 1 without statistics.
    """
    levels = levels_of(weight, grid, dtype, statistics)
    return Rounded(grid.nearest(weight, levels), levels)


def levels_of(weight: Tensor, grid: Grid, dtype: torch.dtype, statistics: Statistics | None) -> Levels:
    """The levels of `mse`; those that a grid learns by itself where it does."""
    if grid.learns:
        return grid.fit(weight, dtype, importance=None if statistics is None else statistics.mean_square)
    group = grid.group_of(weight.shape[1])
    importance = None if statistics is None else grouped(statistics.mean_square, group)

    def error(difference: Tensor) -> Tensor:
        squares = difference.square()
        return (squares if importance is None else squares * importance).sum(-1)

    return clipped(weight, grid, dtype, error)
