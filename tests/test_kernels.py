"""The compiled kernels through their C ABI: every op by every instruction set that this processor can run.

Needs numpy and the library alone: no torch, nothing of qnb. The library is QNB_CPU_LIBRARY, else the
installed package's.
Integers are held to equality with int64 arithmetic; floats to the bits of a numpy transcription of the rules in
csrc/include/qnb.h, and the products in f32, whose order of sums is the kernel's, to their derived bound.
"""

import ctypes
import itertools
import mmap
import os
import sys
import threading
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_size_t, c_void_p

import numpy as np
import pytest
from kernels_library import kernels_library

LIBRARY = kernels_library()
if not LIBRARY.exists():
    pytest.skip(f"no compiled library at {LIBRARY}: install with QNB_NATIVE=ON", allow_module_level=True)

LIB = ctypes.CDLL(str(LIBRARY))
F32, BF16, F16 = 0, 1, 2
DTYPES = {"f32": F32, "bf16": BF16, "f16": F16}
MAX_K, MAX_K_SHIFTED = 131_071, 65_535
ERROR_SIZE, ERROR_K, ERROR_DTYPE, ERROR_NULL, ERROR_WORKSPACE, ERROR_ISA = -1, -2, -3, -4, -5, -6
ERROR_BITS, ERROR_GROUP, ERROR_CODE, ERROR_GRID = -7, -8, -9, -10
SEED = 20
UNIT = 2.0**-24  # half the distance from 1 to the next f32

TASK = CFUNCTYPE(None, c_void_p, c_int64)
RUN = CFUNCTYPE(None, c_void_p, c_int64, TASK, c_void_p)


class Parallel(Structure):
    _fields_ = [("run", RUN), ("context", c_void_p), ("threads", c_int32)]


SIZES = [c_int64, c_int64, c_int64]
ROWS = [c_void_p, c_int32, c_void_p]  # x, its type, divisor
GRID = [c_float, c_int32]  # scale, zero point
CODES = [c_void_p, c_int32, c_int64, c_void_p]  # packed, bits, group, scale
EPILOGUE = [c_void_p, c_int32, *SIZES, c_void_p, c_int32, c_void_p, c_int64, POINTER(Parallel)]
for name, result, arguments in [
    ("isa_count", c_int32, []),
    ("isa_name", c_char_p, [c_int32]),
    ("isa_state", c_int32, [c_int32]),
    ("isa_error", c_char_p, []),
    ("limit_isa", c_int32, [c_char_p]),
    ("kernel_for", c_char_p, [c_char_p]),
    ("kernel_for_rows", c_char_p, [c_char_p, c_int64]),
    ("error_text", c_char_p, [c_int32]),
    ("packed_w8_bytes", c_int64, [c_int64, c_int64]),
    ("pack_w8", c_int32, [c_void_p, c_int64, c_int64, c_void_p, POINTER(Parallel)]),
    ("unpack_w8", c_int32, [c_void_p, c_int64, c_int64, c_void_p, POINTER(Parallel)]),
    ("packed_codes_bytes", c_int64, [c_int64, c_int64, c_int32]),
    ("pack_codes", c_int32, [c_void_p, c_int64, c_int64, c_int32, c_void_p, POINTER(Parallel)]),
    ("unpack_codes", c_int32, [c_void_p, c_int64, c_int64, c_int32, c_void_p, POINTER(Parallel)]),
    ("quantize_rows", c_int32, [*ROWS, c_int64, c_int64, c_void_p, c_void_p, POINTER(Parallel)]),
    ("quantize_rows_static", c_int32, [*ROWS, *GRID, c_int64, c_int64, c_void_p, c_void_p, POINTER(Parallel)]),
    ("gemm_w8a8", c_int32, [c_void_p] * 5 + EPILOGUE),
    ("linear_w8a8", c_int32, [*ROWS, c_void_p, c_void_p, *EPILOGUE]),
    ("linear_w8a8_static", c_int32, [*ROWS, *GRID, c_void_p, c_void_p, c_void_p, *EPILOGUE]),
    ("linear_w8a16", c_int32, [*ROWS, c_void_p, c_void_p, *EPILOGUE]),
    ("linear_codes", c_int32, [*ROWS, *CODES, c_void_p, c_void_p, *EPILOGUE]),
    ("linear_codes_a8", c_int32, [*ROWS, *CODES, *EPILOGUE]),
    *(
        (f"{op}_workspace_bytes", c_int64, [*SIZES, c_int32])
        for op in ("gemm_w8a8", "linear_w8a8", "linear_w8a8_static", "linear_w8a16", "linear_codes", "linear_codes_a8")
    ),
]:
    function = getattr(LIB, f"qnb_{name}")
    function.restype, function.argtypes = result, arguments

ISAS = [LIB.qnb_isa_name(i).decode() for i in range(LIB.qnb_isa_count())]
STATES = {0: "this build holds no kernel for it", 1: "this processor cannot run it"}


@pytest.fixture(params=ISAS)
def isa(request):
    """Only kernels of this instruction set, and of those after it where it has none."""
    state = LIB.qnb_isa_state(ISAS.index(request.param))
    if state != 2:
        pytest.skip(f"{request.param}: {STATES[state]}")
    assert LIB.qnb_limit_isa(request.param.encode()) == 0
    yield request.param
    assert LIB.qnb_limit_isa(None) == 0


def rng(*salt):
    return np.random.default_rng([SEED, *salt])


# ---- Floats by their bits ------------------------------------------------------------------------------------------


def to_bf16(v):
    bits = np.ascontiguousarray(v, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, np.uint16(0x7FC0), rounded)


def to_f16(v):
    with np.errstate(over="ignore"):
        return np.where(np.isnan(v), np.uint16(0x7E00), np.asarray(v, np.float32).astype(np.float16).view(np.uint16))


def encode(v, dtype):
    """f32 values as the stored elements of `dtype`."""
    v = np.ascontiguousarray(v, np.float32)
    return v if dtype == F32 else to_bf16(v) if dtype == BF16 else to_f16(v)


def decode(stored, dtype):
    """Stored elements as f32, exactly."""
    if dtype == F32:
        return stored
    if dtype == BF16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.view(np.float16).astype(np.float32)


