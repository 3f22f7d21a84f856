"""Search and experiment: what they choose keeps the budget when it is measured anew, and the model stays as it was."""

from __future__ import annotations

import inspect

import pytest

import qnb
from qnb.errors import BadInput, BudgetBroken
from qnb.model.fused import fused_groups
from qnb.model.linear import held_storages, quantized_layers

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("scipy", reason="scipy is not installed")

SCHEMES = ["w8a8", "w8a16", "w4a16-g64"]


@pytest.fixture(scope="module")
def demo():
    model, _ = qnb.demo_lm()
    return model, qnb.demo_texts("evaluation")[:2]


@pytest.fixture(scope="module")
def sensitivities(demo):
    model, texts = demo
    return qnb.sensitivity(model, SCHEMES, texts, method="gradient", progress=False)


def find(demo, sensitivities, **budget):
    model, texts = demo
    return qnb.search(model, texts=texts, schemes=SCHEMES, sensitivities=sensitivities, progress=False, **budget)


def test_what_it_shares_with_sensitivity_has_the_same_defaults():
    theirs, ours = (inspect.signature(f).parameters for f in (qnb.sensitivity, qnb.search))
    shared = set(theirs) & set(ours) - {"schemes", "method"}
    assert shared >= {"layers", "skip", "rounding", "observer", "smooth", "calibration", "seed", "progress"}
    assert {name: theirs[name].default for name in shared} == {name: ours[name].default for name in shared}


def test_a_budget_in_bytes_is_used_and_kept(demo, sensitivities):
    model, texts = demo
    found = find(demo, sensitivities, max_megabytes=14)
    assert not quantized_layers(model)
    qnb.quantize(model, found.recipe, progress=False)
    try:
        held = held_storages(model)[0]
        assert 13.5e6 < held <= 14e6 and held == found.weight_bytes
        assert qnb.evaluate(model, texts, progress=False).kl == found.accuracy.kl
        for group in fused_groups(found.recipe.layers):
            assert len({found.recipe.layers[name].scheme for name in group}) == 1
    finally:
        qnb.restore(model)


def test_a_budget_in_kl_is_used_and_kept(demo, sensitivities):
    found = find(demo, sensitivities, max_kl=0.004)
    assert 0.002 < found.accuracy.kl <= 0.004
    assert len({layer.scheme for layer in found.recipe.layers.values()}) > 1, "a mix, not one scheme"
    assert all(step.holds == (step.accuracy.kl <= 0.004) for step in found.tried)
    assert "chosen" in found.text()


def test_a_model_that_was_quantized_is_so_again(demo, sensitivities):
    model, _ = demo
    qnb.quantize(model, "w8a16", layers="*.down_proj", progress=False)
    try:
        find(demo, sensitivities, max_megabytes=20)
        assert {q.scheme for q in quantized_layers(model).values()} == {"w8a16"}
        assert all(name.endswith("down_proj") for name in quantized_layers(model))
    finally:
        qnb.restore(model)


def test_one_group_after_the_other(demo, sensitivities):
    found = find(demo, sensitivities, max_kl=0.00003, gradual=True)
    sizes = [len(step.recipe.layers) for step in found.tried]
    assert sizes == sorted(sizes) and not found.tried[-1].holds
    assert found.recipe is found.tried[-2].recipe


def test_a_budget_that_cannot_be_kept_names_the_nearest(demo, sensitivities):
    with pytest.raises(BudgetBroken, match=r"at most 3 MB: the nearest measured is .* MB"):
        find(demo, sensitivities, max_megabytes=3)


def test_bad_budgets(demo, sensitivities):
    for budget in ({}, {"max_kl": 1, "max_megabytes": 3}):
        with pytest.raises(BadInput, match="give one of"):
            find(demo, sensitivities, **budget)
    with pytest.raises(BadInput, match="above 0"):
        find(demo, sensitivities, max_kl=-1)
    with pytest.raises(BadInput, match="needs metric="):
        find(demo, sensitivities, min_metric=0.5)


