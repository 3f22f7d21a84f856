"""`quantize`, `restore`, `layers` and `QLinear`: what changes, what does not, and what is refused."""

import copy
import gc
import random
import signal
import threading
import time
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import qnb
from qnb.errors import (
    BadInput,
    BadWeights,
    LayerRefused,
    NotQuantized,
    NotSaveable,
    QnbError,
    UnknownRounding,
    UnknownScheme,
)
from qnb.model.linear import QLinear, held_storages, original_pass, quantized_layers

SCHEMES = ("w8a8", "w8a16")


class Block(nn.Module):
    def __init__(self, width=48):
        super().__init__()
        self.up = nn.Linear(width, 80)
        self.down = nn.Linear(80, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """Two blocks and a head under a usual name."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.lm_head = nn.Linear(48, 11)

    def forward(self, x):
        return self.lm_head(self.blocks(x))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture
def x():
    return torch.randn(5, 48, generator=torch.Generator().manual_seed(1))


def snapshot(model):
    """Identity of every module, its attributes and hooks, and the bits of every tensor."""
    modules = {n: (id(m), sorted(m.__dict__), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    return modules, {n: t.clone() for n, t in model.state_dict().items()}


def assert_untouched(model, before):
    modules, tensors = snapshot(model)
    assert modules == before[0]
    assert tensors.keys() == before[1].keys()
    assert all(torch.equal(t, before[1][n]) for n, t in tensors.items())


def refused(error, call, *words):
    """`call` raises `error` in one line that holds every word."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert isinstance(caught.value, QnbError)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_linear_but_the_head_changes_and_comes_back(model, x, scheme):
    before, y = snapshot(model), model(x)
    report = qnb.quantize(model, scheme)
    assert set(quantized_layers(model)) == {"blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"}
    assert [r.scheme for r in report.rows] == [scheme] * 4 + ["none"]
    assert "output embedding" in report.rows[-1].skipped
    changed = model(x)
    assert not torch.equal(changed, y)
    assert (changed - y).norm() < 0.03 * y.norm()
    with original_pass():
        assert torch.equal(model(x), y)
    assert torch.equal(model(x), changed)
    qnb.restore(model)
    assert_untouched(model, before)
    assert torch.equal(model(x), y)


def test_the_quantized_weight_is_the_formula(model):
    weight = model.blocks[0].up.weight.detach().double()
    qnb.quantize(model, "w8a16")
    plain = model.blocks[0].up.variant.plain()
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).double()
    assert torch.equal(plain["weight_scale"].double(), scale)
    assert torch.equal(plain["weight_codes"].double(), (weight.float() / scale.float()).double().round())
    assert ((plain["weight_codes"].double() * scale - weight).abs() <= scale * 0.5000001).all()


def test_scales_are_rounded_to_the_dtype_they_are_saved_in(model):
    model.bfloat16()
    qnb.quantize(model, "w8a8")
    variant = model.blocks[0].up.variant
    assert torch.equal(variant.levels.scale, variant.levels.scale.bfloat16().float())
    assert variant.plain()["weight_scale"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tiny_and_zero_weights(dtype):
    model = nn.Sequential(nn.Linear(8, 4, bias=False)).to(dtype)
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].weight[1] = tiny
    kept = model[0].weight.detach().clone()
    qnb.quantize(model, "w8a16")
    got = model[0].variant.dequantize(dtype)
    assert torch.equal(got[:2], kept[:2])


def test_hybrid_puts_one_kind_back(model, x):
    down = model.blocks[0].down
    qnb.quantize(model, "w8a8")
    report = qnb.quantize(model, "none", layers="blocks.*.down")
    assert model.blocks[0].down is down
    assert [r.scheme for r in report.rows] == ["w8a8", "none", "w8a8", "none", "none"]
    assert len(quantized_layers(model)) == 2


def test_again_means_from_the_original(model, x):
    qnb.quantize(model, "w8a16")
    direct = model(x)
    layer = model.blocks[0].up
    qnb.quantize(model, "w8a8")
    qnb.quantize(model, "w8a16")
    assert model.blocks[0].up is layer
    assert torch.equal(model(x), direct)


