"""`torch.ops.qnb.*`: compiled where a library was built, plain torch everywhere else, and which of the two answers.

Importing this package defines the operators and loads the compiled libraries that lie in `qnb/_lib`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import sys
from pathlib import Path

import torch

from qnb.errors import NativeLibraryError
from qnb.ops import reference, schema  # noqa: F401 - importing them defines the operators
from qnb.ops.schema import packed_bytes, packed_codes_bytes, with_gradient

__all__ = [
    "instruction_sets",
    "kernel_for",
    "native_missing",
    "native_version",
    "packed_bytes",
    "packed_codes_bytes",
    "with_gradient",
]

_FOLDER = Path(__file__).parents[1] / "_lib"
_PREFIX, _SUFFIX = {"win32": ("", ".dll"), "darwin": ("lib", ".dylib")}.get(sys.platform, ("lib", ".so"))


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The kernels' library, or None with the reason."""
    kernels, shim = (_FOLDER / f"{_PREFIX}{name}{_SUFFIX}" for name in ("qnb_cpu", "qnb_torch_cpu"))
    if not shim.exists():
        return None, "no compiled library was built: install again with QNB_NATIVE=ON to see why"
    library = ctypes.CDLL(str(kernels))
    library.qnb_isa_error.restype = library.qnb_isa_name.restype = ctypes.c_char_p
    library.qnb_kernel_for_rows.restype = ctypes.c_char_p
    library.qnb_kernel_for_rows.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    if problem := library.qnb_isa_error():
        raise NativeLibraryError(problem.decode())
    torch.ops.load_library(str(shim))
    return library, None


_kernels, native_missing = _load()


def instruction_sets() -> dict[str, str | None]:
    """Each instruction set that qnb knows, best first: None where it can be used, else why not; empty without kernels.

    A ceiling (`QNB_ISA`) is not looked at: it is the user's choice, and no lack of the machine.
    """
    if _kernels is None:
        return {}
    why = ("no kernel was built for it", "this processor or operating system does not have it", None)
    return {_kernels.qnb_isa_name(i).decode(): why[_kernels.qnb_isa_state(i)] for i in range(_kernels.qnb_isa_count())}


# A single row takes another path than many where the instruction set for many is slow to start.
_FEW_ROWS, _MANY_ROWS = 1, 512


def kernel_for(op: str, device: torch.device | str = "cpu") -> str:
    """What runs `op` on `device`: the instruction set of the compiled kernel, or "reference" for plain torch.

    Where one row and many rows are answered by different kernels, both: "amx / avx512vnni", many rows first.
    """
    if _kernels is None or torch.device(device).type != "cpu":
        return "reference"
    both = [_kernels.qnb_kernel_for_rows(op.encode(), m) for m in (_MANY_ROWS, _FEW_ROWS)]
    return " / ".join(dict.fromkeys(name.decode() for name in both)) if all(both) else "reference"


@functools.cache
def native_version() -> str | None:
    """The start of the sha256 of the compiled kernels' library; None where there is none."""
    if _kernels is None:
        return None
    return hashlib.sha256(Path(_kernels._name).read_bytes()).hexdigest()[:16]
