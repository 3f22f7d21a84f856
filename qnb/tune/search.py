"""`search`: mixed precision under a budget. What sensitivity predicts is solved exactly, then measured, then mended."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from torch import nn

from qnb import schemes as registry
from qnb.errors import BadInput, BudgetBroken
from qnb.measure.accuracy import Accuracy, evaluate
from qnb.measure.sensitivity import Sensitivity, sensitivity
from qnb.measure.statistics import median
from qnb.measure.token import alone
from qnb.measure.workload import NEW_TOKENS, workload_of
from qnb.model.defaults import remembered
from qnb.model.linear import held_storages, quantized_layers
from qnb.model.quantize import quantize, restore
from qnb.model.recipe import Recipe
from qnb.model.subject import check_model, measuring_state
from qnb.progress import part
from qnb.results import Cell, Result, Table, format_bytes, format_number, one_line
from qnb.schemes import How
from qnb.tune.before import original_for_a_while
from qnb.tune.program import RUNS, Program, run_times

# At the same bytes a learned codebook costs less KL than evenly spaced codes do; for some layers these are still best.
DEFAULT_SCHEMES = ("w8a8", "w8a16", "w4a16-g64", "w4a16-g64-asym", "kmeans4-g64", "w3a16-g64", "kmeans3-g64")
# Of these every one has a word in compressed-tensors, so that what is found can be saved for plain transformers.
SERVED_SCHEMES = ("w8a8", "w8a16", "w4a16-g32", "w4a16-g64", "w4a16-g128")
# How often a solution is measured and the prediction mended; each time the step gets smaller.
_ROUNDS = 6
# A budget that is used to this share is not worth another measurement.
_USED_UP = 0.95


@dataclasses.dataclass(frozen=True)
class Tried:
    """One recipe that was measured.

    value  of the budget's quantity, as `shown`; of what must be at least so much it is the negative
    holds  whether the budget is kept
    """

    label: str
    recipe: Recipe
    weight_bytes: int
    accuracy: Accuracy
    value: float
    holds: bool
    shown: str


@dataclasses.dataclass(frozen=True, repr=False)
class Search(Result):
    """`recipe` is the best of `tried` that keeps the budget; `accuracy` and `weight_bytes` were measured with it.

    budget  in words; `limits` as it was given, by its keyword
    """

    budget: str
    limits: Mapping[str, float]
    recipe: Recipe
    accuracy: Accuracy
    weight_bytes: int
    tried: tuple[Tried, ...]
    sensitivity: Sensitivity

    @property
    def mix(self) -> str:
        """How many layers of the recipe have which scheme, in words."""
        return _mix(self.recipe)

    def _tables(self) -> Sequence[Table]:
        lead = [Cell(f"{self.mix}: {self.budget} is kept", "head")]
        lines = []
        for step in self.tried:
            chosen = step.recipe is self.recipe
            kl, se = step.accuracy.kl, step.accuracy.kl_se
            lines.append(
                (
                    step.label,
                    _mix(step.recipe),
                    format_bytes(step.weight_bytes),
                    format_number(kl) + ("" if se is None else f" ± {format_number(se, 2)}"),
                    format_number(step.accuracy.perplexity, 4),
                    step.shown,
                    Cell("chosen" if chosen else "kept" if step.holds else "broken", "good" if chosen else "muted"),
                )
            )
        columns = ("step", "layers", "weights", "KL", "perplexity", "measured", "budget")
        return [Table(columns, lines, lead, ["every row was measured"], frozenset({2, 3, 4, 5}))]


def _mix(recipe: Recipe) -> str:
    counts: dict[str, int] = {}
    for layer in recipe.layers.values():
        counts[layer.scheme] = counts.get(layer.scheme, 0) + 1
    return " + ".join(f"{n} {scheme}" for scheme, n in counts.items()) or "the original"


@dataclasses.dataclass(frozen=True)
class _Budget:
    """What is to be kept: `value(model, accuracy)` at most `limit`, and how it is said."""

    words: str
    limit: float
    value: Callable[[nn.Module, Accuracy], float]
    show: Callable[[float], str]
    # The predicted KL that would just use it up; None where bytes or time are the budget.
    first_kl: float | None
    # Whether the value grows from 0 about as KL does, so that its share of the limit means something.
    proportional: bool = False


def search(
    model: nn.Module,
    tokenizer: object = None,
    *,
    texts: Iterable | None = None,
    schemes: Iterable[str] = DEFAULT_SCHEMES,
    max_kl: float | None = None,
    max_perplexity_increase: float | None = None,
    max_megabytes: float | None = None,
    min_speedup: float | None = None,
    min_metric: float | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    sensitivities: Sensitivity | None = None,
    method: str = "gradient",
    gradual: bool = False,
    layers: str | Iterable[str] | None = None,
    skip: str | Iterable[str] | None = None,
    rounding: str = "nearest",
    observer: str = "minmax",
    smooth: float | str | None = None,
    calibration: Iterable | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Search:
    """The best mix of `schemes` for the layers of `model` under one budget, measured. The model is left as it was.

    schemes                  to choose from. kmeans, among the default ones, is saved by `format="qnb"` alone: for a
                             checkpoint that runs elsewhere leave it out
    max_kl                   nats a token: the smallest weights whose KL to the original stays within
    max_perplexity_increase  percent: the smallest weights whose perplexity rises by no more
    max_megabytes            of all weights held (10^6 bytes): the least KL within
    min_speedup              of latency against the original: the least KL that is so much faster
    min_metric               of `metric(model)`, higher is better: the smallest weights that reach it
    sensitivities            as measured before by `sensitivity`, of the layers that may change; else found here by
                             `method`
    gradual                  instead of solving for the best mix: quantize to the first of `schemes` from the least
                             sensitive layer on, measure each step, stop where the budget would break
    The others are as for `quantize`.

    Experts of a mixture and embeddings stay as they are. Layers that serving engines fuse (q, k and v; gate and up)
    move together. KL of layers is taken to add up, and the mix is an integer program (HiGHS); what it predicts is
    then measured with the whole model, and the prediction tightened or loosened until the budget is used but holds.
    While it runs, other threads see the mixes that are tried. Raises `BudgetBroken` with the nearest that was reached
    where no mix keeps the budget, and BadInput.
    """
    check_model(model)
    formats = _formats(schemes)
    own_texts, tokenizer = remembered(model, tokenizer)
    texts = own_texts if texts is None else texts
    if texts is None:
        raise BadInput("no texts given: a search measures accuracy, pass texts= and tokenizer=")
    texts = texts if isinstance(texts, Sequence) else list(texts)
    how = How(rounding, observer, smooth, seed)
    runner = _Runner(model, tokenizer, texts, calibration, metric, progress)
    given = {
        "max_kl": max_kl,
        "max_perplexity_increase": max_perplexity_increase,
        "max_megabytes": max_megabytes,
        "min_speedup": min_speedup,
        "min_metric": min_metric,
    }
    with original_for_a_while(model):
        budget = _budget(given, runner)
        if sensitivities is None:
            sensitivities = sensitivity(
                model,
                formats,
                texts,
                tokenizer,
                method=method,
                layers=layers,
                skip=skip,
                rounding=rounding,
                observer=observer,
                smooth=smooth,
                calibration=calibration,
                seed=seed,
                progress=progress,
            )
        _check_fit(sensitivities, formats, how)
        program = Program(model, sensitivities, formats)
        tried = _gradually(program, budget, runner, formats[0]) if gradual else _solve(program, budget, runner)
    kept = [step for step in tried if step.holds]
    if not kept:
        nearest = min(tried, key=lambda step: abs(step.value - budget.limit))
        raise BudgetBroken(
            f"no mix of {', '.join(formats)} keeps {budget.words}: the nearest measured is {_mix(nearest.recipe)} with "
            f"{budget.show(nearest.value)} at {format_bytes(nearest.weight_bytes)}; allow more, or give other schemes"
        )
    by_kl = budget.first_kl is None
    best = min(kept, key=lambda s: (s.accuracy.kl, s.weight_bytes) if by_kl else (s.weight_bytes, s.accuracy.kl))
    limits = {name: limit for name, limit in given.items() if limit is not None}
    return Search(budget.words, limits, best.recipe, best.accuracy, best.weight_bytes, tuple(tried), sensitivities)


def _check_fit(sensitivities: Sensitivity, formats: Sequence[str], how: How) -> None:
    """Raises BadInput where sensitivities that were given say nothing of what is asked."""
    lacking = [name for name in formats if name not in sensitivities.schemes]
    if lacking:
        raise BadInput(
            f"the sensitivities given have no {', '.join(lacking)}: they have {', '.join(sensitivities.schemes)}"
        )
    if sensitivities.how != how:
        raise BadInput(f"the sensitivities given were found with {sensitivities.how}, not with {how}: find them anew")


def _formats(schemes: Iterable[str]) -> list[str]:
    names = [schemes] if isinstance(schemes, str) else list(schemes)
    formats = [str(s) for s in map(registry.find, names) if s.grid is not None]
    if not formats:
        raise BadInput("schemes is empty: give one or more names such as 'w8a8', 'w4a16-g64'")
    return list(dict.fromkeys(formats))


class _Runner:
    """Applies recipes and measures them; each recipe once."""

    def __init__(self, model, tokenizer, texts, calibration, metric, progress) -> None:
        self.model, self.tokenizer, self.texts = model, tokenizer, texts
        self.calibration, self.metric, self.progress = calibration, metric, progress
        self._original_ms: float | None = None

    def apply(self, recipe: Recipe) -> None:
        """Changes the model to what the recipe says."""
        if recipe.layers:
            quantize(self.model, recipe, calibration=self.calibration, tokenizer=self.tokenizer, progress=self.progress)
        elif quantized_layers(self.model):
            restore(self.model)

    def measure(self, label: str, recipe: Recipe, budget: _Budget) -> Tried:
        """Applies the recipe and measures accuracy, bytes and the budget's quantity."""
        self.apply(recipe)
        accuracy = evaluate(self.model, self.texts, self.tokenizer, metric=self.metric, progress=self.progress)
        if recipe.layers and accuracy.kl is None:
            raise BadInput(f"the budget cannot be measured: {accuracy.unavailable.get('kl')}")
        value = budget.value(self.model, accuracy)
        accuracy = accuracy if recipe.layers else dataclasses.replace(accuracy, kl=0.0)
        return Tried(
            label, recipe, held_storages(self.model)[0], accuracy, value, value <= budget.limit, budget.show(value)
        )

    def latency_ms(self) -> float:
        """Median latency of the model as it is, of what `profile` runs."""
        work = workload_of(self.model, self.tokenizer, None, NEW_TOKENS, self.texts, None)
        with alone(self.model), measuring_state(self.model):
            work.run()
            return 1000 * median([work.run().total for _ in range(RUNS)])


