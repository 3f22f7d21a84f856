"""What all panels on one model share: the steps tried, what was measured of each, and the thread that measures.

Whoever asks for a change gets the answer later: the thread lets it land, then measures from cheap to dear. A newer
request stops a measurement at the next block of the model. The model is held weakly: a panel keeps none alive.
"""

from __future__ import annotations

import atexit
import dataclasses
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from qnb import rounding as roundings
from qnb import schemes
from qnb.errors import BadInput, LayerRefused, QnbError
from qnb.measure.comparison import Comparison
from qnb.model.linear import held_storages, quantized_layers
from qnb.model.quantize import Report, Row, layers
from qnb.model.select import sites_in_place
from qnb.model.subject import check_model
from qnb.notebook.panel import auto
from qnb.notebook.panel.board import Board
from qnb.notebook.panel.grid import Grid, grid_of
from qnb.notebook.panel.recipe import Layers, apply, code, in_words, layers_of
from qnb.notebook.panel.stages import COLOURS, Asked, Stages
from qnb.notebook.panel.step import Step
from qnb.notebook.panel.trail import Trail
from qnb.notebook.panel.worker import Superseded, Worker
from qnb.results import one_line
from qnb.schemes import How

GONE = "the model is gone: nothing but this panel knew it any more; make it anew and open a new panel on it"
_BUSY_AFTER_S = 0.3
_SHOWN_EVERY_S = 0.1  # of a search
_COMPARED = ("progress", "speed", "metric", "why_no_metric", "weight_bytes")


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """A change that was asked for. With a budget, what to become is searched, once the layers are these.

    `names` are the layers that were meant; None means all, so that the others go back to their originals.
    """

    layers: Layers
    words: str
    budget: auto.Budget | None = None
    names: frozenset[str] | None = None

    def beside(self, actual: Layers) -> Layers:
        """What the layers are to be in a model that is `actual` now: a cell may have changed others meanwhile."""
        if self.names is None:
            return self.layers
        others = {name: how for name, how in actual.items() if name not in self.names}
        return others | {name: how for name, how in self.layers.items() if name in self.names}


