"""`evaluate` against sums done by hand, an independent transcription in numpy, and itself after changes."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import qnb
from qnb.errors import BadInput
from qnb.measure import original
from qnb.measure.original import ITS_OWN_ORIGINAL
from qnb.measure.statistics import percentile_with_se, ratio_with_se, student_95

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VOCABULARY = 32


def evaluate(model, texts, *args, **kwargs):
    return qnb.evaluate(model, texts, *args, progress=False, **kwargs)


def tiny_llama(seed: int = 0, **changes) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=24,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.5,  # far from uniform, so that the KL is no rounding error
    )
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **changes})).eval()


def texts_of(*lengths: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (n,), generator=generator) for n in lengths]


class Table(nn.Module):
    """A language model whose next-token logits are a table's row: everything about it can be worked out by hand."""

    def __init__(self, logits) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.as_tensor(logits, dtype=torch.float32))

    def forward(self, input_ids, **rest):
        return SimpleNamespace(logits=self.table[input_ids])


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def by_hand(now: list[np.ndarray], then: list[np.ndarray], texts: list[torch.Tensor]) -> dict[str, float]:
    """perplexity, kl, top1 and their standard errors in numpy and float64, text by text, token by token."""
    nll, kl, agreed, count = [], [], [], []
    for a, b, ids in zip(now, then, texts, strict=True):
        q, p = log_softmax(a), log_softmax(b)
        nll.append(sum(-q[t, ids[t + 1]] for t in range(len(ids) - 1)))
        kl.append(
            [
                float(sum(math.exp(p[t, v]) * (p[t, v] - q[t, v]) for v in range(VOCABULARY)))
                for t in range(len(ids) - 1)
            ]
        )
        agreed.append(sum(int(q[t].argmax() == p[t].argmax()) for t in range(len(ids) - 1)))
        count.append(len(ids) - 1)

    def mean(sums):
        ratio = sum(sums) / sum(count)
        residuals = [s - ratio * n for s, n in zip(sums, count, strict=True)]
        groups = len(count)
        return ratio, math.sqrt(groups / (groups - 1) * sum(r * r for r in residuals)) / sum(count)

    loss, loss_se = mean(nll)
    flat = sorted(k for text in kl for k in text)
    return {
        "perplexity": math.exp(loss),
        "perplexity_se": math.exp(loss) * loss_se,
        "kl": mean([sum(k) for k in kl])[0],
        "kl_se": mean([sum(k) for k in kl])[1],
        "kl_p99": flat[math.ceil(0.99 * len(flat)) - 1],
        "top1": mean(agreed)[0],
        "top1_se": mean(agreed)[1],
    }


