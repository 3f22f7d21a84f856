"""What a monitor sees is what was there, and nothing else of the model changes."""

from __future__ import annotations

import copy
import io
import json
import math
import threading
import types

import pytest
import torch
from torch import nn

import qnb
from qnb.errors import BadInput
from qnb.measure import probes
from qnb.measure.monitor import Monitor
from qnb.measure.monitor_drift import (
    BINS,
    CLIPPED,
    DYNAMIC,
    ERROR,
    NONE,
    NOT_FINITE,
    POWER,
    ROWS,
    STATIC,
    VALUES,
    Activations,
    Taken,
    Window,
    groups_of,
    measure,
    stability,
    upper_edge,
)
from qnb.measure.monitor_report import RecipeVotes
from qnb.measure.probes.replay import replay
from qnb.measure.token import alone

K = 32


class Block(nn.Module):
    """Two layers that take the very same tensor, and one that takes their product, as an MLP has them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(K, 64), nn.Linear(K, 64), nn.Linear(64, K)

    def forward(self, x):
        return self.down(self.gate(x).tanh() * self.up(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


def inputs(seed: int, rows: int = 64, factor: float = 1.0) -> torch.Tensor:
    return factor * torch.randn(1, rows, K, generator=torch.Generator().manual_seed(seed))


def serve(model, seeds, rows: int = 64, factor: float = 1.0) -> None:
    with torch.no_grad():
        for seed in seeds:
            model(inputs(seed, rows, factor))


def sums_of(x, how, widest=None) -> torch.Tensor:
    return measure([Taken(x, how, widest)])[0][len(x) :]


def bins_of(x, how=None) -> list[int]:
    return measure([Taken(x, how or Activations(DYNAMIC))])[0][: len(x)].long().tolist()


def hooks(model) -> int:
    return sum(
        len(dictionary)
        for module in model.modules()
        for name, dictionary in vars(module).items()
        if name.endswith("_hooks") and isinstance(dictionary, dict)
    )


# What is read off one layer's inputs.


def test_codes_at_the_extreme_of_a_row_are_counted_one_by_one():
    """scale = 127 / 127 = 1: 126.5 rounds to the even 126, 126.6 to 127."""
    x = torch.tensor([[127.0, 126.5, 126.6, -127.0], [0.0, 0.0, 0.0, 0.0]])
    sums = sums_of(x, Activations(DYNAMIC))
    assert sums[[ROWS, NOT_FINITE, VALUES, CLIPPED]].tolist() == [2, 0, 8, 3]
    assert sums[ERROR].item() == pytest.approx(0.5**2 + 0.4**2, rel=1e-4)
    assert sums[POWER].item() == pytest.approx(float(x.square().sum()), rel=1e-6)
    assert bins_of(x) == [int(math.log2(127) * 8 + BINS / 2), 0]


def test_codes_beyond_a_fixed_range_are_counted():
    x = torch.tensor([[63.5, 63.8, -64.0, 1.0]])
    assert sums_of(x, Activations(STATIC, scale=0.5))[CLIPPED] == 1  # 127.6 rounds to 128, -128 is still a code
    asymmetric = Activations(STATIC, scale=0.5, zero=-28)  # holds [-50, 77.5]
    assert sums_of(x, asymmetric)[CLIPPED] == 1


def test_floats_beyond_the_baseline_are_counted_and_none_without_one():
    x = torch.tensor([[1.0, -3.0, 2.0, 0.5]])
    assert sums_of(x, Activations(NONE), 1.5)[CLIPPED] == 2
    assert sums_of(x, Activations(NONE))[CLIPPED] == 0
    as_codes = sums_of(x, Activations(DYNAMIC))
    assert sums_of(x, Activations(NONE), 1.5)[ERROR] == as_codes[ERROR] > 0


def test_a_divisor_is_applied_before_the_codes():
    x, divisor = torch.tensor([[100.0, 1.0]]), torch.tensor([100.0, 1.0])
    apart = sums_of(x, Activations(DYNAMIC))
    together = sums_of(x, Activations(DYNAMIC, divisor=divisor), None)
    assert apart[CLIPPED] == 1 and together[CLIPPED] == 2  # both values are 1 once divided
    assert together[ERROR] < apart[ERROR]


def test_a_row_with_nan_or_infinity_counts_as_such_and_in_nothing_else():
    x = torch.tensor([[1.0, torch.nan], [torch.inf, 0.0], [1.0, 0.5]])
    sums, bins = sums_of(x, Activations(DYNAMIC)), bins_of(x)
    assert sums[[ROWS, NOT_FINITE, VALUES, CLIPPED]].tolist() == [1, 2, 2, 1]
    assert sums[[ERROR, POWER]].isfinite().all() and bins[:2] == [-1, -1] and bins[2] >= 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_read_exactly(dtype):
    x = inputs(1, rows=4)[0].to(dtype)
    assert torch.equal(*measure([Taken(x, Activations(DYNAMIC)), Taken(x.float(), Activations(DYNAMIC))]))


def test_layers_measured_together_are_measured_as_if_alone():
    """Whatever shape, type, kind and baseline they have."""
    taken = [
        Taken(inputs(i, rows=rows)[0].to(dtype), how, widest)
        for i, (rows, how, widest) in enumerate(
            [
                (4, Activations(DYNAMIC), None),
                (4, Activations(DYNAMIC), None),
                (4, Activations(STATIC, scale=0.01), None),
                (4, Activations(STATIC, scale=0.02, zero=5), None),
                (4, Activations(NONE), 1.5),
                (4, Activations(NONE), None),
                (7, Activations(NONE), 2.0),
                (4, Activations(DYNAMIC, divisor=torch.rand(K) + 0.5), None),
                (4, Activations(DYNAMIC, divisor=torch.rand(K) + 0.5), None),
            ]
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for one, together in zip(taken, measure(taken), strict=True):
        alone_ = measure([one])[0]
        assert torch.equal(alone_[:-2], together[:-2])
        assert torch.allclose(alone_[-2:], together[-2:], rtol=1e-5)  # sums of floats, in another order
    assert measure([]) == []


def test_the_stability_index_is_that_of_its_formula():
    base, now = torch.zeros(1, BINS, dtype=torch.int64), torch.zeros(1, BINS, dtype=torch.int64)
    base[0, 100:110] = 100  # ten bins of equal share: one group each
    now[0, 100] = 1000
    groups = groups_of(base)
    assert groups[0, 100:110].tolist() == list(range(10))
    p, q = 100.5 / 1005, [1000.5 / 1005] + 9 * [0.5 / 1005]
    expected = sum((share - p) * math.log(share / p) for share in q)
    assert stability(base, now, groups).item() == pytest.approx(expected, rel=1e-12)
    assert stability(base, base, groups).item() == 0


def test_the_index_of_two_samples_of_one_distribution_is_as_large_as_chance_makes_it():
    """Its mean is (G - 1) (1/n + 1/m), that of a chi-squared variable, with a spread of sqrt(2 / (G - 1)) of that."""
    draw = torch.Generator().manual_seed(0)
    layers, rows = 200, 1000

    def counts():
        bins = (torch.randn(layers, rows, generator=draw) * 40 + 150).long().clamp(0, BINS - 1)
        return torch.zeros(layers, BINS, dtype=torch.int64).scatter_add_(1, bins, torch.ones_like(bins))

    base, now = counts(), counts()
    indices, expected = stability(base, now, groups_of(base)), 9 * 2 / rows
    # Half a row in each group pulls it down by less than 10 / rows of itself; the mean of 200 scatters by 3.3 %.
    assert abs(indices.mean().item() / expected - 1) < 4 * math.sqrt(2 / 9 / layers) + 0.02


def test_the_widest_range_is_the_upper_edge_of_the_highest_bin():
    bins = torch.tensor(bins_of(torch.tensor([[5.0], [0.1]])))
    edge = upper_edge(torch.zeros(1, BINS, dtype=torch.int64).index_fill_(1, bins, 1)).item()
    assert 5.0 < edge <= 5.0 * 2 ** (1 / 8)


def test_a_window_lets_the_oldest_go_and_sums_what_it_holds():
    window = Window(256)

    def one(value: float, rows: int = 64):
        return {"a": measure([Taken(torch.full((rows, 4), value), Activations(DYNAMIC))])[0]}

    for _ in range(4):
        window.add(one(1.0))
    assert window.complete and window.counts() == {"a": (256, 0)} and window.drift() == {}
    for _ in range(3):
        window.add(one(1e30))
    assert window.drift() == {}  # 192 rows are too few to judge
    for _ in range(4):
        window.add(one(1.0))
    assert window.counts() == {"a": (256, 256)}
    assert window.totals()["a"] == [256, 0, 1024, 1024]
    assert window.errors() == {"a": 0.0}  # nothing is left of the 1e30
    assert window.drift() == {"a": 0.0}
    window.forget_sums()
    assert window.totals()["a"] == [0, 0, 0, 0] and window.errors() == {}


def test_a_layer_that_appears_later_has_no_baseline():
    window = Window(256)
    seen = measure([Taken(inputs(0, rows=256)[0], Activations(DYNAMIC))])[0]
    window.add({"a": seen})
    window.add({"b": seen, "a": seen})
    assert set(window.drift()) == {"a"} and window.counts()["b"] == (0, 256)


# A model that serves.


def test_rows_are_what_the_layers_were_given(model):
    qnb.quantize(model, "w8a8", layers="blocks.0.gate", progress=False)
    with qnb.monitor(model, every=1, window=256) as watch:
        serve(model, range(8))
        rows = {row.name: row for row in watch.rows}
    assert list(rows) == [f"blocks.{b}.{layer}" for b in (0, 1) for layer in ("gate", "up", "down")]
    gate, up = rows["blocks.0.gate"], rows["blocks.0.up"]  # both take the model's input
    assert (gate.scheme, gate.clipped_as, up.scheme, up.clipped_as) == ("w8a8", DYNAMIC, "none", NONE)
    baseline, x = (torch.cat([inputs(seed)[0] for seed in seeds]) for seeds in (range(4), range(4, 8)))
    codes, scales = torch.ops.qnb.quantize_rows(x)
    assert gate.clipped == (codes.abs() == 127).sum().item() / x.numel()
    widest = baseline.abs().max()
    edge = torch.exp2((torch.floor(torch.log2(widest) * 8) + 1) / 8)
    assert up.clipped == (x.abs() > edge).sum().item() / x.numel()
    error = (codes * scales.unsqueeze(-1) - x).norm() / x.norm()
    assert gate.error == pytest.approx(error.item(), rel=1e-4) and up.error == gate.error
    assert all(row.rows == 256 and 0 <= row.psi < 0.25 and row.not_finite == 0 for row in rows.values())


@pytest.mark.parametrize("scheme", ["w8a8-static", "w8a8-static-aasym"])
def test_of_a_fixed_range_what_lies_outside_is_clipped(model, scheme):
    calibration = [inputs(seed) for seed in range(4)]
    qnb.quantize(model, scheme, calibration=calibration, progress=False)
    with qnb.monitor(model, every=1, window=256, max_psi=None) as watch:
        serve(model, range(4))
        serve(model, range(4))
        row = watch.rows[0]
        assert row.clipped_as == STATIC and row.clipped == 0 and watch.report().alarms == ()
        serve(model, range(4), factor=3.0)
        variant = model.blocks[0].gate.variant
        x = torch.cat([inputs(seed, factor=3.0)[0] for seed in range(4)])
        steps = torch.round(x / torch.tensor(variant.inputs.scale)) + variant.inputs.zero
        assert watch.rows[0].clipped == ((steps < -128) | (steps > 127)).sum().item() / x.numel() > 0
        assert watch.report().alarms[0].kind == "clipped"


def test_channels_that_stay_in_the_original_precision_are_no_codes(model):
    qnb.quantize(model, "w8a8-outliers8", calibration=[inputs(0)], progress=False)
    channels = model.blocks[0].gate.variant.channels
    with qnb.monitor(model, every=1, window=256) as watch:
        serve(model, range(8))
        row = watch.rows[0]
    x = torch.cat([inputs(seed)[0] for seed in range(4, 8)]).index_fill(1, channels, 0)
    codes = torch.ops.qnb.quantize_rows(x)[0]
    assert row.clipped == (codes.abs() == 127).sum().item() / x.numel()


def test_one_pass_in_so_many_is_looked_into_and_all_are_counted(model):
    with qnb.monitor(model, every=5) as watch:
        serve(model, range(200), rows=2)
        report = watch.report()
    assert report.passes == 200
    assert 20 <= report.sampled <= 66  # gaps of 1 to 9, 5 in the mean
    assert report.latency_p50_ms > 0 and report.latency_p50_ms <= report.latency_p95_ms <= report.latency_p99_ms
    assert report.tokens is None and "token ids" in report.unavailable["tokens"]


def test_another_distribution_raises_the_alarm_once_and_what_comes_back_silences_it(model):
    qnb.quantize(model, "w8a8", progress=False)
    heard = []
    with qnb.monitor(model, every=1, window=256, on_alert=heard.append) as watch:
        serve(model, range(12))
        assert heard == [] and watch.report().alarms == () and watch.suggest() == []
        assert "Quiet" in watch.report().text()
        serve(model, range(12, 20), factor=8.0)
        alarm = watch.report().alarms[0]
        assert alarm.kind == "psi" and alarm.value >= 0.25 and "blocks.0.gate" in alarm.layers
        assert {name for alert in heard for name in alert.layers} == set(alarm.layers)
        assert len(heard) == len({alert.layers for alert in heard}) <= 4  # not once for each pass
        errors = {row.name: row.error for row in watch.rows}
        assert watch.suggest() == sorted(errors, key=lambda name: -errors[name])[:3]
        assert watch.suggest(2) == watch.suggest()[:2]
        assert "Alarm" in watch.report().text()
        serve(model, range(20, 28))
        assert watch.report().alarms == () and watch.alerts == tuple(heard)


def test_floats_that_leave_the_baselines_range_raise_an_alarm_before_anything_is_quantized(model):
    with qnb.monitor(model, every=1, window=256, max_psi=None) as watch:
        serve(model, range(12))
        assert watch.report().alarms == ()
        serve(model, range(4), factor=8.0)
        alarms = watch.report().alarms
    assert [alarm.kind for alarm in alarms] == ["clipped"] and "blocks.0.gate" in alarms[0].layers
    assert len(watch.suggest()) == 3


def test_nan_in_a_pass_is_an_alarm(model):
    with qnb.monitor(model, every=1, window=256) as watch:
        serve(model, range(8))
        model(inputs(0) * torch.nan)
        alarm = watch.report().alarms[0]
    assert alarm.kind == "not_finite" and alarm.value == 64 and len(alarm.layers) == 6


def test_slow_passes_are_an_alarm(model):
    with qnb.monitor(model, every=10_000, max_latency_ms=1e-6) as watch:
        serve(model, range(30), rows=2)
        assert [alarm.kind for alarm in watch.report().alarms] == ["latency_p95_ms"]


def test_a_baseline_is_run_at_once_and_named(model):
    given = [inputs(seed) for seed in range(8)]
    with qnb.monitor(model, every=1, window=256, baseline=given) as watch:
        report = watch.report()
        assert report.baseline == "8 given texts, 512 rows" and report.passes == 0
        assert "no pass has been looked into" in report.rows[0].unavailable["psi"]
        serve(model, range(100, 104))
        assert all(row.psi < 0.25 for row in watch.rows)
        watch.baseline([inputs(seed, factor=8.0) for seed in range(8)])
        serve(model, range(100, 104))
        assert max(row.psi for row in watch.rows) > 1
    assert not model.training and hooks(model) == 0


def test_a_missing_figure_says_why(model):
    with qnb.monitor(model, every=1, window=256) as watch:
        rows = watch.rows
        assert all(row.psi is row.clipped is row.error is None for row in rows)
        assert all("one in 1" in why for row in rows for why in row.unavailable.values())
        serve(model, range(2))
        assert "gathered: 128 of 256" in watch.rows[0].unavailable["psi"]
        serve(model, range(4))
        row = watch.rows[0]
        assert "128 rows" in row.unavailable["psi"] and row.clipped is not None
        report = watch.report()
    assert report.energy_mj is None and report.unavailable["energy_mj"]
    assert "every=1" in report.unavailable["latency_p50_ms"]
    everything = json.dumps(report.to_dict())
    assert "blocks.0.gate" in everything


def test_padding_is_not_looked_at():
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(10, K), nn.Linear(K, 10)

        def forward(self, input_ids, attention_mask=None):
            return self.out(self.embed(input_ids))

    model = Language().eval()
    with torch.no_grad():
        model.embed.weight[0] = 1e6  # the padding token
    ids = torch.randint(1, 10, (4, 64), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[:2, :40], mask[:2, :40] = 0, 0
    with qnb.monitor(model, every=1, window=256) as watch:
        for _ in range(12):
            model(input_ids=ids, attention_mask=mask)
        report = watch.report()
    assert watch._window.ranges["out"] < 10
    assert report.rows[0].clipped == 0 and report.tokens == 12 * 256


def test_an_accelerators_queue_is_waited_for_only_around_the_pass_before_one_that_is_looked_into(model, monkeypatch):
    waits = []
    monkeypatch.setattr("qnb.measure.monitor.synchronize", waits.append)
    with qnb.monitor(model, every=10) as watch:
        watch._accelerated = True
        serve(model, range(300), rows=2)
        report = watch.report()
    assert 0 < len(watch._latencies) <= report.sampled + 1
    assert len(waits) == 2 * len(watch._latencies)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_sees_the_same(model):
    model = model.cuda()
    qnb.quantize(model, "w8a8", layers="blocks.0.gate", progress=False)
    with qnb.monitor(model, every=1, window=256) as watch, torch.no_grad():
        for seed in range(8):
            model(inputs(seed).cuda())
        rows = {row.name: row for row in watch.rows}
    x = torch.cat([inputs(seed)[0] for seed in range(4, 8)])
    codes = torch.ops.qnb.quantize_rows(x.cuda())[0]
    assert rows["blocks.0.gate"].clipped == (codes.abs() == 127).sum().item() / x.numel()
    assert all(row.rows == 256 and row.psi < 0.25 for row in rows.values())
    with qnb.monitor(model, every=3) as watch, torch.no_grad():
        for seed in range(200):
            model(inputs(seed).cuda())
        report = watch.report()
    assert report.passes == 200 and report.latency_p50_ms > 0


# The model stays as it was.


def test_it_leaves_nothing_behind_and_changes_no_bit(model):
    x = inputs(3)
    before, count = model(x), hooks(model)
    with qnb.monitor(model, every=1) as watch:
        assert torch.equal(model(x), before)
        assert hooks(model) == 2
    assert hooks(model) == count == 0
    assert watch.stop().passes == 1 and torch.equal(model(x), before)
    assert watch.report().passes == 1  # those after the end are not counted


def test_quantizing_and_restoring_meanwhile_are_followed(model):
    layer = model.blocks[0].gate
    with qnb.monitor(model, every=1, window=256) as watch:
        serve(model, range(8))
        original = watch.recipe
        qnb.quantize(model, "w8a8", progress=False)
        row = watch.rows[0]
        assert row.clipped is not None
        serve(model, range(4))
        quantized = watch.recipe
        assert quantized != original
        row = watch.rows[0]
        assert row.scheme == "w8a8" and row.clipped_as == DYNAMIC and row.clipped >= 1 / K and row.psi is not None
        qnb.restore(model)
        serve(model, range(4))
        assert watch.recipe == original and watch.rows[0].scheme == "none"
        assert model.blocks[0].gate is layer
        assert [(r.words, r.passes) for r in watch.report().recipes] == [("6 none", 12), ("6 w8a8", 4)]
    assert hooks(model) == 0


def test_a_change_lands_between_passes_and_not_in_one_that_is_looked_into(model):
    """Hooks that were put into a layer are taken out of the one that stands there afterwards: both share them."""
    stop = threading.Event()

    def change():
        while not stop.is_set():
            qnb.quantize(model, "w8a8", progress=False)
            qnb.restore(model)

    with qnb.monitor(model, every=2, window=256) as watch:
        other = threading.Thread(target=change)
        other.start()
        try:
            serve(model, range(60))
        finally:
            stop.set()
            other.join()
        report = watch.report()
    assert report.passes == 60 and report.notes == () and hooks(model) == 0


def test_a_copy_is_not_monitored(model):
    with qnb.monitor(model, every=1) as watch:
        twin = copy.deepcopy(model)
        serve(twin, range(3))
        assert watch.report().passes == 0
        qnb.quantize(model, "w8a8", progress=False)
        serve(copy.deepcopy(model), range(3))
        assert watch.report().passes == 0


def test_a_monitored_model_can_be_pickled(model):
    with qnb.monitor(model, every=1) as watch:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        x = inputs(0)
        assert torch.equal(again(x), model(x)) and watch.report().passes == 1
        assert set(model.state_dict()) == set(Model().state_dict())


@pytest.mark.parametrize("scheme", [None, "w8a8"])
def test_a_model_compiled_under_the_monitor_is_one_graph(model, scheme):
    if scheme:
        qnb.quantize(model, scheme, progress=False)
    x = inputs(0)
    with torch.no_grad(), qnb.monitor(model, every=1) as watch:
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), model(x))
        assert watch.report().passes == 1  # the uncompiled call


def test_of_a_compiled_model_passes_are_timed_and_layers_are_said_to_be_out_of_sight(model):
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), qnb.monitor(compiled, every=2) as watch:
        for seed in range(60):
            compiled(inputs(seed, rows=8))
        report = watch.report()
    assert report.passes == 60 and report.sampled == 0 and report.latency_p50_ms > 0
    assert all("compiled" in row.unavailable["psi"] for row in report.rows) and len(report.rows) == 6
    assert any("compiled" in note for note in report.notes)


def test_a_model_compiled_in_place_is_refused_by_name(model):
    model.compile(backend="eager")
    with pytest.raises(BadInput, match="compiled in place"):
        qnb.monitor(model)


def test_it_pauses_while_something_measures(model):
    with qnb.monitor(model, every=1, window=256) as watch:
        with alone(model):
            serve(model, range(3))
        serve(model, range(2))
        report = watch.report()
    assert (report.passes, report.paused) == (2, 3)


def test_a_pass_that_fails_or_is_interrupted_leaves_no_hook_in_a_layer(model):
    def broken(layer, args):
        raise failure

    with qnb.monitor(model, every=1, window=256) as watch:
        for failure in (ValueError("broken"), KeyboardInterrupt()):
            handle = model.blocks[1].register_forward_pre_hook(broken)
            with pytest.raises(type(failure)):
                model(inputs(0))
            handle.remove()
            assert watch.report().passes == 0
        serve(model, range(3))
        assert watch.report().passes == 3 and watch.report().notes == ()
    assert hooks(model) == 0


def test_threads_are_told_apart(model):
    """Only the layers of a thread's own pass are looked into, so each has all its rows, and none twice."""
    with qnb.monitor(model, every=2, window=100_000) as watch:
        threads = [threading.Thread(target=serve, args=(model, range(40)), kwargs={"rows": 16}) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        report = watch.report()
        assert report.passes == 160 and report.notes == ()
        assert {base for base, _ in watch._window.counts().values()} == {16 * report.sampled}
    assert hooks(model) == 0


def test_a_broken_callback_disturbs_nobody(model):
    def broken(alert):
        raise RuntimeError("the pager is down")

    with qnb.monitor(model, every=1, window=256, on_alert=broken) as watch:
        serve(model, range(8))
        serve(model, range(8), factor=8.0)
        assert "on_alert raised RuntimeError: the pager is down" in watch.report().notes


def test_it_keeps_no_model_alive():
    import gc
    import weakref

    model = Model()
    alive = weakref.ref(model)
    watch = qnb.monitor(model, every=1)
    serve(model, range(2))
    del model
    gc.collect()
    assert alive() is None and watch.report().passes == 2 and "the model is gone" in watch.report().notes
    with pytest.raises(BadInput, match="gone"):
        watch.baseline([inputs(0)])
    watch.stop()


def test_two_monitors_of_one_model_do_not_disturb_each_other(model):
    with qnb.monitor(model, every=1, window=256) as one, qnb.monitor(model, every=3, window=256) as two:
        serve(model, range(12))
        one.stop()
        serve(model, range(12))
        assert one.report().passes == 12 and two.report().passes == 24 and two.report().sampled > 2
    assert hooks(model) == 0


# Votes, energy, metrics and the view.


def test_votes_go_to_the_recipe_that_answered(model):
    with qnb.monitor(model, every=100) as watch:
        with pytest.raises(BadInput, match="no pass has been seen"):
            watch.feedback(good=True)
        serve(model, [0])
        original = watch.recipe
        watch.feedback(good=True)
        qnb.quantize(model, "w8a8", progress=False)
        watch.feedback(good=True)  # the answer was still the original's
        serve(model, [0])
        watch.feedback(good=False)
        watch.feedback(good=False, recipe=original)
        with pytest.raises(BadInput, match="those that answered are"):
            watch.feedback(good=True, recipe="0" * 12)
        with pytest.raises(BadInput, match="True or False"):
            watch.feedback(good=1)
        recipes = watch.report().recipes
        assert [(r.words, r.good, r.bad) for r in recipes] == [("6 none", 2, 1), ("6 w8a8", 0, 1)]
        assert "6 w8a8" in watch.report().text()


def test_a_quantized_embedding_makes_another_recipe():
    model = nn.Sequential(nn.Embedding(32, 64), nn.Linear(64, 64)).eval()
    with qnb.monitor(model, every=100) as watch:
        model(torch.arange(4))
        original = watch.recipe
        qnb.quantize(model, "w8a16", layers="0", progress=False)
        model(torch.arange(4))
        assert watch.recipe != original
        assert [r.words for r in watch.report().recipes] == ["1 none", "1 none, 1 w8a16"]
        assert [row.name for row in watch.rows] == ["1"]


def test_the_interval_of_votes_is_wilsons():
    """The worked bounds of 8 good of 10: (0.490, 0.943), Agresti and Coull, 1998."""
    low, high = RecipeVotes("a", "", 10, 8, 2).interval
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    assert RecipeVotes("a", "", 10, 0, 0).interval is None
    assert RecipeVotes("a", "", 1, 1, 0).interval[1] == 1


def test_energy_comes_from_the_meter(model, tmp_path):
    """A counter that grows by 10 mJ in each second; the clock moves half a second at each look at it."""
    recording = tmp_path / "energy.csv"
    recording.write_text("time,value\n" + "".join(f"{i},{10 * i}\n" for i in range(2000)))
    seconds = iter(range(10_000))
    with probes.using("energy_mj", replay(recording, clock=lambda: next(seconds) / 2)):
        with qnb.monitor(model, every=1) as watch:
            for _ in range(40):
                watch.report()  # each looks at the counter
            measured = watch.report()
    assert measured.energy_mj > 0 and measured.energy_mj % 10 == 0
    assert measured.energy_mj_per_token is None and "token" in measured.unavailable["energy_mj_per_token"]


def test_metrics_are_those_of_the_report(model):
    prometheus = pytest.importorskip("prometheus_client", reason="prometheus_client is not installed")
    registry = prometheus.CollectorRegistry()
    qnb.quantize(model, "w8a8", progress=False)
    with qnb.monitor(model, every=1, window=256, registry=registry) as watch:
        serve(model, range(8))
        watch.feedback(good=True)
        page = prometheus.generate_latest(registry).decode()
        row = watch.rows[0]
        labels = {"layer": row.name, "scheme": "w8a8"}
        assert registry.get_sample_value("qnb_layer_psi", labels) == row.psi
        assert registry.get_sample_value("qnb_layer_clipped", labels) == row.clipped
        assert registry.get_sample_value("qnb_passes_total") == 8
        assert registry.get_sample_value("qnb_alarm_layers", {"kind": "psi"}) == 0
        assert registry.get_sample_value("qnb_votes_total", {"recipe": watch.recipe, "vote": "good"}) == 1
        assert "qnb_energy" not in page and "qnb_pass_seconds" not in page  # neither could be measured
        with pytest.raises(BadInput, match="another monitor"):
            qnb.monitor(model, registry=registry)
        with pytest.raises(BadInput, match="registered already"):
            watch.metrics()
        serve(model, range(8), factor=8.0)
        assert registry.get_sample_value("qnb_alarm_layers", {"kind": "psi"}) == len(watch.report().alarms[0].layers)
    assert prometheus.generate_latest(registry) == b""
    assert hooks(model) == 0
    with pytest.raises(BadInput, match="CollectorRegistry"):
        qnb.monitor(model, registry=3)
    assert hooks(model) == 0


def test_without_prometheus_it_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
    with qnb.monitor(model) as watch, pytest.raises(qnb.errors.QnbError, match=r'pip install "qnb\[monitor\]"'):
        watch.metrics()


def test_the_live_view_is_one_display_that_is_replaced(model, monkeypatch):
    display = pytest.importorskip("IPython.display", reason="IPython is not installed")
    shown = []

    def fake(report, display_id):
        shown.append(report)
        return types.SimpleNamespace(update=shown.append)

    with qnb.monitor(model, every=1, window=256) as watch:
        monkeypatch.setattr("IPython.get_ipython", lambda: None)
        with pytest.raises(BadInput, match="needs IPython"):
            watch.live()
        monkeypatch.setattr("IPython.get_ipython", lambda: object())
        monkeypatch.setattr(display, "display", fake)
        watch.live(seconds=1e-9)
        serve(model, range(3))
        assert [report.passes for report in shown] == [0, 1, 2, 3]
        watch.live(seconds=3600)
        serve(model, range(3))
        assert len(shown) == 5
    assert len(shown) == 6 and "the monitor was stopped" in shown[-1].notes


def test_names_are_escaped_and_text_and_html_say_the_same():
    model = nn.Sequential()
    model.add_module("<script>x", nn.Linear(K, K))
    with qnb.monitor(model, every=1, window=256) as watch:
        serve(model, range(12))
        report = watch.report()
        assert "<script>" in report.text() and repr(watch)
        assert "<script>" not in watch._repr_html_() and "&lt;script&gt;" in watch._repr_html_()


@pytest.mark.parametrize(
    "given, said",
    [
        ({"every": 0}, "every=0: give a whole number from 1"),
        ({"every": True}, "every=True"),
        ({"window": 10}, "whole number from 256"),
        ({"max_psi": -1}, "max_psi=-1: give a number above 0"),
        ({"max_clipped": "much"}, "max_clipped='much'"),
        ({"max_latency_ms": math.nan}, "max_latency_ms=nan"),
        ({"on_alert": 3}, "on_alert is 3"),
        ({"baseline": []}, "baseline is empty"),
        ({"baseline": "text"}, "bare string"),
        ({"baseline": [torch.zeros(1, 4, K)]}, "holds 4 rows"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(model, given, said):
    with pytest.raises(BadInput, match=said) as caught:
        qnb.monitor(model, **given)
    assert "\n" not in str(caught.value) and hooks(model) == 0


def test_what_is_no_model_is_refused():
    with pytest.raises(BadInput, match="give a torch.nn.Module"):
        qnb.monitor(3)


def test_bad_calls_of_a_monitor(model):
    with qnb.monitor(model) as watch:
        for call, said in (
            (lambda: watch.suggest(0), "count=0"),
            (lambda: watch.live(seconds=0), "seconds=0"),
            (lambda: watch.baseline([]), "empty"),
        ):
            with pytest.raises(BadInput, match=said):
                call()
    assert isinstance(watch, Monitor)
