"""`check`: budgets that are kept and budgets that are broken, each by another way to the same number; and its words."""

from __future__ import annotations

import inspect
import json
import math
import pickle
import re

import pytest
import torch

import qnb
from qnb.errors import BadInput, BudgetBroken, QnbError
from qnb.measure import budget
from qnb.measure.budget import Check
from qnb.measure.workload import Timing
from qnb.model.defaults import remember_defaults
from qnb.model.linear import held_storages, original_pass

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(64, (1, length), generator=generator) for length in (9, 14, 11)]


def random_llama(seed: int):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,  # large enough for logits that differ, and so for a KL above rounding errors
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def model():
    model = random_llama(seed=0)
    qnb.quantize(model, "w8a8", progress=False)
    return model


@pytest.fixture
def other():
    return random_llama(seed=5)


def check(model, texts=None, **given) -> Check:
    return qnb.check(model, texts, progress=False, **given)


def broken(model, texts=None, **given) -> BudgetBroken:
    with pytest.raises(BudgetBroken) as caught:
        check(model, texts, **given)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.fixture
def seconds(monkeypatch):
    """Workloads that run nothing: now 2 s a run, in the original pass 3 s."""
    runs = []

    class Work:
        rows, prompt_tokens, new_tokens = 1, 8, 4

        def run(self):
            from qnb.model.linear import _pass

            runs.append("original" if _pass.original else "now")
            return Timing(3.0 if _pass.original else 2.0)

    monkeypatch.setattr(budget, "workload_of", lambda *given: Work())
    return runs


class TestEachBudget:
    """At what was measured by other means a budget is kept, a hair beyond it is broken."""

    def held(self, model, texts, name: str, value: float, **given) -> None:
        at_most = name.startswith("max")
        kept = check(model, texts, **{name: value}, **given)
        assert kept.passed and [(row.budget, row.measured) for row in kept.rows] == [(name, pytest.approx(value))]
        beyond = math.nextafter(value, -math.inf if at_most else math.inf)
        error = broken(model, texts, **{name: beyond}, **given)
        assert not error.result.passed and error.result.rows[0].measured == kept.rows[0].measured

    def test_kl_is_that_of_evaluate(self, model, texts):
        kl = qnb.evaluate(model, texts, progress=False).kl
        assert kl > 1e-6
        self.held(model, texts, "max_kl", kl)

    def test_top1_is_that_of_evaluate(self, model, other, texts):
        top1 = qnb.evaluate(model, texts, reference=other, progress=False).top1
        assert top1 < 0.5  # two models that have nothing to do with each other
        self.held(model, texts, "min_top1", top1, reference=other)

    def test_perplexity_increase_is_over_the_original_s(self, model, texts):
        now = qnb.evaluate(model, texts, progress=False).perplexity
        with original_pass():
            then = qnb.evaluate(model, texts, progress=False).perplexity
        measured = check(model, texts, max_perplexity_increase=1e6).rows[0].measured
        assert now != then and measured == pytest.approx(100 * (now / then - 1), rel=1e-9)

    def test_perplexity_increase_over_a_reference(self, model, other, texts):
        perplexity = {m: qnb.evaluate(m, texts, progress=False).perplexity for m in (model, other)}
        better, worse = sorted(perplexity, key=perplexity.get)
        increase = 100 * (perplexity[worse] / perplexity[better] - 1)
        assert increase > 1
        assert check(worse, texts, max_perplexity_increase=1.01 * increase, reference=better).passed
        error = broken(worse, texts, max_perplexity_increase=0.99 * increase, reference=better)
        assert error.result.rows[0].measured == pytest.approx(increase, rel=1e-9)
        assert check(better, texts, max_perplexity_increase=0, reference=worse).passed

    def test_metric(self, model):
        self.held(model, None, "min_metric", 0.75, metric=lambda m: 0.75)
        assert check(model, min_metric=-2, metric=lambda m: -1.5).passed

    def test_megabytes_are_the_weights_really_held(self, model):
        self.held(model, None, "max_megabytes", held_storages(model)[0] / 1e6)

    def test_speedup_takes_turns_with_the_original_pass(self, model, seconds):
        self.held(model, None, "min_speedup", 1.5)
        turns = ["now", "original"] * (1 + budget._FEWEST_RUNS)
        assert seconds[: len(turns)] == turns

    def test_speedup_against_a_profile_leaves_the_original_alone(self, model, seconds):
        vs = qnb.measure.profile.Profile(
            latency_ms=5000.0,
            environment={
                "rows": 1,
                "prompt_tokens": 8,
                "new_tokens": 4,
                "device": "cpu",
                "threads": torch.get_num_threads(),
            },
        )
        self.held(model, None, "min_speedup", 2.5, vs=vs)
        assert set(seconds) == {"now"}

    def test_speedup_for_real(self, model, texts):
        result = check(model, min_speedup=0, prompt=texts[0], new_tokens=2)
        assert result.rows[0].measured > 0 and "ms before" in result.rows[0].how


