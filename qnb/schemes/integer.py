"""What families of integer schemes share: an `IntegerGrid` and activations, as their name spells them."""

from __future__ import annotations

from qnb.errors import UnknownScheme
from qnb.schemes import grammar
from qnb.schemes.base import Family
from qnb.schemes.coded import Coded
from qnb.schemes.grammar import Spelling
from qnb.schemes.grid import IntegerGrid


class IntegerFamily(Coded, Family):
    """Schemes that `grammar` spells. Subclasses say which bits are theirs and why an option makes no sense for them."""

    weight_bits: tuple[int, ...]
    activation_bits: int

    def __init__(self, spelling: Spelling) -> None:
        self.name = str(spelling)
        self.grid = IntegerGrid(spelling.weight_bits, spelling.group, spelling.asym)
        self.static, self.aasym, self.outliers = spelling.static, spelling.aasym, spelling.outliers

    @classmethod
    def named(cls, name: str) -> IntegerFamily | None:
        spelling = grammar.parse(name)
        if spelling is None or spelling.activation_bits != cls.activation_bits:
            return None
        if spelling.weight_bits not in cls.weight_bits:
            return None
        reason = cls.refusal(spelling)
        if reason is not None:
            raise UnknownScheme(f"scheme {name!r}: {reason}")
        return cls(spelling)

    @classmethod
    def refusal(cls, spelling: Spelling) -> str | None:
        """Why no operator computes what the name spells, and what to take instead; None where one does."""
        return None
