"""Directories and safetensors: read with every name checked, written aside and renamed when whole."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qnb.errors import BadCheckpoint, NotSaveable
from qnb.model import strict_json
from qnb.results import one_line

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Tensors:
    """The tensors in a checkpoint's safetensors, by name, read one at a time.

    Raises `BadCheckpoint` for a directory that holds none, and for an index and files that contradict each other.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, Path] = {}
        self._open: dict[Path, dict[str, Piece]] = {}
        index = directory / INDEX
        listed = _listed(directory, index) if index.is_file() else None
        for path in sorted(set(listed.values())) if listed else [_single(directory)]:
            for name in self._pieces(path):
                if name in self._files:
                    raise BadCheckpoint(f"tensor {one_line(name, 80)} stands in two files of the checkpoint")
                if listed is None or listed.get(name) == path:
                    self._files[name] = path
        if listed is not None and (lost := [name for name in listed if name not in self._files]):
            raise BadCheckpoint(
                f"the checkpoint lacks {len(lost)} tensors that its index names, first {one_line(lost[0], 80)}"
            )

    @property
    def names(self) -> list[str]:
        """All of them."""
        return list(self._files)

    @property
    def paths(self) -> list[Path]:
        """The files, in order."""
        return sorted(set(self._files.values()))

    def path_of(self, name: str) -> Path:
        """The file that holds the tensor."""
        return self._files[name]

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> Tensor:
        """A tensor of its own memory: what safetensors hands out is a view of the file, and changes with it."""
        path = self._files[name]
        piece = self._pieces(path)[name]
        buffer = bytearray(piece.nbytes)
        try:
            with open(path, "rb") as file:
                file.seek(piece.start)
                read = file.readinto(buffer)
        except OSError as problem:
            raise BadCheckpoint(f"{path.name} cannot be read: {problem.strerror}") from None
        if read != piece.nbytes:
            raise BadCheckpoint(f"{path.name} became shorter while it was read")
        if not buffer:
            return torch.empty(piece.shape, dtype=piece.dtype)
        return torch.frombuffer(buffer, dtype=piece.dtype).view(piece.shape)

    def _pieces(self, path: Path) -> dict[str, Piece]:
        if path not in self._open:
            self._open[path] = pieces_of(path)
        return self._open[path]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Where in its file a tensor's bytes begin, and what they are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def pieces_of(path: Path) -> dict[str, Piece]:
    """The tensors of a safetensors file; raises `BadCheckpoint` for one that is not whole, or of unknown types."""
    try:
        with safe_open(str(path), framework="pt", device="cpu"):
            pass  # safetensors itself has checked sizes, overlaps and holes now
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError, RecursionError) as problem:
        raise BadCheckpoint(f"{path.name} is no whole safetensors file: {one_line(problem)}") from None
    found = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        if about["dtype"] not in _TYPES:
            raise BadCheckpoint(f"tensor {one_line(name, 80)} is of type {about['dtype']}, which is not read")
        found[name] = Piece(_TYPES[about["dtype"]], tuple(about["shape"]), 8 + size + about["data_offsets"][0])
    return found


def checkpoint_directory(given: str | os.PathLike) -> Path:
    """The directory; raises `BadCheckpoint` where it is none."""
    try:
        directory = Path(given)
    except TypeError:
        raise BadCheckpoint(
            f"a checkpoint is given as a path, not as {one_line(repr(given), 60)} of type {type(given).__name__}"
        ) from None
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "does not exist"
        raise BadCheckpoint(f"{one_line(given, 100)} {what}: give the directory of a checkpoint")
    return directory


def _single(directory: Path) -> Path:
    path = directory / WEIGHTS
    if path.is_file():
        return path
    pickled = [p.name for p in directory.iterdir() if p.suffix in _PICKLES]
    if pickled:
        raise BadCheckpoint(
            f"{one_line(directory, 100)} holds {one_line(pickled[0], 60)}, a pickle, which can run code when read: "
            "qnb reads safetensors alone; save it again as such"
        )
    raise BadCheckpoint(f"{one_line(directory, 100)} is no checkpoint: it holds neither {WEIGHTS} nor {INDEX}")


def _listed(directory: Path, index: Path) -> dict[str, Path]:
    weight_map = strict_json.read(index, BadCheckpoint, "index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadCheckpoint(f"index {index.name} has no 'weight_map' of tensor names")
    found = {}
    for name, file in weight_map.items():
        # A name that leads out of the directory would read any file of the machine.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise BadCheckpoint(f"index {index.name} names the file {one_line(repr(file), 60)}: that is none beside it")
        found[name] = directory / file
    for path in set(found.values()):
        if not path.is_file():
            raise BadCheckpoint(f"the checkpoint lacks the file {one_line(path.name, 80)} that its index names")
    return found


def check_target(directory: str | os.PathLike) -> Path:
    """Where a checkpoint is to be written; raises `NotSaveable` where something is there already."""
    try:
        target = Path(directory)
    except TypeError:
        raise NotSaveable(f"directory is a {type(directory).__name__}: give a path") from None
    if os.path.lexists(target):
        raise NotSaveable(f"{one_line(target, 100)} exists already: choose another name, or remove it first")
    if not target.parent.is_dir():
        raise NotSaveable(f"{one_line(target.parent, 100)} is no directory: make it first")
    return target


@contextlib.contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A new directory beside `target`, which takes that name when the block ends, and is gone if it fails.

    Raises `NotSaveable` where files cannot be written, a full disk among the reasons.
    """
    aside = None
    try:
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
        yield aside
        for path in aside.iterdir():
            _settle(path)
        umask = os.umask(0)
        os.umask(umask)
        aside.chmod(0o777 & ~umask)  # mkdtemp lets its owner alone in
        check_target(target)
        os.rename(aside, target)
    except (OSError, SafetensorError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise NotSaveable(
            f"{one_line(target, 100)} cannot be written ({one_line(reason)}): nothing of it is left behind"
        ) from problem
    finally:
        if aside is not None and aside.exists():
            shutil.rmtree(aside, ignore_errors=True)


def write_tensors(directory: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Writes named tensors as transformers does: one file, or several with an index once `shard_bytes` are passed.

    No more than one file's tensors are held at a time.
    """
    shards: list[list[str]] = []
    total = 0
    for shard in _shards(tensors, shard_bytes):
        save_file(shard, directory / _part(len(shards)), metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(t.nbytes for t in shard.values())
    if len(shards) == 1:
        os.rename(directory / _part(0), directory / WEIGHTS)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        os.rename(directory / _part(number), directory / file)
        weight_map.update(dict.fromkeys(names, file))
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, value: object) -> None:
    """Writes it with sorted keys, so that the same content gives the same bytes."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", "utf-8")


def _shards(tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    held: set[int] = set()  # where the shard's tensors begin
    size = 0
    for name, tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes or tensor.data_ptr() in held:
            tensor = tensor.clone()  # safetensors refuses what is shared
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, held, size = {}, set(), 0
        shard[name] = tensor
        held.add(tensor.data_ptr())
        size += tensor.nbytes
    yield shard


def _part(number: int) -> str:
    return f"part-{number}.safetensors"


def _settle(path: Path) -> None:
    """On the disk itself: a rename must not outlive a crash that the contents do not."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def as_bytes(tensor: Tensor) -> Tensor:
    """u8 (n,): the tensor's memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
