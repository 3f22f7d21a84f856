"""`report`: one page, complete in itself, of what was done to a model and what it cost."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from qnb.env import describe
from qnb.errors import BadInput
from qnb.measure.profile import Profile
from qnb.measure.sensitivity import Sensitivity
from qnb.model.quantize import layers
from qnb.model.recipe import Recipe
from qnb.model.subject import check_model
from qnb.results import Result, one_line
from qnb.tune.experiment import Experiment
from qnb.tune.search import Search

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px/1.45 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}}
h1,h2{{font-weight:600}}table{{font-size:13px}}img{{max-width:100%}}pre{{overflow-x:auto;font-size:12px}}</style></head>
<body><h1>{title}</h1>{body}</body></html>
"""


def report(model: nn.Module, path: str | Path, *results: Result, title: str | None = None) -> Path:
    """Writes a page of the model's layers, its recipe, this machine, and `results` with their figures.

    results  what qnb gave: profiles, accuracies, sensitivities, searches, experiments; in the order given
    The page fetches nothing and runs no script. Returns its path. Raises BadInput where the file is already there or
    cannot be written, or a result is none of qnb's.
    """
    check_model(model)
    for result in results:
        if not isinstance(result, Result):
            raise BadInput(f"a report shows what qnb measured, not a {type(result).__name__}: give results of qnb")
    path = Path(path)
    if path.exists():
        raise BadInput(f"{one_line(path)} is already there: give another name, or remove it first")
    title = title or f"{type(model).__name__}, quantized by qnb"
    parts = [("The layers", layers(model)._repr_html_())]
    profiles = {f"{i + 1}": r for i, r in enumerate(r for r in results if isinstance(r, Profile))}
    for result in results:
        parts.append((_heading(result), result._repr_html_() + _figure(result)))
    if len(profiles) > 1:
        parts.append(("The profiles side by side", _image(_figures().compare(profiles))))
    parts.append(("This machine", _definitions(describe())))
    parts.append(("The recipe, to do it again", f"<pre>{html.escape(Recipe.of(model).to_json())}</pre>"))
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}" for heading, content in parts)
    try:
        path.write_text(_PAGE.format(title=html.escape(title), body=body), "utf-8")
    except OSError as problem:
        raise BadInput(f"the report cannot be written to {one_line(path)}: {problem.strerror}") from None
    return path


def _heading(result: Result) -> str:
    return type(result).__name__.lower().capitalize()


def _figure(result: Result) -> str:
    if isinstance(result, Sensitivity):
        return _image(_figures().heat_map(result))
    if isinstance(result, Search):
        return _image(_figures().pareto(result))
    if isinstance(result, Experiment) and any(o.accuracy and o.accuracy.kl is not None for o in result.outcomes[1:]):
        return _image(_figures().outcomes(result))
    return ""


def _figures() -> Any:
    from qnb.notebook import figures

    return figures


def _image(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f'<p><img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"></p>'


def _definitions(facts: dict[str, object]) -> str:
    def words(value: object) -> str:
        if isinstance(value, Sequence) and not isinstance(value, str):
            return ", ".join(map(str, value)) or "none"
        return str(value)

    rows = "".join(
        f"<tr><td>{html.escape(k)}&emsp;</td><td>{html.escape(words(v))}</td></tr>" for k, v in facts.items()
    )
    return f"<table>{rows}</table>"
