"""Layers in a profile: what a clock around each one says, what the machine can do, and how both are shown."""

from __future__ import annotations

import json
import re
import sys
import threading

import pytest
import torch
from torch import nn

import qnb
from qnb.measure import ceilings as ceilings_module
from qnb.measure import layers as layers_module
from qnb.measure.ceilings import Ceilings, ceilings
from qnb.measure.layers import LayerProfile, LayerRow
from qnb.model import hooks as hooks_module
from qnb.model.hooks import around_forwards

CPU = torch.device("cpu")
cache_file = ceilings_module._cache_file


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache folder of this test's own, and nothing known from before."""
    monkeypatch.setattr(ceilings_module, "_cache_file", lambda: tmp_path / "cache" / "qnb" / "ceilings.json")
    monkeypatch.setattr(ceilings_module, "_known", {})
    monkeypatch.setattr(ceilings_module, "_measured_again", set())
    return tmp_path / "cache"


@pytest.fixture
def quick(monkeypatch):
    """Ceilings that are given instead of measured; returns what was asked for, in order."""
    asked = []
    values = {"float32": 100.0, "int8": 400.0, "L2": 80.0, "L3": 40.0, "memory": 10.0}

    def product(arithmetic, device):
        asked.append(arithmetic)
        return values[arithmetic]

    def read(level, levels, device):
        asked.append(level)
        return values[level]

    monkeypatch.setattr(ceilings_module, "_product", product)
    monkeypatch.setattr(ceilings_module, "_read", read)
    monkeypatch.setattr(ceilings_module, "_levels", lambda device: {"L2": 1000, "L3": 1_000_000})
    return asked


