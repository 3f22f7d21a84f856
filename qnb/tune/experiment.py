"""`experiment`: several recipes or schemes on the same texts, the original first, compared text by text."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qnb.errors import BadInput, QnbError
from qnb.measure.accuracy import Accuracy, evaluate
from qnb.measure.profile import Profile, profile
from qnb.measure.statistics import ratio_with_se, student_95
from qnb.model.defaults import remembered
from qnb.model.linear import held_storages, quantized_layers
from qnb.model.quantize import quantize, restore
from qnb.model.recipe import Recipe
from qnb.model.subject import check_model
from qnb.results import Cell, Result, Table, format_bytes, format_number
from qnb.schemes import Scheme
from qnb.tune.before import original_for_a_while

ORIGINAL = "original"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one recipe reached. `accuracy` and `profile` are None where it was refused, and `refused` says why."""

    name: str
    recipe: Recipe | None
    weight_bytes: int | None
    accuracy: Accuracy | None
    profile: Profile | None = None
    refused: str | None = None


@dataclasses.dataclass(frozen=True)
class Difference:
    """KL of `name` less that of `other`, in nats a token, paired text by text, with its 95 % interval."""

    name: str
    other: str
    kl: float
    low: float
    high: float

    @property
    def within_noise(self) -> bool:
        """Whether the interval holds 0."""
        return self.low <= 0 <= self.high


@dataclasses.dataclass(frozen=True, repr=False)
class Experiment(Result):
    """`outcomes` in the order asked for, the original first; `texts` and `tokens` are what all were measured on."""

    outcomes: tuple[Outcome, ...]
    texts: int
    tokens: int | None

    def difference(self, name: str, other: str) -> Difference:
        """How the KL of two outcomes differs, text by text. Raises BadInput for a name that was not measured."""
        now, before = self._texts_of(name), self._texts_of(other)
        pairs = list(zip(now, before, strict=True))
        sums = torch.tensor([(n.kl or 0.0) - (b.kl or 0.0) for n, b in pairs], dtype=torch.double)
        kl, se = ratio_with_se(sums, torch.tensor([n.tokens for n, _ in pairs]))
        half = 0.0 if se is None else student_95(len(pairs) - 1) * se
        return Difference(name, other, kl, kl - half, kl + half)

    def _texts_of(self, name: str):
        for outcome in self.outcomes:
            if outcome.name == name and outcome.accuracy is not None:
                return outcome.accuracy._per_text
        raise BadInput(f"{name!r} was not measured: there are {', '.join(o.name for o in self.outcomes)}")

    def _tables(self) -> Sequence[Table]:
        timed = any(o.profile is not None for o in self.outcomes)
        columns = ["name", "weights"]
        columns += ["relative error", "cosine"] if self.tokens is None else ["perplexity", "KL", "same top token"]
        columns += ["latency"] if timed else []
        changed = [o for o in self.outcomes[1:] if o.accuracy is not None and o.accuracy.kl is not None]
        best = min(changed, key=lambda o: o.accuracy.kl, default=None)
        columns += [f"KL against {best.name}"] if best is not None else []
        rows = [self._row(outcome, best, timed) for outcome in self.outcomes]
        on = f"{self.texts} inputs" if self.tokens is None else f"{self.texts} texts, {self.tokens:,} tokens"
        notes = [
            f"all on the same {on}; ± is a standard error, ranges are 95 % intervals of differences paired by text"
        ]
        lead = [Cell(f"{o.name} was refused: {o.refused}", "bad") for o in self.outcomes if o.refused]
        return [Table(columns, rows, lead, notes, frozenset(range(1, len(columns))))]

    def _row(self, outcome: Outcome, best: Outcome | None, timed: bool) -> tuple[str | Cell, ...]:
        cells: list[str | Cell] = [outcome.name, format_bytes(outcome.weight_bytes)]
        accuracy = outcome.accuracy
        if accuracy is None:
            return (*cells, *(["unavailable"] * (2 + (self.tokens is not None) + timed)), *([""] if best else []))
        original = outcome.name == ORIGINAL
        kl = "the original" if original else _with_error(accuracy.kl, accuracy.kl_se)
        top1 = "" if accuracy.top1 is None else f"{100 * accuracy.top1:.2f} %"
        if self.tokens is None:
            error = "the original" if original else _with_error(accuracy.relative_error, accuracy.relative_error_se)
            cells += [error, "" if original else format_number(accuracy.cosine, 5)]
        else:
            cells += [format_number(accuracy.perplexity, 4), kl, top1]
        if timed:
            cells.append(
                "unavailable" if outcome.profile is None else f"{format_number(outcome.profile.latency_ms)} ms"
            )
        if best is not None:
            cells.append(self._against(outcome, best))
        return tuple(cells)

    def _against(self, outcome: Outcome, best: Outcome) -> str | Cell:
        if outcome.name == ORIGINAL or outcome.accuracy.kl is None:
            return ""
        if outcome is best:
            return Cell("the least", "good")
        difference = self.difference(outcome.name, best.name)
        low, high = format_number(difference.low, 2), format_number(difference.high, 2)
        ends = f"+{format_number(difference.kl)} ({low} to {high})"
        return Cell(f"{ends}, within noise", "muted") if difference.within_noise else ends


