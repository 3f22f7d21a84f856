"""Smoothing: the paper's formula, the search for an exponent, and what it is refused with."""

import pytest
import torch
from torch import Tensor, nn

import qnb
from qnb.errors import BadInput
from qnb.model import smoothing
from qnb.model.smoothing import best_divisor, divisor
from qnb.rounding import Statistics


def statistics_of(x: Tensor) -> Statistics:
    return Statistics(len(x), x.amin(0, keepdim=True), x.amax(0, keepdim=True), x.square().mean(0), x)


def wide() -> tuple[nn.Module, list[Tensor]]:
    """A layer of which a few input channels are fifty times as wide as the others, and inputs for it."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32)).eval()
    texts = [torch.randn(40, 64, generator=generator) for _ in range(3)]
    for text in texts:
        text[:, [3, 40]] *= 50
    return model, texts


@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.5, 1.0])
def test_the_divisor_is_equation_4_of_the_paper(exponent):
    model, texts = wide()
    x, weight = torch.cat(texts), model[0].weight.detach()
    got = divisor(weight, statistics_of(x).absmax, exponent)
    for j in range(64):
        wide_x = max(abs(float(v)) for v in x[:, j])
        wide_w = max(abs(float(v)) for v in weight[:, j])
        assert float(got[j]) == pytest.approx(wide_x**exponent / wide_w ** (1 - exponent), rel=1e-5)


def test_channels_without_inputs_or_weights_stay_finite():
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    weight[:, 2] = 0
    inputs = torch.tensor([1.0, 0.0, 3.0, 1e-30, 2.0, 1.0])
    for exponent in (0.0, 0.5, 1.0):
        got = divisor(weight, inputs, exponent)
        assert got.isfinite().all() and (got > 0).all()
    assert torch.equal(divisor(torch.zeros(8, 6), inputs, 0.5), torch.ones(6))
    assert torch.equal(divisor(weight, torch.zeros(6), 0.5), torch.ones(6))


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static", "w8a8-tensor", "w4a8-g64", "w4a16-g32", "w8a8-outliers8"])
@pytest.mark.parametrize("smooth", [0.5, "auto"])
def test_a_smoothed_layer_computes_the_same_function(scheme, smooth):
    model, texts = wide()
    exact = model(texts[0])
    qnb.quantize(model, scheme, smooth=smooth, calibration=texts)
    assert model[0].variant.how.smooth == smooth
    tolerance = 0.02 if "w8" in scheme else 0.2
    assert torch.linalg.norm(model(texts[0]) - exact) < tolerance * torch.linalg.norm(exact)


def test_auto_is_the_best_of_what_it_tries():
    model, texts = wide()
    x, layer = torch.cat(texts), model[0]

    def error(smooth) -> float:
        qnb.quantize(model, "w8a8", smooth=smooth, calibration=texts)
        return float((model[0].variant.linear(x, None) - x @ layer.weight.detach().T).square().sum())

    found = error("auto")
    note = model[0].variant.note
    assert note.startswith("smoothed by 0.")
    assert qnb.layers(model).rows[0].note == note and note in str(qnb.layers(model))
    others = {exponent: error(exponent) for exponent in (None, *smoothing.EXPONENTS)}
    assert found == min(others.values()) == others[float(note.rpartition(" ")[2])] < others[None] / 2


def test_auto_leaves_alone_what_smoothing_makes_worse():
    """With weights in full precision and exact activations every divisor costs rounding of the scales alone."""
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    spoilt = x @ weight.T + 1
    chosen, note = best_divisor(weight, statistics_of(x), lambda d: x @ weight.T if d is None else spoilt)
    assert chosen is None and note == "not smoothed: that was best"
    chosen, note = best_divisor(
        weight, statistics_of(x), lambda d: x @ weight.T if d is not None else spoilt * torch.nan
    )
    assert chosen is not None and note == f"smoothed by {smoothing.EXPONENTS[0]:g}"


@pytest.mark.parametrize("smooth", [-0.1, 1.5, float("nan"), float("inf"), True, "automatic", [0.5]])
def test_what_is_no_exponent_is_refused(smooth):
    model, texts = wide()
    with pytest.raises(BadInput, match="give an exponent from 0 to 1, such as 0.5, or 'auto'") as caught:
        qnb.quantize(model, "w8a8", smooth=smooth, calibration=texts)
    assert "\n" not in str(caught.value) and type(model[0]) is nn.Linear


@pytest.mark.parametrize("smooth", [0.5, "auto"])
def test_awq_beside_smoothing_is_refused(smooth):
    model, texts = wide()
    with pytest.raises(BadInput, match="awq', which scales the inputs itself: leave one of them out"):
        qnb.quantize(model, "w4a16-g64", rounding="awq", smooth=smooth, calibration=texts)


def test_smoothing_needs_texts():
    model, _ = wide()
    with pytest.raises(BadInput, match="smooth=0.5 needs calibration"):
        qnb.quantize(model, "w8a8", smooth=0.5)
