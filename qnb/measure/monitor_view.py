"""The live view of a monitor below a notebook's cell."""

from __future__ import annotations

import time

from qnb.errors import BadInput
from qnb.measure.monitor_report import MonitorReport


class View:
    """A report below a cell, that is replaced by later ones."""

    def __init__(self, report: MonitorReport, seconds: float) -> None:
        try:
            from IPython import get_ipython
            from IPython.display import display
        except ImportError:
            get_ipython = display = None
        if get_ipython is None or get_ipython() is None:
            raise BadInput("a live view needs IPython, which does not run here: print the monitor instead")
        self._seconds, self._shown = seconds, time.perf_counter()
        self._handle = display(report, display_id=True)

    def due(self) -> bool:
        """Whether the last view is old enough."""
        return time.perf_counter() - self._shown >= self._seconds

    def show(self, report: MonitorReport) -> None:
        """Puts the report in the place of the last one."""
        self._shown = time.perf_counter()
        if self._handle is not None:
            self._handle.update(report)
