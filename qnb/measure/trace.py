"""A run as torch's profiler sees it, each linear layer by its name, in a file that Perfetto and TensorBoard open."""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function, schedule

from qnb.errors import BadInput
from qnb.measure.workload import Workload
from qnb.model.hooks import around_forwards
from qnb.model.linear import QLinear
from qnb.model.subject import devices_of, is_compiled
from qnb.results import one_line


def prepare_trace(folder: object) -> Path:
    """The folder, made where it is missing; raises BadInput where no trace could be written into it."""
    if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
        raise BadInput(f"trace={one_line(repr(folder), 60)}: give the folder that the trace is to be written to")
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise BadInput(f"trace={str(path)!r} is no folder and none can be made there: {problem.strerror}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise BadInput(f"trace={str(path)!r} cannot be written to: give a folder of your own")
    if torch.autograd._profiler_enabled():
        raise BadInput(
            "torch's profiler runs already, and there can be one only: leave its block before asking for trace"
        )
    return path


def where_to_open(file: str) -> str:
    """A sentence for results."""
    return (
        f"trace: {file}, for Perfetto (ui.perfetto.dev) or TensorBoard with torch-tb-profiler (qnb's extra tensorboard)"
    )


def write_trace(model: nn.Module, work: Workload, folder: Path) -> Path:
    """Runs the work once under torch's profiler behind one run that warms it up; returns the file. Changes nothing.

    The file is `<worker>.<time>.pt.trace.json`, the name by which TensorBoard's plugin finds traces in a folder, with
    the worker called as torch calls it. A compiled model's layers are not named: hooks would have it compiled anew.
    """
    layers = {} if is_compiled(model) else {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    words = [f"{name} ({m.scheme})" if isinstance(m, QLinear) else name for name, m in layers.items()]
    open_records: list[record_function] = []

    def before(i: int) -> None:
        record = record_function(words[i])
        record.__enter__()
        open_records.append(record)

    def behind(i: int, output: Any) -> None:
        open_records.pop().__exit__(None, None, None)

    worker = re.sub(r"[^\w.-]", "_", f"{socket.gethostname()}_{os.getpid()}")
    file = folder / f"{worker}.{time.time_ns()}.pt.trace.json"
    activities = [ProfilerActivity.CPU]
    if any(device.type == "cuda" for device in devices_of(model)):
        activities.append(ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(
        activities=activities,
        schedule=schedule(wait=0, warmup=1, active=1),
        on_trace_ready=lambda p: p.export_chrome_trace(str(file)),
        acc_events=True,
    )
    with around_forwards(list(layers.values()), before, behind), profiler:
        try:
            for _ in range(2):
                work.run()
                profiler.step()
        finally:
            while open_records:  # of layers that an error left
                behind(0, None)
    return file
