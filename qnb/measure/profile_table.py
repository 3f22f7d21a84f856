"""How profiles are shown: one row for each quantity, with how it was measured or why it was not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qnb.measure.comparison import QUANTITIES
from qnb.measure.statistics import quantile
from qnb.results import Cell, format_bytes

if TYPE_CHECKING:
    from qnb.measure.profile import CodeProfile, Profile

# Field of a profile -> what its meter's facts begin with in the environment.
METER = {
    "latency_ms": "clock",
    "peak_host_bytes": "peak_host",
    "peak_cuda_bytes": "peak_cuda",
    "energy_mj": "energy",
}


def value_rows(result: Profile | CodeProfile) -> list[tuple[str | Cell, ...]]:
    """(quantity, value, how it was measured or why not) for each quantity that this kind of profile has."""
    rows = []
    for quantity in QUANTITIES:
        if not hasattr(result, quantity.field):
            continue
        value = getattr(result, quantity.field)
        how = _how(result, quantity.field) if value is not None else Cell(result.unavailable[quantity.field], "muted")
        rows.append((quantity.title, quantity.show(value), how))
    return rows


def _how(result: Profile | CodeProfile, field: str) -> str:
    environment, samples = result.environment, result._samples.get(field, ())
    if field == "weight_bytes":
        cached = environment.get("cached_bytes")
        aside = f"; {format_bytes(cached)} of variants that no layer runs now are cached beside" if cached else ""
        return "storages held, each counted once" + aside
    if field == "original_bytes":
        away = environment.get("original_disk_bytes")
        return "kept so that every change can be undone" + (f"; {format_bytes(away)} more on disk" if away else "")
    if field == "latency_ms":
        what = (
            "one forward"
            if environment.get("new_tokens") is None
            else (f"{environment['prompt_tokens']} prompt + {environment['new_tokens']} new tokens")
        )
        what += f" in {environment['rows']} rows" if environment.get("rows", 1) > 1 else ""
        what = what if hasattr(result, "accuracy") else "wall clock"
        return f"{what}, {_over(result, samples, field)}"
    if field.startswith("peak_"):
        return environment[f"{METER[field]}_source"]
    if field.startswith("energy"):
        per = " of new tokens" if field == "energy_mj_per_token" and environment.get("new_tokens") else ""
        steps, spread = environment.get("energy_steps"), environment.get("energy_spread")
        seen = f", {steps} counter steps" if steps else ""
        give = f", ± {100 * spread / result.energy_mj:.0f} % by its step" if spread and result.energy_mj else ""
        return f"{environment['energy_source']}{per}{seen}{give}"
    return _over(result, samples, field)


def _over(result: Profile | CodeProfile, samples: Sequence[float], field: str) -> str:
    if len(samples) < 2:
        return "one run"
    show = next(q.show for q in QUANTITIES if q.field == field)
    return (
        f"median of {len(samples)} runs, p5 to p95 {show(quantile(samples, 0.05))} to {show(quantile(samples, 0.95))}"
    )


def notes(environment: Mapping[str, Any]) -> list[str]:
    """What stands below the table: machine and versions, the prompt, and whatever else the reader should know."""
    words = [f"torch {environment['torch']}", f"{environment['threads']} threads", str(environment["cpu"])]
    if environment.get("dtype"):
        words.append(f"{environment['dtype']} on {environment['device']}")
    if environment.get("compiled"):
        words.append("compiled by torch.compile")
    kernels = environment.get("kernels") or {}
    words += [f"{count} layers by {kernel}" for kernel, count in kernels.items()]
    lines = [" · ".join(words)]
    if environment.get("prompt"):
        lines.append(f"prompt: {environment['prompt']}")
    return [*lines, *(f"note: {n}" for n in (*environment.get("notes", ()), *environment.get("energy_notes", ())))]