def test_layers_and_skip(model):
    qnb.quantize(model, "w8a8", layers=["blocks.0.*", "lm_head"], skip="*.down")
    assert set(quantized_layers(model)) == {"blocks.0.up", "lm_head"}
    qnb.restore(model)
    qnb.quantize(model, "w8a8", layers="*")
    assert "lm_head" not in quantized_layers(model), "a glob must not take the output embedding along"


@pytest.mark.parametrize("name", ["w9a9", "w8a8x", "w8a8 ", "W8A8", "", "nf5"])
def test_unknown_schemes(model, name):
    before = snapshot(model)
    refused(UnknownScheme, lambda: qnb.quantize(model, name), repr(name), "w8a8", "w8a16", "none")
    assert_untouched(model, before)


@pytest.mark.parametrize("scheme", [None, 8, torch.int8])
def test_a_scheme_that_is_no_name(model, scheme):
    refused(UnknownScheme, lambda: qnb.quantize(model, scheme), type(scheme).__name__)


def test_bad_words(model):
    before = snapshot(model)
    refused(UnknownRounding, lambda: qnb.quantize(model, "w8a8", rounding="gtpq"), "gtpq", "nearest")
    refused(BadInput, lambda: qnb.quantize(model, "w8a8", keep="cloud"), "cloud", "memory")
    refused(
        LayerRefused, lambda: qnb.quantize(model, "w8a8", layers="*.attn.*"), "*.attn.*", "matches none", "blocks.0.up"
    )
    refused(LayerRefused, lambda: qnb.quantize(model, "w8a8", skip="blocks.7.*"), "blocks.7.*", "matches none")
    refused(LayerRefused, lambda: qnb.quantize(model, "w8a8", skip="*"), "no layer is left")
    refused(BadInput, lambda: qnb.quantize(model, "w8a8", layers=[3]), "int")
    refused(BadInput, lambda: qnb.quantize(model, "w8a8", layers=[]), "layers is empty")
    assert_untouched(model, before)


@pytest.mark.parametrize("thing", [None, "gpt2", [nn.Linear(2, 2)], torch.ones(2)])
def test_no_module(thing):
    refused(BadInput, lambda: qnb.quantize(thing, "w8a8"), "torch.nn.Module")
    refused(BadInput, lambda: qnb.layers(thing), "torch.nn.Module")


def test_a_linear_alone_says_to_wrap_it():
    refused(BadInput, lambda: qnb.quantize(nn.Linear(4, 4), "w8a8"), "Sequential")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_leave_all_layers_alone(model, value):
    with torch.no_grad():
        model.blocks[1].down.weight[3, 4] = value
    modules, y = {n: id(m) for n, m in model.named_modules()}, model.state_dict()
    refused(BadWeights, lambda: qnb.quantize(model, "w8a8"), "blocks.1.down", "1 NaN or infinite", "skip")
    assert {n: id(m) for n, m in model.named_modules()} == modules
    assert model.state_dict().keys() == y.keys()
    qnb.quantize(model, "w8a8", skip="blocks.1.down")


def test_meta():
    with torch.device("meta"):
        model = Model()
    refused(BadWeights, lambda: qnb.quantize(model, "w8a8"), "blocks.0.up", "meta")
    assert not quantized_layers(model)


@pytest.mark.parametrize(("k", "n"), [(0, 4), (4, 0), (0, 0)])
def test_empty_weights_are_refused(k, n):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(k, n))
    refused(LayerRefused, lambda: qnb.quantize(model, "w8a8", layers="1"), "layer 1", "empty", str((n, k)))
    report = qnb.quantize(model, "w8a8")
    assert [r.scheme for r in report.rows] == ["w8a8", "none"]
    assert "empty" in report.rows[1].skipped


@pytest.mark.parametrize("scheme", SCHEMES)
def test_inputs_of_every_form(model, scheme):
    qnb.quantize(model, scheme)
    layer = model.blocks[0].up
    x = torch.randn(6, 4, 96)
    for given in (x[..., ::2], x.transpose(0, 1)[..., :48], x[0, :1, :48].expand(7, 48), x[0, 0, :48], x[:0, :, :48]):
        got = layer(given)
        assert got.shape == (*given.shape[:-1], 80)
        assert torch.equal(got, layer(given.clone(memory_format=torch.contiguous_format)))
    refused(BadInput, lambda: layer(torch.randn(2, 47)), "47", "48")


