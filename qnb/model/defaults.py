"""The tokenizer and texts that a model came with, for whoever is given none."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import nn

_defaults: weakref.WeakKeyDictionary[nn.Module, tuple[object, list[str], list[str]]] = weakref.WeakKeyDictionary()


def remember_defaults(
    model: nn.Module, tokenizer: object, texts: Iterable[str], calibration: Iterable[str] = ()
) -> None:
    """Measurements and calibration take these for this model where they are given none; forgotten with the model."""
    _defaults[model] = tokenizer, list(texts), list(calibration)


def remembered(model: nn.Module, tokenizer: object = None) -> tuple[list[str] | None, object]:
    """(texts, tokenizer) of the model, a given tokenizer going before; (None, tokenizer) where nothing is known."""
    known, texts, _ = _defaults.get(model, (None, None, None))
    return (None if texts is None else list(texts)), known if tokenizer is None else tokenizer


def remembered_calibration(model: nn.Module) -> list[str] | None:
    """The calibration texts of the model; None where none are known."""
    return list(_defaults[model][2]) or None if model in _defaults else None
