"""`doctor`: what this machine has and lacks for qnb, what would grant it, and what each scheme will run on here."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence

import torch

from qnb import env
from qnb.errors import NativeLibraryError
from qnb.measure.probes.nvml import Nvml
from qnb.measure.probes.rapl import Rapl
from qnb.results import Cell, Result, Table, format_bytes, one_line

_PACKAGES = {
    "torch": "the framework itself",
    "transformers": "language models, the demo model",
    "ipython": "the magics",
    "ipywidgets": "widgets and progress bars in notebooks",
    "peft": "LoRA adapters on a quantized model",
    "gguf": "GGUF files",
    "compressed-tensors": "checkpoints for serving engines",
}
# Where a reason ends in what to do about it.
_COMMAND = re.compile(r"^(?P<why>.*?): (?P<command>(?:sudo|pip) .+)$")
# One layer of the usual size: what is asked is which kernel answers, which does not depend on it.
_LAYER = (64, 64)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that qnb can use: whether it is here, in words, and the command that would grant it, where one does."""

    about: str
    here: bool
    words: str
    command: str | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """What answers for a scheme on a device: for many rows of activations at once, and for a single one."""

    scheme: str
    device: str
    op: str | None
    many_rows: str
    one_row: str


@dataclasses.dataclass(frozen=True, repr=False)
class Diagnosis(Result):
    """What this machine has and lacks (`rows`), what each scheme runs on here (`schemes`), and what to know of it."""

    rows: tuple[Finding, ...]
    schemes: tuple[Answer, ...]
    notes: tuple[str, ...] = ()

    def _tables(self) -> Sequence[Table]:
        found = [(r.about, Cell("yes", "good") if r.here else Cell("no", "muted"), r.words) for r in self.rows]
        answers = [
            (a.scheme, a.device, a.op or Cell("none of its own", "muted"), a.many_rows, a.one_row) for a in self.schemes
        ]
        commands = [(r.about, r.command) for r in self.rows if r.command is not None]
        tables = [
            Table(("this machine", "here", "in words"), found),
            Table(("scheme", "device", "op", "many rows run on", "one row runs on"), answers, notes=self.notes),
        ]
        return [*tables, Table(("to change", "do"), commands)] if commands else tables


def doctor() -> Diagnosis:
    """What this machine has and lacks, and what each scheme will run on here. Measures nothing and changes nothing."""
    native, schemes, notes = _kernels()
    rows = (*_machine(), *native, *_accelerators(), *_energy(), *_packages())
    return Diagnosis(rows, schemes, notes)


def _machine() -> list[Finding]:
    cores, usable, threads = env.cores(), env.usable_cpus(), torch.get_num_threads()
    total, available = env.host_memory()
    few = threads < min(cores or usable, usable)
    words = f"{_count(cores, 'core') if cores else 'an unknown number of cores'}, {_count(usable, 'hardware thread')}"
    return [
        Finding("processor", True, env.cpu_name()),
        Finding("cores", True, f"{words} usable by this process"),
        Finding(
            "threads of torch",
            not few,
            f"torch computes with {_count(threads, 'thread')}" + (": cores lie idle" if few else ""),
            f"torch.set_num_threads({min(cores or usable, usable)})" if few else None,
        ),
        Finding("memory", True, f"{format_bytes(total)}, of which {format_bytes(available)} can be had"),
    ]


def _kernels() -> tuple[list[Finding], tuple[Answer, ...], tuple[str, ...]]:
    try:  # imported here: with an unusable QNB_ISA the package below does not load, and that is to be told as well
        from qnb import ops, schemes
        from qnb.model.dry_run import shell_of
    except NativeLibraryError as problem:
        unusable = Finding("compiled kernels", False, str(problem), "unset QNB_ISA, then start Python again")
        return [unusable], (), ("no scheme can run until then",)
    rows = [_native(ops.native_missing), *_instruction_sets(ops.instruction_sets())]
    answers = []
    for scheme in (schemes.find(name) for name in schemes.names() if name != "none"):
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            kernel = shell_of(scheme, _LAYER, torch.bfloat16, device).kernel
            both, plus, beside = kernel.partition(" + ")  # what runs beside the kernel does so for any number of rows
            many, _, one = both.partition(" / ")
            many, one = many + plus + beside, (one or many) + plus + beside
            answers.append(Answer(scheme.name, device, scheme.op_name and f"qnb::{scheme.op_name}", many, one))
    notes = []
    if any("reference" in (a.many_rows, a.one_row) for a in answers):
        notes.append("reference: plain torch, which gives the same numbers more slowly")
    return rows, tuple(answers), tuple(notes)


