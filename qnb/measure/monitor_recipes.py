"""Which recipe a monitored model runs, and what users thought of the answers of each."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Mapping

from torch import nn

from qnb.errors import BadInput
from qnb.measure.monitor_look import linear_layers
from qnb.measure.monitor_report import RecipeVotes
from qnb.model.linear import QEmbedding, QLayer
from qnb.model.swap import landed
from qnb.results import one_line
from qnb.schemes import How


class Recipe:
    """Which layer runs in what, as a fingerprint, and what users thought of it."""

    def __init__(self, schemes: Mapping[str, tuple[str, How | None]]) -> None:
        lines = "".join(f"{name} {scheme} {how!r}\n" for name, (scheme, how) in sorted(schemes.items()))
        self.fingerprint = hashlib.blake2b(lines.encode(), digest_size=6).hexdigest()
        counts = collections.Counter(scheme for scheme, _ in schemes.values())
        self._words = ", ".join(f"{count} {scheme}" for scheme, count in counts.most_common())
        self.passes = self.good = self.bad = 0

    def votes(self) -> RecipeVotes:
        """The counts of this moment."""
        return RecipeVotes(self.fingerprint, self._words, self.passes, self.good, self.bad)


class Recipes:
    """Every recipe that the model ran since the start; `standing` is the one at present, `schemes` what is in it.

    schemes  name of each linear layer -> its scheme, and how its codes were chosen; None for an original
    """

    def __init__(self) -> None:
        self.standing: Recipe | None = None
        self.schemes: dict[str, tuple[str, How | None]] = {}
        self._known: dict[str, Recipe] = {}
        self._changes = -1
        self._layers: dict[nn.Linear, str] = {}
        self._embeddings: dict[str, tuple[str, How | None]] = {}  # those that are quantized

    def unchanged(self) -> Recipe | None:
        """The recipe that `now` gave last, while qnb has changed no model since; else None.

        What was changed in another way is seen with the next pass that is looked into, which asks `now`.
        """
        return self.standing if landed() == self._changes else None

    def now(self, inner: nn.Module) -> Recipe:
        """The recipe that the model runs now, by a look at all of its layers."""
        self._changes = landed()
        self._layers = linear_layers(inner)
        schemes = {name: _scheme(layer) for layer, name in self._layers.items()}
        embeddings = {name: _scheme(m) for name, m in inner.named_modules() if isinstance(m, QEmbedding)}
        if self.standing is None or (schemes, embeddings) != (self.schemes, self._embeddings):
            self.schemes, self._embeddings = schemes, embeddings
            made = Recipe(schemes | embeddings)
            self.standing = self._known.setdefault(made.fingerprint, made)
        return self.standing

    def layers(self) -> dict[nn.Linear, str]:
        """The linear layers with their names, as `now` saw them last."""
        return self._layers

    def vote(self, asked: str, good: bool) -> None:
        """Counts a vote; raises BadInput where no pass was made by a recipe of that fingerprint."""
        answered = [r for r in self._known.values() if r.passes]
        found = next((r for r in answered if r.fingerprint == asked), None)
        if found is None:
            names = ", ".join(r.fingerprint for r in answered) or "none yet"
            raise BadInput(f"no answer came from recipe {one_line(repr(asked), 40)}: those that answered are {names}")
        found.good += good
        found.bad += not good

    def votes(self) -> tuple[RecipeVotes, ...]:
        """The counts of those that answered, in order of appearance."""
        return tuple(r.votes() for r in self._known.values() if r.passes)


def _scheme(layer: nn.Module) -> tuple[str, How | None]:
    return (layer.scheme, layer.variant.how) if isinstance(layer, QLayer) else ("none", None)
