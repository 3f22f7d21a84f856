"""The original's outputs, against which a changed model is measured.

For a language model the original's last hidden states are kept between evaluations, so that the next one runs the
output embedding alone. They are trusted only while (1) a checksum over the content of every original tensor is the
one they were made under - version counters miss `p.data.mul_()` and do not exist for inference tensors - and (2) the
first text's, computed anew in each evaluation, come out the same bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import weakref
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qnb.model.hooks import hooked
from qnb.model.inputs import Sample, to_device
from qnb.model.linear import QLayer, original_pass, quantized_layers
from qnb.model.subject import check_model, input_device, is_compiled

ITS_OWN_ORIGINAL = "nothing is quantized; the model is its own original"
CACHE_BYTES = 256 * 2**20


class Original:
    """The model that the present one is compared with: its own originals, or a `reference` that the caller names.

    `reason` says why there is none, else it is None.
    """

    def __init__(self, model: nn.Module, reference: nn.Module | None = None) -> None:
        self.model = model if reference is None else check_model(reference)
        layers = quantized_layers(self.model)
        self.reason: str | None = None
        self._pass = contextlib.nullcontext
        if reference is None:
            self._pass = original_pass
            self.reason = _why_none(layers)
        head = _output_embedding(self.model)
        # A compiled model may not notice a hook. A quantized reference's weights have no checksum here.
        cached = self.reason is None and head is not None and not is_compiled(self.model)
        cached = cached and (reference is None or not layers)
        self._head = head if cached else None
        self._checked = False
        self._used: set[bytes] = set()

    def output(self, sample: Sample) -> Any:
        """What the original answers to the sample."""
        device = input_device(self.model)
        with self._pass():
            return self.model(*to_device(sample.args, device), **to_device(sample.kwargs, device))

    def logits(self, sample: Sample) -> Tensor:
        """The original's logits (B, T, V), from its kept hidden states where those can be trusted."""
        key = _key(sample) if self._head is not None else None
        if key is None:
            return logits_of(self.output(sample))
        kept = _kept_for(self.model)
        if not self._checked:
            return self._first(sample, key, kept)
        hidden = kept.get(key)
        if hidden is None:
            return self._run_and_keep(sample, key, kept)
        self._used.add(key)
        with self._pass():
            return self._head(hidden.to(input_device(self.model)))

    def _first(self, sample: Sample, key: bytes, kept: dict[bytes, Tensor]) -> Tensor:
        with _capturing(self._head) as seen:
            logits = logits_of(self.output(sample))
        self._checked = True
        with self._pass():
            # Fails where the model scales or caps its logits behind the output embedding.
            trusted = len(seen) == 1 and torch.equal(self._head(seen[0]), logits)
        if not trusted:
            self._head = None
            kept.clear()
            return logits
        hidden = seen[0].detach().to("cpu", copy=True)
        if key in kept and not torch.equal(kept[key], hidden):
            kept.clear()
        self._keep(key, hidden, kept)
        return logits

    def _run_and_keep(self, sample: Sample, key: bytes, kept: dict[bytes, Tensor]) -> Tensor:
        with _capturing(self._head) as seen:
            logits = logits_of(self.output(sample))
        if len(seen) == 1:
            self._keep(key, seen[0].detach().to("cpu", copy=True), kept)
        return logits

    def _keep(self, key: bytes, hidden: Tensor, kept: dict[bytes, Tensor]) -> None:
        self._used.add(key)
        if key in kept:
            return
        for other in [m for m in _hidden_states if m is not self.model]:
            if _held() + hidden.nbytes > CACHE_BYTES:
                _hidden_states.pop(other, None)
        for old in [k for k in kept if k not in self._used]:
            if _held() + hidden.nbytes > CACHE_BYTES:
                del kept[old]
        if _held() + hidden.nbytes <= CACHE_BYTES:
            kept[key] = hidden

    def check_kept(self) -> None:
        """Drops kept hidden states that were made with other weights. To be called once before the first sample."""
        if self._head is None:
            return
        checksum = _checksum(self.model)
        known = _hidden_states.get(self.model)
        if known is None or known[0] != checksum:
            _hidden_states[self.model] = (checksum, {})


def logits_of(output: Any) -> Tensor | None:
    """`output.logits` or `output["logits"]` where it is a tensor (B, T, V)."""
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) and logits.dim() == 3 else None


_hidden_states: weakref.WeakKeyDictionary[nn.Module, tuple[bytes, dict[bytes, Tensor]]] = weakref.WeakKeyDictionary()


def _kept_for(model: nn.Module) -> dict[bytes, Tensor]:
    known = _hidden_states.get(model)
    return {} if known is None else known[1]


def _held() -> int:
    return sum(hidden.nbytes for _, kept in _hidden_states.values() for hidden in kept.values())


def _why_none(layers: dict[str, QLayer]) -> str | None:
    if not layers:
        return ITS_OWN_ORIGINAL
    for name, layer in layers.items():
        if layer.original is None:
            return f"the original of {name} is not kept: {layer.original_missing}; pass reference=, the original model"
    return None


def _output_embedding(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    if not callable(find):
        return None
    try:
        head = find()
    except (NotImplementedError, AttributeError):
        return None
    return head if isinstance(head, nn.Module) else None


@contextlib.contextmanager
def _capturing(head: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []

    def capture(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if args and isinstance(args[0], Tensor):
            seen.append(args[0])

    with hooked([(head, capture)]):
        yield seen


def _key(sample: Sample) -> bytes | None:
    if sample.args or not all(isinstance(v, Tensor) for v in sample.kwargs.values()):
        return None
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(sample.kwargs.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(_bytes(tensor.cpu().contiguous()))
    return digest.digest()


def _checksum(model: nn.Module) -> bytes:
    """Over the content of every tensor that the original pass reads."""
    digest = hashlib.blake2b(digest_size=16)
    for name, module in model.named_modules():
        if isinstance(module, QLayer):
            module = module.original if module.original is not None else module
        for kind in (module._parameters, module._buffers):
            for own, tensor in kind.items():
                if tensor is not None:
                    digest.update(f"{name}.{own} {tensor.dtype} {tuple(tensor.shape)} {_content(tensor)}".encode())
    return digest.digest()


def _content(tensor: Tensor) -> int:
    tensor = tensor.detach().contiguous()
    if tensor.device.type == "cpu":
        return zlib.crc32(_bytes(tensor))
    # On an accelerator sums of rows and of columns, read as integers, stand for the content: a few bytes travel.
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32}.get(tensor.element_size(), torch.int64)
    if tensor.dim() == 0:
        tensor = tensor.reshape(1)
    numbers = tensor.view(kind).reshape(tensor.shape[0], -1) if tensor.numel() else tensor.new_zeros(1, 1, dtype=kind)
    sums = torch.cat([numbers.sum(0, dtype=torch.int64), numbers.sum(1, dtype=torch.int64)]).cpu()
    return zlib.crc32(_bytes(sums))


def _bytes(tensor: Tensor) -> ctypes.Array:
    # Not numpy: it has no bfloat16, and torch works without it.
    return (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr()) if tensor.nbytes else (ctypes.c_ubyte * 0)()
