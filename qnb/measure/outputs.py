"""How far a model's outputs lie from the original's, for models that are no language models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qnb.errors import BadInput
from qnb.measure.original import Original
from qnb.measure.predictions import NO_LANGUAGE_MODEL
from qnb.measure.statistics import first_not_finite, ratio_with_se
from qnb.model.inputs import Sample


class OutputSums:
    """Distances between the first outputs, an input at a time."""

    def __init__(self, original: Original) -> None:
        self._original = original
        self._inputs = 0
        self._sums: list[Tensor] = []  # each (4, units): squared distance, squared norm, cosines, rows

    def add(self, sample: Sample, labels: Tensor | None, output: Any) -> None:
        """Adds one sample; along the first axis lie the independent units, along the last a row's values."""
        now = _first_tensor(output, sample)
        self._inputs += now.shape[0] if now.dim() > 1 else 1
        if self._original.reason is not None:
            return
        then = _first_tensor(self._original.output(sample), sample)
        if then.shape != now.shape:
            raise BadInput(
                f"the original gives an output of shape {tuple(then.shape)} and this model {tuple(now.shape)}: "
                "reference= must be a model of the same outputs"
            )
        now, then = now.double(), then.to(now.device).double()
        if now.dim() < 2:
            now, then = now.reshape(1, -1), then.reshape(1, -1)
        # (units, rows, values)
        now, then = (t.reshape(t.shape[0], -1, t.shape[-1]) for t in (now, then))
        mask = torch.ones(now.shape[:2], dtype=torch.bool, device=now.device)
        attended = sample.kwargs.get("attention_mask")
        if isinstance(attended, Tensor) and attended.shape == mask.shape:
            mask = attended.to(now.device) != 0
        norms = now.norm(dim=-1), then.norm(dim=-1)
        counted = mask & (norms[1] > 0) | mask & norms[1].isnan()  # a row of zeros has no direction
        cosine = (now * then).sum(-1) / (norms[0] * norms[1]).clamp(min=1e-300)
        distance = ((now - then) ** 2).sum(-1)
        parts = [(distance, mask), (norms[1] ** 2, mask), (cosine, counted), (torch.ones_like(cosine), counted)]
        self._sums.append(torch.stack([torch.where(m, v, 0.0).sum(1) for v, m in parts]).cpu())

    def finish(self, fields: dict, unavailable: dict) -> None:
        """Changes `fields` and `unavailable`: adds relative error and cosine with their standard errors."""
        fields["texts"] = self._inputs
        unavailable.update(dict.fromkeys(("perplexity", "kl", "kl_p99", "top1", "tokens"), NO_LANGUAGE_MODEL))
        if self._original.reason is not None:
            unavailable.update(relative_error=self._original.reason, cosine=self._original.reason)
            return
        distance, norm, cosine, rows = torch.cat(self._sums, 1)
        broken = first_not_finite((distance + norm).tolist())
        if broken is not None:
            unavailable.update(
                dict.fromkeys(("relative_error", "cosine"), f"outputs hold NaN or infinity, first in input {broken}")
            )
            return
        if norm.sum() == 0:
            unavailable.update(dict.fromkeys(("relative_error", "cosine"), "the original's outputs are all zero"))
            return
        squared, se = ratio_with_se(distance, norm)
        fields["relative_error"] = math.sqrt(squared)
        # Delta method; at a distance of exactly zero nothing varies.
        fields["relative_error_se"] = se if se is None or squared == 0 else se / (2 * math.sqrt(squared))
        fields["cosine"], fields["cosine_se"] = ratio_with_se(cosine, rows)


def _first_tensor(output: Any, sample: Sample) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    if isinstance(values, Iterable):
        for value in values:
            if isinstance(value, Tensor):
                return value
    raise BadInput(
        f"the model gave {type(output).__name__} without a tensor for texts[{sample.index}]: nothing to compare"
    )
