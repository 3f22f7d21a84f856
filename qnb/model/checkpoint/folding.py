"""Smoothing moved out of the layers: divisors of inputs folded into whatever computes those inputs.

Inside a layer the divisor costs nothing outside it. A checkpoint for other programs has no place for one, so it is
divided out of the preceding norm, or of the rows of the preceding layer. Layers that read the same norm must share a
divisor then: where theirs differ, one is agreed on and their codes are chosen anew from the originals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qnb import rounding as roundings
from qnb.errors import NotSaveable, QnbError
from qnb.model.linear import QLinear
from qnb.schemes import Inputs, Variant
from qnb.schemes.coded import CodedVariant

# Decoders whose blocks are known to be norm -> q, k, v -> o and norm -> gate, up -> down, the norm a plain product.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclasses.dataclass(frozen=True)
class Edge:
    """`giver` computes what `takers` read: channel c of their input is the giver's output `source[c]`."""

    giver: str
    takers: tuple[str, ...]
    source: Tensor


@dataclasses.dataclass
class Folded:
    """What is to be saved in place of what the model holds: variants of quantized layers, other tensors by name."""

    variants: dict[str, Variant]
    tensors: dict[str, Tensor]
    anew: list[str]  # layers whose codes were chosen again


def divided_layers(model: nn.Module) -> list[str]:
    """Quantized layers that divide their inputs."""
    return [name for name, m in model.named_modules() if isinstance(m, QLinear) and _divisor(m) is not None]


def fold(model: nn.Module) -> Folded:
    """The model's divisors folded, in copies; `model` stays as it is.

    Raises `NotSaveable`, naming the layer, where a divisor has nowhere to go.
    """
    modules, folded = dict(model.named_modules()), Folded({}, {}, [])
    waiting = set(divided_layers(model))
    for edge in _edges(model, modules):
        if waiting & set(edge.takers):
            _fold_edge(modules, edge, folded)
            waiting -= set(edge.takers)
    if waiting:
        raise NotSaveable(
            f"layer {sorted(waiting)[0]} divides its inputs (smoothing), and nothing is known to take that over: "
            'save with format="qnb", which keeps it in the layer'
        )
    return folded


def _fold_edge(modules: Mapping[str, nn.Module], edge: Edge, folded: Folded) -> None:
    divisors = [_divisor(modules[name]) for name in edge.takers]
    k = len(edge.source)
    each = torch.stack([torch.ones(k) if d is None else d.cpu() for d in divisors])
    shared = _agreed(each, edge, modules)
    for name, own in zip(edge.takers, each, strict=True):
        module, divisor = modules[name], shared[edge.source]
        if not isinstance(module, QLinear):
            folded.tensors[f"{name}.weight"] = (module.weight.detach().float().cpu() * divisor).to(module.weight.dtype)
            continue
        variant = module.variant
        if not torch.equal(own, divisor):
            variant = _anew(name, module, divisor)
            folded.anew.append(name)
        folded.variants[name] = dataclasses.replace(variant, inputs=dataclasses.replace(variant.inputs, divisor=None))
    giver = modules[edge.giver]
    if isinstance(giver, QLinear):
        folded.variants[edge.giver] = _rows_divided(edge.giver, folded.variants.get(edge.giver, giver.variant), shared)
    else:
        name = f"{edge.giver}.weight"
        weight = folded.tensors.get(name, giver.weight.detach()).float().cpu()
        rows = shared if weight.ndim == 1 else shared.unsqueeze(1)
        folded.tensors[name] = (weight / rows).to(giver.weight.dtype)
    if getattr(giver, "bias", None) is not None:
        folded.tensors[f"{edge.giver}.bias"] = (giver.bias.detach().float().cpu() / shared).to(giver.bias.dtype)


