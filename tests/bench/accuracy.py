"""Holds the kernels' accuracy against a computation that shares nothing with them.

    python tests/bench/accuracy.py [--texts 64] [--roundings]

For each scheme, KL(original || quantized) on the demo model's evaluation texts, computed twice:

- fake: this script quantizes and dequantizes weights and activations in float64, from the definitions below, and
  multiplies them as float64 matrices. It uses nothing of qnb but the model and the texts.
- kernels: `qnb.quantize` and `qnb.evaluate` on the float32 model, as a user runs them.

The fake side runs its whole model in float64, on purpose. So its KL is what the scheme itself costs, free of rounding
noise, and every inexactness of the other side (float32 scales and epilogues, float32 attention, a wrong code) counts in
the ratio. RMS norms and rotary angles are float32 on both sides: the architecture computes them so in any dtype.

Two figures say how far the ratio can be trusted. "float32 without quantization" is the KL that float32 alone brings: it
must be small beside the others. And the fake quantization is repeated in float32: where activations are quantized, the
last bit of a float decides codes that lie half-way, those change the codes of all later blocks, and two correct
computations end with different answers. Their KLs agree in the mean only, which takes many texts: with 16 of them
float32 alone moves that of w8a8 by 1 %.

Definitions, every Linear but the output embedding:
    weight, per output row:          scale = max |w| / 127, code = round half to even (w / scale)
    activation (w8a8), per row:      scale = max |x| / 127, code = round half to even (x / scale)
A row of zeros has the codes zero.

With --roundings it instead prints KL of schemes and roundings, calibrated on 32 texts, through `qnb.quantize` and
`qnb.evaluate`: each as a share of a baseline's, with a 95 % interval over texts (paired: t interval of the difference
of KL), beside the share that a plain float32 script of the same method reached on the same texts; and the KL of plain
schemes beside that of such a script. It takes a while.

Exit status 1 if a KL lies outside 1 +- 0.02 of the other side's, or a rounding's whole interval above its bar.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

import qnb
from qnb.measure.statistics import student_95

TOLERANCE = 0.02
QUANTIZES_ACTIVATIONS = {"w8a8": True, "w8a16": False}
ROWS = 2  # texts computed at once
CALIBRATION_TEXTS = 32


class Row(NamedTuple):
    """A line of the table of roundings.

    how         what `quantize` is given besides
    calibrated  whether with calibration texts
    against     the scheme whose first row is the baseline
    bar         for KL / baseline: what a plain float32 script of the method reached
    kl          what a plain float32 script of the scheme reached, nats a token
    """

    scheme: str
    how: dict[str, object] = {}  # noqa: RUF012 - never changed
    calibrated: bool = False
    against: str | None = None
    bar: float | None = None
    kl: float | None = None


W4, W3 = "w4a16-g64", "w3a16-g64"
ROUNDINGS = (
    Row("w8a16", kl=0.000088),
    Row("w8a8", kl=0.006778),
    Row("w8a8", {"smooth": 0.5}, True, "w8a8", 0.134),
    Row("w8a8", {"smooth": 0.8}, True, "w8a8", 0.910),
    Row("w8a8", {"smooth": "auto"}, True, "w8a8", 0.134),
    Row("w8a8-static", {}, True),
    Row("w8a8-static", {"observer": "average"}, True, "w8a8-static"),
    Row("w8a8-static", {"observer": "percentile"}, True, "w8a8-static"),
    Row("w8a8-static", {"observer": "mse"}, True, "w8a8-static"),
    Row("w8a8-static", {"observer": "entropy"}, True, "w8a8-static"),
    Row(W4, kl=0.017207),
    Row(W4, {"rounding": "mse"}, False, W4, 0.896),
    Row(W4, {"rounding": "mse"}, True, W4, 0.819),
    Row(W4, {"rounding": "awq"}, True, W4, 0.9),
    Row(W4, {"rounding": "gptq"}, True, W4, 0.565),
    Row("nf4-g64", {}, False, W4, 0.750),
    Row("nf4-g64", {"rounding": "gptq"}, True, W4),
    Row("kmeans4-g64", {}, False, W4, 0.751),
    Row("kmeans4-g64", {}, True, W4, 0.714),
    Row("w4a16-g64-asym", {}, False, W4, 0.754, 0.012980),
    Row("w4a16-g64-asym", {"rounding": "hqq"}, False, "w4a16-g64-asym", 0.875),
    Row("w4a16-g32", kl=0.015216),
    Row("w4a16-g32-asym", kl=0.010106),
    Row(W3, kl=0.082794),
    Row(W3, {"rounding": "mse"}, False, W3, 0.878),
    Row(W3, {"rounding": "mse"}, True, W3, 0.744),
    Row(W3, {"rounding": "awq"}, True, W3, 0.958),
    Row(W3, {"rounding": "gptq"}, True, W3, 0.554),
    Row("kmeans3-g64", {}, False, W3, 0.667),
    Row("kmeans3-g64", {}, True, W3, 0.641),
    Row("w3a16-g64-asym", kl=0.060266),
    Row("w3a16-g64-asym", {"rounding": "hqq"}, False, "w3a16-g64-asym", 0.917),
    Row("w3a16-g32", kl=0.070220),
    Row("w3a16-g32-asym", kl=0.046353),
    Row("w2a16-g32", kl=0.501105),
    Row("w2a16-g32-asym", kl=0.333078),
)


def fake_quantize(x: Tensor) -> Tensor:
    """`x` as symmetric 8-bit codes over its last axis and back, in its own dtype."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    codes = torch.round(x / torch.where(scale > 0, scale, 1))
    return codes * scale


