"""What modules got and gave in one pass, so that a later pass need not compute again what nothing changed."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from qnb.model.hooks import hooked

# A tensor and its version, which every change in place raises; None where it keeps none (made in inference mode).
_Versions = list[tuple[Tensor, int | None]]


@dataclasses.dataclass(eq=False)
class Call:
    """One call of a module; `began` and `ended` are its places in the order of all that was noted."""

    began: int
    ended: int
    args: tuple
    kwargs: dict[str, Any]
    output: Any
    _got: _Versions
    _gave: _Versions

    @property
    def given_is_intact(self) -> bool:
        """Whether what the module got still holds what it held then."""
        return _intact(self._got)

    @property
    def output_is_intact(self) -> bool:
        """Whether what the module gave still holds what it held then."""
        return _intact(self._gave)

    def answer(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gave, whatever it gets: for `Trial.answering`."""
        return self.output

    def same_given(self, other: Call) -> bool:
        """Whether both modules got one and the same tensor and nothing else."""
        alone = all(len(call.args) == 1 and not call.kwargs for call in (self, other))
        return alone and isinstance(self.args[0], Tensor) and self.args[0] is other.args[0]


@contextlib.contextmanager
def noting(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Call]]:
    """Inside it, the calls of `modules` in this thread are noted; one that is called twice is left out."""
    calls: dict[nn.Module, Call] = {}
    open_calls: dict[nn.Module, tuple[int, _Versions]] = {}
    often: set[nn.Module] = set()
    clock = itertools.count()

    def start(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if module in calls or module in open_calls:
            often.add(module)
        open_calls[module] = next(clock), _versions([*args, *kwargs.values()])

    def end(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if module in open_calls:
            began, got = open_calls.pop(module)
            calls[module] = Call(began, next(clock), args, kwargs, output, got, _versions([output]))

    modules = list(modules)
    try:
        with hooked([(module, start) for module in modules], [(module, end) for module in modules]):
            yield calls
    finally:
        for module in often:
            calls.pop(module, None)


def reusable(calls: dict[nn.Module, Call], changed: nn.Module) -> dict[nn.Module, Callable[..., Any]]:
    """Answers that modules of `calls` would give again if `changed`, one of them, were another layer.

    That is what ended before it began, and what later got the very tensor that it gets, such as k and v after q.
    """
    here = calls.get(changed)
    if here is None:
        return {}
    answers = {}
    for module, call in calls.items():
        # What began before it and ended after it holds it.
        beside = call.began > here.ended and call.same_given(here) and call.given_is_intact
        if (call.ended < here.began or beside) and call.output_is_intact:
            answers[module] = call.answer
    return answers


def _versions(values: Iterable[Any]) -> _Versions:
    found: _Versions = []
    for value in values:
        if isinstance(value, Tensor):
            found.append((value, None if value.is_inference() else value._version))
        elif isinstance(value, (tuple, list)):
            found += _versions(value)
        elif isinstance(value, dict):
            found += _versions(value.values())
    return found


def _intact(versions: _Versions) -> bool:
    return all(version is not None and tensor._version == version for tensor, version in versions)
