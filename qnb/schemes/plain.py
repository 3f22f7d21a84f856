"""From the plain tensors of a state dict or a file to a variant that runs, with everything about them checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from qnb.errors import BadCheckpoint
from qnb.schemes.base import How, Inputs, Rounded, Scheme, Variant
from qnb.schemes.grid import IntegerGrid, Levels
from qnb.schemes.outliers import OutlierVariant

NAMES = (  # that `Variant.plain()` may give its tensors
    "weight_codes",
    "weight_scale",
    "weight_zero",
    "weight_table",
    "input_divisor",
    "input_scale_zero",
    "outlier_channels",
    "outlier_weight",
)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def checked(name: str, tensor: Tensor | None, shape: tuple[int, ...], *types: torch.dtype) -> Tensor:
    """The tensor itself; raises `BadCheckpoint` where it is missing, of another shape or type, NaN or infinite."""
    if tensor is None:
        raise BadCheckpoint(f"{name} is missing")
    if tensor.dtype not in types or tuple(tensor.shape) != shape:
        wanted = " or ".join(str(t).removeprefix("torch.") for t in types)
        given = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
        raise BadCheckpoint(f"{name} is {given}, but the model needs {wanted} {shape}")
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise BadCheckpoint(f"{name} holds {int((~tensor.isfinite()).sum())} NaN or infinite values")
    return tensor


def groups_of(scheme: Scheme, k: int) -> int:
    """G: how many scales a row of k inputs has."""
    return math.ceil(k / scheme.grid.group_of(k)) or 1


def build(scheme: Scheme, how: How, shape: tuple[int, int], plain: Mapping[str, Tensor]) -> Variant:
    """The variant that holds `plain`, tensors by the names of `Variant.plain()`; raises `BadCheckpoint`."""
    n, k = shape
    grid, g = scheme.grid, groups_of(scheme, k)
    integer = isinstance(grid, IntegerGrid)
    codes = checked("weight_codes", plain.get("weight_codes"), shape, torch.int8 if integer else torch.uint8)
    if grid.bits < 8:
        low, high = (-(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1) if integer else (0, 2**grid.bits - 1)
        if codes.numel() and not (low <= int(codes.min()) and int(codes.max()) <= high):
            raise BadCheckpoint(f"weight_codes leave {low} to {high}, what {grid.bits} bits hold")
    scale = checked("weight_scale", plain.get("weight_scale"), (n, g), *_FLOATS)
    zero = table = divisor = None
    if integer and grid.asym:
        # Whole numbers, or with some roundings (hqq) real ones.
        zero = checked("weight_zero", plain.get("weight_zero"), (n, g), torch.int8, *_FLOATS)
    if not integer:
        table = checked("weight_table", plain.get("weight_table"), (2**grid.bits,), torch.float32)
    if "input_divisor" in plain:
        divisor = checked("input_divisor", plain["input_divisor"], (k,), torch.float32)
        if not (divisor > 0).all():
            raise BadCheckpoint("input_divisor must be above 0")
    fixed, shift = None, 0
    if scheme.static:
        pair = checked("input_scale_zero", plain.get("input_scale_zero"), (2,), torch.float64)
        fixed, whole = pair.tolist()
        if not (float(torch.tensor(fixed, dtype=torch.float32)) > 0 and whole == int(whole) and -128 <= whole <= 127):
            raise BadCheckpoint(f"the fixed input scale {fixed} with zero point {whole} is of no use")
        shift = int(whole)
    levels = Levels(_own(scale), scale.dtype, grid.group_of(k), table=_own(table))
    if zero is not None:
        levels = dataclasses.replace(levels, zero=_own(zero), zero_dtype=zero.dtype)
    base = scheme.variant(Rounded(codes, levels), how, Inputs(_own(divisor), fixed, shift))
    if not scheme.outliers:
        return base
    kept_columns = min(scheme.outliers, k)
    channels = checked("outlier_channels", plain.get("outlier_channels"), (kept_columns,), torch.int64)
    if not ((channels >= 0) & (channels < k)).all() or not (channels.diff() > 0).all():
        raise BadCheckpoint(f"outlier_channels must rise within 0 and {k - 1}")
    kept = checked("outlier_weight", plain.get("outlier_weight"), (n, kept_columns), *_FLOATS)
    return OutlierVariant(base, channels.clone(), kept.clone())


def _own(tensor: Tensor | None) -> Tensor | None:
    """f32, in memory that nobody else changes: a variant is immutable."""
    return None if tensor is None else tensor.to(torch.float32, copy=True)
