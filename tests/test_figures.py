"""The figures of profiles: what has a panel, a bar, a point, a line and a label; what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qnb
from qnb.errors import BadInput

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from matplotlib.text import Text  # noqa: E402

from qnb.measure.ceilings import Ceilings  # noqa: E402
from qnb.measure.layers import LayerProfile, LayerRow  # noqa: E402
from qnb.notebook.figures import compare, roofline  # noqa: E402


@pytest.fixture(scope="module")
def profiles():
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), torch.randn(4, 64)
    before = qnb.profile(model, inputs=x, repeat=3, progress=False)
    qnb.quantize(model, "w8a8", progress=False)
    return {"original": before, "w8a8 <b>": qnb.profile(model, inputs=x, repeat=3, progress=False)}


def panels(figure) -> dict[str, object]:
    return {axis.get_title(loc="left"): axis for axis in figure.axes}


def test_a_panel_for_each_quantity_that_was_measured_and_a_bar_for_each_profile(profiles):
    drawn = panels(compare(profiles))
    assert set(drawn) == {"latency", "weights"}
    for axis in drawn.values():
        assert len(axis.patches) == 2
    assert [t.get_text() for t in drawn["latency"].get_yticklabels()] == list(profiles)
    widths = [bar.get_width() for bar in drawn["weights"].patches]
    assert widths == [p.weight_bytes for p in profiles.values()]


def test_every_bar_carries_its_value_and_its_change(profiles):
    words = [t.get_text() for t in panels(compare(profiles))["weights"].texts]
    change = profiles["w8a8 <b>"].weight_bytes / profiles["original"].weight_bytes - 1
    assert f"−{abs(100 * change):.0f} %" in words


def test_the_original_itself_has_words_instead_of_a_bar():
    model, tokenizer = qnb.demo_lm()
    texts = qnb.demo_texts("evaluation")[:2]
    given = {"texts": texts, "new_tokens": 2, "repeat": 1, "progress": False}
    before = qnb.profile(model, tokenizer, **given)
    qnb.quantize(model, "w8a8", progress=False)
    drawn = panels(compare({"original": before, "w8a8": qnb.profile(model, tokenizer, **given)}))
    assert len(drawn["KL to the original"].patches) == 1 and len(drawn["perplexity"].patches) == 2
    assert " the original itself" in [t.get_text() for t in drawn["KL to the original"].texts]


@pytest.mark.parametrize("given", [{}, {"a": 1}])
def test_what_is_no_profile_is_refused(given):
    with pytest.raises(BadInput, match="by name"):
        compare(given)


def layer(name: str, intensity: float, gops: float, **given) -> LayerRow:
    fields = dict(
        name=name, shape=(8, 8), scheme="w8a8", kernel="amx", device="cpu", rows=(1, 1), calls=1, call_us=1.0,
        time_ms=1.0, share=0.05, weight_bytes=64, operations=round(1000 * intensity), moved_bytes=1000,
        gops_per_s=gops, gb_per_s=1.0, arithmetic="int8", level="L3", attainable_gops_per_s=1.0, of_attainable=1.0,
        bound="L3",
    )  # fmt: skip
    return LayerRow(**{**fields, **given})


def layers_of(rows, **given) -> LayerProfile:
    fields = {"gops_per_s": {"int8": 400.0, "float32": 100.0}, "gb_per_s": {"L3": 50.0, "memory": 10.0}}
    known = Ceilings("cpu", "a processor", **{**fields, **given}, level_bytes={"L3": 1000}, unavailable={})
    return LayerProfile(tuple(rows), 20.0, 3, 0.0, (known,), ())


def points(axis) -> list[tuple[float, float]]:
    drawn = [line for line in axis.get_lines() if line.get_marker() == "o"]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in drawn]


class TestRoofline:
    rows = (
        *(layer(f"blocks.{i}.mlp.up", 2.0, 20.0 + i) for i in range(3)),
        layer("blocks.0.mlp.up", 100.0, 300.0, rows=(128, 128)),
        layer("head", 0.5, 5.0, scheme="none", arithmetic="float32"),
    )

    def test_layers_are_points_and_ceilings_lines_under_which_they_lie(self):
        (axis,) = roofline(layers_of(self.rows)).axes
        assert sorted(points(axis)) == [(0.5, 5), (2, 20), (2, 21), (2, 22), (100, 300)]
        lines = [line for line in axis.get_lines() if line.get_marker() != "o"]
        slope, *levels = ([list(map(float, d)) for d in line.get_data()] for line in lines)
        assert [y / x for x, y in zip(*slope, strict=True)] == pytest.approx([50, 50])  # memory is no level of these
        assert [y for _, (_, y) in levels] == [400, 100]
        assert slope[0][1] == pytest.approx(400 / 50)  # where bytes stop to be what bounds

    def test_each_kind_and_each_ceiling_has_a_label(self):
        words = [t.get_text() for t in roofline(layers_of(self.rows)).axes[0].texts]
        assert {"L3 50.0 GB/s", "int8 400 Gop/s", "float32 100 Gop/s", "head 5.0 %"} <= set(words)
        assert "mlp.up 15 %" in words and "mlp.up 5.0 %" in words

    def test_labels_do_not_lie_on_each_other(self):
        rows = [layer(f"part{i:02d}", 2.0, 20.0) for i in range(18)]
        figure = roofline(layers_of(rows))
        figure.draw_without_rendering()
        boxes = [Text.get_window_extent(t) for t in figure.axes[0].texts if t.get_text().startswith("part")]
        assert len(boxes) == 18
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])

    def test_a_missing_ceiling_has_no_line(self):
        (axis,) = roofline(layers_of(self.rows, gops_per_s={}, gb_per_s={})).axes
        assert len(points(axis)) == len(self.rows) == len(axis.get_lines())

    def test_a_measured_profile_is_drawn_and_each_device_has_a_panel(self):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
        profile = qnb.profile(model, inputs=torch.ones(4, 64), repeat=1, layers=True, progress=False)
        assert len(points(roofline(profile).axes[0])) == 2
        here = layers_of(self.rows)
        there = Ceilings("cuda:0", "a GPU", {"int8": 9e5}, {"memory": 3000.0}, {}, {})
        on_gpu = layer("far", 2.0, 900.0, device="cuda:0", level="memory")
        both = LayerProfile((*here.rows, on_gpu), 20.0, 3, 0.0, (*here.ceilings, there), ())
        assert [len(points(axis)) for axis in roofline(both).axes] == [5, 1]

    def test_a_profile_without_layers_is_refused(self, profiles):
        with pytest.raises(BadInput, match="layers=True"):
            roofline(profiles["original"])
