"""`QLinear` and `QEmbedding`, which run a variant in place of an `nn.Linear` or `nn.Embedding`, and the original pass.

A quantized layer holds the original module outside torch's registries: it is no submodule, so parameters, state dicts
and hooks of the model show the quantized layer alone, while a deep copy takes it along. `QConv1D` is the same in place
of transformers' `Conv1D`, which keeps its weight transposed.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qnb.errors import BadWeights, FrozenWeight, NotQuantized, NotSaveable
from qnb.schemes.base import Variant
from qnb.schemes.plain import build


class _Pass(threading.local):
    original = False


_pass = _Pass()


def in_original_pass() -> bool:
    """Whether this thread computes with originals."""
    return _pass.original


@contextlib.contextmanager
def original_pass() -> Iterator[None]:
    """Inside it, in this thread alone, every quantized layer computes with its original; nothing in a model changes."""
    before, _pass.original = _pass.original, True
    try:
        yield
    finally:
        _pass.original = before


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' `Conv1D` itself: a linear layer whose weight is stored (K, N)."""
    if type(module).__name__ != "Conv1D":
        return False
    # A model can hold one only if somebody has imported it already.
    home = sys.modules.get("transformers.pytorch_utils")
    return home is not None and type(module) is home.Conv1D


def as_matrix(module: nn.Module) -> Tensor:
    """The weight of a layer as (N, K): the parameter itself, or a view of a `Conv1D`'s."""
    return module.weight.T if is_conv1d(module) else module.weight


def forward_with(module: nn.Module, parameters: dict[str, nn.Parameter | None], *args: Tensor) -> Tensor:
    """What the module's forward gives with these parameters; the module, which others may be in, stays as it is."""
    other = copy.copy(module)
    other._parameters = {**module._parameters, **parameters}
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # by parameter: it would keep all of these, each with its cast
    try:
        return other.forward(*args)
    finally:
        torch.set_autocast_cache_enabled(cached)


