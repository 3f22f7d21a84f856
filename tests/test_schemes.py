"""One contract that every registered scheme keeps."""

import pytest
import torch
from torch import nn

import qnb
from qnb import rounding, schemes
from qnb.errors import UnknownScheme
from qnb.model.linear import original_pass
from qnb.schemes.plain import build

PACKED = [name for name in schemes.names() if schemes.find(name).grid is not None]


def test_the_registry_knows_what_the_readme_promises():
    assert {"none", "w8a8", "w8a16"} <= set(schemes.names())
    assert schemes.names()[0] == "none"
    assert "nearest" in rounding.names()


@pytest.mark.parametrize("name", schemes.names())
def test_a_name_prints_back_as_itself(name):
    assert str(schemes.find(name)) == name
    assert schemes.find(schemes.find(name)) is schemes.find(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 65), (40, 50), (96, 128)])
@pytest.mark.parametrize("name", PACKED)
def test_contract(name, n, k, bias, dtype):
    torch.manual_seed(n * k)
    model = nn.Sequential(nn.Linear(k, n, bias=bias)).to(dtype).eval()
    x = torch.randn(3, 5, k).to(dtype)
    y = model(x)
    original = model[0]
    report = qnb.quantize(model, name, calibration=[x.float().to(dtype)])
    layer = model[0]
    variant = layer.variant
    assert report.rows[0].scheme == variant.scheme.name == name
    assert report.rows[0].kernel == variant.kernel()
    assert variant.shape == (n, k)

    # Held tensors are integers, scales and tables, never a float copy of the weight.
    held = variant.tensors()
    floats = sum(t.numel() for key, t in held.items() if t.is_floating_point() and key != "weight_table")
    kept = held["outlier_weight"].numel() if "outlier_weight" in held else 0
    assert floats - kept <= n * -(-k // 32) * 2

    # live = saved = reloaded, the same bits
    again = build(variant.scheme, variant.how, variant.shape, {k: t.clone() for k, t in variant.plain().items()})
    assert all(torch.equal(t, again.tensors()[key]) for key, t in variant.tensors().items())

    # the forward is that of the dequantized weight, as far as rounding the activations allows
    got, weight = layer(x), variant.dequantize(torch.float32).double()
    assert got.shape == (3, 5, n)
    assert got.dtype == dtype
    with torch.no_grad():  # a bias that asks for a gradient takes a way of its own
        assert torch.equal(layer(x), got)
    exact = x.double() @ weight.T + (0 if not bias else original.bias.double())
    step = 0
    if "a8" in name:
        step = x.double().abs().amax(-1, keepdim=True) / 254
        if "static" in name:  # one step for all, at most that of the widest range, with its ends and a rounded zero
            step = torch.tensor(2 * variant.inputs.scale, dtype=torch.float64)
    magnitude = x.double().abs() @ weight.abs().T
    bound = step * weight.abs().sum(1) + (k + 3) * torch.finfo(torch.float32).eps * magnitude
    if "outliers" in name:  # two products, each rounded to the type before they are added
        bound = bound + torch.finfo(dtype).eps * (2 * magnitude + exact.abs())
    bound = bound + torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal
    assert ((got.double() - exact).abs() <= bound * 1.001).all()

    with original_pass():
        assert torch.equal(model(x), y)
    qnb.restore(model)
    assert model[0] is original


def test_a_scheme_of_ones_own_is_known_at_once():
    from qnb.schemes.grid import TableGrid
    from qnb.schemes.weight_only import ByCodes

    try:

        @schemes.register
        class Ternary(ByCodes):
            name = "ternary"
            grid = TableGrid(bits=2, group=32, table=(-1.0, 0.0, 1.0, 1.0))

        model = nn.Sequential(nn.Linear(64, 8))
        assert qnb.quantize(model, "ternary").rows[0].scheme == "ternary"
        weight = model[0].variant.dequantize(torch.float32)
        assert all(len(group.unique()) <= 3 for row in weight for group in row.split(32))
        assert "ternary" in schemes.names()
    finally:
        schemes._registry.pop("ternary", None)


@pytest.mark.parametrize(
    ("typed", "canonical"),
    [
        ("w4a16", "w4a16-g64"),
        ("w8a8-channel", "w8a8"),
        ("w8a16-g32", "w8a16-g32"),
        ("w3a16-asym", "w3a16-g64-asym"),
        ("w8a8-static-tensor-aasym", "w8a8-static-tensor-aasym"),
        ("w2a16-g128-asym-outliers16", "w2a16-g128-asym-outliers16"),
        ("nf4", "nf4-g64"),
        ("kmeans3-g128", "kmeans3-g128"),
    ],
)
def test_every_name_has_one_canonical_spelling(typed, canonical):
    scheme = schemes.find(typed)
    assert str(scheme) == canonical
    assert schemes.find(canonical) is scheme


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("w5a8", "no scheme is called"),
        ("w4a16-g48", "a group is 32, 64, 128 inputs, not 48"),
        ("w4a16-asym-g64", "twice or in the wrong place"),
        ("w4a16-g64-g64", "twice or in the wrong place"),
        ("w4a16-q", "-q is no option"),
        ("w4a16-", "- is no option"),
        ("w8a8 ", "no scheme is called"),
        ("w8a8-aasym", "-aasym needs -static"),
        ("w8a16-static", "a16 has none"),
        ("w8a8-g64", "w8a16-gN"),
        ("w8a8-static-outliers4", "drop one"),
        ("w4a8-g32", "-g64, -g128 or -channel"),
        ("nf4-g65", "after nf4 comes a group"),
        ("w4a16-outliers0", "is no option"),
    ],
)
def test_a_wrong_name_is_refused_in_one_line(typed, words):
    with pytest.raises(UnknownScheme) as caught:
        schemes.find(typed)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "how", [schemes.How(), schemes.How("gptq", "mse", 0.5, 3), schemes.How(smooth="auto"), schemes.How(smooth=0.25)]
)
def test_how_codes_are_chosen_prints_so_that_it_can_be_read(how):
    assert schemes.How.read(str(how)) == how