def _budget(given: dict[str, float | None], runner: _Runner) -> _Budget:
    """The one budget that is given; the model is the original when this is called."""
    named = {name: limit for name, limit in given.items() if limit is not None}
    if len(named) != 1:
        raise BadInput(f"{len(named)} budgets are given ({', '.join(named) or 'none'}): give one of {', '.join(given)}")
    ((name, limit),) = named.items()
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not math.isfinite(limit):
        raise BadInput(f"{name}={one_line(repr(limit), 40)}: give a number")
    if name != "min_metric" and limit <= 0:
        raise BadInput(f"{name}={limit}: give a number above 0")
    if name == "max_kl":
        return _Budget(f"KL at most {limit:g}", limit, lambda m, a: a.kl or 0.0, lambda v: f"{v:.3g}", limit, True)
    if name == "max_megabytes":
        return _Budget(
            f"weights of at most {limit:g} MB",
            limit * 1e6,
            lambda m, a: held_storages(m)[0],
            lambda v: format_bytes(round(v)),
            None,
        )
    if name == "max_perplexity_increase":
        original = evaluate(runner.model, runner.texts, runner.tokenizer, progress=runner.progress).perplexity
        if original is None:
            raise BadInput("the original's perplexity on these texts is not finite: give other texts")
        return _Budget(
            f"a perplexity increase of at most {limit:g} %",
            limit,
            lambda m, a: 100 * (a.perplexity / original - 1) if a.perplexity is not None else math.inf,
            lambda v: f"{v:+.2f} %",
            math.log1p(limit / 100),
            True,
        )
    if name == "min_speedup":
        original_ms = runner.latency_ms()
        return _Budget(
            f"a speed-up of at least {limit:g}",
            -limit,
            lambda m, a: -original_ms / runner.latency_ms(),
            lambda v: f"{-v:.2f} x",
            None,
        )
    if runner.metric is None:
        raise BadInput("min_metric needs metric=, a function of the model, higher is better")
    return _Budget(
        f"a metric of at least {limit:g}",
        -limit,
        lambda m, a: math.inf if a.metric is None else -a.metric,
        lambda v: f"{-v:.4g}",
        1.0,
    )


