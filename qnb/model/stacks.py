"""What becomes of blocks of experts where some of their matrices are quantized or go back: steps of a change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qnb.model.linear import QLayer
from qnb.model.select import Site
from qnb.model.swap import FollowBlock, LetGo, Place, Step, Stow

# A block of experts, one of its 3-D parameters, the sites of that one's matrices, and where it is to lie.
Moving = tuple[nn.Module, str, list[Site], torch.device]


def experts_that_move(sites: Sequence[Site], forth: Sequence[Site], back: Sequence[Site], keep: str) -> list[Moving]:
    """Which 3-D parameters of experts are to lie elsewhere.

    One leaves its GPU for the host once all of its matrices are quantized, else it comes back; one that something else
    uses as well stays where it is.
    """
    touched = {id(site.stack) for site in (*forth, *back) if site.stack is not None}
    if not touched:
        return []
    matrices: dict[tuple[int, str], list[Site]] = {}
    for site in sites:
        if site.stack is not None and site.stack.layers.block is not None:
            matrices.setdefault((id(site.stack), site.name.rpartition(".")[2]), []).append(site)
    users = Counter(id(together[0].stack.layers.block._parameters[name]) for (_, name), together in matrices.items())
    quantized, found = _quantized_then(sites, forth, back), []
    for (stack, name), together in matrices.items():
        layers = together[0].stack.layers
        parameter = layers.block._parameters[name]
        leaves = all(id(site) in quantized for site in together)
        device = torch.device("cpu") if leaves else layers.device
        if stack in touched and parameter.device != device and (keep == "memory" or not leaves):
            if users[id(parameter)] == 1 and _are_pieces(together, parameter):
                found.append((layers.block, name, together, device))
    return found


def move_steps(sites: Sequence[Site], forth: Sequence[Site], back: Sequence[Site], keep: str) -> list[Step]:
    """Each expert's original is a piece of the parameter, and stays one: to train one of the two is to train both."""
    steps = []
    for block, name, matrices, device in experts_that_move(sites, forth, back, keep):
        here = block._parameters[name].data
        there = here.to(device)
        steps.append(Stow(block, here, there, name))
        for site, piece in zip(matrices, there.unbind(), strict=True):
            steps.append(Stow(site.source, site.source.weight.data, piece))
    return steps


def place_steps(sites: Sequence[Site], forth: Sequence[Site], back: Sequence[Site], keep: str) -> list[Step]:
    """Blocks of experts make room for their linear layers where one of these is quantized, else come back."""
    stacks = {id(site.stack): site.stack for site in sites if site.stack is not None}
    quantized = _quantized_then(sites, forth, back) if stacks else set()
    needed = {id(site.stack) for site in sites if site.stack is not None and id(site) in quantized}
    steps: list[Step] = []
    for stack in stacks.values():
        layers, block = stack.layers, stack.layers.block
        if id(stack) in needed and not stack.installed:
            steps += [Place(parent, child, block, layers) for parent, child in stack.places]
        elif id(stack) not in needed and stack.installed:
            steps += [FollowBlock(layers), *(Place(parent, child, layers, block) for parent, child in stack.places)]
        if keep == "none" and any(site.stack is stack for site in forth):
            steps.append(LetGo(layers, block))
    return steps


def _are_pieces(matrices: Sequence[Site], parameter: Tensor) -> bool:
    """Whether the experts' weights lie in the parameter: not where a change of type gave them memory of their own."""
    if parameter.is_meta:
        return False
    pairs = zip(matrices, parameter.detach().unbind(), strict=True)
    return all(site.weight is not None and site.weight.data_ptr() == piece.data_ptr() for site, piece in pairs)


def _quantized_then(sites: Sequence[Site], forth: Sequence[Site], back: Sequence[Site]) -> set[int]:
    """Ids of the sites that are quantized once these have gone forth and back."""
    quantized = {id(site) for site in sites if isinstance(site.module, QLayer)}
    return (quantized | {id(site) for site in forth}) - {id(site) for site in back}
