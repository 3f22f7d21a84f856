"""What a change costs where its variants exist already, and what the layer costs besides its arithmetic.

    python tests/bench/bench_switch.py [--layers 56] [--changes 200]

First table: microseconds a layer of `qnb.quantize` between two schemes that the model had before (the plan, the wait
for passes through the model, the change itself and the report), of putting the originals back, and of the first time,
which rounds. The demo model's shapes repeat until there are as many layers as asked for. To reach: 50 us.

Second table: one call of a layer of 64 x 64 at M = 1 over one of `nn.Linear`, turn by turn. To reach: 1.5. With a
gradient to keep (grad mode, and a bias or an input that asks for one) a call goes through Python, as the table shows.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import qnb
from qnb.model import cache

SHAPES = [(320, 320)] * 4 + [(896, 320)] * 2 + [(320, 896)]  # (N, K) of one block of the demo model


class Body(nn.Module):
    """Blocks of linear layers, named as a language model's are."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        blocks = -(-layers // len(SHAPES))
        shapes = [SHAPES] * (blocks - 1) + [SHAPES[: layers - (blocks - 1) * len(SHAPES)]]
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(k, n, bias=False) for n, k in block) for block in shapes)


def microseconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - began)


def switches(layers: int, changes: int) -> None:
    """Prints the first table."""
    model = Body(layers)
    first = microseconds(lambda: qnb.quantize(model, "w8a8", progress=False)) / layers
    qnb.quantize(model, "w8a16", progress=False)
    print(f"us a layer, {layers} layers, {changes} changes   fastest    median")
    print(f"{'first time (rounds)':38s} {first:9.1f}")
    for what, schemes in (("w8a8 <-> w8a16, cached", ("w8a8", "w8a16")), ("w8a8 <-> none, cached", ("w8a8", "none"))):
        times = []
        for i in range(changes):
            scheme = schemes[i % 2]
            times.append(microseconds(lambda scheme=scheme: qnb.quantize(model, scheme, progress=False)) / layers)
        print(f"{what:38s} {min(times):9.1f} {statistics.median(times):9.1f}")
    print(f"held by the cache: {cache.cached_bytes() / 1e6:.1f} MB of at most {cache.CACHE_BYTES / 1e6:.0f} MB")


def overhead(turns: int, calls: int) -> None:
    """Prints the second table."""
    modes = {
        "inference_mode": (torch.inference_mode, False),
        "no_grad": (torch.no_grad, False),
        "grad mode, no bias": (contextlib.nullcontext, False),
        "grad mode, bias with gradient": (contextlib.nullcontext, True),
    }
    x = torch.randn(1, 64)
    print(f"\n64 x 64 at M = 1, {turns} turns of {calls} calls   nn.Linear us    w8a8 us    ratio")
    for mode, (context, bias) in modes.items():
        plain, model = nn.Linear(64, 64, bias=bias), nn.Sequential(nn.Linear(64, 64, bias=bias))
        qnb.quantize(model, "w8a8", progress=False)
        quantized, pairs = model[0], []
        with context():
            for _ in range(turns):
                pairs.append([_us(layer, x, calls) for layer in (plain, quantized)])
        ratio = statistics.median(b / a for a, b in pairs)
        a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{mode:38s} {a:12.2f} {b:10.2f} {ratio:8.2f}")


def _us(layer: nn.Module, x: torch.Tensor, calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        layer(x)
    return 1e6 * (time.perf_counter() - began) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=56)
    parser.add_argument("--changes", type=int, default=200)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    switches(arguments.layers, arguments.changes)
    overhead(30, 1000)


if __name__ == "__main__":
    main()
