"""Where the kernels' library lies: QNB_CPU_LIBRARY, else the installed package's, else the source tree's."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

_NAME = {"win32": "qnb_cpu.dll", "darwin": "libqnb_cpu.dylib"}.get(sys.platform, "libqnb_cpu.so")


def kernels_library() -> Path:
    """The path of the library; it need not exist."""
    if named := os.environ.get("QNB_CPU_LIBRARY"):
        return Path(named)
    installed = importlib.util.find_spec("qnb")  # finds the package without importing it
    folders = [Path(p) for p in installed.submodule_search_locations] if installed else []
    found = [folder / "_lib" / _NAME for folder in [*folders, Path(__file__).parents[1] / "qnb"]]
    return next((path for path in found if path.exists()), found[0])