class Session:
    """The shared state of the panels on one model. Methods that change something return at once."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._worker = Worker(self._turn, self._failed, self._show)
        self._lock = self._worker.lock
        self._wanted: _Wanted | None = None
        self._compared: tuple[tuple, Any] = ((), None)
        self.landed = 0  # how many changes have
        sites = sites_in_place(model)
        self.names = [site.name for site in sites]
        self.globbed = [site.name for site in sites if site.kept is None]  # what a glob may mean
        self.refused = {site.name: site.refused for site in sites if site.refused}
        self.grid: Grid = grid_of(self.names)
        self.title = type(model).__name__
        report = layers(model)
        self.rows: Sequence[Row] = self._rows(report)
        self.board = Board()
        self.trail = Trail(layers_of(report))
        self.trail.original.weight_bytes, self.trail.original.original_bytes = _bytes_of_the_original(model), 0
        self.present.weight_bytes, self.present.original_bytes = held_storages(model)
        self.stages = Stages(self.trail, self.board, self.names, self.globbed, self.refused)

    def _rows(self, report: Report) -> list[Row]:
        """Those of the layers on the map: neither experts of a mixture nor embeddings are."""
        shown = set(self.names)
        return [row for row in report.rows if row.name in shown]

    def use(self, asked: Asked) -> None:
        """Measures on these from now on; everything measured on others is dropped. Raises BadInput for bad ones."""
        with self._lock:
            self.stages.use(self.model(), asked)
            if self.searching:  # on what it was to be measured on
                self._wanted = None
            self._worker.request()

    # What a panel shows

    def model(self) -> nn.Module:
        """The model; raises QnbError where it is gone."""
        model = self._model()
        if model is None:
            raise _Gone(GONE)
        return model

    @property
    def present(self) -> Step:
        """The step that the model is in."""
        return self.trail.present

    @property
    def original(self) -> Step:
        """The original model, measured or not."""
        return self.trail.original

    @property
    def changing(self) -> bool:
        """Whether a change was asked for that has not landed."""
        return self._wanted is not None

    @property
    def searching(self) -> bool:
        """Whether that change is still being searched."""
        wanted = self._wanted
        return wanted is not None and wanted.budget is not None

    @property
    def busy(self) -> bool:
        """Whether anything is being changed or measured."""
        return self._worker.busy

    @property
    def closed(self) -> bool:
        """Whether nothing is measured any more."""
        return self._worker.closed

    def comparison(self) -> Comparison:
        """The present step against the original, accuracy over the same texts in both.

        Kept until one of them is measured further: intervals take long.
        """
        first, now = self.original, self.present
        made_of = (now, *(getattr(s, f) for s in (first, now) for f in _COMPARED))
        known, found = self._compared
        if len(known) != len(made_of) or any(a is not b for a, b in zip(known, made_of, strict=True)):
            texts = now.progress.texts if now.progress else 0
            found = now.profile().against(first.profile(self.stages.evaluation.baseline(texts)))
            self._compared = made_of, found
        return found

    def code(self, model: str) -> str:
        """The magics that repeat the present step."""
        return code(self.present.layers, self.globbed, model)

    # What a panel asks for

    def ask(self, names: Sequence[str], scheme: str, rounding: str) -> None:
        """Lets these layers run in the scheme; raises at once what can be told at once."""
        self.model()
        found = schemes.find(scheme)
        roundings.find(How.read(rounding).rounding, found)
        unknown = [name for name in names if name not in set(self.names)]
        if unknown or not names:
            what = f"no layer is called {one_line(unknown[0], 80)!r}" if unknown else "no layer is selected"
            raise BadInput(f"{what}: select layers on the map, or name them as qnb.layers(model) does")
        if found.grid is not None:
            for name in names:
                if name in self.refused:
                    raise LayerRefused(f"layer {name} cannot be quantized: {self.refused[name]}")
        with self._lock:
            before = self._wanted
            target = dict(before.layers if before else self.present.layers)
            for name in names:
                if found.grid is None:
                    target.pop(name, None)
                else:
                    target[name] = (found.name, rounding)
            meant = None if before and before.names is None else frozenset(names).union(before.names if before else ())
            words = f"{found.name if found.grid else 'original'}: {in_words(names, self.globbed)}"
            self._want(target, words, names=meant)

    def become(self, wanted: Layers, words: str) -> None:
        """Lets the model run these layers quantized and no others."""
        self.model()
        self._want(dict(wanted), words)

    def auto(self, budget: auto.Budget) -> None:
        """Searches the recipe that keeps the budget, and becomes it; a newer change, or `stop`, ends the search."""
        self.model()
        with self._lock:
            self.board.message = self.board.found = None
            before = self._wanted or self.present  # a change that has not landed does so first
            self._want(before.layers, before.words, budget)

    def stop(self) -> None:
        """Gives up a search; the model stays what it was before."""
        with self._lock:
            if self.searching:
                self._wanted, self.board.found = None, "stopped"
                self._worker.request()

    def undo(self) -> None:
        """Back to the step before."""
        self._move(-1)

    def redo(self) -> None:
        """Forward to the step that was undone."""
        self._move(1)

    def go(self, number: int) -> None:
        """To any step that was tried."""
        step = self.trail.find(number)
        self.become(step.layers, step.words)

    def look_at(self, name: str | None) -> None:
        """Looks into the layer, now and after each change."""
        if name != self.stages.look_at:
            self.stages.look_at = name
            if name is not None:
                self._worker.request()

    def colour(self, mode: str) -> None:
        """Computes what colouring the map by `mode` takes."""
        if mode not in COLOURS:
            raise BadInput(f"colour {mode!r} is unknown: use one of {', '.join(COLOURS)}")
        if mode not in ("scheme", "bytes"):
            self.stages.colours_asked.add(mode)
            self._worker.request()

    def set_prompt(self, prompt: str) -> None:
        """Continues another prompt from now on; raises BadInput for one that cannot be continued."""
        with self._lock:
            self.stages.continue_from(self.model(), prompt)
            self._worker.request()

    def look_around(self) -> None:
        """Takes in what others than the panel have done to the model; to be called after each cell."""
        model = self._model()
        if model is None:
            self._failed(_Gone(GONE))
        elif layers_of(layers(model)) != dict(self.present.layers):
            self._worker.request()

    def settle(self, timeout_s: float | None = None) -> bool:
        """Waits until all is measured; returns whether it is."""
        return self._worker.settle(timeout_s)

    def close(self) -> None:
        """Stops measuring."""
        self._worker.close()

    # In the thread

    def _want(
        self,
        target: Layers,
        words: str,
        budget: auto.Budget | None = None,
        names: frozenset[str] | None = None,
    ) -> None:
        with self._lock:
            self._wanted = _Wanted(target, words, budget, names)
            self._worker.request()

    def _move(self, by: int) -> None:
        self.model()
        with self._lock:
            step = self.trail.beside(by)
            self._want(dict(step.layers), step.words)

    def _turn(self, check: Callable[[], None]) -> None:
        """Lets a change land, then measures what is not known yet of the present step."""
        model = self.model()
        self._land(model)
        check()
        self.stages.run(model, self.present, check)

    def _land(self, model: nn.Module) -> None:
        wanted = self._wanted
        actual = layers_of(layers(model))
        if wanted is None:
            self._arrive(model, actual, "changed outside the panel")
            return
        words = wanted.words
        try:
            self._apply(model, actual, wanted.beside(actual))
            self.board.message = None
            if wanted.budget is not None:
                self._arrive(model, wanted.layers, wanted.words)
                found, words = self._search(model, wanted), wanted.budget.words
                if self._wanted is not wanted:  # stopped, or something newer is wanted
                    raise Superseded
                self._apply(model, wanted.layers, found)
        except Superseded:
            raise
        except Exception as problem:
            self._no_longer(wanted)
            self.board.say(problem)
            return
        self._no_longer(wanted)
        self._arrive(model, layers_of(layers(model)), words)

    def _apply(self, model: nn.Module, before: Layers, after: Layers) -> None:
        self.board.status = "changing"
        waiting = threading.Timer(_BUSY_AFTER_S, self._say_waiting)
        waiting.daemon = True
        waiting.start()
        try:
            apply(model, before, after, self.globbed, self.stages.data)
        finally:
            waiting.cancel()

    def _search(self, model: nn.Module, wanted: _Wanted) -> Layers:
        """The layers that keep the budget wanted. Looking into a layer, or colours, wait for it; changes end it."""
        shown = 0.0

        def tell(stage: str) -> None:
            nonlocal shown
            if self._wanted is not wanted or self.closed:
                raise Superseded
            if time.monotonic() - shown > _SHOWN_EVERY_S:
                shown = time.monotonic()
                self.board.status = f"{wanted.budget.words}: {stage}"
                self._show()

        samples = self.stages.evaluation.samples
        found, self.board.found = auto.find_recipe(model, wanted.budget, samples, self.stages.data, tell)
        return found

    def _no_longer(self, wanted: _Wanted) -> None:
        with self._lock:
            if self._wanted is wanted:
                self._wanted = None

    def _arrive(self, model: nn.Module, found: Layers, words: str) -> None:
        """Makes the step of these layers the present one: a known step, or a new one."""
        with self._lock:
            self.rows = self._rows(layers(model))
            if self.trail.reach(found, words):
                self.stages.evaluation.moved()
            self.present.weight_bytes, self.present.original_bytes = held_storages(model)
            self.stages.looked_at = None
            self.landed += 1
            self.board.status = "measuring"
        self._show()

    def _say_waiting(self) -> None:
        self.board.status = "waiting: the model is in use by another cell; the change lands when that ends"
        self._show()

    def _failed(self, problem: BaseException) -> None:
        self.board.status = "the model is gone" if isinstance(problem, _Gone) else "stopped"
        self.board.say(problem)

    def _show(self) -> None:
        self.board.show()


class _Gone(QnbError, ReferenceError):
    """The model under a panel was collected."""


def _bytes_of_the_original(model: nn.Module) -> int | None:
    """What the model would hold with its originals in place of its variants; None where one was not kept."""
    quantized = quantized_layers(model).values()
    if any(layer.original is None for layer in quantized):
        return None
    held, originals = held_storages(model)
    variants = {id(layer.variant): layer.variant.nbytes for layer in quantized}
    return held - sum(variants.values()) + originals


def session_of(model: nn.Module) -> Session:
    """The session of a model, shared by all its panels."""
    model = check_model(model)
    # A wrapper of torch.compile is looked through: its inside is measured uncompiled, else each change would compile.
    model = getattr(model, "_orig_mod", model)
    found = _sessions.get(model)
    if found is not None and not found.closed and found.names == [s.name for s in sites_in_place(model)]:
        return found
    _sessions[model] = made = Session(model)
    return made


_sessions: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()


@atexit.register
def _stop_all() -> None:
    # A thread in the middle of torch's code while the interpreter goes away would end in a crash.
    for session in list(_sessions.values()):
        session.close()
