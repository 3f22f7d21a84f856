"""Meters. Each file here is one; a new meter is one new file.

A meter derives from `Probe`, names the `quantity` it reads and registers itself with `@probe`. `choose` takes, for a
quantity and the devices that a model lies on, the meter that covers them; where none can, a `Missing` that says why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from typing import ClassVar, TypeVar

import torch

QUANTITIES = ("latency_ms", "peak_host_bytes", "peak_cuda_bytes", "energy_mj")


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a meter read between start and stop.

    value   in the unit that the quantity's name ends in; None where it could not be read, and `reason` says why
    source  the meter, in words
    steps   how often the counter behind the value moved within the window, for meters that read a counter
    spread  half-width of what the value leaves open because its counter moves in steps, in the value's unit
    notes   what a reader should know, such as a second meter that disagrees
    """

    value: float | None
    source: str
    reason: str | None = None
    steps: int | None = None
    spread: float | None = None
    notes: tuple[str, ...] = ()


class Probe:
    """One meter for one window: `start()`, then what is to be measured, then `stop()`; never used twice.

    quantity  one of QUANTITIES
    order     where several meters cover the same devices the lowest is asked first
    """

    quantity: str
    order: ClassVar[int] = 50

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = list(devices)

    @classmethod
    def covers(cls, devices: Sequence[torch.device]) -> bool:
        """Whether this is the meter for a model on these devices, working or not."""
        raise NotImplementedError

    @classmethod
    def why_not(cls, devices: Sequence[torch.device]) -> str | None:
        """Why it cannot read here, with the command that would grant it where there is one; None where it can."""
        return None

    def start(self) -> None:
        """Begins the window."""
        raise NotImplementedError

    def enough(self) -> bool:
        """Whether the window is long enough for a reading; asked while it runs."""
        return True

    def stop(self) -> Reading:
        """Ends the window."""
        raise NotImplementedError


class Missing(Probe):
    """Stands where no meter can read: it says why."""

    def __init__(self, quantity: str, reason: str) -> None:
        super().__init__(())
        self.quantity = quantity
        self.reason = reason

    def start(self) -> None:
        """Nothing to begin."""

    def stop(self) -> Reading:
        """No value, and the reason."""
        return Reading(None, "none", reason=self.reason)


_P = TypeVar("_P", bound=type[Probe])
_registered: list[type[Probe]] = []
_replacements: dict[str, type[Probe]] = {}


def probe(cls: _P) -> _P:
    """Registers a meter."""
    if cls.quantity not in QUANTITIES:
        raise ValueError(f"{cls.__name__} reads {cls.quantity!r}: a meter reads one of {', '.join(QUANTITIES)}")
    _registered.append(cls)
    return cls


def choose(quantity: str, devices: Sequence[torch.device]) -> Probe:
    """A fresh meter of the quantity for a model on these devices."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    if quantity in _replacements:
        return _replacements[quantity](devices)
    reason = f"no meter for {' and '.join(sorted({d.type for d in devices}))} devices"
    for kind in sorted((p for p in _registered if p.quantity == quantity), key=lambda p: p.order):
        if not kind.covers(devices):
            continue
        reason = kind.why_not(devices)
        # The next one in order may answer. covers() keeps meters apart that mean different things: the energy of a
        # GPU is never answered by the processor's counter.
        if reason is None:
            return kind(devices)
    return Missing(quantity, reason)


@contextlib.contextmanager
def using(quantity: str, meter: type[Probe]) -> Iterator[None]:
    """Inside it `choose` gives this meter for the quantity: for replayed measurements and for meters of one's own."""
    before = _replacements.get(quantity)
    _replacements[quantity] = meter
    try:
        yield
    finally:
        if before is None:
            _replacements.pop(quantity, None)
        else:
            _replacements[quantity] = before


@contextlib.contextmanager
def window(meters: Sequence[Probe]) -> Iterator[dict[str, Reading]]:
    """Starts the meters, and stops them when the block ends, also by an exception; the readings appear then."""
    readings: dict[str, Reading] = {}
    started: list[Probe] = []
    try:
        for meter in meters:
            started.append(meter)
            meter.start()
        yield readings
    finally:
        for meter in reversed(started):
            readings[meter.quantity] = meter.stop()