def test_a_row_with_nan_stays_alone(model):
    qnb.quantize(model, "w8a8")
    layer = model.blocks[0].up
    x = torch.randn(4, 48)
    good = layer(x)
    for value in (float("nan"), float("inf")):
        x[2, 7] = value
        got = layer(x)
        assert got[2].isnan().all()
        assert torch.equal(got[[0, 1, 3]], good[[0, 1, 3]])


def test_restoring_what_was_never_quantized(model):
    refused(NotQuantized, lambda: qnb.restore(model), "quantize it first")


def test_without_originals(model, x):
    kept = weakref.ref(model.blocks[0].up)
    qnb.quantize(model, "w8a8", keep="none")
    gc.collect()
    assert kept() is None
    assert held_storages(model)[1] == 0
    y = model(x)
    for call in (
        lambda: qnb.restore(model),
        lambda: qnb.quantize(model, "w8a16"),
        lambda: qnb.quantize(model, "none", layers="blocks.0.up"),
    ):
        refused(NotQuantized, call, "not kept", 'keep="none"')
    with original_pass():
        refused(NotQuantized, lambda: model(x), "original pass")
    assert torch.equal(model(x), y)


def test_deepcopy_is_a_model_of_its_own(model, x):
    y = model(x)
    qnb.quantize(model, "w8a8")
    twin = copy.deepcopy(model)
    changed = model(x)
    qnb.restore(twin)
    assert torch.equal(twin(x), y)
    assert torch.equal(model(x), changed)
    assert twin.blocks[0].up is not model.blocks[0].up.original


def test_state_dict_round_trip(model, x):
    qnb.quantize(model, "w8a8")
    state = copy.deepcopy(model.state_dict())
    assert state["blocks.0.up.weight_codes"].dtype == torch.int8
    assert state["blocks.0.up.weight_scale"].shape == (80, 1)
    other = Model().eval()
    qnb.quantize(other, "w8a8")
    assert not torch.equal(other(x), model(x))
    assert not any(other.load_state_dict(state))
    assert torch.equal(other(x), model(x))
    refused(NotQuantized, lambda: qnb.restore(other), "load_state_dict")
    model.load_state_dict(state)
    qnb.restore(model)  # its own weights again: the originals are still its originals


def test_state_dicts_that_do_not_fit_change_nothing(model, x):
    floats = copy.deepcopy(model.state_dict())
    qnb.quantize(model, "w8a8")
    y, state = model(x), model.state_dict()
    with pytest.raises(RuntimeError, match="weight_scale"):
        model.load_state_dict(floats)
    with pytest.raises(RuntimeError, match="needs int8"):
        model.load_state_dict({**state, "blocks.0.up.weight_codes": floats["blocks.0.up.weight"]})
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        model.load_state_dict({**state, "blocks.0.up.weight_scale": state["blocks.0.up.weight_scale"] * float("nan")})
    plain = Model()
    with pytest.raises(RuntimeError, match="weight_scale"):
        plain.load_state_dict(state)
    before = snapshot(plain)
    plain.load_state_dict({k: v for k, v in state.items() if "blocks" in k and "bias" not in k}, strict=False)
    assert_untouched(plain, before)  # integers never end up as floats
    assert torch.equal(model(x), y)


@pytest.mark.parametrize(
    ("scheme", "how"),
    [("w8a8", {"smooth": 0.5}), ("w4a16-g64-asym", {"rounding": "hqq"}), ("w4a16-g64", {"rounding": "awq"})],
)
def test_a_state_dict_of_the_same_scheme_fits_however_its_codes_were_chosen(model, x, scheme, how):
    other = Model().eval()
    qnb.quantize(other, scheme, calibration=[x], **how)
    qnb.quantize(model, scheme)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("scheme", ["w8a8-outliers8", "w8a16-asym"])
def test_a_state_dict_of_another_kind_is_refused(model, x, scheme):
    """Its codes alone would fit, and stand for other weights without what comes with them."""
    other = Model().eval()
    qnb.quantize(other, scheme, calibration=[x])
    qnb.quantize(model, scheme.partition("-")[0])
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**model.state_dict(), **other.state_dict()})