class FakeLinear(nn.Module):
    """A Linear with fake-quantized weights, and fake-quantized inputs where `activations`."""

    def __init__(self, linear: nn.Linear, activations: bool) -> None:
        super().__init__()
        self.weight = fake_quantize(linear.weight.detach())
        self.bias = linear.bias
        self.activations = activations

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(fake_quantize(x) if self.activations else x, self.weight, self.bias)


def fake_quantized(model: nn.Module, activations: bool) -> nn.Module:
    """A copy of `model` in which every Linear but the output embedding is a FakeLinear."""
    model = copy.deepcopy(model)
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    for name in linears:
        module = model.get_submodule(name)
        if module is not model.get_output_embeddings():
            model.set_submodule(name, FakeLinear(module, activations))
    return model


def log_probabilities(model: nn.Module, batch: Tensor) -> Tensor:
    """(texts, predicted tokens, vocabulary) in float64."""
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
    return logits.double().log_softmax(-1)


def kl_by_text(original: Tensor, changed: Tensor) -> list[float]:
    """Mean over a text's tokens of KL(original || changed), in nats."""
    return (original.exp() * (original - changed)).sum(-1).mean(-1).tolist()


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean, and its standard error with each text as one observation."""
    mean = math.fsum(values) / len(values)
    spread = math.fsum((v - mean) ** 2 for v in values)
    return mean, math.sqrt(spread / max(1, len(values) - 1) / len(values))


@torch.inference_mode()
def fake_kls(rows: Tensor) -> dict[tuple[str, torch.dtype], tuple[float, float]]:
    """(scheme, dtype of the computation) -> KL and its standard error; the scheme "none" is the unquantized model."""
    exact, _ = qnb.demo_lm(torch.float64)
    changed = {("none", torch.float32): qnb.demo_lm(torch.float32)[0]}
    for scheme, activations in QUANTIZES_ACTIVATIONS.items():
        changed[scheme, torch.float64] = fake_quantized(exact, activations)
        changed[scheme, torch.float32] = fake_quantized(changed["none", torch.float32], activations)
    kls: dict[tuple[str, torch.dtype], list[float]] = {key: [] for key in changed}
    for batch in rows.split(ROWS):
        original = log_probabilities(exact, batch)
        for key, model in changed.items():
            kls[key] += kl_by_text(original, log_probabilities(model, batch))
    return {key: mean_and_error(values) for key, values in kls.items()}


def kernel_kls(texts: list[str]) -> dict[str, tuple[float, float, str]]:
    """Scheme -> KL, its standard error and the kernels that ran, through qnb."""
    model, tokenizer = qnb.demo_lm(torch.float32)
    result = {}
    for scheme in QUANTIZES_ACTIVATIONS:
        report = qnb.quantize(model, scheme, progress=False)
        accuracy = qnb.evaluate(model, texts, tokenizer, progress=False)
        kernels = ", ".join(sorted({row.kernel for row in report.rows if row.skipped is None}))
        result[scheme] = accuracy.kl, accuracy.kl_se, kernels
        qnb.restore(model)
    return result


def rounding_table(texts: list[str]) -> int:
    """Prints a line for each of ROUNDINGS; returns how many missed what they are held to."""
    model, tokenizer = qnb.demo_lm(torch.float32)
    calibration = qnb.demo_texts("calibration")[:CALIBRATION_TEXTS]
    print(f"KL(original || quantized), nats, {len(texts)} texts; {CALIBRATION_TEXTS} calibration texts")
    heads = f"{'KL':>22} {'script':>9} {'KL / baseline (95 %)':>24} {'bar':>6} {'seconds':>8}"
    print(f"{'scheme':16} {'how':20} {'texts':>5} {heads}")
    first: dict[str, Tensor] = {}
    missed = 0
    for row in ROUNDINGS:
        start = time.perf_counter()
        given = {"calibration": calibration, "tokenizer": tokenizer} if row.calibrated else {}
        qnb.quantize(model, row.scheme, progress=False, **row.how, **given)
        seconds = time.perf_counter() - start
        accuracy = qnb.evaluate(model, texts, tokenizer, progress=False)
        qnb.restore(model)
        kl = torch.tensor([text.kl / text.tokens for text in accuracy._per_text], dtype=torch.float64)
        first.setdefault(row.scheme, kl)
        mean, se = mean_and_error(kl.tolist())
        share, verdicts = "", []
        if row.kl is not None:
            within = abs(mean / row.kl - 1) <= TOLERANCE
            verdicts.append(f"{100 * (mean / row.kl - 1):+.1f} % of the script: {'met' if within else 'MISSED'}")
            missed += not within
        if row.against is not None:
            ratio, half = share_of(kl, first[row.against])
            share = f"{ratio:.3f} ({ratio - half:.3f} to {ratio + half:.3f})"
            if row.bar is not None:
                verdicts.append(verdict(ratio, half, row.bar))
                missed += verdicts[-1] == "MISSED"
        words = ", ".join(f"{key} {value}" for key, value in row.how.items())
        script, bar = (f"{value:.{digits}f}" if value else "" for value, digits in ((row.kl, 6), (row.bar, 3)))
        columns = f"{mean:>10.6f} +- {se:.6f} {script:>9} {share:>24} {bar:>6} {seconds:>8.1f}  {'; '.join(verdicts)}"
        print(f"{row.scheme:16} {words:20} {'given' if row.calibrated else '':>5} {columns}", flush=True)
    return missed


def share_of(kl: Tensor, baseline: Tensor) -> tuple[float, float]:
    """Mean KL over the baseline's, and half its 95 % interval: that of the difference text by text."""
    mean, se = mean_and_error((kl - baseline).tolist())
    base = float(baseline.mean())
    return 1 + mean / base, student_95(len(kl) - 1) * se / base


