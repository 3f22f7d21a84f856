"""What a model was before something was tried on it, put back as the very objects."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from qnb.model.linear import QLayer, quantized_layers
from qnb.model.quantize import restore
from qnb.model.select import find_sites
from qnb.model.swap import Place, Step, Stow, land


@contextlib.contextmanager
def original_for_a_while(model: nn.Module) -> Iterator[None]:
    """Changes `model` to its originals, and back to the same quantized layers when the block ends, whatever it did.

    Raises `NotQuantized` where an original was not kept.
    """
    before = [(site, site.module, site.module.on_disk) for site in find_sites(model) if isinstance(site.module, QLayer)]

    def back() -> list[Step]:
        steps: list[Step] = []
        stacks = {id(site.stack): site.stack for site, _, _ in before if site.stack is not None}
        for stack in stacks.values():
            steps += [Place(parent, child, parent._modules[child], stack.layers) for parent, child in stack.places]
        for site, layer, on_disk in before:
            steps += [Place(parent, child, parent._modules[child], layer) for parent, child in site.places]
            if on_disk:
                steps.append(Stow(layer.original, layer.original.weight.data, layer.mapped.tensor))
        return steps

    try:
        if before:
            restore(model)
        yield
    finally:
        if quantized_layers(model):
            restore(model)
        if before:
            land(model, back)
