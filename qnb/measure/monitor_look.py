"""A look into one pass: rows of the inputs of every linear layer, through hooks that are there for that pass alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qnb.measure.monitor_drift import NONE, Taken, activations_of, measure
from qnb.results import one_line

_HELD = 1 << 22  # numbers of inputs that a look holds before it measures them: 16 MiB


def _no_hook(*args: object) -> None:
    """What a copied or unpickled model has in place of a monitor's hook."""


def _without_hook() -> Callable[..., None]:
    return _no_hook


class Hook:
    """A hook that a copy of the model does not take along, and that does nothing in compiled code.

    What `call` raises goes to `note` as words: whoever waits for the model's answer has no part in it.
    """

    def __init__(self, call: Callable[..., None], note: Callable[[str], None]) -> None:
        self._call, self._note = call, note

    def __call__(self, *given: Any) -> None:
        if torch.compiler.is_compiling():
            return
        try:
            self._call(*given)
        except Exception as problem:
            self._note(f"a pass could not be looked at: {type(problem).__name__}: {one_line(problem)}")

    def __deepcopy__(self, memo: dict) -> Callable[..., None]:
        return _no_hook

    def __reduce__(self) -> tuple:
        return _without_hook, ()


class Look:
    """Inside it every linear layer that this thread calls shows some rows of its inputs; `seen` is what they say."""

    def __init__(
        self,
        layers: Mapping[nn.Linear, str],
        draw: random.Random,
        mask: Tensor | None,
        most: int,
        ranges: Mapping[str, float],
    ) -> None:
        self.kinds: dict[str, str] = {}
        self._layers, self._draw, self._most, self._ranges = layers, draw, most, ranges
        self._rows = None if mask is None or bool(mask.all()) else mask.flatten().nonzero().flatten()
        self._tokens = None if mask is None else mask.numel()
        self._thread = threading.get_ident()
        # A layer that cannot be looked at leaves the others to be seen.
        self._hook = Hook(self._show, lambda words: None)
        self._taken: list[Taken] = []
        self._elements = 0
        self._found: list[Tensor] = []
        self._which: dict[str, int] = {}  # layer -> its place in what was taken
        self._before: tuple[Tensor, tuple, int] | None = None
        self._starts: dict[int, int] = {}

    def __enter__(self) -> None:
        # Under itself, not under a number: it can then be taken out whatever an interrupt did to its putting in.
        for layer in self._layers:
            layer._forward_pre_hooks[self._hook] = self._hook

    def __exit__(self, *exception: object) -> None:
        self._before = None
        for layer in self._layers:
            layer._forward_pre_hooks.pop(self._hook, None)

    def seen(self) -> dict[str, Tensor]:
        """What `measure` gives, by layer."""
        self._measure()
        return {name: self._found[place] for name, place in self._which.items()}

    def _show(self, layer: nn.Module, args: tuple) -> None:
        if threading.get_ident() != self._thread or not args or not isinstance(args[0], Tensor) or not args[0].numel():
            return
        x, name, how = args[0], self._layers.get(layer), activations_of(layer)
        if name is None or name in self._which:
            return
        self.kinds[name] = how.kind
        # q, k and v, gate and up take the very same tensor.
        widest = self._ranges.get(name) if how.kind == NONE else None
        key = (how.kind, how.scale, how.zero, id(how.divisor), widest)
        if self._before is not None and self._before[0] is x and self._before[1] == key:
            self._which[name] = self._before[2]
            return
        place = len(self._found) + len(self._taken)
        self._before, self._which[name] = (x, key, place), place
        with torch.no_grad():
            rows = self._some_rows(x.detach()).clone()  # the whole is let go, or written over
        self._taken.append(Taken(rows, how, widest))
        self._elements += rows.numel()
        if self._elements > _HELD:
            self._measure()

    def _measure(self) -> None:
        with torch.no_grad():
            self._found += measure(self._taken)
        self._taken.clear()
        self._before, self._elements = None, 0

    def _some_rows(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self._rows is not None and len(rows) == self._tokens:
            step = -(-len(self._rows) // self._most)
            return rows[self._rows.to(x.device)[self._start(step) :: step]]
        step = -(-len(rows) // self._most)
        return rows[self._start(step) :: step]

    def _start(self, step: int) -> int:
        if step not in self._starts:
            self._starts[step] = self._draw.randrange(step)
        return self._starts[step]


def linear_layers(model: nn.Module) -> dict[nn.Linear, str]:
    """Every linear layer with its first name."""
    return {module: name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _ids(args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    given = kwargs.get("input_ids")
    if given is None and args:
        given = args[0]
    return given if isinstance(given, Tensor) and given.dim() == 2 and not given.is_floating_point() else None


def tokens_of(args: tuple, kwargs: Mapping[str, Any]) -> int | None:
    """How many tokens this pass is given; None where that is not said."""
    ids = _ids(args, kwargs)
    if ids is not None:
        return ids.numel()
    embeddings = kwargs.get("inputs_embeds")
    return embeddings.shape[:-1].numel() if isinstance(embeddings, Tensor) else None


def mask_of(args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Which tokens of this pass are no padding, (B, T); None where that is not said."""
    ids, mask = _ids(args, kwargs), kwargs.get("attention_mask")
    if ids is None or not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < ids.shape[1]:
        return None
    return mask[:, -ids.shape[1] :] != 0
