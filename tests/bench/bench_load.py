"""Peak memory of quantizing while loading, against loading first: `python tests/bench/bench_load.py [MB]`.

Writes a Llama checkpoint of random weights (bf16, shards of a tenth of it) to a temporary folder, and loads it in a
process of its own each way. VmHWM is the most memory that the process ever held, pages of mapped files among it; what
it held before loading began is taken off. Best: the result plus what one batch of layers needs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCHEME = "w8a8"
WAYS = ("load, then quantize, originals kept", "load, then quantize, keep none", "qnb.from_pretrained")


def write(folder: str, megabytes: int) -> None:
    """A model of about that size whose layers are all alike."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner = 1024, 2816
    block = 2 * (4 * hidden * hidden + 3 * hidden * inner)
    count = max(2, round(megabytes * 1e6 / block))
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=count, vocab_size=4096, num_attention_heads=16
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=f"{max(1, megabytes // 10)}MB")


def peak(way: str, folder: str) -> None:
    """Prints what loading this way needed, in bytes."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401 - imported before the start is read

    import qnb
    from qnb.model.checkpoint import streaming
    from qnb.model.linear import held_storages

    torch.set_num_threads(1)
    before = _status("VmHWM")
    start = time.perf_counter()
    if way == WAYS[2]:
        streaming.BATCH_BYTES = 32 * 2**20  # in proportion to a small checkpoint
        model = qnb.from_pretrained(folder, SCHEME)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        qnb.quantize(model, SCHEME, keep="none" if way == WAYS[1] else "memory", progress=False)
    seconds = time.perf_counter() - start
    held, _ = held_storages(model)
    print(json.dumps({"peak": _status("VmHWM") - before, "held": held, "seconds": seconds}))


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}: this needs Linux")


def main() -> None:
    """Writes, loads each way, prints a table."""
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "--write", folder, str(megabytes)], check=True)
        files = sum(p.stat().st_size for p in Path(folder).glob("*.safetensors"))
        print(f"checkpoint {files / 1e6:.0f} MB (bf16), {SCHEME}")
        print(f"{'way':40} {'peak MB':>8} {'result MB':>10} {'peak / result':>14} {'s':>6}")
        for way in WAYS:
            done = subprocess.run([sys.executable, __file__, "--peak", way, folder], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            got = json.loads(done.stdout.splitlines()[-1])
            numbers = got["peak"] / 1e6, got["held"] / 1e6, got["peak"] / got["held"], got["seconds"]
            print(f"{way:40} {numbers[0]:8.0f} {numbers[1]:10.0f} {numbers[2]:14.2f} {numbers[3]:6.1f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1:2] == ["--peak"]:
        peak(sys.argv[2], sys.argv[3])
    else:
        main()
