"""One linear layer against its peers, side by side in one run: float32 in, float32 out, two threads.

    python tests/bench/bench_linear.py [--shapes 1x4096x4096,512x4096x4096] [--seconds 3] [--threads 2]

Needs the extra `bench`. Peers, each on the same shape and without bias:
    qnb         qnb.quantize(nn.Sequential(nn.Linear(K, N)), "w8a8")
    onnxruntime DynamicQuantizeLinear, MatMulInteger, and the scales' epilogue, of the same integer weight
    float32     nn.Linear
    bfloat16    nn.Linear in bfloat16, on a bfloat16 input

Times are medians of many short turns, in which peers take their turns one after the other, so that a noisy moment hits
all of them. The last columns are the peer's time over qnb's: above 1, qnb is faster.

First table: one weight, called again and again; it says in which cache that weight fits. Second table, few rows: turns
walk through weights that together are more than twice the last-level cache, so that they come from memory. Third: what
a call costs besides arithmetic, on a layer of 64 x 64.

What a processor without AVX-512 would see, torch held to AVX2 as well (ONNX Runtime is not):

    QNB_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 python tests/bench/bench_linear.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import qnb
from qnb.ops import kernel_for

SHAPES = [  # M, K, N
    (1, 4096, 4096),
    (8, 4096, 4096),
    (64, 4096, 4096),
    (512, 4096, 4096),
    (512, 4096, 11008),
    (1, 768, 3072),
    (128, 768, 3072),
]
FEW_ROWS = [(1, 4096, 4096), (8, 4096, 4096), (1, 768, 3072)]
SETTLE_SECONDS = 0.03
PEERS = ("qnb", "onnxruntime", "float32", "bfloat16")


def caches() -> dict[str, int]:
    """Bytes of this machine's data caches by name, innermost first; empty where the system does not tell."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (index / "type").read_text().strip() != "Instruction":
            size = (index / "size").read_text().strip()
            found["L" + (index / "level").read_text().strip()] = int(size.rstrip("K")) * 1024
    return found


def level_of(weight_bytes: int) -> str:
    """The innermost cache that holds a weight of so many bytes, half of it to spare."""
    return next((name for name, size in caches().items() if weight_bytes * 2 <= size), "memory")


