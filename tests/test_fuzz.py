"""Inputs that nobody thought of: shapes, strides, types and extremes of every operator, and of a layer's whole life.

By default the same few hundred examples in each run, within a minute. New ones for an hour, each failure with the words
to repeat it:

    HYPOTHESIS_PROFILE=long python -m pytest -o faulthandler_timeout=0 tests/test_fuzz.py
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor, nn

import qnb
from qnb.errors import BadWeights
from qnb.model.linear import original_pass
from qnb.ops import reference

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import HealthCheck, given, settings  # noqa: E402 - behind the check that it is there
from hypothesis import strategies as st  # noqa: E402

ANY = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ci", max_examples=300, derandomize=True, database=None, **ANY)
settings.register_profile("long", max_examples=100_000, print_blob=True, **ANY)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Around the kernels' tiles: 16 and 32 outputs, 64 inputs, 16 and 64 rows.
SIZES = st.one_of(st.integers(1, 40), st.sampled_from([48, 63, 64, 65, 96, 127, 128, 129, 200, 257]))
FILLS = ("normal", "zeros", "largest", "smallest", "subnormal", "wide", "one", "alternating")


def fill(shape: tuple[int, ...], dtype: torch.dtype, kind: str, seed: int) -> Tensor:
    """Finite values of a kind that rounding finds hard."""
    g, info = torch.Generator().manual_seed(seed), torch.finfo(dtype)
    normal = torch.randn(shape, generator=g)
    if kind == "zeros":
        return torch.zeros(shape, dtype=dtype)
    if kind == "largest":
        return (normal.sign() * info.max).to(dtype)
    if kind == "smallest":
        return (normal.sign() * info.smallest_normal).to(dtype)
    if kind == "subnormal":
        return (normal.sign().double() * info.smallest_normal * info.eps).to(dtype)
    if kind == "wide":  # from subnormal to near the largest in one row
        exponents = torch.rand(shape, generator=g, dtype=torch.float64) * 2 - 1
        limit = torch.tensor(info.max, dtype=torch.float64).log2()
        return (normal.sign() * 2 ** (exponents * (limit - 1))).to(dtype)
    if kind == "one":
        flat = torch.zeros(shape).flatten()
        flat[int(torch.randint(max(1, flat.numel()), (), generator=g)) :][:1] = 3.7
        return flat.view(shape).to(dtype)
    if kind == "alternating":  # halves between two codes, where ties must go to the even one
        steps = torch.randint(-254, 255, shape, generator=g).float() / 2
        return steps.to(dtype)
    return normal.to(dtype)


def strided(t: Tensor, how: str) -> Tensor:
    """The same values in another layout: behind an offset, with gaps, or transposed."""
    if how == "gaps":
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), 7, dtype=t.dtype)
        wide[..., 1::2] = t
        return wide[..., 1::2]
    if how == "offset":
        long = torch.full((t.numel() + 3,), 7, dtype=t.dtype)
        long[3:] = t.flatten()
        return long[3:].view(t.shape)
    if how == "transposed" and t.dim() > 1:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    return t.contiguous()


LAYOUTS = st.sampled_from(["plain", "gaps", "offset", "transposed"])
SEEDS = st.integers(0, 2**32)


@st.composite
def floats(draw, rows=None, columns=None, special=True, dtype=None):
    """(..., columns) of any float type, one to three axes, in any layout; with NaN and infinity where `special`."""
    dtype = dtype or draw(st.sampled_from(DTYPES))
    columns = columns if columns is not None else draw(SIZES)
    lead = draw(st.sampled_from([(), (2,), (1, 3), (0,)])) if rows is None else ()
    shape = (*lead, rows if rows is not None else draw(st.integers(0, 70)), columns)
    t = fill(shape, dtype, draw(st.sampled_from(FILLS)), draw(SEEDS))
    if special and t.numel() and draw(st.booleans()):
        odd = draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
        t.view(-1)[draw(st.integers(0, t.numel() - 1))] = odd
    return strided(t, draw(LAYOUTS))


@st.composite
def integers(draw, rows, columns):
    """s8 (rows, columns) in any layout."""
    low, high = draw(st.sampled_from([(-128, 127), (-127, 127), (-128, -128), (127, 127), (0, 0), (-128, -127)]))
    g = torch.Generator().manual_seed(draw(SEEDS))
    return strided(torch.randint(low, high + 1, (rows, columns), generator=g).to(torch.int8), draw(LAYOUTS))


@st.composite
def layers(draw):
    """x, packed weight, its plain codes, scales and bias."""
    n, k = draw(SIZES), draw(SIZES)
    x = draw(floats(columns=k))
    codes = draw(integers(n, k))
    scale = fill((n,), torch.float32, draw(st.sampled_from(["normal", "zeros", "smallest", "wide"])), draw(SEEDS)).abs()
    bias = draw(st.sampled_from([None, "normal", "largest"]))
    bias = None if bias is None else fill((n,), draw(st.sampled_from([x.dtype, torch.float32])), bias, draw(SEEDS))
    return x, torch.ops.qnb.pack_w8(codes), codes, scale, bias, n


def assert_same(got: Tensor, want: Tensor):
    """Equal values of equal type; a NaN equals a NaN."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert ((got == want) | (got.isnan() & want.isnan())).all()


