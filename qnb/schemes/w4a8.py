"""w4a8, w3a8, w2a8: narrow weights by group, activations quantized to 8 bits per row at run time.

Inside a group the arithmetic is integer; the groups' sums, each times its scale, are added in f32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qnb.schemes import register
from qnb.schemes.coded import CodedVariant
from qnb.schemes.grammar import Spelling
from qnb.schemes.integer import IntegerFamily
from qnb.schemes.weight_only import ByCodes

_op = torch.ops.qnb.linear_codes_a8.default


@register
class W4A8(ByCodes, IntegerFamily):
    weight_bits, activation_bits = (2, 3, 4), 8
    usual = ("w4a8-g64", "w4a8-g128", "w4a8-channel")

    @classmethod
    def refusal(cls, spelling: Spelling) -> str | None:
        if spelling.group == 32:
            return "integer sums go over 64 inputs at a time: take -g64, -g128 or -channel"
        if spelling.asym:
            return "with a zero point for the weights there is no integer operator: leave -asym out, or take a16"
        if spelling.static:
            return "fixed activation scales are for w8a8: leave -static out"
        return None

    op_name = "linear_codes_a8"

    def run(self, variant: CodedVariant, x: Tensor, bias: Tensor | None) -> Tensor:
        levels, n = variant.levels, variant.shape[0]
        return _op(x, variant.packed, levels.scale, bias, n, self.grid.bits, levels.group, variant.inputs.divisor)