def same_bits(a, b, dtype):
    """Equal bits; which NaN an f32 NaN is, is nobody's promise."""
    if dtype != F32:
        return np.array_equal(a, b)
    return np.array_equal(np.isnan(a), np.isnan(b)) and np.array_equal(
        a[~np.isnan(a)].view(np.uint32), b[~np.isnan(b)].view(np.uint32)
    )


# ---- Transcriptions of the rules -----------------------------------------------------------------------------------


def expected_rows(x):
    """(codes, scales) of f32 rows, as qnb_quantize_rows says."""
    with np.errstate(all="ignore"):
        absmax = np.abs(x).max(-1) if x.shape[-1] else np.zeros(x.shape[0], np.float32)
        scale = np.where(np.isfinite(absmax), absmax / np.float32(127), np.float32(np.nan))
        usable = (scale > 0)[:, None]
        codes = np.clip(np.rint(x / scale[:, None]), -127, 127)
        return np.where(usable, codes, 0).astype(np.int8), scale


def expected_static_rows(x, scale, zero):
    """(codes, scales) of f32 rows, as qnb_quantize_rows_static says."""
    with np.errstate(all="ignore"):
        finite = np.isfinite(x).all(-1)
        codes = np.clip(np.rint(x / np.float32(scale)) + zero, -128, 127)
    return np.where(finite[:, None], codes, 0).astype(np.int8), np.where(finite, np.float32(scale), np.float32(np.nan))


def expected_product(codes, row_scale, w, weight_scale, bias, dtype, shift=0):
    acc = codes.astype(np.int64) @ w.T.astype(np.int64) + shift
    assert np.abs(acc).max(initial=0) < 2**31
    with np.errstate(all="ignore"):
        v = acc.astype(np.int32).astype(np.float32) * row_scale[:, None] * weight_scale
        return encode(v if bias is None else v + bias, dtype)


def expected_weights(codes, bits, group, scale, zero=None, table=None):
    """The f32 weights that packed codes stand for, as qnb_linear_codes says."""
    column = np.arange(codes.shape[1]) // group
    value = codes.astype(np.float32) - np.float32(2 ** (bits - 1)) if table is None else table[codes]
    with np.errstate(all="ignore"):
        value = value if zero is None else value - zero[:, column]
        return (value * scale[:, column]).astype(np.float32)


def expected_group_product(codes, row_scale, weight_codes, bits, group, scale, bias, dtype):
    """As qnb_linear_codes_a8 says, rows quantized already."""
    w = weight_codes.astype(np.int64) - 2 ** (bits - 1)
    total = None
    with np.errstate(all="ignore"):
        for g, first in enumerate(range(0, codes.shape[1], group)):
            acc = codes[:, first : first + group].astype(np.int64) @ w[:, first : first + group].T
            assert np.abs(acc).max(initial=0) < 2**31
            part = acc.astype(np.int32).astype(np.float32) * scale[:, g]
            total = part if total is None else total + part
        total = np.zeros((codes.shape[0], w.shape[0]), np.float32) if total is None else total
        v = total * row_scale[:, None]
        return encode(v if bias is None else v + bias, dtype)


def bound_of_f32_sums(x, w, k):
    """(exact products, how far a sum of k f32 products may be from them), in float64."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    gamma = (k + 2) * UNIT / (1 - (k + 2) * UNIT)
    return x @ w.T, gamma * (np.abs(x) @ np.abs(w.T))


def after_bias_and_cast(exact, error, bias, dtype):
    """One rounding of the bias's sum, one of the cast."""
    exact = exact + bias
    error = error + UNIT * (np.abs(exact) + error)
    cast_unit, cast_tiny = {F32: (0.0, 0.0), BF16: (2.0**-8, 0.0), F16: (2.0**-11, 2.0**-25)}[dtype]
    return exact, error + cast_unit * (np.abs(exact) + error) + cast_tiny


# ---- Calls: outputs lie between canaries, inputs end where readable memory ends -------------------------------------

CANARY = 0xA5


def at_the_edge(array):
    """A copy whose last byte is the last before a page that may not be read; a plain copy where that is unknown."""
    array = np.ascontiguousarray(array)
    if not sys.platform.startswith("linux") or array.nbytes == 0:
        return array.copy()
    size = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    raw = np.frombuffer(memory, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(c_void_p(raw.ctypes.data + size), c_size_t(mmap.PAGESIZE), 0) == 0
    edge = raw[size - array.nbytes : size].view(array.dtype).reshape(array.shape)
    edge[...] = array
    return edge


class Guarded:
    """An output array with 256 bytes before and behind it that must not change."""

    def __init__(self, shape, dtype):
        self.raw = np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize + 512, CANARY, np.uint8)
        self.array = self.raw[256:-256].view(dtype).reshape(shape)

    def checked(self):
        assert (self.raw[:256] == CANARY).all() and (self.raw[-256:] == CANARY).all(), "written outside the output"
        return self.array


def pointer(array):
    return None if array is None else array.ctypes.data


def threads(count):
    """A parallel-for of real threads, each task on its own, the last task first."""
    errors = []

    def run(_context, tasks, task, argument):
        if tasks > count:
            errors.append(f"{tasks} tasks for {count} threads")
        pool = [threading.Thread(target=task, args=(argument, t)) for t in reversed(range(tasks))]
        for thread in pool:
            thread.start()
        for thread in pool:
            thread.join()

    parallel = Parallel(RUN(run), None, count)
    parallel.errors = errors
    return parallel


def pack(w):
    n, k = w.shape
    w = at_the_edge(w)
    packed = Guarded(LIB.qnb_packed_w8_bytes(n, k), np.int8)
    assert LIB.qnb_pack_w8(pointer(w), n, k, pointer(packed.array), None) == 0
    return packed.checked()


def pack_codes(codes, bits):
    n, k = codes.shape
    codes = at_the_edge(codes)
    packed = Guarded(LIB.qnb_packed_codes_bytes(n, k, bits), np.uint8)
    assert LIB.qnb_pack_codes(pointer(codes), n, k, bits, pointer(packed.array), None) == 0
    return packed.checked()


def quantize_rows(x, dtype, parallel=None, divisor=None, grid=None):
    """By the rows' own scales, or by a grid: (scale, zero point)."""
    m, k = x.shape
    x, divisor = at_the_edge(x), None if divisor is None else at_the_edge(divisor)
    codes, scales = Guarded((m, k), np.int8), Guarded((m,), np.float32)
    function = LIB.qnb_quantize_rows if grid is None else LIB.qnb_quantize_rows_static
    code = function(pointer(x), dtype, pointer(divisor), *(grid or ()), m, k, pointer(codes.array),
                    pointer(scales.array), parallel)  # fmt: skip
    assert code == 0, LIB.qnb_error_text(code)
    return codes.checked(), scales.checked()


