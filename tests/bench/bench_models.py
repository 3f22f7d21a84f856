"""Whole models: what of the possible speed-up is reached at prefill, and what decoding costs.

    python tests/bench/bench_models.py [--models demo-float32 llama-bfloat16] [--repeat 7] [--threads 2]

Prefill of 512 tokens, one sequence, last logits only. A model spends the share s of its time in the linear layers that
get quantized; if those become r times as fast, the whole can become at most 1 / (1 - s + s / r) times as fast. The
benchmark measures s and r, and beside them the speed-up of the whole: the bar is 0.85 of the limit.

- s and r come from timers around each of those layers (forward hooks), in the original and in the quantized model. The
  time that a pair of hooks adds to its own reading is measured on an empty module and subtracted, and is printed.
- The speed-up comes from runs without timers.
- Original and quantized take turns within each round (A B, then the next round B A), so that a slow spell of the
  machine meets both; all figures are medians over rounds.

Decoding: tokens a second of greedy steps with a key-value cache, original against w8a8 and w8a16, interleaved alike.

The Llama shape (hidden 2048, intermediate 5504, 4 blocks, 16 heads, vocabulary 32,000) has random weights: its time is
real, its words mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from import_time import load_ext_ms
from torch import nn

import qnb
from qnb.env import describe

PREFILL_TOKENS = 512
PROMPT_TOKENS = 64
DECODE_TOKENS = 48
BAR = 0.85


def demo_model(dtype: torch.dtype) -> nn.Module:
    return qnb.demo_lm(dtype)[0]


def llama_shape(dtype: torch.dtype) -> nn.Module:
    """A Llama of hidden size 2048 with 4 blocks and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=32_000,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "demo-float32": lambda: demo_model(torch.float32),
    "demo-bfloat16": lambda: demo_model(torch.bfloat16),
    "llama-float32": lambda: llama_shape(torch.float32),
    "llama-bfloat16": lambda: llama_shape(torch.bfloat16),
}


def tokens_for(model: nn.Module, count: int) -> torch.Tensor:
    """(1, count) token numbers: the first evaluation texts where the model knows them, else random ones."""
    if model.config.vocab_size != 4096:
        return torch.randint(0, model.config.vocab_size, (1, count), generator=torch.Generator().manual_seed(0))
    _, tokenizer = qnb.demo_lm()
    text = "".join(qnb.demo_texts("evaluation")[:3])
    return torch.tensor([tokenizer(text, truncation=True, max_length=count).input_ids])


def prefill(model: nn.Module, tokens: torch.Tensor) -> float:
    """Seconds of one forward over the whole prompt."""
    start = time.perf_counter()
    model(input_ids=tokens, use_cache=False, logits_to_keep=1)
    return time.perf_counter() - start


class LayerTimers:
    """Sums the time inside the given modules, by forward hooks, less what the hooks themselves add."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0
        self._entered = 0.0
        self.overhead = self._overhead()

    @contextlib.contextmanager
    def attached(self, modules: list[nn.Module]) -> Iterator[None]:
        """Inside it, the modules carry the hooks."""
        handles = [module.register_forward_pre_hook(self._enter) for module in modules]
        handles += [module.register_forward_hook(self._leave) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self) -> float:
        """Seconds since the last time asked, without the hooks' own."""
        seconds = self.seconds - self.calls * self.overhead
        self.seconds, self.calls = 0.0, 0
        return seconds

    def _enter(self, module: nn.Module, inputs: object) -> None:
        self._entered = time.perf_counter()

    def _leave(self, module: nn.Module, inputs: object, output: object) -> None:
        self.seconds += time.perf_counter() - self._entered
        self.calls += 1

    def _overhead(self) -> float:
        """Seconds that one pair of hooks reads around a module that does nothing."""
        empty, x = nn.Identity(), torch.zeros(1)
        readings = []
        with self.attached([empty]):
            for _ in range(2000):
                empty(x)
                readings.append(self.seconds)
                self.seconds = 0.0
        self.calls = 0
        return statistics.median(readings)


def rounds(repeat: int, names: list[str]) -> Iterator[list[str]]:
    """`repeat` times the names, forwards and backwards in turn."""
    for number in range(repeat):
        yield names if number % 2 == 0 else names[::-1]