def _native(missing: str | None) -> Finding:
    if missing is None:
        return Finding("compiled kernels", True, "loaded")
    words = f"{missing.partition(':')[0]}; plain torch answers instead; installed from a clone as below, pip says why"
    command = "QNB_NATIVE=ON pip install --no-build-isolation --no-deps --force-reinstall ."
    return Finding("compiled kernels", False, words, command)


def _instruction_sets(sets: dict[str, str | None]) -> list[Finding]:
    if not sets:
        return []
    rows = [Finding("instruction sets", True, ", ".join(name for name, why in sets.items() if why is None))]
    for why in dict.fromkeys(w for w in sets.values() if w is not None):
        names = ", ".join(name for name, reason in sets.items() if reason == why)
        rows.append(Finding("more instruction sets", False, f"{names}: {why}"))
    if ceiling := os.environ.get("QNB_ISA"):
        above = [name for name in list(sets)[: list(sets).index(ceiling)] if sets[name] is None]
        held = f", which leaves {', '.join(above)} unused" if above else ", the best there is"
        command = "unset QNB_ISA, then start Python again" if above else None
        rows.append(Finding("QNB_ISA", not above, f"the ceiling is {ceiling}{held}", command))
    else:
        rows.append(Finding("QNB_ISA", True, "no ceiling is set: the best instruction set is used"))
    return rows


def _accelerators() -> list[Finding]:
    version, names, missing = env.nvidia_driver()
    build, rows = torch.version.cuda, []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            free = format_bytes(env.available_bytes(f"cuda:{i}"))
            words = (
                f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
                f"{format_bytes(properties.total_memory)}, of which {free} can be had; torch for CUDA {build}"
            )
            rows.append(Finding(f"CUDA device {i}", True, words))
    elif names and build is None:
        words = f"{', '.join(names)} is here, but this torch is built without CUDA"
        rows.append(Finding("CUDA", False, words, "pip uninstall -y torch && pip install torch"))
    elif build is None:
        rows.append(Finding("CUDA", False, "this torch is built without CUDA, and no NVIDIA GPU is seen"))
    else:
        rows.append(Finding("CUDA", False, f"torch for CUDA {build} sees no GPU that it can use"))
    driver = Finding("NVIDIA driver", True, f"version {version}, through NVML") if missing is None else None
    return [*rows, driver or _lacking("NVIDIA driver", missing)]


def _energy() -> list[Finding]:
    rows = []
    if torch.cuda.is_available():
        devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        why = Nvml.why_not(devices)
        words = "NVML's total energy counter can be read"
        rows.append(Finding("energy of the GPUs", True, words) if why is None else _lacking("energy of the GPUs", why))
    else:
        rows.append(Finding("energy of the GPUs", False, "no GPU that torch can use"))
    about, why = "energy of the processor", Rapl.why_not([torch.device("cpu")])
    rows.append(Finding(about, True, "RAPL counters can be read") if why is None else _lacking(about, why))
    return rows


def _packages() -> list[Finding]:
    rows = []
    for name, purpose in _PACKAGES.items():
        version = env.package_version(name)
        words = f"{purpose}: {'not installed' if version is None else version}"
        rows.append(Finding(name, version is not None, words, f"pip install {name}" if version is None else None))
    return rows


def _lacking(about: str, reason: str) -> Finding:
    split = _COMMAND.match(one_line(reason, 400))
    return Finding(about, False, split["why"], split["command"]) if split else Finding(about, False, reason)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
