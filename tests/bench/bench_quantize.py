"""How fast `qnb.quantize` goes over a model, and how much memory it takes at most.

    python tests/bench/bench_quantize.py [--layers 24] [--width 4096] [--threads 2] [--scheme w8a8] [--keep memory]

Speed: bytes of bf16 weights by the time of the whole call, on a model of square layers. To reach: 0.5 GB/s with w8a8.

Memory: the most that was resident during the call (VmHWM, reset before it), beside what must be there: the process as
it was before, originals included, plus the result. What goes beyond is printed in bytes and in layers. To reach: one
layer. The model is made and touched before, so that none of its pages count as growth; Linux only.
"""

from __future__ import annotations

import argparse
import time

import psutil
import torch
from torch import nn

import qnb
from qnb.measure.probes.host_memory import KernelPeak
from qnb.model import cache
from qnb.model.linear import disk_bytes, held_storages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scheme", default="w8a8")
    parser.add_argument("--keep", default="memory", choices=("memory", "disk", "none"))
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    cache.CACHE_BYTES = 0  # each run rounds
    width, layers = arguments.width, arguments.layers
    layer_bytes = 2 * width * width
    gigabytes = layers * layer_bytes / 1e9
    small = nn.Sequential(nn.Linear(width, width, bias=False, dtype=torch.bfloat16))
    qnb.quantize(small, arguments.scheme, progress=False)  # loads and warms what the first call would
    del small
    for run in range(arguments.runs):
        model = nn.Sequential(*(nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for _ in range(layers)))
        before = psutil.Process().memory_info().rss
        meter = KernelPeak([torch.device("cpu")])
        meter.start()
        began, worked = time.perf_counter(), time.process_time()
        qnb.quantize(model, arguments.scheme, keep=arguments.keep, progress=False)
        seconds, worked = time.perf_counter() - began, time.process_time() - worked
        peak = meter.stop().value
        result, kept = held_storages(model)
        beyond = peak - before - result
        print(
            f"run {run + 1}: {layers} layers of {width} x {width} bf16, {arguments.threads} threads: "
            f"{gigabytes / seconds:.2f} GB/s ({gigabytes / worked:.2f} by processor time); "
            f"peak {peak / 1e6:.0f} MB = before {before / 1e6:.0f} "
            f"(originals {layers * layer_bytes / 1e6:.0f}) + result {result / 1e6:.0f} + {beyond / 1e6:.1f} MB "
            f"({beyond / layer_bytes:.2f} layers); kept {kept / 1e6:.0f} MB in memory, "
            f"{disk_bytes(model) / 1e6:.0f} MB on disk"
        )
        del model


if __name__ == "__main__":
    main()