def _with_error(value: float | None, se: float | None) -> str:
    return format_number(value) + ("" if se is None else f" ± {format_number(se, 2)}")


def experiment(
    model: nn.Module,
    recipes: Mapping[str, str | Scheme | Recipe | Mapping[str, Any]],
    texts: Iterable | None = None,
    tokenizer: object = None,
    *,
    speed: bool = False,
    calibration: Iterable | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Experiment:
    """Measures the original and each of `recipes` on the same texts; the model is left as it was.

    recipes  name -> a scheme, a `Recipe`, or the keywords of `quantize` as a dict: {"scheme": "w4a16", "rounding":
             "gptq"}
    speed    also `profile` each: seconds more apiece
    The others are as for `quantize` and `evaluate`. A recipe that is refused has a row that says why; the others go on.
    While it runs, other threads see the recipes that are tried. Raises BadInput where nothing can be measured.
    """
    check_model(model)
    if not isinstance(recipes, Mapping) or not recipes:
        raise BadInput('recipes is empty: give names with schemes or recipes, such as {"int8": "w8a8"}')
    own_texts, tokenizer = remembered(model, tokenizer)
    texts = own_texts if texts is None else texts
    if texts is None:
        raise BadInput("no texts given: pass a list of strings with tokenizer=, or an iterable of model inputs")
    texts = texts if isinstance(texts, Sequence) else list(texts)
    if ORIGINAL in recipes:
        raise BadInput(f"a recipe is named {ORIGINAL!r}, which the original itself is: give it another name")
    orders = {str(name): _keywords(name, given) for name, given in recipes.items()}
    outcomes: list[Outcome] = []
    with original_for_a_while(model):
        outcomes.append(_measured(model, ORIGINAL, None, texts, tokenizer, speed, progress))
        for name, keywords in orders.items():
            try:
                _apply(model, keywords, calibration, tokenizer, seed, progress)
            except QnbError as refused:
                outcomes.append(Outcome(name, None, None, None, refused=str(refused)))
                continue
            outcomes.append(_measured(model, name, Recipe.of(model), texts, tokenizer, speed, progress))
            if quantized_layers(model):
                restore(model)
    first = outcomes[0].accuracy
    return Experiment(tuple(outcomes), first.texts, first.tokens)


def _keywords(name: object, given: object) -> dict[str, Any]:
    """What `quantize` is called with for one entry of `recipes`."""
    if isinstance(given, Recipe) or not isinstance(given, Mapping):
        return {"scheme": given}
    allowed = set(inspect.signature(quantize).parameters) - {"model", "keep", "progress"}
    unknown = [key for key in given if key not in allowed]
    if unknown or "scheme" not in given:
        wrong = f"has {', '.join(map(repr, unknown))}" if unknown else "has no 'scheme'"
        raise BadInput(f"recipe {name!r} {wrong}: a dict takes the keywords of quantize, {', '.join(sorted(allowed))}")
    return dict(given)


def _apply(model, keywords: Mapping[str, Any], calibration, tokenizer, seed: int, progress: bool) -> None:
    """Changes the model as one entry of `recipes` says."""
    defaults = {"calibration": calibration, "tokenizer": tokenizer, "progress": progress}
    if not isinstance(keywords["scheme"], Recipe):
        defaults["seed"] = seed
    quantize(model, **{**defaults, **keywords})


def _measured(model, name: str, recipe, texts, tokenizer, speed: bool, progress: bool) -> Outcome:
    timed = profile(model, tokenizer, texts=texts, progress=progress) if speed else None
    accuracy = timed.accuracy if timed else evaluate(model, texts, tokenizer, progress=progress)
    return Outcome(name, recipe, held_storages(model)[0], accuracy, timed)
