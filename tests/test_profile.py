"""Profiles: what is derived from scripted runs, what is left behind, and which words a change gets."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import mmap
import re
from statistics import fmean

import pytest
import torch
from torch import nn

import qnb
from qnb.errors import BadInput
from qnb.measure import profile as profile_module
from qnb.measure.accuracy import Accuracy, PerText
from qnb.measure.comparison import QUANTITIES
from qnb.measure.original import ITS_OWN_ORIGINAL
from qnb.measure.probes import Probe, Reading, using
from qnb.measure.probes.replay import replay
from qnb.measure.profile import CodeProfile, Profile, profile_code, remember_defaults
from qnb.measure.statistics import ratio_interval
from qnb.measure.workload import Generation, Timing, Workload

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

CONTEXT = 64


def profile(model, *args, **kwargs):
    return qnb.profile(model, *args, progress=False, **kwargs)


def tiny_llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def letters(text: str) -> dict[str, list[int]]:
    return {"input_ids": [1 + ord(c) % 49 for c in text]}


class Scripted(Workload):
    """Takes as long as it is told; counts how often it is run."""

    def __init__(self, timings, prompt_tokens=None, new_tokens=None, also=lambda: None):
        self.timings, self.runs, self.also = list(timings), 0, also
        self.prompt_tokens, self.new_tokens = prompt_tokens, new_tokens

    def run(self):
        self.also()
        self.runs += 1
        return self.timings[(self.runs - 1) % len(self.timings)]


@pytest.fixture
def scripted(monkeypatch):
    def use(*args, **kwargs):
        work = Scripted(*args, **kwargs)
        monkeypatch.setattr(profile_module, "workload_of", lambda *given: work)
        return work

    return use


class TestDerivedNumbers:
    def test_rates_are_of_the_parts_they_belong_to(self, scripted):
        scripted([Timing(0.2, 0.05, 0.1)], prompt_tokens=100, new_tokens=11)
        result = profile(nn.Linear(4, 4), repeat=5)
        assert result.latency_ms == pytest.approx(200)
        assert result.prefill_tokens_per_s == pytest.approx(100 / 0.05)
        assert result.decode_tokens_per_s == pytest.approx(10 / 0.1)

    def test_warm_up_runs_are_not_in_the_numbers(self, scripted):
        work = scripted([Timing(9.0), Timing(0.1), *[Timing(0.01)] * 50])
        result = profile(nn.Linear(4, 4), repeat=3)
        # The first run was so slow that no second one warms up.
        assert result._samples["latency_ms"] == (pytest.approx(100), pytest.approx(10), pytest.approx(10))
        assert result.latency_ms == pytest.approx(10)
        assert work.runs == 1 + 3 + profile_module._WINDOWS

    def test_percentiles_interpolate(self, scripted):
        halves = [[Timing(i / 1000) for i in runs] for runs in (range(1, 12), range(12, 22))]
        scripted([*[Timing(0.0)] * 2, *halves[0], *[Timing(0.0)] * profile_module._WINDOWS, *halves[1]])
        result = profile(nn.Linear(4, 4), repeat=21)
        assert (result.latency_ms, result.latency_p5_ms, result.latency_p95_ms) == pytest.approx((11, 2, 20))

    def test_without_repeat_it_runs_until_four_seconds_have_passed(self, scripted, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(profile_module.time, "perf_counter", lambda: now[0])

        def takes(seconds):
            def run():
                now[0] += seconds

            return run

        for seconds, runs in ((0.25, 16), (0.01, 30), (30.0, 7)):
            scripted([Timing(seconds)], also=takes(seconds))
            assert profile(nn.Linear(4, 4)).environment["runs"] == runs

    @pytest.mark.parametrize(("repeat", "halves"), [(1, (1, 0)), (9, (5, 4)), (None, (15, 15))])
    def test_half_of_the_runs_come_behind_the_texts(self, scripted, repeat, halves):
        at_texts = []
        scripted([Timing(0.001 * i) for i in range(100)], also=lambda: ran.append(len(at_texts)))
        ran = []
        result = profile(nn.Linear(4, 4), metric=lambda model: at_texts.append(1) or 1.0, repeat=repeat)
        warm_up = 2
        assert ran.count(0) == warm_up + halves[0] + profile_module._WINDOWS
        assert ran.count(1) == 1 + halves[1]
        behind = [0.001 * i for i in range(ran.count(0) + 1, 100)]
        assert result._samples["latency_ms"][halves[0] :] == tuple(1000 * s for s in behind[: halves[1]])

    def test_energy_is_of_one_run_and_of_one_token(self, scripted, tmp_path):
        recording = tmp_path / "board.csv"
        recording.write_text("time,value\n" + "".join(f"{s},{1000 + 100 * s}\n" for s in range(400)))
        now = [0.0]

        def a_second():
            now[0] += 1.0

        scripted([Timing(1.0, 0.5, 0.5)], prompt_tokens=8, new_tokens=5, also=a_second)
        with using("energy_mj", replay(recording, clock=lambda: now[0])):
            result = profile(nn.Linear(4, 4), repeat=2)
        assert result.energy_mj == pytest.approx(100)
        assert result.energy_mj_per_token == pytest.approx(20)
        assert result.environment["energy_source"] == "replay of board.csv"
        assert result.environment["energy_steps"] == 20
        assert result.environment["energy_spread"] == pytest.approx(100 / 20)
        assert len(result._samples["energy_mj"]) == profile_module._WINDOWS

    def test_a_meter_that_fails_leaves_none_and_its_reason(self, scripted):
        class Broken(Probe):
            quantity = "energy_mj"

            def start(self):
                pass

            def stop(self):
                return Reading(None, "broken", reason="it broke")

        scripted([Timing(0.1)])
        with using("energy_mj", Broken):
            result = profile(nn.Linear(4, 4), repeat=1)
        assert result.energy_mj is None and result.energy_mj_per_token is None
        assert result.unavailable["energy_mj"] == result.unavailable["energy_mj_per_token"] == "it broke"

    def test_every_none_has_its_reason_and_json_takes_it_all(self):
        model, texts = tiny_llama(), [torch.arange(1, 20), torch.arange(5, 15)]
        for result in (
            profile(model, texts=texts, new_tokens=3, repeat=2),
            profile(model, new_tokens=1, repeat=1),
            profile(nn.Linear(4, 4), inputs=torch.ones(2, 4), repeat=1),
            profile_code(lambda: None),
        ):
            plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
            missing = {k for k, v in plain.items() if v is None}
            assert missing == set(result.unavailable)
            assert all(result.unavailable.values())


class TestRuns:
    def test_a_language_model_writes_exactly_the_tokens_asked_for(self):
        model = tiny_llama()
        with torch.no_grad():
            model.lm_head.weight.zero_()  # every step ends the text, if it may: token 0 is the end and wins each tie
        written = []
        handle = model.register_forward_hook(lambda m, args, out: written.append(out.logits.shape))
        result = profile(model, letters, prompt="abcdef", new_tokens=9, repeat=1)
        handle.remove()
        assert len(written) % 9 == 0 and len(written) >= 9 * 3
        assert (result.environment["prompt_tokens"], result.environment["new_tokens"]) == (6, 9)
        assert result.latency_ms > 0 and result.prefill_tokens_per_s > 0 and result.decode_tokens_per_s > 0

    def test_every_row_of_a_batched_prompt_counts(self, monkeypatch, tmp_path):
        recording = tmp_path / "board.csv"
        recording.write_text("time,value\n" + "".join(f"{s},{24 * s}\n" for s in range(400)))
        now, run = [0.0], Generation.run

        def a_second(work):
            run(work)  # which looks whether all tokens came
            now[0] += 1.0
            return Timing(0.2, 0.05, 0.1)

        monkeypatch.setattr(Generation, "run", a_second)
        prompt = torch.arange(1, 16).reshape(3, 5)
        with using("energy_mj", replay(recording, clock=lambda: now[0])):
            result = profile(tiny_llama(), prompt=prompt, new_tokens=4, repeat=2)
        assert (result.environment["prompt_tokens"], result.environment["new_tokens"]) == (15, 12)
        assert result.prefill_tokens_per_s == pytest.approx(15 / 0.05)
        assert result.decode_tokens_per_s == pytest.approx((12 - 3) / 0.1)
        assert result.energy_mj_per_token == pytest.approx(24 / 12)
        assert "15 prompt + 12 new tokens in 3 rows" in result.text()
        single = profile(tiny_llama(), prompt=prompt, new_tokens=1, repeat=1)
        assert "decoding starts with the second" in single.unavailable["decode_tokens_per_s"]
        flat = profile(tiny_llama(), prompt=prompt.reshape(1, 15), new_tokens=12, repeat=2)
        assert "not compared: rows 3 before, 1 now" in flat.against(result).text()

    def test_the_prompt_is_the_start_of_the_first_text(self):
        texts = ["x" * 40, "y" * 12]
        result = profile(tiny_llama(), letters, texts=texts, new_tokens=40, repeat=1)
        assert result.environment["prompt_tokens"] == CONTEXT - 40
        assert result.environment["prompt"] == "the first of the texts, cut to 24 tokens"
        assert result.accuracy.texts == 2

    def test_without_anything_the_prompt_is_random_and_says_so(self):
        seen = []
        model = tiny_llama()
        handle = model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"]), with_kwargs=True)
        result = profile(model, new_tokens=2, repeat=1)
        handle.remove()
        assert "random token ids" in result.environment["prompt"]
        prompts = [ids for ids in seen if ids.shape[1] > 1]
        assert all(torch.equal(ids, prompts[0]) for ids in prompts)
        assert len(prompts[0].unique()) > 10

    def test_a_generator_of_texts_is_not_used_up_by_the_prompt(self):
        texts = (torch.arange(1, n) for n in (9, 10, 11))
        assert profile(tiny_llama(), texts=texts, new_tokens=2, repeat=1).accuracy.texts == 3

    def test_inputs_are_run_once_forward(self):
        calls = []

        class Pair(nn.Module):
            def forward(self, a, b, scale=1):
                calls.append((a, b, scale))
                return a * b * scale

        a, b = torch.ones(2), torch.full((2,), 3.0)
        result = profile(Pair(), inputs=(a, b), repeat=1)
        assert result.unavailable["prefill_tokens_per_s"] == "the inputs hold no token ids"
        profile(Pair(), inputs={"a": a, "b": b, "scale": 2}, repeat=1)
        assert calls[0] == (a, b, 1) or torch.equal(calls[0][1], b)
        assert calls[-1][2] == 2

    def test_inputs_of_a_language_model_are_one_forward(self):
        result = profile(tiny_llama(), inputs=torch.arange(1, 11), repeat=2)
        assert result.environment["prompt_tokens"] == 10
        assert result.decode_tokens_per_s is None and result.prefill_tokens_per_s > 0

    def test_an_encoder_is_one_forward_of_the_prompt(self):
        config = transformers.BertConfig(
            vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        )
        result = profile(transformers.BertModel(config), letters, prompt="abc", repeat=1)
        assert result.environment["prompt_tokens"] == 3
        assert "nothing was generated" in result.unavailable["decode_tokens_per_s"]

    def test_a_wrapper_of_torch_compile_that_generate_passes_by_is_said(self):
        model = tiny_llama()
        compiled = torch.compile(model, backend="eager")
        result = profile(compiled, new_tokens=2, repeat=1)
        assert result.environment["compiled"] and "the times are uncompiled" in result.text()
        assert "the times are uncompiled" not in profile(model, new_tokens=2, repeat=1).text()

    def test_bytes_are_those_the_model_holds(self):
        model = tiny_llama()
        before = profile(model, new_tokens=2, repeat=1)
        total = sum(p.untyped_storage().nbytes() for p in {id(p): p for p in model.parameters()}.values())
        buffers = sum(b.untyped_storage().nbytes() for b in model.buffers())
        assert (before.weight_bytes, before.original_bytes) == (total + buffers, 0)
        qnb.quantize(model, "w8a8", progress=False)
        after = profile(model, new_tokens=2, repeat=1)
        assert after.weight_bytes < before.weight_bytes and after.original_bytes > 0
        assert sum(after.environment["schemes"].values()) == 7
        assert set(after.environment["schemes"]) == {"w8a8"}

    def test_the_models_own_tokenizer_and_texts_are_used(self):
        model = tiny_llama()
        remember_defaults(model, letters, ["some text", "more text"])
        result = profile(model, new_tokens=2, repeat=1)
        assert result.accuracy.texts == 2
        assert result.environment["prompt"].startswith("the first of the texts")

    def test_random_weights_have_no_accuracy_and_the_reason_says_what_to_pass(self):
        reason = profile(tiny_llama(), new_tokens=2, repeat=1).unavailable["accuracy"]
        assert "pass texts=" in reason and "random weights" in reason

    def test_a_metric_alone_is_an_accuracy(self):
        result = profile(nn.Linear(4, 4), inputs=torch.ones(1, 4), metric=lambda m: 0.75, repeat=1)
        assert result.accuracy.metric == 0.75

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ({"prompt": "a" * (CONTEXT - 7), "new_tokens": 8}, f"57 tokens and 8 new .* context is {CONTEXT}.* to 56"),
            ({"new_tokens": CONTEXT}, "shorten the prompt to 0"),
            ({"new_tokens": 0}, "new_tokens=0"),
            ({"new_tokens": 2.5}, "new_tokens=2.5"),
            ({"repeat": 0}, "repeat=0"),
            ({"repeat": True}, "repeat=True"),
            ({"prompt": 5}, "prompt is 5 of type int"),
            ({"prompt": ""}, "holds no tokens"),
            ({"prompt": torch.tensor([1, 99])}, "token id 99"),
            ({"prompt": "a", "inputs": torch.tensor([1, 2])}, "give one of them"),
            ({"texts": []}, "texts is empty"),
        ],
    )
    def test_what_cannot_be_run_is_refused_in_one_line(self, given, says):
        with pytest.raises(BadInput, match=says) as caught:
            profile(tiny_llama(), letters, **given)
        assert "\n" not in str(caught.value)

    def test_a_prompt_in_words_needs_a_tokenizer(self):
        with pytest.raises(BadInput, match="no tokenizer is given"):
            profile(tiny_llama(), prompt="words")

    def test_a_model_that_nothing_is_known_of_asks_for_inputs(self):
        with pytest.raises(BadInput, match="pass inputs="):
            profile(nn.Linear(4, 4))

    @pytest.mark.parametrize("model", [None, "model", lambda x: x])
    def test_what_is_no_model_is_refused(self, model):
        with pytest.raises(BadInput, match="give a torch.nn.Module"):
            profile(model)


class TestTheModelIsLeftAsItWas:
    def model(self):
        model = tiny_llama().train()
        model.model.layers[0].mlp.eval()
        model.generation_config.update(do_sample=True, temperature=0.3, num_beams=4, max_length=11)
        return model

    def state(self, model):
        return (
            {name: m.training for name, m in model.named_modules()},
            copy.deepcopy(model.generation_config.to_dict()),
            copy.deepcopy(model.config.to_dict()),
            {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
            torch.is_grad_enabled(),
        )

    def test_after_a_profile(self, caplog, capfd):
        model = self.model()
        before = self.state(model)
        profile(model, texts=[torch.arange(1, 9), torch.arange(1, 12)], new_tokens=3, repeat=1)
        assert self.state(model) == before
        assert "seem to have been set" not in caplog.text + capfd.readouterr().err  # no advice about our own settings

    @pytest.mark.parametrize("at", [1, 2, 3, 4, 6, 7, 8, 10])
    def test_after_an_interrupt_at_any_forward(self, at):
        model = self.model()
        qnb.quantize(model, "w8a8", progress=False)
        calls = []

        def interrupt(*args):
            calls.append(1)
            if len(calls) == at:
                raise KeyboardInterrupt

        handle = model.model.norm.register_forward_hook(interrupt)
        before = self.state(model)
        with pytest.raises(KeyboardInterrupt):
            profile(model, texts=[torch.arange(1, 9), torch.arange(1, 12)], new_tokens=1, repeat=1)
        assert self.state(model) == before
        handle.remove()


def made(latency: float | None = 100.0, spread=0.01, environment=(), **fields) -> Profile:
    """A profile with made-up samples around the latency."""
    samples = tuple(latency * (1 + spread * (4 * i % 15 - 7) / 7) for i in range(15)) if latency else ()
    known = {
        "prompt_tokens": 8,
        "new_tokens": 4,
        "device": "cpu",
        "threads": 2,
        "torch": "x",
        "cpu": "y",
        **dict(environment),
    }
    values = {"latency_ms": latency, "weight_bytes": 1000, "original_bytes": 0, **fields}
    unavailable = {q.field: "not made" for q in QUANTITIES if values.get(q.field) is None}
    unavailable |= {"accuracy": "not made"} if fields.get("accuracy") is None else {}
    return Profile(**values, unavailable=unavailable, environment=known, _samples={"latency_ms": samples})


def change(comparison, field):
    return next(c for c in comparison.changes if c.field == field)


class TestComparison:
    def test_slower_comes_first_then_hungrier_then_what_got_better(self):
        comparison = made(150.0, weight_bytes=400, original_bytes=600).against(made(100.0))
        assert [s.split(":")[0] for s in comparison.sentences] == ["Slower", "Hungrier", "Lighter"]
        assert "latency +50 %" in comparison.sentences[0]
        assert comparison.text().splitlines()[0] == comparison.sentences[0]
        assert "kept originals +600 B" in comparison.sentences[1]
        assert "weights held −60 %" in comparison.sentences[2]

    def test_the_interval_holds_the_change(self):
        latency = change(made(150.0).against(made(100.0)), "latency_ms")
        assert latency.low < 0.5 < latency.high and latency.high - latency.low < 0.05
        assert latency.verdict == "worse"

    def test_a_change_within_the_spread_is_noise(self):
        comparison = made(104.0, spread=0.5).against(made(100.0, spread=0.5))
        assert change(comparison, "latency_ms").verdict == "within noise"
        assert comparison.sentences == ("Within noise: latency.",)
        assert "within noise" in comparison.text()

    def test_noise_that_lasts_widens_the_interval(self):
        mixed = [100.0, 130.0] * 12
        lasting = [100.0] * 12 + [130.0] * 12
        steady = [100.0 + i % 3 for i in range(24)]
        width = [high - low for low, high in (ratio_interval(steady, now, fmean) for now in (mixed, lasting))]
        assert width[1] > 1.5 * width[0]

    def test_a_machine_that_drifts_is_not_called_faster(self):
        drifting = [[level + 0.2 * (i % 5) for _ in range(2) for i in range(15)] for level in (108.0, 100.0)]
        before = drifting[0][:15] + [s - 4 for s in drifting[0][15:]]
        now = drifting[1][:15] + [s - 3 for s in drifting[1][15:]]
        low, high = ratio_interval(before, now)
        assert low < 1 < high
        low, high = ratio_interval(before, [0.5 * s for s in now])
        assert high < 0.6  # twice as fast is seen all the same

    def test_without_a_spread_of_its_own_each_side_has_one_by_its_halves(self):
        low, high = ratio_interval([100.0] * 10 + [104.0] * 10, [100.0] * 20)
        half = 4.303 * math.log(1.04) / 2
        assert (low, high) == pytest.approx((math.exp(-half) / 1.02, math.exp(half) / 1.02), rel=1e-3)

    def test_a_change_as_small_as_a_machines_drift_is_noise_however_tight_the_samples(self):
        assert (
            change(made(101.0, spread=1e-4).against(made(100.0, spread=1e-4)), "latency_ms").verdict == "within noise"
        )
        assert change(made(97.0, spread=1e-4).against(made(100.0, spread=1e-4)), "latency_ms").verdict == "better"

    def test_where_runs_say_next_to_nothing_that_is_said(self):
        found = change(made(100.0, spread=0.99).against(made(100.0, spread=0.99)), "latency_ms")
        assert found.high > 10 * (1 + found.low) and found.verdict == "within noise"
        assert re.fullmatch(r"unsteady: ×0\.\d+ to ×\d+\.?\d*", found.words)

    def test_intervals_are_the_same_each_time(self):
        a, b = (made(150.0).against(made(100.0)) for _ in range(2))
        assert a.changes == b.changes

    def test_higher_rates_are_better(self):
        now, before = (made(decode_tokens_per_s=v) for v in (50.0, 100.0))
        assert change(now.against(before), "decode_tokens_per_s").verdict == "worse"

    def test_different_work_is_not_compared(self):
        comparison = made(10.0, weight_bytes=500).against(made(100.0, environment={"new_tokens": 400}))
        assert change(comparison, "latency_ms").verdict == "unknown"
        assert "not compared: new tokens 400 before, 4 now" in comparison.text()
        assert change(comparison, "weight_bytes").verdict == "better"  # bytes are bytes

    def test_the_same_profile_says_that_nothing_changed(self):
        same = made(latency=None)
        assert same.against(same).sentences == ("Nothing that was measured changed.",)

    def test_a_missing_side_is_no_change(self):
        comparison = made(energy_mj=5.0).against(made())
        assert change(comparison, "energy_mj").change is None
        assert "not made" in comparison.text()

    def test_only_profiles_are_compared(self):
        with pytest.raises(BadInput, match="with another one, not with a int"):
            made().against(5)
        with pytest.raises(BadInput):
            made().against(profile_code(lambda: None))

    def test_it_goes_into_json_and_html(self):
        comparison = made(environment={"energy_notes": ["<b>odd</b>"]}).against(made())
        json.dumps(comparison.to_dict(), allow_nan=False)
        assert "<b>odd" not in comparison._repr_html_() and "&lt;b&gt;odd" in comparison._repr_html_()


def measured(nll, kl=None, key="k") -> Accuracy:
    """An accuracy of texts of ten tokens with these mean losses and KLs."""
    texts = tuple(PerText(10, 10 * n, None if kl is None else 10 * k, None if kl is None else 9) for n, k in
                  zip(nll, kl or nll, strict=True))  # fmt: skip
    mean = sum(nll) / len(nll)
    own = {} if kl else {f: ITS_OWN_ORIGINAL for f in ("kl", "kl_p99", "top1")}
    fields = dict(perplexity=math.exp(mean), perplexity_se=1.0, tokens=10 * len(nll), texts=len(nll), unavailable=own)
    if kl:
        fields |= dict(kl=sum(kl) / len(kl), kl_se=0.001, top1=0.9, top1_se=0.01)
    return Accuracy(**fields, _per_text=texts, _texts_key=key)


class TestAccuracyChange:
    losses = (1.0, 2.0, 3.0, 4.0, 5.0)

    def test_perplexity_is_paired_by_text(self):
        worse = measured([n + 0.01 + 0.001 * i for i, n in enumerate(self.losses)], kl=[0.1] * 5)
        comparison = made(accuracy=worse).against(made(accuracy=measured(self.losses)))
        found = change(comparison, "perplexity")
        assert found.verdict == "worse"  # unpaired, a standard error of 1.0 would drown it
        assert found.change == pytest.approx(math.expm1(0.012))
        assert found.low < found.change < found.high
        assert any(s.startswith("Worse: perplexity +1.2 %") for s in comparison.sentences)

    def test_of_other_texts_it_is_not_paired(self):
        worse = measured([n + 0.01 for n in self.losses], kl=[0.1] * 5, key="other texts")
        comparison = made(accuracy=worse).against(made(accuracy=measured(self.losses)))
        assert change(comparison, "perplexity").verdict == "within noise"

    def test_against_the_original_kl_and_agreement_change_from_none(self):
        comparison = made(accuracy=measured(self.losses, kl=[0.1] * 5)).against(made(accuracy=measured(self.losses)))
        assert change(comparison, "kl").change == pytest.approx(0.1)
        assert change(comparison, "kl").verdict == "worse"
        assert change(comparison, "top1").change == pytest.approx(-0.1)
        assert "the original" in comparison.text()

    def test_back_to_the_original_is_better(self):
        comparison = made(accuracy=measured(self.losses)).against(made(accuracy=measured(self.losses, kl=[0.1] * 5)))
        assert change(comparison, "kl").verdict == "better"

    def test_two_quantized_states_are_paired(self):
        rough, fine = ([0.1, 0.2, 0.3, 0.4, 0.5], [0.09, 0.19, 0.29, 0.39, 0.49])
        comparison = made(accuracy=measured(self.losses, kl=fine)).against(
            made(accuracy=measured(self.losses, kl=rough))
        )
        kl = change(comparison, "kl")
        assert kl.verdict == "better" and kl.change == pytest.approx(-0.01)
        assert kl.high - kl.low < 1e-6

    @pytest.mark.parametrize(("now", "verdict", "word"), [(0.7, "worse", "Worse"), (0.9, "better", "Better")])
    def test_a_metric_has_no_interval_and_more_is_better(self, now, verdict, word):
        comparison = made(accuracy=Accuracy(metric=now)).against(made(accuracy=Accuracy(metric=0.8)))
        found = change(comparison, "metric")
        assert (found.verdict, found.low, found.high) == (verdict, None, None)
        assert comparison.sentences[0].startswith(f"{word}: metric {'+' if now > 0.8 else '−'}0.100")

    def test_a_model_that_is_no_language_model_is_worse_by_its_outputs(self):
        original = Accuracy(texts=5, unavailable=dict.fromkeys(("relative_error", "cosine"), ITS_OWN_ORIGINAL))
        now = Accuracy(texts=5, relative_error=0.02, relative_error_se=0.001, cosine=0.9998, cosine_se=0.00001)
        comparison = made(accuracy=now).against(made(accuracy=original))
        assert {f: change(comparison, f).verdict for f in ("relative_error", "cosine")} == {
            "relative_error": "worse",
            "cosine": "worse",
        }
        assert change(comparison, "cosine").change == pytest.approx(-0.0002)
        assert change(comparison, "relative_error").low > 0
        assert change(made(accuracy=original).against(made(accuracy=now)), "cosine").verdict == "better"

    def test_accuracy_on_one_side_only_is_said(self):
        comparison = made(accuracy=measured(self.losses)).against(made())
        assert change(comparison, "perplexity").verdict == "unknown"
        assert "on one side only" in comparison.text()


class TestCode:
    def test_it_runs_once_unless_told_otherwise(self):
        calls = []
        assert profile_code(lambda: calls.append(1)).latency_ms >= 0
        assert calls == [1]
        result = profile_code(lambda: calls.append(1), repeat=4)
        assert len(calls) == 5
        assert len(result._samples["latency_ms"]) == 4

    @pytest.mark.parametrize("error", [ZeroDivisionError("x"), KeyboardInterrupt(), SystemExit(3)])
    def test_what_it_raises_comes_out_unchanged(self, error):
        def run():
            raise error

        with pytest.raises(type(error)) as caught:
            profile_code(run)
        assert caught.value is error

    def test_energy_is_of_one_run(self, tmp_path):
        recording = tmp_path / "r.csv"
        recording.write_text("time,value\n" + "".join(f"{s},{7 * s}\n" for s in range(100)))
        now = [0.0]
        kind = replay(recording, clock=lambda: now[0])
        meters = []

        class Kept(kind):
            def start(self):
                meters.append(self)
                super().start()

        def run():
            now[0] += 1
            meters[0].poll()

        with using("energy_mj", Kept):
            assert profile_code(run, repeat=10).energy_mj == pytest.approx(7)
            short = profile_code(run, repeat=1)
        assert short.energy_mj is None and "see repeat=" in short.unavailable["energy_mj"]

    def test_memory_of_the_code_is_seen(self):
        quiet = profile_code(lambda: None)

        def run():
            with mmap.mmap(-1, 150 * 2**20) as block:  # pages of its own, where the allocator may have some left
                for page in range(0, len(block), mmap.PAGESIZE):
                    block[page] = 1

        assert profile_code(run).peak_host_bytes - quiet.peak_host_bytes > 100 * 2**20

    def test_it_is_compared_with_an_earlier_run(self):
        a = profile_code(lambda: None, repeat=3)
        slower = dataclasses.replace(a, latency_ms=a.latency_ms * 10, _samples={"latency_ms": [a.latency_ms * 10] * 3})
        assert slower.against(a).sentences[0].startswith("Slower: latency")
        with pytest.raises(BadInput):
            a.against(made())

    @pytest.mark.parametrize("given", [{"run": 5}, {"run": print, "repeat": 0}, {"run": print, "repeat": "3"}])
    def test_what_cannot_be_run_is_refused(self, given):
        with pytest.raises(BadInput):
            profile_code(**given)


def test_tables_show_value_unit_and_how_it_was_measured():
    result = profile(tiny_llama(), texts=[torch.arange(1, 9), torch.arange(3, 12)], new_tokens=3, repeat=4)
    text = result.text()
    for words in ("latency", " ms", "tokens/s", "median of 4 runs, p5 to p95", "weights held", "perplexity", "torch "):
        assert words in text
    assert "unavailable" in text and "nothing here is on a CUDA device" in text
    assert isinstance(profile_code(lambda: None), CodeProfile) and "wall clock" in profile_code(lambda: None).text()
