"""Every operator in plain torch: right on any device, and what the compiled kernels are held to.

Integer sums are exact: products of s8 values are added in float64, which holds every integer up to 2^53.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qnb.ops.schema import LIBRARY, packed_codes_bytes

MAX_K = 131_071  # 131,071 * 128 * 128 < 2^31: a longer sum could leave s32
MAX_K_SHIFTED = 65_535  # 65,535 * 255 * 128 < 2^31: codes less a zero point reach from -255 to 255
_CHUNK = 1 << 24  # elements of the weight that are float64 at a time: 128 MiB
_BITS = (2, 3, 4, 8)
_BLOCK = 2048  # codes of 32 outputs and 64 inputs, packed together


def quantize_rows(x: Tensor, divisor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One symmetric scale a row of x / divisor: scale = absmax / 127, code = round_half_even(x / scale) in [-127, 127].

    A row of zeros gets scale 0; a row with NaN or infinity gets scale NaN; both get codes 0.
    """
    x = _divided(x, divisor)
    absmax = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    scale = absmax / absmax.new_full((), 127)  # a tensor: by a Python number CUDA multiplies with the reciprocal
    usable = absmax.isfinite() & (scale > 0)
    codes = torch.round(x / scale.where(usable, 1).unsqueeze(-1)).clamp_(-127, 127)
    codes = codes.where(usable.unsqueeze(-1), 0)
    return codes.to(torch.int8), scale.where(absmax.isfinite(), torch.nan)


