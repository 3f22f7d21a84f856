"""The blocks of a model: lists of modules that run one after the other, and that its layers lie in."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from qnb.model.select import sites_in_place


def block_lists(model: nn.Module, counts: Callable[[str, nn.ModuleList], bool]) -> list[tuple[str, nn.ModuleList]]:
    """(path, list) of each `ModuleList` that `counts`, but for those inside another such: a block's own experts."""
    found: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}." if outer else "") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and not inside and counts(path, module):
            found.append((path, module))
    return found


def block_list(model: nn.Module, names: Iterable[str] | None = None) -> tuple[str, list[nn.Module]]:
    """(path, blocks) of the list of alike blocks that holds most of the layers named; ("", []) where none holds any.

    Without `names` the layers are all that could be quantized.
    """
    names = [site.name for site in sites_in_place(model)] if names is None else list(names)

    def held(path: str) -> int:
        return sum(name.startswith(f"{path}." if path else "") for name in names)

    lists = block_lists(model, lambda path, blocks: len({type(block) for block in blocks}) == 1 and held(path) > 0)
    path, blocks = max(lists, key=lambda found: held(found[0]), default=("", []))
    return path, list(blocks)
