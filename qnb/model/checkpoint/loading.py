"""`load` and `attach`: quantized checkpoints, ours and others', run as integers in qnb's layers."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qnb.errors import BadCheckpoint, BadInput, QnbError
from qnb.model import strict_json
from qnb.model.checkpoint import compressed, native
from qnb.model.checkpoint.compressed import Form
from qnb.model.checkpoint.files import Tensors, checkpoint_directory
from qnb.model.checkpoint.skeleton import CONFIG, model_from, read_config
from qnb.model.linear import QLayer, class_for, quantized_layers
from qnb.model.quantize import Report, layers
from qnb.model.recipe import LayerRecipe, Recipe
from qnb.model.select import Site, find_sites, sites_in_place
from qnb.model.swap import LetGo, Place, land
from qnb.results import one_line
from qnb.schemes import Variant
from qnb.schemes.plain import checked

RECIPE = "qnb_recipe.json"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_HOOK = "ct_decompress_hook"


def load(
    directory: str | os.PathLike, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> nn.Module:
    """The model of a quantized checkpoint, in eval mode, its integers run as such.

    directory  what `qnb.save` wrote, or any compressed-tensors checkpoint of 4- or 8-bit integers, by whoever wrote it
    dtype      of what is not quantized; None takes the checkpoint's. Scales keep their bits

    Neither a float copy of a weight nor the package compressed-tensors is needed, and no code of the checkpoint is run.
    There are no originals to restore. Raises `BadCheckpoint` in one line for a directory that is none, missing, extra
    or misshapen tensors, NaN, and formats that no operator of qnb computes.
    """
    if dtype is not None and dtype not in _FLOATS:
        raise BadInput(f"dtype={dtype!r}: give torch.float32, torch.bfloat16 or torch.float16")
    directory = checkpoint_directory(directory)
    stored = _stored(directory)
    model = model_from(directory, dtype)
    for step in _arrival(model, stored):
        step.do()
    model.config._name_or_path = str(directory)
    return model.to(device)


def attach(model: nn.Module, directory: str | os.PathLike | None = None) -> Report:
    """Changes `model`: what compressed-tensors holds as integers runs as integers from now on. All layers, or none.

    Without `directory` the model is one that transformers loaded from a compressed-tensors checkpoint and that has not
    run yet: at its first forward transformers would turn the integers to floats, which is called off here. With one,
    the checkpoint's tensors are put into the model, which has the same layers (and need be no transformers model).
    Raises `BadCheckpoint` or BadInput before anything has changed.
    """
    if not isinstance(model, nn.Module):
        raise BadInput(f"model is a {type(model).__name__}: give a torch.nn.Module")
    if quantized_layers(model):
        raise BadInput("the model holds quantized layers already: call qnb.restore(model) first")
    if directory is not None:
        stored = _stored(checkpoint_directory(directory))
        land(model, lambda: list(_arrival(model, stored)))
        return dataclasses.replace(layers(model), title=f"{_count(model)} loaded as integers")
    waiting = {name: m for name, m in model.named_modules() if _status(m) is not None}
    if not waiting:
        raise BadInput(
            "the model holds no layer of compressed-tensors: give one that transformers loaded from such a checkpoint, "
            "or the checkpoint's directory"
        )
    done = [name for name, m in waiting.items() if _status(m) != "compressed"]
    if done:
        raise BadInput(
            f"layer {done[0]} has been turned to floats by transformers, as its first forward does: load the model "
            "again, and attach before it runs"
        )
    others = [name for name, m in waiting.items() if not isinstance(m, nn.Linear)]
    if others:
        raise BadCheckpoint(
            f"{others[0]} is a quantized {type(waiting[others[0]]).__name__}: qnb runs linear layers alone"
        )
    dtype = next((p.dtype for p in model.parameters() if p.dtype in _FLOATS), torch.float32)
    dtype = getattr(getattr(model, "config", None), "dtype", None) or dtype

    def plan() -> list[Place]:
        steps = []
        for site in sites_in_place(model):
            if site.name in waiting:
                variant = _taken(site, waiting[site.name])
                new = _layer(site.module, variant, dtype)
                steps += [Place(parent, child, site.module, new) for parent, child in site.places]
        return steps

    land(model, plan)
    hook = getattr(model, _HOOK, None)
    if hook is not None:
        hook.remove()
        delattr(model, _HOOK)
    return dataclasses.replace(layers(model), title=f"{_count(model)} run as the integers that the checkpoint holds")


# ---------------------------------------------------------------- what a directory holds


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A checkpoint that was found to be one: its tensors, and how to find a layer's variant."""

    tensors: Tensors
    find: Callable[[str, nn.Module], Form | None] | None  # of compressed-tensors; None for qnb's own format
    recipe: Recipe | None

    def form(self, name: str, module: nn.Module) -> Form | LayerRecipe | None:
        """What says how the layer is stored; None where it is no integers."""
        return self.recipe.layers.get(name) if self.find is None else self.find(name, module)

    def names(self, form: Form | LayerRecipe) -> tuple[str, ...]:
        """What tensors a layer of this form may have."""
        return native.TENSORS if self.find is None else (*form.tensor_names, "weight_g_idx")

    def variant(self, name: str, form: Form | LayerRecipe, shape: tuple[int, int]) -> Variant:
        """The layer's variant; raises `BadCheckpoint`, naming the layer."""
        given = {part: self.tensors[f"{name}.{part}"] for part in self.names(form) if f"{name}.{part}" in self.tensors}
        try:
            if self.find is None:
                return native.variant_of(form, shape, given)
            variant = compressed.variant_of(form, shape, given)
        except QnbError as problem:
            raise BadCheckpoint(f"layer {one_line(name, 100)}: {problem}") from None
        known = None if self.recipe is None else self.recipe.layers.get(name)
        if known is not None and known.scheme == variant.scheme.name:
            variant = dataclasses.replace(variant, how=known.how)
        return variant


