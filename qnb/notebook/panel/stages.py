"""`Stages`: how the figures of a step come about, from cheap to dear, each one only where it is not known yet."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable

from torch import nn

from qnb import schemes
from qnb.errors import BadInput
from qnb.measure.token import alone
from qnb.model.defaults import remembered
from qnb.model.inputs import samples_of
from qnb.model.linear import original_pass, quantized_layers
from qnb.model.quantize import layers
from qnb.model.subject import measuring_state
from qnb.notebook.panel import continuation, look, speed
from qnb.notebook.panel.board import Board, Message
from qnb.notebook.panel.evaluation import Evaluation, sample_of
from qnb.notebook.panel.recipe import layers_of
from qnb.notebook.panel.step import Step
from qnb.notebook.panel.trail import Trail
from qnb.notebook.panel.worker import Superseded
from qnb.results import one_line

COLOURS = ("scheme", "sensitivity", "error", "bytes", "time")


@dataclasses.dataclass(frozen=True)
class Asked:
    """What to measure on, as `qnb.panel` is given it."""

    tokenizer: object
    texts: Iterable | None
    tokens: int
    prompt: str | None
    new_tokens: int
    metric: Callable[[nn.Module], float] | None


class Stages:
    """What figures are measured on, and the look into a layer and the colours that were asked for.

    Nothing can be measured before the first `use`.
    """

    def __init__(self, trail: Trail, board: Board, names: list[str], globbed: list[str], refused: dict) -> None:
        self._trail, self._board = trail, board
        self._names = names
        self._sensitive = [name for name in names if name in set(globbed) - set(refused)]
        self.data: dict[str, object] = {}  # the keywords for roundings that need calibration
        self.sizes: tuple[int, int] | None = None  # tokens measured on and written
        self.why_no_words: str | None = None
        self.look_at: str | None = None  # the layer to be looked into
        self.looked_at: look.Look | None = None
        self.colours_asked: set[str] = set()
        self.colour_values: dict[str, dict[str, float | None]] = {}
        self.sensitivity_scheme = _first_scheme()

    def use(self, model: nn.Module, asked: Asked) -> None:
        """Measures on these from now on. Raises BadInput for bad ones, and goes on with those before then."""
        own, tokenizer = remembered(model, asked.tokenizer)
        texts = self.data.get("calibration", own) if asked.texts is None else asked.texts
        tokenizer = self.data.get("tokenizer") if tokenizer is None else tokenizer
        if texts is None:
            raise BadInput("no texts given: pass a list of strings with a tokenizer, or an iterable of model inputs")
        for name in ("tokens", "new_tokens"):
            size = getattr(asked, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise BadInput(f"{name}={one_line(repr(size), 40)}: give a whole number from 1 on")
        if asked.metric is not None and not callable(asked.metric):
            raise BadInput(
                f"metric is {one_line(repr(asked.metric), 60)}: give a function that takes the model, returns a number"
            )
        samples = sample_of(samples_of(model, texts, tokenizer)[0], asked.tokens)
        reason, ids = continuation.why_no_words(model, tokenizer), None
        if asked.prompt is not None and reason is None:
            ids = continuation.prompt_ids(model, tokenizer, asked.prompt, asked.new_tokens)
        elif reason is None:
            # Of the last text used, whose beginning is measured but seldom looked at: the middle shows more.
            ids = samples[-1].ids[:, : max(1, min(96, samples[-1].ids.shape[1] - asked.new_tokens))].cpu()
        self.tokenizer, self.evaluation, self.metric = tokenizer, Evaluation(model, samples), asked.metric
        self.data, self.sizes = {"calibration": texts, "tokenizer": tokenizer}, (asked.tokens, asked.new_tokens)
        self.prompt_ids, self.why_no_words = ids, reason
        self.colour_values.clear()
        self._trail.forget("progress", "written", "metric", "why_no_metric")

    def continue_from(self, model: nn.Module, prompt: str) -> None:
        """Continues another prompt from now on; raises BadInput for one that cannot be continued."""
        if self.why_no_words is not None:
            raise BadInput(f"no continuation is shown: {self.why_no_words}")
        self.prompt_ids = continuation.prompt_ids(model, self.tokenizer, prompt, self.sizes[1])
        self._trail.forget("written")

    def run(self, model: nn.Module, step: Step, check: Callable[[], None]) -> None:
        """Measures what is not known yet of the step, in which the model is."""
        whole = True
        for stage in (
            self._accuracy,
            self._words,
            self._look,
            self._user_metric,
            self._speed,
            self._colours,
            self._trust,
        ):
            try:
                stage(model, step, check)
            except Superseded:
                raise
            except Exception as problem:  # one that fails keeps no other figure from being shown
                whole = False
                self._board.say(problem)
        step.settled = whole
        self._board.status = "settled" if whole else "stopped: not everything could be measured"

    def _accuracy(self, model: nn.Module, step: Step, check: Callable[[], None]) -> None:
        total = len(self.evaluation.samples)
        if step.progress is not None and step.progress.texts == total and self.evaluation.baseline(total) is not None:
            return
        for progress in self.evaluation.original(check):
            if step is self._trail.original and not quantized_layers(model):
                step.progress = progress
                self._board.progress(f"accuracy: {progress.texts} of {total} texts", check)
            else:
                self._trail.original.progress = progress
        if step is self._trail.original:
            step.progress = progress
            return
        for progress in self.evaluation.present(check):
            self._still(model, step)
            step.progress = progress
            self._board.progress(f"accuracy: {progress.texts} of {total} texts", check)

    def _words(self, model: nn.Module, step: Step, check: Callable[[], None]) -> None:
        self.why_no_words = continuation.why_no_words(model, self.tokenizer)  # it may have been compiled meanwhile
        if self.why_no_words is not None or self.prompt_ids is None:
            return
        for asked in (self._trail.original, step):
            if asked.written is None:
                self._board.progress("writing", check)
                as_original = asked is self._trail.original and bool(step.layers)
                written = continuation.write(model, self.prompt_ids, self.sizes[1], check, as_original)
                check()  # the prompt may be another by now
                asked.written = written
        self._board.show()

    def _look(self, model: nn.Module, step: Step, check: Callable[[], None]) -> None:
        if self.look_at is not None:
            self.looked_at = look.look(model, self.look_at, self.evaluation.samples[0], check)
            self._board.show()

    def _user_metric(self, model: nn.Module, step: Step, check: Callable[[], None]) -> None:
        if self.metric is None:
            return
        for asked in (self._trail.original, step):
            if asked.metric is not None or asked.why_no_metric is not None:
                continue
            self._board.progress("your metric", check)
            as_original = asked is self._trail.original and bool(step.layers)
            how = original_pass() if as_original else contextlib.nullcontext()
            try:
                with alone(model), measuring_state(model), how:
                    asked.metric = float(self.metric(model))
            except Exception as problem:
                asked.why_no_metric = f"your metric raised {type(problem).__name__}: {one_line(problem, 120)}"
                self._board.say(problem, asked.why_no_metric)
            self._board.show()

    def _speed(self, model: nn.Module, step: Step, check: Callable[[], None]) -> None:
        for asked in (self._trail.original, step):
            if asked.speed is None:
                self._board.progress("speed" if asked is step else "speed of the original", check)
                as_original = asked is self._trail.original and bool(step.layers)
                found = speed.measure(model, self.evaluation.samples[0], check, as_original)
                self._still(model, step)
                asked.speed = found
                self._board.show()

    def _colours(self, model: nn.Module, step: Step, check: Callable[[], None]) -> None:
        if "error" in self.colours_asked:
            self._board.progress("error of each layer", check)
            self.colour_values["error"] = look.errors(model, self._names, check)
            self._board.show()
        if "time" in self.colours_asked:
            self._board.progress("time of each layer", check)
            self.colour_values["time"] = look.times(model, self._names, self.evaluation.samples[0], check)
            self._board.show()
        if "sensitivity" in self.colours_asked:
            known = self.colour_values.setdefault("sensitivity", {})
            missing = [name for name in self._sensitive if name not in known]
            shown = time.monotonic()
            for name, kl in look.sensitivities(model, missing, self.sensitivity_scheme, self.evaluation, check):
                known[name] = kl
                if time.monotonic() - shown > 0.2:
                    shown = time.monotonic()
                    self._board.progress(f"sensitivity: {len(known)} layers", check)
            self._board.show()

    def _trust(self, model: nn.Module, step: Step, check: Callable[[], None]) -> None:
        self._board.progress("checking", check)
        if not self.evaluation.trusted(check):
            self.evaluation.forget()
            self.colour_values.clear()
            self._trail.forget("progress", "speed", "written", "metric", "why_no_metric")
            self._board.message = Message("the weights were changed outside qnb: everything is measured anew")
            raise Superseded

    def _still(self, model: nn.Module, step: Step) -> None:
        """Stops where somebody else has changed the model since the step was reached: what was read mixes two."""
        if layers_of(layers(model)) != dict(step.layers):
            raise Superseded


def _first_scheme() -> str:
    known = schemes.names()
    return next(name for name in ("w4a16-g64", "w8a8", *known) if name in known)
