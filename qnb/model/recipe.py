"""Recipes: which layer gets which scheme, and how its codes are chosen, with all that is needed to repeat it.

`recipe.schema.json` beside this file is the published form of the JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from qnb import rounding as roundings
from qnb import schemes
from qnb.errors import BadInput, BadRecipe, QnbError
from qnb.model import fingerprint, observers, smoothing, strict_json
from qnb.model.linear import quantized_layers
from qnb.results import Result, Table, one_line
from qnb.schemes import How

VERSION = 1
FROM_CHECKPOINT = "checkpoint"  # stands for the rounding of codes that a file brought along
SCHEMA = Path(__file__).with_name("recipe.schema.json")
_HOW = {f.name: f.default for f in dataclasses.fields(How)}
_PROVENANCE = ("model", "calibration", "versions", "machine", "before", "after", "search")
_HASH = ("structure", "types", "values")


@dataclasses.dataclass(frozen=True)
class LayerRecipe:
    """One layer's scheme, by its canonical name, and how its codes are chosen."""

    scheme: str
    how: How = How()

    @property
    def rounding(self) -> str:
        """The rounding's name."""
        return self.how.rounding


@dataclasses.dataclass(frozen=True, repr=False)
class Recipe(Result):
    """`layers`: name -> LayerRecipe; layers that it does not name keep their original. `provenance` says whence.

    Provenance, each part where it is known: `model` (class, hashes of names and shapes, of types, of sampled values),
    `calibration` (sha256 of the data), `versions` (qnb, torch, compiled kernels), `machine`, and what was measured
    `before` and `after`.
    """

    layers: Mapping[str, LayerRecipe]
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, *, before: Result | None = None, after: Result | None = None) -> Recipe:
        """The recipe that made `model` what it is; changes nothing.

        `before` and `after` are profiles or accuracies, measured by whoever wants them remembered.
        """
        if not isinstance(model, nn.Module):
            raise BadInput(f"model is a {type(model).__name__}: give a torch.nn.Module")
        model = getattr(model, "_orig_mod", model)
        layers = {name: LayerRecipe(q.scheme, q.variant.how) for name, q in quantized_layers(model).items()}
        calibration = {"sha256": fingerprint.noted_calibration(model)}
        if calibration["sha256"] is None:
            calibration["unavailable"] = "no calibration data that has a hash is known for this model"
        provenance = {
            "model": fingerprint.of_model(model),
            "calibration": calibration,
            "versions": fingerprint.versions(),
            "machine": fingerprint.of_machine(model),
        }
        for name, measured in (("before", before), ("after", after)):
            if measured is not None:
                if not isinstance(measured, Result):
                    raise BadInput(f"{name} is a {type(measured).__name__}: give what qnb.profile or qnb.evaluate gave")
                provenance[name] = {"kind": type(measured).__name__, **_numbers(measured.to_dict())}
        return cls(layers, provenance)

    def to_dict(self) -> dict[str, Any]:
        """As the JSON has it."""
        layers = {name: {"scheme": r.scheme, **dataclasses.asdict(r.how)} for name, r in self.layers.items()}
        return {"qnb_recipe": VERSION, "layers": layers, "provenance": json.loads(json.dumps(dict(self.provenance)))}

    def to_json(self) -> str:
        """As text, which `Recipe.from_json` and `Recipe.load` read back equal."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    def save(self, path: str | os.PathLike) -> None:
        """Writes the JSON to `path`, in place of what is there; raises BadInput where that cannot be written."""
        path, text = Path(path), self.to_json()
        aside = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            aside.write_text(text, "utf-8")
            os.replace(aside, path)
        except OSError as problem:
            aside.unlink(missing_ok=True)
            raise BadInput(f"the recipe cannot be written to {one_line(path)}: {problem.strerror}") from None

    @classmethod
    def load(cls, path: str | os.PathLike) -> Recipe:
        """The recipe in a file; raises `BadRecipe` in one line for what is none."""
        return cls.from_dict(strict_json.read(Path(path), BadRecipe, "recipe"))

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe that the text spells; raises `BadRecipe` in one line for what is none."""
        return cls.from_dict(strict_json.parse(text, BadRecipe, "the recipe"))

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Recipe:
        """The recipe in a JSON object; raises `BadRecipe` for unknown keys, versions, schemes, and values of no use."""
        _only(given, ("qnb_recipe", "layers", "provenance"), "the recipe")
        if "qnb_recipe" not in given:
            raise BadRecipe("this is no recipe: it has no key 'qnb_recipe'")
        if given["qnb_recipe"] != VERSION or isinstance(given["qnb_recipe"], bool):
            shown = one_line(repr(given["qnb_recipe"]), 40)
            raise BadRecipe(f"the recipe has version {shown}, and this qnb reads version {VERSION}: make it anew")
        layers = given.get("layers")
        if not isinstance(layers, Mapping):
            raise BadRecipe("the recipe's 'layers' must be an object of layer names")
        provenance = given.get("provenance", {})
        if not isinstance(provenance, Mapping):
            raise BadRecipe("the recipe's 'provenance' must be an object")
        _only(provenance, _PROVENANCE, "the recipe's provenance")
        for key, part in provenance.items():
            if not isinstance(part, Mapping):
                raise BadRecipe(f"the recipe's provenance has {key!r} that is no object")
        return cls({name: _layer(name, layer) for name, layer in layers.items()}, dict(provenance))

    def differences(self, model: nn.Module, calibration: object = None) -> list[str]:
        """What is other than where the recipe was made, each as words: the model, the data, versions, the processor.

        `calibration` is the data that layers are calibrated on now, None where none are. Empty where all is the same,
        or unknown.
        """
        said, theirs = [], self.provenance.get("model", {})
        if any(theirs.get(key) for key in _HASH):
            mine = fingerprint.of_model(model)
            words = {"structure": "layers or shapes", "types": "number types", "values": "weights"}
            other = [words[key] for key in _HASH if theirs.get(key) and mine[key] and theirs[key] != mine[key]]
            said += [f"other {' and '.join(other)}"] if other else []
        known = self.provenance.get("calibration", {}).get("sha256")
        if known is not None and calibration is None:
            said.append("calibration data, and none is given now")
        elif known is not None and fingerprint.of_data(calibration) != known:
            said.append("other calibration data")
        for name, now in fingerprint.versions().items():
            then = self.provenance.get("versions", {}).get(name)
            if then is not None and then != now:
                said.append(f"{name} {now or 'not compiled'} instead of {one_line(then, 30)}")
        cpu = self.provenance.get("machine", {}).get("cpu")
        mine = fingerprint.of_machine(model)["cpu"]
        if cpu is not None and cpu != mine:
            said.append(f"processor {mine} instead of {one_line(cpu, 60)}")
        return said

    def _tables(self):
        rows = [(name, layer.scheme, str(layer.how)) for name, layer in self.layers.items()]
        return [Table(("layer", "scheme", "rounding"), rows)]


