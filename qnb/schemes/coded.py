"""The variant that every scheme shares: packed codes, their levels, and what is done to the inputs.

A scheme of integer or table codes derives from `Coded` and says how codes are packed and which operator runs them.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod

import torch
from torch import Tensor

from qnb import ops
from qnb.errors import BadInput
from qnb.schemes.base import How, Inputs, Rounded, Scheme, Variant
from qnb.schemes.grid import Levels

PANEL = 32  # outputs that lie together in every packed layout, see QNB_LAYOUT_S8_N32K64


@dataclasses.dataclass(frozen=True, eq=False)
class CodedVariant(Variant):
    """`packed` in the layout of the scheme's operator (csrc/include/qnb.h), and what its codes mean.

    `extra` is what the operator needs besides, made from the codes once: the shift of activations with a zero point.
    """

    scheme: Coded
    how: How
    shape: tuple[int, int]
    packed: Tensor
    levels: Levels
    inputs: Inputs
    extra: Tensor | None = None
    note: str | None = None

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.shape[-1] != self.shape[1]:  # the operator sees K padded to 64 alone
            raise BadInput(f"the input has {x.shape[-1]} features, but the layer takes {self.shape[1]}")
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            return ops.with_gradient(self, x, bias)
        return self.scheme.run(self, x, bias)

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`linear` without a gradient."""
        return self.scheme.run(self, x, bias)

    def rows(self, index: Tensor) -> Tensor:
        """index (M,) -> f32 (M, K): the values of these outputs' weights. Only panels that they lie in are unpacked.

        Raises IndexError for an index outside 0 to N - 1.
        """
        n, k = self.shape
        if torch.compiler.is_compiling() or (index.is_cuda and torch.cuda.is_current_stream_capturing()):
            # Neither may wait for values: a panel for each index, as often as it occurs, and no check.
            panels, place = index // PANEL, torch.arange(index.shape[0], device=index.device)
        else:
            if index.numel() and not (0 <= int(index.min()) and int(index.max()) < n):
                raise IndexError(f"an index is outside 0 to {n - 1}")
            panels, place = torch.unique(index // PANEL, return_inverse=True)
        packed = self.packed.view(-(-n // PANEL), -1)[panels]
        codes = self.scheme.unpack(packed.view(-1), (len(panels) * PANEL, k)).view(-1, PANEL, k)
        levels = self.levels
        levels = dataclasses.replace(
            levels, scale=levels.scale[index], zero=None if levels.zero is None else levels.zero[index]
        )
        return self.scheme.grid.values(codes[place, index % PANEL], levels)

    def codes(self) -> Tensor:
        """The codes unpacked: s8 (N, K), or u8 where they index a table."""
        return self.scheme.unpack(self.packed, self.shape)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        weight = self.scheme.grid.values(self.codes(), self.levels)
        if self.inputs.divisor is not None:
            weight = weight / self.inputs.divisor
        return weight.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        held = {
            "packed": self.packed,
            "weight_scale": self.levels.scale,
            "weight_zero": self.levels.zero,
            "weight_table": self.levels.table,
            "input_divisor": self.inputs.divisor,
            "extra": self.extra,
        }
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def plain(self) -> dict[str, Tensor]:
        levels, inputs = self.levels, self.inputs
        plain = {"weight_codes": self.codes(), "weight_scale": levels.scale.to(levels.scale_dtype, copy=True)}
        if levels.zero is not None:
            plain["weight_zero"] = levels.zero.to(levels.zero_dtype, copy=True)
        if levels.table is not None:
            plain["weight_table"] = levels.table.clone()
        if inputs.divisor is not None:
            plain["input_divisor"] = inputs.divisor.clone()
        if inputs.scale is not None:
            # float64 holds the scale's bits and the zero point; one tensor, so that neither is lost without the other.
            plain["input_scale_zero"] = torch.tensor([inputs.scale, inputs.zero], dtype=torch.float64)
        return plain

    def to(self, device: torch.device) -> CodedVariant:
        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        levels, inputs = self.levels, self.inputs
        return dataclasses.replace(
            self,
            packed=self.packed.to(device),
            levels=dataclasses.replace(
                levels, scale=moved(levels.scale), zero=moved(levels.zero), table=moved(levels.table)
            ),
            inputs=dataclasses.replace(inputs, divisor=moved(inputs.divisor)),
            extra=moved(self.extra),
        )

    def kernel(self) -> str:
        return ops.kernel_for(self.scheme.op_name, self.packed.device)


class Coded(Scheme):
    """A scheme whose weight is packed codes. Subclasses say how codes are packed and run."""

    def variant(self, rounded: Rounded, how: How, inputs: Inputs) -> Variant:
        levels = dataclasses.replace(rounded.levels, scale=rounded.levels.scale.contiguous())
        shape, packed = tuple(rounded.codes.shape), self.pack(rounded.codes)
        extra = self.extra(rounded.codes, inputs)
        return CodedVariant(self, how, shape, packed, levels, inputs, extra, rounded.note)

    @abstractmethod
    def pack(self, codes: Tensor) -> Tensor:
        """Codes (N, K) in the operator's layout."""

    @abstractmethod
    def unpack(self, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        """Undoes `pack`, exactly."""

    @abstractmethod
    def run(self, variant: CodedVariant, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., K) -> (..., N) in the type of x, without a gradient."""

    def extra(self, codes: Tensor, inputs: Inputs) -> Tensor | None:
        """What the operator needs besides, made from the codes once."""
        return None
