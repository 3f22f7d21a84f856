"""What a rounding is, and the statistics of a layer's inputs that it may need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from qnb.schemes.base import Scheme
from qnb.schemes.grid import Grid, Rounded

Needs = Literal["nothing", "inputs", "hessian"]


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """What calibration saw of a layer's inputs x, rows of K.

    rows         how many rows there were
    low, high    f32 (T, K), the least and the largest x of each channel in each of the T texts
    mean_square  f32 (K,), the mean of x^2 of each channel
    sample       f32 (R, K), some of the rows, spread evenly over all, in their order
    hessian      f32 (K, K), the mean of x^T x; None where no rounding needs it
    """

    rows: int
    low: Tensor
    high: Tensor
    mean_square: Tensor
    sample: Tensor
    hessian: Tensor | None = None

    @property
    def absmax(self) -> Tensor:
        """f32 (K,), the largest |x| of each channel."""
        return torch.maximum(self.high.amax(0), -self.low.amin(0)).clamp(min=0)

    def divided(self, divisor: Tensor) -> Statistics:
        """The statistics of x / divisor, with `divisor` f32 (K,) > 0."""
        hessian = None if self.hessian is None else self.hessian / torch.outer(divisor, divisor)
        squares = self.mean_square / divisor.square()
        return Statistics(self.rows, self.low / divisor, self.high / divisor, squares, self.sample / divisor, hessian)

    def without(self, channels: Tensor) -> Statistics:
        """The statistics of x with these channels set to 0."""
        hessian = self.hessian
        if hessian is not None:
            hessian = hessian.index_fill(0, channels, 0).index_fill(1, channels, 0)
        low, high, sample = (t.index_fill(1, channels, 0) for t in (self.low, self.high, self.sample))
        return Statistics(self.rows, low, high, self.mean_square.index_fill(0, channels, 0), sample, hessian)


@dataclasses.dataclass(frozen=True)
class Rounding:
    """`choose(weight f32 (N, K), grid, dtype of the scales, statistics or None) -> Rounded`, and what it needs.

    "inputs" are all statistics but the Hessian, which "hessian" adds. `why_not(scheme)` is a reason, or None. One that
    `uses_inputs` gets statistics where texts to calibrate on are given, and does without them where not. One that
    `divides` gives a divisor of the inputs along.
    """

    name: str
    needs: Needs
    choose: Callable[[Tensor, Grid, torch.dtype, Statistics | None], Rounded]
    why_not: Callable[[Scheme], str | None]
    uses_inputs: bool = False
    divides: bool = False