def _solve(program: Program, budget: _Budget, runner: _Runner) -> list[Tried]:
    tried: dict[tuple[int, ...], Tried] = {}

    def attempt(choice: np.ndarray) -> tuple[Tried, bool]:
        """What the choice was measured as, and whether that was new."""
        key = tuple(int(c) for c in choice)
        new = key not in tried
        if new:
            with part(f"mix {len(tried) + 1}"):
                tried[key] = runner.measure(f"{len(tried) + 1}", program.recipe(key), budget)
        return tried[key], new

    if budget.first_kl is None:
        _within_cost(program, budget, runner, attempt)
    else:
        _within_accuracy(program, budget, attempt)
    if not any(step.holds for step in tried.values()):
        attempt(np.zeros(len(program.groups), dtype=int))  # the original itself
    return list(tried.values())


def _within_cost(program: Program, budget: _Budget, runner: _Runner, attempt) -> None:
    """The least KL whose bytes, or time, stay within."""
    if budget.limit > 0:  # bytes add up exactly
        choice = program.least(program.kl, program.bytes, budget.limit - program.other_bytes)
        attempt(choice if choice is not None else np.where(np.isfinite(program.bytes), program.bytes, np.inf).argmin(1))
        return
    # Times of layers do not add up exactly to that of the model: how much they must save is what is tightened.
    times = run_times(program, runner.model, runner.calibration, runner.tokenizer)
    original = runner.latency_ms()
    wanted = original * (1 + 1 / budget.limit)  # saved, in ms: the limit is the negative of the speed-up
    saved = times[:, :1] - times
    low, high = 0.0, math.inf
    for _ in range(_ROUNDS):
        choice = program.least(program.kl, -saved, -wanted)
        step, new = attempt(choice if choice is not None else np.where(np.isfinite(times), times, np.inf).argmin(1))
        if not new or choice is None:
            return
        low, high = (low, wanted) if step.holds else (wanted, high)
        wanted = (low + high) / 2 if math.isfinite(high) else 1.3 * wanted


