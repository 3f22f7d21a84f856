"""A look into one layer: its weights on their grid, the error of each output, and the range of its inputs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qnb.measure.statistics import median
from qnb.measure.token import alone
from qnb.model.hooks import around_forwards, hooked
from qnb.model.inputs import Sample
from qnb.model.linear import QLayer, QLinear, as_matrix, original_pass
from qnb.model.quantize import quantize
from qnb.model.subject import devices_of, measuring_state, synchronize
from qnb.model.trial import Trial, in_variant
from qnb.notebook.panel.evaluation import Evaluation
from qnb.notebook.panel.prefix import block_of, whole
from qnb.schemes.base import Variant

BINS = 64
# An input channel whose largest value is this many times that of the middle channel is named.
OUTLIER = 6.0
_MOST_NAMED = 6


@dataclasses.dataclass(frozen=True)
class Look:
    """What is seen of the layer `name`, which runs in `scheme`.

    channel       the output channel shown: that of the largest error, or of the largest weight where there is no error
    histogram     how many of its original weights lie in each of BINS bins from `low` to `high`
    levels        the values that its weights take now; None for an original layer
    errors        relative error ||now - original|| / ||original|| of each output channel; None without an original
    inputs        the largest magnitude of each input channel on the first text; None where the layer was not called
    calibrated    the magnitude up to which inputs are represented, where the scheme fixed it by calibration
    outliers      (input channel, how many times the middle channel's range), the widest first
    """

    name: str
    scheme: str
    channel: int
    low: float
    high: float
    histogram: tuple[int, ...]
    levels: tuple[float, ...] | None
    errors: tuple[float, ...] | None
    inputs: tuple[float, ...] | None
    calibrated: float | None
    outliers: tuple[tuple[int, float], ...]


def look(model: nn.Module, name: str, sample: Sample, check: Callable[[], None]) -> Look:
    """Looks into the layer; runs the model once on the sample."""
    layer = model.get_submodule(name)
    with alone(model), torch.no_grad():
        original = layer.original if isinstance(layer, QLinear) else layer
        now = layer.variant.dequantize(torch.float32) if isinstance(layer, QLinear) else None
        weight = now if original is None else as_matrix(original).detach().float()
        weight = weight if now is None else weight.to(now.device)
        errors = None if now is None or original is None else _channel_errors(weight, now)
        channel = int(weight.abs().amax(1).argmax() if errors is None else errors.argmax())
        row = weight[channel]
        low, high = row.min().item(), row.max().item()
        # Not torch.histc: it has no bfloat16, and its last bin is open.
        place = ((row - low) / max(high - low, 1e-30) * BINS).long().clamp_(0, BINS - 1)
        histogram = place.bincount(minlength=BINS).tolist()
        levels = None if now is None else now[channel].unique().tolist()
    check()
    inputs = _input_range(model, layer, sample, check)
    return Look(
        name=name,
        scheme=layer.scheme if isinstance(layer, QLinear) else "none",
        channel=channel,
        low=low,
        high=high,
        histogram=tuple(histogram),
        levels=None if levels is None else tuple(levels),
        errors=None if errors is None else tuple(errors.tolist()),
        inputs=None if inputs is None else tuple(inputs.tolist()),
        calibrated=_calibrated(layer),
        outliers=() if inputs is None else _outliers(inputs),
    )


def weight_error(layer: nn.Module) -> float | None:
    """||now - original|| / ||original|| of the layer's weight; 0 for an original, None where that is not kept."""
    if not isinstance(layer, QLinear):
        return 0.0
    if layer.original is None:
        return None
    with torch.no_grad():
        now = layer.variant.dequantize(torch.float32)
        then = as_matrix(layer.original).detach().float().to(now.device)
        norm = then.norm()
        return ((now - then).norm() / norm).item() if norm > 0 else 0.0


def errors(model: nn.Module, names: Sequence[str], check: Callable[[], None]) -> dict[str, float | None]:
    """`weight_error` of each layer."""
    found = {}
    for name in names:
        check()
        with alone(model):
            found[name] = weight_error(model.get_submodule(name))
    return found


def times(model: nn.Module, names: Sequence[str], sample: Sample, check: Callable[[], None]) -> dict[str, float]:
    """Milliseconds that each layer takes in a pass of the sample, the median of three; without those not called."""
    devices, began, found = devices_of(model), {}, {name: [] for name in names}

    def before(i: int) -> None:
        synchronize(devices)
        began[i] = time.perf_counter()

    def behind(i: int, output: Any) -> None:
        synchronize(devices)
        found[names[i]].append(1000 * (time.perf_counter() - began[i]))

    with around_forwards([model.get_submodule(name) for name in names], before, behind):
        for _ in range(3):
            with alone(model), measuring_state(model):
                whole(model, sample, check)
    return {name: median(values) for name, values in found.items() if values}


def sensitivities(
    model: nn.Module, names: Sequence[str], scheme: str, evaluation: Evaluation, check: Callable[[], None]
) -> Iterator[tuple[str, float | None]]:
    """(layer, KL to the original on the first text if that layer alone ran in `scheme`); the model stays as it is."""
    for name in names:
        check()
        layer = model.get_submodule(name)
        original = layer.original if isinstance(layer, QLinear) else layer
        variant = None if original is None else _variant(original, scheme)
        if variant is None:
            yield name, None
            continue
        untouched = not any(isinstance(m, QLayer) for m in model.modules())
        as_if = {layer: in_variant(layer, variant)}
        with alone(model), measuring_state(model), Trial([layer]) as trial, trial.answering(as_if):
            if untouched:
                yield name, evaluation.kl_of_trial(block_of(model, layer), check)
            else:
                with original_pass():
                    found = evaluation.kl_of_trial(None, check)
                yield name, found


def _variant(original: nn.Linear, scheme: str) -> Variant | None:
    # In a model of its own, where the layer stands twice for a moment: what it is part of does not change.
    beside = nn.Sequential(original)
    quantize(beside, scheme, layers="0", progress=False)
    return beside[0].variant if isinstance(beside[0], QLinear) else None


def _channel_errors(then: Tensor, now: Tensor) -> Tensor:
    norm = then.norm(dim=1)
    return (now - then).norm(dim=1) / norm.where(norm > 0, 1)


def _input_range(model: nn.Module, layer: nn.Module, sample: Sample, check: Callable[[], None]) -> Tensor | None:
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if args[0].numel():
            seen.append(args[0].detach().abs().flatten(0, -2).amax(0).float().cpu())

    with hooked([(layer, note)]), alone(model), measuring_state(model):
        whole(model, sample, check)
    return torch.stack(seen).amax(0) if seen else None


def _outliers(inputs: Tensor) -> tuple[tuple[int, float], ...]:
    middle = inputs.median().item()
    if middle <= 0:
        return ()
    ratios = inputs / middle
    order = ratios.argsort(descending=True)[:_MOST_NAMED].tolist()
    return tuple((c, ratios[c].item()) for c in order if ratios[c] >= OUTLIER)


def _calibrated(layer: nn.Module) -> float | None:
    """The largest magnitude that a fixed activation scale represents."""
    inputs = getattr(layer.variant, "inputs", None) if isinstance(layer, QLinear) else None
    return None if inputs is None or inputs.scale is None else 127 * inputs.scale
