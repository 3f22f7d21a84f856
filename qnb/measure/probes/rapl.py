"""The energy of the processor and its memory, from the counters that Linux shows under powercap (Intel and AMD).

They count the whole package, whoever uses it, in microjoules, and wrap around every few minutes to hours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from qnb.measure.probes import probe
from qnb.measure.probes.counter import CounterProbe

ROOT = Path("/sys/class/powercap")


@probe
class Rapl(CounterProbe):
    """Millijoules of all packages and, where there is a counter, of their memory (dram)."""

    quantity = "energy_mj"
    millijoules = 1e-3

    @classmethod
    def covers(cls, devices: Sequence[torch.device]) -> bool:
        return all(d.type == "cpu" for d in devices)

    @classmethod
    def why_not(cls, devices: Sequence[torch.device]) -> str | None:
        domains = _domains()
        if not domains:
            return f"no energy counters of the processor (RAPL) under {ROOT}, as in most virtual machines"
        try:
            for domain in domains.values():
                _number(domain / "energy_uj")
        except PermissionError:
            return (
                f"reading the processor's energy counters needs a right: sudo chmod a+r {ROOT}/intel-rapl:*/energy_uj"
            )
        except (OSError, ValueError) as error:
            return f"the processor's energy counters cannot be read: {error}"
        return None

    def __init__(self, devices: Sequence[torch.device]) -> None:
        super().__init__(devices)
        self._domains = _domains()
        self._limits = {name: _number(d / "max_energy_range_uj") for name, d in self._domains.items()}
        self.source = f"RAPL {' + '.join(self._domains)}, the whole processor"

    def read(self) -> Mapping[str, float]:
        return {name: _number(domain / "energy_uj") for name, domain in self._domains.items()}

    def wraps(self, name: str) -> float | None:
        return self._limits[name]


def _domains() -> dict[str, Path]:
    """Packages, and dram within them, by a name that is unique; psys holds packages a second time and is left out."""
    found = {}
    for domain in sorted(ROOT.glob("intel-rapl:*")):
        try:
            name = (domain / "name").read_text().strip()
        except OSError:
            continue
        if name.startswith("package"):
            found[name] = domain
        elif name == "dram":
            package = domain.name.split(":")[1]
            found[f"dram-{package}"] = domain
    return found


def _number(file: Path) -> int:
    return int(file.read_text())
