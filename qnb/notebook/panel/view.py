"""`Panel`: the controls on one model. What is done with the mouse has a method of the same name."""

from __future__ import annotations

import contextlib
import functools
import threading
import uuid
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import traitlets
from IPython import get_ipython
from IPython.display import display

from qnb import rounding as roundings
from qnb import schemes
from qnb.errors import QnbError
from qnb.model.select import choose, sites_in_place
from qnb.notebook.panel import html, recipe
from qnb.notebook.panel.auto import KINDS, budget_of
from qnb.notebook.panel.colours import Face, by_scheme, by_value
from qnb.notebook.panel.session import Session
from qnb.notebook.panel.stages import COLOURS
from qnb.notebook.panel.step import Step
from qnb.results import format_bytes, one_line

_HERE = Path(__file__).parent
_STYLE = (_HERE / "panel.css").read_text("utf-8")
_MIXED = ""


class LayerMap(anywidget.AnyWidget):
    """Cells of layers on a grid; `selected` are the numbers of layers, in the order of the model."""

    _esm = (_HERE / "map.js").read_text("utf-8")
    places = traitlets.Dict().tag(sync=True)
    faces = traitlets.List().tag(sync=True)
    selected = traitlets.List(traitlets.Int()).tag(sync=True)
    record = traitlets.Unicode().tag(sync=True)


class Steps(anywidget.AnyWidget):
    """The steps as a list and as a plot; a click sends `{"go": number}`."""

    _esm = (_HERE / "history.js").read_text("utf-8")
    history = traitlets.Dict().tag(sync=True)
    code = traitlets.Unicode().tag(sync=True)


def _shows_errors(callback: Callable) -> Callable:
    """A callback whose exceptions appear in the panel: widgets would swallow them."""

    @functools.wraps(callback)
    def guarded(self: Panel, *args: Any) -> None:
        self._error = None
        try:
            callback(self, *args)
        except Exception as problem:
            if isinstance(problem, QnbError):
                self._error = str(problem)
            else:
                self.session.board.say(problem)
        self.show()

    return guarded


