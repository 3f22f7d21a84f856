"""`from_pretrained`: quantizes while it loads, so that a model fits whose floats would not.

Weights that are to be quantized are mapped from the checkpoint's files, not read; their pages are let go of as soon as
a batch of layers has its integers. The files stay the originals: undo and KL read them again, and cost no memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import mmap
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qnb import rounding as roundings
from qnb import schemes
from qnb.errors import BadCheckpoint, BadInput, NotQuantized
from qnb.model.checkpoint.files import Tensors, as_bytes, checkpoint_directory, pieces_of
from qnb.model.checkpoint.loading import fill
from qnb.model.checkpoint.skeleton import model_from, read_config
from qnb.model.disk import ALIGNMENT, copied
from qnb.model.experts import is_block_of_experts
from qnb.model.linear import quantized_layers
from qnb.model.quantize import quantize
from qnb.model.recipe import Recipe
from qnb.model.select import Site, choose, find_sites
from qnb.model.variants import refusal
from qnb.results import one_line
from qnb.schemes import How, Scheme

BATCH_BYTES = 256 * 2**20  # of original weights whose pages are held at a time
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def from_pretrained(
    path: str | os.PathLike,
    scheme: str | Scheme | Recipe,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    **how: Any,
) -> nn.Module:
    """The model of a checkpoint directory, quantized while it loads; in eval mode.

    scheme  as `quantize` takes it, with all its other keywords: layers, skip, rounding, calibration ...
    dtype   what it computes in; None is the type of the files. Codes are chosen from the files' weights either way

    Peak memory is the result and the originals of one batch of layers (256 MiB, or one layer that is larger), where
    nothing needs calibration; with calibration the whole model is mapped, in pages that the system can take back.
    Unless keep="none", the files stay the originals: they must not change, which is noticed, and `restore` compares
    their hash first. Raises `BadCheckpoint` for a directory that is none, is quantized already, or holds a mixture of
    experts, and whatever `quantize` raises.
    """
    if dtype is not None and dtype not in FLOATS:
        raise BadInput(f"dtype={dtype!r}: give torch.float32, torch.bfloat16 or torch.float16")
    directory = checkpoint_directory(path)
    if read_config(directory).get("quantization_config") is not None:
        raise BadCheckpoint(f"{one_line(directory, 100)} is quantized already: qnb.load(path) runs it")
    tensors = Tensors(directory)
    files = {p: _MappedFile(p) for p in tensors.paths}
    stored = next((f.dtype for f in files.values() if f.dtype is not None), torch.float32)
    model = model_from(directory, stored)
    for name, module in model.named_modules():
        if is_block_of_experts(module):
            raise BadCheckpoint(
                f"{name} is a mixture of experts, whose weights are not quantized one by one while they load: load the "
                "model with transformers, then call qnb.quantize"
            )
    sites = _meant(model, scheme, how)
    used = set()
    for site in sites:
        name = f"{site.name}.weight"
        if name in tensors and site.tied is None:
            weight = files[tensors.path_of(name)].tensor(name, tuple(site.module.weight.shape))
            site.module.weight = nn.Parameter(weight, site.module.weight.requires_grad)
            used.add(name)
    for step in fill(model, {}, used, tensors):
        step.do()
    model.config._name_or_path = str(directory)
    for keywords in _batches(sites, scheme, how):
        quantize(model, scheme, **keywords)
        _note_originals(model, files, tensors)
        for file in files.values():
            file.let_go()
        _trim()
    if dtype is not None and dtype != stored:
        model.to(dtype)
    return model.to(device)


class Original:
    """The piece of a checkpoint's file that a layer's original weight is mapped from."""

    def __init__(self, file: _MappedFile, tensor: Tensor) -> None:
        self.tensor, self.path, self._file = tensor, file.path, file
        self.nbytes = tensor.nbytes
        self._digest = _digest(tensor)

    def check(self, purpose: str) -> None:
        """Raises `NotQuantized` where the file was written to since it was opened."""
        if self._file.changed():
            raise NotQuantized(f"{purpose} needs the original layer, which lay in {self.path}: that file was changed")

    def verify(self, purpose: str) -> None:
        """The same by content: raises `NotQuantized` where the bytes are no longer those that were quantized."""
        if _digest(self.tensor) != self._digest:
            raise NotQuantized(
                f"{purpose} needs the original layer, which lay in {self.path}: its hash is not what was quantized"
            )

    def as_it_lay(self, device: torch.device) -> None:
        """None: the weight never lay otherwise."""

    def in_memory(self) -> Tensor:
        """A copy in memory, laid out as in the file."""
        return copied(self.tensor, self.tensor.stride(), self.tensor.data_ptr() % ALIGNMENT)

    def __deepcopy__(self, memo: dict) -> Original:
        return self

    def __reduce__(self) -> tuple:
        return type(None), ()  # a pickled layer has its weight in memory


class _MappedFile:
    """A safetensors file mapped into memory, private: writing to a tensor changes no file."""

    def __init__(self, path: Path) -> None:
        self.path, self._pieces = path, pieces_of(path)
        try:
            self._stream = open(path, "rb")
            self._map = mmap.mmap(self._stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as problem:
            raise BadCheckpoint(f"{path.name} cannot be mapped into memory: {problem.strerror}") from None
        self._stamp = self._now()
        kinds = Counter(piece.dtype for piece in self._pieces.values() if piece.dtype in FLOATS)
        self.dtype = kinds.most_common(1)[0][0] if kinds else None

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The named tensor, whose bytes are read when somebody looks at them."""
        piece = self._pieces[name]
        if piece.dtype not in FLOATS or piece.shape != shape:
            given = f"{str(piece.dtype).removeprefix('torch.')} {piece.shape}"
            raise BadCheckpoint(f"{one_line(name, 100)} is {one_line(given, 60)}, but the model needs floats {shape}")
        count = torch.Size(shape).numel()
        return torch.frombuffer(self._map, dtype=piece.dtype, count=count, offset=piece.start).view(shape)

    def changed(self) -> bool:
        """Whether somebody wrote to the file since it was opened."""
        return self._now() != self._stamp

    def let_go(self) -> None:
        """Gives the pages that were read back to the system, which reads them again when somebody looks."""
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _now(self) -> tuple[int, int]:
        about = os.fstat(self._stream.fileno())
        return about.st_size, about.st_mtime_ns