def test_codes_beyond_their_bits_are_refused(model, x):
    qnb.quantize(model, "w4a16-g64")
    y, state = model(x), model.state_dict()
    with pytest.raises(RuntimeError, match="leave -8 to 7"):
        model.load_state_dict({**state, "blocks.0.up.weight_codes": state["blocks.0.up.weight_codes"] + 8})
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_to_another_dtype_and_back_to_the_original(model, x, dtype):
    qnb.quantize(model, "w8a8")
    bits = {n: t.clone() for n, t in model.blocks[0].up.variant.tensors().items()}
    model.to(dtype)
    assert all(torch.equal(t, bits[n]) for n, t in model.blocks[0].up.variant.tensors().items())
    assert model.blocks[0].up.bias.dtype == dtype
    if dtype != torch.float64:
        assert model(x.to(dtype)).dtype == dtype
    qnb.restore(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(x.to(dtype)).dtype == dtype


def test_train_mode_follows(model, x):
    qnb.quantize(model, "w8a8")
    model.train()
    assert model(x).shape == (5, 11)
    qnb.restore(model)
    assert model.blocks[0].up.training


def test_the_gradient_reaches_the_input_and_the_bias(model):
    qnb.quantize(model, "w8a8")
    layer = model.blocks[0].up
    x = torch.randn(3, 48, requires_grad=True)
    weight = layer.variant.dequantize(torch.float32)
    out = layer(x)
    seed = torch.randn_like(out)
    out.backward(seed)
    torch.testing.assert_close(x.grad, seed @ weight)
    torch.testing.assert_close(layer.bias.grad, seed.sum(0))
    layer.bias.grad = None
    layer(x.detach()).backward(seed)
    torch.testing.assert_close(layer.bias.grad, seed.sum(0))


def test_reading_weight_from_outside(model):
    original = model.blocks[0].up.weight.detach().clone()
    qnb.quantize(model, "w8a8")
    with pytest.warns(UserWarning, match="dequantized"):
        got = model.blocks[0].up.weight
    scale = model.blocks[0].up.variant.levels.scale.view(-1)
    assert got.dtype == torch.float32
    assert ((got - original).abs() <= scale.unsqueeze(1) * 0.5000001).all()


def test_reading_weight_in_the_original_pass_gives_the_original(model):
    original = model.blocks[0].up.weight
    qnb.quantize(model, "w8a8")
    with original_pass():
        assert torch.equal(model.blocks[0].up.weight, original)


def test_a_row_alone_has_a_gradient(model):
    qnb.quantize(model, "w8a8")
    x = torch.randn(48, requires_grad=True)
    model.blocks[0].up(x).sum().backward()
    assert x.grad.shape == (48,)
    assert torch.equal(model.blocks[0].up.bias.grad, torch.ones(80))


def test_quantized_in_inference_mode_it_still_has_a_gradient(model):
    with torch.inference_mode():
        qnb.quantize(model, "w8a8")
    x = torch.randn(2, 48, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("layer", "word"),
    [
        (lambda: nn.Linear(8, 8, dtype=torch.float64), "float64"),
        (lambda: nn.Linear(131_072, 1, bias=False), "131072"),
        (lambda: nn.LazyLinear(8), "not initialized"),
    ],
)
def test_layers_that_could_not_run_are_refused(layer, word):
    model = nn.Sequential(nn.Linear(8, 8), layer())
    refused(LayerRefused, lambda: qnb.quantize(model, "w8a8", layers="1"), word)
    assert word in qnb.quantize(model, "w8a8").rows[1].skipped
    assert word in qnb.layers(model).rows[1].skipped


def test_adapters_are_taken_by_their_exact_name_alone(model):
    model.blocks[0].lora_A = nn.ModuleDict({"default": nn.Linear(48, 4, bias=False)})
    qnb.quantize(model, "w8a8", layers="*")
    assert "blocks.0.lora_A.default" not in quantized_layers(model)
    qnb.quantize(model, "w8a8", layers="blocks.0.lora_A.default")
    assert "blocks.0.lora_A.default" in quantized_layers(model)


def test_originals_keep_their_bits_while_the_model_changes_type_and_back(model, x):
    weight = model.blocks[0].up.weight.detach().clone()
    qnb.quantize(model, "w8a8")
    model.half().float()
    qnb.restore(model)
    assert torch.equal(model.blocks[0].up.weight, weight)


def test_a_bias_that_is_loaded_is_there_after_restore(model):
    qnb.quantize(model, "w8a8")
    state = copy.deepcopy(model.state_dict())
    state["blocks.0.up.bias"] = torch.full((80,), 3.0)
    model.load_state_dict(state, assign=True)
    qnb.restore(model)
    assert torch.equal(model.blocks[0].up.bias, torch.full((80,), 3.0))


def test_two_layers_tied_to_each_other_share_their_codes():
    model = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 48))
    model[1].weight = model[0].weight
    report = qnb.quantize(model, "w8a8")
    assert [r.note for r in report.rows] == ["weight tied to 1", "weight tied to 0"]
    assert model[0].variant.packed is model[1].variant.packed
    assert held_storages(model)[0] == model[0].variant.nbytes + 2 * 48 * 4
    qnb.restore(model)
    assert model[1].weight is model[0].weight