def _stored(directory: Path) -> _Stored:
    if (directory / native.FILE).is_file():
        described = strict_json.read(directory / native.FILE, BadCheckpoint, "description")
        return _Stored(Tensors(directory), None, native.recipe_in(described))
    config = read_config(directory).get("quantization_config")
    if config is None:
        raise BadCheckpoint(
            f"{one_line(directory, 100)} is not quantized: load it with transformers and qnb.quantize it, or with "
            "qnb.from_pretrained(path, scheme)"
        )
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    if method != compressed.METHOD:
        raise BadCheckpoint(
            f"{CONFIG} says quant_method {one_line(repr(method), 40)}: qnb reads {compressed.METHOD} and its own format"
        )
    find = compressed.forms_of(config)  # what is refused is refused before the weights are looked at
    recipe = Recipe.load(directory / RECIPE) if (directory / RECIPE).is_file() else None
    return _Stored(Tensors(directory), find, recipe)


# ---------------------------------------------------------------- into a model


@dataclasses.dataclass(frozen=True)
class _Assign:
    """Put a parameter or buffer into a module; a step of `land`."""

    table: dict[str, Any]
    key: str
    old: Tensor
    new: Tensor

    def holds(self) -> bool:
        return self.table.get(self.key) is self.old

    def do(self) -> None:
        self.table[self.key] = self.new

    def undo(self) -> None:
        self.table[self.key] = self.old


def _arrival(model: nn.Module, stored: _Stored) -> Iterator[Place | LetGo | _Assign]:
    """The steps that put a checkpoint into a model of the same layers. Raises `BadCheckpoint` where it does not fit."""
    used: set[str] = set()
    new: dict[str, nn.Module] = {}  # layers
    blocks: dict[str, nn.Module] = {}  # of experts
    places: list[Place | LetGo] = []
    for site in find_sites(model) if stored.find is None else sites_in_place(model):
        form = stored.form(site.name, site.module)
        if form is None:
            continue
        if site.refused is not None:
            raise BadCheckpoint(f"layer {site.name} cannot run the integers of the checkpoint: {site.refused}")
        weight, variant = site.module.weight, stored.variant(site.name, form, site.shape)
        layer = _layer(site.module, variant if weight.is_meta else variant.to(weight.device), weight.dtype)
        used |= {f"{site.name}.{part}" for part in stored.names(form)}
        new[site.name] = layer
        places += [Place(parent, child, site.module, layer) for parent, child in site.places]
        if site.block is not None and site.block not in blocks:
            experts = blocks[site.block] = site.stack.layers
            places += [Place(parent, child, experts.block, experts) for parent, child in site.stack.places]
            places.append(LetGo(experts, experts.block))
    if stored.find is None:
        if unknown := [name for name in stored.recipe.layers if name not in new]:
            raise BadCheckpoint(f"the checkpoint has a layer {one_line(unknown[0], 80)} that the model has not")
    if not new:
        raise BadCheckpoint("the checkpoint's targets match no linear layer of the model")
    yield from places
    yield from fill(model, new | blocks, used, stored.tensors)


