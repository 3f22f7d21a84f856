"""w8a16, w4a16, w3a16, w2a16: integer weights, activations as they are; products are summed in f32."""

from __future__ import annotations

import torch
from torch import Tensor

from qnb.schemes import register
from qnb.schemes.coded import Coded, CodedVariant
from qnb.schemes.grid import IntegerGrid
from qnb.schemes.integer import IntegerFamily

_per_channel = torch.ops.qnb.linear_w8a16.default
_by_codes = torch.ops.qnb.linear_codes.default


class ByCodes(Coded):
    """Weights of 2, 3, 4 or 8 bits that are looked up and scaled by group, activations as they are."""

    @property
    def lowest(self) -> int:
        """Subtracted from a code before it is packed: integer codes have a sign, packed ones none."""
        return -(2 ** (self.grid.bits - 1)) if isinstance(self.grid, IntegerGrid) else 0

    def pack(self, codes: Tensor) -> Tensor:
        return torch.ops.qnb.pack_codes((codes.to(torch.int16) - self.lowest).to(torch.uint8), self.grid.bits)

    def unpack(self, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        codes = torch.ops.qnb.unpack_codes(packed, *shape, self.grid.bits)
        return (codes.to(torch.int16) + self.lowest).to(torch.int8) if self.lowest else codes

    op_name = "linear_codes"

    def run(self, variant: CodedVariant, x: Tensor, bias: Tensor | None) -> Tensor:
        levels, n = variant.levels, variant.shape[0]
        return _by_codes(
            x,
            variant.packed,
            levels.scale,
            levels.zero,
            levels.table,
            bias,
            n,
            self.grid.bits,
            levels.group,
            variant.inputs.divisor,
        )


@register
class WeightOnly(ByCodes, IntegerFamily):
    weight_bits, activation_bits = (2, 3, 4, 8), 16
    usual = (
        "w8a16",
        "w8a16-g64",
        "w4a16-g64",
        "w4a16-g32",
        "w4a16-g128",
        "w4a16-g64-asym",
        "w4a16-channel",
        "w3a16-g64",
        "w3a16-g64-asym",
        "w2a16-g32",
        "w2a16-g32-asym",
        "w4a16-g64-outliers8",
    )

    @property
    def _plain_channels(self) -> bool:
        """Whether the operator for one scale a channel runs it, which scales sums instead of weights."""
        return self.grid.bits == 8 and self.grid.group <= 0 and not self.grid.asym

    def pack(self, codes: Tensor) -> Tensor:
        return torch.ops.qnb.pack_w8(codes) if self._plain_channels else super().pack(codes)

    def unpack(self, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        return torch.ops.qnb.unpack_w8(packed, *shape) if self._plain_channels else super().unpack(packed, shape)

    @property
    def op_name(self) -> str:
        return "linear_w8a16" if self._plain_channels else "linear_codes"

    def run(self, variant: CodedVariant, x: Tensor, bias: Tensor | None) -> Tensor:
        if not self._plain_channels:
            return super().run(variant, x, bias)
        return _per_channel(x, variant.packed, variant.levels.scale, bias, variant.shape[0], variant.inputs.divisor)