def test_save_pretrained_refuses_while_anything_inside_is_quantized(tmp_path):
    model, _ = qnb.demo_lm()
    qnb.quantize(model.model.layers[0], "w8a8")
    refused(NotSaveable, lambda: model.save_pretrained(tmp_path), "qnb.restore(model)")
    assert not list(tmp_path.glob("*.safetensors"))
    qnb.restore(model)
    model.save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors"))


def test_a_layer_shared_by_two_parents_stays_shared(x):
    model = nn.Sequential(Block(), Block()).eval()
    model[1].up = shared = model[0].up
    report = qnb.quantize(model, "w8a8")
    assert model[0].up is model[1].up
    assert len(report.rows) == 3
    qnb.restore(model)
    assert model[0].up is shared
    assert model[1].up is shared


def test_tied_weights_are_said(model):
    model.emb = nn.Embedding(11, 48)
    model.lm_head.weight = model.emb.weight
    report = qnb.quantize(model, "w8a8", layers="lm_head")
    row = next(r for r in report.rows if r.name == "lm_head")
    assert row.scheme == "w8a8"
    assert "emb" in row.note
    qnb.restore(model)
    assert model.lm_head.weight is model.emb.weight


def test_parametrized_and_weight_normed_layers_are_refused(model):
    parametrizations.orthogonal(model.blocks[0].up)
    torch.nn.utils.weight_norm(model.blocks[0].down)
    refused(
        LayerRefused,
        lambda: qnb.quantize(model, "w8a8", layers="blocks.0.up"),
        "parametrized",
        "remove_parametrizations",
    )
    refused(LayerRefused, lambda: qnb.quantize(model, "w8a8", layers="blocks.0.down"), "weight is no parameter")
    qnb.quantize(model, "w8a8")
    assert parametrize.is_parametrized(model.blocks[0].up)
    assert set(quantized_layers(model)) == {"blocks.1.up", "blocks.1.down"}


def test_layers_whose_weight_a_parent_reads(x):
    model = nn.Sequential(nn.TransformerEncoderLayer(48, 4, 96, batch_first=True), nn.Linear(48, 48)).eval()
    with torch.no_grad():
        y = model[0](x.unsqueeze(0))
        report = qnb.quantize(model, "w8a8")
        assert set(quantized_layers(model)) == {"1"}
        assert torch.equal(model[0](x.unsqueeze(0)), y)
    assert any("MultiheadAttention reads .weight" in (r.skipped or "") for r in report.rows)


def test_hooks_live_on_through_the_change_and_back(model, x):
    seen = []
    handle = model.blocks[0].up.register_forward_hook(lambda m, i, o: seen.append(type(m)))
    model(x)
    qnb.quantize(model, "w8a8")
    model(x)
    with original_pass():
        model(x)
    assert seen == [nn.Linear, QLinear, QLinear]
    handle.remove()
    model(x)
    qnb.restore(model)
    model(x)
    assert len(seen) == 3


def test_bytes_are_those_of_the_storages_held(model):
    before, _ = held_storages(model)
    assert before == sum(p.numel() * 4 for p in model.parameters())
    report = qnb.quantize(model, "w8a8")
    held, kept = held_storages(model)
    changed = [r for r in report.rows if r.scheme != "none"]
    assert kept == sum(r.bytes_before for r in changed)
    assert held == before - kept + sum(r.bytes_after for r in changed)
    qnb.restore(model)
    assert held_storages(model) == (before, 0)


