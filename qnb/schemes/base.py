"""What a scheme is: a name, a grid for the weight's codes, and how rounded codes become something that runs."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from qnb.schemes.grid import Grid, Rounded

__all__ = ["Family", "How", "Inputs", "Rounded", "Scheme", "Variant"]


@dataclasses.dataclass(frozen=True)
class How:
    """How a layer's codes were chosen; together with the scheme's name all that a recipe says of a layer."""

    rounding: str = "nearest"
    observer: str = "minmax"
    smooth: float | str | None = None
    seed: int = 0

    def __str__(self) -> str:
        rest = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self)[1:] if getattr(self, f.name) != f.default
        }
        return ", ".join([self.rounding, *(f"{name} {value}" for name, value in rest.items())])

    @classmethod
    def read(cls, words: str) -> How:
        """The `How` that prints as these words."""
        rounding, *rest = words.split(", ")
        given: dict[str, Any] = dict(part.split(" ", 1) for part in rest)
        if "smooth" in given and given["smooth"] != "auto":
            given["smooth"] = float(given["smooth"])
        if "seed" in given:
            given["seed"] = int(given["seed"])
        return cls(rounding, **given)


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """What is known of a layer's inputs when it is quantized; each part None where it is not needed.

    divisor   f32 (K,): the inputs are divided by it, and the codes stand for weight * divisor
    scale     of activation codes that are fixed by calibration: value = (code - zero) * scale
    zero      whole number, the activation code of 0
    outliers  s64 (n,): input channels that stay in the original precision, rising
    """

    divisor: Tensor | None = None
    scale: float | None = None
    zero: int = 0
    outliers: Tensor | None = None


class Variant(ABC):
    """One layer in one scheme: immutable tensors and the operator that runs them.

    `tensors()` are what is really held; `plain()` is the same weight unpacked, as a state dict has it.
    """

    scheme: Scheme
    how: How
    shape: tuple[int, int]
    note: str | None = None  # what a person should be told of how its codes were chosen

    @abstractmethod
    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., K) -> (..., N) in the type of x."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight as (N, K) floats that stands in for the original: what the codes mean, rounded to `dtype`."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The resident tensors by name."""

    @abstractmethod
    def plain(self) -> dict[str, Tensor]:
        """New tensors under names of `plain.NAMES`, none of them `weight`: integers are never loaded as floats.

        `plain.build` makes the variant again.
        """

    @abstractmethod
    def to(self, device: torch.device) -> Variant:
        """The same bits on another device."""

    @abstractmethod
    def kernel(self) -> str:
        """What runs it where its tensors lie."""

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes really held, padding included."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors().values())


class Scheme(ABC):
    """A number format for one layer.

    name      the canonical spelling; a class that sets it is one scheme, a class that does not is a family
    grid      of the weight's codes; None for `none` alone
    op_name   what torch calls to run it, `torch.ops.qnb.<op_name>`; None where no operator of qnb does
    activation_bits  16 where activations stay as they are
    static    whether the scale of activations is fixed by calibration, with a zero point where `aasym`
    outliers  how many input channels stay in the original precision, those of the widest calibrated range
    """

    name: str
    grid: Grid | None = None
    op_name: str | None = None
    activation_bits: int = 16
    static: bool = False
    aasym: bool = False
    outliers: int = 0

    @property
    def calibrated(self) -> bool:
        """Whether it cannot be chosen without calibration."""
        return self.static or self.outliers > 0

    @abstractmethod
    def variant(self, rounded: Rounded, how: How, inputs: Inputs) -> Variant:
        """Packs a rounded weight for the operator of this scheme."""

    def why_not(self, n: int, k: int) -> str | None:
        """Why a weight (n, k) cannot take this scheme, with what fits; None where it can."""
        return None

    def __repr__(self) -> str:
        return self.name


class Family(Scheme):
    """Schemes that differ by what their names spell. Subclasses parse a name and list the usual ones."""

    usual: ClassVar[Sequence[str]]

    @classmethod
    @abstractmethod
    def named(cls, name: str) -> Scheme | None:
        """The scheme that the name spells, None where it is none of this family.

        Raises `UnknownScheme` where it begins like one and goes on wrongly.
        """
