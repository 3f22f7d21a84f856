"""kmeans3, kmeans4: a codebook of 8 or 16 values learned for each layer, times a scale by group.

Weights divided by their group's scale are clustered in one dimension by Lloyd's algorithm (Lloyd 1982, "Least squares
quantization in PCM"), each weighted with the square of its scale, so that the error of the weight itself is what
shrinks; with calibration also with the mean square of its input, as in SqueezeLLM (Kim et al. 2023, arXiv:2306.07629).
The scales begin as each group's widest weight, sign and all: it is 1 in every group then, so that the codebook need
reach that far on one side of 0 alone. Then scales and codebook follow each other, both by least squares.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from qnb.schemes import register
from qnb.schemes.grid import Grid, Levels, nearest_in_table, scale_of
from qnb.schemes.table import TableFamily

# Lloyd's algorithm runs on a histogram: a bin is far narrower than a cluster, and the cost does not grow with the
# layer.
_BINS = 8192
_ROUNDS = 100
_REFITS = 5  # of the scales


@dataclasses.dataclass(frozen=True)
class LearnedGrid(Grid):
    """A table of 2 ** bits values that is fitted to the weight, times a scale by group that is fitted as well."""

    bits: int
    group: int
    learns = True

    def fit(self, weight, dtype, *, clip=None, importance=None):
        weight = weight.float()
        k = weight.shape[1]
        high, low = self._reduced(weight, torch.amax), self._reduced(weight, torch.amin)
        widest = torch.where(high >= -low, high, low)
        levels = Levels(scale_of(widest if clip is None else widest * clip, 1, dtype), dtype, self.group_of(k))
        levels = self._table_for(weight, levels, importance)
        for _ in range(_REFITS):
            table = levels.table[self.nearest(weight, levels).long()]
            weighted = table if importance is None else table * importance
            across = self._reduced(weighted * weight, torch.sum), self._reduced(weighted * table, torch.sum)
            scale = scale_of(across[0] / across[1], 1, dtype)
            scale = scale.where((across[0] != 0) & (across[1] > 0), levels.scale)
            levels = self._table_for(weight, dataclasses.replace(levels, scale=scale), importance)
        return levels

    def _table_for(self, weight: Tensor, levels: Levels, importance: Tensor | None) -> Levels:
        """`levels` with a table that clusters the weight divided by their scale, beginning with the table they have."""
        scale = levels.spread(levels.scale, slice(None), weight.shape[1])
        scaled = weight / scale.where(scale != 0, 1)
        mass = (scale.square() if importance is None else scale.square() * importance).expand_as(scaled)
        return dataclasses.replace(levels, table=cluster(scaled, mass, 2**self.bits, levels.table))

    def nearest(self, weight, levels, columns=slice(None), k=None):
        return nearest_in_table(weight, levels, columns, weight.shape[1] if k is None else k)


def cluster(values: Tensor, mass: Tensor, count: int, start: Tensor | None = None) -> Tensor:
    """`count` rising f32 centres for finite `values`, weighted by `mass` of the same shape.

    Deterministic: it starts from `start`, or from quantiles of the mass. Clusters that stay empty keep a place of their
    own.
    """
    widest = float(values.abs().amax().clamp(min=1)) if values.numel() else 1.0
    edges = torch.linspace(-widest, widest, _BINS + 1, dtype=torch.float64, device=values.device)
    middle = (edges[1:] + edges[:-1]) / 2
    bins = ((values.double() / widest + 1) * (_BINS / 2)).long().clamp_(0, _BINS - 1).reshape(-1)
    weight = torch.zeros(_BINS, dtype=torch.float64, device=values.device)
    weight.index_add_(0, bins, mass.double().reshape(-1))
    moment = torch.zeros_like(weight).index_add_(0, bins, (mass.double() * values.double()).reshape(-1))
    if not weight.sum() > 0:
        return torch.linspace(-1, 1, count, device=values.device)
    if start is None:
        share = weight.cumsum(0) / weight.sum()
        wanted = (torch.arange(count, dtype=torch.float64, device=values.device) + 0.5) / count
        centres = middle[torch.searchsorted(share, wanted).clamp_(max=_BINS - 1)]
    else:
        centres = start.double()
    for _ in range(_ROUNDS):
        owner = torch.bucketize(middle, (centres[1:] + centres[:-1]) / 2)
        total = torch.zeros_like(centres).index_add_(0, owner, weight)
        sums = torch.zeros_like(centres).index_add_(0, owner, moment)
        moved = torch.where(total > 0, sums / total.where(total > 0, 1), centres).sort().values
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres.float()


class _KMeans(TableFamily):
    @classmethod
    def grid_of(cls, group: int) -> Grid:
        return LearnedGrid(cls.bits, group)


@register
class KMeans4(_KMeans):
    word, bits = "kmeans4", 4
    usual = ("kmeans4-g64",)


@register
class KMeans3(_KMeans):
    word, bits = "kmeans3", 3
    usual = ("kmeans3-g64",)
