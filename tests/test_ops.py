"""`torch.ops.qnb.*`: torch's own checks of each operator, and the compiled kernels against plain torch."""

import pytest
import torch

from qnb import ops
from qnb.ops import reference

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1, 1), (3, 31, 63), (4, 33, 65), (2, 64, 128), (70, 40, 200)]


def case(m, n, k, dtype, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed + m * n * k)
    x = (torch.randn(m, k, generator=g) * 3).to(dtype)
    w = torch.randint(-128, 128, (n, k), generator=g, dtype=torch.int8)
    scale = torch.rand(n, generator=g) * 0.01
    return x, torch.ops.qnb.pack_w8(w), scale, torch.randn(n, generator=g).to(dtype) if bias else None, n


def codes_case(n, k, bits, group, seed=0):
    """Codes, packed, with scales, zero points, a table of values and a divisor."""
    g = torch.Generator().manual_seed(seed + n * k * bits)
    codes = torch.randint(0, 1 << bits, (n, k), generator=g, dtype=torch.uint8)
    groups = -(-k // group)
    scale, zero = torch.rand(n, groups, generator=g) * 0.01, torch.randn(n, groups, generator=g)
    table, divisor = torch.randn(1 << bits, generator=g), torch.rand(k, generator=g) + 0.5
    return codes, torch.ops.qnb.pack_codes(codes, bits), scale, zero, table, divisor


def static_shift(packed, n, k, zero):
    return (-zero * torch.ops.qnb.unpack_w8(packed, n, k).int().sum(1)).int()


def sample_inputs():
    x, packed, scale, bias, n = case(3, 33, 65, torch.float32)
    codes, rows = torch.ops.qnb.quantize_rows(x)
    divisor, shift = torch.rand(65) + 0.5, static_shift(packed, n, 65, 5)
    yield torch.ops.qnb.quantize_rows.default, (x, divisor)
    yield torch.ops.qnb.quantize_rows_static.default, (x.half()[None], 0.05, 5, divisor)
    yield torch.ops.qnb.gemm_w8a8.default, (codes, rows, packed, scale, bias, n, torch.float32, shift)
    yield torch.ops.qnb.linear_w8a8.default, (x, packed, scale, bias, n, divisor)
    yield torch.ops.qnb.linear_w8a16.default, (x, packed, scale, bias, n, divisor)
    yield torch.ops.qnb.linear_w8a8_static.default, (x[None], packed, scale, bias, n, 0.05, 5, shift, divisor)
    yield torch.ops.qnb.linear_w8a8_static.default, (x, packed, scale, None, n, 0.05, 0)
    weight, packed_codes, scales, zero, table, _ = codes_case(33, 65, 4, 64)
    yield torch.ops.qnb.pack_codes.default, (weight, 4)
    yield torch.ops.qnb.unpack_codes.default, (packed_codes, 33, 65, 4)
    yield torch.ops.qnb.linear_codes.default, (x, packed_codes, scales, zero, table, bias, n, 4, 64, divisor)
    yield torch.ops.qnb.linear_codes.default, (x.bfloat16()[None], packed_codes, scales, None, None, None, n, 4, 64)
    yield torch.ops.qnb.linear_codes_a8.default, (x[:, None], packed_codes, scales, bias, n, 4, 64, divisor)
    yield torch.ops.qnb.quantize_rows.default, (x,)
    yield torch.ops.qnb.quantize_rows.default, (x.bfloat16().unsqueeze(0),)
    yield torch.ops.qnb.pack_w8.default, (torch.randint(-128, 128, (33, 65), dtype=torch.int8),)
    yield torch.ops.qnb.unpack_w8.default, (packed, 33, 65)
    yield torch.ops.qnb.gemm_w8a8.default, (codes, rows, packed, scale, bias, n, torch.bfloat16)
    for op in (torch.ops.qnb.linear_w8a8.default, torch.ops.qnb.linear_w8a16.default):
        yield op, (x, packed, scale, bias, n)
        yield op, (x.half()[:, None], packed, scale, None, n)


@pytest.mark.parametrize(("op", "args"), list(sample_inputs()), ids=lambda v: getattr(v, "_opname", ""))
def test_opcheck(op, args):
    torch.library.opcheck(op, args)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_packing_is_a_bijection_and_the_same_everywhere(m, n, k):
    w = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    packed = torch.ops.qnb.pack_w8(w)
    assert packed.numel() == ops.packed_bytes(n, k)
    assert torch.equal(packed, reference.pack_w8(w))
    assert torch.equal(torch.ops.qnb.unpack_w8(packed, n, k), w)
    assert torch.equal(reference.unpack_w8(packed, n, k), w)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_codes_is_a_bijection_and_the_same_everywhere(bits):
    for n, k in [(1, 1), (31, 63), (33, 65), (64, 128), (100, 200), (0, 5), (5, 0)]:
        codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
        packed = torch.ops.qnb.pack_codes(codes, bits)
        assert packed.numel() == ops.packed_codes_bytes(n, k, bits)
        assert torch.equal(packed, reference.pack_codes(codes, bits))
        assert torch.equal(torch.ops.qnb.unpack_codes(packed, n, k, bits), codes)
        assert torch.equal(reference.unpack_codes(packed, n, k, bits), codes)


native = pytest.mark.skipif(bool(ops.native_missing), reason=f"the reference answers itself: {ops.native_missing}")


@native
@pytest.mark.parametrize("dtype", DTYPES)
def test_divided_and_static_rows_are_bit_equal_to_the_reference(dtype):
    for m, n, k in [*SHAPES, (2, 3, 0), (0, 4, 5)]:
        x, packed, scale, bias, n = case(m, n, k, dtype)
        divisor = torch.rand(k) + 0.5
        assert all(map(torch.equal, torch.ops.qnb.quantize_rows(x, divisor), reference.quantize_rows(x, divisor)))
        assert torch.equal(torch.ops.qnb.linear_w8a8(x, packed, scale, bias, n, divisor),
                           reference.linear_w8a8(x, packed, scale, bias, n, divisor))  # fmt: skip
        for zero, d in [(0, None), (-128, divisor), (127, None), (7, divisor)]:
            got = torch.ops.qnb.quantize_rows_static(x, 0.03, zero, d)
            assert all(map(torch.equal, got, reference.quantize_rows_static(x, 0.03, zero, d)))
            shift = static_shift(packed, n, k, zero)
            whole = torch.ops.qnb.linear_w8a8_static(x, packed, scale, bias, n, 0.03, zero, shift, d)
            assert torch.equal(whole, torch.ops.qnb.gemm_w8a8(*got, packed, scale, bias, n, dtype, shift))
            assert torch.equal(whole, reference.linear_w8a8_static(x, packed, scale, bias, n, 0.03, zero, shift, d))


def test_the_shift_takes_the_zero_point_away():
    x, packed, scale, _, n = case(5, 33, 65, torch.float32)
    for zero in (-50, 3):
        got = torch.ops.qnb.linear_w8a8_static(x, packed, scale, None, n, 0.2, zero, static_shift(packed, n, 65, zero))
        kept = torch.round(x / 0.2).clamp(-128 - zero, 127 - zero) * 0.2
        w = torch.ops.qnb.unpack_w8(packed, n, 65).float() * scale[:, None]
        torch.testing.assert_close(got, kept @ w.T, rtol=1e-4, atol=1e-3)


@native
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_group_products_are_bit_equal_to_the_reference(bits):
    for (m, n, k), dtype in zip([*SHAPES, (2, 3, 0)], [*DTYPES, *DTYPES], strict=True):
        x, _, _, bias, _ = case(m, n, k, dtype)
        for group in (64, 128, 1000):
            _, packed, scale, _, _, divisor = codes_case(n, k, bits, group)
            for b, d in [(bias, None), (None, divisor)]:
                got = torch.ops.qnb.linear_codes_a8(x, packed, scale, b, n, bits, group, d)
                assert torch.equal(got, reference.linear_codes_a8(x, packed, scale, b, n, bits, group, d))


@pytest.mark.parametrize("linear", [torch.ops.qnb.linear_codes, reference.linear_codes], ids=["op", "reference"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_products_of_codes_lie_within_the_bound_of_f32_sums(bits, linear):
    unit = torch.finfo(torch.float32).eps / 2
    for (m, n, k), dtype in zip([*SHAPES, (2, 3, 0)], [*DTYPES, *DTYPES], strict=True):
        x, _, _, bias, _ = case(m, n, k, dtype)
        for group, with_zero, with_table in [(32, True, False), (64, False, True), (1000, False, False)]:
            codes, packed, scale, zero, table, divisor = codes_case(n, k, bits, group)
            zero, table = zero if with_zero else None, table if with_table else None
            column = torch.arange(k) // group
            value = codes.float() - (1 << bits - 1) if table is None else table[codes.int()]
            w = (value if zero is None else value - zero[:, column]) * scale[:, column]
            got = linear(x, packed, scale, zero, table, bias, n, bits, group, divisor)
            assert got.dtype == dtype
            rows = (x.float() / divisor).double()
            exact = rows @ w.double().T + bias.double()
            magnitude = rows.abs() @ w.double().abs().T + bias.double().abs()
            bound = (k + 2) * unit / (1 - (k + 2) * unit) * magnitude
            bound = bound + torch.finfo(dtype).eps / 2 * (exact.abs() + bound) + torch.finfo(dtype).smallest_normal
            assert ((got.double() - exact).abs() <= bound).all()


def test_e4m3_weights_are_a_table():
    """Their 256 values, NaN apart, through the op that knows them by their table."""
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    weight = torch.randn(40, 100).to(torch.float8_e4m3fn)
    packed = torch.ops.qnb.pack_codes(weight.view(torch.uint8), 8)
    x, scale = torch.eye(100), torch.rand(40, 1)
    got = torch.ops.qnb.linear_codes(x, packed, scale, None, table, None, 40, 8, 100)
    assert torch.equal(got, (weight.float() * scale).T)


@native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_w8a8_is_bit_equal_to_the_reference(m, n, k, dtype):
    x, packed, scale, bias, n = case(m, n, k, dtype)
    codes, rows = torch.ops.qnb.quantize_rows(x)
    expected = reference.quantize_rows(x)
    assert torch.equal(codes, expected[0])
    assert torch.equal(rows, expected[1])
    for b in (bias, None):
        got = torch.ops.qnb.linear_w8a8(x, packed, scale, b, n)
        assert torch.equal(got, reference.linear_w8a8(x, packed, scale, b, n))
        assert torch.equal(got, torch.ops.qnb.gemm_w8a8(codes, rows, packed, scale, b, n, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_w8a16_lies_within_the_bound_of_f32_sums(m, n, k, dtype):
    x, packed, scale, bias, n = case(m, n, k, dtype)
    got = torch.ops.qnb.linear_w8a16(x, packed, scale, bias, n).double()
    w = torch.ops.qnb.unpack_w8(packed, n, k).double() * scale.double().unsqueeze(1)
    exact = x.double() @ w.T + bias.double()
    magnitude = x.double().abs() @ w.abs().T + bias.double().abs()
    unit = torch.finfo(torch.float32).eps / 2
    bound = (k + 2) * unit / (1 - (k + 2) * unit) * magnitude
    bound = bound + torch.finfo(dtype).eps / 2 * (exact.abs() + bound) + torch.finfo(dtype).smallest_normal
    assert ((got - exact).abs() <= bound).all()


@pytest.mark.parametrize("op", [torch.ops.qnb.linear_w8a8, torch.ops.qnb.linear_w8a16])
def test_a_row_has_the_same_bits_in_every_batch_and_with_every_number_of_threads(op):
    x, packed, scale, bias, n = case(67, 100, 300, torch.float32)
    whole = op(x, packed, scale, bias, n)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(op(x, packed, scale, bias, n), whole)
    finally:
        torch.set_num_threads(threads)
    if op is torch.ops.qnb.linear_w8a8:
        for m in (1, 2, 5, 33):
            assert torch.equal(op(x[:m], packed, scale, bias, n), whole[:m])


@pytest.mark.parametrize("op", [torch.ops.qnb.linear_w8a8, torch.ops.qnb.linear_w8a16])
def test_no_rows_no_inputs_and_every_stride(op):
    x, packed, scale, bias, n = case(6, 20, 64, torch.float32)
    assert op(x[:0], packed, scale, bias, n).shape == (0, 20)
    assert torch.equal(op(x.view(2, 3, 64), packed, scale, bias, n).view(6, 20), op(x, packed, scale, bias, n))
    wide = torch.randn(6, 128)
    assert torch.equal(op(wide[:, ::2], packed, scale, bias, n), op(wide[:, ::2].contiguous(), packed, scale, bias, n))
    row = x[:1].expand(4, 64)
    assert torch.equal(op(row, packed, scale, bias, n), op(row.contiguous(), packed, scale, bias, n))
    empty = torch.ops.qnb.pack_w8(torch.empty(20, 0, dtype=torch.int8))
    assert torch.equal(op(torch.empty(2, 0), empty, scale, bias, 20), bias.expand(2, 20))


@pytest.mark.parametrize("bad", ["k", "scale", "dtype"])
def test_arguments_that_do_not_fit_raise(bad):
    x, packed, scale, bias, n = case(3, 33, 65, torch.float32)
    args = {
        "k": (x[:, :1].repeat(1, 129), packed, scale, bias, n),
        "scale": (x, packed, scale[:-1], bias, n),
        "dtype": (x.to(torch.int32), packed, scale, bias, n),
    }[bad]
    with pytest.raises(RuntimeError):
        torch.ops.qnb.linear_w8a8(*args)


@pytest.mark.parametrize("answer", [torch.ops.qnb, reference], ids=["op", "reference"])
def test_new_arguments_that_do_not_fit_raise(answer):
    x, packed, scale, bias, n = case(3, 33, 65, torch.float32)
    d, shift = torch.ones(65), torch.zeros(n, dtype=torch.int32)
    codes, packed4, scale4, zero, table, _ = codes_case(n, 65, 4, 64)
    long = torch.zeros(1, reference.MAX_K_SHIFTED + 1)
    long_packed = torch.ops.qnb.pack_w8(torch.zeros(1, long.shape[1], dtype=torch.int8))
    calls = [
        (answer.quantize_rows, (x, d[:-1])),
        (answer.quantize_rows, (x, d.double())),
        (answer.quantize_rows_static, (x, 0.0, 0)),
        (answer.quantize_rows_static, (x, float("inf"), 0)),
        (answer.quantize_rows_static, (x, 1e-60, 0)),
        (answer.quantize_rows_static, (x, 1.0, 128)),
        (answer.linear_w8a8, (x, packed, scale, bias, n, d[:-1])),
        (answer.linear_w8a16, (x, packed, scale, bias, n, d[:-1])),
        (answer.linear_w8a8_static, (x, packed, scale, bias, n, 1.0, 0, shift[:-1])),
        (answer.linear_w8a8_static, (x, packed, scale, bias, n, 1.0, 0, shift.float())),
        (answer.linear_w8a8_static, (long, long_packed, scale[:1], None, 1, 1.0, 0, shift[:1])),
        (answer.pack_codes, (codes, 5)),
        (answer.pack_codes, (codes, 3)),
        (answer.pack_codes, (codes.int(), 4)),
        (answer.unpack_codes, (packed4, n, 65, 2)),
        (answer.linear_codes, (x, packed4, scale4, None, None, bias, n, 4, 33)),
        (answer.linear_codes, (x, packed4, scale4, None, None, bias, n, 4, 0)),
        (answer.linear_codes, (x, packed4, scale4, None, None, bias, n, 2, 64)),
        (answer.linear_codes, (x, packed4, scale4[:, :1], None, None, bias, n, 4, 64)),
        (answer.linear_codes, (x, packed4, scale4.T.contiguous(), None, None, bias, n, 4, 64)),
        (answer.linear_codes, (x, packed4, scale4, zero[:-1], None, bias, n, 4, 64)),
        (answer.linear_codes, (x, packed4, scale4, None, table[:-1], bias, n, 4, 64)),
        (answer.linear_codes, (x, packed4, scale4, None, None, bias, n, 4, 64, d[:-1])),
        (answer.linear_codes_a8, (x, packed4, scale4, bias, n, 4, 32)),
        (answer.linear_codes_a8, (x, packed4, scale4[:-1], bias, n, 4, 64)),
    ]
    for op, args in calls:
        with pytest.raises(RuntimeError):
            op(*args)


def test_kernel_names_say_what_answers():
    names = ("quantize_rows", "quantize_rows_static", "linear_w8a8", "linear_w8a8_static", "linear_w8a16",
             "linear_codes", "linear_codes_a8", "pack_codes", "unpack_codes")  # fmt: skip
    for op in names:
        name = ops.kernel_for(op)
        assert name == "reference" if ops.native_missing else name != "reference"
    assert ops.kernel_for("linear_w8a8", "cuda") == "reference"