def _within_accuracy(program: Program, budget: _Budget, attempt) -> None:
    """The smallest bytes whose measured loss stays within; what is predicted is scaled until it does."""
    smallest = np.where(np.isfinite(program.bytes), program.bytes, np.inf).argmin(1)
    target = min(budget.first_kl, program.predicted(program.kl, smallest))
    good, bad = 0.0, math.inf
    measured, before = 0, None
    for _ in range(4 * _ROUNDS):
        choice = program.least(program.bytes, program.kl, target)
        step, new = attempt(choice)
        measured += new
        if step.holds:
            good = max(good, target)
            if budget.proportional and step.value >= _USED_UP * budget.limit or step is before and math.isinf(bad):
                return  # used up, or there is nothing smaller
        else:
            bad = min(bad, target)
        if measured == _ROUNDS and good or math.isfinite(bad) and bad - good < 0.01 * bad:
            return
        before = step
        if math.isfinite(bad):
            target = (good + bad) / 2 if good else bad / 4
        else:
            ratio = budget.limit / step.value if budget.proportional and step.value > 0 else 2.0
            target *= min(4.0, max(1.05, ratio))


def _gradually(program: Program, budget: _Budget, runner: _Runner, scheme: str) -> list[Tried]:
    """Groups go to `scheme` one after the other, the least sensitive first, until the budget would break."""
    index = program.schemes.index(scheme)
    order = [g for g in program.kl[:, index].argsort() if math.isfinite(program.kl[g, index])]
    choice = [0] * len(program.groups)
    tried = [runner.measure("original", program.recipe(choice), budget)]
    lasting = budget.first_kl is not None  # else the budget is reached, not left
    for group in order:
        if tried[-1].holds != lasting:
            break
        choice[group] = index
        tried.append(runner.measure(f"+ {program.groups[group][0]}", program.recipe(choice), budget))
    return tried
