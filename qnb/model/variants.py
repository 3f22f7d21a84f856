"""From original weights, and what calibration saw, to the variants that layers are to run."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor, nn

from qnb import rounding as roundings
from qnb.errors import BadInput, BadWeights
from qnb.model import cache, observers, smoothing
from qnb.model.calibration import gather
from qnb.model.defaults import remembered, remembered_calibration
from qnb.model.linear import QLayer, is_conv1d
from qnb.model.select import Site
from qnb.rounding import Statistics
from qnb.rounding.base import Needs
from qnb.schemes import How, Inputs, Scheme, Variant
from qnb.schemes.blocks import row_absmax
from qnb.schemes.outliers import OutlierVariant


@dataclasses.dataclass(frozen=True)
class Order:
    """What one layer is to become."""

    site: Site
    scheme: Scheme
    how: How

    @property
    def needs(self) -> Needs:
        """What has to be known of the layer's inputs."""
        needs = roundings.find(self.how.rounding, self.scheme).needs
        if needs == "nothing" and (self.scheme.calibrated or self.how.smooth is not None):
            return "inputs"
        return needs


def depends_on_inputs(scheme: Scheme, how: How, given: bool) -> bool:
    """Whether a variant depends on what its layer's inputs were: it has to, or gains by texts that are `given`."""
    rounding = roundings.find(how.rounding, scheme)
    has_to = rounding.needs != "nothing" or scheme.calibrated or how.smooth is not None
    return has_to or (given and (scheme.grid.learns or rounding.uses_inputs))


def refusal(scheme: Scheme, how: How) -> Callable[[Site], str | None]:
    """Says of a layer why it cannot take the scheme in this way; None where it can, and for `none`."""

    def of(site: Site) -> str | None:
        if scheme.grid is None:
            return None
        reason = scheme.why_not(*site.shape)
        if reason is None and site.embedding and (scheme.activation_bits < 16 or scheme.outliers):
            reason = "an embedding multiplies no activations: take one of weights alone, such as w8a16 or w4a16-g64"
        if reason is None and site.embedding and depends_on_inputs(scheme, how, False):
            reason = "an embedding is not calibrated: take a rounding that needs no inputs"
        if reason is None and site.stack is not None and depends_on_inputs(scheme, how, False):
            reason = "an expert of a mixture is not calibrated: take a scheme and a rounding that need no inputs"
        return reason

    return of


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Texts to calibrate on, with their tokenizer; `given` is False where they are what the model came with.

    Whatever is better with statistics, but does without, takes them where texts are given: then somebody asked for it.
    """

    texts: object
    tokenizer: object
    given: bool


def calibration_of(model: nn.Module, texts: object, tokenizer: object) -> Calibration | None:
    """What to calibrate `model` on; None where nothing was given and nothing is known."""
    _, known = remembered(model, tokenizer)
    if isinstance(texts, Iterator):
        texts = list(texts)  # a plan may be made twice
    if texts is not None:
        return Calibration(texts, known, True)
    own = remembered_calibration(model)
    return None if own is None else Calibration(own, known, False)


def check_how(how: How, scheme: Scheme) -> None:
    """Raises `UnknownRounding` or BadInput for a way of choosing codes that does not exist or does not fit."""
    roundings.find(how.rounding, scheme)
    observers.find(how.observer)
    if scheme.grid is not None and not scheme.static and how.observer != How.observer:
        raise BadInput(
            f"observer={how.observer!r} fixes the range of activations, but scheme {scheme.name} fixes none: take a "
            "-static scheme, such as w8a8-static, or leave it out"
        )
    smoothing.check(how.smooth, how.rounding)
    if not isinstance(how.seed, int) or isinstance(how.seed, bool):
        raise BadInput(f"seed={how.seed!r}: give a whole number")


def make(
    model: nn.Module,
    orders: Sequence[Order],
    sites: Sequence[Site],
    calibration: Calibration | None,
    step: Callable[[int], None],
) -> Iterator[tuple[Site, Variant]]:
    """Yields the variant of each order; those that need calibration block by block. Nothing in `model` changes.

    `step(n)` is called with how many units of work have been done. Layers that share a weight share the variant, unless
    it depends on their inputs. Raises `BadWeights`, or BadInput where calibration is needed and there is none.
    """
    shared: dict[tuple, Variant] = {}
    calibrated: list[Order] = []
    for order in orders:
        given = calibration is not None and calibration.given and order.site.stack is None and not order.site.embedding
        if depends_on_inputs(order.scheme, order.how, given):
            calibrated.append(order)
            continue
        # All that decides the variant's bits, besides the weight. One that depends on its inputs is decided by all
        # that lies before it as well, and is never looked up.
        rounding = roundings.find(order.how.rounding, order.scheme)
        recipe = order.scheme, order.how, rounding, is_conv1d(order.site.source), _device_of(order.site)
        key = id(order.site.weight), recipe
        if key not in shared:
            shared[key] = cache.find(order.site.weight, recipe) or _remembered(order, None, recipe)
        yield order.site, shared[key]
        step(1)
    if not calibrated:
        return
    if calibration is None:
        raise BadInput(
            f"{_what_needs(calibrated[0])} needs calibration: pass calibration=, a list of strings with tokenizer=, or "
            "an iterable of model inputs"
        )
    wanted = {o.site.name: "inputs" if o.needs == "nothing" else o.needs for o in calibrated}
    by_site = {id(o.site): o for o in calibrated}
    for site, statistics in gather(model, wanted, sites, calibration.texts, calibration.tokenizer):
        yield site, _remembered(by_site[id(site)], statistics, None)
        step(1)


def _device_of(site: Site) -> torch.device:
    """Where the variant is to lie: where the layer computes, which is not where a GPU's original is kept."""
    return site.module.device if isinstance(site.module, QLayer) else site.weight.device


