"""What tells one model, one machine, one set of calibration data from another: hashes and versions for recipes."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qnb import env, ops
from qnb.model.experts import Experts
from qnb.model.linear import QConv1D, QLayer, quantized_layers

_SAMPLES = 64  # values of each tensor, spread evenly over it
_calibrations: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()


def of_model(model: nn.Module) -> dict[str, Any]:
    """Class, and hashes of structure (names and shapes), types and sampled values of the original parameters.

    `values` is None where an original was not kept, and `unavailable` says so. Cheap: it reads 64 values of a tensor.
    """
    structure, types, values = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    missing = None
    for name, shape, dtype, tensor in _originals(model):
        structure.update(json.dumps([name, list(shape)]).encode())
        types.update(json.dumps([name, str(dtype)]).encode())
        if tensor is None or tensor.is_meta:
            missing = missing or name
        else:
            values.update(name.encode() + _sampled(tensor))
    found = {
        "class": type(model).__name__,
        "structure": structure.hexdigest(),
        "types": types.hexdigest(),
        "values": None if missing else values.hexdigest(),
    }
    if missing:
        found["unavailable"] = f"the original of {missing} is not kept"
    return found


def of_data(data: object) -> str | None:
    """sha256 of calibration data: strings, numbers, tensors, and lists and mappings of them, in their order.

    None for anything else: a data loader that shuffles has no hash.
    """
    digest = hashlib.sha256()
    try:
        _update(digest, data)
    except TypeError:
        return None
    return digest.hexdigest()


def note_calibration(model: nn.Module, data: object) -> None:
    """Remembers on what data the model's layers were calibrated last."""
    _calibrations[model] = of_data(data)


def noted_calibration(model: nn.Module) -> str | None:
    """The hash of what the model was calibrated on last; None where it was not, or the data has no hash."""
    return _calibrations.get(model)


def of_machine(model: nn.Module) -> dict[str, Any]:
    """Processor, versions, and which kernel answers for each quantized layer's operator."""
    kernels = sorted({f"{q.scheme}: {q.variant.kernel()}" for q in quantized_layers(model).values()})
    return {"cpu": env.cpu_name(), "platform": platform.machine(), "kernels": kernels}


def versions() -> dict[str, str | None]:
    """Of qnb, torch and the compiled kernels; None where there are no compiled kernels."""
    return {"qnb": sys.modules["qnb"].__version__, "torch": torch.__version__, "kernels": ops.native_version()}


def _originals(model: nn.Module) -> Iterator[tuple[str, torch.Size, torch.dtype, Tensor | None]]:
    apart: set[int] = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if id(module) in apart:
            continue
        if isinstance(module, Experts):  # named and shaped as the block that it stands for
            apart |= {id(part) for part in module.modules()}
            yield from ((prefix + name, *about) for name, about in module.originals().items())
            continue
        own: dict[str, Tensor | None] = module._parameters
        if isinstance(module, QLayer) and module.original is not None:
            own = module.original._parameters
        found = {name: (p.shape, p.dtype, p) for name, p in own.items() if p is not None}
        if isinstance(module, QLayer) and module.original is None:
            n, k = module.variant.shape
            found["weight"] = torch.Size((k, n) if isinstance(module, QConv1D) else (n, k)), module.dtype, None
        for name in sorted(found):
            yield prefix + name, *found[name]


def _sampled(tensor: Tensor) -> bytes:
    count = tensor.numel()
    if not count:
        return b""
    # Arithmetic on whole numbers: a float step would round differently in very large tensors.
    wanted = min(_SAMPLES, count)
    flat = torch.tensor([i * count // wanted for i in range(wanted)])
    places = []
    for size in reversed(tensor.shape):
        places.append(flat % size)
        flat = flat // size
    values = tensor.detach()[tuple(p.to(tensor.device) for p in reversed(places))]
    return values.cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def _update(digest: Any, data: object) -> None:
    if isinstance(data, str):
        digest.update(b"s" + len(data).to_bytes(8, "little") + data.encode("utf-8", "surrogatepass"))
    elif isinstance(data, Tensor):
        digest.update(f"t{data.dtype}{tuple(data.shape)}".encode())
        digest.update(data.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(data, Mapping):
        digest.update(b"m")
        for key in sorted(data, key=str):
            _update(digest, str(key))
            _update(digest, data[key])
    elif isinstance(data, (list, tuple)):
        digest.update(b"l" + len(data).to_bytes(8, "little"))
        for item in data:
            _update(digest, item)
    elif data is None or isinstance(data, (bool, int, float)):
        digest.update(f"n{type(data).__name__}{data!r}".encode())
    else:
        raise TypeError(f"a {type(data).__name__} has no hash that lasts")