class TestByHand:
    def test_uniform_logits_have_the_vocabulary_as_perplexity(self):
        result = evaluate(Table(torch.zeros(5, 5)), [torch.tensor([0, 1, 2, 3]), torch.tensor([4, 4])])
        assert result.perplexity == pytest.approx(5, rel=1e-6)
        assert result.perplexity_se == pytest.approx(0, abs=1e-6)
        assert (result.tokens, result.texts) == (4, 2)

    def test_kl_is_from_the_original_to_now_and_not_the_other_way(self):
        then, now = [0.7, 0.2, 0.1], [0.2, 0.3, 0.5]
        a, b = (Table(torch.tensor([p] * 3).log()) for p in (now, then))
        result = evaluate(a, [torch.tensor([0, 1, 2]), torch.tensor([1, 0])], reference=b)
        assert result.kl == pytest.approx(sum(p * math.log(p / q) for p, q in zip(then, now, strict=True)), rel=1e-5)
        assert result.kl_p99 == pytest.approx(result.kl)
        assert result.top1 == 0.0
        assert result.perplexity == pytest.approx(
            math.exp(-(math.log(0.3) + math.log(0.5) + math.log(0.2)) / 3), rel=1e-6
        )

    def test_masked_vocabulary_adds_nothing(self):
        masked = torch.tensor([[0.0, 0.0, -math.inf]] * 3)
        result = evaluate(Table(masked), [torch.tensor([0, 1, 0])], reference=Table(masked))
        assert (result.kl, result.top1) == (0, 1)

    def test_a_quantized_model_against_a_transcription_in_numpy(self):
        model, texts = tiny_llama(), texts_of(24, 9, 17, 2, 12)
        with torch.no_grad():
            then = [model(t[None]).logits[0].numpy() for t in texts]
        qnb.quantize(model, "w8a8", progress=False)
        with torch.no_grad():
            now = [model(t[None]).logits[0].numpy() for t in texts]
        expected, result = by_hand(now, then, texts), evaluate(model, texts)
        assert result.kl > 1e-5  # else the comparison would be of rounding errors
        for name, value in expected.items():
            assert getattr(result, name) == pytest.approx(value, rel=2e-4), name
        assert result.kl_p99_se > 0
        assert result.tokens == sum(len(t) - 1 for t in texts)

    def test_chunks_over_tokens_change_nothing(self, monkeypatch):
        model, texts = tiny_llama(), texts_of(20, 21)
        qnb.quantize(model, "w8a8", progress=False)
        whole = evaluate(model, texts)
        monkeypatch.setattr("qnb.measure.predictions._CHUNK", 3 * VOCABULARY)
        parts = evaluate(model, texts)
        assert parts.kl == pytest.approx(whole.kl, rel=1e-6)
        assert (parts.top1, parts.tokens) == (whole.top1, whole.tokens)
        assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-6)

    def test_standard_errors_treat_a_text_as_one(self):
        generator = torch.Generator().manual_seed(0)
        sums, counts = torch.rand(40, generator=generator), torch.randint(5, 50, (40,), generator=generator)
        ratio, se = ratio_with_se(sums, counts)
        left_out = [((sums.sum() - s) / (counts.sum() - n)).item() for s, n in zip(sums, counts, strict=True)]
        jackknife = math.sqrt(39 / 40 * sum((x - sum(left_out) / 40) ** 2 for x in left_out))
        assert ratio == pytest.approx((sums.sum() / counts.sum()).item())
        assert se == pytest.approx(jackknife, rel=0.1)

    def test_percentile(self):
        values = torch.arange(200, dtype=torch.float32).flip(0)
        point, se = percentile_with_se(values, torch.arange(200) % 10, 0.99)
        assert point == 197  # 198 of 200 values are no larger
        assert 0 < se < 3
        assert percentile_with_se(values, torch.zeros(200, dtype=torch.long), 0.99) == (197, None)
        assert percentile_with_se(values, torch.arange(200) % 10, 0.99) == (point, se)  # seeded

    @pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.706), (2, 4.303), (7, 2.365), (10, 2.228), (63, 1.998)])
    def test_student(self, degrees, quantile):
        assert student_95(degrees) == pytest.approx(quantile, rel=2e-3)


def test_the_bars_of_the_demo_model():
    """Perplexity and KL that plain float32 scripts, which share nothing with this package, reached on these texts."""
    model, _ = qnb.demo_lm()
    before = evaluate(model, None)
    assert (before.tokens, before.texts) == (32_000, 64)
    assert before.perplexity == pytest.approx(8.4934, abs=2e-3)
    qnb.quantize(model, "w8a8", progress=False)
    now = evaluate(model, None)
    assert now.kl == pytest.approx(0.006778, rel=0.02)
    assert now.kl_se == pytest.approx(0.000275, rel=0.05)
    assert now.top1 == pytest.approx(0.9567, abs=0.002)
    assert now.perplexity == pytest.approx(8.5732, abs=0.01)


class TestTheOriginal:
    def test_an_untouched_model_has_no_kl_and_says_why(self):
        result = evaluate(tiny_llama(), texts_of(5, 6))
        assert result.kl is result.kl_se is result.top1 is result.kl_p99 is None
        assert {result.unavailable[f] for f in ("kl", "kl_se", "kl_p99", "top1")} == {ITS_OWN_ORIGINAL}

    def test_restored_is_untouched_and_none_is_exactly_the_original(self):
        model, texts = tiny_llama(), texts_of(8, 9)
        before = evaluate(model, texts)
        qnb.quantize(model, "none", progress=False)
        quantized = qnb.model.linear.quantized_layers(model)
        result = evaluate(model, texts)
        assert result.perplexity == before.perplexity
        assert (result.kl, result.top1) == (0, 1) if quantized else (None, None)
        qnb.quantize(model, "w8a8", progress=False)
        assert evaluate(model, texts).kl > 0
        qnb.restore(model)
        assert evaluate(model, texts).perplexity == before.perplexity

    def test_without_kept_originals_only_a_reference_gives_kl(self):
        model, texts = tiny_llama(), texts_of(10, 11)
        qnb.quantize(model, "w8a8", keep="none", progress=False)
        result = evaluate(model, texts)
        assert result.kl is None and "pass reference=" in result.unavailable["kl"]
        assert result.perplexity is not None
        kept = tiny_llama()
        qnb.quantize(kept, "w8a8", progress=False)
        assert evaluate(model, texts, reference=tiny_llama()).kl == pytest.approx(evaluate(kept, texts).kl)

    def test_reference_of_another_vocabulary_is_refused(self):
        with pytest.raises(BadInput, match="same vocabulary"):
            evaluate(tiny_llama(), texts_of(5, 6), reference=tiny_llama(vocab_size=VOCABULARY + 1))