class TestSeveral:
    def test_the_message_names_every_broken_budget_and_no_other(self, model, texts):
        error = broken(model, texts, max_kl=0, max_megabytes=1e6, min_metric=2, metric=lambda m: 1.0)
        assert isinstance(error, AssertionError) and isinstance(error, QnbError)
        words = str(error)
        assert "broken: KL to the original <= 0 nats" in words and "broken: metric >= 2" in words
        assert "weights" not in words and words.count("measured:") == 1
        assert [row.passed for row in error.result.rows] == [False, False, True]
        assert str(pickle.loads(pickle.dumps(BudgetBroken(words)))) == words

    def test_the_lines_that_are_not_measured_are_the_same_for_other_numbers(self, model, texts):
        first = check(model, texts, max_kl=9, max_megabytes=1e6).text()
        qnb.quantize(model, "none", layers="*.q_proj", progress=False)
        second = check(model, texts, max_kl=9, max_megabytes=1e6).text()
        assert first != second
        kept = [line for line in first.splitlines() if not line.startswith("measured: ")]
        assert kept == [line for line in second.splitlines() if not line.startswith("measured: ")]
        assert kept == ["passed: KL to the original <= 9 nats", "passed: weights held <= 1000000 MB"]

    def test_it_is_a_result_as_every_other(self, model, texts):
        result = check(model, texts, max_kl=9)
        told = json.loads(json.dumps(result.to_dict()))
        assert told["passed"] is True and told["accuracy"]["kl"] == result.accuracy.kl
        assert "<table" in result._repr_html_() and repr(result) == result.text()


class TestWhatCannotBeMeasured:
    def test_an_untouched_model_is_its_own_original_and_that_is_said(self, model, texts):
        qnb.restore(model)
        result = check(model, texts, max_kl=0, min_top1=1, max_perplexity_increase=0)
        assert [row.measured for row in result.rows] == [0, 0, 1]
        assert "nothing is quantized" in result.text()

    @pytest.mark.parametrize("given", [{"max_kl": 9}, {"max_perplexity_increase": 99}, {"min_top1": 0}])
    def test_without_originals_a_budget_against_them_is_broken_and_a_reference_mends_it(self, model, texts, given):
        qnb.restore(model)
        qnb.quantize(model, "w8a8", keep="none", progress=False)
        error = broken(model, texts, **given)
        assert "unavailable" in str(error) and "not kept" in str(error) and error.result.rows[0].measured is None
        assert check(model, texts, reference=random_llama(seed=0), **given).passed

    def test_speed_without_originals(self, model, seconds):
        qnb.restore(model)
        qnb.quantize(model, "w8a8", keep="none", progress=False)
        assert "not kept" in str(broken(model, min_speedup=0))
        assert seconds == []

    def test_logits_that_are_no_numbers(self, model, texts):
        with torch.no_grad():
            model.model.norm.weight[0] = math.nan
        assert "NaN" in str(broken(model, texts, max_kl=9))
        assert "NaN" in str(broken(model, texts, max_perplexity_increase=99))


REFUSED = [
    ({}, "max_kl="),
    ({"max_kl": -1}, "from 0 on"),
    ({"max_kl": True}, "give a number"),
    ({"max_kl": "0.1"}, "give a number"),
    ({"max_kl": math.nan}, "give a number"),
    ({"min_top1": 97}, "from 0 to 1"),
    ({"min_metric": math.inf, "metric": len}, "of any size"),
    ({"min_metric": 1}, "go together"),
    ({"min_metric": 1, "metric": 3}, "go together"),
    ({"max_kl": 1, "metric": 3}, "go together"),
    ({"metric": len, "max_kl": 1}, "go together"),
    ({"max_kl": 1, "vs": None}, "needs texts="),
    ({"max_megabytes": 1, "vs": 3}, "vs="),
    ({"min_speedup": 1, "vs": 3}, "vs="),
]


@pytest.mark.parametrize("given, word", REFUSED, ids=[str(given) for given, _ in REFUSED])
def test_a_wrong_word_is_one_line(model, given, word):
    with pytest.raises(BadInput) as caught:
        check(model, **given)
    assert word in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name, other", [("prompt_tokens", 9), ("new_tokens", 5), ("threads", 99), ("device", "cuda")])
def test_a_profile_of_other_work_is_refused(model, seconds, name, other):
    environment = {"rows": 1, "prompt_tokens": 8, "new_tokens": 4, "device": "cpu", "threads": torch.get_num_threads()}
    vs = qnb.measure.profile.Profile(latency_ms=1.0, environment={**environment, name: other})
    with pytest.raises(BadInput, match=name.replace("_", " ")):
        check(model, min_speedup=1, vs=vs)
    assert seconds == []


def test_the_model_is_left_as_it_was(model, texts):
    modules, flags = dict(model.named_modules()), [m.train().training for m in model.modules()]
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check(model, texts, max_kl=9, max_perplexity_increase=99, min_speedup=0, prompt=texts[0], new_tokens=2)
    assert dict(model.named_modules()) == modules and [m.training for m in model.modules()] == flags
    assert all(torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())


def test_a_generator_of_texts_serves_every_budget(model, texts):
    result = check(model, iter(texts), max_kl=9, max_perplexity_increase=99)
    assert result.rows[0].measured == qnb.evaluate(model, texts, progress=False).kl


def test_every_budget_is_a_keyword_and_documented():
    parameters = inspect.signature(qnb.check).parameters
    for name in budget._KINDS:
        assert name in parameters and re.search(rf"\n    {name} +\w", qnb.check.__doc__)


@pytest.mark.parametrize("value, words", [(math.nan, "returned nan"), (math.inf, "returned inf")])
def test_a_metric_that_is_no_number_breaks_its_budget(model, value, words):
    assert words in str(broken(model, min_metric=0, metric=lambda m: value))


def test_a_metric_alone_measures_nothing_else_and_in_eval_mode(model, texts, monkeypatch):
    remember_defaults(model, None, texts)
    monkeypatch.setattr(budget, "evaluate", None)
    result = check(model.train(), min_metric=0, metric=lambda m: torch.tensor(float(not m.training)))
    assert result.rows[0].measured == 1 and result.accuracy is None and model.training


def test_a_metric_that_returns_no_number_is_refused(model):
    with pytest.raises(BadInput, match="must return one number"):
        check(model, min_metric=0, metric=lambda m: "good")
