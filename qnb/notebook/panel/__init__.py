"""The live panel of a model: a map of its layers to change, and figures and words that follow each change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from qnb.errors import QnbError

if TYPE_CHECKING:
    from torch import nn

    from qnb.notebook.panel.view import Panel

__all__ = ["panel"]


class _MissingWidgets(QnbError, ImportError):
    """ipywidgets or anywidget, which the panel is made of, is not installed."""


def panel(
    model: nn.Module,
    tokenizer: Any = None,
    texts: Iterable | None = None,
    *,
    prompt: str | None = None,
    new_tokens: int = 32,
    tokens: int = 2000,
    metric: Callable[[nn.Module], float] | None = None,
    variable: str | None = None,
) -> Panel:
    """The live panel of a model; what is done in it changes `model`, and can be undone exactly.

    tokenizer, texts  as for `qnb.evaluate`; the demo model brings its own
    prompt            what original and present model continue, by `new_tokens` tokens; by default the start of a text
    tokens            accuracy is measured on the first texts that hold so many tokens, each cut to 256
    metric            a measure of your own, a function of the model, higher is better
    variable          the name of the variable that holds the model, for the code that the panel offers

    Panels on one model share their steps and figures; the last texts, prompt and metric that were given hold for all.
    Raises BadInput for what cannot be shown, QnbError (also an ImportError) without ipywidgets or anywidget.
    """
    try:
        from qnb.notebook.panel.view import Panel
    except ImportError as error:
        raise _MissingWidgets(
            f'the panel needs ipywidgets and anywidget, which do not import ({error}): pip install "qnb[notebook]"'
        ) from error
    from qnb.notebook.panel.session import session_of
    from qnb.notebook.panel.stages import Asked

    session = session_of(model)
    if session.stages.sizes != (tokens, new_tokens) or any(given is not None for given in (texts, prompt, metric)):
        session.use(Asked(tokenizer, texts, tokens, prompt, new_tokens, metric))
    return Panel(session, variable or _variable_of(model))


def _variable_of(model: nn.Module) -> str:
    """The name that the notebook has for the model."""
    from IPython import get_ipython

    shell = get_ipython()
    names = [] if shell is None else [n for n, v in shell.user_ns.items() if v is model and not n.startswith("_")]
    return names[0] if names else "model"
