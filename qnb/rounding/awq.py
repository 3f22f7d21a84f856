"""awq: inputs that are large on average get finer steps, by a scale for each of them that is searched.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv:2306.00978,
equations 4 and 5: s = mean |x| ** a, with the exponent a in [0, 1] of least output error, and then the search for
clipped ranges that its authors add, also by output error, which goes on by least squares here. The inputs are divided
by s inside the layer.
"""

import torch
from torch import Tensor

from qnb.rounding import register
from qnb.rounding.base import Statistics
from qnb.rounding.clipping import clipped, grouped
from qnb.schemes.grid import Grid, Rounded

STEPS = 20  # of the exponent from 0 to 1


@register("awq", needs="inputs", divides=True)
def awq(weight: Tensor, grid: Grid, dtype: torch.dtype, statistics: Statistics) -> Rounded:
    """weight (N, K) -> codes for weight * divisor, levels, and the divisor f32 (K,).

    The output error is that on the sampled rows x of the inputs: ||(w - q(w * s) / s) x^T||^2.
    """
    sample = statistics.sample
    # Its product with itself serves for the sample where that has more rows than columns: the same error, sooner.
    gram = sample.T @ sample if len(sample) > sample.shape[1] else None
    least, best = None, None
    for step in range(STEPS + 1):
        divisor = divisor_of(sample, step / STEPS)
        scaled = weight * divisor
        levels = grid.fit(scaled, dtype, importance=statistics.mean_square / divisor.square())
        difference = grid.values(grid.nearest(scaled, levels), levels) / divisor - weight
        if gram is None:
            error = float((difference @ sample.T).square().sum())
        else:
            error = float(((difference @ gram) * difference).sum())
        if least is None or error < least:
            least, best = error, (divisor, levels)
    divisor, levels = best
    scaled = weight * divisor
    if not grid.learns:
        rows = grouped(sample / divisor, grid.group_of(weight.shape[1]))  # (R, G, group)
        grams = torch.einsum("rgi,rgj->gij", rows, rows)
        levels = clipped(scaled, grid, dtype, lambda d: torch.einsum("ngi,gij,ngj->ng", d, grams, d))
    return Rounded(grid.nearest(scaled, levels), levels, divisor)


def divisor_of(sample: Tensor, exponent: float) -> Tensor:
    """f32 (K,): mean |x| ** exponent of each column of `sample` (R, K), around 1; 1 where a column is always 0."""
    magnitude = sample.abs().mean(0)
    seen = magnitude > 0
    scale = magnitude.where(seen, 1) ** exponent
    if seen.any():
        scale = scale / (scale[seen].max() * scale[seen].min()).sqrt()
    return scale.where(seen, 1)
