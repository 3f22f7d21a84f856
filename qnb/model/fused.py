"""Layers that serving engines run as one: they must share a scheme, or a checkpoint cannot be served."""

from __future__ import annotations

from collections.abc import Iterable

# The last part of names that vLLM and others stack into one matrix, in the families of models that have them.
_TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("w1", "w3"),
)


def fused_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The names in groups that move together: neighbours under one parent that engines fuse, every other name alone."""
    groups: dict[tuple[str, object], list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        kind = next((together for together in _TOGETHER if last in together), last)
        groups.setdefault((parent, kind), []).append(name)
    return [tuple(group) for group in groups.values()]
