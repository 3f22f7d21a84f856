"""Recipes: what they carry, that they give the same bits again, that they say what differs, and what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import qnb
from qnb.errors import BadInput, BadRecipe
from qnb.model.linear import quantized_layers
from qnb.model.recipe import SCHEMA, LayerRecipe, Recipe


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32)).eval()


def inputs(seed: int = 1) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(8, 64) for _ in range(3)]


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    layers = quantized_layers(model).items()
    return {f"{name}.{key}": t for name, q in layers for key, t in q.variant.tensors().items()}


def same_bits(first: nn.Module, second: nn.Module) -> bool:
    a, b = bits(first), bits(second)
    return a.keys() == b.keys() and all(torch.equal(t, b[key]) for key, t in a.items())


def mixed() -> tuple[nn.Module, Recipe]:
    model = small()
    qnb.quantize(model, "w8a8-static", layers="0", calibration=inputs())
    qnb.quantize(model, "w4a16-g32", layers="2", smooth=0.5, calibration=inputs(), seed=7)
    return model, Recipe.of(model)


def test_the_same_recipe_on_the_same_model_gives_the_same_bits(tmp_path):
    model, recipe = mixed()
    recipe.save(tmp_path / "recipe.json")
    again = small()
    report = qnb.quantize(again, Recipe.load(tmp_path / "recipe.json"), calibration=inputs())
    assert same_bits(model, again)
    assert "elsewhere" not in report.title
    assert [r.scheme for r in report.rows] == ["w8a8-static", "w4a16-g32", "none"]
    assert quantized_layers(again)["2"].variant.how.seed == 7


def test_it_goes_through_json_unchanged():
    recipe = mixed()[1]
    back = Recipe.from_json(recipe.to_json())
    assert back == recipe
    assert back.to_json() == recipe.to_json()
    assert recipe.layers["2"] == LayerRecipe("w4a16-g32", qnb.schemes.How(smooth=0.5, seed=7))


def test_what_it_says_of_where_it_came_from():
    model = small()
    qnb.quantize(model, "w8a8")
    before = qnb.evaluate(model, texts=inputs()[:1], metric=lambda m: 1.5, progress=False)
    found = Recipe.of(model, before=before).provenance
    assert found["calibration"]["sha256"] is None and "unavailable" in found["calibration"]
    assert found["model"]["class"] == "Sequential" and len(found["model"]["values"]) == 64
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["qnb"] == qnb.__version__
    assert found["before"]["metric"] == 1.5
    assert Recipe.of(mixed()[0]).provenance["calibration"]["sha256"]
    with pytest.raises(BadInput, match="give what qnb.profile or qnb.evaluate gave"):
        Recipe.of(model, after={"kl": 0})


def test_on_another_model_or_with_other_data_the_report_says_what_differs():
    _, recipe = mixed()
    assert "other weights" in qnb.quantize(small(seed=5), recipe, calibration=inputs()).title
    assert "other number types" in qnb.quantize(small().bfloat16(), recipe, calibration=inputs_bf16()).title
    assert "other calibration data" in qnb.quantize(small(), recipe, calibration=inputs(9)).title
    wider = nn.Sequential(*small(), nn.Linear(32, 8))
    assert "other layers or shapes" in qnb.quantize(wider, recipe, calibration=inputs()).title
    moved = copy.deepcopy(recipe.to_dict())
    moved["provenance"]["versions"]["torch"] = "2.0"
    moved["provenance"]["machine"]["cpu"] = "<b>Other</b>"
    report = qnb.quantize(small(), Recipe.from_dict(moved), calibration=inputs())
    assert f"torch {torch.__version__} instead of 2.0" in report.title and "<b>Other</b>" in report.title
    assert "<b>Other" not in report._repr_html_()


def inputs_bf16() -> list[torch.Tensor]:
    return [x.bfloat16() for x in inputs()]


def test_the_fingerprint_is_that_of_the_original_behind_quantized_layers():
    model = small()
    qnb.quantize(model, "w8a8")
    found = Recipe.of(model).provenance["model"]
    qnb.quantize(model, "w4a16-g32")
    assert Recipe.of(model).provenance["model"] == found
    other = small()
    other[0].weight.data[-1, -1] += 1  # a single value that is not sampled may pass; the bulk may not
    other[0].weight.data *= 1.5
    qnb.quantize(other, "w8a8")
    assert Recipe.of(other).provenance["model"]["values"] != found["values"]
    gone = small()
    qnb.quantize(gone, "w8a8", keep="none")
    kept, found = found, Recipe.of(gone).provenance["model"]
    assert (found["structure"], found["types"]) == (kept["structure"], kept["types"])
    assert found["values"] is None and "not kept" in found["unavailable"]


GOOD = {"qnb_recipe": 1, "layers": {"0": {"scheme": "w8a8"}}}
BAD = [
    ({**GOOD, "extra": 1}, "unknown key 'extra'"),
    ({"layers": {}}, "no key 'qnb_recipe'"),
    ({**GOOD, "qnb_recipe": 2}, "has version 2"),
    ({**GOOD, "qnb_recipe": True}, "has version True"),
    ({"qnb_recipe": 1}, "must be an object of layer names"),
    ({"qnb_recipe": 1, "layers": {"0": "w8a8"}}, "must be an object with a scheme"),
    ({"qnb_recipe": 1, "layers": {"0": {}}}, "has no scheme"),
    ({"qnb_recipe": 1, "layers": {"0": {"scheme": "w8a8", "bits": 4}}}, "unknown key 'bits'"),
    ({"qnb_recipe": 1, "layers": {"0": {"scheme": "w9a9"}}}, "no scheme is called"),
    ({"qnb_recipe": 1, "layers": {"0": {"scheme": 8}}}, "scheme is a int"),
    ({"qnb_recipe": 1, "layers": {"0": {"scheme": "__import__('os').system('x')"}}}, "no scheme is called"),
    ({"qnb_recipe": 1, "layers": {"0": {"scheme": "w8a8", "rounding": "no such"}}}, "no rounding is called"),
    ({"qnb_recipe": 1, "layers": {"0": {"scheme": "w8a8", "observer": []}}}, "give a name"),
    ({"qnb_recipe": 1, "layers": {"0": {"scheme": "w8a8", "smooth": 2}}}, "smooth=2"),
    ({"qnb_recipe": 1, "layers": {"0": {"scheme": "w8a8", "seed": 1.5}}}, "give a whole number"),
    ({"qnb_recipe": 1, "layers": {"0": {"scheme": "w8a8", "seed": 10**400}}}, "give a whole number"),
    ({**GOOD, "provenance": {"who": {}}}, "unknown key 'who'"),
    ({**GOOD, "provenance": {"model": 3}}, "no object"),
]
TEXTS = [
    ("", "no JSON"),
    ("[1]", "holds a JSON list"),
    ('{"qnb_recipe": 1, "qnb_recipe": 1, "layers": {}}', "stands twice"),
    ('{"qnb_recipe": NaN, "layers": {}}', "no JSON number"),
    ("[" * 100_000, "no JSON"),
    ('{"qnb_recipe": ' + "9" * 10_000 + ', "layers": {}}', "no JSON"),
]


@pytest.mark.parametrize(("given", "words"), BAD)
def test_a_bad_recipe_is_one_line(given, words):
    with pytest.raises(BadRecipe) as caught:
        Recipe.from_dict(given)
    said = str(caught.value)
    assert words in said and "\n" not in said and len(said) < 700


@pytest.mark.parametrize(("text", "words"), TEXTS)
def test_hostile_text_is_one_line(text, words):
    with pytest.raises(BadRecipe) as caught:
        Recipe.from_json(text)
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_hostile_names_are_cut_and_escaped():
    name = "<script>alert(1)</script>\n" * 1000
    recipe = Recipe.from_dict({"qnb_recipe": 1, "layers": {name: {"scheme": "w8a8"}}})
    assert "<script>" not in recipe._repr_html_()
    with pytest.raises(qnb.errors.LayerRefused) as caught:
        qnb.quantize(small(), recipe)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
    with pytest.raises(BadRecipe) as caught:
        Recipe.from_dict({"qnb_recipe": 1, "layers": {name: {}}})
    assert len(str(caught.value)) < 400


def test_files_that_are_none(tmp_path):
    with pytest.raises(BadRecipe, match="cannot be read"):
        Recipe.load(tmp_path / "missing.json")
    with pytest.raises(BadRecipe, match="cannot be read"):
        Recipe.load(tmp_path)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadRecipe, match="cannot be read"):
        Recipe.load(tmp_path / "bytes.json")
    with pytest.raises(BadInput, match="cannot be written"):
        mixed()[1].save(tmp_path / "no" / "such" / "folder.json")


def test_the_published_schema_says_the_same():
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema, which nbformat brings, is not installed")
    schema = json.loads(SCHEMA.read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema).is_valid
    assert check(mixed()[1].to_dict()) and check(GOOD)
    beyond = ("no scheme is called", "no rounding is called", "give a whole number")  # what a schema cannot know
    assert sum(words not in beyond for _, words in BAD) > 10
    for given, words in BAD:
        assert words in beyond or not check(given), given


def test_the_magic_takes_a_variable_or_a_file(shell, tmp_path, monkeypatch):
    from IPython.core.error import UsageError

    monkeypatch.chdir(tmp_path)
    model, recipe = mixed()
    recipe.save("best.json")
    shell.user_ns.update(a=small(), b=small(), r=recipe, data=inputs(), five=5)
    shell.run_line_magic("quantize", "a --recipe r --calibration data -q")
    shell.run_line_magic("quantize", "b --recipe best.json --calibration data -q")
    assert same_bits(model, shell.user_ns["a"]) and same_bits(model, shell.user_ns["b"])
    for line, words in [
        ("a --recipe nowhere.json", "cannot be read"),
        ("a --recipe five", "is a int"),
        ("a w8a8 --recipe r", "takes no scheme"),
        ("a --recipe r --layers 0", "takes no layers"),
    ]:
        with pytest.raises(UsageError, match=words):
            shell.run_line_magic("quantize", line)
    assert "r" in shell.complete("", "%quantize a --recipe ", 21)[1]
    assert "best.json" in shell.complete("be", "%quantize a --recipe be", 23)[1]
