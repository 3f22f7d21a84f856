"""Grids: the values that the codes of a weight can stand for.

A grid fits its levels to a weight, chooses the nearest code and gives values back. Shapes: weights and codes (N, K);
scale and zero point (N, G), one a group of `group` inputs, G = ceil(K / group); the last group may be short.
Value of a code: (table[code] or code itself, minus the zero point) times the scale, in f32.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from qnb.schemes.blocks import float_blocks, row_absmax, scratch


@dataclasses.dataclass(frozen=True, eq=False)
class Levels:
    """What the codes of one weight stand for.

    scale        f32 (N, G), whose values `scale_dtype`, in which it is saved, holds exactly
    group        inputs that share a scale; K where a channel has one
    zero         f32 (N, G), whole numbers unless a rounding moved them; None where 0 stands for 0
    table        f32 (2 ** bits,), the value of each code before scaling; None where a code is its own value
    zero_dtype   in which `zero` is saved, exactly: s8 where it is whole
    """

    scale: Tensor
    scale_dtype: torch.dtype
    group: int
    zero: Tensor | None = None
    table: Tensor | None = None
    zero_dtype: torch.dtype = torch.int8

    def spread(self, per_group: Tensor, columns: slice | Tensor, k: int) -> Tensor:
        """(N, G) -> (N, len(columns)): each column's entry of its group; (N, 1) where a channel has one."""
        if per_group.shape[1] == 1:
            return per_group
        if isinstance(columns, Tensor):
            return per_group[:, columns // self.group]
        # Copied, not indexed: an index of every column costs several times as much.
        return per_group.unsqueeze(-1).expand(-1, -1, self.group).flatten(1)[:, :k][:, columns]


@dataclasses.dataclass(frozen=True, eq=False)
class Rounded:
    """A weight on a grid: `codes` s8 (N, K), or u8 where they index a table.

    `divisor` f32 (K,) where the rounding chose to scale the inputs: the codes then stand for weight * divisor. `note`
    is what a person should be told of how the codes were chosen.
    """

    codes: Tensor
    levels: Levels
    divisor: Tensor | None = None
    note: str | None = None


class Grid(ABC):
    """`bits` of a code and `group`, the inputs that share a scale: 0 for a whole channel, -1 for the whole weight."""

    bits: int
    group: int
    learns: ClassVar[bool] = False  # whether `importance` makes it better
    lopsided: bool = False  # whether it reaches further on one side of 0, so that a negative scale is worth trying

    @abstractmethod
    def fit(
        self, weight: Tensor, dtype: torch.dtype, *, clip: Tensor | None = None, importance: Tensor | None = None
    ) -> Levels:
        """Levels for `weight` (N, K) f32, whose scales `dtype` holds exactly.

        clip        f32 (N, G) or one for all, factors on each group's range; below 1 steps are smaller and the largest
                    weights saturate; of a lopsided grid a negative one gives a negative scale, which turns the levels
                    round: the other side of 0 is the one with the level more
        importance  f32 (K,), how much an error in each input counts, for grids that learn their levels
        """

    @abstractmethod
    def nearest(self, weight: Tensor, levels: Levels, columns: slice | Tensor = slice(None), k: int | None = None):
        """Codes closest to `weight` (N, len(columns)); `k` is K where `columns` are not all."""

    def values(
        self, codes: Tensor, levels: Levels, columns: slice | Tensor = slice(None), k: int | None = None
    ) -> Tensor:
        """f32 values of codes (N, len(columns))."""
        k = codes.shape[1] if k is None else k
        values = codes.float() if levels.table is None else levels.table[codes.long()]
        if levels.zero is not None:
            values = values - levels.spread(levels.zero, columns, k)
        return values * levels.spread(levels.scale, columns, k)

    def group_of(self, k: int) -> int:
        """Inputs that share a scale in a weight of K inputs, at least 1."""
        return self.group if 0 < self.group < k else max(1, k)

    def _reduced(self, weight: Tensor, reduce) -> Tensor:
        """(N, K) -> (N, G): `reduce(values, dim)` of each group; zeros fill a short last one."""
        n, k = weight.shape
        if self.group < 0:
            return (
                reduce(weight.reshape(1, -1), 1).reshape(1, 1).expand(n, 1)
                if weight.numel()
                else weight.new_zeros(n, 1)
            )
        if not weight.numel():
            return weight.new_zeros(n, 1)
        group = self.group_of(k)
        padded = torch.nn.functional.pad(weight, (0, -k % group))
        return reduce(padded.view(n, -1, group), 2)


@dataclasses.dataclass(frozen=True)
class IntegerGrid(Grid):
    """Evenly spaced. Symmetric: at 8 bits codes [-127, 127] and scale = absmax / 127, so that a weight and its negation
    cost the same; below, the full range [-2^(b-1), 2^(b-1) - 1] and scale = absmax / (2^(b-1) - 1/2), because one level
    in sixteen is too much to leave out. Asymmetric: full range over [min, max] with 0 inside, a whole zero point.
    """

    bits: int = 8
    group: int = 0
    asym: bool = False

    @property
    def lopsided(self) -> bool:
        return not self.asym and self.bits < 8

    @property
    def high(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def low(self) -> int:
        return -self.high if self.bits == 8 and not self.asym else -self.high - 1

    def fit(self, weight, dtype, *, clip=None, importance=None):
        group = self.group_of(weight.shape[1])
        if not self.asym:
            absmax = row_absmax(weight) if self.group == 0 else self._reduced(weight.float().abs(), torch.amax)
            steps = self.high if self.bits == 8 else self.high + 0.5
            return Levels(scale_of(absmax if clip is None else absmax * clip, steps, dtype), dtype, group)
        weight = weight.float()
        # Padding adds zeros, which the range holds anyway.
        low, high = -self._reduced(-weight, _relu_max), self._reduced(weight, _relu_max)
        if clip is not None:
            low, high = low * clip, high * clip
        scale = scale_of(high - low, self.high - self.low, dtype)
        zero = torch.round(self.low - low / scale.where(scale > 0, 1)).clamp_(self.low, self.high)
        return Levels(scale, dtype, group, zero)

    def nearest(self, weight, levels, columns=slice(None), k=None):
        """s8: round half to even of weight / scale, plus the zero point; a scale of zero gives the zero point.

        Of a zero point that is no whole number the fraction is added before rounding.
        """
        k = weight.shape[1] if k is None else k
        codes = scratch(weight, torch.int8)
        divisor = levels.scale.where(levels.scale != 0, 1)
        for rows, block in float_blocks(weight):
            block.div_(levels.spread(divisor[rows], columns, k))
            if levels.zero is None:
                block.round_()
            else:
                zero = levels.spread(levels.zero[rows], columns, k)
                whole = zero.round()
                block.add_(zero - whole).round_().add_(whole)
            codes[rows] = block.clamp_(self.low, self.high)
        return codes


@dataclasses.dataclass(frozen=True)
class TableGrid(Grid):
    """A fixed table of values in [-1, 1], times absmax of the group. Codes are u8 indices into the rising table."""

    bits: int
    group: int
    table: tuple[float, ...]

    @property
    def lopsided(self) -> bool:
        return self.table != tuple(-value for value in reversed(self.table))

    def fit(self, weight, dtype, *, clip=None, importance=None):
        absmax = self._reduced(weight.float().abs(), torch.amax)
        scale = scale_of(absmax if clip is None else absmax * clip, 1, dtype)
        table = torch.tensor(self.table, dtype=torch.float32, device=weight.device)
        return Levels(scale, dtype, self.group_of(weight.shape[1]), table=table)

    def nearest(self, weight, levels, columns=slice(None), k=None):
        """u8: the closest value of the table; a tie takes the lower one."""
        return nearest_in_table(weight, levels, columns, weight.shape[1] if k is None else k)


def nearest_in_table(weight: Tensor, levels: Levels, columns: slice | Tensor, k: int) -> Tensor:
    """u8 codes of the closest entries of the levels' rising table."""
    scale = levels.spread(levels.scale, columns, k)
    scaled = weight.float() / scale.where(scale != 0, 1)
    middle = (levels.table[1:] + levels.table[:-1]) / 2
    return torch.bucketize(scaled.contiguous(), middle).to(torch.uint8)


@functools.cache
def e4m3_values() -> tuple[float, ...]:
    """The value of each byte read as float8 e4m3fn (Micikevicius et al. 2022, arXiv:2209.05433); its two NaN read 0."""
    bytes_ = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    return tuple(bytes_.view(torch.float8_e4m3fn).float().nan_to_num(0.0).tolist())


@dataclasses.dataclass(frozen=True)
class Float8Grid(Grid):
    """float8 e4m3fn times a scale: absmax falls on 448, the largest value. Codes are the u8 bytes of the format."""

    bits: int = 8
    group: int = 0
    largest = 448.0

    def fit(self, weight, dtype, *, clip=None, importance=None):
        absmax = self._reduced(weight.float().abs(), torch.amax)
        scale = scale_of(absmax if clip is None else absmax * clip, self.largest, dtype)
        table = torch.tensor(e4m3_values(), device=weight.device)
        return Levels(scale, dtype, self.group_of(weight.shape[1]), table=table)

    def nearest(self, weight, levels, columns=slice(None), k=None):
        """u8: round half to even in the format; beyond 448 the largest value."""
        scale = levels.spread(levels.scale, columns, weight.shape[1] if k is None else k)
        scaled = (weight.float() / scale.where(scale > 0, 1)).clamp_(-self.largest, self.largest)
        return scaled.to(torch.float8_e4m3fn).view(torch.uint8)


def scale_of(width: Tensor, steps: float, dtype: torch.dtype) -> Tensor:
    """width / steps, rounded to `dtype`, in which it will be saved, as f32; negative for a negative width.

    A scale that `dtype` would round to zero becomes the value next to it: tiny weights survive.
    """
    # By a tensor, not a Python number: CUDA would multiply with the reciprocal.
    scale = (width / width.new_full((), steps)).to(dtype).float()
    limits = torch.finfo(dtype)
    least = width.sign() * (limits.smallest_normal * limits.eps)
    return torch.where(scale == 0, least, scale).clamp(-limits.max, limits.max)


def _relu_max(values: Tensor, dim: int) -> Tensor:
    return values.amax(dim).clamp_(min=0)
