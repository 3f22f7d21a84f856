"""Kept originals on disk: weights mapped into memory, whose bytes the system reads when somebody looks at them.

Where the model's own checkpoint still holds the very bits (a folder of safetensors that `config.name_or_path` names),
that is mapped; else a safetensors file of our own in a temporary folder (`TMPDIR` says where; a folder that itself lies
in memory saves none). A mapping is private: writing to it changes no file.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import os
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from qnb.errors import BadInput, NotQuantized

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ALIGNMENT = 64  # bytes, of what torch allocates
_MOST_ROOM = 4  # times its own size, that a copy may take to keep its strides
_CHUNK = 1 << 24  # bytes that are compared at a time


class Mapped:
    """A weight in a file: `tensor` is its mapping, `nbytes` its size, `path` the file.

    A copy of a layer shares it; a pickled layer goes without, since its weight is then in memory.
    """

    def __init__(self, weight: Tensor, tensor: Tensor, path: Path, file: _File | None = None) -> None:
        self.tensor, self.path, self._file = tensor, path, file
        self.nbytes = tensor.nbytes
        self._strides, self._misalignment = weight.stride(), weight.data_ptr() % ALIGNMENT
        if file is None:
            weakref.finalize(self, _remove, str(path), os.getpid())

    def check(self, purpose: str) -> None:
        """Raises `NotQuantized` where the checkpoint's file was written to since its bits were verified."""
        if self._file is not None and self._file.changed():
            raise NotQuantized(
                f"{purpose} needs the original layer, which lay in {self.path}: that file was changed meanwhile; load "
                "the model again"
            )

    def verify(self, purpose: str) -> None:
        """The same before the weight is used again: its bits were compared with the file's when it was moved there."""
        self.check(purpose)

    def as_it_lay(self, device: torch.device) -> Tensor | None:
        """A copy laid out as the weight was; None where the mapping lies alike, for products on this device."""
        alike = self.tensor.stride() == self._strides
        if device.type == "cpu":
            alike &= self.tensor.data_ptr() % ALIGNMENT == self._misalignment
        return None if alike or not _keeps_strides(self.tensor.shape, self._strides) else self.in_memory()

    def in_memory(self) -> Tensor:
        """A copy in the host's memory, laid out as the weight was, see `copied`."""
        return copied(self.tensor, self._strides, self._misalignment)

    def __deepcopy__(self, memo: dict) -> Mapped:
        return self

    def __reduce__(self) -> tuple:
        return type(None), ()


def copied(tensor: Tensor, strides: tuple[int, ...], misalignment: int) -> Tensor:
    """A copy in the host's memory with these strides, and so far behind `ALIGNMENT`: both decide a product's last bits.

    Not where elements overlap, or the weight was a piece of something far larger, whose room a copy would take as well.
    """
    if not _keeps_strides(tensor.shape, strides) or (misalignment == 0 and strides == tensor.stride()):
        return tensor.clone()
    room = torch.zeros(_extent(tensor.shape, strides) + ALIGNMENT // tensor.element_size(), dtype=tensor.dtype)
    start = (misalignment - room.data_ptr()) % ALIGNMENT // room.element_size()
    return room.as_strided(tensor.shape, strides, start).copy_(tensor)


def _keeps_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    return 0 not in strides and _extent(shape, strides) <= _MOST_ROOM * math.prod(shape)


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How many elements lie from the first to the last."""
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


class Keeper:
    """Moves weights of one model to disk."""

    def __init__(self, model: nn.Module) -> None:
        self._files = [f for path in _checkpoint(model) if (f := _opened(path)) is not None]

    def keep(self, name: str, weight: Tensor) -> Mapped:
        """The weight of layer `name`, mapped from the checkpoint, else from a file that is written now.

        Raises `BadInput` where no file can be written.
        """
        for file in self._files:
            for start in file.candidates(name, weight):
                if file.holds(start, weight) and (tensor := file.map(start, weight)) is not None:
                    return Mapped(weight, tensor, file.path, file)
        return _write(weight)


class _File:
    """A safetensors file of a checkpoint, held open: what is mapped is this very file, whatever takes its name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: BinaryIO = open(path, "rb", buffering=0)
        self.stamp = _stamp(os.fstat(self._stream.fileno()))
        size = self.stamp[0]
        data = 8 + int.from_bytes(self._stream.read(8), "little")
        if data > size:
            raise ValueError("its header is longer than the file")
        self._tensors: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]] = {}
        for name, about in json.loads(self._stream.read(data - 8)).items():
            if name != "__metadata__" and about["dtype"] in _DTYPES:
                start, end = (data + int(offset) for offset in about["data_offsets"])
                if data <= start <= end <= size:
                    self._tensors[name] = _DTYPES[about["dtype"]], tuple(about["shape"]), start, end

    def changed(self) -> bool:
        """Whether somebody wrote to the file since it was opened."""
        return _stamp(os.fstat(self._stream.fileno())) != self.stamp

    def candidates(self, name: str, weight: Tensor) -> Iterator[int]:
        """Where in the file tensors of this form begin whose name can be the layer's, likely ones first."""
        mine, form = f"{name}.weight", (weight.dtype, tuple(weight.shape))
        for exact in (True, False):
            for theirs, (dtype, shape, start, end) in self._tensors.items():
                # A checkpoint of the body alone lacks the first part of the names, one of a larger model has more.
                alike = theirs.endswith(f".{mine}") or mine.endswith(f".{theirs}")
                if (theirs == mine if exact else alike) and (dtype, shape) == form:
                    if end - start == weight.nbytes and start % weight.element_size() == 0:
                        yield start

    def holds(self, start: int, weight: Tensor) -> bool:
        """Whether the file has the weight's bits there. Read, not mapped: comparing then leaves nothing resident."""
        weight = weight.detach().cpu().contiguous()
        buffer = bytearray(min(_CHUNK, weight.nbytes))
        for done in range(0, weight.nbytes, _CHUNK):
            piece = memoryview(buffer)[: min(_CHUNK, weight.nbytes - done)]
            self._stream.seek(start + done)
            if self._stream.readinto(piece) != len(piece):
                return False
            if piece != (ctypes.c_char * len(piece)).from_address(weight.data_ptr() + done).raw:
                return False
        return not self.changed()

    def map(self, start: int, weight: Tensor) -> Tensor | None:
        """The tensor of the weight's form that begins there; None where another file has taken the name.

        A mapping of its own: one that is written to must not show in another model's.
        """
        storage = torch.UntypedStorage.from_file(str(self.path), False, self.stamp[0])
        return _view(storage, start, weight) if _stamp(os.stat(self.path)) == self.stamp else None


