"""Looking at modules while a model runs, by hooks that leave nothing behind."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import nn

Hooks = Iterable[tuple[nn.Module, Callable]]


@contextlib.contextmanager
def hooked(before: Hooks = (), behind: Hooks = (), *, innermost: bool = False) -> Iterator[None]:
    """Inside it, hooks run around each forward of their modules, in passes of the calling thread alone.

    before     modules with `hook(module, args, kwargs)`, called right before the forward
    behind     modules with `hook(module, args, kwargs, output)`, called behind it; `innermost`: before other hooks are

    A module's hooks are as they were afterwards, also where an interrupt came.
    """
    here = threading.get_ident()

    def in_this_thread(hook: Callable) -> Callable:
        def look(*given: Any) -> None:  # what it returned would take the place of inputs or an output
            if threading.get_ident() == here:
                hook(*given)

        return look

    first = [(module, in_this_thread(hook)) for module, hook in before]
    last = [(module, in_this_thread(hook)) for module, hook in behind]
    try:
        for module, hook in first:
            module.register_forward_pre_hook(hook, with_kwargs=True)
        for module, hook in last:
            module.register_forward_hook(hook, with_kwargs=True, prepend=innermost)
        yield
    finally:
        for module, hook in first:
            _take(hook, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
        for module, hook in last:
            _take(hook, module._forward_hooks, module._forward_hooks_with_kwargs)


def around_forwards(
    modules: Sequence[nn.Module], before: Callable[[int], None], behind: Callable[[int, Any], None]
) -> contextlib.AbstractContextManager[None]:
    """Inside it, `before(i)` runs right before each forward of `modules[i]`, `behind(i, output)` right behind it.

    Other hooks of a module stay outside of the two, as far as they were there before.
    """
    first = [(module, lambda *_, i=i: before(i)) for i, module in enumerate(modules)]
    last = [(module, lambda *given, i=i: behind(i, given[-1])) for i, module in enumerate(modules)]
    return hooked(first, last, innermost=True)


def _take(hook: Callable, there: dict[int, Callable], marked: dict[int, bool]) -> None:
    # By what it is, not by its handle: an interrupt can fall between adding a hook and noting its handle.
    for key in [key for key, value in there.items() if value is hook]:
        del there[key]
        marked.pop(key, None)