class Panel:
    """The live panel of a model: displaying it shows its controls, and each control has a method here.

    Methods that change the model return at once; `settle()` waits until all is measured. Closing a panel leaves the
    model as it is.
    """

    def __init__(self, session: Session, variable: str) -> None:
        self.session = session
        self._variable = variable
        self._key = f"qnb-{uuid.uuid4().hex[:12]}"
        self._lock = threading.RLock()
        self._error: str | None = None
        self._mode = "scheme"
        self._shown_at_once: dict[str, Any] = {}
        self._filling: int | None = None  # the thread that gives a dropdown new options, which moves its value
        self._displayed = self._closed = False
        self._last_record = ""
        self._build()
        session.board.listen(self)
        _after_each_cell(session)
        self.show()

    # What the controls do, by name

    def set(self, layers: str | Iterable[str], scheme: str, rounding: str = "nearest") -> None:
        """Changes the model: these layers, by names or globs, run in the scheme; `"none"` is the original."""
        sites = sites_in_place(self.session.model())
        chosen = choose(sites, layers, None)
        self.session.ask([s.name for i, s in enumerate(sites) if chosen[i] is None], scheme, rounding)

    def undo(self) -> None:
        """Changes the model back to the step before."""
        self.session.undo()

    def redo(self) -> None:
        """Changes the model to the step that was undone."""
        self.session.redo()

    def go(self, step: int) -> None:
        """Changes the model to a step that was tried; 0 is the original."""
        self.session.go(step)

    def auto(
        self,
        *,
        max_kl: float | None = None,
        max_perplexity_increase: float | None = None,
        max_megabytes: float | None = None,
        min_speedup: float | None = None,
        rounding: str = "nearest",
    ) -> None:
        """Changes the model to the recipe that `qnb.search` finds under one budget, on the texts of the panel.

        Any newer change, or `stop()`, ends the search. Raises BadInput where not one budget is given; what the search
        itself raises, a budget that nothing keeps among it, is shown in the panel.
        """
        given = {
            "max_kl": max_kl,
            "max_perplexity_increase": max_perplexity_increase,
            "max_megabytes": max_megabytes,
            "min_speedup": min_speedup,
        }
        self.session.auto(budget_of(given, rounding))

    def stop(self) -> None:
        """Gives up a search; the model stays what it was before."""
        self.session.stop()

    def settle(self, timeout_s: float | None = None) -> None:
        """Waits until everything is measured.

        Raises QnbError for what went wrong meanwhile, and where it takes longer than `timeout_s`.
        """
        done = self.session.settle(timeout_s)
        self.show(record=True)
        if self.session.board.message is not None:
            raise _Failed(self.session.board.message.words)
        if not done:
            raise _NotSettled(f"not everything was measured within {timeout_s:g} s: {self.session.board.status}")

    @property
    def steps(self) -> tuple[Step, ...]:
        """Every step that was tried; the first is the original."""
        return tuple(self.session.trail.steps)

    @property
    def selected(self) -> list[str]:
        """Names of the selected layers."""
        return [self.session.names[i] for i in self.map.selected if 0 <= i < len(self.session.names)]

    @selected.setter
    def selected(self, names: Iterable[str]) -> None:
        numbers = {name: i for i, name in enumerate(self.session.names)}
        self.map.selected = sorted(numbers[name] for name in names)

    def recipe(self) -> dict[str, tuple[str, str]]:
        """The quantized layers now: name -> (scheme, rounding)."""
        return dict(self.session.present.layers)

    def code(self) -> str:
        """The `%quantize` lines that make the original model what it is now."""
        return self.session.code(self._variable)

    def save(self, path: str | Path) -> Path:
        """Writes the recipe, as `qnb.Recipe.load` and `%quantize --recipe` read it, and returns where."""
        return recipe.save(self.session.model(), path)

    def close(self) -> None:
        """Takes the controls off the page; the record of the last state stays."""
        self._closed = True
        self.session.board.ignore(self)
        self._update_record(force=True)
        self.widget.close()
        for widget in (self.map, self._history, *self._controls):
            widget.close()

    # Widgets

    def _build(self) -> None:
        session = self.session
        grid = session.grid
        cells = [[p.name, p.row, p.column, p.alone] for p in grid.places]
        layout = {"rows": list(grid.rows), "columns": list(grid.columns), "cells": cells}
        self.map = LayerMap(places=layout, record=self._key)
        self._colour = ipywidgets.ToggleButtons(
            options=COLOURS, value="scheme", tooltips=[f"colour by {c}" for c in COLOURS]
        )
        self._colour.add_class("qnb-switch")
        self._legend, self._head, self._message = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self._figures, self._words, self._layer = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
        self._selection = ipywidgets.HTML()
        names = [("–", _MIXED), *((n if n != "none" else "none (original)", n) for n in schemes.names())]
        self._scheme = ipywidgets.Dropdown(options=names, value=_MIXED, description="scheme")
        self._rounding = ipywidgets.Dropdown(options=roundings.names(), value="nearest", description="rounding")
        self._undo = ipywidgets.Button(description="Undo", icon="undo", tooltip="back to the step before")
        self._redo = ipywidgets.Button(description="Redo", icon="repeat", tooltip="forward to the step that was undone")
        self._first = ipywidgets.Button(description="Original", icon="home", tooltip="to the original model")
        self._budget = ipywidgets.Dropdown(
            options=[(kind.label, keyword) for keyword, kind in KINDS.items()], description="budget"
        )
        self._limit = ipywidgets.FloatText(value=self._usual_limit())
        self._auto = ipywidgets.Button(
            description="Auto", icon="magic", tooltip="search the recipe that keeps the budget, and go there"
        )
        self._stop = ipywidgets.Button(description="Stop", icon="stop", tooltip="give up the search", disabled=True)
        self._found = ipywidgets.HTML()
        self._prompt = ipywidgets.Textarea(
            placeholder="a prompt of your own", description="prompt", continuous_update=False, rows=2
        )
        self._history = Steps()
        self._file = ipywidgets.Text(value="recipe.json", description="file")
        self._save = ipywidgets.Button(description="Save recipe", icon="save", tooltip="write the present step as JSON")
        self._saved = ipywidgets.HTML()
        self._controls = [
            self._colour, self._legend, self._head, self._message, self._figures, self._words, self._layer,
            self._selection, self._scheme, self._rounding, self._undo, self._redo, self._first, self._prompt,
            self._budget, self._limit, self._auto, self._stop, self._found, self._file, self._save, self._saved,
        ]  # fmt: skip
        row = _box("qnb-controls", self._selection, self._scheme, self._rounding, self._undo, self._redo, self._first)
        search = _box("qnb-controls qnb-budget", self._budget, self._limit, self._auto, self._stop, self._found)
        left = _column("qnb-left", self._colour, self.map, self._legend)
        right = _column("qnb-right", self._figures)
        saving = _box("qnb-controls", self._file, self._save, self._saved)
        tabs = ipywidgets.Tab(
            [
                _column("qnb-tab", self._prompt, self._words),
                _column("qnb-tab", self._layer),
                _column("qnb-tab", self._history, saving),
            ],
            titles=("Words", "Layer", "History"),
        )
        tabs.add_class("qnb-tabs")
        style = ipywidgets.HTML(f"<style>{_STYLE}</style>")
        style.layout.display = "none"
        main = _box("qnb-main", left, right)
        self.widget = _column("qnb-panel", style, self._head, main, row, search, self._message, tabs)
        self._tabs = tabs
        self._observe(self.map, Panel._on_selected, "selected")
        self._observe(self._scheme, Panel._on_scheme, "value")
        self._observe(self._rounding, Panel._on_rounding, "value")
        self._observe(self._colour, Panel._on_colour, "value")
        self._observe(self._prompt, Panel._on_prompt, "value")
        self._observe(self._budget, Panel._on_budget, "value")
        self._auto.on_click(lambda _: self._on_auto())
        self._stop.on_click(lambda _: self._on_stop())
        self._undo.on_click(lambda _: self._on_undo())
        self._redo.on_click(lambda _: self._on_redo())
        self._first.on_click(lambda _: self._on_first())
        self._save.on_click(lambda _: self._on_save())
        self._history.on_msg(lambda _, content, buffers: self._on_step(content))

    def _observe(self, widget: Any, method: Callable, name: str) -> None:
        widget.observe(lambda change: method(self, change["new"]), name)

    @_shows_errors
    def _on_selected(self, selected: list[int]) -> None:
        self.session.look_at(self._looked_at())

    def _on_scheme(self, scheme: str) -> None:
        if not self._set_by_the_panel("scheme", scheme):
            self._choose_scheme(scheme)

    def _on_rounding(self, rounding: str) -> None:
        if not self._set_by_the_panel("rounding", rounding):
            self._choose_rounding(rounding)

    def _set_by_the_panel(self, name: str, value: str) -> bool:
        return value == self._shown_at_once.get(name) or self._filling == threading.get_ident()

    @_shows_errors
    def _choose_scheme(self, scheme: str) -> None:
        if scheme != _MIXED:
            self._ask(scheme, self._rounding.value)

    @_shows_errors
    def _choose_rounding(self, rounding: str) -> None:
        scheme = self._common(0)
        if scheme not in (None, "none"):
            self._ask(scheme, rounding)
        else:
            self._shown_at_once["rounding"] = rounding  # for the next scheme that is chosen

    def _ask(self, scheme: str, rounding: str) -> None:
        try:
            self.session.ask(self.selected, scheme, rounding)
        except Exception:
            self._shown_at_once.pop("scheme", None)  # the control goes back to what is true
            self._shown_at_once.pop("rounding", None)
            raise

    @_shows_errors
    def _on_colour(self, mode: str) -> None:
        self._mode = mode
        self.session.colour(mode)

    @_shows_errors
    def _on_prompt(self, prompt: str) -> None:
        self.session.set_prompt(prompt)

    @_shows_errors
    def _on_budget(self, keyword: str) -> None:
        self._limit.value = self._usual_limit()

    def _usual_limit(self) -> float:
        return KINDS[self._budget.value].usual(self.session.original.weight_bytes)

    @_shows_errors
    def _on_auto(self) -> None:
        self.auto(**{self._budget.value: self._limit.value}, rounding=self._rounding.value)

    @_shows_errors
    def _on_stop(self) -> None:
        self.stop()

    @_shows_errors
    def _on_undo(self) -> None:
        self.undo()

    @_shows_errors
    def _on_redo(self) -> None:
        self.redo()

    @_shows_errors
    def _on_first(self) -> None:
        self.go(0)

    @_shows_errors
    def _on_save(self) -> None:
        self._saved.value = ""
        self._saved.value = f"<span class='qnb-quiet'>written to {html.escape(str(self.save(self._file.value)))}</span>"

    @_shows_errors
    def _on_step(self, content: Any) -> None:
        number = content.get("go") if isinstance(content, dict) else None
        self.go(number)

    # Showing

    def show(self, record: bool = False) -> None:
        """Brings everything that is shown up to date. Called by the session from any thread."""
        if self._closed:
            return
        with self._lock:
            try:
                self._show()
            except Exception as problem:  # of a page that went away, or a fault: the thread that measures goes on
                self._put(self._message, "value", html.message(self.session, f"{type(problem).__name__}: {problem}"))
            self._update_record(force=record)

    def _show(self) -> None:
        session = self.session
        faces = self._faces()
        self._put(self.map, "faces", [[f.words, f.paper, f.ink, f.title] for f in faces])
        self._put(self._legend, "value", html.legend(faces, self._mode, session))
        self._put(self._message, "value", html.message(session, self._error))
        self._put(self._selection, "value", self._selection_html())
        self._show_choice()
        self._put(self._undo, "disabled", not session.trail.can_undo)
        self._put(self._redo, "disabled", not session.trail.can_redo)
        self._put(self._first, "disabled", session.present is session.original)
        self._put(self._auto, "disabled", session.searching)
        self._put(self._stop, "disabled", not session.searching)
        self._put(self._found, "value", html.search(session))
        self._put(self._figures, "value", html.figures(session))
        self._put(self._words, "value", html.words(session))
        self._put(self._layer, "value", html.layer(session, self._looked_at()))
        self._put(self._history, "history", self._history_data())
        self._put(self._history, "code", self.code())
        # Last: a page whose heading names a step, or says that it is settled, shows that step's figures already.
        self._put(self._head, "value", html.header(session))

    def _show_choice(self) -> None:
        """The dropdowns say what the selected layers are; where they differ, or a change was refused, they go back."""
        if self.session.changing and not self.session.searching:
            return
        scheme = self._common(0)
        self._choose(self._scheme, "scheme", _MIXED if scheme is None else scheme)
        if scheme not in (None, "none"):
            self._choose(self._rounding, "rounding", self._common(1) or self._rounding.value)
        self._put(self._scheme, "disabled", not self.map.selected)

    def _choose(self, dropdown: Any, name: str, value: str) -> None:
        self._shown_at_once[name] = value
        if dropdown.value == value:
            return
        if value not in [known for _, known in dropdown._options_full]:  # a cell can use what is not among the usual
            self._filling = threading.get_ident()
            try:
                dropdown.options = (*dropdown.options, (value, value) if name == "scheme" else value)
            finally:
                self._filling = None
        dropdown.value = value

    @staticmethod
    def _put(widget: Any, name: str, value: Any) -> None:
        if getattr(widget, name) != value:
            setattr(widget, name, value)

    def _faces(self) -> list[Face]:
        session = self.session
        if self._mode == "scheme":
            return by_scheme(session.rows, session.refused)
        if self._mode == "bytes":
            return by_value(session.rows, {row.name: row.bytes_after for row in session.rows}, "bytes")
        return by_value(session.rows, session.stages.colour_values.get(self._mode, {}), self._mode)

    def _selection_html(self) -> str:
        names = self.selected
        what = "nothing selected" if not names else names[0] if len(names) == 1 else f"{len(names)} layers"
        return f'<span class="qnb-selection" title="{html.escape(what)}">{html.escape(one_line(what, 60))}</span>'

    def _common(self, which: int) -> str | None:
        """Scheme (0) or rounding (1) that all selected layers share; None where they differ or none is selected."""
        rows = [self.session.rows[i] for i in self.map.selected if i < len(self.session.rows)]
        found = {(row.scheme, row.rounding or "nearest")[which] for row in rows}
        return found.pop() if len(found) == 1 else None

    def _looked_at(self) -> str | None:
        return self.selected[-1] if self.map.selected else None

    def _history_data(self) -> dict[str, Any]:
        session, error = self.session, html.error_field(self.session)
        steps = []
        for step in session.trail.steps:
            y = html.value_of(step, error)
            size = "" if step.weight_bytes is None else format_bytes(step.weight_bytes)
            words = f"{size}, {'–' if y is None else html.shown(error, y)}"
            x = None if step.weight_bytes is None else step.weight_bytes / 1e6
            steps.append({"number": step.number, "words": step.words, "x": x, "y": y, "shown": words})
        name = "KL to the original (nats/token)" if error == "kl" else "relative error"
        return {"steps": steps, "at": session.present.number, "error": name, "size": "weights held (MB)"}

    # The page

    def _ipython_display_(self) -> None:
        shell = get_ipython()
        if shell is None or not hasattr(shell, "kernel"):
            print(html.record_text(self.session))
            return
        display(self.widget)
        self._displayed = True
        self._last_record = html.record(self.session, self._key)
        display(self._record_bundle(), raw=True, display_id=self._key)

    def _update_record(self, force: bool) -> None:
        """The record follows every change that lands and every measurement that ends, not each text of it."""
        if not self._displayed or not (force or not self.session.busy or self.session.landed != self._recorded):
            return
        self._recorded = self.session.landed
        content = html.record(self.session, self._key)
        if content != self._last_record:
            self._last_record = content
            with contextlib.suppress(RuntimeError):  # a kernel that shuts down
                display(self._record_bundle(), raw=True, display_id=self._key, update=True)

    def _record_bundle(self) -> dict[str, str]:
        return {"text/html": self._last_record, "text/plain": html.record_text(self.session)}

    _recorded = -1


class _Failed(QnbError, RuntimeError):
    """Something went wrong while a panel changed or measured its model."""


class _NotSettled(QnbError, TimeoutError):
    """A panel was still measuring."""


def _box(name: str, *children: Any) -> ipywidgets.Box:
    return _named(ipywidgets.HBox(children), name)


def _column(name: str, *children: Any) -> ipywidgets.Box:
    return _named(ipywidgets.VBox(children), name)


def _named(box: ipywidgets.Box, name: str) -> ipywidgets.Box:
    for one in name.split():
        box.add_class(one)
    return box


def _after_each_cell(session: Session) -> None:
    """Lets the session see, when a cell has run, what it did to the model."""
    shell = get_ipython()
    if shell is None:
        return
    known = weakref.ref(session)

    def look(*_: Any) -> None:
        alive = known()
        if alive is None:
            shell.events.unregister("post_run_cell", look)
        else:
            alive.look_around()

    shell.events.register("post_run_cell", look)
