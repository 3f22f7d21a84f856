"""What can go wrong, as types. Every message is one line: what was given, what is allowed, what to do.

Each type also derives from the built-in exception that a caller who does not know qnb would catch.
"""

from __future__ import annotations


class QnbError(Exception):
    """Base of everything that qnb raises on purpose."""


class UnknownScheme(QnbError, ValueError):
    """A scheme's name does not parse, or no scheme of that name is registered."""


class UnknownRounding(QnbError, ValueError):
    """No rounding of that name is registered, or it makes no sense for the scheme."""


class LayerRefused(QnbError, ValueError):
    """A layer that was asked for by name cannot be quantized, or a pattern matches nothing."""


class BadWeights(QnbError, ValueError):
    """Weights that cannot be quantized: NaN, infinite, or on the meta device."""


class BadInput(QnbError, ValueError):
    """An argument has the wrong form: not a module, texts that are no strings, an empty list."""


class NotQuantized(QnbError, RuntimeError):
    """`restore` or a comparison with the original was asked of a model that was never quantized."""


class BudgetBroken(QnbError, AssertionError):
    """A model costs more, or is worse, than a check allows. `result` is the check with all that it measured."""

    def __init__(self, message: str, result: object = None) -> None:
        super().__init__(message)
        self.result = result


class FrozenWeight(QnbError, RuntimeError):
    """The weight of a quantized layer was to be changed, trained or put in place from outside."""


class NotSaveable(QnbError, RuntimeError):
    """A quantized model was asked to save itself in a form that would not load again as what it is."""


class BadRecipe(QnbError, ValueError):
    """A recipe that cannot be read: no JSON, unknown keys, another version, values of the wrong form."""


class BadCheckpoint(BadWeights):
    """A directory that is no checkpoint, or tensors out of one that contradict each other or the model."""


class NativeLibraryError(QnbError, RuntimeError):
    """A compiled library is there but cannot be used as asked, for example by an unknown `QNB_ISA`."""
