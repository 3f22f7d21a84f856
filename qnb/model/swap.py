"""When a change lands: all of its steps or none, and between two passes through the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from qnb.model import cache
from qnb.model.disk import Mapped
from qnb.model.experts import Experts
from qnb.model.gate import when_empty
from qnb.model.linear import QLayer
from qnb.schemes.base import Variant


@dataclasses.dataclass(frozen=True)
class Place:
    """Put `new` where `old` stands: attribute `child` of `parent`."""

    parent: nn.Module
    child: str
    old: nn.Module
    new: nn.Module

    def holds(self) -> bool:
        return self.parent._modules.get(self.child) is self.old

    def do(self) -> None:
        self.parent._modules[self.child] = self.new
        if isinstance(self.old, QLayer):
            cache.put_away(self.old.variant)
        if isinstance(self.new, QLayer):
            cache.take_out(self.new.variant)

    def undo(self) -> None:
        self.parent._modules[self.child] = self.old


@dataclasses.dataclass(frozen=True)
class Switch:
    """Let a `QLayer`, attribute `child` of `parent`, run another variant."""

    parent: nn.Module
    child: str
    layer: QLayer
    old: Variant
    new: Variant

    def holds(self) -> bool:
        return self.parent._modules.get(self.child) is self.layer and self.layer.variant is self.old

    def do(self) -> None:
        self.layer.variant = self.new
        cache.put_away(self.old)
        cache.take_out(self.new)

    def undo(self) -> None:
        self.layer.variant = self.old


@dataclasses.dataclass(frozen=True)
class Stow:
    """Let a kept original's parameter lie in other memory, with the same bits: on the host, in a file, or back again.

    The parameter stays the object that optimizers and ties refer to.
    """

    original: nn.Module
    here: Tensor
    away: Tensor
    name: str = "weight"

    def holds(self) -> bool:
        return self.original._parameters[self.name].data_ptr() == self.here.data_ptr()

    def do(self) -> None:
        self._lie(self.away)

    def undo(self) -> None:
        self._lie(self.here)

    def _lie(self, where: Tensor) -> None:
        self.original._parameters[self.name].data = where
        cache.same_bits(self.original._parameters[self.name])


@dataclasses.dataclass(frozen=True)
class Keep:
    """Let a `QLayer` keep its original in another way: `new` is (original, why there is none, file it lies in)."""

    layer: QLayer
    old: tuple[nn.Module | None, str | None, Mapped | None]
    new: tuple[nn.Module | None, str | None, Mapped | None]

    def holds(self) -> bool:
        return self.layer.original is self.old[0]

    def do(self) -> None:
        self._set(self.new)

    def undo(self) -> None:
        self._set(self.old)

    def _set(self, how: tuple[nn.Module | None, str | None, Mapped | None]) -> None:
        self.layer.__dict__["original"], self.layer.original_missing, self.layer.mapped = how


@dataclasses.dataclass(frozen=True)
class Follow:
    """Let a kept original catch up with what its model went through while it was away: device, type, training flag."""

    layer: QLayer
    original: nn.Module

    def holds(self) -> bool:
        return self.layer.original is self.original

    def do(self) -> None:
        self.original.train(self.layer.training)
        weight = self.original.weight
        before = weight.dtype
        if (weight.device, before) != (self.layer.device, self.layer.dtype):
            self.original.to(self.layer.device, self.layer.dtype)
            if before == self.layer.dtype:
                cache.same_bits(self.original.weight)

    def undo(self) -> None:
        """Nothing: an original that is away is looked at by nobody, and the next restore makes it follow again."""


@dataclasses.dataclass(frozen=True)
class FollowBlock:
    """Let a kept block of experts catch up with what its model went through, as `Follow` does for a layer."""

    experts: Experts

    def holds(self) -> bool:
        return self.experts.block is not None

    def do(self) -> None:
        self.experts.follow()

    def undo(self) -> None:
        """Nothing, for the same reason."""


@dataclasses.dataclass(frozen=True)
class LetGo:
    """Let the layers of a block of experts keep the block no longer."""

    experts: Experts
    block: nn.Module | None

    def holds(self) -> bool:
        return self.experts.block is self.block

    def do(self) -> None:
        self.experts.__dict__["block"] = None

    def undo(self) -> None:
        self.experts.__dict__["block"] = self.block


Step = Place | Switch | Stow | Keep | Follow | FollowBlock | LetGo


_landed = 0  # only ever raised, and never asked for its exact value: two at once need no lock


def landed() -> int:
    """A number that is another one after each change of any model: cheaper to look at than all layers are."""
    return _landed


def land(model: nn.Module, plan: Callable[[], Sequence[Step]]) -> bool:
    """Changes `model` by all steps of the plan between two passes through it; True once that is done.

    Inside a pass of the calling thread the change lands when that pass ends, and False comes back at once. The plan is
    made before the wait; where another thread's change came in between, it is made once more.
    """
    steps = plan()
    return when_empty(model, lambda: _do_all(steps if all(s.holds() for s in steps) else plan()))


def _do_all(steps: Sequence[Step]) -> None:
    """All steps, or none: an error or an interrupt in between takes back those that were done.

    Every step and its undoing are single assignments that may be repeated, so all can be undone without knowing how
    far the change had come.
    """
    global _landed
    try:
        for step in steps:
            step.do()
    except BaseException:
        _undo_all(steps)
        raise
    _landed += 1
    cache.shrink()


def _undo_all(steps: Sequence[Step]) -> None:
    while True:
        try:
            for step in steps:
                step.undo()
            return
        except KeyboardInterrupt:  # the one that came first is on its way already
            continue
