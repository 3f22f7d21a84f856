"""`auto`: a search for the recipe that keeps a budget, on the panel's own texts, that can be watched and stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from qnb.errors import BadInput
from qnb.measure.token import alone
from qnb.model.inputs import Sample
from qnb.model.subject import is_compiled
from qnb.model.variants import depends_on_inputs
from qnb.notebook.panel.prefix import stoppable
from qnb.notebook.panel.recipe import Layers
from qnb.progress import told
from qnb.schemes import How, find
from qnb.tune.search import DEFAULT_SCHEMES, Search, search


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a search is to keep: the keyword of `qnb.search` that asks for it, its limit, and how codes are chosen.

    `rounding` is said as `How` prints.
    """

    keyword: str
    limit: float
    rounding: str = "nearest"

    @property
    def words(self) -> str:
        """The budget as a step is called."""
        return f"auto: {KINDS[self.keyword].words.format(f'{self.limit:g}')}"


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of budget: what the control says, its words with the limit in place, and the limit that is offered."""

    label: str
    words: str
    usual: Callable[[int | None], float]  # of the bytes of the original's weights, where they are known


KINDS = {
    "max_kl": Kind("KL at most (nats/token)", "KL at most {}", lambda held: 0.01),
    "max_perplexity_increase": Kind(
        "perplexity increase at most (%)", "perplexity increase at most {} %", lambda held: 2.0
    ),
    "max_megabytes": Kind(
        "weights of at most (MB)", "weights of at most {} MB", lambda held: float(f"{(held or 100e6) / 2e6:.2g}")
    ),
    "min_speedup": Kind("speed-up of at least (×)", "speed-up of at least {}", lambda held: 1.2),
}


def budget_of(given: Mapping[str, float | None], rounding: str) -> Budget:
    """The one budget that is not None; raises BadInput where there is none, or more. `search` judges its limit."""
    named = [(keyword, limit) for keyword, limit in given.items() if limit is not None]
    if len(named) != 1:
        what = ", ".join(keyword for keyword, _ in named) or "none"
        raise BadInput(f"{len(named)} budgets are given ({what}): give one of {', '.join(KINDS)}")
    return Budget(*named[0], rounding)


def find_recipe(
    model: nn.Module,
    budget: Budget,
    samples: Sequence[Sample],
    data: Mapping[str, Any],
    tell: Callable[[str], None],
) -> tuple[Layers, str]:
    """(layers that keep the budget, what was found in words); the model is tried in many mixes, and left as it was.

    `tell` hears of each step, at least before each block of each pass, and may raise, to stop. `data` are the keywords
    for roundings that need calibration. Raises what `qnb.search` does: BudgetBroken, with the nearest that was reached,
    where nothing keeps the budget.
    """
    if is_compiled(model):
        raise BadInput("the model is compiled and would compile anew for each mix: search with one that is not")
    stage = "starting"

    def hear(what: str, done: int, total: int | None) -> None:
        nonlocal stage
        stage = f"{what}, {done}" + ("" if total is None else f" of {total}")
        tell(stage)

    how = How.read(budget.rounding)
    needed = any(depends_on_inputs(find(name), how, False) for name in DEFAULT_SCHEMES)
    # Not held for its changes, which a measurement would put off: each measurement in it holds the model itself.
    with alone(), stoppable(model, lambda: tell(stage)), told(hear):
        found = search(
            model,
            data["tokenizer"],
            texts=[sample.args or dict(sample.kwargs) for sample in samples],
            calibration=data["calibration"] if needed else None,
            **dataclasses.asdict(how),
            **{budget.keyword: budget.limit},
        )
    layers = {name: (layer.scheme, str(layer.how)) for name, layer in found.recipe.layers.items()}
    return layers, _in_words(found)


def _in_words(found: Search) -> str:
    counts: dict[str, int] = {}
    for layer in found.recipe.layers.values():
        counts[layer.scheme] = counts.get(layer.scheme, 0) + 1
    mix = " + ".join(f"{n} {scheme}" for scheme, n in counts.items()) or "the original"
    tried = len(found.tried)
    return f"{found.budget} is kept: {mix}, the best of {tried} {'mix' if tried == 1 else 'mixes'} measured"