@given(floats())
def test_quantized_rows_are_the_references(x):
    codes, scales = torch.ops.qnb.quantize_rows(x)
    want_codes, want_scales = reference.quantize_rows(x)
    assert_same(codes, want_codes)
    assert_same(scales, want_scales)
    full = scales.isfinite() & (scales >= torch.finfo(torch.float32).smallest_normal)  # below, a scale loses digits
    assert (codes[full].abs().amax(-1) == 127).all()


@given(st.data(), SIZES, SIZES)
def test_packing_is_undone_exactly(data, n, k):
    codes = data.draw(integers(n, k))
    packed = torch.ops.qnb.pack_w8(codes)
    assert torch.equal(packed, reference.pack_w8(codes))
    assert torch.equal(torch.ops.qnb.unpack_w8(packed, n, k), codes)


@given(layers())
def test_w8a8_is_the_reference_to_the_bit(layer):
    x, packed, _, scale, bias, n = layer
    assert_same(torch.ops.qnb.linear_w8a8(x, packed, scale, bias, n), reference.linear_w8a8(x, packed, scale, bias, n))
    codes, rows = torch.ops.qnb.quantize_rows(x)
    for dtype in DTYPES:
        assert_same(
            torch.ops.qnb.gemm_w8a8(codes, rows, packed, scale, bias, n, dtype),
            reference.gemm_w8a8(codes, rows, packed, scale, bias, n, dtype),
        )


@given(layers())
def test_w8a16_lies_within_the_bound_of_f32_sums(layer):
    x, packed, codes, scale, bias, n = layer
    got = torch.ops.qnb.linear_w8a16(x, packed, scale, bias, n)
    assert (got.dtype, got.shape) == (x.dtype, (*x.shape[:-1], n))
    k = x.shape[-1]
    w, wide = codes.double(), x.double()
    exact = (wide @ w.T) * scale.double()
    sums = wide.abs() @ w.abs().T
    magnitude = sums * scale.double()
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    f32 = torch.finfo(torch.float32)
    bound = (k + 3) * f32.eps * magnitude + (k + 2) * f32.smallest_normal * (1 + scale.double())
    bound = bound + torch.finfo(x.dtype).eps * (exact.abs() + bound) + torch.finfo(x.dtype).smallest_normal
    # Where a sum may leave the range of f32 or the result that of its type, infinities (and their NaN) are right.
    sure = (sums < f32.max / 2) & (magnitude + bound < min(f32.max, torch.finfo(x.dtype).max) / 2)
    assert ((got.double() - exact).abs() <= bound)[sure].all()


@given(layers(), st.sampled_from([1, 7]))
def test_a_row_has_the_same_bits_in_any_batch(layer, part):
    x, packed, _, scale, bias, n = layer
    if not x.numel():
        return
    rows = x.reshape(-1, x.shape[-1])
    whole = torch.ops.qnb.linear_w8a8(rows, packed, scale, bias, n)
    assert_same(torch.ops.qnb.linear_w8a8(rows[:part], packed, scale, bias, n), whole[:part])


@given(st.data(), st.sampled_from(DTYPES), SIZES, SIZES, st.booleans())
def test_a_layer_from_its_quantizing_to_its_restoring(data, dtype, n, k, has_bias):
    model = nn.Sequential(nn.Linear(k, n, bias=has_bias, dtype=dtype))
    weight = nn.Parameter(data.draw(floats(rows=n, columns=k, dtype=dtype)))
    model[0].weight = weight
    original, bits = model[0], weight.detach().clone()
    if not weight.isfinite().all():
        with pytest.raises(BadWeights):
            qnb.quantize(model, "w8a8")
        assert model[0] is original
        return
    x = data.draw(floats(columns=k, dtype=dtype))
    with torch.no_grad():
        y = model(x)
        for scheme in data.draw(st.permutations(["w8a8", "w8a16", "w8a8"])):
            keep = data.draw(st.sampled_from(["memory", "memory", "disk"]))
            qnb.quantize(model, scheme, keep=keep, progress=False)
            layer = model[0]
            plain = {name: t.clone() for name, t in layer.variant.plain().items()}
            codes, scale = plain["weight_codes"], plain["weight_scale"].float()
            error = (codes.double() * scale.double() - bits.double()).abs()
            # Half a step, of the unrounded scale: rounding it to the weight's type may cut the row's largest values.
            assert (error <= scale.double() * (0.5 + 127 * torch.finfo(dtype).eps) + tiny(dtype)).all()
            answer = model(x)
            if scheme == "w8a8":
                args = x, torch.ops.qnb.pack_w8(codes), scale.squeeze(1), layer.bias, n
                assert_same(answer, reference.linear_w8a8(*args))
            assert torch.equal(layer.original.weight, bits)
            with original_pass():
                assert_same(model(x), y)
            state = model.state_dict()
            model.load_state_dict(state)
            assert_same(model(x), answer)
        qnb.restore(model)
        assert_same(model(x), y)
    assert model[0] is original
    assert model[0].weight is weight
    assert torch.equal(weight, bits)


def tiny(dtype: torch.dtype) -> float:
    """What a subnormal scale can be off, times the largest code."""
    return 127 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
