"""`Trail`: the steps that were tried, and the way through them that undo and redo follow."""

from __future__ import annotations

from qnb.errors import BadInput
from qnb.notebook.panel.recipe import Layers
from qnb.notebook.panel.step import Step
from qnb.results import one_line


class Trail:
    """`steps` are all that were tried, the first the original; the present one is somewhere on the way."""

    def __init__(self, found: Layers) -> None:
        self.steps = [Step(0, {}, "the original")]
        if found:
            self.steps.append(Step(1, found, "as it was found"))
        self._way, self._at = [len(self.steps) - 1], 0

    @property
    def present(self) -> Step:
        """The step that the model is in."""
        return self.steps[self._way[self._at]]

    @property
    def original(self) -> Step:
        """The original model, measured or not."""
        return self.steps[0]

    @property
    def can_undo(self) -> bool:
        """Whether there is a step to go back to."""
        return self._at > 0

    @property
    def can_redo(self) -> bool:
        """Whether a step was undone."""
        return self._at + 1 < len(self._way)

    def beside(self, by: int) -> Step:
        """The step before (-1) or the one that was undone (1); raises BadInput where there is none."""
        if not 0 <= self._at + by < len(self._way):
            raise BadInput("there is nothing to undo" if by < 0 else "there is nothing to redo")
        return self.steps[self._way[self._at + by]]

    def find(self, number: object) -> Step:
        """The step of that number; raises BadInput where there is none."""
        if not isinstance(number, int) or not 0 <= number < len(self.steps):
            raise BadInput(f"there is no step {one_line(repr(number), 40)}: the steps are 0 to {len(self.steps) - 1}")
        return self.steps[number]

    def reach(self, layers: Layers, words: str) -> bool:
        """Makes the step of these layers the present one, a known one or a new one; whether it is another than before.

        Moves along the way where the neighbour is that step, as undo and redo do; else begins a new end of it.
        """
        if dict(layers) == dict(self.present.layers):
            return False
        step = next((s for s in self.steps if dict(s.layers) == dict(layers)), None)
        if step is None:
            step = Step(len(self.steps), dict(layers), words)
            self.steps.append(step)
        for at in (self._at - 1, self._at + 1):
            if 0 <= at < len(self._way) and self._way[at] == step.number:
                self._at = at
                return True
        self._way[self._at + 1 :] = [step.number]
        self._at += 1
        return True

    def forget(self, *fields: str) -> None:
        """Drops what was measured of every step."""
        for step in self.steps:
            for field in fields:
                setattr(step, field, None)
            step.settled = False
