"""fp8: float8 e4m3 weights, one scale per output channel, activations as they are."""

from __future__ import annotations

from qnb.schemes import register
from qnb.schemes.grid import Float8Grid
from qnb.schemes.weight_only import ByCodes


@register
class FP8(ByCodes):
    name = "fp8"
    grid = Float8Grid()