def _layer(name: object, given: object) -> LayerRecipe:
    shown = f"the recipe's layer {one_line(repr(name), 80)}"
    if not isinstance(given, Mapping):
        raise BadRecipe(f"{shown} must be an object with a scheme")
    _only(given, ("scheme", *_HOW), shown)
    if "scheme" not in given:
        raise BadRecipe(f"{shown} has no scheme")
    values = {key: given.get(key, default) for key, default in _HOW.items()}
    for key in ("rounding", "observer"):
        if not isinstance(values[key], str):
            raise BadRecipe(f"{shown} has {key} {one_line(repr(values[key]), 40)}: give a name")
    seed = values["seed"]
    if not isinstance(seed, int) or isinstance(seed, bool) or abs(seed) >= 2**63:
        raise BadRecipe(f"{shown} has seed {one_line(repr(seed), 40)}: give a whole number")
    try:
        scheme = schemes.find(given["scheme"])
        if values["rounding"] != FROM_CHECKPOINT:
            roundings.find(values["rounding"], scheme)
        observers.find(values["observer"])
        smoothing.check(values["smooth"], values["rounding"])
    except QnbError as problem:
        raise BadRecipe(f"{shown}: {one_line(problem, 300)}") from None
    return LayerRecipe(scheme.name, How(**values))


def _only(given: Mapping[str, Any], allowed: tuple[str, ...], what: str) -> None:
    unknown = [key for key in given if key not in allowed]
    if unknown:
        raise BadRecipe(
            f"{what} has the unknown key {one_line(repr(unknown[0]), 60)}: its keys are {', '.join(allowed)}"
        )


def _numbers(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that are numbers, also those of an accuracy inside; a device's name and paths stay out."""
    flat = {**measured, **(measured.get("accuracy") or {})}
    return {k: v for k, v in flat.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