def fill(model: nn.Module, new: Mapping[str, nn.Module], used: set[str], tensors: Tensors) -> Iterator[_Assign]:
    """The steps that put in everything but the tensors `used`; raises `BadCheckpoint` where some lack or are left over.

    `new` are what will stand at these names of the model.
    """
    floats = [slots for slots in _floats(model, new) if not any(name in used for *_, name in slots)]
    missing = [slots[0][2] for slots in floats if not any(name in tensors for *_, name in slots)]
    missing = [name for name in missing if not _matches(model, "_keys_to_ignore_on_load_missing", name)]
    if missing:
        raise BadCheckpoint(
            f"the checkpoint lacks {len(missing)} tensors of the model, first {missing[0]}: is it another model's?"
        )
    known = used | {name for slots in floats for *_, name in slots}
    extra = [name for name in tensors.names if name not in known]
    extra = [name for name in extra if not _matches(model, "_keys_to_ignore_on_load_unexpected", name)]
    if extra:
        raise BadCheckpoint(
            f"the checkpoint holds {len(extra)} tensors that the model has no place for, first {one_line(extra[0], 80)}"
        )
    for slots in floats:
        name = next((name for *_, name in slots if name in tensors), None)
        if name is None:
            continue
        old = slots[0][0][slots[0][1]]
        loaded = _like(name, tensors[name], old)
        for table, key, _ in slots:
            yield _Assign(table, key, table[key], loaded)


def _floats(model: nn.Module, new: Mapping[str, nn.Module]) -> Iterator[list[tuple[dict, str, str]]]:
    """Everything else that a state dict has: for each tensor the (table, key, name) of all places that share it."""
    shared: dict[int, list[tuple[dict, str, str]]] = {}
    for path, module in _standing(model, new):
        prefix = f"{path}." if path else ""
        kept = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for table, found in ((module._parameters, module._parameters), (module._buffers, kept)):
            for key, tensor in found.items():
                if tensor is not None:
                    shared.setdefault(id(tensor), []).append((table, key, prefix + key))
    yield from shared.values()


def _standing(model: nn.Module, new: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of all that will stand in the model, a shared module under its first name alone."""
    waiting, seen = [("", model)], set()
    while waiting:
        path, old = waiting.pop()
        if id(old) not in seen:
            seen.add(id(old))
            module = new.get(path, old)
            yield path, module
            prefix = f"{path}." if path else ""
            children = [(prefix + name, child) for name, child in module._modules.items() if child is not None]
            waiting += reversed(children)


def _like(name: str, tensor: Tensor, old: Tensor) -> Tensor:
    """`tensor` checked against what stood there, in its type, as a parameter where that was one."""
    types = _FLOATS if old.dtype in _FLOATS else (old.dtype,)
    device = "cpu" if old.is_meta else old.device
    tensor = checked(one_line(name, 100), tensor, tuple(old.shape), *types).to(device, old.dtype)
    return nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor


def _layer(module: nn.Module, variant: Variant, dtype: torch.dtype) -> QLayer:
    """A quantized layer in the place of `module`, whose weight may be missing or integers."""
    layer = class_for(module)(module, variant, keep=False, dtype=dtype)
    layer.original_missing = "it came from a checkpoint that holds integers alone"
    return layer


def _taken(site: Site, module: nn.Module) -> Variant:
    """The variant of a layer that transformers loaded and compressed-tensors has not touched yet."""
    scheme = module.quantization_scheme
    group = {key: _dumped(getattr(scheme, key, None)) for key in ("weights", "input_activations", "output_activations")}
    packed = "weight_packed" in module._parameters
    default = "pack-quantized" if packed else "int-quantized"
    shape = module.out_features, module.in_features
    tensors = {name: p.detach() for name, p in module._parameters.items() if p is not None and name != "bias"}
    try:
        return compressed.variant_of(compressed.form_of(group, default), shape, tensors)
    except QnbError as problem:
        raise BadCheckpoint(f"layer {site.name}: {problem}") from None


def _dumped(arguments: object) -> dict[str, Any] | None:
    return None if arguments is None else arguments.model_dump()


def _status(module: nn.Module) -> str | None:
    """Where in its life compressed-tensors sees the layer: "compressed", "decompressed"; None for others."""
    if getattr(module, "quantization_scheme", None) is None:
        return None
    status = getattr(module, "quantization_status", None)
    return getattr(status, "value", status)


def _matches(model: nn.Module, attribute: str, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in getattr(model, attribute, None) or ())


def _count(model: nn.Module) -> str:
    count = len(quantized_layers(model))
    return f"{count} linear layer{'' if count == 1 else 's'}"