def quantize_rows_static(x: Tensor, scale: float, zero: int, divisor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One given scale for all of x / divisor: code = round_half_even(x / scale) + zero, clamped to s8.

    Every row's scale is `scale`, rounded to f32; a row with NaN or infinity gets scale NaN and codes 0.
    """
    x = _divided(x, divisor)
    step = torch.full((), scale, dtype=torch.float32, device=x.device)
    if not 0 < torch.tensor(scale, dtype=torch.float32) < torch.inf:
        raise RuntimeError(f"scale is {scale}: it must be a positive, finite float32")
    if not -128 <= zero <= 127:
        raise RuntimeError(f"zero is {zero}: a zero point lies from -128 to 127")
    finite = x.isfinite().all(-1)
    codes = (torch.round(x / step).clamp_(-128 - zero, 127 - zero) + zero).where(finite.unsqueeze(-1), 0)
    return codes.to(torch.int8), step.where(finite, torch.nan)


def pack_w8(w: Tensor) -> Tensor:
    """(N, K) s8 -> the packed layout [N/32][K/64][2][16 groups of k][16 outputs][4 k], padded with zeros."""
    w = F.pad(w, (0, -w.shape[1] % 64, 0, -w.shape[0] % 32))
    blocks = w.view(w.shape[0] // 32, 2, 16, w.shape[1] // 64, 16, 4)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(-1)


def unpack_w8(packed: Tensor, N: int, K: int) -> Tensor:  # noqa: N803 - the schema's names
    """Undoes `pack_w8`, exactly."""
    n, k = -(-N // 32), -(-K // 64)
    blocks = packed.view(n, k, 2, 16, 16, 4).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(n * 32, k * 64)[:N, :K].contiguous()


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """(N, K) u8 codes below 2**bits -> `bits` bits each, block by block of `pack_w8`'s layout, padded with code 0."""
    _check_bits(bits)
    if codes.dtype != torch.uint8 or codes.ndim != 2:
        raise RuntimeError(f"codes are {codes.dtype} with {codes.ndim} dimensions: give uint8, (N, K)")
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise RuntimeError(f"a code is {int(codes.max())}: with {bits} bits codes lie below {1 << bits}")
    blocks = pack_w8(codes).view(-1, _BLOCK)
    if bits == 3:
        blocks = _join_words(blocks)
    elif bits < 8:
        blocks = _join_bytes(blocks, bits)
    return blocks.reshape(-1)


def unpack_codes(packed: Tensor, N: int, K: int, bits: int) -> Tensor:  # noqa: N803
    """Undoes `pack_codes`, exactly."""
    _check_bits(bits)
    if packed.dtype != torch.uint8 or packed.numel() != packed_codes_bytes(N, K, bits):
        raise RuntimeError(
            f"packed holds {packed.numel()} elements of {packed.dtype}, but codes of N={N}, K={K} at {bits} bits are "
            f"{packed_codes_bytes(N, K, bits)} of uint8"
        )
    blocks = packed.view(-1, _BLOCK * bits // 8)
    if bits == 3:
        blocks = _split_words(blocks)
    elif bits < 8:
        blocks = _split_bytes(blocks, bits)
    return unpack_w8(blocks.reshape(-1), N, K)


def gemm_w8a8(codes, row_scales, packed, weight_scale, bias, N, dtype, shift=None) -> Tensor:  # noqa: N803
    """f32(codes @ weight.T + shift) * row_scale * weight_scale + bias, each step rounded to f32, cast to `dtype`."""
    weight_scale = _flat_scale(weight_scale, N)
    limit = MAX_K if shift is None else MAX_K_SHIFTED
    if codes.shape[-1] > limit:
        raise RuntimeError(f"K={codes.shape[-1]} is above {limit}: the sums would leave 32 bits; skip this layer")
    if shift is not None and (shift.shape != (N,) or shift.dtype != torch.int32):
        raise RuntimeError(f"shift is {shift.dtype} of shape {tuple(shift.shape)}, but N={N} needs int32, ({N},)")
    weight = unpack_w8(packed, N, codes.shape[-1])
    rows = codes.double()
    step = max(1, _CHUNK // max(1, codes.shape[-1]))
    sums = [rows @ w.double().T for w in weight.split(step)] or [rows.new_empty(*codes.shape[:-1], 0)]
    acc = torch.cat(sums, -1)
    out = (acc if shift is None else acc + shift).float() * row_scales.unsqueeze(-1) * weight_scale
    return (out if bias is None else out + bias.float()).to(dtype)


def linear_w8a8(x, packed, weight_scale, bias, N, divisor=None) -> Tensor:  # noqa: N803
    """`quantize_rows`, then `gemm_w8a8` back to the type of x."""
    return gemm_w8a8(*quantize_rows(x, divisor), packed, weight_scale, bias, N, x.dtype)


def linear_w8a8_static(x, packed, weight_scale, bias, N, scale, zero, shift=None, divisor=None) -> Tensor:  # noqa: N803
    """`quantize_rows_static`, then `gemm_w8a8` back to the type of x."""
    codes, scales = quantize_rows_static(x, scale, zero, divisor)
    return gemm_w8a8(codes, scales, packed, weight_scale, bias, N, x.dtype, shift)


def linear_w8a16(x, packed, weight_scale, bias, N, divisor=None) -> Tensor:  # noqa: N803
    """((x / divisor) @ weight.T) * weight_scale + bias with f32 sums, cast to the type of x."""
    weight_scale = _flat_scale(weight_scale, N)
    weight = unpack_w8(packed, N, x.shape[-1])
    out = (_divided(x, divisor) @ weight.float().T) * weight_scale
    return (out if bias is None else out + bias.float()).to(x.dtype)


def linear_codes(x, packed, scale, zero, table, bias, N, bits, group, divisor=None) -> Tensor:  # noqa: N803
    """(x / divisor) @ w.T + bias with f32 sums, cast to the type of x; w = (value of the code - zero) * scale in f32.

    The value of a code is table[code], or code - 2**(bits - 1) without a table.
    """
    k = x.shape[-1]
    _check_groups(scale, zero, N, k, group, 32)
    rows = _divided(x, divisor)
    codes = unpack_codes(packed, N, k, bits)
    if table is not None and (table.shape != (1 << bits,) or table.dtype != torch.float32):
        raise RuntimeError(f"table is {table.dtype} of shape {tuple(table.shape)}: give float32, ({1 << bits},)")
    column = torch.arange(k, device=x.device) // group
    outs = []
    for n in range(0, N, step := max(1, _CHUNK // max(1, k))):
        part = codes[n : n + step]
        value = part.float() - (1 << bits - 1) if table is None else table[part.int()]
        if zero is not None:
            value = value - zero[n : n + step, column]
        outs.append(rows @ (value * scale[n : n + step, column]).T)
    out = torch.cat(outs, -1) if outs else rows.new_empty(*rows.shape[:-1], 0)
    return (out if bias is None else out + bias.float()).to(x.dtype)


def linear_codes_a8(x, packed, scale, bias, N, bits, group, divisor=None) -> Tensor:  # noqa: N803
    """Rows by `quantize_rows`, exact integer sums inside a group; f32(sum) * scale added up over the groups in order.

    That total times the row's scale, plus bias, each step rounded to f32, is cast to the type of x.
    """
    k = x.shape[-1]
    _check_groups(scale, None, N, k, group, 64)
    if min(group, k) > MAX_K:
        raise RuntimeError(f"a group of {min(group, k)} is longer than {MAX_K}: its sums would leave 32 bits")
    codes, row_scales = quantize_rows(x, divisor)
    rows = codes.double()
    weight = unpack_codes(packed, N, k, bits)
    total = None
    for g, first in enumerate(range(0, k, group)):
        part = weight[:, first : first + group].double() - (1 << bits - 1)
        product = (rows[..., first : first + group] @ part.T).float() * scale[:, g]
        total = product if total is None else total + product
    if total is None:
        total = row_scales.new_zeros(*row_scales.shape, N)
    out = total * row_scales.unsqueeze(-1)
    return (out if bias is None else out + bias.float()).to(x.dtype)


def _divided(x: Tensor, divisor: Tensor | None) -> Tensor:
    if not x.is_floating_point():
        raise RuntimeError(f"x is {x.dtype}: give float32, bfloat16 or float16")
    if divisor is None:
        return x.float()
    if divisor.shape != x.shape[-1:] or divisor.dtype != torch.float32:
        raise RuntimeError(
            f"divisor is {divisor.dtype} of shape {tuple(divisor.shape)}: K={x.shape[-1]} needs float32, "
            f"({x.shape[-1]},)"
        )
    return x.float() / divisor


def _join_bytes(blocks: Tensor, bits: int) -> Tensor:
    """(blocks, 2048) codes of 2 or 4 bits -> bytes: byte i holds codes i, i + bytes, ... from the low bits up."""
    parts = blocks.chunk(8 // bits, 1)
    joined = parts[0]
    for i, part in enumerate(parts[1:], 1):
        joined = joined | part << bits * i
    return joined


def _split_bytes(packed: Tensor, bits: int) -> Tensor:
    """Undoes `_join_bytes`."""
    return torch.cat([packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], 1)


def _join_words(blocks: Tensor) -> Tensor:
    """(blocks, 2048) codes of 3 bits -> 256 words of 24 bits: of 64 words the low bytes, the middle, the high."""
    eight = blocks.view(-1, 2, 4, 4, 64).transpose(1, 2).reshape(-1, 4, 8, 64).int()  # 2 halves x 4 lines to a word
    words = eight[:, :, 0]
    for i in range(1, 8):
        words = words | eight[:, :, i] << 3 * i
    return torch.stack([words >> 8 * byte & 255 for byte in range(3)], 2).to(torch.uint8).view(-1, 768)


def _split_words(packed: Tensor) -> Tensor:
    """Undoes `_join_words`."""
    low, middle, high = packed.view(-1, 4, 3, 64).int().unbind(2)
    words = low | middle << 8 | high << 16
    eight = torch.stack([words >> 3 * i & 7 for i in range(8)], 2).to(torch.uint8)
    return eight.view(-1, 4, 2, 4, 64).transpose(1, 2).reshape(-1, _BLOCK)


def _flat_scale(weight_scale: Tensor, n: int) -> Tensor:
    if weight_scale.shape not in ((n,), (n, 1)):
        raise RuntimeError(f"weight_scale has shape {tuple(weight_scale.shape)}, but N={n} needs ({n},) or ({n}, 1)")
    return weight_scale.reshape(n)


def _check_bits(bits: int) -> None:
    if bits not in _BITS:
        raise RuntimeError(f"bits is {bits}: codes have 2, 3, 4 or 8")


def _check_groups(scale: Tensor, zero: Tensor | None, n: int, k: int, group: int, multiple: int) -> None:
    if group < 1 or (group % multiple and group < k):
        raise RuntimeError(f"group is {group}: give a multiple of {multiple}, or at least K={k}")
    wanted = (n, -(-k // group))
    for name, given in (("scale", scale), ("zero", zero)):
        if given is not None and (given.shape != wanted or given.dtype != torch.float32):
            raise RuntimeError(
                f"{name} is {given.dtype} of shape {tuple(given.shape)}, but N={n}, K={k} in groups of {group} need "
                f"float32, {wanted}"
            )


for _op in (
    quantize_rows,
    quantize_rows_static,
    pack_w8,
    unpack_w8,
    pack_codes,
    unpack_codes,
    gemm_w8a8,
    linear_w8a8,
    linear_w8a8_static,
    linear_w8a16,
    linear_codes,
    linear_codes_a8,
):
    LIBRARY.impl(_op.__name__, _op, "CompositeExplicitAutograd")
