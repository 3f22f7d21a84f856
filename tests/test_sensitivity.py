"""Sensitivity: a layer measured alone is as `evaluate` finds it alone; the estimate ranks layers alike."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import qnb
from qnb.errors import BadInput, UnknownScheme
from qnb.measure.replay import noting, reusable
from qnb.model.linear import quantized_layers
from qnb.model.trial import Trial

pytest.importorskip("transformers", reason="transformers is not installed")

LAYERS = ["model.layers.2.mlp.*", "model.layers.6.self_attn.*"]


@pytest.fixture(scope="module")
def demo():
    model, _ = qnb.demo_lm()
    return model, qnb.demo_texts("evaluation")[:2]


@pytest.fixture(scope="module")
def exact(demo):
    model, texts = demo
    return qnb.sensitivity(model, ["w8a8", "w4a16"], texts, layers=LAYERS, progress=False)


def test_it_is_what_evaluate_measures_of_that_layer_alone(demo, exact):
    model, texts = demo
    kinds = ["2.mlp.down_proj", "2.mlp.gate_proj", "2.mlp.up_proj", "6.self_attn.q_proj", "6.self_attn.o_proj"]
    for i, kind in enumerate(kinds):
        name, scheme = f"model.layers.{kind}", ["w8a8", "w4a16-g64"][i % 2]
        qnb.quantize(model, scheme, layers=name, progress=False)
        try:
            accuracy = qnb.evaluate(model, texts, progress=False)
            row = next(r for r in exact.rows if (r.name, r.scheme) == (name, scheme))
            assert row.kl == pytest.approx(accuracy.kl, rel=1e-9)
            assert row.kl_se == pytest.approx(accuracy.kl_se, rel=1e-9)
            assert row.bytes == qnb.layers(model).rows[[r.name for r in qnb.layers(model).rows].index(name)].bytes_after
        finally:
            qnb.restore(model)


def test_the_model_is_left_as_it_was(demo, exact):
    model, _ = demo
    assert not quantized_layers(model)
    assert all("forward" not in m.__dict__ and not m._forward_hooks for m in model.modules())


def test_a_quantized_model_is_measured_against_its_original(demo, exact):
    model, texts = demo
    qnb.quantize(model, "w8a16", progress=False)
    try:
        again = qnb.sensitivity(model, "w8a8", texts, layers=LAYERS[0], progress=False)
        assert {r.name: r.kl for r in again.rows} == {
            r.name: r.kl for r in exact.rows if r.scheme == "w8a8" and r.name in again.layers
        }
        assert {q.scheme for q in quantized_layers(model).values()} == {"w8a16"}
    finally:
        qnb.restore(model)


def test_the_estimate_ranks_as_the_measurement(demo, exact):
    model, texts = demo
    estimate = qnb.sensitivity(model, ["w8a8", "w4a16"], texts, layers=LAYERS, method="gradient", progress=False)
    assert estimate.layers == exact.layers
    assert all(correlation >= 0.8 for correlation in estimate.rank_correlation(exact).values())
    again = qnb.sensitivity(model, ["w8a8", "w4a16"], texts, layers=LAYERS, method="gradient", progress=False)
    assert estimate.rows == again.rows


def test_the_table(exact):
    text = exact.text()
    assert text.splitlines()[3].startswith("model.layers.2.mlp.down_proj"), "the most sensitive comes first"
    assert "w4a16-g64" in text and "standard error over 2 texts" in text


def test_bad_input(demo):
    model, texts = demo
    with pytest.raises(BadInput, match="method='guess'"):
        qnb.sensitivity(model, "w8a8", texts, method="guess")
    with pytest.raises(UnknownScheme):
        qnb.sensitivity(model, "w9a9", texts)
    with pytest.raises(BadInput, match="schemes is empty"):
        qnb.sensitivity(model, ["none"], texts)
    twice = qnb.sensitivity(model, ["w4a16", "w4a16-g64"], texts, layers=LAYERS[0], method="gradient", progress=False)
    assert twice.schemes == ("w4a16-g64",) and len(twice.rows) == 3
    with pytest.raises(BadInput, match="language models"):
        qnb.sensitivity(nn.Sequential(nn.Linear(4, 4)), "w8a8", [torch.ones(2, 4)])


class Block(nn.Module):
    """Two layers that share an input, one that follows, and activations in place."""

    def __init__(self):
        super().__init__()
        self.norm, self.q, self.k, self.out = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.relu, self.never = nn.ReLU(inplace=True), nn.Linear(4, 4)

    def forward(self, x):
        x = self.norm(x)
        return self.out(self.q(x) * self.relu(self.k(x)))


class TestReplay:
    def test_what_nothing_changed_is_given_again(self):
        block = Block()
        with torch.no_grad(), noting(block.modules()) as calls:
            block(torch.ones(1, 4))
        assert set(reusable(calls, block.q)) == {block.norm}, "what k gave was changed in place since"
        # Nor does the block itself, which holds the layer.
        assert set(reusable(calls, block.out)) == {block.norm, block.q, block.relu}
        assert reusable(calls, block.never) == {} and block not in reusable(calls, block.norm)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())

    def test_of_a_shared_input_each_layer_is_computed_once(self):
        block = Block()
        block.relu.inplace = False
        with torch.no_grad(), noting(block.modules()) as calls:
            block(torch.ones(1, 4))
        assert set(reusable(calls, block.q)) == {block.norm, block.k}
        assert set(reusable(calls, block.k)) == {block.norm, block.q}

    def test_what_cannot_be_told_is_computed_again(self):
        block = Block()
        with torch.inference_mode(), noting(block.modules()) as calls:
            block(torch.ones(1, 4))
        assert reusable(calls, block.out) == {}, "no versions are kept there"
        with torch.no_grad(), noting(block.modules()) as calls:
            block(block(torch.ones(1, 4)))
        assert calls == {}, "all were called twice"


class TestTrial:
    def test_other_threads_see_the_model_as_it_is(self):
        model, x = nn.Sequential(nn.Linear(4, 4)), torch.ones(1, 4)
        y, seen = model(x), []
        with Trial([model[0]]) as trial, trial.answering({model[0]: lambda x: x}):
            assert torch.equal(model(x), x)
            thread = threading.Thread(target=lambda: seen.append(model(x)))
            thread.start()
            thread.join()
        assert torch.equal(seen[0], y)
        assert torch.equal(model(x), y)

    def test_a_forward_of_the_instances_own_comes_back(self):
        layer = nn.Linear(2, 2)
        own = layer.forward = lambda x: x + 1
        with pytest.raises(KeyboardInterrupt), Trial([layer]):
            raise KeyboardInterrupt
        assert layer.forward is own

    def test_two_trials_of_a_layer_end_in_any_order(self):
        layer, x = nn.Linear(4, 4), torch.ones(1, 4)
        y, first, second = layer(x), Trial([layer]), Trial([layer])
        first.__enter__()
        second.__enter__()
        with first.answering({layer: lambda x: x}):
            assert torch.equal(layer(x), x)
            with second.answering({layer: lambda x: 2 * x}):
                assert torch.equal(layer(x), 2 * x)
        with second.answering({layer: lambda x: 2 * x}):
            first.__exit__()
            assert torch.equal(layer(x), 2 * x)
        second.__exit__()
        assert torch.equal(layer(x), y) and "forward" not in layer.__dict__

    def test_a_copy_made_meanwhile_is_an_ordinary_layer(self):
        model, x = nn.Sequential(nn.Linear(4, 4)), torch.ones(1, 4)
        y = model(x)
        with Trial([model[0]]) as trial, trial.answering({model[0]: lambda x: x}):
            twin = copy.deepcopy(model)
            assert torch.equal(twin(x), y)
        with torch.no_grad():
            model[0].weight.zero_()
        assert torch.equal(twin(x), y)
        assert qnb.quantize(twin, "w8a8").rows[0].scheme == "w8a8"