def verdict(ratio: float, half: float, bar: float) -> str:
    """A method that equals the script's has the bar inside its interval, half of the time on the upper side of it."""
    if ratio <= bar:
        return "met, the interval too" if ratio + half <= bar else "met"
    return f"{100 * (ratio / bar - 1):.1f} % above, within the interval" if ratio - half <= bar else "MISSED"


def main() -> int:
    parser = argparse.ArgumentParser(description="KL of the kernels beside that of a float64 fake quantization.")
    parser.add_argument("--texts", type=int, default=64, help="evaluation texts to use (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (%(default)s)")
    parser.add_argument("--roundings", action="store_true", help="the table of schemes and roundings")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    texts = qnb.demo_texts("evaluation")[: options.texts]
    if options.roundings:
        return 1 if rounding_table(texts) else 0
    _, tokenizer = qnb.demo_lm()
    rows = torch.tensor([tokenizer(text).input_ids for text in texts])
    start = time.perf_counter()
    fake = fake_kls(rows)
    middle = time.perf_counter()
    kernels = kernel_kls(texts)
    end = time.perf_counter()

    print(f"KL(original || quantized), nats, {len(texts)} texts, {rows[:, 1:].numel()} tokens")
    print(f"{'scheme':8} {'fake, float64':>24} {'fake, float32':>24} {'kernels':>24} {'kernels/float64':>16}  kernel")
    outside = []
    for scheme, (kl, error, kernel) in kernels.items():
        expected, witness = fake[scheme, torch.float64], fake[scheme, torch.float32]
        ratio = kl / expected[0]
        columns = "".join(f" {mean:>11.8f} +- {se:.8f}" for mean, se in (expected, witness, (kl, error)))
        print(f"{scheme:8}{columns} {ratio:>16.4f}  {kernel}")
        if not abs(ratio - 1) <= TOLERANCE:  # so that NaN fails
            outside.append(scheme)
    print(f"float32 without quantization: {fake['none', torch.float32][0]:.1e}")
    versions = f"torch {torch.__version__}, {options.threads} threads"
    print(f"{middle - start:.0f} s fake, {end - middle:.0f} s kernels; {versions}")
    if outside:
        print(f"outside 1 +- {TOLERANCE}: {', '.join(outside)}")
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
