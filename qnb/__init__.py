"""Quantize a model layer by layer in a notebook, see at once what that did to it, and undo it exactly.

The public names are imported when they are first used, so that `import qnb` and `%load_ext qnb` cost next to nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> where it lives. No name equals that of a module in this folder: importing that would take its place.
_HOME = {
    "quantize": "qnb.model.quantize",
    "restore": "qnb.model.quantize",
    "layers": "qnb.model.quantize",
    "dry_run": "qnb.model.dry_run",
    "Recipe": "qnb.model.recipe",
    "save": "qnb.model.checkpoint.saving",
    "load": "qnb.model.checkpoint.loading",
    "attach": "qnb.model.checkpoint.loading",
    "from_pretrained": "qnb.model.checkpoint.streaming",
    "evaluate": "qnb.measure.accuracy",
    "profile": "qnb.measure.profile",
    "check": "qnb.measure.budget",
    "doctor": "qnb.measure.doctor",
    "monitor": "qnb.measure.monitor",
    "sensitivity": "qnb.measure.sensitivity",
    "search": "qnb.tune.search",
    "experiment": "qnb.tune.experiment",
    "report": "qnb.notebook.report",
    "panel": "qnb.notebook.panel",
    "demo_lm": "qnb.demo",
    "demo_texts": "qnb.demo",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qnb' has no attribute {name!r}: its names are {', '.join(_HOME)}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


def load_ipython_extension(shell: Any) -> None:
    """`%load_ext qnb`: adds %quantize, %qprofile, %%qprofile, %qcheck and %qpanel to the shell. Changes the shell."""
    from qnb.notebook import magics

    magics.load(shell)


def unload_ipython_extension(shell: Any) -> None:
    """`%unload_ext qnb`: takes them out again. Changes the shell."""
    from qnb.notebook import magics

    magics.unload(shell)
