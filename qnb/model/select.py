"""Which layers of a model can be quantized, which are meant, and why the others are not."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from qnb.errors import BadInput, LayerRefused
from qnb.model.experts import Experts, Stack, is_block_of_experts
from qnb.model.linear import QLayer, as_matrix, is_conv1d, walk
from qnb.model.trial import has_forward_of_its_own
from qnb.ops.reference import MAX_K
from qnb.results import one_line

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OUTPUT_EMBEDDING = "output embedding, kept unless named"
# What models call the layer that turns hidden states into logits, where get_output_embeddings() does not say.
_OUTPUT_NAMES = {"lm_head", "embed_out", "score", "classifier"}
# These read .weight of their children directly, so that an integer layer would be passed by or be slow.
_READ_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclasses.dataclass
class Site:
    """A linear layer where it stands; `places` are all (parent, attribute) that hold it, several for a shared layer."""

    name: str
    module: nn.Module
    places: list[tuple[nn.Module, str]]
    refused: str | None = None
    kept: str | None = None
    tied: str | None = None
    stack: Stack | None = None  # the block of experts whose matrix it is

    @property
    def alone(self) -> bool:
        """Whether nothing else uses the memory of its weight."""
        return self.tied is None and self.stack is None

    @property
    def names(self) -> tuple[str, ...]:
        """By which patterns find it: its own, and for a matrix of an expert that of the whole block."""
        return (self.name,) if self.block is None else (self.name, self.block)

    @property
    def block(self) -> str | None:
        """The name of the block of experts that it is part of."""
        return None if self.stack is None else self.name.rsplit(".", 2)[0]

    @property
    def embedding(self) -> bool:
        """Whether it looks rows up instead of multiplying."""
        return isinstance(self.module, nn.Embedding)

    @property
    def source(self) -> nn.Module | None:
        """The original layer, also behind a quantized one; None where it is not kept."""
        return self.module.original if isinstance(self.module, QLayer) else self.module

    @property
    def weight(self) -> nn.Parameter | None:
        """The original weight as it is stored; None where it is not kept or no parameter."""
        return None if self.source is None else self.source._parameters.get("weight")

    @property
    def matrix(self) -> torch.Tensor:
        """The original weight as (N, K), also where it is stored transposed. Only where there is one."""
        return as_matrix(self.source)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        if self.embedding:
            return self.module.num_embeddings, self.module.embedding_dim
        if is_conv1d(self.module):
            return self.module.nf, self.module.nx
        return self.module.out_features, self.module.in_features


def is_linear(module: object) -> bool:
    """Whether it is a layer that quantizing is about: an `nn.Linear`, a `QLinear`, or transformers' `Conv1D`."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Module) and is_conv1d(module))


def check_model(model: object) -> None:
    """Raises BadInput for what is no model whose layers can be replaced."""
    if not isinstance(model, nn.Module):
        raise BadInput(f"model is a {type(model).__name__}: give a torch.nn.Module")
    if is_linear(model) or isinstance(model, (nn.Embedding, Experts)) or is_block_of_experts(model):
        kind = type(model).__name__.removeprefix("Q")
        raise BadInput(
            f"model is itself a {kind}, which cannot be replaced from inside: wrap it in torch.nn.Sequential"
        )


def find_sites(model: nn.Module, experts: bool = True) -> list[Site]:
    """Every linear layer and embedding of the model in order, with the reason where it cannot be quantized.

    The matrices of a block of experts are among them. Unless one is quantized they run only once the block's place is
    given to its `stack.layers`, which costs time for each matrix: without `experts` there are only those that run.
    """
    check_model(model)
    sites: dict[int, Site] = {}
    stacks: dict[int, Stack] = {}  # by the id of what stands there, and of each linear layer inside
    owners: dict[int, list[str]] = {}  # of each parameter
    seen: set[int] = set()
    for name, module, parent in walk(model):
        if id(module) not in seen:
            seen.add(id(module))
            source = (module.original if isinstance(module, QLayer) else None) or module
            for own, parameter in source._parameters.items():
                if parameter is not None:
                    owners.setdefault(id(parameter), []).append(f"{name}.{own}" if name else own)
        installed = isinstance(module, Experts)
        if installed or (experts and is_block_of_experts(module)):
            first = id(module) not in stacks
            if first:
                stacks[id(module)] = Stack(module if installed else Experts(module), installed)
            stack = stacks[id(module)]
            stack.places.append((parent, name.rpartition(".")[2]))
            for path, layer, holder in walk(stack.layers) if first else ():
                stacks[id(layer)] = stack
                if not installed and is_linear(layer):
                    place = holder, path.rpartition(".")[2]
                    site = Site(f"{name}.{path}", layer, [place], _refusal(layer, holder), stack=stack)
                    sites[id(layer)] = site
        if is_linear(module) or isinstance(module, nn.Embedding):
            site = sites.setdefault(id(module), Site(name, module, [], stack=stacks.get(id(module))))
            site.places.append((parent, name.rpartition(".")[2]))
            site.refused = site.refused or _refusal(module, parent)
    outputs = _output_modules(model)
    for site in sites.values():
        if site.embedding:
            site.kept = "embedding, kept unless named"
        elif id(site.module) in outputs or site.name.rpartition(".")[2] in _OUTPUT_NAMES:
            site.kept = OUTPUT_EMBEDDING
        elif ".lora_" in f".{site.name}":
            site.kept = "adapter, kept unless named"
        others = [n for n in owners.get(id(site.weight), []) if n != f"{site.name}.weight"]
        site.tied = others[0].removesuffix(".weight") if others else None
    return list(sites.values())


