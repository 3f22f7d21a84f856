"""How long `%load_ext qnb` takes in a Python that has torch and a shell already.

    python tests/bench/import_time.py [--repeat 5]

Each measurement is a fresh process. The bar: a median under 100 ms.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

MEASURE = """
import time
import torch
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
start = time.perf_counter()
shell.run_line_magic("load_ext", "qnb")
print(1e3 * (time.perf_counter() - start))
"""


def load_ext_ms(repeat: int) -> list[float]:
    """Milliseconds that `%load_ext qnb` took, one for each of `repeat` fresh processes, ascending."""
    times = []
    for _ in range(repeat):
        done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
        times.append(float(done.stdout.splitlines()[-1]))
    return sorted(times)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times %%load_ext qnb after import torch, in fresh processes.")
    parser.add_argument("--repeat", type=int, default=5, help="fresh processes (%(default)s)")
    times = load_ext_ms(parser.parse_args().repeat)
    print(
        f"%load_ext qnb after import torch: median {statistics.median(times):.0f} ms "
        f"({times[0]:.0f} to {times[-1]:.0f}, {len(times)} fresh processes; the bar is 100)"
    )


if __name__ == "__main__":
    main()
