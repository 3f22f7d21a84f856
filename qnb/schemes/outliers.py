"""-outliersN: the widest input channels stay in the original precision, beside any scheme for the others.

After the mixed decomposition of LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339), with channels that calibration
fixed instead of channels that are looked for at run time.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from qnb.errors import BadInput
from qnb.schemes.base import How, Scheme, Variant


@dataclasses.dataclass(frozen=True, eq=False)
class OutlierVariant(Variant):
    """`base` for a weight whose columns `channels` are 0, and these columns apart.

    channels  s64 (n,), rising
    kept      (N, n) in the type of the original weight
    """

    base: Variant
    channels: Tensor
    kept: Tensor

    @property
    def scheme(self) -> Scheme:
        return self.base.scheme

    @property
    def how(self) -> How:
        return self.base.how

    @property
    def note(self) -> str | None:
        return self.base.note

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.shape[-1] != self.shape[1]:
            raise BadInput(f"the input has {x.shape[-1]} features, but the layer takes {self.shape[1]}")
        # Set to 0 in a copy: they must not widen the range of the other channels.
        rest = x.index_fill(-1, self.channels, 0)
        apart = F.linear(x.index_select(-1, self.channels), self.kept.to(x.dtype))
        return self.base.linear(rest, bias) + apart

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.base.dequantize(dtype).index_copy(1, self.channels, self.kept.to(dtype))

    def tensors(self) -> dict[str, Tensor]:
        return {**self.base.tensors(), "outlier_channels": self.channels, "outlier_weight": self.kept}

    def plain(self) -> dict[str, Tensor]:
        apart = {"outlier_channels": self.channels.clone(), "outlier_weight": self.kept.clone()}
        return {**self.base.plain(), **apart}

    def to(self, device: torch.device) -> OutlierVariant:
        return OutlierVariant(self.base.to(device), self.channels.to(device), self.kept.to(device))

    def kernel(self) -> str:
        return f"{self.base.kernel()} + torch"
