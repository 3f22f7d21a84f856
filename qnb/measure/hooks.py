"""Looking at layers while a model runs, by hooks that leave nothing behind."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn


@contextlib.contextmanager
def around_forwards(
    modules: Sequence[nn.Module], before: Callable[[int], None], behind: Callable[[int, Any], None]
) -> Iterator[None]:
    """Inside it, `before(i)` runs right before each forward of `modules[i]`, `behind(i, output)` right behind it.

    Other hooks of a module stay outside of the two. Only passes of the calling thread count. The modules' hooks are as
    they were afterwards, also where an interrupt came.
    """
    here = threading.get_ident()

    def hooks_of(i: int) -> tuple[Callable, Callable]:
        def first(module: nn.Module, args: tuple) -> None:
            if threading.get_ident() == here:
                before(i)

        def last(module: nn.Module, args: tuple, output: Any) -> None:
            if threading.get_ident() == here:
                behind(i, output)

        return first, last

    pairs = [hooks_of(i) for i in range(len(modules))]
    try:
        for module, (first, last) in zip(modules, pairs, strict=True):
            module.register_forward_pre_hook(first)
            module.register_forward_hook(last, prepend=True)
        yield
    finally:
        # By value, not by handle: an interrupt may fall before a handle is assigned.
        for module, pair in zip(modules, pairs, strict=True):
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [k for k, hook in hooks.items() if hook in pair]:
                    del hooks[key]
