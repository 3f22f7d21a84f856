"""Variants that a layer ran before, so that switching back to one costs no rounding.

A variant is found again by the weight that it was made from and by the recipe: all that decides its bits. One that no
layer runs is held while all such together stay within `CACHE_BYTES`, and while its weight lives; the one that was put
away longest ago goes first. Set `qnb.model.cache.CACHE_BYTES` to hold more, or 0 to hold none; `clear()` empties it.

A variant counts only while its weight is the one it was made from: same version counter (every optimizer and every
in-place operation moves it), same memory, and the same 64 values taken from all over it. Writing to single elements
behind torch's back (through `.data` or numpy) is not seen: call `clear()` then. Weights that were made in inference
mode have no version counter, and no variant of theirs is held.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable

from torch import Tensor

from qnb.schemes.base import Variant

CACHE_BYTES = 256 * 2**20

_SAMPLES = 8  # along each axis


@dataclasses.dataclass
class _Made:
    """From which weight, in which state, a living variant was made, and the variant's address."""

    address: int
    weight: weakref.ref[Tensor]
    state: tuple
    variant: weakref.ref[Variant]


_Key = tuple[int, Hashable]  # address of the weight, recipe
_lock = threading.RLock()
_made: dict[_Key, _Made] = {}
_keys: dict[int, _Key] = {}  # by the address of a variant
_away: OrderedDict[int, Variant] = OrderedDict()  # those that no layer runs, by address, oldest first


def find(weight: Tensor, recipe: Hashable) -> Variant | None:
    """The variant that was made from the weight as it is now by this recipe, if it still exists."""
    known = _made.get((id(weight), recipe))
    if known is None or known.weight() is not weight or weight.is_inference() or known.state != _state(weight):
        return None
    return known.variant()


def remember(weight: Tensor, recipe: Hashable, variant: Variant) -> None:
    """Notes from what `variant` was made; holds nothing."""
    if weight.is_inference() or weight.is_meta:
        return
    key = id(weight), recipe

    def forget(gone: weakref.ref) -> None:
        if (known := _made.get(key)) is not None and known.weight is gone:
            _drop(key)

    with _lock:
        _drop(key)
        _made[key] = _Made(id(variant), weakref.ref(weight, forget), _state(weight), weakref.ref(variant))
        _keys[id(variant)] = key


def put_away(variant: Variant) -> None:
    """Holds a variant that its layer no longer runs, until `shrink`. One that nobody could find is not held."""
    with _lock:
        known = _made.get(_keys.get(id(variant)))
        if known is not None and known.variant() is variant:
            _away[id(variant)] = variant
            _away.move_to_end(id(variant))


def take_out(variant: Variant) -> None:
    """Lets go of a variant that a layer runs again."""
    _away.pop(id(variant), None)


def shrink() -> None:
    """Lets go of the oldest until the rest is within the limit, and forgets what is gone."""
    with _lock:
        for key, known in list(_made.items()):
            if known.weight() is None or known.variant() is None:
                _drop(key)
        total = cached_bytes()
        while _away and total > CACHE_BYTES:
            total -= _away.popitem(last=False)[1].nbytes


def same_bits(weight: Tensor) -> None:
    """Says that the weight lies elsewhere now, with the same bits: what was made from it still counts."""
    if weight.is_inference():
        return
    for (address, _), known in list(_made.items()):
        if address == id(weight) and known.weight() is weight:
            known.state = _place(weight), known.state[1]  # not read again: from a file that would be slow


def cached_bytes() -> int:
    """Bytes of all variants that are held and that no layer runs."""
    return sum(v.nbytes for v in list(_away.values()))


def clear() -> None:
    """Lets go of every variant that no layer runs, and forgets what the others were made from."""
    with _lock:
        _away.clear()
        _made.clear()
        _keys.clear()


def _drop(key: _Key) -> None:
    known = _made.pop(key, None)
    if known is not None and _keys.get(known.address) == key:
        del _keys[known.address]
        _away.pop(known.address, None)


def _state(weight: Tensor) -> tuple:
    rows, columns = (max(1, -(-n // _SAMPLES)) for n in weight.shape)
    return _place(weight), weight.detach()[::rows, ::columns].tolist()


def _place(weight: Tensor) -> tuple:
    return weight._version, weight.data_ptr(), weight.device, weight.dtype, tuple(weight.shape), weight.stride()