def sites_in_place(model: nn.Module) -> list[Site]:
    """The linear layers that run where they stand: neither matrices of experts nor embeddings."""
    return [site for site in find_sites(model, experts=False) if site.stack is None and not site.embedding]


def choose(
    sites: Sequence[Site],
    layers: str | Iterable[str] | None,
    skip: str | Iterable[str] | None,
    why_not: Callable[[Site], str | None] | None = None,
) -> dict[int, str | None]:
    """Index of a site -> None where it is meant, else the reason that it is skipped.

    `layers` and `skip` are names or globs; `why_not(site)` says why a layer is refused. The output
    embedding and adapters are meant only by their exact names.
    Raises `LayerRefused` where a pattern matches nothing, or the exact name of a layer that cannot be quantized.
    """
    names = list(dict.fromkeys(name for site in sites for name in site.names))
    wanted, unwanted = _patterns(layers, "layers", names), _patterns(skip, "skip", names)
    reasons: dict[int, str | None] = {}
    for i, site in enumerate(sites):
        refused = site.refused
        if refused is None and why_not is not None:
            refused = why_not(site)
        exact = wanted is not None and site.name in wanted
        if wanted is not None and not _matches(site, wanted):
            reasons[i] = "not asked for"
        elif unwanted is not None and _matches(site, unwanted):
            reasons[i] = "skipped as asked"
        elif refused and exact:
            raise LayerRefused(f"layer {site.name} cannot be quantized: {refused}")
        elif refused:
            reasons[i] = refused
        elif site.kept and not exact:
            reasons[i] = site.kept
        else:
            reasons[i] = None
    if all(reason is not None for reason in reasons.values()):
        why = "; ".join(f"{sites[i].name}: {reason}" for i, reason in reasons.items() if reason != "not asked for")
        raise LayerRefused(f"no layer is left to change: {one_line(why, 300) or 'the model has no Linear'}")
    return reasons


def _refusal(module: nn.Module, parent: nn.Module) -> str | None:
    if isinstance(module, QLayer):
        return None
    if isinstance(parent, _READ_WEIGHTS):
        return f"{type(parent).__name__} reads .weight of its layers directly"
    if parametrize.is_parametrized(module):
        return "parametrized: call torch.nn.utils.parametrize.remove_parametrizations first"
    usual = nn.Embedding if isinstance(module, nn.Embedding) else nn.Linear
    own = not is_conv1d(module) and type(module).forward is not usual.forward
    if own or has_forward_of_its_own(module):
        return f"{type(module).__name__} has a forward of its own"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "it limits the norms of its rows, which changes its weight at each look"
    if module._parameters.get("weight") is None:
        return "its weight is no parameter (weight_norm, pruning?): make it one first"
    if isinstance(module.weight, UninitializedParameter):
        return "its weight is not initialized: run the model once first"
    if module.weight.dtype not in _DTYPES:
        return f"its weight is {module.weight.dtype}: qnb quantizes float32, bfloat16 and float16"
    shape = tuple(as_matrix(module).shape)
    if shape[1] > MAX_K:
        return f"it has {shape[1]} inputs: above {MAX_K} a sum of 8-bit products can leave 32 bits"
    if not module.weight.numel():
        return f"its weight is empty: {shape}"
    return None


def _output_modules(model: nn.Module) -> set[int]:
    get = getattr(model, "get_output_embeddings", None)
    try:
        output = get() if callable(get) else None
    except (NotImplementedError, AttributeError):  # encoders raise where they have none
        output = None
    return set() if output is None else {id(output)}


def _patterns(given: str | Iterable[str] | None, keyword: str, names: Sequence[str]) -> list[str] | None:
    if given is None:
        return None
    patterns = [given] if isinstance(given, str) else list(given)
    if not patterns:
        raise BadInput(f"{keyword} is empty: give names or globs of layers, or leave it out")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise BadInput(f"{keyword} holds a {type(pattern).__name__}: give names or globs of layers as strings")
        if not any(fnmatchcase(n, pattern) for n in names):
            close = difflib.get_close_matches(pattern, names, 1, 0.4) or list(names[:1])
            example = f", for example {close[0]}" if close else ""
            raise LayerRefused(f"{keyword} {pattern!r} matches none of the model's {len(names)} layers{example}")
    return patterns


def _matches(site: Site, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, p) for name in site.names for p in patterns)