class TestKeptHiddenStates:
    """The second evaluation runs the original's output embedding alone, and gives the numbers of a fresh one."""

    texts = texts_of(12, 20, 7, seed=3)

    def quantized(self, **changes):
        model = tiny_llama(**changes)
        qnb.quantize(model, "w8a8", progress=False)
        return model

    def passes(self, model, run) -> int:
        """How often `run` passes through the whole model."""
        calls = []
        handle = model.get_decoder().register_forward_hook(lambda *a: calls.append(1))
        try:
            run()
        finally:
            handle.remove()
        return len(calls)

    def fresh(self, model):
        original._hidden_states.clear()
        return evaluate(model, self.texts)

    def test_they_save_the_original_pass(self):
        model = self.quantized()
        assert self.passes(model, lambda: evaluate(model, self.texts)) == 6
        assert self.passes(model, lambda: evaluate(model, self.texts)) == 4  # the first text's is checked anew
        assert evaluate(model, self.texts) == self.fresh(model)

    def test_they_serve_the_next_scheme(self):
        model = self.quantized()
        evaluate(model, self.texts)
        qnb.quantize(model, "w8a16", progress=False)
        assert self.passes(model, lambda: evaluate(model, self.texts)) == 4
        assert evaluate(model, self.texts) == self.fresh(model)

    @pytest.mark.parametrize("where", ["norm", "embedding of a token in the last text", "original", "inference"])
    def test_weights_changed_behind_torchs_back_drop_them(self, where):
        model = self.quantized()
        stale = evaluate(model, self.texts)
        if where == "norm":
            model.model.norm.weight.data.mul_(1.5)  # leaves the version counter as it was
        elif where == "original":
            model.model.layers[0].mlp.up_proj.original.weight.data[3] += 0.5
        elif where == "inference":
            with torch.inference_mode():
                model.model.layers[1].input_layernorm.weight.mul_(0.5)
        else:
            only_last = set(self.texts[-1].tolist()) - set(self.texts[0].tolist())
            model.model.embed_tokens.weight.data[only_last.pop()] += 1.0
        now = evaluate(model, self.texts)
        assert now == self.fresh(model)
        assert now.kl != stale.kl

    def test_another_behaviour_of_the_same_weights_drops_them(self):
        model = self.quantized()
        evaluate(model, self.texts)
        model.model.layers[0].self_attn.scaling *= 2
        assert evaluate(model, self.texts) == self.fresh(model)

    def test_a_model_that_caps_its_logits_is_run_in_full(self):
        config = transformers.Gemma2Config(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=24, initializer_range=0.5,
            final_logit_softcapping=2.0,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.Gemma2ForCausalLM(config).eval()
        with torch.no_grad():
            then = [model(t[None]).logits[0].numpy() for t in self.texts]
        qnb.quantize(model, "w8a8", progress=False)
        with torch.no_grad():
            now = [model(t[None]).logits[0].numpy() for t in self.texts]
        evaluate(model, self.texts)
        assert evaluate(model, self.texts).kl == pytest.approx(by_hand(now, then, self.texts)["kl"], rel=1e-3)
        assert self.passes(model, lambda: evaluate(model, self.texts)) == 6

    def test_they_stay_within_their_bytes_and_stay_right(self, monkeypatch):
        model = self.quantized()
        one_text = 20 * 32 * 4
        monkeypatch.setattr(original, "CACHE_BYTES", one_text)
        first = evaluate(model, self.texts)
        assert 0 < original._held() <= one_text
        assert evaluate(model, self.texts) == first

    def test_they_are_forgotten_with_the_model(self):
        original._hidden_states.clear()
        model = self.quantized()
        evaluate(model, self.texts)
        assert original._held() > 0
        del model
        __import__("gc").collect()
        assert original._held() == 0


class TestTheModelIsLeftAsItWas:
    def test_dropout_is_off_while_measuring_and_each_flag_comes_back(self):
        model = tiny_llama(attention_dropout=0.5).train()
        model.model.layers[1].eval()
        flags = {name: m.training for name, m in model.named_modules()}
        first, second = (evaluate(model, texts_of(9, 10)) for _ in range(2))
        assert first == second
        assert {name: m.training for name, m in model.named_modules()} == flags

    @pytest.mark.parametrize("at", range(1, 5))
    def test_an_interrupt_leaves_flags_and_hooks(self, at):
        model = tiny_llama()
        qnb.quantize(model, "w8a8", progress=False)
        model.train()
        calls = []

        def interrupt(*args):
            calls.append(1)
            if len(calls) == at:
                raise KeyboardInterrupt

        handle = model.lm_head.register_forward_hook(interrupt)  # within the pass, where the capturing hook is in place
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, texts_of(9, 10, 11))
        handle.remove()
        assert all(m.training for m in model.modules())
        assert not model.lm_head._forward_pre_hooks
        assert not qnb.model.linear._pass.original

    def test_the_original_pass_is_over_when_a_metric_runs(self):
        model = tiny_llama()
        qnb.quantize(model, "w8a8", progress=False)
        ids = texts_of(9)[0][None]
        with torch.no_grad():
            expected = model(ids).logits.sum().item()
        assert evaluate(model, texts_of(9, 8), metric=lambda m: m(ids).logits.sum()).metric == expected


