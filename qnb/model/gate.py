"""Who is inside a model: a change of several layers waits until nobody is, and nobody enters while it lands.

Being inside is read off the stacks of all threads: a frame of `generate` or of a module's call, whose module contains
what changes or is contained in it. So a change never lands between two steps of one `generate`, nor in a pass that
began before the model was first touched, nor under a wrapper around the model; and a pass that an interrupt cut off is
simply no longer there. While a change waits, a hook on torch's side makes passes that begin now wait for it.

Nothing is kept in a model: it can be copied, compiled and pickled. A compiled forward passes the hook by; it reads all
of its variants when it begins.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_pre_hooks, register_module_forward_pre_hook

from qnb.model import stack

_PASSES = {"generate", "forward", "_call_impl", "_wrapped_call_impl"}
# Waiting is polling: a thread that was interrupted or has died can then keep nobody waiting.
_POLL_S = 0.002

# Entered only by `with`, which no interrupt can split from its block (`threading.Condition` is not so).
_lock = threading.RLock()


class _Part:
    """What a change or a measurement concerns: the modules of a model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._inside: set[int] = set()
        waiting = [model]
        while waiting:  # `model.modules()` takes six times as long: a generator inside a generator for each level
            module = waiting.pop()
            if id(module) not in self._inside:
                self._inside.add(id(module))
                waiting += [m for m in module._modules.values() if m is not None]

    def holds(self, module: object) -> bool:
        """Whether the module lies inside the model."""
        return id(module) in self._inside

    def concerns(self, module: object) -> bool:
        """Whether the module lies inside the model or contains it."""
        return self.holds(module) or (isinstance(module, nn.Module) and any(m is self._model for m in module.modules()))

    def outermost(self, frames: Sequence[FrameType]) -> FrameType | None:
        """The outermost of a stack's frames that runs a pass of the model."""
        passes = (frame for frame in reversed(frames) if frame.f_code.co_name in _PASSES)
        return next((frame for frame in passes if self.concerns(stack.first_argument(frame))), None)

    def held_by(self, thread: int) -> bool:
        """Whether a measurement in that thread holds the model."""
        return any(t == thread and self.concerns(model) for t, model in _held)


class _Change(_Part):
    def __init__(self, model: nn.Module, part: _Part | None = None) -> None:
        if part is None:
            super().__init__(model)
        else:
            self._model, self._inside = model, part._inside
        self.maker = threading.get_ident()
        self._frame: FrameType | None = sys._getframe(1)
        # Passes that were under way when the change was announced; None until that is known. Frames, not their
        # addresses, which later passes may get; let go when the change is over.
        self.admitted: list[FrameType] | None = None

    def under_way(self) -> bool:
        """Whether its maker still works on it; an interrupt at the very end can leave a change behind in the list."""
        if self.maker == threading.get_ident():
            frames = stack.frames(sys._getframe(1))
        else:
            frames = stack.others().get(self.maker, [])
        return any(frame is self._frame for frame in frames)

    def look_around(self) -> None:
        """Admits every pass that is under way."""
        passes = map(self.outermost, stack.others().values())
        self.admitted = [frame for frame in passes if frame is not None]

    def forget(self) -> None:
        """Lets go of all frames: with their locals they would keep models alive."""
        self._frame, self.admitted = None, []

    def admits(self, thread: int, frames: Sequence[FrameType]) -> bool:
        """Whether the pass that these frames are in began before the change was announced, or is held by its thread."""
        return any(frame is known for known in self.admitted or () for frame in frames) or self.held_by(thread)

    def someone_inside(self) -> bool:
        """Whether any other thread is in a pass of the model, or holds it."""
        for thread, frames in stack.others().items():
            waits = _at_the_door.get(thread) is self
            if self.held_by(thread) or (not waits and self.outermost(frames) is not None):
                return True
        return False


_changes: list[_Change] = []
_held: list[tuple[int, nn.Module]] = []  # thread, model
_at_the_door: dict[int, _Change] = {}  # thread that waits before it enters -> the change it waits for


@contextlib.contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """Counts as one pass through `model`, however many are made inside: no other thread's change lands meanwhile."""
    mine = threading.get_ident(), model
    # The frames in no variable of this generator, which one of them holds: only the garbage collector would free them.
    while any(
        c.concerns(model) and c.under_way() and not c.admits(mine[0], stack.frames(sys._getframe())) for c in _changes
    ):
        time.sleep(_POLL_S)
    try:
        _held.append(mine)
        yield
    finally:
        with contextlib.suppress(ValueError):
            _held.remove(mine)


def when_empty(model: nn.Module, change: Callable[[], None]) -> bool:
    """Makes `change` when no pass through `model` is under way; a new pass waits for it. True if it has been made.

    Another thread's pass is waited for. Inside a pass of this very thread (a streamer, a hook) waiting would never end:
    the change is then made as soon as that pass is over, and False comes back at once.
    """
    part, announced = _Part(model), threading.Event()
    if part.outermost(stack.frames(sys._getframe(1))) is None and not part.held_by(threading.get_ident()):
        _make(model, part, change, announced)
        return True
    threading.Thread(target=_make, args=(model, part, change, announced), name="qnb change").start()
    announced.wait()  # so that this thread's next pass already waits
    return False


def _make(model: nn.Module, part: _Part, change: Callable[[], None], announced: threading.Event) -> None:
    mine = _Change(model, part)
    try:
        with _lock:
            _changes.append(mine)
            register_module_forward_pre_hook(_door)
        mine.look_around()
        announced.set()
        while True:
            with _lock:  # one change at a time
                if not mine.someone_inside():
                    change()
                    return
            time.sleep(_POLL_S)
    finally:
        _forget(mine)


def _forget(change: _Change) -> None:
    with contextlib.suppress(ValueError):
        _changes.remove(change)
    change.forget()
    _close_door()


def _close_door() -> None:
    """Takes the hooks away if no change is waiting. By value: an interrupt may have lost a handle."""
    with _lock:
        if not _changes:
            for key in [k for k, hook in _global_forward_pre_hooks.items() if hook is _door]:
                del _global_forward_pre_hooks[key]


def _door(module: nn.Module, args: tuple) -> None:
    if torch.compiler.is_compiling():
        return
    if not _changes:
        _close_door()
        return
    thread, frames = threading.get_ident(), stack.frames(sys._getframe(1))
    for change in list(_changes):
        if change.maker == thread or not change.holds(module):
            continue
        try:
            while change in _changes and not change.admits(thread, frames):
                if not change.under_way():
                    _forget(change)
                elif change.admitted is not None:  # else this thread may be in the middle of a pass
                    _at_the_door[thread] = change
                time.sleep(_POLL_S)
        finally:
            _at_the_door.pop(thread, None)
