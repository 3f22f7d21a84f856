"""What a monitor costs the model that serves: time with it over time without, in one process, by turns.

    python tests/bench/bench_monitor.py [--scheme w8a8] [--every 200] [--rounds 120]

The demo model serves the same requests over and over: writing token by token, where a pass is shortest and a monitor
weighs most, and reading prompts. Two figures for each:
whole  the ratio of total times over rounds with the monitor and without, in pairs of random order, with the 95 %
       interval of a bootstrap over pairs. Passes that are looked into are few and long, so this is wide.
parts  what a pass costs that is only counted, and one that is looked into, each the median difference to its
       neighbour without a monitor; (counted + looked / every) / pass. This is narrow, and the bar holds for it.
Time is that of the processor spent in the one thread that serves: on a busy machine the clock on the wall measures the
others. The bar, at the default rate: under 2 %.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import qnb
from qnb.env import describe
from qnb.measure.statistics import quantile

RESAMPLES = 2000
BAR = 0.02


class Switch:
    """Takes a monitor off its model and puts it back, so that what it has gathered goes on."""

    def __init__(self, model: nn.Module) -> None:
        self._hooks = [(d, dict(d)) for d in (model._forward_pre_hooks, model._forward_hooks)]

    def __call__(self, on: bool) -> None:
        for dictionary, hooks in self._hooks:
            dictionary.update(hooks) if on else dictionary.clear()


def pairs_of(switch: Switch, run: Callable[[], None], rounds: int) -> list[tuple[float, float]]:
    """(seconds with, seconds without) of each round."""
    draw, pairs = random.Random(0), []
    for _ in range(rounds):
        seconds = {}
        for on in draw.sample((True, False), 2):
            switch(on)
            began = time.thread_time()
            run()
            seconds[on] = time.thread_time() - began
        pairs.append((seconds[True], seconds[False]))
    return pairs


def ratio(pairs: list[tuple[float, float]]) -> float:
    return sum(a for a, _ in pairs) / sum(b for _, b in pairs)


def monitored(
    model: nn.Module, fill: Callable[[], None], run: Callable[[], None], every: int, rounds: int
) -> list[tuple[float, float]]:
    """Rounds under a monitor whose baseline and window are full: what it costs once it has been running for a while."""
    watch = qnb.monitor(model, every=1, window=256, baseline=qnb.demo_texts("calibration")[:2])
    for _ in range(8):
        fill()
    assert watch.rows[0].psi is not None
    watch._every, watch._countdown = every, random.Random(1).randint(1, every)
    pairs = pairs_of(Switch(model), run, rounds)
    watch.stop()
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--scheme", default="w8a8", help="what the model runs in (%(default)s)")
    parser.add_argument("--every", type=int, default=200, help="one pass in so many is looked into (%(default)s)")
    parser.add_argument("--rounds", type=int, default=120, help="pairs of rounds (%(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = qnb.demo_lm()
    qnb.quantize(model, given.scheme, progress=False)
    ids = tokenizer(qnb.demo_texts("evaluation")[0], return_tensors="pt").input_ids[:, :128]

    def write_one() -> None:
        model(input_ids=ids[:, :1], use_cache=False)

    def read() -> None:
        model(input_ids=ids, use_cache=False)

    def write() -> None:
        model.generate(ids[:, :16], attention_mask=torch.ones_like(ids[:, :16]), max_new_tokens=50, do_sample=False)

    def read_many() -> None:
        for _ in range(5):
            read()

    about = describe()
    print(f"{about['cpu']}, 1 thread, torch {about['torch']}, {given.scheme}, every={given.every}")
    broken = False
    with torch.no_grad():
        for title, one, many, often in (
            ("writing, 1 token a pass", write_one, write, 20),
            ("reading, 128 tokens", read, read_many, 5),
        ):
            one(), many()
            counted = monitored(model, read, one, 10**9, often * given.rounds)
            looked = monitored(model, read, one, 1, 2 * given.rounds)
            bare = statistics.median(b for _, b in counted)
            of_counted = statistics.median(a - b for a, b in counted)
            of_looked = statistics.median(a - b for a, b in looked)
            parts = (of_counted + of_looked / given.every) / bare
            whole = monitored(model, read, many, given.every, given.rounds)
            draw = random.Random(0)
            again = [ratio(draw.choices(whole, k=len(whole))) - 1 for _ in range(RESAMPLES)]
            low, high = quantile(again, 0.025), quantile(again, 0.975)
            print(f"{title}: a pass takes {1000 * bare:.2f} ms")
            print(f"  parts: +{1e6 * of_counted:.0f} us counted, +{1000 * of_looked:.2f} ms looked into: {parts:+.2%}")
            print(f"  whole: {ratio(whole) - 1:+.2%} (95 %: {low:+.2%} to {high:+.2%})")
            broken |= parts >= BAR
    print(f"the bar, under {BAR:.0%}: {'BROKEN' if broken else 'held'}")
    raise SystemExit(broken)


if __name__ == "__main__":
    main()
