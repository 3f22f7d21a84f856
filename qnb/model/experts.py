"""Mixture-of-experts: blocks whose experts transformers keeps as two 3-D parameters, made of linear layers again.

`Experts` computes what such a block computes, each matrix of each expert an `nn.Linear` over its piece of the 3-D
parameter: so a scheme runs an expert as it runs any linear layer. It stands in the block's place while one of its
layers is quantized, and the block comes back when none is.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from qnb.model.linear import HOOKS, QLinear, forward_with, in_original_pass, moved
from qnb.model.trial import has_forward_of_its_own

_MATRICES = ("gate_up_proj", "down_proj")  # (experts, 2 * intermediate, hidden), (experts, hidden, intermediate)
# What transformers' decorator notes of a class whose layout is the usual one.
_USUAL = {
    "is_concatenated": True,
    "is_transposed": False,
    "has_bias": False,
    "has_gate": True,
    "has_post_expert_norm": False,
    "_is_expert_parallel": False,
}


def is_block_of_experts(module: nn.Module) -> bool:
    """Whether it is a block of experts as 3-D parameters, of the layout that `Experts` computes."""
    own = module._parameters
    if "down_proj" not in own or set(own) != set(_MATRICES) or any(p is None or p.dim() != 3 for p in own.values()):
        return False
    if any(getattr(module, name, None) is not value for name, value in _USUAL.items()):
        return False
    gate = getattr(type(module), "_apply_gate", None)
    if getattr(gate, "__name__", None) != "_default_apply_gate" or not callable(getattr(module, "act_fn", None)):
        return False
    return not has_forward_of_its_own(module)


class Expert(nn.Module):
    """The two linear layers of one expert."""

    def __init__(self, gate_up_proj: nn.Linear, down_proj: nn.Linear) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj


class Experts(nn.Module):
    """A block of experts, expert by expert: its children "0", "1", ... are an `Expert` each.

    `block` is the original, outside torch's registries as a `QLinear`'s original is; None where it was not kept. In the
    original pass it answers itself.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block
        self.__dict__.update({name: getattr(block, name) for name in HOOKS})
        self.act_fn = block.act_fn
        self.count = block.gate_up_proj.shape[0]
        for number in range(self.count):
            parts = (_linear(block._parameters[name], number) for name in _MATRICES)
            self.add_module(str(number), Expert(*parts))
        self.train(block.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (tokens, hidden); of each token, top_k_index says which experts and top_k_weights how much."""
        kept = None if self.block is None or not in_original_pass() else self.block._parameters
        # Not where the model went to another type meanwhile: the layers' own originals follow.
        if kept is not None and kept["down_proj"].dtype == hidden_states.dtype:
            block, device = self.block, hidden_states.device
            given = hidden_states, top_k_index, top_k_weights
            if any(p.device != device for p in kept.values()):
                return forward_with(block, {name: moved(p, p.to(device)) for name, p in kept.items()}, *given)
            return block.forward(*given)
        out = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            if not 0 <= number < self.count:  # nobody's: what a router that drops tokens sends
                continue
            expert = self._modules[str(number)]
            token, place = torch.where(top_k_index == number)
            gate, up = expert.gate_up_proj(hidden_states[token]).chunk(2, dim=-1)
            part = expert.down_proj(self.act_fn(gate) * up) * top_k_weights[token, place, None]
            out.index_add_(0, token, part.to(out.dtype))
        return out

    def originals(self) -> dict[str, tuple[torch.Size, torch.dtype, Tensor | None]]:
        """Shape, type and value of the block's parameters, by name in order; None for values that were not kept."""
        found = {}
        for name in sorted(_MATRICES):
            layer = self._modules["0"]._modules[name]
            shape = torch.Size((self.count, layer.out_features, layer.in_features))
            kept = None if self.block is None else self.block._parameters[name]
            found[name] = shape, self.dtype if kept is None else kept.dtype, kept
        return found

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes."""
        first = self._modules["0"].gate_up_proj
        return first.dtype if isinstance(first, QLinear) else first.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        first = self._modules["0"].gate_up_proj
        return first.device if isinstance(first, QLinear) else first.weight.device

    def follow(self) -> None:
        """Changes the kept block as the model went meanwhile: device, floating type and training flag."""
        weight = self.block.gate_up_proj
        if (weight.dtype, weight.device) != (self.dtype, self.device):
            self.block.to(self.device, self.dtype)
        self.block.train(self.training)


@dataclasses.dataclass(eq=False)
class Stack:
    """A block of experts where it stands: `layers` is what computes it expert by expert, in its place or not yet."""

    layers: Experts
    installed: bool
    places: list[tuple[nn.Module, str]] = dataclasses.field(default_factory=list)


def _linear(stacked: nn.Parameter, number: int) -> nn.Linear:
    n, k = stacked.shape[1:]
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(stacked.detach()[number], requires_grad=stacked.requires_grad)
    return linear
