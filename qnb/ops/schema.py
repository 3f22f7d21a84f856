"""The operators as torch sees them: schema, shape of the result without data, gradient to the input.

Shapes: x (..., K) f32/bf16/f16; codes s8 (..., K); row_scales f32 (...); packed s8, one axis, in the layout of
`QNB_LAYOUT_S8_N32K64` (csrc/include/qnb.h); weight_scale f32 (N,) or (N, 1); bias (N,) in any of the float types;
divisor f32 (K,), by which x is divided first, in f32; shift s32 (N,), added to the integer sums.
The `codes` family: codes u8 (N, K) below 2**bits, bits one of 2, 3, 4, 8; packed u8, one axis, in the layout of
`QNB_LAYOUT_CODES_N32K64`; scale and zero f32 (N, ceil(K / group)), one for `group` neighbours along K; table f32
(2**bits,), the value of each code.

Gradients are not registered on the operators: torch would then pass every call through Python, which triples the
cost of a small layer. Layers take the path of `with_gradient` only when a gradient is needed.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

LIBRARY = torch.library.Library("qnb", "DEF")

LIBRARY.define("quantize_rows(Tensor x, Tensor? divisor=None) -> (Tensor codes, Tensor scales)")
LIBRARY.define(
    "quantize_rows_static(Tensor x, float scale, int zero, Tensor? divisor=None) -> (Tensor codes, Tensor scales)"
)
LIBRARY.define("pack_w8(Tensor w) -> Tensor")
LIBRARY.define("unpack_w8(Tensor packed, int N, int K) -> Tensor")
LIBRARY.define("pack_codes(Tensor codes, int bits) -> Tensor")
LIBRARY.define("unpack_codes(Tensor packed, int N, int K, int bits) -> Tensor")
LIBRARY.define(
    "gemm_w8a8(Tensor codes, Tensor row_scales, Tensor packed, Tensor weight_scale, Tensor? bias, int N, "
    "ScalarType dtype, Tensor? shift=None) -> Tensor"
)
LIBRARY.define(
    "linear_w8a8(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, int N, Tensor? divisor=None) -> Tensor"
)
LIBRARY.define(
    "linear_w8a16(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, int N, Tensor? divisor=None) -> Tensor"
)
LIBRARY.define(
    "linear_w8a8_static(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, int N, float scale, int zero, "
    "Tensor? shift=None, Tensor? divisor=None) -> Tensor"
)
LIBRARY.define(
    "linear_codes(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? table, Tensor? bias, int N, int bits, "
    "int group, Tensor? divisor=None) -> Tensor"
)
LIBRARY.define(
    "linear_codes_a8(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int N, int bits, int group, "
    "Tensor? divisor=None) -> Tensor"
)


def packed_bytes(n: int, k: int) -> int:
    """Bytes of an (n, k) s8 weight when packed: outputs padded to a multiple of 32, inputs to one of 64."""
    return -(-n // 32) * 32 * -(-k // 64) * 64


def packed_codes_bytes(n: int, k: int, bits: int) -> int:
    """Bytes of (n, k) codes of `bits` bits when packed, padded as by `packed_bytes`."""
    return packed_bytes(n, k) * bits // 8


@torch.library.register_fake("qnb::quantize_rows", lib=LIBRARY)
def _(x: Tensor, divisor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("qnb::quantize_rows_static", lib=LIBRARY)
def _(x: Tensor, scale: float, zero: int, divisor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("qnb::pack_w8", lib=LIBRARY)
def _(w: Tensor) -> Tensor:
    return w.new_empty(packed_bytes(*w.shape))


@torch.library.register_fake("qnb::unpack_w8", lib=LIBRARY)
def _(packed: Tensor, N: int, K: int) -> Tensor:  # noqa: N803 - the schema's names
    return packed.new_empty(N, K)


@torch.library.register_fake("qnb::pack_codes", lib=LIBRARY)
def _(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty(packed_codes_bytes(*codes.shape, bits))


@torch.library.register_fake("qnb::unpack_codes", lib=LIBRARY)
def _(packed: Tensor, N: int, K: int, bits: int) -> Tensor:  # noqa: N803
    return packed.new_empty(N, K)


@torch.library.register_fake("qnb::gemm_w8a8", lib=LIBRARY)
def _(codes, row_scales, packed, weight_scale, bias, N, dtype, shift=None) -> Tensor:  # noqa: N803
    return codes.new_empty(*codes.shape[:-1], N, dtype=dtype)


@torch.library.register_fake("qnb::linear_w8a8", lib=LIBRARY)
@torch.library.register_fake("qnb::linear_w8a16", lib=LIBRARY)
def _(x, packed, weight_scale, bias, N, divisor=None) -> Tensor:  # noqa: N803
    return x.new_empty(*x.shape[:-1], N)


@torch.library.register_fake("qnb::linear_w8a8_static", lib=LIBRARY)
def _(x, packed, weight_scale, bias, N, scale, zero, shift=None, divisor=None) -> Tensor:  # noqa: N803
    return x.new_empty(*x.shape[:-1], N)


@torch.library.register_fake("qnb::linear_codes", lib=LIBRARY)
def _(x, packed, scale, zero, table, bias, N, bits, group, divisor=None) -> Tensor:  # noqa: N803
    return x.new_empty(*x.shape[:-1], N)


@torch.library.register_fake("qnb::linear_codes_a8", lib=LIBRARY)
def _(x, packed, scale, bias, N, bits, group, divisor=None) -> Tensor:  # noqa: N803
    return x.new_empty(*x.shape[:-1], N)


class Differentiable(Protocol):
    """What `with_gradient` needs of a layer's frozen weight."""

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor: ...

    def dequantize(self, dtype: torch.dtype) -> Tensor: ...


class _FrozenWeight(torch.autograd.Function):
    """y = run(x), differentiated as y = x @ dequantize(weight).T + bias: rounding counts as the identity."""

    @staticmethod
    def forward(ctx, weight: Differentiable, x: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # immutable
        ctx.bias_dtype = None if bias is None else bias.dtype
        return weight.run(x, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        _, x_needed, bias_needed = ctx.needs_input_grad
        grad_x = grad @ ctx.weight.dequantize(grad.dtype) if x_needed else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype) if bias_needed else None
        return None, grad_x, grad_bias


def with_gradient(weight: Differentiable, x: Tensor, bias: Tensor | None) -> Tensor:
    """`weight.run(x, bias)` that hands gradients to `x` and `bias`, as if its rounding were not there."""
    if bias is not None and not x.requires_grad and x.dtype == bias.dtype == torch.float32:
        # Every operator adds the bias last, in f32: torch's own addition gives the same bits, and the gradient, at less
        # than half of what a function of our own costs.
        return weight.run(x, None) + bias
    return _FrozenWeight.apply(weight, x, bias)
