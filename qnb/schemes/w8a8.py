"""w8a8: 8-bit weights, activations quantized to 8 bits; integer sums.

Activations take one scale a row, found at run time, or with -static one scale for all that calibration fixed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qnb.schemes import register
from qnb.schemes.base import Inputs
from qnb.schemes.coded import CodedVariant
from qnb.schemes.grammar import Spelling
from qnb.schemes.integer import IntegerFamily

_dynamic = torch.ops.qnb.linear_w8a8.default
_static = torch.ops.qnb.linear_w8a8_static.default


@register
class W8A8(IntegerFamily):
    weight_bits, activation_bits = (8,), 8
    usual = ("w8a8", "w8a8-tensor", "w8a8-static", "w8a8-static-aasym", "w8a8-outliers8")

    @classmethod
    def refusal(cls, spelling: Spelling) -> str | None:
        if spelling.group > 0:
            return "8-bit weights and activations are summed over all inputs: a group's scale needs w8a16-gN or w4a8-gN"
        if spelling.asym:
            return "with a zero point for the weights there is no operator: take -aasym, or w8a16-asym"
        return None

    def pack(self, codes: Tensor) -> Tensor:
        return torch.ops.qnb.pack_w8(codes)

    def unpack(self, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        return torch.ops.qnb.unpack_w8(packed, *shape)

    def extra(self, codes: Tensor, inputs: Inputs) -> Tensor | None:
        """s32 (N,): what the zero point of the activations adds to every sum, with its sign turned."""
        return (-inputs.zero * codes.sum(1, dtype=torch.int64)).to(torch.int32) if inputs.zero else None

    @property
    def op_name(self) -> str:
        return "linear_w8a8_static" if self.static else "linear_w8a8"

    def run(self, variant: CodedVariant, x: Tensor, bias: Tensor | None) -> Tensor:
        inputs, scale, n = variant.inputs, variant.levels.scale, variant.shape[0]
        if not self.static:
            return _dynamic(x, variant.packed, scale, bias, n, inputs.divisor)
        return _static(x, variant.packed, scale, bias, n, inputs.scale, inputs.zero, variant.extra, inputs.divisor)

    def why_not(self, n: int, k: int) -> str | None:
        if self.aasym and k > 65_535:
            return f"it has {k} inputs: with a zero point above 65,535 a sum can leave 32 bits; leave -aasym out"
        return None
