"""qnb's own format: safetensors, and `qnb.json` with the recipe; it says whatever a layer can be.

A layer's tensors are those of `Variant.plain()`; codes of less than 8 bits are packed densely as `weight_packed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qnb import schemes
from qnb.errors import BadCheckpoint
from qnb.model.checkpoint import bits
from qnb.model.recipe import LayerRecipe, Recipe
from qnb.schemes import Variant
from qnb.schemes.grid import IntegerGrid
from qnb.schemes.plain import NAMES, build

FILE = "qnb.json"
VERSION = 1
# Every name that a layer may have a tensor by.
TENSORS = ("weight_packed", *NAMES)


def tensors_of(variant: Variant) -> dict[str, Tensor]:
    """The layer's tensors by their names in the format."""
    plain, width = variant.plain(), variant.scheme.grid.bits
    if width < 8:
        codes = plain.pop("weight_codes").to(torch.int16) - _lowest(variant.scheme)
        plain["weight_packed"] = bits.pack(codes.to(torch.uint8), width)
    return plain


def variant_of(layer: LayerRecipe, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Variant:
    """The variant that these tensors are; raises `BadCheckpoint`."""
    scheme, plain = schemes.find(layer.scheme), dict(tensors)
    if scheme.grid is None:
        raise BadCheckpoint(f"scheme {scheme.name} has no codes")
    if scheme.grid.bits < 8 and (packed := plain.pop("weight_packed", None)) is not None:
        words = -(-shape[1] * scheme.grid.bits // 32)
        if packed.dtype != torch.int32 or tuple(packed.shape) != (shape[0], words):
            raise BadCheckpoint(
                f"weight_packed is {packed.dtype} {tuple(packed.shape)}, but the model needs int32 {(shape[0], words)}"
            )
        codes = bits.unpack(packed, shape[1], scheme.grid.bits).to(torch.int16) + _lowest(scheme)
        plain["weight_codes"] = codes.to(torch.int8 if isinstance(scheme.grid, IntegerGrid) else torch.uint8)
    return build(scheme, layer.how, shape, plain)


def description(recipe: Recipe) -> dict[str, Any]:
    """What `qnb.json` holds."""
    return {"qnb_checkpoint": VERSION, "recipe": recipe.to_dict()}


def recipe_in(described: Mapping[str, Any]) -> Recipe:
    """The recipe of a `qnb.json`; raises `BadCheckpoint` or `BadRecipe`."""
    if described.get("qnb_checkpoint") != VERSION or set(described) - {"qnb_checkpoint", "recipe"}:
        raise BadCheckpoint(f"{FILE} is of another version, or holds unknown keys: this qnb reads version {VERSION}")
    if not isinstance(described.get("recipe"), Mapping):
        raise BadCheckpoint(f"{FILE} holds no recipe")
    return Recipe.from_dict(described["recipe"])


def _lowest(scheme: schemes.Scheme) -> int:
    return -(2 ** (scheme.grid.bits - 1)) if isinstance(scheme.grid, IntegerGrid) else 0
