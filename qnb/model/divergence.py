"""How far one model's predictions are from another's, for parts of the library that lie below measuring."""

from __future__ import annotations

import torch
from torch import nn

from qnb.model.inputs import samples_of
from qnb.model.subject import measuring_state


def mean_kl(first: nn.Module, second: nn.Module, texts: object, tokenizer: object) -> float:
    """Mean over all positions of KL(first || second) of the next-token distributions, in nats."""
    samples, _ = samples_of(first, texts, tokenizer)
    total, count = 0.0, 0
    with measuring_state(first), measuring_state(second):
        for sample in samples:
            logs = [torch.log_softmax(m(*sample.args, **sample.kwargs).logits.double(), -1) for m in (first, second)]
            total += float((logs[0].exp() * (logs[0] - logs[1])).sum())
            count += logs[0].shape[:-1].numel()
    return total / count
