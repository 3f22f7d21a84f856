"""The search for clipped ranges that several roundings share: smaller steps for most weights, saturation for a few."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qnb.schemes.grid import Grid, Levels

_SHARES = tuple(1 - i / 50 for i in range(36))  # of each group's range
# Above 1: where a range ends among the uneven values of a float format matters as much as what is cut off.
FACTORS = (1.0, 1.06, 1.03, *_SHARES[1:])
# For a grid that is tried both ways round every second share, which costs the same.
BOTH_WAYS = (*_SHARES[::2], *(-share for share in _SHARES[::2]))
REFITS = 2


def clipped(
    weight: Tensor,
    grid: Grid,
    dtype: torch.dtype,
    error: Callable[[Tensor], Tensor],
) -> Levels:
    """Levels for `weight` (N, K) whose ranges are scaled, each group by the factor of least error that a search finds.

    `error` takes what rounding changed, f32 (N, G, group), zeros filling a short last group, to an error (N, G): a
    quadratic form, such as a sum of squares. Groups that share one scale are chosen for by their sum; of equal errors
    the first factor counts. A lopsided grid is tried both ways round, so that a group's widest weight can lie on the
    side with a level more: codes in [-8, 7] then spend it as llama.cpp's Q4_0 does. From there least squares goes on,
    `REFITS` times: of the values q that a group got, t * q has the least error for t = B(q, w) / B(q, q), where B is
    the form's product; a range scaled by the factor times t is taken if its error is less.
    """
    group = grid.group_of(weight.shape[1])

    def size(values: Tensor) -> Tensor:
        found = error(grouped(values, group))
        return found.sum().expand_as(found) if grid.group < 0 else found

    def rounded(factor: Tensor) -> tuple[Tensor, Tensor]:
        levels = grid.fit(weight, dtype, clip=factor)
        values = grid.values(grid.nearest(weight, levels), levels)
        return size(values - weight), values

    least = best = None
    for factor in BOTH_WAYS if grid.lopsided else FACTORS:
        found, _ = rounded(weight.new_full((), factor))
        if least is None:
            least, best = found, torch.full_like(found, factor)
        else:
            better = found < least
            least, best = torch.where(better, found, least), best.masked_fill(better, factor)
    whole = size(weight)
    for _ in range(REFITS):
        _, values = rounded(best)
        own = size(values)
        # E(q - w) = E(q) - 2 B(q, w) + E(w), and E(q) is B(q, q).
        t = (own + whole - least) / (2 * own)
        moved = torch.where(t.isfinite() & (t > 0), best * t, best)
        found, _ = rounded(moved)
        better = found < least
        least, best = torch.where(better, found, least), torch.where(better, moved, best)
    return grid.fit(weight, dtype, clip=best)


def grouped(values: Tensor, group: int) -> Tensor:
    """(..., K) -> (..., G, group), with zeros in a short last group."""
    padded = F.pad(values, (0, -values.shape[-1] % group))
    return padded.view(*values.shape[:-1], -1, group)