def product(op, inputs, bias, bias_dtype, sizes, out_dtype, parallel=None):
    """Calls an op of the family with a workspace of exactly the size that it asks for. `inputs`: up to the bias."""
    m, n, _ = sizes
    inputs = [at_the_edge(given) if isinstance(given, np.ndarray) else given for given in [*inputs, bias]]
    count = 1 if parallel is None else parallel.threads
    bytes_needed = getattr(LIB, f"qnb_{op}_workspace_bytes")(*sizes, count)
    assert bytes_needed >= 0
    # A workspace ends at the edge too: so is a kernel caught that reads behind the last row of codes.
    workspace = at_the_edge(np.full(max(bytes_needed, 1) + 256, CANARY, np.uint8))
    out = Guarded((m, n), np.float32 if out_dtype == F32 else np.uint16)
    code = getattr(LIB, f"qnb_{op}")(
        *(pointer(given) if isinstance(given, np.ndarray) else given for given in inputs), bias_dtype, *sizes,
        pointer(out.array), out_dtype, pointer(workspace[256:]), bytes_needed, parallel,
    )  # fmt: skip
    assert code == 0, LIB.qnb_error_text(code)
    assert (workspace[:256] == CANARY).all(), "written before the workspace"
    return out.checked()


def gemm_w8a8(codes, scales, w, weight_scale, bias=None, bias_dtype=F32, dtype=F32, parallel=None, packed=None,
              shift=None):  # fmt: skip
    packed = pack(w) if packed is None else packed
    inputs = [codes, scales, packed, weight_scale, shift]
    return product("gemm_w8a8", inputs, bias, bias_dtype, (codes.shape[0], *w.shape), dtype, parallel)


def linear(op, x, dtype, w, weight_scale, bias=None, bias_dtype=F32, parallel=None, packed=None, divisor=None):
    """The ops with 8-bit weights; the static one with a grid and a shift that take its every part."""
    packed = pack(w) if packed is None else packed
    inputs = [x, dtype, divisor, packed, weight_scale]
    if op == "linear_w8a8_static":
        inputs = [x, dtype, divisor, *STATIC_GRID, packed, weight_scale, static_shift(w)]
    return product(op, inputs, bias, bias_dtype, (x.shape[0], *w.shape), dtype, parallel)


STATIC_GRID = (0.0625, -9)


def static_shift(w, zero=STATIC_GRID[1]):
    return (-zero * w.astype(np.int64).sum(1)).astype(np.int32)