class Blocks(nn.Module):
    """Four layers of two kinds, called with different numbers of rows, and one that is never called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)) for _ in range(2))
        self.unused = nn.Linear(64, 64)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.blocks[0](x[:1])


def profile(model, x, **given):
    return qnb.profile(model, inputs=x, repeat=3, progress=False, **given)


def ticking(monkeypatch, seconds: float) -> None:
    """A host clock that goes on by so much at each look, so that a call of a layer takes that long."""
    now = [0.0]

    def look() -> float:
        now[0] += seconds
        return now[0]

    monkeypatch.setattr(layers_module._HostClock, "now", staticmethod(look))


class TestRows:
    def test_each_layer_and_size_of_call_has_one_with_what_its_calls_did(self, quick, monkeypatch):
        ticking(monkeypatch, 0.001)
        layers = profile(Blocks(), torch.randn(16, 64), layers=True).layers
        assert [(r.name, r.rows, r.calls) for r in layers.rows] == [
            ("blocks.0.0", (1, 1), 1),
            ("blocks.0.0", (16, 16), 1),
            ("blocks.0.1", (1, 1), 1),
            ("blocks.0.1", (16, 16), 1),
            ("blocks.1.0", (16, 16), 1),
            ("blocks.1.1", (16, 16), 1),
        ]
        row = layers.rows[1]
        weight = 4 * (128 * 64 + 128)
        assert (row.shape, row.scheme, row.kernel, row.arithmetic) == ((128, 64), "none", "torch", "float32")
        assert row.call_us == pytest.approx(1000) and row.time_ms == pytest.approx(1)
        assert (row.operations, row.moved_bytes) == (2 * 16 * 128 * 64, weight + 4 * 16 * (128 + 64))
        assert row.weight_bytes == weight
        assert row.gops_per_s == pytest.approx(row.operations / 1e6)
        assert row.gb_per_s == pytest.approx(row.moved_bytes / 1e6)
        assert row.share == pytest.approx(row.time_ms / layers.run_ms)
        assert layers.not_called == ("unused",) and layers.runs == 3

    def test_calls_of_about_as_many_rows_are_one_line(self, quick):
        class Growing(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(8, 8)

            def forward(self, x):
                for rows in (1, 4, 5, 7, 8):
                    self.layer(x[:rows])
                return x

        rows = profile(Growing(), torch.ones(8, 8), layers=True).layers.rows
        assert [(r.rows, r.calls, r.operations) for r in rows] == [
            ((1, 1), 1, 128),
            ((4, 7), 3, 128 * 16),
            ((8, 8), 1, 128 * 8),
        ]

    def test_a_quantized_layer_is_held_to_integers_and_to_its_bytes(self, quick):
        model = Blocks()
        qnb.quantize(model, "w8a8", layers="blocks.0.*", progress=False)
        qnb.quantize(model, "w8a16", layers="blocks.1.0", progress=False)
        rows = {r.name: r for r in profile(model, torch.randn(16, 64), layers=True).layers.rows}
        assert {n: (r.scheme, r.arithmetic) for n, r in rows.items()} == {
            "blocks.0.0": ("w8a8", "int8"),
            "blocks.0.1": ("w8a8", "int8"),
            "blocks.1.0": ("w8a16", "float32"),
            "blocks.1.1": ("none", "float32"),
        }
        layer = model.blocks[0][0]
        assert rows["blocks.0.0"].weight_bytes == layer.variant.nbytes + layer.bias.nbytes
        assert rows["blocks.0.0"].kernel == layer.variant.kernel()

    def test_rooflines_by_hand(self, quick, monkeypatch):
        ticking(monkeypatch, 0.001)
        few, many = (profile(Blocks(), torch.randn(n, 64), layers=True).layers.rows[-1] for n in (2, 4096))
        # The weights of the four layers, 132 kB, fit the L3 of a million bytes, not the L2 of a thousand.
        assert few.level == many.level == "L3"
        assert few.attainable_gops_per_s == pytest.approx(40 * few.operations / few.moved_bytes) and few.bound == "L3"
        assert (many.attainable_gops_per_s, many.bound) == (100, "float32")
        assert many.of_attainable == pytest.approx(many.gops_per_s / 100)

    def test_a_gpus_events_are_read_when_the_run_is_over(self, quick, monkeypatch):
        """With events that are scripted, for a machine without a GPU."""
        finished = []

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing and not finished

            def record(self, stream):
                assert stream == "the stream of cuda:0"

            def elapsed_time(self, other):
                assert finished
                return 2.5  # ms

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
        monkeypatch.setattr(layers_module, "_clock", lambda device: layers_module._CudaClock(torch.device("cuda", 0)))
        monkeypatch.setattr(layers_module, "synchronize", finished.append)
        layers = qnb.profile(Blocks(), inputs=torch.randn(16, 64), repeat=1, layers=True, progress=False).layers
        assert {r.time_ms for r in layers.rows} == {2.5} and len(finished) == 1

    def test_a_disturbed_run_is_passed_over(self):
        assert layers_module._typical_seconds([[1, 2], [1, 2], [9, 2]]) == 3
        assert layers_module._typical_seconds([[1, 2], [4], [1, 2]]) == 3  # not alike: by their sums

    def test_a_real_run_has_times_rates_and_ceilings(self):
        model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))
        result = profile(model, torch.randn(64, 256), layers=True)
        layers = result.layers
        assert all(r.time_ms > 0 and r.gops_per_s > 0 and r.of_attainable > 0 for r in layers.rows)
        assert "layers" not in result.unavailable
        assert json.loads(json.dumps(layers.to_dict(), allow_nan=False))["rows"][0]["name"] == "0"


class TestTheModelIsLeftAsItWas:
    def hooks(self, model) -> list:
        return [h for m in model.modules() for d in (m._forward_pre_hooks, m._forward_hooks) for h in d.values()]

    def test_no_hook_stays_and_those_of_others_do(self, quick):
        model, seen = Blocks(), []
        model.blocks[0][0].register_forward_hook(lambda *a: seen.append(1))
        before = self.hooks(model)
        profile(model, torch.randn(4, 64), layers=True)
        assert self.hooks(model) == before and seen

    @pytest.mark.parametrize("at", [0, 1, 3])
    def test_an_interrupt_leaves_none(self, quick, monkeypatch, at):
        model, count = Blocks(), [0]

        def look() -> float:
            count[0] += 1
            if count[0] > at:
                raise KeyboardInterrupt
            return 0.0

        monkeypatch.setattr(layers_module._HostClock, "now", staticmethod(look))
        with pytest.raises(KeyboardInterrupt):
            profile(model, torch.randn(4, 64), layers=True)
        assert self.hooks(model) == []

    def test_an_interrupt_while_hooks_are_placed_leaves_none(self, monkeypatch):
        model = Blocks()
        second = model.blocks[0][1]
        monkeypatch.setattr(second, "register_forward_hook", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt), around_forwards([model.blocks[0][0], second], print, print):
            pass
        assert self.hooks(model) == []

    def test_an_interrupt_at_any_line_before_the_hooks_are_in_place_leaves_none(self):
        model, inside = Blocks(), []
        left = 0

        def trace(frame, event, _):
            nonlocal left
            if frame.f_code.co_filename != hooks_module.__file__ or inside:
                return None
            if event == "line":
                left -= 1
                if left < 0:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        for at in range(1000):
            left = at
            sys.settrace(trace)
            try:
                with around_forwards([model.blocks[0][0], model.blocks[0][1]], print, print):
                    inside.append(at)
            except KeyboardInterrupt:
                assert self.hooks(model) == [] and not inside
            finally:
                sys.settrace(None)
            if inside:
                break
        assert at > 10 and self.hooks(model) == []

    def test_another_threads_pass_is_not_counted(self):
        layer, seen = nn.Linear(4, 4), []
        with around_forwards([layer], lambda i: None, lambda i, output: seen.append(threading.get_ident())):
            thread = threading.Thread(target=lambda: layer(torch.ones(4)))
            thread.start()
            thread.join()
            layer(torch.ones(4))
        assert seen == [threading.get_ident()]

    def test_the_clocks_stand_inside_of_other_hooks(self):
        layer, order = nn.Linear(4, 4), []
        layer.register_forward_pre_hook(lambda *a: order.append("pre"))
        layer.register_forward_hook(lambda *a: order.append("post"))
        with around_forwards([layer], lambda i: order.append("before"), lambda i, o: order.append("behind")):
            layer(torch.ones(4))
        assert order == ["pre", "before", "behind", "post"]


class TestWhereThereAreNone:
    def test_they_are_timed_only_when_asked_for(self, quick):
        result = profile(Blocks(), torch.randn(4, 64))
        assert result.layers is None and "layers=True" in result.unavailable["layers"] and quick == []

    def test_a_model_without_linear_layers_says_so(self):
        result = profile(nn.ReLU(), torch.ones(2), layers=True)
        assert result.layers is None and "no Linear" in result.unavailable["layers"]

    def test_a_compiled_model_says_so(self):
        model = Blocks()
        model.compile(backend="eager")
        result = profile(model, torch.randn(4, 64), layers=True)
        assert result.layers is None and "torch.compile" in result.unavailable["layers"]


class TestCeilings:
    def test_real_kernels_reach_something_and_quickly_the_second_time(self, own_cache, monkeypatch):
        known = ceilings(CPU, ["float32", "int8"])
        assert set(known.gops_per_s) == {"float32", "int8"} and all(v > 0 for v in known.gops_per_s.values())
        # A machine too small for a buffer says why it has no rate.
        assert {*known.gb_per_s, *known.unavailable} == {*known.level_bytes, "memory"}
        rates = list(known.gb_per_s.values())
        assert rates == sorted(rates, reverse=True)
        monkeypatch.setattr(ceilings_module, "_product", None)
        monkeypatch.setattr(ceilings_module, "_known", {})  # as a new process has it
        assert ceilings(CPU, ["float32", "int8"]).gops_per_s == known.gops_per_s

    def test_only_what_is_not_known_is_measured(self, quick):
        ceilings(CPU, ["float32"])
        assert quick == ["float32", "L2", "L3", "memory"]
        ceilings(CPU, ["float32", "int8"])
        assert quick[4:] == ["int8"]

    def test_another_number_of_threads_is_another_machine(self, quick, monkeypatch):
        ceilings(CPU, ["float32"])
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
        ceilings(CPU, ["float32"])
        assert quick.count("float32") == 2
        content = json.loads(ceilings_module._cache_file().read_text())
        assert len(content) == 2 and any("77 threads" in key for key in content)

    @pytest.mark.parametrize(
        "content",
        ["", "{", "[]", "null", '{"%s": 3}', '{"%s": {"gops_per_s": {"float32": -1.0}, "gb_per_s": {}}}',
         '{"%s": {"gops_per_s": {"float32": NaN}, "gb_per_s": {}}}', '{"%s": {"gops_per_s": {"float32": "fast"}}}',
         "\x00" * 9, "[" * 100_000],
    )  # fmt: skip
    def test_a_file_that_is_not_right_is_measured_over(self, quick, content):
        file = ceilings_module._cache_file()
        file.parent.mkdir(parents=True)
        file.write_text(content % ceilings_module._key(CPU) if "%s" in content else content)
        assert ceilings(CPU, ["float32"]).gops_per_s == {"float32": 100.0}
        assert json.loads(file.read_text())[ceilings_module._key(CPU)]["gops_per_s"] == {"float32": 100.0}

    def test_a_folder_that_cannot_be_made_is_no_error(self, quick, own_cache):
        own_cache.write_text("a file where the folder would be")
        assert ceilings(CPU, ["float32"]).gops_per_s == {"float32": 100.0}
        ceilings(CPU, ["float32"])
        assert quick.count("float32") == 1  # known for as long as the process runs

    @pytest.mark.parametrize(
        ("platform", "variable", "folder"),
        [("linux", "XDG_CACHE_HOME", ""), ("win32", "LOCALAPPDATA", ""), ("darwin", "HOME", "Library/Caches")],
    )
    def test_the_file_lies_where_the_platform_keeps_caches(self, monkeypatch, tmp_path, platform, variable, folder):
        monkeypatch.setattr(ceilings_module.sys, "platform", platform)
        monkeypatch.setenv(variable, str(tmp_path))
        assert cache_file() == tmp_path / folder / "qnb" / "ceilings.json"

    def test_writing_leaves_nothing_beside_the_file(self, quick):
        ceilings(CPU, ["float32"])
        file = ceilings_module._cache_file()
        assert [f.name for f in file.parent.iterdir()] == ["ceilings.json"]

    def test_what_cannot_be_measured_has_its_reason_and_rows_have_none(self, quick, monkeypatch):
        def fail(arithmetic, device):
            raise RuntimeError("not implemented\nfor this type")

        monkeypatch.setattr(ceilings_module, "_product", fail)
        layers = profile(Blocks(), torch.randn(4, 64), layers=True).layers
        assert layers.ceilings[0].unavailable == {"float32": "not implemented for this type"}
        row = layers.rows[0]
        assert (row.attainable_gops_per_s, row.of_attainable, row.bound) == (None, None, None)
        assert "unavailable" in layers.text() and "not implemented for this type" in layers.text()

    def test_a_layer_that_beats_a_ceiling_has_it_measured_again_once(self, quick, monkeypatch):
        ticking(monkeypatch, 1e-9)
        for _ in range(2):
            layers = profile(Blocks(), torch.randn(4, 64), layers=True).layers
        assert quick == ["float32", "L2", "L3", "memory"] * 2
        assert layers.rows[0].of_attainable > 1  # and is then shown as it is

    def test_a_buffer_lies_in_its_level_and_in_none_before(self):
        levels = {"L2": 2**20, "L3": 2**25}
        sizes = [ceilings_module._buffer_bytes(level, levels) for level in ("L2", "L3", "memory")]
        assert sizes[0] < 2**20 < sizes[1] < 2**25 < sizes[2]
        with pytest.raises(RuntimeError, match="too small beside L2"):
            ceilings_module._buffer_bytes("L3", {"L2": 2**20, "L3": 2**21})
        assert ceilings_module._buffer_bytes("memory", {}) >= 2**26

    def test_too_little_memory_is_a_reason(self, monkeypatch):
        monkeypatch.setattr(ceilings_module, "_levels", lambda device: {"L3": 2**50})
        monkeypatch.setattr(ceilings_module, "_product", lambda *given: 1.0)
        known = ceilings(CPU, ["float32"])
        assert "does not fit" in known.unavailable["memory"] and "memory" not in known.gb_per_s

    def test_lists_of_processors(self):
        assert [ceilings_module._count(text) for text in ("0\n", "0-7,64-71", "3,5")] == [1, 16, 2]


def row(name: str, time_ms: float = 1.0, **given) -> LayerRow:
    fields = dict(
        name=name, shape=(8, 8), scheme="none", kernel="torch", device="cpu", rows=(1, 1), calls=1,
        call_us=1000 * time_ms, time_ms=time_ms, share=time_ms / 1000, weight_bytes=256, operations=128,
        moved_bytes=320, gops_per_s=1.0, gb_per_s=2.0, arithmetic="float32", level="L2", attainable_gops_per_s=10.0,
        of_attainable=0.1, bound="L2",
    )  # fmt: skip
    return LayerRow(**{**fields, **given})


def shown(rows) -> LayerProfile:
    known = Ceilings("cpu", "a <b>processor", {"float32": 100.0}, {"L2": 10.0}, {"L2": 1000}, {})
    return LayerProfile(tuple(rows), 1000.0, 3, 0.02, (known,), ())


class TestWords:
    def test_layers_of_a_kind_are_one_line_and_the_slowest_ten_follow(self):
        rows = [row(f"model.layers.{i}.{n}", 1.0 + i) for i in range(60) for n in ("up", "down")]
        text = shown(rows).text()
        assert text.count("model.layers.*.") == 2 and re.search(r"model\.layers\.\*\.up +60 ", text)
        listed = [line.split()[0] for line in text.split("slowest layers")[1].splitlines() if line.startswith("model")]
        assert len(listed) == 10 and listed[:2] == ["model.layers.59.up", "model.layers.59.down"]
        assert len(text.splitlines()) < 30

    def test_few_layers_are_one_table(self):
        text = shown([row("up"), row("down")]).text()
        assert "slowest" not in text and "a clock before and behind" in text and "2.0 % longer" in text

    def test_many_kinds_are_cut_to_those_that_take_most_time(self):
        text = shown([row(f"part{chr(97 + i // 26)}{chr(97 + i % 26)}", 1.0 + i) for i in range(100)]).text()
        assert "70 more kinds" in text and "partdv" in text and "partaa" not in text
        assert re.search(rf"70 more kinds +{sum(range(1, 71))}$", text, re.MULTILINE)

    def test_names_are_escaped_in_html(self):
        page = shown([row("<script>")])._repr_html_()
        assert "<script>" not in page and "&lt;script&gt;" in page and "a &lt;b&gt;processor" in page

    def test_profile_and_comparison_show_them(self, quick):
        model, x = Blocks(), torch.randn(4, 64)
        before = profile(model, x)
        now = profile(model, x, layers=True)
        assert "Linear layers take" in now.text() and "Linear layers take" in now.against(before).text()
        assert "Linear layers take" not in before.text()
        assert "not called in this run: unused" in now.text()


class TestMagic:
    def test_a_flag_asks_for_them_and_one_for_a_trace(self, shell, quick, tmp_path):
        capture = pytest.importorskip("IPython.utils.capture", reason="IPython is not installed")
        shell.push({"model": Blocks(), "x": torch.randn(4, 64)})
        with capture.capture_output() as shown:
            shell.run_cell(
                f"%qprofile model --inputs x --repeat 1 --layers --trace '{tmp_path}/a b' -v p"
            ).raise_error()
        result = shell.user_ns["p"]
        assert result.layers.rows and result.trace.startswith(f"{tmp_path}/a b/")
        assert "Linear layers take" in shown.outputs[0].data["text/plain"]
        assert "Linear layers take" in shown.outputs[0].data["text/html"]

    def test_over_a_cell_they_are_refused_by_name(self, shell):
        usage = pytest.importorskip("IPython.core.error", reason="IPython is not installed").UsageError
        for flag in ("--layers", "--trace here"):
            with pytest.raises(usage, match=flag.split()[0].strip("-")):
                shell.run_cell_magic("qprofile", flag, "1 + 1")

    @pytest.mark.parametrize(("line", "offered"), [("--la", {"--layers"}), ("--layers --tr", {"--trace"})])
    def test_tab_completes_them(self, shell, line, offered):
        line = f"%qprofile model {line}"
        assert set(shell.complete("", line, len(line))[1]) == offered


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_events_time_the_stream():
    model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(3))).cuda().bfloat16()
    layers = profile(model, torch.randn(512, 2048, device="cuda", dtype=torch.bfloat16), layers=True).layers
    assert [r.device for r in layers.rows] == ["cuda:0"] * 3
    assert all(r.time_ms > 0 and 0 < r.of_attainable < 2 for r in layers.rows)
    assert set(layers.ceilings[0].gops_per_s) >= {"bfloat16"} and layers.ceilings[0].gb_per_s["memory"] > 100
    assert {"int8", "float32"} <= set(ceilings(torch.device("cuda", 0), ["int8", "float32"]).gops_per_s)
