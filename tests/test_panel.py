"""The live panel without a browser: what it changes, measures, shows and refuses; its widgets are driven by traits."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest
import torch
from torch import nn

import qnb
from qnb import schemes
from qnb.errors import BadInput, LayerRefused, QnbError, UnknownScheme
from qnb.model.inputs import samples_of
from qnb.model.linear import QLinear, held_storages, quantized_layers
from qnb.notebook.panel import colours, html, speed
from qnb.notebook.panel.evaluation import Evaluation, sample_of
from qnb.notebook.panel.grid import grid_of, patterns
from qnb.notebook.panel.prefix import Decoder, whole

pytest.importorskip("anywidget", reason="anywidget is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

UP = "model.layers.1.mlp.up_proj"


def tiny_llama(layers: int = 3, seed: int = 0) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(shape).eval()


class Letters:
    """A tokenizer of characters: as little as the panel needs."""

    def __call__(self, text: str) -> dict:
        return {"input_ids": [ord(c) % 97 for c in text]}

    def decode(self, ids, skip_special_tokens: bool = False) -> str:
        return "".join(chr(97 + i % 26) for i in ids)


TEXTS = [f"text number {i}, which goes on for a while: {'abc def ' * i}" for i in range(2, 8)]


@pytest.fixture(autouse=True)
def few_runs(monkeypatch):
    """Speeds of as few runs as the panel ever takes: what is held here is not how fast a tiny model is."""
    monkeypatch.setattr(speed, "_SECONDS", 0.0)


@pytest.fixture
def model() -> nn.Module:
    return tiny_llama()


@pytest.fixture
def open_panel():
    """Opens panels, and closes them and their threads when the test ends."""
    opened = []

    def make(model: nn.Module, **given):
        panel = qnb.panel(model, Letters(), TEXTS, new_tokens=4, **given)
        opened.append(panel)
        return panel

    yield make
    for panel in opened:
        panel.session.close()
        panel.close()


def never() -> None:
    """Stops nothing."""


def kl(panel) -> float | None:
    return html.value_of(panel.session.present, "kl")


class TestChanging:
    def test_set_undo_redo_and_go(self, model, open_panel):
        original = model.get_submodule(UP)
        panel = open_panel(model)
        panel.set(UP, "w8a8")
        panel.settle()
        assert panel.recipe() == {UP: ("w8a8", "nearest")} and kl(panel) > 0
        panel.set("*.q_proj", "w8a16")
        panel.settle()
        assert len(panel.recipe()) == 4
        panel.undo()
        panel.settle()
        assert panel.recipe() == {UP: ("w8a8", "nearest")}
        panel.redo()
        panel.settle()
        assert len(panel.recipe()) == 4
        panel.go(0)
        panel.settle()
        assert panel.recipe() == {} and model.get_submodule(UP) is original and kl(panel) == 0
        panel.undo()
        panel.settle()
        assert len(panel.recipe()) == 4 and [step.number for step in panel.steps] == [0, 1, 2]

    def test_figures_are_those_of_evaluate(self, model, open_panel):
        panel = open_panel(model)
        panel.set("*", "w8a8")
        panel.settle()
        found = panel.session.present.progress.accuracy
        expected = qnb.evaluate(model, TEXTS, Letters(), progress=False)
        assert found.tokens == expected.tokens
        assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-12)
        assert found.kl == pytest.approx(expected.kl, rel=1e-12) and found.kl_se == pytest.approx(expected.kl_se)
        assert found.top1 == expected.top1
        assert panel.session.present.weight_bytes == held_storages(model)[0]
        assert panel.session.present.speed.values["latency_ms"] > 0

    def test_a_model_that_is_quantized_already_is_compared_with_its_original(self, model, open_panel):
        other = tiny_llama()
        fresh = open_panel(other)
        fresh.settle()
        qnb.quantize(model, "w8a8", progress=False)
        panel = open_panel(model)
        panel.settle()
        first, present = panel.session.original, panel.session.present
        assert present.number == 1 and kl(panel) > 0
        assert first.weight_bytes == fresh.session.original.weight_bytes
        assert first.progress.accuracy.perplexity == fresh.session.original.progress.accuracy.perplexity
        assert first.written == fresh.session.original.written

    def test_what_a_cell_did_becomes_a_step(self, model, open_panel):
        panel = open_panel(model)
        panel.settle()
        qnb.quantize(model, "w8a8", layers=UP, progress=False)
        panel.session.look_around()
        panel.settle()
        assert panel.session.present.words == "changed outside the panel" and panel.recipe() == {
            UP: ("w8a8", "nearest")
        }

    def test_code_repeats_the_step(self, model, open_panel):
        panel = open_panel(model)
        panel.set("*.self_attn.*", "w8a16")
        panel.set([UP, "lm_head"], "w8a8")
        panel.settle()
        other = tiny_llama()
        for line in panel.code().splitlines():
            _, _, scheme, *flags = line.split()
            layers = [flag.strip('"') for flag in flags if flag != "--layers"]
            qnb.quantize(other, scheme, layers=layers, progress=False)
        assert {n: q.scheme for n, q in quantized_layers(other).items()} == {
            n: s for n, (s, _) in panel.recipe().items()
        }

    def test_save(self, model, open_panel, tmp_path):
        panel = open_panel(model)
        panel.set(UP, "w8a8")
        panel.settle()
        saved = qnb.Recipe.load(panel.save(tmp_path / "recipe.json"))
        assert saved.layers == qnb.Recipe.of(model).layers and saved.layers[UP].scheme == "w8a8"
        with pytest.raises(BadInput, match="give the name of a file"):
            panel.save(tmp_path)

    def test_two_panels_agree(self, model, open_panel):
        one, two = open_panel(model), open_panel(model)
        one.set(UP, "w8a8")
        one.settle()
        assert two.recipe() == one.recipe() and two.map.faces == one.map.faces
        assert two._figures.value == one._figures.value and "w8a8" in two._head.value
        two.undo()
        two.settle()
        assert one.recipe() == {} and one._head.value == two._head.value


def kept_busy(panel, monkeypatch) -> threading.Event:
    """Lets the panel measure until the event is set."""
    measuring, go_on = threading.Event(), threading.Event()

    def measure(model, step, check):
        measuring.set()
        assert go_on.wait(20)
        check()

    monkeypatch.setattr(panel.session.stages, "run", measure)
    panel.session._worker.request()
    assert measuring.wait(20)
    return go_on


class TestControls:
    def test_the_dropdown_changes_the_selection_and_follows_it(self, model, open_panel):
        panel = open_panel(model)
        panel.settle()
        assert panel._scheme.disabled
        panel.map.selected = [panel.session.names.index(UP)]
        assert panel._scheme.value == "none" and not panel._scheme.disabled
        panel._scheme.value = "w8a8"
        panel.settle()
        assert model.get_submodule(UP).scheme == "w8a8" and panel._scheme.value == "w8a8"
        panel.map.selected = [panel.session.names.index(UP), 0]
        assert panel._scheme.value == ""  # they differ
        panel._undo.click()
        panel.settle()
        assert panel._scheme.value == "none" and panel._undo.disabled and not panel._redo.disabled

    def test_what_a_cell_did_while_the_panel_was_busy_is_taken_in(self, model, open_panel, monkeypatch):
        panel = open_panel(model)
        panel.settle()
        go_on = kept_busy(panel, monkeypatch)
        qnb.quantize(model, "w8a16", layers=UP, progress=False)
        panel.session.look_around()
        go_on.set()
        panel.settle()
        assert panel.recipe() == {UP: ("w8a16", "nearest")}

    def test_what_a_cell_did_while_a_click_waited_stays(self, model, open_panel, monkeypatch):
        panel = open_panel(model)
        panel.settle()
        go_on = kept_busy(panel, monkeypatch)
        panel.set("*.q_proj", "w8a16")
        panel.set("*.k_proj", "w8a16")
        qnb.quantize(model, "w8a8", layers=[UP, "*.0.*.k_proj"], progress=False)
        panel.session.look_around()
        go_on.set()
        panel.settle()
        changed = {name: scheme for name, (scheme, _) in panel.recipe().items()}
        names = [f"model.layers.{i}.self_attn.{kind}_proj" for i in range(3) for kind in "qk"]
        assert changed == {UP: "w8a8", **dict.fromkeys(names, "w8a16")}

    def test_what_a_cell_chose_is_shown_though_it_is_not_among_the_usual(self, model, open_panel):
        panel = open_panel(model)
        panel.settle()
        panel.map.selected = [panel.session.names.index(UP)]
        data = {"calibration": TEXTS, "tokenizer": Letters()}
        qnb.quantize(model, "w2a16-g64", layers=UP, smooth=0.5, **data, progress=False)
        panel.session.look_around()
        panel.settle()
        row = next(row for row in panel.session.rows if row.name == UP)
        assert panel._scheme.value == row.scheme and panel._rounding.value == row.rounding == "nearest, smooth 0.5"
        assert panel.recipe() == {UP: (row.scheme, row.rounding)} and len(panel.steps) == 2
        panel._scheme.value = "w8a8"
        panel.settle()
        assert panel.recipe() == {UP: ("w8a8", "nearest, smooth 0.5")}

    def test_a_refused_scheme_snaps_back_and_says_why(self, model, open_panel):
        model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
        panel = open_panel(model)
        panel.session.settle()
        panel.map.selected = [panel.session.names.index(UP)]
        panel._scheme.value = "w8a8"
        panel.session.settle()
        assert panel._scheme.value == "none" and panel.recipe() == {}
        assert "NaN" in panel._message.value and UP in panel._message.value
        with pytest.raises(QnbError, match="NaN"):
            panel.settle()

    def test_a_layer_that_cannot_be_quantized_says_so(self, model, open_panel):
        class Own(nn.Linear):
            def forward(self, x):
                return super().forward(x)

        model.model.layers[1].mlp.up_proj = Own(64, 128, bias=False)
        panel = open_panel(model)
        panel.session.settle()
        number = panel.session.names.index(UP)
        assert panel.map.faces[number][0] == "fixed" and "forward of its own" in panel.map.faces[number][3]
        panel.map.selected = [number]
        panel._scheme.value = "w8a8"
        assert panel._scheme.value == "none" and "cannot be quantized" in panel._message.value
        with pytest.raises(LayerRefused):
            panel.session.ask([UP], "w8a8", "nearest")

    def test_a_change_of_several_layers_lands_whole_or_not_at_all(self, model, open_panel):
        model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
        panel = open_panel(model)
        panel.set("*.q_proj", "w8a16")
        panel.session.settle()
        before = dict(panel.recipe())
        panel.session.become(
            {**before, "model.layers.0.mlp.up_proj": ("w8a16", "nearest"), UP: ("w8a8", "nearest")}, "x"
        )
        panel.session.settle()
        assert panel.session.present.layers == before
        assert {n: (q.scheme, "nearest") for n, q in quantized_layers(model).items()} == before

    def test_an_exception_in_a_callback_is_shown(self, model, open_panel, monkeypatch):
        panel = open_panel(model)
        panel.settle()
        monkeypatch.setattr(panel.session, "undo", lambda: 1 / 0)
        panel._undo.click()
        assert "ZeroDivisionError" in panel._message.value and "traceback" in panel._message.value

    def test_a_point_of_the_plot_goes_to_its_step(self, model, open_panel):
        panel = open_panel(model)
        panel.set(UP, "w8a8")
        panel.settle()
        panel._on_step({"go": 0})
        panel.settle()
        assert panel.recipe() == {}
        panel._on_step({"go": "<b>"})
        assert "there is no step" in panel._message.value and "<b>" not in panel._message.value

    @pytest.mark.parametrize("mode", ["sensitivity", "error", "bytes", "time"])
    def test_the_map_in_other_colours(self, model, open_panel, mode):
        panel = open_panel(model)
        panel.set(UP, "w8a8")
        panel.settle()
        weights = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        panel._colour.value = mode
        panel.settle()
        faces = dict(zip(panel.session.names, panel.map.faces, strict=True))
        assert faces[UP][0] and faces[UP][1].startswith("#")
        assert weights == {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_sensitivity_is_the_kl_of_that_layer_alone(self, model, open_panel):
        panel = open_panel(model)
        panel.set("*.q_proj", "w8a8")  # which must not be in it
        panel.session.stages.sensitivity_scheme = "w8a8"
        panel._colour.value = "sensitivity"
        panel.settle()
        found = panel.session.stages.colour_values["sensitivity"][UP]
        alone = tiny_llama()
        qnb.quantize(alone, "w8a8", layers=UP, progress=False)
        expected = qnb.evaluate(alone, TEXTS[:1], Letters(), progress=False).kl
        assert found == pytest.approx(expected, rel=1e-9)

    def test_the_look_into_a_layer(self, model, open_panel):
        panel = open_panel(model)
        with torch.no_grad():
            model.model.layers[1].post_attention_layernorm.weight[7] = 60.0
        panel.set(UP, "w8a8")
        panel.selected = [UP]
        panel.session.settle()
        seen = panel.session.stages.looked_at
        layer = model.get_submodule(UP)
        now, then = layer.variant.dequantize(torch.float32), layer.original.weight
        errors = (now - then).norm(dim=1) / then.norm(dim=1)
        assert seen.errors == pytest.approx(errors.tolist(), rel=1e-5)
        assert seen.channel == int(errors.argmax()) and sum(seen.histogram) == 64
        assert set(seen.levels) == set(now[seen.channel].tolist())
        assert seen.outliers[0][0] == 7 and "7 (" in panel._layer.value


class TestReuse:
    def test_blocks_before_the_first_changed_one_are_not_run_again(self, model):
        samples = sample_of(samples_of(model, TEXTS, Letters())[0], 10_000)
        decoder = Decoder(model, 1000)
        with torch.no_grad():
            decoder.run(samples[0], never)
            for layer, blocks in (("model.layers.2.mlp.up_proj", 1), (UP, 2), ("lm_head", 0), ("*.q_proj", 3)):
                qnb.quantize(model, "w8a8", layers=layer, progress=False)
                before = decoder.blocks_run
                logits = decoder.run(samples[0], never).logits
                assert decoder.why_whole is None and decoder.blocks_run - before == blocks
                assert torch.equal(logits, whole(model, samples[0], never).logits)
            qnb.restore(model)
            assert torch.equal(decoder.run(samples[0], never).logits, whole(model, samples[0], never).logits)

    def test_a_pass_that_was_stopped_leaves_nothing_wrong_behind(self, model):
        sample = sample_of(samples_of(model, TEXTS, Letters())[0], 1)[0]
        decoder = Decoder(model, 1000)
        calls = 0

        def stop() -> None:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise InterruptedError

        with torch.no_grad():
            decoder.run(sample, never)
            qnb.quantize(model, "w8a8", layers="model.layers.0.*", progress=False)
            with pytest.raises(InterruptedError):
                decoder.run(sample, stop)
            qnb.quantize(model, "w8a16", layers="model.layers.2.mlp.*", progress=False)
            assert torch.equal(decoder.run(sample, never).logits, whole(model, sample, never).logits)

    def test_weights_written_in_place_are_seen(self, model):
        sample = sample_of(samples_of(model, TEXTS, Letters())[0], 1)[0]
        decoder = Decoder(model, 1000)
        with torch.no_grad():
            decoder.run(sample, never)
            model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
            assert torch.equal(decoder.run(sample, never).logits, whole(model, sample, never).logits)
            model.model.embed_tokens.weight.mul_(1.5)
            assert torch.equal(decoder.run(sample, never).logits, whole(model, sample, never).logits)

    def test_a_budget_that_is_too_small_keeps_fewer_states(self, model, monkeypatch):
        from qnb.notebook.panel import prefix

        monkeypatch.setattr(prefix, "STATE_BYTES", 2 * 64 * 4 * 10)
        sample = sample_of(samples_of(model, TEXTS, Letters())[0], 1)[0]
        decoder = Decoder(model, 10)
        with torch.no_grad():
            decoder.run(sample, never)
            qnb.quantize(model, "w8a8", layers=UP, progress=False)
            assert torch.equal(decoder.run(sample, never).logits, whole(model, sample, never).logits)
        assert len(decoder._texts[0].entering) < 4

    def test_a_model_that_changes_its_logits_is_run_whole(self):
        class Capped(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = tiny_llama()
                self.config = self.inner.config

            def get_output_embeddings(self):
                return self.inner.lm_head

            def forward(self, input_ids):
                output = self.inner(input_ids, use_cache=False)
                output.logits = output.logits.tanh()
                return output

        model = Capped().eval()
        sample = sample_of(samples_of(model, [torch.randint(97, (1, 12))])[0], 1)[0]
        decoder = Decoder(model, 100)
        with torch.no_grad():
            decoder.run(sample, never)
            assert "changed behind the output embedding" in decoder.why_whole
            qnb.quantize(model, "w8a8", progress=False)
            assert torch.equal(decoder.run(sample, never).logits, whole(model, sample, never).logits)

    def test_the_original_is_computed_once(self, model):
        passes = []
        model.register_forward_pre_hook(lambda *_: passes.append(1))
        samples = sample_of(samples_of(model, TEXTS, Letters())[0], 10_000)
        evaluation = Evaluation(model, samples)
        list(evaluation.original(never))
        first = len(passes)
        qnb.quantize(model, "w8a8", layers=UP, progress=False)
        list(evaluation.original(never))
        found = list(evaluation.present(never))
        assert len(passes) == first == len(samples)  # blocks alone have run since
        assert [p.texts for p in found] == [1, 2, 4, len(samples)]
        assert found[-1].accuracy.kl_se < found[1].accuracy.kl_se * 3

    def test_weights_changed_behind_everybodys_back_are_noticed(self, model, open_panel):
        panel = open_panel(model)
        panel.settle()
        before = panel.session.present.progress.accuracy.perplexity
        model.model.layers[0].mlp.up_proj.weight.data.mul_(3)  # which moves no version counter
        panel.set("model.layers.2.mlp.up_proj", "w8a8")
        panel.session.settle()
        assert "changed outside qnb" in panel._message.value
        assert panel.session.original.progress.accuracy.perplexity != before
        expected = qnb.evaluate(model, TEXTS, Letters(), progress=False)
        assert panel.session.present.progress.accuracy.kl == pytest.approx(expected.kl, rel=1e-12)


class TestAuto:
    """The search from the panel; what `qnb.search` finds is held in its own tests."""

    def test_the_recipe_found_is_one_step(self, model, open_panel):
        pytest.importorskip("scipy", reason="scipy is not installed")
        panel = open_panel(model)
        panel.set(UP, "w8a8")
        panel.settle()
        heard = Heard(panel)
        panel._budget.value, panel._limit.value = "max_kl", 0.001
        panel._auto.click()
        assert panel._auto.disabled and not panel._stop.disabled
        panel.settle()
        step = panel.session.present
        assert [s.number for s in panel.steps] == [0, 1, 2] and step.words == "auto: KL at most 0.001"
        assert 0 < kl(panel) <= 0.001 and len(step.layers) > 1
        assert "KL at most 0.001 is kept" in panel._found.value and panel._stop.disabled and not panel._auto.disabled
        assert any("sensitivity" in words or "mix 1" in words for words in heard.words)
        # On the texts of the panel: what it measures is what was searched with.
        texts = [dict(sample.kwargs) for sample in panel.session.stages.evaluation.samples]
        with_it = tiny_llama()
        again = qnb.search(with_it, Letters(), texts=texts, max_kl=0.001, progress=False)
        assert {n: (r.scheme, str(r.how)) for n, r in again.recipe.layers.items()} == panel.recipe()
        assert again.accuracy.kl == pytest.approx(kl(panel), rel=1e-9)
        panel.undo()
        panel.settle()
        assert panel.recipe() == {UP: ("w8a8", "nearest")}

    def test_a_budget_that_nothing_keeps_is_shown_with_the_nearest(self, model, open_panel):
        pytest.importorskip("scipy", reason="scipy is not installed")
        panel = open_panel(model)
        panel.set(UP, "w8a8")
        panel.auto(max_megabytes=0.01)
        with pytest.raises(QnbError, match="the nearest measured is"):
            panel.settle()
        assert "the nearest measured is" in panel._message.value and "qnb-search" in panel._found.value
        assert panel.recipe() == {UP: ("w8a8", "nearest")} and len(panel.steps) == 2
        assert panel.session.present.progress is not None and panel._stop.disabled

    @pytest.mark.parametrize("how", ["stop", "a newer change", "close"])
    def test_a_search_ends_when_it_is_told_to(self, model, open_panel, monkeypatch, how):
        panel = open_panel(model)
        panel.set(UP, "w8a8")
        panel.settle()
        searching = until_stopped(monkeypatch)
        panel.auto(max_kl=0.001)
        searching.wait(60)
        panel.selected = [UP]  # looking into a layer waits for the search, and does not end it
        assert panel._scheme.value == "w8a8" and panel.session.searching
        if how == "stop":
            panel._stop.click()
        elif how == "a newer change":
            panel._scheme.value = "w8a16"
        else:
            panel.session.close()
            assert not panel.session.busy
            return
        panel.settle()
        scheme = "w8a8" if how == "stop" else "w8a16"
        assert panel.recipe() == {UP: (scheme, "nearest")} and panel.session.stages.looked_at.name == UP
        assert ("stopped" in panel._found.value) == (how == "stop")

    def test_what_a_search_raises_is_shown(self, model, open_panel, monkeypatch):
        from qnb.notebook.panel import auto

        panel = open_panel(model)
        panel._limit.value = -1
        panel._auto.click()
        panel.session.settle()
        assert "max_kl=-1.0: give a number above 0" in panel._message.value
        monkeypatch.setattr(auto, "search", lambda *_, **__: 1 / 0)
        panel._limit.value = 0.1
        panel._auto.click()
        panel.session.settle()
        assert "ZeroDivisionError" in panel._message.value and "traceback" in panel._message.value
        assert panel.session.present.settled
        with pytest.raises(BadInput, match="0 budgets are given"):
            panel.auto()

    def test_the_offered_limit_fits_the_model(self, model, open_panel):
        panel = open_panel(model)
        panel._budget.value = "max_megabytes"
        assert 1e6 * panel._limit.value == pytest.approx(held_storages(model)[0] / 2, rel=0.05)


class Heard:
    """Notes the status that a panel shows at each change."""

    def __init__(self, panel) -> None:
        self._session, self.words = panel.session, []
        self._session.board.listen(self)

    def show(self) -> None:
        self.words.append(self._session.board.status)


def until_stopped(monkeypatch) -> threading.Event:
    """Lets searches go on until they are stopped; the event says that one is under way."""
    from qnb.notebook.panel import auto

    under_way = threading.Event()

    def search(model, *_: object, **__: object) -> None:
        while True:
            model(torch.ones(1, 4, dtype=torch.long))
            under_way.set()

    monkeypatch.setattr(auto, "search", search)
    return under_way


class TestThreads:
    def test_a_newer_change_stops_what_is_measured(self, model, open_panel):
        panel = open_panel(model)
        for scheme in ("w8a8", "w8a16", "w8a8", "w8a16"):
            panel.set(UP, scheme)
        panel.settle()
        assert panel.recipe() == {UP: ("w8a16", "nearest")} and panel.session.present.settled

    def test_a_busy_model_is_waited_for_without_blocking(self, model, open_panel):
        panel = open_panel(model)
        panel.settle()
        inside, leave = threading.Event(), threading.Event()

        def stay(*_: object) -> None:
            inside.set()
            leave.wait(60)

        handle = model.model.layers[0].register_forward_pre_hook(stay)
        other = threading.Thread(target=lambda: model(torch.ones(1, 4, dtype=torch.long)))
        other.start()
        inside.wait(60)
        handle.remove()
        try:
            panel.set(UP, "w8a8")  # comes back at once
            while "in use by another cell" not in panel._head.value and panel.session.busy:
                time.sleep(0.01)
            assert panel.recipe() == {}
        finally:
            leave.set()
            other.join()
        panel.settle()
        assert panel.recipe() == {UP: ("w8a8", "nearest")}

    def test_the_model_is_not_kept_alive_and_its_end_is_said(self, open_panel):
        model = tiny_llama()
        panel = open_panel(model)
        panel.selected = [UP]
        panel.set(UP, "w8a8")
        panel.session.settle()
        known = weakref.ref(model)
        del model
        gc.collect()
        assert known() is None
        panel._scheme.value = "w8a16"
        assert "the model is gone" in panel._message.value
        with pytest.raises(QnbError, match="the model is gone"):
            panel.undo()
        panel.session.look_around()
        assert "gone" in panel._head.value

    def test_a_closed_page_stops_nothing(self, model, open_panel):
        one, two = open_panel(model), open_panel(model)
        one.map.comm = None  # as after a page was closed
        one._figures.close()
        two.set(UP, "w8a8")
        two.settle()
        assert two.recipe() == {UP: ("w8a8", "nearest")} and kl(two) > 0
        one.close()
        two.undo()
        two.settle()

    def test_training_flags_and_hooks_are_as_they_were(self, model, open_panel):
        model.model.layers[0].train()
        flags = [m.training for m in model.modules()]
        panel = open_panel(model)
        panel.set(UP, "w8a8")
        panel.settle()
        panel.undo()
        panel.settle()
        assert [m.training for m in model.modules()] == flags
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class TestBadInput:
    @pytest.mark.parametrize(
        "given, says",
        [
            ({"prompt": "x" * 126}, "context is 128"),
            ({"prompt": ""}, "prompt is empty"),
            ({"metric": 3}, "metric is 3"),
            ({"tokens": 0}, "tokens=0"),
        ],
    )
    def test_one_line(self, model, given, says):
        with pytest.raises(BadInput, match=says) as caught:
            qnb.panel(model, Letters(), TEXTS, new_tokens=4, **given)
        assert "\n" not in str(caught.value)

    def test_texts(self, model):
        with pytest.raises(BadInput, match="empty"):
            qnb.panel(model, Letters(), [])
        with pytest.raises(BadInput, match="no texts given"):
            qnb.panel(tiny_llama(), Letters())
        with pytest.raises(BadInput, match="no tokenizer"):
            qnb.panel(model, None, TEXTS)
        with pytest.raises(BadInput, match="torch.nn.Module"):
            qnb.panel("model")

    def test_after_a_refusal_the_next_call_opens_a_panel(self, model, open_panel):
        with pytest.raises(BadInput):
            qnb.panel(model, Letters(), [""])
        panel = open_panel(model)
        panel.settle()
        again = qnb.panel(model, tokens=60, new_tokens=4)  # the texts stay those that were given
        again.settle()
        assert again.session is panel.session and len(again.session.stages.evaluation.samples) < len(TEXTS)
        again.close()

    def test_a_bad_argument_leaves_an_open_panel_as_it_is(self, model, open_panel):
        panel = open_panel(model)
        panel.settle()
        with pytest.raises(BadInput):
            qnb.panel(model, Letters(), [])
        panel.set(UP, "w8a8")
        panel.settle()
        assert kl(panel) > 0

    def test_words_of_the_methods(self, model, open_panel):
        panel = open_panel(model)
        for call, kind, says in (
            (lambda: panel.set(UP, "w9a9"), UnknownScheme, "no scheme"),
            (lambda: panel.set("*.nothing", "w8a8"), LayerRefused, "matches none"),
            (lambda: panel.go(7), BadInput, "there is no step 7"),
            (lambda: panel.undo(), BadInput, "nothing to undo"),
            (lambda: panel.redo(), BadInput, "nothing to redo"),
        ):
            with pytest.raises(kind, match=says):
                call()

    def test_a_prompt_that_is_too_long_is_said_in_the_panel(self, model, open_panel):
        panel = open_panel(model)
        panel._prompt.value = "y" * 200
        assert "context is 128" in panel._message.value
        panel._prompt.value = "short"
        panel.settle()
        assert panel._message.value == ""

    def test_names_with_html_are_shown_not_run(self, open_panel):
        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.add_module("<img src=x onerror=alert(1)>", nn.Linear(8, 8))
                self.inner = nn.Linear(8, 8)

            def forward(self, x):
                for layer in self.children():
                    x = layer(x)
                return x

        model = Odd().eval()
        panel = qnb.panel(model, None, [torch.randn(2, 8)])
        try:
            name = panel.session.names[0]
            panel.selected = [name]
            panel.set(name, "w8a8")
            panel.session.settle()
            shown = [panel._head, panel._message, panel._selection, panel._layer, panel._figures, panel._words]
            assert panel.recipe() == {name: ("w8a8", "nearest")}
            for text in (*(w.value for w in shown), html.record(panel.session, "k")):
                assert "<img" not in text
        finally:
            panel.session.close()
            panel.close()

    def test_a_compiled_model_is_measured_uncompiled(self, model):
        compiled = torch.compile(model, backend="eager")
        panel = qnb.panel(compiled, Letters(), TEXTS, new_tokens=4)
        try:
            panel.set(UP, "w8a8")
            panel.settle()
            assert isinstance(model.get_submodule(UP), QLinear) and kl(panel) > 0
            model.compile(backend="eager")
            panel.set(UP, "w8a16")
            panel.settle()
            assert panel.recipe() == {UP: ("w8a16", "nearest")} and kl(panel) > 0
        finally:
            panel.session.close()
            panel.close()

    def test_a_metric_that_raises_is_shown_and_the_rest_is_measured(self, model, open_panel):
        panel = open_panel(model, metric=lambda m: 1 / 0)
        panel.session.settle()
        assert "your metric raised ZeroDivisionError" in panel._message.value
        assert panel.session.present.speed is not None

    def test_a_metric(self, model, open_panel):
        panel = open_panel(model, metric=lambda m: float(len(quantized_layers(m))))
        panel.set("*.q_proj", "w8a8")
        panel.settle()
        assert panel.session.present.metric == 3 and 'data-field="metric"' in panel._figures.value

    def test_other_models_than_language_models(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
        panel = qnb.panel(model, None, [torch.randn(3, 16), torch.randn(3, 16)])
        try:
            panel.set("0", "w8a8")
            panel.settle()
            assert html.value_of(panel.session.present, "relative_error") > 0
            assert "No continuation" in panel._words.value and 'data-field="kl"' not in panel._figures.value
        finally:
            panel.session.close()
            panel.close()


class TestShowing:
    def test_a_heading_never_comes_before_what_it_names(self, model, open_panel):
        panel = open_panel(model)
        panel.settle()
        held = panel._figures.value
        seen = []
        panel._head.observe(lambda change: seen.append((change["new"], panel._figures.value != held)), "value")
        panel.set(UP, "w8a8")
        panel.settle()
        named = [other for heading, other in seen if f"w8a8: {UP}" in heading]
        assert named and all(named)

    def test_whoever_waited_sees_every_panel_at_rest(self, model, open_panel, monkeypatch):
        panel = open_panel(model)
        panel.settle()
        show = panel._show

        def late() -> None:
            if not panel.session.busy:
                time.sleep(0.2)
            show()

        monkeypatch.setattr(panel, "_show", late)
        panel.set(UP, "w8a8")
        panel.session.settle()
        assert "settled" in panel._head.value and "qnb-still" in panel._head.value

    def test_the_record_holds_map_figures_and_steps(self, model, open_panel):
        panel = open_panel(model)
        panel.set(UP, "w8a8")
        panel.settle()
        record = html.record(panel.session, "key")
        for words in ("up_proj", "perplexity", "weights held", f"w8a8: {UP}", colours.scheme_colour("w8a8")):
            assert words in record
        assert "<script" not in record and "<style" not in record and "<svg" not in record

    def test_every_scheme_has_a_colour_that_its_words_can_be_read_on(self):
        def luminance(colour: str) -> float:
            parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
            return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

        known = [*schemes.names(), "w3a16-g64", "w2a16-g32", "my-scheme", "nf4-g64", "kmeans3-g64"]
        papers = [colours.scheme_colour(name) for name in known if name != "none"]
        assert colours.scheme_colour("w8a8") != colours.scheme_colour("w8a16")
        for paper in papers:
            pair = sorted((luminance(paper), luminance(colours._ink(paper))))
            assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5  # WCAG AA

    def test_the_map_of_a_model(self):
        names = ["embed", *(f"m.layers.{b}.{k}" for b in range(2) for k in ("attn.q", "attn.out", "mlp.out")), "head"]
        grid = grid_of(names)
        assert grid.columns == ("q", "attn.out", "mlp.out") and grid.rows == ("0", "1", "embed", "head")
        assert [(p.row, p.column, p.alone) for p in grid.places[:3]] == [(2, 0, True), (0, 0, False), (0, 1, False)]
        both = grid_of(["encoder.0.q", "decoder.0.q"])
        assert both.rows == ("encoder 0", "decoder 0")

    def test_patterns_mean_exactly_the_names(self):
        every = [f"m.{b}.{k}" for b in range(3) for k in ("up", "down")] + ["m.0.[odd]"]
        assert patterns([n for n in every if n.endswith("up")], every) == ["*.up"]
        assert patterns(["m.1.up", "m.1.down"], every) == ["m.1.up", "m.1.down"]
        assert patterns(["m.0.[odd]"], every) == ["m.0.[[]odd]"]

    def test_a_large_model_answers_quickly(self):
        """Not how long it takes, which depends on the machine: that one selection costs no pass over all layers."""
        model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(500)]).eval()
        panel = qnb.panel(model, None, [torch.randn(2, 4)])
        try:
            panel.session.settle()
            assert len(panel.map.faces) == 1000 and len(panel.map.places["rows"]) == 500
            panel.map.selected = list(range(1000))
            panel._scheme.value = "w8a16"
            panel.settle()
            assert len(panel.recipe()) == 1000
        finally:
            panel.session.close()
            panel.close()


def test_the_magic(shell, model):
    shell.push({"model": model, "tokenizer": Letters(), "my_texts": TEXTS})
    shell.run_cell("%qpanel model --texts my_texts --new-tokens 3 -q -v panel").raise_error()
    panel = shell.user_ns["panel"]
    try:
        panel.set(UP, "w8a8")
        panel.settle()
        assert panel.code() == f'%quantize model w8a8 --layers "{UP}"'
        panel.undo()
        panel.settle()
        shell.run_cell(f"%quantize model w8a8 --layers {UP} -q").raise_error()
        panel.settle()
        assert panel.recipe() == {UP: ("w8a8", "nearest")}  # seen as soon as the cell was done
    finally:
        panel.session.close()
        panel.close()
