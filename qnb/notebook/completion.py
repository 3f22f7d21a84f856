"""Tab completion of the magics' words: flags, schemes, roundings, layers' names, and the variables that fit a flag."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qnb.notebook import words

Test = Callable[[object], bool]


def is_model(value: object) -> bool:
    """Whether MODEL may name it."""
    from torch import nn

    return isinstance(value, nn.Module)


def is_profile(value: object) -> bool:
    """Whether `--vs` may name it."""
    from qnb.measure.profile import Profile

    return isinstance(value, Profile)


def _is_tokenizer(value: object) -> bool:
    return callable(value) and hasattr(value, "decode") and not isinstance(value, type)


def _is_texts(value: object) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(v, str) for v in value[:4])


def _is_metric(value: object) -> bool:
    return callable(value) and not is_model(value) and not _is_tokenizer(value)


def _is_recipe(value: object) -> bool:
    from qnb.model.recipe import Recipe

    return isinstance(value, Recipe)


def _is_data(value: object) -> bool:
    from torch import Tensor

    return isinstance(value, (Tensor, Mapping, list, tuple))


_FITS: dict[str, Test] = {
    "--tokenizer": _is_tokenizer,
    "--texts": _is_texts,
    "--calibration": _is_texts,
    "--inputs": _is_data,
    "--metric": _is_metric,
    "--reference": is_model,
    "--vs": is_profile,
}


def variables(namespace: Mapping[str, Any], fits: Test) -> list[str]:
    """Names of the variables whose value fits, without those that Python hides and IPython's own records."""
    own = ("In", "Out", "exit", "quit", "get_ipython", "open")
    return sorted(n for n, value in namespace.items() if not n.startswith("_") and n not in own and fits(value))


class Completer:
    """One magic's completer, for `shell.set_hook("complete_command", ...)`."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._arguments = {flag: a for a in parser._actions for flag in a.option_strings}
        self._positionals = [a.dest for a in parser._actions if not a.option_strings]

    def __call__(self, shell: Any, event: SimpleNamespace) -> list[str]:
        """What may stand at the cursor. `event.symbol` is the part of the word that IPython will replace."""
        line = event.text_until_cursor
        done, _, word = line.rpartition(" ")
        word = word.lstrip("\"'")
        names = self._candidates(done.split()[1:], word, shell.user_ns)
        # IPython cuts a word at a star or a quote and replaces only what follows.
        kept = len(word) - len(event.symbol)
        return sorted(name[kept:] for name in names if name.startswith(word)) if kept >= 0 else []

    def _candidates(self, done: list[str], word: str, namespace: Mapping[str, Any]) -> Iterable[str]:
        if done and self._takes_value(done[-1]):
            return self._values(done, namespace)
        if word.startswith("-"):
            return self._arguments
        # A word counts as positional unless it is a flag, or the value of the flag before it.
        free = [w for i, w in enumerate(done) if not w.startswith("-") and not (i and self._takes_value(done[i - 1]))]
        slot = self._positionals[len(free)] if len(free) < len(self._positionals) else None
        if slot == "model":
            return variables(namespace, is_model)
        if slot == "scheme":
            from qnb.schemes import names

            return names()
        return self._arguments

    def _takes_value(self, flag: str) -> bool:
        return flag in self._arguments and self._arguments[flag].nargs != 0

    def _values(self, done: list[str], namespace: Mapping[str, Any]) -> Iterable[str]:
        flag = done[-1]
        if flag == "--recipe":
            return [*variables(namespace, _is_recipe), *(p.name for p in Path().glob("*.json"))]
        if flag in _FITS:
            return variables(namespace, _FITS[flag])
        if flag == "--rounding":
            from qnb.rounding import names

            return names()
        if flag == "--observer":
            from qnb.model.observers import names

            return names()
        if flag == "--smooth":
            return ("0.5", "auto")
        if flag in ("--layers", "--skip"):
            try:
                return _patterns(words.find(done[0], namespace))
            except LookupError:
                return []
        return []


def _patterns(model: Any) -> set[str]:
    """Names of the model's Linear layers, and the globs that take one kind of layer in every block."""
    from torch import nn

    if not is_model(model):
        return set()
    names = [name.split(".") for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {".".join(path) for path in names} | {f"*.{'.'.join(path[-n:])}" for path in names for n in (1, 2)}