@torch.inference_mode()
def bench_prefill(name: str, repeat: int) -> None:
    original = MODELS[name]()
    quantized = copy.deepcopy(original)
    report = qnb.quantize(quantized, "w8a8", keep="none", progress=False)
    changed = [row.name for row in report.rows if row.skipped is None]
    models = {"original": original, "w8a8": quantized}
    tokens = tokens_for(original, PREFILL_TOKENS)
    timers = LayerTimers()
    whole: dict[str, list[float]] = {key: [] for key in models}
    timed: dict[str, list[float]] = {key: [] for key in models}
    linear: dict[str, list[float]] = {key: [] for key in models}
    for model in models.values():
        prefill(model, tokens)
    for order in rounds(repeat, list(models)):
        for key in order:
            whole[key].append(prefill(models[key], tokens))
        for key in order:
            with timers.attached([models[key].get_submodule(layer) for layer in changed]):
                timed[key].append(prefill(models[key], tokens))
            linear[key].append(timers.take())

    # Share and layers' speed-up come from the timed runs alone, so both times of a ratio saw the same conditions.
    share = statistics.median(part / total for part, total in zip(linear["original"], timed["original"], strict=True))
    layers = statistics.median(a / b for a, b in zip(linear["original"], linear["w8a8"], strict=True))
    reached = statistics.median(a / b for a, b in zip(whole["original"], whole["w8a8"], strict=True))
    limit = 1 / (1 - share + share / layers)
    kernels = ", ".join(sorted({row.kernel for row in report.rows if row.skipped is None}))
    hooks = statistics.median(timed["original"]) / statistics.median(whole["original"]) - 1
    print(f"{name}, prefill of {tokens.shape[1]} tokens, {len(changed)} layers to w8a8 ({kernels})")
    print(
        f"    original {1e3 * statistics.median(whole['original']):.1f} ms, "
        f"w8a8 {1e3 * statistics.median(whole['w8a8']):.1f} ms; timers: {1e6 * timers.overhead:.1f} us a layer "
        f"subtracted, timed runs {100 * hooks:+.1f} %"
    )
    print(f"    s {share:.3f}   r {layers:.2f}   limit {limit:.3f}   reached {reached:.3f}   ", end="")
    print(f"reached / limit {reached / limit:.3f} (bar {BAR}){'' if reached / limit >= BAR else '  BELOW THE BAR'}")


def decode(model: nn.Module, prompt: torch.Tensor) -> float:
    """Tokens a second of greedy decoding after the prompt, whose own time is not counted."""
    out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    start = time.perf_counter()
    for _ in range(DECODE_TOKENS):
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
    return DECODE_TOKENS / (time.perf_counter() - start)


@torch.inference_mode()
def bench_decode(name: str, repeat: int) -> None:
    original = MODELS[name]()
    models = {"original": original}
    for scheme in ("w8a8", "w8a16"):
        models[scheme] = copy.deepcopy(original)
        qnb.quantize(models[scheme], scheme, keep="none", progress=False)
    prompt = tokens_for(original, PROMPT_TOKENS)
    speeds: dict[str, list[float]] = {key: [] for key in models}
    for model in models.values():
        decode(model, prompt)
    for order in rounds(repeat, list(models)):
        for key in order:
            speeds[key].append(decode(models[key], prompt))
    print(f"{name}, decoding {DECODE_TOKENS} tokens after {PROMPT_TOKENS}")
    for key, values in speeds.items():
        ratios = sorted(value / base for value, base in zip(values, speeds["original"], strict=True))
        quarter = len(ratios) // 4
        print(
            f"    {key:9} {statistics.median(values):7.1f} tokens/s   of the original {statistics.median(ratios):.3f} "
            f"(half of the rounds within {ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of whole models, original against quantized.")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="which (all)")
    parser.add_argument("--repeat", type=int, default=9, help="rounds (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    facts = describe()
    print(
        f"{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}, Python {facts['python']}, "
        f"QNB_ISA {os.environ.get('QNB_ISA', 'not set')}"
    )
    for name in options.models:
        bench_prefill(name, options.repeat)
    for name in options.models:
        if name.startswith("demo"):
            bench_decode(name, options.repeat)
    times = load_ext_ms(5)
    print(f"%load_ext qnb after import torch: median {statistics.median(times):.0f} ms of 5 fresh processes (bar 100)")


if __name__ == "__main__":
    main()