def _agreed(each: Tensor, edge: Edge, modules: Mapping[str, nn.Module]) -> Tensor:
    """f32 (outputs of the giver,): one divisor for all that read a channel.

    For SmoothQuant the smallest, which is what the paper's formula gives for the layers taken as one: the largest
    weight of all divides. For others the geometric mean.
    """
    outputs = int(edge.source.max()) + 1
    smooth = any(
        getattr(modules[name], "scheme", None) and modules[name].variant.how.smooth is not None for name in edge.takers
    )
    columns = each.amin(0) if smooth else each.log().mean(0).exp()
    if (each == each[0]).all():
        columns = each[0]
    index = edge.source
    low = torch.full((outputs,), torch.inf).scatter_reduce(0, index, columns, "amin")
    high = torch.zeros(outputs).scatter_reduce(0, index, columns, "amax")
    if smooth or torch.equal(low, high):
        return low
    total = torch.zeros(outputs).index_add(0, index, columns.log())
    return (total / torch.bincount(index, minlength=outputs)).exp()


def _anew(name: str, layer: QLinear, divisor: Tensor) -> CodedVariant:
    """Codes of the original times another divisor, by the layer's own rounding; what awq chose was the divisor, so
    that its codes are the nearest ones again.
    """
    variant = layer.variant
    how, scheme = variant.how, variant.scheme
    if scheme.static:
        raise NotSaveable(
            f"layer {name} shares its input with others of another divisor, and its fixed activation range was "
            'calibrated for its own: save with format="qnb", or smooth without -static'
        )
    try:
        rounding = roundings.find("nearest" if how.rounding == "awq" else how.rounding, scheme)
        original = layer.require_original(f"folding the divisor of {name}")
    except QnbError as problem:
        raise NotSaveable(f'{problem}; or save with format="qnb"') from None
    if rounding.needs != "nothing":
        raise NotSaveable(
            f"layer {name} shares its input with others of another divisor, so its codes must be chosen anew, and "
            f'rounding {how.rounding} would need its calibration for that: save with format="qnb"'
        )
    weight = original.weight.detach()
    rounded = rounding.choose(weight.float() * divisor.to(weight.device), scheme.grid, weight.dtype, None)
    return scheme.variant(rounded, how, Inputs())


def _rows_divided(name: str, variant: Variant, divisor: Tensor) -> CodedVariant:
    """The same codes, each row's scales divided: exact but for rounding the scales to their type."""
    if not isinstance(variant, CodedVariant) or variant.scheme.grid.group < 0:
        raise NotSaveable(
            f"layer {name} ({variant.scheme.name}) has one scale for all rows, which cannot take over the divisor of "
            'the layer behind it: save with format="qnb"'
        )
    levels = variant.levels
    scale = (levels.scale / divisor.to(levels.scale.device).unsqueeze(1)).to(levels.scale_dtype).float()
    return dataclasses.replace(variant, levels=dataclasses.replace(levels, scale=scale))


def _edges(model: nn.Module, modules: Mapping[str, nn.Module]) -> Sequence[Edge]:
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in FAMILIES:
        return []
    edges = []
    for name, block in modules.items():
        attention, mlp = getattr(block, "self_attn", None), getattr(block, "mlp", None)
        if not all(hasattr(block, part) for part in ("input_layernorm", "post_attention_layernorm")):
            continue
        attn, ffn = f"{name}.self_attn", f"{name}.mlp"
        if all(hasattr(attention, f"{c}_proj") for c in "qkvo"):
            hidden = torch.arange(attention.q_proj.in_features)
            edges.append(Edge(f"{name}.input_layernorm", tuple(f"{attn}.{c}_proj" for c in "qkv"), hidden))
            # Each key-value head feeds the channels of several query heads.
            size = attention.head_dim
            repeat = attention.o_proj.in_features // attention.v_proj.out_features
            channel = torch.arange(attention.o_proj.in_features)
            source = channel // size // repeat * size + channel % size
            edges.append(Edge(f"{attn}.v_proj", (f"{attn}.o_proj",), source))
        if all(hasattr(mlp, f"{c}_proj") for c in ("gate", "up", "down")):
            hidden = torch.arange(mlp.up_proj.in_features)
            edges.append(Edge(f"{name}.post_attention_layernorm", (f"{ffn}.gate_proj", f"{ffn}.up_proj"), hidden))
            edges.append(Edge(f"{ffn}.up_proj", (f"{ffn}.down_proj",), torch.arange(mlp.down_proj.in_features)))
    return edges


def _divisor(module: nn.Module) -> Tensor | None:
    variant = module.variant if isinstance(module, QLinear) else None
    base = getattr(variant, "base", variant)
    return None if base is None else base.inputs.divisor