def moved(parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    """Such a parameter of these values. Whether it is to be trained decides torch's product, also without gradients."""
    return nn.Parameter(values.detach(), parameter.requires_grad)


class QLayer(nn.Module):
    """Runs `variant` where a layer with one weight stood; what `QLinear` and `QEmbedding` share.

    bias, hooks and training flag are those of the original, by reference; `dtype` is the type that `weight` reads as,
    None for that of the original's weight.
    `original` is None where the original was not kept, and `original_missing` says why. `mapped` is the file that the
    original's weight lies in where that was moved to disk.
    """

    def __init__(
        self, original: nn.Module, variant: Variant, keep: bool = True, dtype: torch.dtype | None = None
    ) -> None:
        nn.Module.__init__(self)
        if hasattr(original, "bias"):
            self._parameters["bias"] = original.bias
        # Not attribute by attribute: torch looks at each for modules and parameters, most of what a switch would cost.
        self.__dict__.update(
            training=original.training,
            variant=variant,
            dtype=original.weight.dtype if dtype is None else dtype,
            original=original if keep else None,
            original_missing=None if keep else NOT_KEPT,
            mapped=None,  # the piece of a file that the original's weight lies in, where it does
            captured=[],
        )
        self.share_hooks(original)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight (N, K), made anew at each read: right values, for code that looks from outside.

        It cannot be changed or trained: that raises `FrozenWeight`. In the original pass it is the original's.
        """
        if _pass.original:
            return self._original_weight(self.dtype, self.device)
        warnings.warn(
            "code outside qnb reads .weight of a quantized layer: it gets dequantized values, which is slow",
            stacklevel=2,
        )
        weight = self.variant.dequantize(self.dtype)
        return weight if torch.compiler.is_compiling() else weight.as_subclass(ReadOnlyWeight)

    @weight.setter
    def weight(self, value: object) -> None:
        raise FrozenWeight(_FROZEN)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of every module; an assignment to `.weight` ends here too, and raises `FrozenWeight`."""
        if name == "weight":
            raise FrozenWeight(_FROZEN)
        super().register_parameter(name, param)

    @property
    def scheme(self) -> str:
        """The scheme's name."""
        return self.variant.scheme.name

    @property
    def kernel(self) -> str:
        """What runs it, in a word."""
        return self.variant.kernel()

    def require_original(self, purpose: str) -> nn.Module:
        """The kept original; raises `NotQuantized` where there is none, naming the purpose that needs it."""
        if self.original is None:
            raise NotQuantized(f"{purpose} needs the original layer, which is not kept: {self.original_missing}")
        if self.on_disk:
            self.mapped.check(purpose)
        return self.original

    @property
    def on_disk(self) -> bool:
        """Whether the kept original's weight lies in a file. A copy of the layer has it in memory again."""
        if self.mapped is None or self.original is None:
            return False
        return self.original.weight.data_ptr() == self.mapped.tensor.data_ptr()

    @property
    def device(self) -> torch.device:
        """Where the variant's tensors lie."""
        return next(iter(self.variant.tensors().values())).device

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scheme={self.scheme}, kernel={self.kernel}"

    def _original_forward(self, input: Tensor, as_it_lay: bool = False) -> Tensor:
        """The original's, where and in the type in which the model computes; of a weight on disk laid out as before.

        That is for products, whose last bits depend on it; a lookup does without `as_it_lay`.
        """
        # First of all: it says where the file was changed that is read next.
        original = self.require_original("the original pass")
        laid_out = self.mapped.as_it_lay(input.device) if as_it_lay and self.on_disk else None
        weight = original.weight if laid_out is None else laid_out
        if (weight.device, weight.dtype) != (input.device, self.dtype):
            weight = weight.to(input.device, self.dtype)
        if weight is original.weight:
            return original.forward(input)
        # With this layer's bias: one that was assigned meanwhile, or went to another type, is not the original's.
        return forward_with(original, {**self._parameters, "weight": moved(original.weight, weight)}, input)

    def _original_weight(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        return as_matrix(self.require_original("the original pass")).to(device, dtype)

    def _stay_for_graph(self, variant: Variant) -> None:
        # A captured CUDA graph replays on the addresses of the variant that it saw: that one must outlive a switch.
        if not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
            self.captured.append(variant)

    def share_hooks(self, module: nn.Module) -> None:
        """Changes this layer to have the hooks of `module`: one added to or removed from either acts on both."""
        self.__dict__.update({name: getattr(module, name) for name in HOOKS})

    def _apply(self, fn, recurse: bool = True) -> QLayer:
        """Changes this layer as `.to()` asks: device and `dtype` follow; codes and scales keep their bits."""
        super()._apply(fn, recurse)
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        self.variant = self.variant.to(probe.device)
        self.dtype = probe.dtype  # the original follows when it is put back: until then it keeps its bits
        return self

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        if _called_by_save_pretrained():
            raise NotSaveable(
                "save_pretrained was called on a model quantized by qnb: it would write integers where loading expects "
                "floats; call qnb.save(model, directory), which plain transformers reads, or qnb.restore(model) first"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.variant.plain().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        # Whether inputs are divided is a matter of the weights that come, not of those that are here. Any other name
        # that this variant has not is left to torch, which refuses it: dropped, it would give other weights silently.
        own = dict.fromkeys([*self.variant.plain(), "input_divisor"])
        plain = {name: state_dict[prefix + name] for name in own if prefix + name in state_dict}
        # torch's own loader sees the bias alone; it would count the variant's names as unexpected.
        taken = {prefix + name for name in plain}
        rest = {key: value for key, value in state_dict.items() if key not in taken}
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)
        if self.original is not None and "bias" in self._parameters:  # assign=True puts another one in its place
            self.original._parameters["bias"] = self._parameters["bias"]
        lacking = [name for name in own if name not in plain and name != "input_divisor"]
        missing.extend(prefix + name for name in lacking)
        if lacking:
            return
        try:
            loaded = build(self.variant.scheme, self.variant.how, self.variant.shape, plain).to(self.device)
        except (BadWeights, RuntimeError) as problem:
            errors.append(f"{prefix.removesuffix('.')}: {problem}")
            return
        now, then = loaded.tensors(), self.variant.tensors()
        same = now.keys() == then.keys() and all(torch.equal(t, now[name]) for name, t in then.items())
        self.variant = loaded
        if not same:
            self.__dict__["original"] = None
            self.original_missing = "other weights were loaded over it by load_state_dict"


class QLinear(QLayer, nn.Linear):
    """Runs `variant` where an `nn.Linear` stood, see `QLayer`."""

    def __init__(
        self, original: nn.Module, variant: Variant, keep: bool = True, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(original, variant, keep, dtype)
        self.__dict__.update(zip(("out_features", "in_features"), variant.shape, strict=True))

    def forward(self, input: Tensor) -> Tensor:
        if _pass.original:
            return self._original_forward(input, as_it_lay=True)
        variant = self.variant
        if input.is_cuda:
            self._stay_for_graph(variant)
        device = "cpu" if input.is_cpu else input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        # `self.bias` takes torch half a microsecond; it is needed where something has made the bias no parameter.
        own = self._parameters
        return variant.linear(input, own["bias"] if "bias" in own else self.bias)


class QConv1D(QLinear):
    """Runs `variant` where transformers' `Conv1D` stood.

    Its `weight` reads (K, N), as code that knows a `Conv1D` at this place expects. It is an `nn.Linear` by class and by
    its features, so that peft puts its adapters on it.
    """

    @property
    def nf(self) -> int:
        """Outputs, by the name that a Conv1D has for them."""
        return self.out_features

    @property
    def nx(self) -> int:
        """Inputs, by the name that a Conv1D has for them."""
        return self.in_features

    @property
    def weight(self) -> Tensor:
        """The dequantized weight (K, N), see `QLayer.weight`."""
        return QLayer.weight.fget(self).T

    @weight.setter
    def weight(self, value: object) -> None:
        raise FrozenWeight(_FROZEN)


class QEmbedding(QLayer, nn.Embedding):
    """Looks rows of `variant` up where an `nn.Embedding` stood: only those that are asked for are unpacked.

    (N, K) of the variant are (num_embeddings, embedding_dim).
    """

    def __init__(
        self, original: nn.Embedding, variant: Variant, keep: bool = True, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(original, variant, keep, dtype)
        n, k = variant.shape
        self.__dict__.update(num_embeddings=n, embedding_dim=k, padding_idx=original.padding_idx)
        # As every embedding has them; these three change nothing but training, and a limit on norms is refused.
        self.__dict__.update(max_norm=None, norm_type=original.norm_type, scale_grad_by_freq=False, sparse=False)

    @property
    def kernel(self) -> str:
        """No product's kernel: rows are gathered, and what unpacks them is no choice."""
        return LOOKUP

    def forward(self, input: Tensor) -> Tensor:
        if _pass.original:
            return self._original_forward(input)
        if input.is_cuda:
            self._stay_for_graph(self.variant)
        return self.variant.rows(input.reshape(-1)).to(self.dtype).view(*input.shape, self.embedding_dim)


def class_for(original: nn.Module) -> type[QLayer]:
    """What runs variants in the place of this module."""
    if isinstance(original, nn.Embedding):
        return QEmbedding
    return QConv1D if is_conv1d(original) else QLinear


class ReadOnlyWeight(Tensor):
    """A dequantized weight: what is computed from it is a plain tensor; changing or training it raises.

    It is a copy, so a change would be lost without a word: merging an adapter into it, say.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name, kwargs = func.__name__, kwargs or {}
        first = args[0] if args else next(iter(kwargs.values()), None)
        changes = name in _CHANGES or (name.endswith("_") and not name.endswith("__"))
        if changes and isinstance(first, cls):
            raise FrozenWeight(_FROZEN)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        given = next((a for a in args if isinstance(a, cls)), None)
        if isinstance(result, Tensor) and given is not None and _same_storage(result, given):
            return result.as_subclass(cls)
        return result

    def __deepcopy__(self, memo: dict) -> Tensor:
        return self.as_subclass(Tensor).clone()

    def __reduce_ex__(self, protocol: int) -> tuple:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


_CHANGES = {
    "__set__",
    "__setitem__",
    *(f"__i{op}__" for op in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")),
}
_FROZEN = (
    "the weight of a quantized layer is made of integers, which cannot be changed or trained from outside (merging an "
    "adapter, say): call qnb.restore(model) first, or train the model with qnb.finetune"
)
LOOKUP = "lookup"
NOT_KEPT = 'it was quantized with keep="none"'


def _same_storage(a: Tensor, b: Tensor) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _called_by_save_pretrained() -> bool:
    # Not refused: the adapters that peft saves, by a method of the same name on a class of its own.
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "save_pretrained":
            classes = type(frame.f_locals.get("self")).__mro__
            if any(c.__name__ == "PreTrainedModel" for c in classes):
                return True
        frame = frame.f_back
    return False


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    """Name, module and parent in order, a shared module as often as it occurs."""
    waiting: list[tuple[str, nn.Module, nn.Module | None]] = [("", model, None)]
    while waiting:  # `named_modules`, a generator inside a generator for each level, takes three times as long
        path, module, parent = waiting.pop()
        yield path, module, parent
        if module._modules:
            children = module._modules.items()
            waiting += reversed([(f"{path}.{n}" if path else n, m, module) for n, m in children if m is not None])


def quantized_layers(model: nn.Module) -> dict[str, QLayer]:
    """Every quantized layer of the model by its first name."""
    first: dict[int, tuple[str, QLayer]] = {}
    for name, module, _ in walk(model):
        if isinstance(module, QLayer):
            first.setdefault(id(module), (name, module))
    return dict(first.values())


def held_storages(model: nn.Module) -> tuple[int, int]:
    """(weight_bytes, original_bytes): storages the model holds, each once, and those that only kept originals hold.

    Originals on disk are not among them: see `disk_bytes`.
    """
    layers = quantized_layers(model).values()
    held = [*model.parameters(), *model.buffers(), *(t for q in layers for t in q.variant.tensors().values())]
    held += [t for q in layers for v in q.captured for t in v.tensors().values()]
    kept = [p for q in layers if q.original is not None for p in _in_memory(q)]
    weight, original = _storages(held), _storages(kept)
    return sum(weight.values()), sum(size for key, size in original.items() if key not in weight)


def disk_bytes(model: nn.Module) -> int:
    """Bytes of the kept originals that lie in files, each file's piece once."""
    pieces = {q.mapped.tensor.data_ptr(): q.mapped.nbytes for q in quantized_layers(model).values() if q.on_disk}
    return sum(pieces.values())


def _in_memory(layer: QLayer) -> Iterator[Tensor]:
    away = layer.on_disk
    for name, parameter in layer.original._parameters.items():
        if parameter is not None and not (away and name == "weight"):
            yield parameter


def _storages(tensors) -> dict[tuple, int]:
    sizes = {}
    for t in tensors:
        storage = t.untyped_storage()
        sizes[(t.device, storage.data_ptr() or storage._cdata)] = storage.nbytes()
    return sizes