_open_files: weakref.WeakValueDictionary[Path, _File] = weakref.WeakValueDictionary()


def _opened(path: Path) -> _File | None:
    """The file, once for all models that came from it; None where it cannot be read as safetensors."""
    try:
        file = _open_files.get(path)
        if file is None or file.stamp != _stamp(os.stat(path)):
            file = _open_files[path] = _File(path)
        return file
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _stamp(stat: os.stat_result) -> tuple[int, int, int, int]:
    return stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_dev


def _checkpoint(model: nn.Module) -> list[Path]:
    """The safetensors files of the folder that a transformers model was loaded from."""
    for source in (getattr(model, "config", None), model):
        name = getattr(source, "name_or_path", None)
        if isinstance(name, str) and name and os.path.isdir(name):
            return sorted(p.resolve() for p in Path(name).glob("*.safetensors"))
    return []


_numbers = itertools.count()
_folder: str | None = None
_lock = threading.RLock()


def _write(weight: Tensor) -> Mapped:
    global _folder
    kept, path = weight.detach().cpu().contiguous(), None
    # By hand: the library's own writer makes two copies of the weight first.
    kind = next(name for name, dtype in _DTYPES.items() if dtype == kept.dtype)
    about = {"weight": {"dtype": kind, "shape": list(kept.shape), "data_offsets": [0, kept.nbytes]}}
    header = json.dumps(about).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    try:
        with _lock:
            if _folder is None or not os.path.isdir(_folder):
                _folder = tempfile.mkdtemp(prefix="qnb-originals-")
            path = Path(_folder) / f"{next(_numbers)}.safetensors"
            stream = open(path, "xb", buffering=0)
        with stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            left = memoryview((ctypes.c_char * kept.nbytes).from_address(kept.data_ptr()))
            while left:  # one call writes at most 2 GiB
                left = left[stream.write(left) :]
    except BaseException as error:
        if path is not None:
            _remove(str(path), os.getpid())
        if not isinstance(error, OSError):
            raise
        raise BadInput(
            f'keep="disk" cannot write to {tempfile.gettempdir()} ({error}): set TMPDIR to a folder with space, or use '
            'keep="memory"'
        ) from error
    start = 8 + len(header)
    storage = torch.UntypedStorage.from_file(str(path), False, start + kept.nbytes)
    return Mapped(weight, _view(storage, start, kept), path)


def _remove(path: str, owner: int) -> None:
    """Takes a file of our own away, and the folder with the last one. Not in a process that was forked off."""
    if os.getpid() == owner:
        with suppress(OSError):
            os.unlink(path)
        with suppress(OSError):
            os.rmdir(os.path.dirname(path))


def _view(storage: torch.UntypedStorage, start: int, like: Tensor) -> Tensor:
    return torch.empty(0, dtype=like.dtype).set_(storage, start // like.element_size(), like.shape)
