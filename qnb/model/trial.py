"""Trials: a model computes, in one thread alone, as if some of its layers were other ones. Nothing in it is swapped.

While a trial is open its modules carry a forward of their own that asks, in the thread that opened it, what to answer;
every other thread gets what it always got. So a layer can be tried in another scheme, or a block can hand back what it
gave before, while the model serves somebody else.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from qnb.schemes import Variant

Answer = Callable[..., Any]


class Trial:
    """Modules that answer otherwise inside `with trial.answering({module: answer}):`, in this thread.

    Trials of several threads may share modules, and end in any order.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(dict.fromkeys(modules))
        self._thread = threading.get_ident()
        self._answers: dict[nn.Module, Answer] = {}

    def __enter__(self) -> Trial:
        try:
            for module in self._modules:
                with _lock:
                    forward = module.__dict__.get("forward")
                    if not isinstance(forward, _Forward):
                        forward = _Forward(module, module.forward, forward)
                    forward.trials = (*forward.trials, self)
                    module.forward = forward
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for module in self._modules:
            with _lock:
                forward = module.__dict__.get("forward")
                if not isinstance(forward, _Forward):
                    continue
                forward.trials = tuple(trial for trial in forward.trials if trial is not self)
                if forward.trials:
                    continue
                if forward.given is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.forward = forward.given

    @contextlib.contextmanager
    def answering(self, answers: dict[nn.Module, Answer]) -> Iterator[None]:
        """Inside it each of these modules gives `answer(*args, **kwargs)` instead of its forward."""
        before, self._answers = self._answers, {**self._answers, **answers}
        try:
            yield
        finally:
            self._answers = before

    def answer_of(self, module: nn.Module) -> Answer | None:
        """What `module` answers in this thread; None where it answers as usual."""
        return self._answers.get(module) if threading.get_ident() == self._thread else None


_lock = threading.RLock()


class _Forward:
    """Stands on a module as its forward while trials of it are open."""

    def __init__(self, module: nn.Module, usual: Answer, given: Answer | None) -> None:
        self.module, self.usual = module, usual
        self.given = given  # a forward that somebody gave to the instance itself
        self.trials: tuple[Trial, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for trial in reversed(self.trials):
            answer = trial.answer_of(self.module)
            if answer is not None:
                return answer(*args, **kwargs)
        return self.usual(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> _Forward:
        # A copy of the model takes no part in trials: what stands on it computes as the copy's own class does.
        copied = copy.deepcopy(self.module, memo)
        given = copy.deepcopy(self.given, memo)
        return _Forward(copied, types.MethodType(type(copied).forward, copied) if given is None else given, given)


def has_forward_of_its_own(module: nn.Module) -> bool:
    """Whether somebody gave a forward to the instance itself; that of an open trial is none."""
    own = module.__dict__.get("forward")
    return own.given is not None if isinstance(own, _Forward) else own is not None


def in_variant(layer: nn.Linear, variant: Variant) -> Answer:
    """The answer of a linear layer if it ran `variant`."""

    def linear(input: Tensor) -> Tensor:
        return variant.linear(input, layer.bias)

    return linear