def _remembered(order: Order, statistics: Statistics | None, recipe: Hashable | None) -> Variant:
    variant, device = _variant(order, statistics), _device_of(order.site)
    if any(tensor.device != device for tensor in variant.tensors().values()):
        variant = variant.to(device)
    if recipe is not None:
        cache.remember(order.site.weight, recipe, variant)
    return variant


def _what_needs(order: Order) -> str:
    if order.scheme.calibrated:
        return f"scheme {order.scheme.name}"
    if order.how.smooth is not None:
        return f"smooth={order.how.smooth!r}"
    return f"rounding {order.how.rounding!r}"


def _variant(order: Order, statistics: Statistics | None) -> Variant:
    name, weight, scheme = order.site.name, order.site.matrix.detach(), order.scheme
    if not weight.is_meta:
        weight = weight.to(_device_of(order.site))
    if weight.is_meta:
        raise BadWeights(f"layer {name} is on the meta device, without values: load its weights first")
    # Tensors made in inference mode could never be saved for a gradient. Entered only then: an interrupt at the very
    # edge of such a block can leave torch's mode switched.
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
        if weight.is_inference():
            weight = weight.clone()  # of which blocks can be taken
        if not row_absmax(weight).isfinite().all():
            bad = int((~weight.isfinite()).sum())
            raise BadWeights(
                f"layer {name} has {bad} NaN or infinite weights: mend them, or leave it out with skip={name!r}"
            )
        if statistics is not None and not (statistics.low.isfinite().all() and statistics.high.isfinite().all()):
            raise BadInput(
                f"the calibration texts make NaN or infinite inputs of layer {name}: give other texts, or leave it "
                f"out with skip={name!r}"
            )
        try:
            return build(weight, scheme, order.how, statistics)
        except BadInput as problem:
            raise BadInput(f"layer {name}: {problem}") from None


def build(weight: Tensor, scheme: Scheme, how: How, statistics: Statistics | None) -> Variant:
    """The variant of a weight (N, K) in a scheme; `statistics` of its inputs where anything asks."""
    if not scheme.outliers:
        return _coded(weight, scheme, how, statistics)
    channels = statistics.absmax.topk(min(scheme.outliers, weight.shape[1])).indices.sort().values
    kept = weight.index_select(1, channels)
    base = _coded(weight.index_fill(1, channels, 0), scheme, how, statistics.without(channels))
    return OutlierVariant(base, channels, kept)


def _coded(weight: Tensor, scheme: Scheme, how: How, statistics: Statistics | None) -> Variant:
    dtype = weight.dtype
    if how.smooth is None:
        # `nearest` widens a few rows at a time; a float copy of the whole weight would be most of what it takes.
        return _divided(weight if how.rounding == "nearest" else weight.float(), dtype, scheme, how, statistics, None)
    weight = weight.float()
    if how.smooth != "auto":
        divisor = smoothing.divisor(weight, statistics.absmax, float(how.smooth))
        return _divided(weight, dtype, scheme, how, statistics, divisor)
    quick = dataclasses.replace(how, rounding="nearest")

    def outputs(divisor: Tensor | None) -> Tensor:
        return _divided(weight, dtype, scheme, quick, statistics, divisor).linear(statistics.sample, None)

    divisor, note = smoothing.best_divisor(weight, statistics, outputs)
    return _divided(weight, dtype, scheme, how, statistics, divisor, note)


def _divided(
    weight: Tensor,
    dtype: torch.dtype,
    scheme: Scheme,
    how: How,
    statistics: Statistics | None,
    divisor: Tensor | None,
    note: str | None = None,
) -> Variant:
    """The variant of `weight` (N, K) whose inputs are divided by `divisor`, its scales in `dtype`."""
    if divisor is not None:
        weight, statistics = weight * divisor, statistics.divided(divisor)
    rounded = roundings.find(how.rounding, scheme).choose(weight, scheme.grid, dtype, statistics)
    if rounded.divisor is not None:  # never beside one for smoothing, which such a rounding refuses
        divisor, statistics = rounded.divisor, statistics.divided(rounded.divisor)
    scale, zero = None, 0
    if scheme.static:
        scale, zero = observers.fixed_scale(how.observer, statistics, scheme.aasym)
    notes = "; ".join(filter(None, (note, rounded.note))) or None
    return scheme.variant(dataclasses.replace(rounded, note=notes), how, Inputs(divisor, scale, zero))