class TestTexts:
    def test_a_text_longer_than_the_context_is_cut(self):
        model, (long,) = tiny_llama(), texts_of(60)
        assert evaluate(model, [long]) == evaluate(model, [long[:24]])
        assert evaluate(model, [long]).tokens == 23

    def test_forms_of_the_same_texts_give_the_same(self):
        model, texts = tiny_llama(), texts_of(10, 10)
        expected = evaluate(model, texts)
        for same in (
            torch.stack(texts),
            tuple(t[None] for t in texts),
            [{"input_ids": t[None], "attention_mask": torch.ones(1, 10)} for t in texts],
            (t for t in texts),
            [transformers.BatchEncoding({"input_ids": t[None]}) for t in texts],
        ):
            assert evaluate(model, same) == expected

    def test_padding_counts_for_nothing_and_rows_are_texts(self):
        model, (a, b) = tiny_llama(), texts_of(10, 6)
        qnb.quantize(model, "w8a8", progress=False)
        batch = {
            "input_ids": torch.stack([a, torch.cat([b, torch.zeros(4, dtype=torch.long)])]),
            "attention_mask": torch.tensor([[1] * 10, [1] * 6 + [0] * 4]),
        }
        single, together = evaluate(model, [a, b]), evaluate(model, [batch])
        assert (together.tokens, together.texts) == (single.tokens, single.texts) == (14, 2)
        for name in ("perplexity", "perplexity_se", "kl", "kl_se", "top1"):
            assert getattr(together, name) == pytest.approx(getattr(single, name), rel=1e-3), name

    def test_what_lies_beside_bare_ids_gets_their_batch_axis(self):
        text = texts_of(9)[0]
        mask = torch.tensor([1] * 9 + [0] * 4)
        labels = torch.where(mask == 1, torch.cat([text, text[:4]]), -100)
        padded = {"input_ids": torch.cat([text, text[:4]]), "attention_mask": mask}
        alone = evaluate(tiny_llama(), [text])
        beside = (padded, {**padded, "input_ids": padded["input_ids"][None]}, {**padded, "labels": labels})
        for given in beside:
            result = evaluate(tiny_llama(), [given])
            assert (result.tokens, result.perplexity) == (8, pytest.approx(alone.perplexity, rel=1e-5))
        unpadded = {"input_ids": text, "labels": torch.where(torch.arange(9) > 4, text, -100)}
        assert evaluate(tiny_llama(), [unpadded]).tokens == 4

    def test_labels_choose_what_counts(self):
        model, (ids,) = tiny_llama(), texts_of(10)
        labels = ids.clone()
        labels[:6] = -100
        result = evaluate(model, [{"input_ids": ids[None], "labels": labels[None]}])
        with torch.no_grad():
            loss = model(ids[None], labels=labels[None]).loss.item()
        assert result.tokens == 4
        assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-5)

    def test_one_text_has_no_standard_error_and_says_why(self):
        result = evaluate(tiny_llama(), texts_of(10))
        assert result.perplexity_se is None
        assert "at least two" in result.unavailable["perplexity_se"]

    def test_the_demo_models_own_texts_need_no_naming(self):
        model, tokenizer = qnb.demo_lm()
        two = qnb.demo_texts("evaluation")[:2]
        result = evaluate(model, two)  # its own tokenizer, too
        assert (result.tokens, result.texts) == (1000, 2)
        with torch.no_grad():
            ids = [torch.tensor([tokenizer(text).input_ids]) for text in two]
            loss = sum(model(i, labels=i).loss.item() for i in ids) / 2  # of equal length
        assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-5)

    @pytest.mark.parametrize(
        ("texts", "says"),
        [
            ([], "texts is empty"),
            (iter([]), "texts is empty"),
            ("one string", "one bare string"),
            (["abc", 5], r"texts\[1\] is 5 of type int among strings"),
            ([5, 6], r"texts\[0\] is 5 of type int"),
            (7, "texts is 7 of type int"),
            (["abc"], "no tokenizer is given"),
            ([torch.tensor([1, 2]), torch.tensor([3])], r"texts\[1\] has 1 token"),
            ([torch.tensor([], dtype=torch.long)], r"texts\[0\] has 0 token"),
            ([torch.tensor([1, VOCABULARY])], rf"token id {VOCABULARY}, and the model knows 0 to {VOCABULARY - 1}"),
            ([torch.tensor([1, -1])], "token id -1"),
            ([{"input_ids": torch.rand(1, 4)}], "token ids of torch.float32"),
            ([{"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.tensor([[1, 0]])}], "nothing to predict"),
            (None, "no texts given"),
        ],
    )
    def test_what_cannot_be_measured_is_refused_in_one_line(self, texts, says):
        model = tiny_llama()
        with pytest.raises(BadInput, match=says) as caught:
            evaluate(model, texts)
        assert "\n" not in str(caught.value)

    def test_strings(self):
        def letters(text):
            return {"input_ids": [0, *(ord(c) - 96 for c in text)]}

        model = tiny_llama()
        result = evaluate(model, ["abc", "de"], letters)
        assert result == evaluate(model, [torch.tensor([0, 1, 2, 3]), torch.tensor([0, 4, 5])])
        with pytest.raises(BadInput, match=r"texts\[1\], '', has 1 token"):
            evaluate(model, ["abc", ""], letters)
        with pytest.raises(BadInput, match="cannot be called"):
            evaluate(model, ["abc"], tokenizer=5)
        with pytest.raises(BadInput, match="without input_ids"):
            evaluate(model, ["abc"], tokenizer=len)

    @pytest.mark.parametrize("model", [None, "model", 5, {}])
    def test_what_is_no_model_is_refused(self, model):
        with pytest.raises(BadInput, match="give a torch.nn.Module"):
            evaluate(model, texts_of(5))

    def test_a_model_on_meta_is_refused(self):
        with torch.device("meta"):
            model = nn.Linear(4, 4)
        with pytest.raises(BadInput, match="weight of the model is on the meta device"):
            evaluate(model, [torch.randn(2, 4)])

    @pytest.mark.parametrize("reference", [5, nn.Linear(3, 3, device="meta")])
    def test_a_reference_is_checked_like_a_model(self, reference):
        with pytest.raises(BadInput):
            evaluate(tiny_llama(), texts_of(5), reference=reference)


class TestNumbersThatAreNone:
    def test_logits_of_nan_are_a_reason_never_a_number(self):
        logits = torch.zeros(4, 4)
        logits[2, 1] = math.nan
        texts = [torch.tensor([0, 1, 3]), torch.tensor([0, 2, 1])]
        result = evaluate(Table(logits), texts, reference=Table(torch.zeros(4, 4)))
        for name in ("perplexity", "perplexity_se", "kl", "kl_p99", "top1"):
            assert getattr(result, name) is None
            assert result.unavailable[name] == "the logits hold NaN or infinity, first in text 1"
        json.dumps(result.to_dict(), allow_nan=False)

    def test_an_original_of_nan_leaves_the_perplexity(self):
        result = evaluate(
            Table(torch.zeros(4, 4)), texts=[torch.tensor([0, 1, 3])] * 2, reference=Table(torch.full((4, 4), math.nan))
        )
        assert result.perplexity == pytest.approx(4)
        assert result.kl is None and "KL is not finite" in result.unavailable["kl"]

    def test_a_certain_mistake_is_not_called_infinite_perplexity(self):
        logits = torch.zeros(3, 3)
        logits[0, 1] = -math.inf
        result = evaluate(Table(logits), [torch.tensor([0, 1]), torch.tensor([0, 2])])
        assert result.perplexity is None and "first in text 0" in result.unavailable["perplexity"]

    def test_every_none_has_its_reason(self):
        for result in (
            evaluate(tiny_llama(), texts_of(5)),
            evaluate(nn.Linear(4, 4), [torch.randn(2, 4)]),
            evaluate(nn.Linear(4, 4), None, metric=lambda m: 1.0),
        ):
            missing = {name for name, value in result.to_dict().items() if value is None}
            assert missing == set(result.unavailable)
            assert all(result.unavailable.values())


class TestWorstTokens:
    def pair(self, strays: dict[int, float]) -> tuple[Table, Table]:
        """A model of 4 tokens and its original, which differ behind the tokens in `strays`, by so much each."""
        then = torch.zeros(4, 4)
        then[:, 2] = 1.0
        now = then.clone()
        for token, much in strays.items():
            now[token, 3] += much
        return Table(now), Table(then)

    def test_they_are_the_farthest_with_what_stands_before_them(self):
        now, then = self.pair({1: 3.0, 3: 0.5})
        texts = [torch.tensor([0, 2, 3, 0]), torch.tensor([2, 0, 1, 2, 1])]
        result = evaluate(now, texts, reference=then)
        first, second = result.worst  # behind the token 1, and behind the token 3; elsewhere the two agree
        p, q = (m.table.detach()[1].double().log_softmax(-1) for m in (then, now))
        assert first.kl == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-5)
        assert (first.text, first.position, first.context) == (1, 3, "2 0 1")
        assert (first.token, first.original, first.now) == ("2", "2", "3")
        assert (second.text, second.position, second.context, second.now) == (0, 3, "0 2 3", "2")
        assert first.kl > second.kl > 0

    def test_no_more_than_five_whatever_the_chunks(self, monkeypatch):
        model, texts = tiny_llama(), texts_of(20, 21, 9)
        qnb.quantize(model, "w8a8", progress=False)
        whole = evaluate(model, texts)
        assert len(whole.worst) == 5
        every = torch.tensor([t.kl for t in whole.worst])
        assert every.equal(every.sort(descending=True).values) and every[0] >= whole.kl_p99 >= whole.kl
        monkeypatch.setattr("qnb.measure.predictions._CHUNK", 3 * VOCABULARY)
        parts = evaluate(model, texts)
        assert [(t.text, t.position, t.token) for t in parts.worst] == [
            (t.text, t.position, t.token) for t in whole.worst
        ]

    def test_a_tokenizer_turns_them_into_words_that_html_escapes(self):
        class Tokenizer:
            def __call__(self, text):
                return {"input_ids": [int(c) for c in text]}

            def decode(self, ids):
                return "".join(["a", "<b>", "\n", "d"][i] for i in ids)

        now, then = self.pair({1: 3.0})
        result = evaluate(now, ["0213", "00"], Tokenizer(), reference=then)
        (worst,) = result.worst
        assert (worst.context, worst.token, worst.original, worst.now) == ("a\\n<b>", "d", "\\n", "d")
        assert "a\\n<b> [d]" in result.text()
        page = result._repr_html_()
        assert "<b>" not in page and "a\\n&lt;b&gt; [d]" in page
        assert json.loads(json.dumps(result.to_dict()))["worst"][0]["kl"] == worst.kl

    def test_a_token_that_the_tokenizer_cannot_decode_is_its_number(self):
        class Tokenizer:
            def decode(self, ids):
                return [{0: "a", 1: "b", 2: "c"}[i] for i in ids][0]

        now, then = self.pair({1: 3.0})
        (worst,) = evaluate(now, [torch.tensor([1, 0])], Tokenizer(), reference=then).worst
        assert (worst.context, worst.token, worst.now) == ("b", "a", "3")

    def test_padding_is_no_context(self):
        now, then = self.pair({1: 3.0})
        padded = {"input_ids": torch.tensor([[0, 0, 2, 1, 0]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
        (worst,) = evaluate(now, [padded], reference=then).worst
        assert (worst.position, worst.context) == (4, "2 1")

    def test_a_long_context_is_cut_at_its_start(self):
        now, then = self.pair({1: 3.0})
        (worst,) = evaluate(now, [torch.tensor([0, 2] * 60 + [1, 0])], reference=then).worst
        assert worst.context.startswith("…") and worst.context.endswith("0 2 1") and len(worst.context) < 50

    def test_of_an_encoder_decoder_they_are_labels(self):
        config = transformers.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        torch.manual_seed(0)
        model = transformers.T5ForConditionalGeneration(config).eval()
        qnb.quantize(model, "w8a8", progress=False)
        a, b = texts_of(9, 4)
        worst = evaluate(model, [{"input_ids": a[None], "labels": b[None]}]).worst
        assert {(t.position, t.token) for t in worst} <= {(i, str(int(t))) for i, t in enumerate(b)} and worst
        assert {t.context for t in worst} <= {" ".join(map(str, b[:i].tolist())) for i in range(4)}

    def test_without_a_difference_there_is_none_and_no_table(self):
        model = tiny_llama()
        assert evaluate(model, texts_of(9)).worst == ()
        same = evaluate(model, texts_of(9), reference=tiny_llama())
        assert (same.kl, same.worst) == (0, ()) and "farthest" not in same.text()


class TestOtherModels:
    def test_relative_error_and_cosine_by_hand(self):
        class Shifted(nn.Module):
            def __init__(self, shift):
                super().__init__()
                self.shift = nn.Parameter(torch.tensor(shift))

            def forward(self, x):
                return (x + self.shift, "something else")

        inputs = [torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0]])]
        result = evaluate(Shifted([0.0, 1.0]), inputs, reference=Shifted([0.0, 0.0]))
        rows = torch.cat(inputs)
        assert result.relative_error == pytest.approx(math.sqrt(3 / rows.pow(2).sum().item()))
        cosines = nn.functional.cosine_similarity(rows, rows + torch.tensor([0.0, 1.0]))
        assert result.cosine == pytest.approx(cosines.mean().item())
        assert result.cosine_se == pytest.approx(cosines.std().item() / math.sqrt(3))
        assert result.relative_error_se > 0
        assert (result.texts, result.perplexity) == (3, None)

    def test_a_quantized_layer(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        x = [torch.randn(16, 64) for _ in range(3)]
        with torch.no_grad():
            then = torch.cat([model(b) for b in x])
        qnb.quantize(model, "w8a8", progress=False)
        with torch.no_grad():
            now = torch.cat([model(b) for b in x])
        result = evaluate(model, x)
        assert result.relative_error == pytest.approx(((now - then).norm() / then.norm()).item(), rel=1e-4)
        assert 0.999 < result.cosine < 1

    def test_rows_that_are_padding_or_zero_count_for_nothing(self):
        class Scaled(nn.Module):
            def __init__(self, change):
                super().__init__()
                self.change = nn.Parameter(torch.tensor(change))

            def forward(self, x, attention_mask):
                return {"hidden": x + self.change * x.flip(-1)}

        x = torch.tensor([[[1.0, 2.0], [0.0, 0.0], [9.0, 8.0]], [[3.0, 1.0], [2.0, 5.0], [1.0, 1.0]]])
        mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
        result = evaluate(Scaled(0.5), [{"x": x, "attention_mask": mask}], reference=Scaled(0.0))
        seen = x[mask != 0]
        assert result.relative_error == pytest.approx(0.5)  # a row and its mirror image are of one length
        directions = seen[seen.norm(dim=-1) > 0]
        cosine = nn.functional.cosine_similarity(directions, directions + 0.5 * directions.flip(-1))
        assert result.cosine == pytest.approx(cosine.mean().item(), rel=1e-6)
        assert result.texts == 2 and result.relative_error_se is not None

    def test_the_more_an_output_strays_the_larger_its_error(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        x = [torch.randn(16, 64)]
        errors = []
        for scheme in ("w8a16", "w8a8"):
            qnb.quantize(model, scheme, progress=False)
            errors.append(evaluate(model, x))
        assert 0 < errors[0].relative_error < errors[1].relative_error
        assert errors[0].cosine > errors[1].cosine
        assert "relative error" in errors[0].text() and "perplexity" not in errors[0].text()

    def test_an_encoder_is_no_language_model(self):
        config = transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=16,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.BertForMaskedLM(config)
        qnb.quantize(model, "w8a8", progress=False)
        result = evaluate(model, texts_of(9, 40, 1))
        assert result.perplexity is None and 0 < result.relative_error < 0.1

    def test_an_encoder_decoder_predicts_its_labels(self):
        config = transformers.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        torch.manual_seed(0)
        model = transformers.T5ForConditionalGeneration(config).eval()
        a, b = texts_of(9, 5)
        result = evaluate(model, [{"input_ids": a[None], "labels": b[None]}])
        with torch.no_grad():
            loss = model(input_ids=a[None], labels=b[None]).loss.item()
        assert result.tokens == 5
        assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
        with pytest.raises(BadInput, match="needs input_ids and labels"):
            evaluate(model, [a])

    def test_outputs_of_nan_are_a_reason(self):
        a, b = nn.Linear(2, 2), nn.Linear(2, 2)
        with torch.no_grad():
            a.weight.fill_(math.nan)
        result = evaluate(a, [torch.ones(1, 2)], reference=b)
        assert result.relative_error is None and "NaN" in result.unavailable["relative_error"]

    def test_a_model_without_tensors_is_refused(self):
        class Words(nn.Module):
            def forward(self, x):
                return "words"

        with pytest.raises(BadInput, match="without a tensor"):
            evaluate(Words(), [torch.ones(1)])


class TestMetric:
    def test_it_stands_in_the_result(self):
        result = evaluate(nn.Linear(4, 4), None, metric=lambda m: torch.tensor(m.in_features / 8))
        assert result.metric == 0.5
        assert result.unavailable["perplexity"] == "no texts given"

    def test_it_is_a_row_of_its_own_without_a_standard_error(self):
        result = evaluate(nn.Linear(4, 4), [torch.ones(2, 4)], metric=lambda m: 0.75)
        (row,) = [r for r in result.rows() if r[0] == "metric"]
        assert row == ("metric", "0.7500", "your own measure, higher is better")
        assert not hasattr(result, "metric_se") and "metric" not in result.unavailable

    def test_it_runs_in_eval_mode_without_gradients(self):
        seen = []
        model = nn.Linear(4, 4).train()
        evaluate(model, None, metric=lambda m: seen.append((m.training, torch.is_grad_enabled())) or 0.0)
        assert seen == [(False, False)] and model.training

    def test_nan_is_a_reason(self):
        result = evaluate(nn.Linear(4, 4), None, metric=lambda m: math.nan)
        assert result.metric is None and result.unavailable["metric"] == "metric returned nan"

    @pytest.mark.parametrize("metric", [5, lambda m: "good", lambda m: None, lambda m: torch.ones(3)])
    def test_what_is_no_measure_is_refused(self, metric):
        with pytest.raises(BadInput, match="metric"):
            evaluate(nn.Linear(4, 4), None, metric=metric)

    def test_its_own_error_comes_out(self):
        with pytest.raises(ZeroDivisionError):
            evaluate(nn.Linear(4, 4), None, metric=lambda m: 1 / 0)


class TestWords:
    def test_the_table_shows_what_was_measured_and_what_was_not(self):
        text = evaluate(tiny_llama(), texts_of(9, 10)).text()
        assert "perplexity" in text and "standard error, over 2 texts, 17 tokens" in text
        assert ITS_OWN_ORIGINAL in text
        assert "cosine" not in text and "nan" not in text.lower().replace("unavailable", "")