def test_coverage_warns_of_weights_that_are_no_linear(model):
    assert "quantized 100 % of the weights" in qnb.quantize(model, "w8a8").coverage
    model.experts = nn.ParameterList([nn.Parameter(torch.zeros(8, 48, 80))])
    coverage = qnb.layers(model).coverage
    assert coverage.startswith("Warning")
    assert "3-D" in coverage


def test_report_shows_names_as_words_not_markup(model):
    model.add_module("<b>x", nn.Linear(4, 4))
    report = qnb.quantize(model, "w8a8")
    assert "<b>x" in report.text()
    assert "<b>x" not in report._repr_html_()
    assert "&lt;b&gt;x" in report._repr_html_()
    assert report.to_dict()["rows"][0]["shape"] == [80, 48]


def steps_of(kind, model):
    """A change of each kind, and the model it starts from."""
    if kind != "first":
        qnb.quantize(model, "w8a8")
    return {
        "first": lambda: qnb.quantize(model, "w8a8"),
        "again": lambda: qnb.quantize(model, "w8a16"),
        "back": lambda: qnb.restore(model),
    }[kind]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize(("kind", "count"), [("first", 4), ("again", 4), ("back", 8)])
def test_an_interrupt_at_each_step_of_a_change_takes_all_back(model, x, kind, count, at, after, monkeypatch):
    from qnb.model import swap

    change = steps_of(kind, model)
    before, y, done = snapshot(model), model(x), []
    for step in (swap.Place, swap.Switch, swap.Follow):

        def do(self, real=step.do):
            if after:
                real(self)
            done.append(self)
            if len(done) == at + 1:
                raise KeyboardInterrupt
            if not after:
                real(self)

        monkeypatch.setattr(step, "do", do)
    if at < count:
        with pytest.raises(KeyboardInterrupt):
            change()
        assert len(done) == at + 1
        assert_untouched(model, before)
        assert torch.equal(model(x), y)
    else:
        change()
        assert len(done) == count


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
@pytest.mark.parametrize("kind", ["first", "again", "back"])
def test_interrupts_at_random_moments_leave_the_model_whole(kind, x):
    """A signal falls between any two bytecodes; afterwards all layers are in one state, and nobody is kept waiting."""
    rng, outcomes = random.Random(0), set()

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(100):
            model = Model().eval()
            change = steps_of(kind, model)
            start = time.perf_counter()
            change()
            usual, model = time.perf_counter() - start, Model().eval()
            change = steps_of(kind, model)
            interrupted = False
            try:
                signal.setitimer(signal.ITIMER_REAL, max(1e-6, rng.random() * usual * 1.2))
                change()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted = True
            states = {q.scheme for q in quantized_layers(model).values()}
            assert len(quantized_layers(model)) in (0, 4)
            assert len(states) <= 1
            outcomes.add((interrupted, *states))
            answers = []
            other = threading.Thread(target=lambda model=model, answers=answers: answers.append(model(x)), daemon=True)
            other.start()
            other.join(20)
            assert answers, "a thread was kept out of the model"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert any(o[0] for o in outcomes), "no interrupt fell into a change"


def test_the_original_pass_is_seen_by_its_own_thread_alone(model, x):
    y = model(x)
    qnb.quantize(model, "w8a8")
    changed, seen = model(x), []
    with original_pass():
        other = threading.Thread(target=lambda: seen.append(model(x)))
        other.start()
        other.join()
        assert torch.equal(model(x), y)
    assert torch.equal(seen[0], changed)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_torch_compile_in_one_graph(model, x, scheme):
    qnb.quantize(model, scheme)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    given = x.clone().requires_grad_()
    eager = x.clone().requires_grad_()
    compiled(given).sum().backward()
    model(eager).sum().backward()
    torch.testing.assert_close(given.grad, eager.grad)


def test_a_compiled_model_is_said_to_be_one_and_has_its_own_names(model, x):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        y = compiled(x)
        report = qnb.quantize(compiled, "w8a8", layers="blocks.*")
        assert "compiled" in report.title
        assert report.rows[0].name == "blocks.0.up"
        assert torch.equal(compiled(x), model(x))
        assert not torch.equal(compiled(x), y)
        qnb.restore(compiled)
        assert torch.equal(compiled(x), y)


def test_autocast_gives_the_type_that_linear_gives(model, x):
    qnb.quantize(model, "w8a8")
    with torch.autocast("cpu", torch.bfloat16):
        assert model.blocks[0].up(x).dtype == torch.bfloat16
