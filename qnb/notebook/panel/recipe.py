"""What a model's layers are, as plain data, and how a model becomes that."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from torch import nn

from qnb import schemes
from qnb.errors import BadInput
from qnb.model.quantize import Report, quantize
from qnb.model.recipe import Recipe
from qnb.model.variants import depends_on_inputs
from qnb.notebook.panel.grid import patterns
from qnb.results import one_line
from qnb.schemes import How

# Name of a layer -> its scheme and how its codes are chosen, in the words of `How`. Layers that are not in it are the
# originals.
Layers = Mapping[str, tuple[str, str]]


def layers_of(report: Report) -> dict[str, tuple[str, str]]:
    """The quantized layers of a report of `qnb.layers`."""
    return {row.name: (row.scheme, row.rounding) for row in report.rows if row.scheme != "none"}


def apply(model: nn.Module, before: Layers, wanted: Layers, every: Sequence[str], calibration: Mapping) -> None:
    """Changes `model`, whose layers are `before`, to `wanted`; all of it or, where that raises, nothing.

    `every` are the names that globs may mean, which leave out the output embedding and adapters; `calibration` holds
    the keywords that go with a rounding that needs data.
    """
    done: list[str] = []
    try:
        for (scheme, rounding), names in _groups(before, wanted).items():
            _set(model, scheme, rounding, names, every, calibration)
            done += names
    except BaseException:
        back = {name: wanted[name] for name in done if name in wanted}
        for (scheme, rounding), names in _groups(back, {n: before[n] for n in done if n in before}).items():
            _set(model, scheme, rounding, names, every, calibration)
        raise


def code(wanted: Layers, every: Sequence[str], model: str) -> str:
    """The lines of magics that make an original model, held by the variable `model`, what `wanted` says."""
    lines = []
    for (scheme, rounding), names in _groups({}, wanted).items():
        everything = set(every) <= set(names)
        if everything and len(names) > len(every):  # the rest is meant by name alone
            rest = [name for name in names if name not in set(every)]
            lines.append(_line(model, scheme, rounding, []))
            lines.append(_line(model, scheme, rounding, patterns(rest, every)))
        else:
            lines.append(_line(model, scheme, rounding, [] if everything else patterns(names, every)))
    return "\n".join(lines) or f"# {model} as it was: nothing is quantized"


def in_words(names: Sequence[str], every: Sequence[str]) -> str:
    """The layers in few words: one pattern where one means them all, else their number."""
    if set(names) == set(every):
        return "all layers"
    meant = patterns(names, every)
    return one_line(meant[0], 60) if len(meant) == 1 else f"{len(names)} layers"


def _line(model: str, scheme: str, rounding: str, meant: Sequence[str]) -> str:
    flags = "".join(f' --layers "{pattern}"' for pattern in meant)
    how, usual = How.read(rounding), How()
    chosen = {f.name: getattr(how, f.name) for f in dataclasses.fields(how)}
    flags += "".join(f" --{name} {value}" for name, value in chosen.items() if value != getattr(usual, name))
    return f"%quantize {model} {scheme}{flags}"


def save(model: nn.Module, path: str | Path) -> Path:
    """Writes the model's recipe; raises BadInput where that cannot be written."""
    file = Path(path).expanduser()
    if not str(path).strip() or file.is_dir():
        raise BadInput(f"cannot save the recipe as {str(path)!r}: give the name of a file, such as recipe.json")
    Recipe.of(model).save(file)
    return file


def _groups(before: Layers, wanted: Layers) -> dict[tuple[str, str], list[str]]:
    """(scheme, rounding) -> names of the layers that must become it; those that become originals come first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in dict.fromkeys((*before, *wanted)):
        if before.get(name) != wanted.get(name):
            groups.setdefault(wanted.get(name, ("none", "nearest")), []).append(name)
    return dict(sorted(groups.items(), key=lambda group: (group[0][0] != "none", group[0])))


def _set(
    model: nn.Module, scheme: str, rounding: str, names: Collection[str], every: Sequence[str], calibration: Mapping
) -> None:
    how, asked = How.read(rounding), schemes.find(scheme)
    data = calibration if asked.grid is not None and depends_on_inputs(asked, how, False) else {}
    quantize(model, asked, layers=patterns(names, every), progress=False, **dataclasses.asdict(how), **data)
