"""A recorded counter in place of a real one: whole measurements run, and are tested, where there is no meter.

The recording is a CSV with the header `time,value`: seconds from any origin, and the counter in millijoules at that
moment. Between two lines the counter stands still, as real ones do.
"""

from __future__ import annotations

import bisect
import csv
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from qnb.errors import BadInput
from qnb.measure.probes import Probe
from qnb.measure.probes.counter import CounterProbe


def replay(file: str | Path, clock: Callable[[], float] | None = None) -> type[Probe]:
    """A meter of energy that answers from the recording: `with probes.using("energy_mj", replay(file)): ...`.

    clock  gives the seconds at which the recording is read, the first call its first line; by default real time.
           With a clock of its own nothing is polled between the calls, so that every run gives the same reading.
    Raises BadInput for a file that is no such recording.
    """
    times, values = _recording(Path(file))
    tick, interval = (time.perf_counter, CounterProbe.interval_s) if clock is None else (clock, None)
    origin: list[float] = []  # one origin for all windows: a counter goes on between them

    class Replay(CounterProbe):
        quantity = "energy_mj"
        source = f"replay of {Path(file).name}"
        interval_s = interval

        @classmethod
        def covers(cls, devices: Sequence[torch.device]) -> bool:
            return True

        def clock(self) -> float:
            now = tick()
            if not origin:
                origin.append(now)
            return now - origin[0] + times[0]

        def read(self) -> Mapping[str, float]:
            return {"recorded counter": values[bisect.bisect_right(times, self.clock()) - 1]}

    return Replay


def _recording(file: Path) -> tuple[list[float], list[float]]:
    with file.open(newline="") as lines:
        reader = csv.DictReader(lines)
        if reader.fieldnames is None or not {"time", "value"} <= set(reader.fieldnames):
            raise BadInput(
                f"{file.name} has the columns {reader.fieldnames}: a recording has the columns time and value"
            )
        try:
            rows = [(float(row["time"]), float(row["value"])) for row in reader]
        except (TypeError, ValueError) as error:
            raise BadInput(f"{file.name} line {reader.line_num}: {error}; a recording holds numbers only") from error
    if not rows or any(a[0] >= b[0] for a, b in zip(rows, rows[1:], strict=False)):
        raise BadInput(f"{file.name} has {len(rows)} lines: a recording has at least one, and its times grow")
    return [t for t, _ in rows], [v for _, v in rows]
