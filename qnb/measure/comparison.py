"""Two profiles beside each other: what got slower, hungrier or worse first, in words, each change with its interval."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch

from qnb.measure.accuracy import QUANTITIES as ACCURACY
from qnb.measure.accuracy import Accuracy
from qnb.measure.original import ITS_OWN_ORIGINAL
from qnb.measure.statistics import median, ratio_interval, ratio_with_se, student_95
from qnb.measure.trace import where_to_open
from qnb.results import Cell, Result, Table, format_bytes, format_number

if TYPE_CHECKING:
    from qnb.measure.profile import CodeProfile, Profile

Verdict = Literal["worse", "better", "within noise", "unchanged", "unknown"]

# Between two measurements of the same thing minutes apart; the interval, from within each, cannot see it.
_DRIFT = 0.02
# How many times the upper end of an interval of ratios may be the lower one: beyond, percents say less than factors.
_UNSTEADY = 10


@dataclasses.dataclass(frozen=True)
class Quantity:
    """One field of a profile: its name in tables, how it is written, which way is better, its words in sentences."""

    field: str
    title: str
    show: Callable[[float | None], str]
    better: int
    worse_word: str
    better_word: str
    exact: bool = False


def _with_unit(unit: str) -> Callable[[float | None], str]:
    return lambda value: "unavailable" if value is None else f"{format_number(value)} {unit}"


def _bytes(value: float | None) -> str:
    return "unavailable" if value is None else format_bytes(round(value))


QUANTITIES = (
    Quantity("latency_ms", "latency", _with_unit("ms"), -1, "Slower", "Faster"),
    Quantity("prefill_tokens_per_s", "prefill", _with_unit("tokens/s"), 1, "Slower", "Faster"),
    Quantity("decode_tokens_per_s", "decoding", _with_unit("tokens/s"), 1, "Slower", "Faster"),
    Quantity("weight_bytes", "weights held", _bytes, -1, "Hungrier", "Lighter", exact=True),
    Quantity("original_bytes", "kept originals", _bytes, -1, "Hungrier", "Lighter", exact=True),
    Quantity("peak_host_bytes", "peak host memory", _bytes, -1, "Hungrier", "Lighter"),
    Quantity("peak_cuda_bytes", "peak CUDA memory", _bytes, -1, "Hungrier", "Lighter"),
    Quantity("energy_mj", "energy of a run", _with_unit("mJ"), -1, "Hungrier", "Lighter"),
    Quantity("energy_mj_per_token", "energy of a token", _with_unit("mJ"), -1, "Hungrier", "Lighter"),
)


@dataclasses.dataclass(frozen=True)
class Change:
    """One quantity before and now.

    change     relative (0.1 is 10 % more) where `relative`, else the difference; None where either side is missing
    low, high  ends of the change's 95 % interval; None where there is none
    """

    field: str
    title: str
    before: float | None
    now: float | None
    change: float | None
    low: float | None
    high: float | None
    relative: bool
    verdict: Verdict
    words: str


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison(Result):
    """What changed between two profiles; `sentences` come first, what got worse before what got better."""

    sentences: tuple[str, ...]
    changes: tuple[Change, ...]
    before: Profile | CodeProfile
    now: Profile | CodeProfile
    notes: tuple[str, ...] = ()
    _cells: tuple[tuple[str | Cell, ...], ...] = ()
    _tones: tuple[str, ...] = ()

    def _tables(self) -> Sequence[Table]:
        lead = [Cell(s, tone) for s, tone in zip(self.sentences, self._tones, strict=True)]
        table = Table(("quantity", "before", "now", "change"), self._cells, lead, self.notes, frozenset({1, 2, 3}))
        layers = getattr(self.now, "layers", None)
        return [table, *(layers.tables() if layers else ())]


def compare(before: Profile | CodeProfile, now: Profile | CodeProfile) -> Comparison:
    """The comparison of two profiles of the same kind; intervals by a seeded bootstrap of the raw samples."""
    different = _different_work(before, now)
    pairs: list[tuple[Change, tuple[str | Cell, ...]]] = []
    for quantity in QUANTITIES:
        if hasattr(now, quantity.field):
            pairs.append(_row(quantity, before, now, different))
    accuracies = getattr(before, "accuracy", None), getattr(now, "accuracy", None)
    if accuracies != (None, None):
        pairs += _accuracy_rows(*accuracies)
    changes = tuple(change for change, _ in pairs)
    sentences = _sentences(changes)
    notes = [
        "± and ranges are 95 % intervals within the two profiles; a machine that changed between them is not in it"
    ]
    notes += [f"not compared: {different}"] if different else []
    notes += [where_to_open(now.trace)] if getattr(now, "trace", None) else []
    notes += [f"note: {n}" for n in dict.fromkeys((*_notes(before), *_notes(now)))]
    return Comparison(
        tuple(words for words, _ in sentences),
        changes,
        before,
        now,
        tuple(notes),
        tuple(cells for _, cells in pairs),
        tuple(tone for _, tone in sentences),
    )


def _row(quantity: Quantity, before, now, different: str | None) -> tuple[Change, tuple[str | Cell, ...]]:
    old, new = getattr(before, quantity.field), getattr(now, quantity.field)
    shown = quantity.show(old), quantity.show(new)
    per_run = not quantity.exact
    if old is None or new is None or (per_run and different):
        change = Change(quantity.field, quantity.title, old, new, None, None, None, True, "unknown", "")
        why = now.unavailable.get(quantity.field) or before.unavailable.get(quantity.field) or "not the same work"
        return change, (quantity.title, *shown, Cell(_short(why), "muted"))
    if old == 0:
        verdict: Verdict = "unchanged" if new == 0 else ("worse" if quantity.better < 0 else "better")
        words = "none" if new == 0 else f"+{quantity.show(new)}"
        change = Change(quantity.field, quantity.title, old, new, new - old, None, None, False, verdict, words)
        return change, (quantity.title, *shown, _cell(change))
    interval = None
    if per_run:
        ends = ratio_interval(before._samples.get(quantity.field, ()), now._samples.get(quantity.field, ()), median)
        interval = None if ends is None else (ends[0] - 1, ends[1] - 1)
    relative = new / old - 1
    verdict = _verdict(relative, interval, quantity.better, 0.0 if quantity.exact else _DRIFT)
    low, high = interval or (None, None)
    words = _percent(relative, interval)
    if interval and low <= 0 <= high and 1 + high > _UNSTEADY * (1 + low):
        words = f"unsteady: ×{format_number(1 + low, 2)} to ×{format_number(1 + high, 2)}"
    change = Change(quantity.field, quantity.title, old, new, relative, low, high, True, verdict, words)
    return change, (quantity.title, *shown, _cell(change))


def _accuracy_rows(before: Accuracy | None, now: Accuracy | None) -> list[tuple[Change, tuple[str | Cell, ...]]]:
    rows = []
    for quantity in ACCURACY:
        old, new = (getattr(a, quantity.field, None) for a in (before, now))
        was_original = _is_original(before, quantity.field)
        is_original = _is_original(now, quantity.field)
        if old is None and new is None and not was_original and not is_original:
            continue
        shown = (
            "the original" if was_original else quantity.show(old),
            "the original" if is_original else quantity.show(new),
        )
        relative = quantity.field == "perplexity"
        difference, se, degrees = _difference(quantity.field, before, now, was_original, is_original)
        if difference is None:
            why = "" if was_original and is_original else _short(_why(before, now, quantity.field))
            change = Change(quantity.field, quantity.title, old, new, None, None, None, relative, "unknown", "")
            rows.append((change, (quantity.title, *shown, Cell(why, "muted"))))
            continue
        interval = None
        if se is not None:
            half = student_95(degrees) * se
            interval = difference - half, difference + half
        if relative:  # from the difference of mean losses
            difference = math.expm1(difference)
            interval = None if interval is None else tuple(math.expm1(end) for end in interval)
        verdict = _verdict(difference, interval, quantity.better, 0.0)
        if relative:
            words = _percent(difference, interval)
        else:
            show = quantity.show if quantity.percent else format_number
            half = "" if interval is None else f" ± {show((interval[1] - interval[0]) / 2)}"
            words = f"{_sign(difference)}{show(abs(difference))}{half}"
        low, high = interval or (None, None)
        change = Change(quantity.field, quantity.title, old, new, difference, low, high, relative, verdict, words)
        rows.append((change, (quantity.title, *shown, _cell(change))))
    return rows


def _difference(field: str, before, now, was_original: bool, is_original: bool):
    """(now - before, its standard error, degrees of freedom), paired by text where possible; perplexity: mean loss."""
    if before is None or now is None or (was_original and is_original):
        return None, None, 0
    degrees = max(1, (now.texts or 2) - 1)
    if was_original or is_original:
        # A model against itself: KL is 0 and agreement 1 by definition, without an error.
        itself = 1.0 if field in ("top1", "cosine") else 0.0
        other, sign = (now, 1) if was_original else (before, -1)
        value = getattr(other, field)
        return (None if value is None else sign * (value - itself)), getattr(other, f"{field}_se", None), degrees
    old, new = getattr(before, field), getattr(now, field)
    if old is None or new is None:
        return None, None, 0
    paired = {"perplexity": "nll", "kl": "kl", "top1": "agreed"}.get(field)
    if paired and before._texts_key == now._texts_key and now._per_text:
        pairs = list(zip(before._per_text, now._per_text, strict=True))
        sums = torch.tensor([float(getattr(n, paired) - getattr(b, paired)) for b, n in pairs], dtype=torch.double)
        return *ratio_with_se(sums, torch.tensor([n.tokens for _, n in pairs])), degrees
    errors = [getattr(a, f"{field}_se", None) for a in (before, now)]
    if field == "perplexity":
        old, new = math.log(old), math.log(new)
        errors = [None if e is None else e / getattr(a, field) for e, a in zip(errors, (before, now), strict=True)]
    se = None if None in errors else math.hypot(*errors)
    return new - old, se, degrees


def _verdict(change: float, interval: tuple[float, float] | None, better: int, drift: float) -> Verdict:
    if change == 0 and (interval is None or interval[0] == interval[1]):
        return "unchanged"
    if abs(change) < drift or (interval is not None and interval[0] <= 0 <= interval[1]):
        return "within noise"
    return "better" if change * better > 0 else "worse"


def _sentences(changes: Sequence[Change]) -> list[tuple[str, str]]:
    words = {q.field: (q.worse_word, q.better_word) for q in QUANTITIES}
    groups: dict[tuple[str, str], list[str]] = {}
    for verdict, place, tone in (("worse", 0, "bad"), ("better", 1, "good")):
        for change in changes:
            if change.verdict == verdict:
                word = words.get(change.field, ("Worse", "Better"))[place]
                groups.setdefault((word, tone), []).append(f"{change.title} {change.words}")
    sentences = [(f"{word}: {'; '.join(parts)}.", tone) for (word, tone), parts in groups.items()]
    noise = [change.title for change in changes if change.verdict == "within noise"]
    if noise:
        sentences.append((f"Within noise: {', '.join(noise)}.", ""))
    return sentences or [("Nothing that was measured changed.", "")]


def _cell(change: Change) -> Cell:
    if change.verdict == "within noise":
        return Cell(f"{change.words}, within noise", "muted")
    return Cell(change.words, {"worse": "bad", "better": "good"}.get(change.verdict, "muted"))


def _different_work(before, now) -> str | None:
    """In words, how the two did not run the same; None where they did."""
    told = []
    for key in ("rows", "prompt_tokens", "new_tokens", "device", "threads"):
        name = key.replace("_", " ")
        old, new = before.environment.get(key), now.environment.get(key)
        if old != new:
            told.append(f"{name} {old} before, {new} now")
    return "; ".join(told) or None


def _notes(profile: Profile | CodeProfile) -> Sequence[str]:
    return *profile.environment.get("notes", ()), *profile.environment.get("energy_notes", ())


def _is_original(accuracy: Accuracy | None, field: str) -> bool:
    return accuracy is not None and accuracy.unavailable.get(field) == ITS_OWN_ORIGINAL


def _why(before: Accuracy | None, now: Accuracy | None, field: str) -> str:
    if before is None or now is None:
        return "accuracy was measured on one side only"
    return now.unavailable.get(field) or before.unavailable.get(field) or ""


def _short(why: str) -> str:
    return why.split(":")[0].split(";")[0]


def _sign(x: float) -> str:
    return "+" if x > 0 else "−" if x < 0 else ""


def _percent(change: float, interval: Sequence[float] | None) -> str:
    ends = None if interval is None else (_one_percent(interval[0], ""), _one_percent(interval[1]))
    if ends is None or ends[1] == f"{ends[0]} %":
        return _one_percent(change)
    return f"{_one_percent(change)} ({ends[0]} to {ends[1]})"


def _one_percent(x: float, unit: str = " %") -> str:
    size = abs(100 * x)
    return f"{_sign(x)}{size:.0f}{unit}" if size >= 9.95 else f"{_sign(x)}{format_number(size, 2)}{unit}"