class Codes:
    """Random codes in a format, their scales, and the call of the op that multiplies them."""

    def __init__(self, n, k, bits, group, *, table=None, zero=False, op="linear_codes"):
        g = rng(n, k, bits, group)
        groups = -(-k // group)
        self.op, self.bits, self.group, self.table = op, bits, group, table
        self.codes = g.integers(0, 2**bits, (n, k), np.uint8)
        self.scale = (g.random((n, groups), np.float32) - 0.3) / 10
        self.zero = g.standard_normal((n, groups), np.float32) if zero else None
        self.packed = None

    def weights(self):
        return expected_weights(self.codes, self.bits, self.group, self.scale, self.zero, self.table)

    def linear(self, x, dtype=F32, bias=None, divisor=None, parallel=None):
        if self.packed is None:
            self.packed = pack_codes(self.codes, self.bits)
        inputs = [x, dtype, divisor, self.packed, self.bits, self.group, self.scale]
        if self.op == "linear_codes":
            inputs += [self.zero, self.table]
        return product(self.op, inputs, bias, F32, (x.shape[0], *self.codes.shape), dtype, parallel)


def e4m3_table():
    """The values of the 256 codes of e4m3: exponents of 4 bits, bias 7; mantissas of 3; no infinity; one NaN a sign."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    value[127] = np.nan
    return np.concatenate([value, -value]).astype(np.float32)


def random_table(bits):
    return rng(bits).standard_normal(2**bits, np.float32)


# Each way in which kernels turn codes into weights: bits, table, whether there are zero points.
FORMATS = {
    "w4": (4, None, False),
    "w4-asym": (4, None, True),
    "w4-table": (4, random_table(4), False),
    "w3": (3, None, False),
    "w3-table-asym": (3, random_table(3), True),
    "w2": (2, None, False),
    "w2-asym": (2, None, True),
    "w8": (8, None, False),
    "w8-asym": (8, None, True),
    "w8-table": (8, random_table(8), False),
    "e4m3": (8, e4m3_table(), False),
}


def of_format(name, n, k, group):
    bits, table, zero = FORMATS[name]
    case = Codes(n, k, bits, group, table=table, zero=zero)
    if name == "e4m3":
        case.codes[(case.codes & 127) == 127] = 1  # NaN has a test of its own
    return case


# ---- Cases ---------------------------------------------------------------------------------------------------------

SHAPES = [  # M, N, K
    (1, 1, 1), (2, 3, 5), (3, 2, 63), (1, 32, 64), (15, 31, 65), (16, 33, 64), (17, 16, 100), (31, 64, 129),
    (32, 32, 64), (33, 65, 31), (12, 96, 257), (13, 40, 192), (9, 100, 640), (48, 17, 33), (63, 15, 17), (64, 64, 1),
    (65, 63, 15), (100, 129, 99), (129, 100, 2), (257, 33, 130), (8, 300, 1100), (40, 280, 1030), (5, 7, 16), (7, 1, 3),
]  # fmt: skip
EMPTY = [(0, 3, 5), (3, 0, 5), (3, 5, 0), (0, 0, 0), (40, 33, 0), (1, 0, 0)]


def random_case(m, n, k):
    g = rng(m, n, k)
    w = g.integers(-128, 128, (n, k), np.int8)
    return g, g.standard_normal((m, k), np.float32) * 3, w, (g.random(n, np.float32) - 0.3) / 100


@pytest.mark.parametrize(("m", "n", "k"), SHAPES + EMPTY)
def test_packing_is_a_bijection_in_the_documented_layout(m, n, k):
    w = rng(n, k).integers(-128, 128, (n, k), np.int8)
    packed = pack(w)
    padded = np.zeros((-(-n // 32) * 32, -(-k // 64) * 64), np.int8)
    padded[:n, :k] = w
    blocks = padded.reshape(padded.shape[0] // 32, 2, 16, padded.shape[1] // 64, 16, 4).transpose(0, 3, 1, 4, 2, 5)
    assert np.array_equal(packed, blocks.ravel())
    back = Guarded((n, k), np.int8)
    assert LIB.qnb_unpack_w8(pointer(packed), n, k, pointer(back.array), threads(3)) == 0
    assert np.array_equal(back.checked(), w)


def code_places(n, k, bits):
    """For each code of an (n, k) weight: its bytes in the packed array and the bit where it begins in them."""
    row, column = np.meshgrid(np.arange(n), np.arange(k), indexing="ij")
    block = (row // 32 * -(-k // 64) + column // 64) * 256 * bits
    half, r = row // 16 % 2, 4 * (row % 16) + column % 4
    p = 1024 * half + 64 * (column // 4 % 16) + r
    if bits == 3:
        first = block + 192 * (column // 16 % 4) + r
        return first[..., None] + [0, 64, 128], 3 * (4 * half + column // 4 % 4)
    step = 256 * bits
    return (block + p % step)[..., None], p // step * bits


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 5), (33, 65), (31, 64), (64, 130), (70, 200), (0, 5), (5, 0), (0, 0)])
def test_packing_codes_is_a_bijection_in_the_documented_layout(bits, n, k):
    codes = rng(n, k, bits).integers(0, 2**bits, (n, k), np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.size == -(-n // 32) * 32 * -(-k // 64) * 64 * bits // 8
    wanted = np.zeros(packed.size, np.uint8)
    places, first_bit = code_places(n, k, bits)
    for byte in range(places.shape[-1]):
        shifted = codes.astype(np.int64) << first_bit >> 8 * byte & 255
        np.bitwise_or.at(wanted, places[..., byte], shifted.astype(np.uint8))
    assert np.array_equal(packed, wanted)
    back = Guarded((n, k), np.uint8)
    packed = at_the_edge(packed)
    assert LIB.qnb_unpack_codes(pointer(packed), n, k, bits, pointer(back.array), threads(3)) == 0
    assert np.array_equal(back.checked(), codes)


def test_codes_that_do_not_fit_are_refused():
    for bits in (2, 3, 4):
        codes, packed = np.zeros((5, 7), np.uint8), Guarded(LIB.qnb_packed_codes_bytes(5, 7, bits), np.uint8)
        codes[4, 6] = 2**bits
        assert LIB.qnb_pack_codes(pointer(codes), 5, 7, bits, pointer(packed.array), None) == ERROR_CODE
        assert (packed.checked() == CANARY).all()
    for bits in (-1, 0, 1, 5, 7, 16):
        assert LIB.qnb_packed_codes_bytes(5, 7, bits) == ERROR_BITS
        assert LIB.qnb_pack_codes(pointer(codes), 5, 7, bits, pointer(packed.array), None) == ERROR_BITS
        assert LIB.qnb_unpack_codes(pointer(packed.array), 5, 7, bits, pointer(codes), None) == ERROR_BITS
    assert LIB.qnb_packed_codes_bytes(-1, 7, 4) == ERROR_SIZE


def hard_rows():
    """Rows on which a careless row quantization goes wrong, by name; each padded with zeros to one length."""
    tiny, huge = np.float32(1e-45), np.finfo(np.float32).max
    rows = {
        "zeros": [0.0, -0.0],
        "ties": np.arange(-127, 128) / 2,  # with 127 below: scale 1, every second quotient a half
        "ties of another scale": np.arange(-127, 128) * np.float32(0.375),
        "denormals": [tiny, -3 * tiny, 200 * tiny],
        "scale underflows": [tiny, -tiny],
        "scale is the least denormal": [127 * tiny, 190 * tiny, -190 * tiny],
        "smallest normal": [np.finfo(np.float32).tiny, -1e-39],
        "huge": [huge, -huge, huge / 2, huge / 254],
        "huge and tiny": [huge, tiny, 1.0],
        "one element": [-5.0],
        "nan": [1.0, np.nan, 2.0],
        "infinity": [1.0, np.inf],
        "minus infinity": [-np.inf, 3.0],
        "nan and infinity": [np.nan, np.inf],
        "nan last": [1.0] * 254 + [np.nan],
        "all minimum": [-1.0] * 255,
        "all maximum": [1.0] * 255,
    }
    x = np.zeros((len(rows), 255), np.float32)
    for i, row in enumerate(rows.values()):
        x[i, : len(row)] = row
    x[1, 0] = x[2, 0] = 0
    x[1, 1], x[2, 1] = 127, 127 * np.float32(0.75)
    return x


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_quantize_rows_bit_for_bit(isa, dtype):
    cases = [hard_rows()]
    for m, k in [(1, 1), (3, 15), (2, 16), (5, 17), (4, 63), (3, 64), (2, 65), (7, 130), (40, 1000), (3, 0), (0, 5)]:
        x = rng(m, k).standard_normal((m, k), np.float32)
        cases += [x, x * np.exp2(rng(k).integers(-40, 40, (m, 1))).astype(np.float32), np.round(x * 4) / 4]
    for case in cases:
        x = encode(case, dtype)
        codes, scales = quantize_rows(x, dtype)
        wanted_codes, wanted_scales = expected_rows(decode(x, dtype))
        assert np.array_equal(codes, wanted_codes)
        assert same_bits(scales, wanted_scales.astype(np.float32), F32)


def row_cases(*salt):
    """Rows of several lengths, the hard ones among them, each with a divisor for their columns."""
    g = rng(*salt)
    yield hard_rows(), (g.random(255, np.float32) + 0.5)
    for m, k in [(1, 1), (3, 15), (2, 17), (4, 63), (3, 64), (2, 65), (7, 130), (3, 0), (0, 5)]:
        divisor = np.exp2(g.integers(-20, 20, k)).astype(np.float32) * (g.random(k, np.float32) + 0.5)
        yield (g.standard_normal((m, k)) * divisor).astype(np.float32), divisor
    # Quotients that no finite divisor gives: they spoil their row alone.
    yield np.float32([[1, 2, 3], [0, 1, 2], [-1, 0, 1]]), np.float32([0, 1, 2])
    yield np.float32([[1, 2], [np.inf, 1], [np.finfo(np.float32).max, 0]]), np.float32([1e-10, np.inf])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rows_are_divided_first(isa, dtype):
    for case, divisor in row_cases(4):
        x = encode(case, dtype)
        with np.errstate(all="ignore"):
            divided = decode(x, dtype) / divisor
        codes, scales = quantize_rows(x, dtype, divisor=divisor)
        wanted_codes, wanted_scales = expected_rows(divided)
        assert np.array_equal(codes, wanted_codes)
        assert same_bits(scales, wanted_scales.astype(np.float32), F32)


@pytest.mark.parametrize("zero", [-128, -9, 0, 127])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_quantize_rows_static_bit_for_bit(isa, dtype, zero):
    ties = np.arange(-600, 601, dtype=np.float32)[None] / 2
    for case, divisor in [(ties, None), (hard_rows(), None), *row_cases(5)]:
        for scale in (1.0, 0.75, 1e-3, 1e-40, 3e38):
            x = encode(case, dtype)
            with np.errstate(all="ignore"):
                divided = decode(x, dtype) if divisor is None else decode(x, dtype) / divisor
            codes, scales = quantize_rows(x, dtype, divisor=divisor, grid=(scale, zero))
            wanted_codes, wanted_scales = expected_static_rows(divided, scale, zero)
            assert np.array_equal(codes, wanted_codes)
            assert same_bits(scales, wanted_scales.astype(np.float32), F32)


def test_quantize_rows_rounds_quotients_not_products(isa):
    """Quotients within a few units of a half, where multiplying by the reciprocal gives another integer."""
    g, found = rng(1), 0
    for absmax in np.concatenate([g.random(300, np.float32) + 1, np.float32([1, 1.9999999, 1.27, 127, 126.99999])]):
        scale = absmax / np.float32(127)
        near = ((np.arange(-127, 127) + np.float32(0.5)) * scale).astype(np.float32)
        near = np.concatenate([near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(200)), [absmax]])
        x = np.clip(near, -absmax, absmax).astype(np.float32)[None]
        wanted, _ = expected_rows(x)
        found += (wanted != np.rint(x * (np.float32(1) / scale)).astype(np.int8)).sum()
        assert np.array_equal(quantize_rows(x, F32)[0], wanted)
    assert found > 0, "no case would catch a multiplication"


@pytest.mark.parametrize(("m", "n", "k"), SHAPES + EMPTY)
def test_products_are_exact_and_finish_bit_for_bit(isa, m, n, k):
    g, x, w, weight_scale = random_case(m, n, k)
    codes = g.integers(-128, 128, (m, k), np.int8)
    row_scale = g.random(m, np.float32)
    ones = np.ones(n, np.float32)
    sums = gemm_w8a8(codes, np.ones(m, np.float32), w, ones)
    assert np.array_equal(sums, codes.astype(np.int64) @ w.T.astype(np.int64).reshape(k, n))
    for dtype in DTYPES.values():
        for bias_dtype in (None, *DTYPES.values()):
            bias = None if bias_dtype is None else encode(g.standard_normal(n, np.float32), bias_dtype)
            wide = None if bias is None else decode(bias, bias_dtype)
            out = gemm_w8a8(codes, row_scale, w, weight_scale, bias, bias_dtype or F32, dtype)
            assert same_bits(out, expected_product(codes, row_scale, w, weight_scale, wide, dtype), dtype)
        stored = encode(x, dtype)
        rows, scales = expected_rows(decode(stored, dtype))
        out = linear("linear_w8a8", stored, dtype, w, weight_scale)
        assert same_bits(out, expected_product(rows, scales, w, weight_scale, None, dtype), dtype)
        out = linear("linear_w8a8_static", stored, dtype, w, weight_scale)
        rows, scales = expected_static_rows(decode(stored, dtype), *STATIC_GRID)
        wanted = expected_product(rows, scales, w, weight_scale, None, dtype, static_shift(w).astype(np.int64))
        assert same_bits(out, wanted, dtype)


def test_products_divide_their_rows_first(isa):
    for m, n, k in [(1, 33, 64), (3, 5, 70), (40, 64, 129)]:
        g, x, w, weight_scale = random_case(m, n, k)
        divisor = g.random(k, np.float32) + 0.5
        for dtype in DTYPES.values():
            stored = encode(x, dtype)
            divided = decode(stored, dtype) / divisor
            rows, scales = expected_rows(divided)
            out = linear("linear_w8a8", stored, dtype, w, weight_scale, divisor=divisor)
            assert same_bits(out, expected_product(rows, scales, w, weight_scale, None, dtype), dtype)
            rows, scales = expected_static_rows(divided, *STATIC_GRID)
            out = linear("linear_w8a8_static", stored, dtype, w, weight_scale, divisor=divisor)
            wanted = expected_product(rows, scales, w, weight_scale, None, dtype, static_shift(w).astype(np.int64))
            assert same_bits(out, wanted, dtype)
        out = linear("linear_w8a16", x, F32, w, weight_scale, divisor=divisor)
        assert same_bits(out, linear("linear_w8a16", x / divisor, F32, w, weight_scale), F32)
        for group, op in [(64, "linear_codes"), (64, "linear_codes_a8"), (k, "linear_codes")]:
            codes = Codes(n, k, 4, group, op=op)
            assert same_bits(codes.linear(x, divisor=divisor), codes.linear(x / divisor), F32)


@pytest.mark.parametrize("zero", [-128, 127])
def test_shifted_sums_fit_where_they_are_longest(isa, zero):
    """Codes and weights at their limits, with the shift of a zero point at the other end of the range."""
    for a, b in [(127, -128), (127, 127), (-128, -128), (-128, 127)]:
        for m in (1, 33):
            codes, w = np.full((m, MAX_K_SHIFTED), a, np.int8), np.full((2, MAX_K_SHIFTED), b, np.int8)
            shift = np.full(2, -zero * b * MAX_K_SHIFTED, np.int32)
            out = gemm_w8a8(codes, np.ones(m, np.float32), w, np.ones(2, np.float32), shift=shift)
            assert (out == np.float32((a - zero) * b * MAX_K_SHIFTED)).all()


@pytest.mark.parametrize("a", [-128, -127, 127])
@pytest.mark.parametrize("b", [-128, 127])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 33, 4097), (13, 64, 2048), (70, 33, 3000)])
def test_extremes_do_not_saturate(isa, a, b, m, n, k):
    codes, w = np.full((m, k), a, np.int8), np.full((n, k), b, np.int8)
    codes[:, 1::7] = -a if a != -128 else 127
    out = gemm_w8a8(codes, np.ones(m, np.float32), w, np.ones(n, np.float32))
    assert np.array_equal(out, (codes.astype(np.int64) @ w.T.astype(np.int64)).astype(np.float32))


@pytest.mark.parametrize(("a", "b"), [(-128, -128), (127, -128), (-128, 127), (127, 127)])
def test_the_longest_sums_fit(isa, a, b):
    for m in (1, 33):
        codes, w = np.full((m, MAX_K), a, np.int8), np.full((2, MAX_K), b, np.int8)
        out = gemm_w8a8(codes, np.ones(m, np.float32), w, np.ones(2, np.float32))
        assert (out == np.float32(a * b * MAX_K)).all()


def test_results_round_half_to_even_and_saturate_to_infinity(isa):
    """Sums of one product are chosen so that the cast meets ties, overflow, denormals, NaN and signed zeros."""
    g = rng(2)
    bits = np.concatenate(
        [
            g.integers(0, 2**32, 20_000, np.uint32),
            (g.integers(0, 2**16, 2000, np.uint32) << 16) | 0x8000,  # bf16 ties
            (g.integers(0, 2**19, 2000, np.uint32) << 13) | 0x1000,  # f16 ties
            (g.integers(0x33000000, 0x38800000, 4000, np.uint32)),  # f16 denormals
            np.uint32([0, 1 << 31, 0x477FEFFF, 0x477FF000, 0x477FF001, 0x7F7FFFFF, 0x7F7F8000, 0x33000000, 0x33000001,
                       0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0x38800000, 0x387FFFFF]),
        ]
    )  # fmt: skip
    weight_scale = bits.view(np.float32)
    codes, w = np.ones((2, 1), np.int8), np.ones((len(bits), 1), np.int8)
    rows = np.float32([1, -1])
    for dtype in DTYPES.values():
        out = gemm_w8a8(codes, rows, w, weight_scale, dtype=dtype)
        assert same_bits(out, expected_product(codes, rows, w, weight_scale, None, dtype), dtype)


@pytest.mark.parametrize("op", ["linear_w8a8", "linear_w8a16"])
def test_a_row_with_nan_or_infinity_spoils_itself_alone(isa, op):
    for m in (2, 8, 40):
        _, x, w, weight_scale = random_case(m, 50, 70)
        clean = linear(op, x, F32, w, weight_scale)
        for bad in (np.nan, np.inf, -np.inf):
            spoilt = x.copy()
            spoilt[m // 2, 5] = bad
            out = linear(op, spoilt, F32, w, weight_scale)
            others = np.arange(m) != m // 2
            assert np.array_equal(out[others], clean[others])
            assert not np.isfinite(out[m // 2][w[:, 5] != 0]).any()
            if op == "linear_w8a8":
                assert np.isnan(out[m // 2]).all()


@pytest.mark.parametrize(("m", "n", "k"), SHAPES + EMPTY)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_weight_only_within_its_bound(isa, m, n, k, dtype):
    g, x, w, weight_scale = random_case(m, n, k)
    stored = encode(x, dtype)
    bias = g.standard_normal(n, np.float32)
    out = decode(linear("linear_w8a16", stored, dtype, w, weight_scale, bias), dtype).astype(np.float64)
    exact, error = bound_of_f32_sums(decode(stored, dtype), w, k)
    scale = weight_scale.astype(np.float64)
    error = error * np.abs(scale)
    error = error + UNIT * (np.abs(exact * scale) + error)
    exact, error = after_bias_and_cast(exact * scale, error, bias, dtype)
    assert (np.abs(out - exact) <= error).all()


CODE_SHAPES = [  # M, N, K
    (1, 1, 1), (2, 33, 65), (3, 31, 63), (1, 64, 256), (7, 40, 200), (70, 65, 330), (1, 100, 700), (2, 32, 129),
    (65, 1, 64), (0, 3, 5), (3, 0, 5), (4, 5, 0),
]  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_products_of_codes_put_every_weight_where_it_belongs(isa, name):
    """One activation a row, a power of two: the result is one weight, bit for bit, of all that there are."""
    n, k = 35, 200
    for group in (32, 64, 96, 128, 1000):
        case = of_format(name, n, k, group)
        for rows in (1, 2, 50):
            for first in range(0, k, 50 if rows == 50 else 31):
                x = np.zeros((rows, k), np.float32)
                column = (first + np.arange(rows)) % k
                x[np.arange(rows), column] = 2.0
                assert np.array_equal(case.linear(x), 2 * case.weights()[:, column].T)


@pytest.mark.parametrize("name", FORMATS)
def test_products_of_codes_lie_within_their_bound(isa, name):
    for (m, n, k), (dtype, group) in itertools.product(CODE_SHAPES, [(F32, 64), (BF16, 32), (F16, 1000)]):
        g = rng(m, n, k)
        x, bias = g.standard_normal((m, k), np.float32) * 3, g.standard_normal(n, np.float32)
        case, stored = of_format(name, n, k, group), encode(x, dtype)
        out = decode(case.linear(stored, dtype, bias), dtype).astype(np.float64)
        exact, error = bound_of_f32_sums(decode(stored, dtype), case.weights(), k)
        exact, error = after_bias_and_cast(exact, error, bias, dtype)
        assert (np.abs(out - exact) <= error).all()


def test_every_e4m3_code_has_its_value(isa):
    case = Codes(32, 64, 8, 64, table=e4m3_table())
    case.codes = np.arange(2048).astype(np.uint8).reshape(32, 64)
    case.scale = np.ones((32, 1), np.float32)
    for rows in (64, 1, 2):
        for first in range(0, 64, rows if rows == 64 else 21):
            x = np.eye(64, dtype=np.float32)[first : first + rows]
            out = case.linear(x)
            # A row of activations meets a NaN wherever its output has one among its weights.
            spoilt = np.isnan(case.weights()).any(1)
            assert np.isnan(out[:, spoilt]).all()
            assert np.array_equal(out[:, ~spoilt], case.weights()[~spoilt, first : first + rows].T)
    table = e4m3_table()
    table[5] = 3.0  # nearly e4m3 is not e4m3
    case = Codes(32, 64, 8, 64, table=table)
    case.codes[...] = 5
    assert np.array_equal(case.linear(np.eye(64, dtype=np.float32)), case.weights().T)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_group_products_bit_for_bit(isa, bits):
    for (m, n, k), (dtype, group) in itertools.product(CODE_SHAPES, [(F32, 64), (BF16, 128), (F16, 1000)]):
        g = rng(m, n, k, bits)
        x, bias = g.standard_normal((m, k), np.float32) * 3, g.standard_normal(n, np.float32)
        case, stored = Codes(n, k, bits, group, op="linear_codes_a8"), encode(x, dtype)
        rows, row_scale = expected_rows(decode(stored, dtype))
        for b in (None, bias):
            wanted = expected_group_product(rows, row_scale, case.codes, bits, group, case.scale, b, dtype)
            assert same_bits(case.linear(stored, dtype, b), wanted, dtype)


@pytest.mark.parametrize(("bits", "code"), [(2, 0), (2, 3), (3, 0), (4, 0), (4, 15), (8, 0), (8, 255)])
def test_group_products_at_the_limits(isa, bits, code):
    for m, n, k, group in [(1, 33, 2048, 2048), (13, 300, 700, 64), (70, 33, 1500, 1024)]:
        case = Codes(n, k, bits, group, op="linear_codes_a8")
        case.codes[...] = code
        for x in (np.full((m, k), 1.0, np.float32), np.full((m, k), -2.0, np.float32)):
            rows, row_scale = expected_rows(x)
            wanted = expected_group_product(rows, row_scale, case.codes, bits, group, case.scale, None, F32)
            assert same_bits(case.linear(x), wanted, F32)


@pytest.mark.parametrize("name", ["w4", "w4-asym", "w3", "w2", "w8", "w8-table", "e4m3", "a8"])
def test_a_row_of_a_product_of_codes_depends_on_nothing_else(isa, name):
    """Neither on the batch, nor on the number of threads, nor on a row beside it that holds a NaN."""
    case = Codes(70, 330, 4, 64, op="linear_codes_a8") if name == "a8" else of_format(name, 70, 330, 32)
    x = rng(6).standard_normal((140, 330), np.float32)
    whole = case.linear(x)
    for first, last in [(0, 1), (1, 3), (3, 8), (20, 33), (30, 95), (139, 140), (0, 128)]:
        part = case.linear(np.ascontiguousarray(x[first:last]))
        assert np.array_equal(part.view(np.uint32), whole[first:last].view(np.uint32))
    for count in (2, 5):
        parallel = threads(count)
        assert np.array_equal(case.linear(x, parallel=parallel).view(np.uint32), whole.view(np.uint32))
        assert parallel.errors == []
    for m in (2, 40):
        for bad in (np.nan, np.inf):
            spoilt = x[:m].copy()
            spoilt[m // 2, 5] = bad
            out = case.linear(spoilt)
            others = np.arange(m) != m // 2
            assert np.array_equal(out[others], whole[:m][others])
            assert not np.isfinite(out[m // 2][case.weights()[:, 5] != 0]).any()


@pytest.mark.parametrize("op", ["linear_w8a8", "linear_w8a16"])
def test_a_row_has_the_same_bits_in_every_batch(isa, op):
    _, x, w, weight_scale = random_case(300, 70, 330)
    packed = pack(w)
    whole = linear(op, x, F32, w, weight_scale, packed=packed)
    for first, last in [(0, 1), (1, 3), (3, 8), (5, 12), (20, 33), (30, 64), (100, 165), (299, 300), (0, 257)]:
        part = linear(op, np.ascontiguousarray(x[first:last]), F32, w, weight_scale, packed=packed)
        assert np.array_equal(part.view(np.uint32), whole[first:last].view(np.uint32))


@pytest.mark.parametrize("op", ["linear_w8a8", "linear_w8a16"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1100, 1024), (3, 700, 515), (70, 300, 512), (300, 33, 640)])
def test_threads_change_no_bit(isa, op, m, n, k):
    _, x, w, weight_scale = random_case(m, n, k)
    packed = pack(w)
    one = linear(op, x, F32, w, weight_scale, packed=packed)
    used = set()
    for count in (2, 3, 7, 64):
        parallel = threads(count)
        many = linear(op, x, F32, w, weight_scale, packed=packed, parallel=parallel)
        assert np.array_equal(one.view(np.uint32), many.view(np.uint32))
        assert parallel.errors == []
        used.add(getattr(LIB, f"qnb_{op}_workspace_bytes")(m, n, k, count))
    assert len(used) > 1, "the case is too small to be shared out"


def test_threads_share_the_other_ops(isa):
    g = rng(3)
    x = g.standard_normal((400, 700), np.float32)
    for one, many in zip(quantize_rows(x, F32), quantize_rows(x, F32, threads(3)), strict=True):
        assert np.array_equal(one, many)
    w = g.integers(-128, 128, (500, 300), np.int8)
    packed = np.empty(LIB.qnb_packed_w8_bytes(*w.shape), np.int8)
    assert LIB.qnb_pack_w8(pointer(w), *w.shape, pointer(packed), threads(4)) == 0
    assert np.array_equal(packed, pack(w))
    codes = g.integers(-128, 128, (90, 300), np.int8)
    scales = g.random(90, np.float32), g.random(500, np.float32)
    assert np.array_equal(gemm_w8a8(codes, scales[0], w, scales[1]),
                          gemm_w8a8(codes, scales[0], w, scales[1], parallel=threads(5)))  # fmt: skip


OPS = [b"quantize_rows", b"quantize_rows_static", b"gemm_w8a8", b"linear_w8a8", b"linear_w8a8_static", b"linear_w8a16",
       b"linear_codes", b"linear_codes_a8", b"pack_w8", b"unpack_w8", b"pack_codes", b"unpack_codes"]  # fmt: skip


def test_every_usable_instruction_set_answers_for_what_it_has(isa):
    """A ceiling is kept, and the best instruction set under it is the one that answers somewhere."""
    answers = {LIB.qnb_kernel_for_rows(op, m).decode() for op in OPS for m in (1, 8, 64, 512)}
    assert isa in answers
    assert all(ISAS.index(answer) >= ISAS.index(isa) for answer in answers)
    assert LIB.qnb_kernel_for(b"linear_w8a8") == LIB.qnb_kernel_for_rows(b"linear_w8a8", 1 << 40)
    assert LIB.qnb_kernel_for(b"no such op") is None
    assert LIB.qnb_kernel_for(None) is None


def test_the_ceiling_refuses_an_unknown_name():
    before = LIB.qnb_kernel_for(b"linear_w8a8")
    assert LIB.qnb_limit_isa(b"no-such-isa") == ERROR_ISA
    assert LIB.qnb_kernel_for(b"linear_w8a8") == before
    assert LIB.qnb_isa_name(-1) is None and LIB.qnb_isa_name(len(ISAS)) is None
    assert ISAS[-1] == "portable" and LIB.qnb_isa_state(len(ISAS) - 1) == 2


def test_bad_arguments_are_refused_and_nothing_is_written():
    _, x, w, weight_scale = random_case(4, 5, 6)
    packed, out = pack(w), Guarded((4, 5), np.float32)
    needed = LIB.qnb_linear_w8a8_workspace_bytes(4, 5, 6, 1)
    workspace = np.empty(needed, np.uint8)

    def call(op="linear_w8a8", x=x, dtype=F32, packed=packed, scale=weight_scale, bias=None, bias_dtype=F32,
             sizes=(4, 5, 6), out_dtype=F32, space=workspace, size=needed):  # fmt: skip
        return getattr(LIB, f"qnb_{op}")(
            pointer(x), dtype, None, pointer(packed), pointer(scale), pointer(bias), bias_dtype, *sizes,
            pointer(out.array), out_dtype, pointer(space), size, None,
        )  # fmt: skip

    assert call(sizes=(4, 5, MAX_K + 1)) == ERROR_K
    for op in ("linear_w8a8", "linear_w8a16"):
        for sizes in [(-1, 5, 6), (4, -1, 6), (4, 5, -1), (2**40, 2**40, 6), (2**62, 5, 6)]:
            assert call(op, sizes=sizes) == ERROR_SIZE
            assert getattr(LIB, f"qnb_{op}_workspace_bytes")(*sizes, 1) == ERROR_SIZE
        assert call(op, dtype=7) == call(op, out_dtype=-1) == ERROR_DTYPE
        assert call(op, bias=weight_scale, bias_dtype=3) == ERROR_DTYPE
        assert call(op, x=None) == call(op, packed=None) == call(op, scale=None) == call(op, space=None) == ERROR_NULL
        assert call(op, size=64) == ERROR_WORKSPACE
    assert LIB.qnb_quantize_rows(None, F32, None, 2, 2, None, None, None) == ERROR_NULL
    assert LIB.qnb_quantize_rows(pointer(x), 9, None, 4, 6, None, None, None) == ERROR_DTYPE
    assert LIB.qnb_pack_w8(None, 2, 2, None, None) == ERROR_NULL
    assert LIB.qnb_packed_w8_bytes(-1, 2) == ERROR_SIZE
    assert (out.checked().view(np.uint8) == CANARY).all()
    texts = {LIB.qnb_error_text(code) for code in range(0, -11, -1)}
    assert len(texts) == 11 and LIB.qnb_error_text(-99) not in texts


def test_bad_grids_and_groups_are_refused_and_nothing_is_written():
    _, x, w, weight_scale = random_case(4, 5, 70)
    out, workspace = Guarded((4, 5), np.float32), np.empty(1 << 20, np.uint8)
    codes, scales = Guarded((4, 70), np.int8), Guarded((4,), np.float32)
    end = [None, F32, 4, 5, 70, pointer(out.array), F32, pointer(workspace), workspace.size, None]
    for scale, zero in [(0.0, 0), (-1.0, 0), (np.inf, 0), (np.nan, 0), (1.0, 128), (1.0, -129)]:
        call = [pointer(x), F32, None, scale, zero]
        assert (
            LIB.qnb_quantize_rows_static(*call, 4, 70, pointer(codes.array), pointer(scales.array), None) == ERROR_GRID
        )
        assert LIB.qnb_linear_w8a8_static(*call, pointer(pack(w)), pointer(weight_scale), None, *end) == ERROR_GRID
    shift = np.zeros(5, np.int32)
    sizes = [4, 5, MAX_K_SHIFTED + 1]
    assert LIB.qnb_linear_w8a8_static(pointer(x), F32, None, 1.0, 0, pointer(pack(w)), pointer(weight_scale),
                                      pointer(shift), *end[:2], *sizes, *end[5:]) == ERROR_K  # fmt: skip
    case = Codes(5, 70, 4, 32)
    packed = pack_codes(case.codes, 4)

    def call(op, bits=4, group=64, packed=packed, scale=case.scale, size=workspace.size):
        middle = [None, None] if op == "linear_codes" else []
        return getattr(LIB, f"qnb_{op}")(pointer(x), F32, None, pointer(packed), bits, group, pointer(scale), *middle,
                                         *end[:8], size, None)  # fmt: skip

    for op in ("linear_codes", "linear_codes_a8"):
        assert call(op, bits=5) == ERROR_BITS
        assert call(op, group=0) == call(op, group=-64) == call(op, group=33) == call(op, group=69) == ERROR_GROUP
        assert call(op, packed=None) == call(op, scale=None) == ERROR_NULL
        assert call(op, size=64) == ERROR_WORKSPACE
        for sizes in [(-1, 5, 6), (4, -1, 6), (4, 5, -1), (2**40, 2**40, 6), (2**62, 5, 6)]:
            assert getattr(LIB, f"qnb_{op}_workspace_bytes")(*sizes, 1) == ERROR_SIZE
    assert call("linear_codes_a8", group=32) == ERROR_GROUP
    for array in (out, codes, scales):
        assert (array.checked().view(np.uint8) == CANARY).all()


def test_an_unknown_name_in_the_environment_is_reported():
    import subprocess

    code = (
        "import ctypes, sys; lib = ctypes.CDLL(sys.argv[1]); lib.qnb_isa_error.restype = ctypes.c_char_p;"
        "print(lib.qnb_isa_error().decode()); lib.qnb_quantize_rows.restype = ctypes.c_int32;"
        "print(lib.qnb_quantize_rows(None, 0, None, ctypes.c_int64(0), ctypes.c_int64(0), None, None, None))"
    )
    env = {**os.environ, "QNB_ISA": "sse9"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(LIBRARY)], env=env, capture_output=True, text=True, check=True
    )
    text, error = done.stdout.splitlines()
    assert "QNB_ISA=sse9" in text and all(name in text for name in ISAS)
    assert int(error) == ERROR_ISA