def _meant(model: nn.Module, scheme: str | Scheme | Recipe, how: dict[str, Any]) -> list[Site]:
    """The layers that will be quantized, as `quantize` chooses them."""
    sites = [site for site in find_sites(model, experts=False) if site.stack is None]
    if isinstance(scheme, Recipe):
        return [site for site in sites if site.name in scheme.layers]
    asked = schemes.find(scheme)
    if asked.grid is None:
        raise BadInput("scheme 'none' quantizes nothing: load the checkpoint with transformers")
    reasons = choose(sites, how.get("layers"), how.get("skip"), refusal(asked, How(how.get("rounding", How.rounding))))
    return [site for i, site in enumerate(sites) if reasons[i] is None]


def _batches(sites: Sequence[Site], scheme: str | Scheme | Recipe, how: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Keywords of one `quantize` after another, each of which names a batch of layers; one for all where it must be."""
    if _needs_inputs(scheme, how):
        yield how
        return
    how = {key: value for key, value in how.items() if key not in ("layers", "skip")}
    names, size = [], 0
    for site in sites:
        more = site.module.weight.nbytes
        if names and size + more > BATCH_BYTES:
            yield {**how, "layers": names}
            names, size = [], 0
        names.append(site.name)
        size += more
    yield {**how, "layers": names}


def _needs_inputs(scheme: str | Scheme | Recipe, how: dict[str, Any]) -> bool:
    """Whether choosing codes runs the model, all of which must then be there."""
    if isinstance(scheme, Recipe) or how.get("smooth") is not None or how.get("calibration") is not None:
        return True
    asked = schemes.find(scheme)
    return asked.calibrated or roundings.find(how.get("rounding", "nearest"), asked).needs != "nothing"


def _note_originals(model: nn.Module, files: dict[Path, _MappedFile], tensors: Tensors) -> None:
    for name, layer in quantized_layers(model).items():
        weight = f"{name}.weight"
        if layer.mapped is None and layer.original is not None and weight in tensors:
            held = layer.original.weight
            mapped = files[tensors.path_of(weight)].tensor(weight, tuple(held.shape))
            if mapped.data_ptr() == held.data_ptr():
                layer.mapped = Original(files[tensors.path_of(weight)], held.data)


def _trim() -> None:
    """Gives freed memory back to the system, which glibc otherwise keeps: as much again as the result."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no such function
        ctypes.CDLL(None).malloc_trim(0)


def _digest(tensor: Tensor) -> bytes:
    return hashlib.blake2b(as_bytes(tensor).numpy(), digest_size=16).digest()
