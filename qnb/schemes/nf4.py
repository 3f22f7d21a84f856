"""nf4: 4-bit NormalFloat by group (Dettmers et al. 2023, QLoRA, arXiv:2305.14314, appendix E).

The 16 levels are quantiles of a normal distribution scaled to [-1, 1], with an exact 0: half of them below it, half
above, so that each level is taken about equally often by normally distributed weights.
"""

from __future__ import annotations

import functools
import statistics

from qnb.schemes import register
from qnb.schemes.table import TableFamily

# The paper's offset: the mean of 1 - 1 / 30 and 1 - 1 / 32, the outermost probabilities of 15 and 16 levels.
_OFFSET = (1 - 1 / 30 + 1 - 1 / 32) / 2


@functools.cache
def levels() -> tuple[float, ...]:
    """The 16 values, rising, from -1 to 1."""
    quantile = statistics.NormalDist().inv_cdf

    def side(count: int) -> list[float]:
        # `count` quantiles from the outermost one in, without the middle, which is 0.
        return [quantile(_OFFSET + (0.5 - _OFFSET) * i / count) for i in range(count)]

    positive, negative = side(8), side(7)
    values = sorted([*positive, 0.0, *(-v for v in negative)])
    return tuple(v / max(values) for v in values)


@register
class NF4(TableFamily):
    word, bits = "nf4", 4
    usual = ("nf4-g64",)

    @classmethod
    def table(cls) -> tuple[float, ...]:
        return levels()