def test_layers_that_engines_fuse():
    names = [f"h.{i}.{n}" for i in (0, 1) for n in ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj")]
    assert fused_groups(names)[:3] == [
        ("h.0.q_proj", "h.0.k_proj", "h.0.v_proj"),
        ("h.0.o_proj",),
        ("h.0.up_proj", "h.0.gate_proj"),
    ]


def test_an_experiment(demo):
    model, texts = demo
    result = qnb.experiment(
        model,
        {"int8": "w8a8", "again": {"scheme": "w8a8"}, "weights": "w8a16", "typo": "w8a9"},
        texts,
        progress=False,
    )
    assert [o.name for o in result.outcomes] == ["original", "int8", "again", "weights", "typo"]
    assert "no scheme is called 'w8a9'" in result.outcomes[-1].refused
    assert not quantized_layers(model)
    same, worse = result.difference("int8", "again"), result.difference("int8", "weights")
    assert same.kl == same.low == same.high == 0 and same.within_noise
    assert worse.kl == pytest.approx(result.outcomes[1].accuracy.kl - result.outcomes[3].accuracy.kl, rel=1e-9)
    assert worse.low < worse.kl < worse.high
    assert "the least" in result.text() and "typo was refused" in result.text()
    with pytest.raises(BadInput, match="recipes is empty"):
        qnb.experiment(model, {}, texts)
    with pytest.raises(BadInput, match="keywords of quantize"):
        qnb.experiment(model, {"a": {"scheme": "w8a8", "speed": 3}}, texts)
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from qnb.notebook.figures import outcomes as drawn

    labels = [t.get_text() for t in drawn(result).axes[0].get_yticklabels()]
    assert labels == ["int8", "again", "weights"], "what was refused has no KL to draw"
    labels = [t.get_text() for t in drawn(result, {"activations": ["int8"]}).axes[0].get_yticklabels()]
    assert labels == ["activations", "int8"]
    with pytest.raises(BadInput, match="no KL of typo was measured"):
        drawn(result, {"wrong": ["typo"]})


def test_the_magic_searches_and_applies(demo, sensitivities, shell, monkeypatch):
    from IPython.utils.capture import capture_output

    from qnb.tune import search as module

    model, texts = demo
    monkeypatch.setattr(module, "sensitivity", lambda *_, **__: sensitivities)
    shell.user_ns.update(model=model, texts=texts)
    with capture_output() as shown:
        shell.run_line_magic("quantize", "model w8a8,w8a16,w4a16-g64 --auto --max-megabytes 14 --texts texts -v found")
    found = shell.user_ns["found"]
    try:
        assert {n: q.scheme for n, q in quantized_layers(model).items()} == {
            n: layer.scheme for n, layer in found.recipe.layers.items()
        }
        assert shown.outputs and "weights of at most 14 MB is kept" in found.text()
    finally:
        qnb.restore(model)
    with capture_output() as shown:
        shell.run_cell("%quantize model --max-kl 0.1")
    assert "--max-kl belongs to --auto" in shown.stderr + shown.stdout


def test_figures_and_the_report(demo, sensitivities, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from qnb.notebook import figures

    model, texts = demo
    found = find(demo, sensitivities, max_kl=0.004)
    heat = figures.heat_map(sensitivities)
    assert [t.get_text() for t in heat.axes[0].get_xticklabels()] == list(sensitivities.schemes)
    assert len(heat.axes[0].get_yticklabels()) == len(sensitivities.layers)
    pareto = figures.pareto(found)
    assert any("chosen" in t.get_text() for t in pareto.axes[0].texts)
    accuracy = qnb.evaluate(model, texts, progress=False)
    page = qnb.report(model, tmp_path / "report.html", sensitivities, found, accuracy, title="<b>mine</b>")
    words = page.read_text("utf-8")
    assert words.count("data:image/png;base64,") == 2 and "&lt;b&gt;mine&lt;/b&gt;" in words
    assert "model.layers.*.mlp.down_proj" in words and 'src="http' not in words and "<script" not in words
    with pytest.raises(BadInput, match="already there"):
        qnb.report(model, tmp_path / "report.html")
    with pytest.raises(BadInput, match="give results of qnb"):
        qnb.report(model, tmp_path / "other.html", 3)
