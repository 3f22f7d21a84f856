"""Smoothing: the width of activations moved into the weights, by a divisor for each input channel of a layer.

Xiao et al. 2022, "SmoothQuant", arXiv:2211.10438, equation 4. The divisor stays inside the layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qnb.errors import BadInput
from qnb.rounding import Statistics

# What "auto" tries, besides not smoothing at all.
EXPONENTS = tuple(i / 20 for i in range(3, 20))
# Below this share of the largest, a channel's divisor would blow up what is hardly ever seen.
_LEAST = 1e-5


def check(smooth: object, rounding: str) -> None:
    """Raises BadInput for what is no way to smooth, or not with this rounding."""
    if smooth is None:
        return
    if smooth != "auto" and (
        isinstance(smooth, bool) or not isinstance(smooth, (int, float)) or not 0 <= smooth <= 1  # also NaN
    ):
        raise BadInput(f"smooth={smooth!r}: give an exponent from 0 to 1, such as 0.5, or 'auto'")
    if rounding == "awq":
        raise BadInput(f"smooth={smooth!r} with rounding 'awq', which scales the inputs itself: leave one of them out")


def divisor(weight: Tensor, inputs: Tensor, exponent: float) -> Tensor:
    """f32 (K,) > 0: absmax(x) ** exponent / absmax(w) ** (1 - exponent) of each input channel.

    weight (N, K); inputs f32 (K,), the largest |x| of each channel.
    """
    weights = weight.abs().amax(0)
    inputs = inputs.clamp(min=float(inputs.max()) * _LEAST)
    weights = weights.clamp(min=float(weights.max()) * _LEAST)
    result = inputs**exponent / weights ** (1 - exponent)
    # A layer without weights or inputs is left as it is.
    return result.where((weights > 0) & (inputs > 0) & torch.isfinite(result), 1.0)


def best_divisor(
    weight: Tensor, statistics: Statistics, outputs: Callable[[Tensor | None], Tensor]
) -> tuple[Tensor | None, str]:
    """(the divisor of least output error, what to say of it); None where not to divide is best.

    `outputs(divisor)` gives what the layer, smoothed so and quantized, makes of the sample of its inputs.
    """
    exact = statistics.sample @ weight.T
    tried = [(None, "not smoothed: that was best")]
    tried += [(divisor(weight, statistics.absmax, e), f"smoothed by {e:g}") for e in EXPONENTS]
    errors = torch.stack([(outputs(candidate) - exact).square().sum() for candidate, _ in tried])
    return tried[int(errors.nan_to_num(nan=torch.inf).argmin())]
