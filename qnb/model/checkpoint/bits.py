"""Codes of few bits packed densely, the first in the lowest bits: as compressed-tensors has them, in int32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """u8 (N, K) below 2 ** bits -> s32 (N, ceil(K * bits / 32)), rows filled up with zeros."""
    n, k = codes.shape
    codes = F.pad(codes, (0, -k % 32))
    if bits == 8:
        packed = codes
    elif bits == 4:
        packed = codes[:, ::2] | codes[:, 1::2] << 4
    else:
        places = torch.arange(bits, dtype=torch.uint8, device=codes.device)
        single = (codes.unsqueeze(-1) >> places & 1).view(n, -1, 8)
        packed = (single << torch.arange(8, dtype=torch.uint8, device=codes.device)).sum(-1, dtype=torch.uint8)
    return packed.contiguous().view(torch.int32)[:, : -(-k * bits // 32)].contiguous()


def unpack(packed: Tensor, k: int, bits: int) -> Tensor:
    """Undoes `pack`: s32 (N, ceil(k * bits / 32)) -> u8 (N, k)."""
    n = packed.shape[0]
    raw = packed.contiguous().view(torch.uint8).view(n, -1)
    if bits == 8:
        return raw[:, :k].contiguous()
    if bits == 4:
        return torch.stack([raw & 15, raw >> 4], -1).view(n, -1)[:, :k].contiguous()
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    single = (raw.unsqueeze(-1) >> places & 1).view(n, -1)
    single = single[:, : single.shape[1] // bits * bits].view(n, -1, bits)
    codes = (single << torch.arange(bits, dtype=torch.uint8, device=packed.device)).sum(-1, dtype=torch.uint8)
    return codes[:, :k].contiguous()