def onnx_peer(weight: np.ndarray, scale: np.ndarray):
    """A session over the integer weight (N, K) with its scales (N,)."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "row_scale", "zero"]),
        helper.make_node("MatMulInteger", ["codes", "weight", "zero"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["float_sums"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["row_scale", "scale"], ["scales"]),
        helper.make_node("Mul", ["float_sums", "scales"], ["y"]),
    ]
    n, k = weight.shape
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", size]) for name, size in (("x", k), ("y", n)))
    constants = [numpy_helper.from_array(np.ascontiguousarray(weight.T), "weight"),
                 numpy_helper.from_array(scale, "scale")]  # fmt: skip
    model = helper.make_model(
        helper.make_graph(nodes, "linear", [x], [y], constants),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    # One pool for all sessions, as torch has one for all layers: a pool for each would spin beside the others.
    options.use_per_session_threads = False
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x})[0]


def make_peers(k: int, n: int, copies: int) -> dict[str, list]:
    """By peer: layers of their own, as many as weigh what `copies` 8-bit weights weigh, at least one."""
    peers: dict[str, list] = {name: [] for name in PEERS}
    for copy in range(copies):
        linear = nn.Linear(k, n, bias=False)
        scale = linear.weight.detach().abs().amax(1) / 127
        codes = torch.round(linear.weight.detach() / scale[:, None]).to(torch.int8)
        peers["onnxruntime"].append(onnx_peer(codes.numpy(), scale.numpy()))
        if copy * 4 < copies:
            peers["float32"].append(nn.Linear(k, n, bias=False))
        if copy * 2 < copies:
            peers["bfloat16"].append(nn.Linear(k, n, bias=False).bfloat16())
        quantized = nn.Sequential(linear)
        qnb.quantize(quantized, "w8a8", keep="none", progress=False)
        peers["qnb"].append(quantized)
    return peers


def time_peers(m: int, k: int, n: int, seconds: float, copies: int = 1) -> tuple[dict[str, float], int]:
    """(median milliseconds a call by peer, turns of each), after all have shown that they compute the same product."""
    peers = make_peers(k, n, copies)
    x = torch.randn(m, k)
    inputs = {"qnb": x, "onnxruntime": x.numpy(), "float32": x, "bfloat16": x.bfloat16()}
    ours, theirs = peers["qnb"][0](x).numpy(), peers["onnxruntime"][0](x.numpy())
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(ours)
    assert error < 0.03, f"qnb and onnxruntime differ by {error:.3f}: they do not compute the same layer"

    times: dict[str, list[float]] = {name: [] for name in PEERS}
    calls = dict.fromkeys(PEERS, 1)
    for name, layers in peers.items():
        for layer in layers * (1 if copies > 1 else 5):
            layer(inputs[name])
        begin = time.perf_counter()
        layers[0](inputs[name])
        # A turn is a walk through all layers; with one layer, some milliseconds of calls.
        calls[name] = len(layers) if copies > 1 else max(1, min(200, int(0.01 / (time.perf_counter() - begin))))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["qnb"]) < 5:
        for name, layers in peers.items():
            # Thread pools go on spinning for a while after their work; on few cores that slows whoever comes next.
            time.sleep(SETTLE_SECONDS)
            # The other peers' weights have driven this one out of the cache: the first few calls read it from memory.
            for _ in range(1 if copies > 1 else min(calls[name], 10)):
                layers[-1](inputs[name])
            begin = time.perf_counter()
            for call in range(calls[name]):
                layers[call % len(layers)](inputs[name])
            times[name].append((time.perf_counter() - begin) / calls[name] * 1e3)
    return {name: statistics.median(series) for name, series in times.items()}, len(times["qnb"])


def print_rows(shapes, seconds: float, rotate: bool) -> None:
    print(f"{'M x K x N':>18} {'weight in':>9} " + "".join(f"{name + ' ms':>16}" for name in PEERS)
          + "".join(f"{'/ ' + name:>14}" for name in PEERS[1:]) + f"{'GOP/s':>9}{'GB/s':>7}{'turns':>7}")  # fmt: skip
    last = max(caches().values(), default=32 << 20)
    for m, k, n in shapes:
        copies = 2 * last // (n * k) + 1 if rotate else 1
        # Packed, in onnxruntime (which packs beside what it was given), and as floats.
        needed = copies * n * k * 12
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > free:
            print(
                f"{f'{m} x {k} x {n}':>18} unavailable: {copies} weights need {needed >> 20} MB, {free >> 20} are free"
            )
            continue
        ms, turns = time_peers(m, k, n, seconds, copies)
        level = "memory" if rotate else level_of(n * k)
        ours = ms["qnb"]
        print(f"{f'{m} x {k} x {n}':>18} {level:>9} " + "".join(f"{ms[name]:>16.3f}" for name in PEERS)
              + "".join(f"{ms[name] / ours:>14.2f}" for name in PEERS[1:])
              + f"{2 * m * n * k / ours / 1e6:>9.0f}{n * k / ours / 1e6:>7.1f}{turns:>7}", flush=True)  # fmt: skip


def print_overhead(seconds: float) -> None:
    """Small enough that arithmetic costs nothing: what is left is the way through Python and torch."""
    linear = nn.Linear(64, 64)
    quantized = nn.Sequential(nn.Linear(64, 64))
    qnb.quantize(quantized, "w8a8", progress=False)
    x, rounds = torch.randn(1, 64), 2000
    times: dict[str, list[float]] = {"nn.Linear": [], "w8a8": []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["w8a8"]) < 5:
        for name, layer in (("nn.Linear", linear), ("w8a8", quantized[0])):
            begin = time.perf_counter()
            for _ in range(rounds):
                layer(x)
            times[name].append((time.perf_counter() - begin) / rounds * 1e6)
    plain, ours = (statistics.median(series) for series in times.values())
    print(f"64 x 64 at M = 1: nn.Linear {plain:.2f} us, w8a8 {ours:.2f} us, ratio {ours / plain:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", help="MxKxN,... instead of the usual ones")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    onnxruntime.set_global_thread_pool_sizes(arguments.threads, 1)
    torch.manual_seed(0)
    shapes, few = SHAPES, FEW_ROWS
    if arguments.shapes:
        shapes = [tuple(int(size) for size in shape.split("x")) for shape in arguments.shapes.split(",")]
        few = [shape for shape in shapes if shape[0] <= 8]
    sizes = ", ".join(f"{name} {size >> 10} KiB" for name, size in caches().items()) or "unknown"
    print(f"w8a8 kernel: {kernel_for('linear_w8a8')}; {arguments.threads} threads; torch {torch.__version__}, "
          f"onnxruntime {onnxruntime.__version__}; caches of a core: {sizes}\n")  # fmt: skip
    with torch.inference_mode():
        print("One weight, again and again (a ratio is the peer's time over qnb's):")
        print_rows(shapes, arguments.seconds, rotate=False)
        if few:
            print("\nWeights of more than twice the last-level cache in turn:")
            print_rows(few, arguments.seconds, rotate=True)
        print()
        print_overhead(arguments.seconds)


if __name__ == "__main__":
    main()
