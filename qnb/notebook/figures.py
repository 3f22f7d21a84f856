"""Figures of profiles. Colours hold for colour-blind readers, and every bar carries its value as text."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from math import exp, log
from statistics import fmean

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from qnb.errors import BadInput
from qnb.measure.ceilings import Ceilings
from qnb.measure.layers import LayerProfile, LayerRow
from qnb.measure.original import ITS_OWN_ORIGINAL
from qnb.measure.profile import Profile
from qnb.measure.sensitivity import Sensitivity
from qnb.measure.statistics import student_95
from qnb.results import format_bytes, format_number, one_line
from qnb.tune.experiment import Experiment
from qnb.tune.search import Search

# Grey for what was there first, then colours of Okabe and Ito, which stay apart under every common colour blindness.
_FIRST = "#7a7a7a"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
_QUIET = "#595959"
_95_PERCENT = 1.96
_MOST_LABELS, _LABEL_SIZE = 20, 8  # points


@dataclasses.dataclass(frozen=True)
class _Panel:
    """One quantity: the field of a profile or of its accuracy, which way is better, and how a value is written.

    `spread` gives the ends of the value's own interval, for the whisker; None where a whisker would mislead: the
    standard error of perplexity is between texts, while its change is measured text by text and far more certain.
    """

    field: str
    title: str
    better: str
    write: Callable[[float], str]
    spread: Callable[[Profile, float], tuple[float | None, float | None]] | None = None

    def value(self, profile: Profile) -> float | None:
        holder = profile if hasattr(profile, self.field) else profile.accuracy
        return getattr(holder, self.field, None)


def compare(profiles: Mapping[str, Profile]) -> Figure:
    """One panel for each quantity that was measured, one bar for each profile, named as in `profiles`.

    Beside a value stands its change against the first profile, where that is more than noise. Whiskers are the 5th to
    95th percentile of latencies and the 95 % interval of KL. A quantity that no profile holds has no panel. Raises
    BadInput where there is no profile, or what is given is none.
    """
    if not profiles or not all(isinstance(p, Profile) for p in profiles.values()):
        raise BadInput('compare takes profiles by name, such as {"original": before, "w8a8": after}')
    first = next(iter(profiles.values()))
    changes = [{} if p is first else {c.field: c for c in p.against(first).changes} for p in profiles.values()]
    shown = [panel for panel in _PANELS if any(panel.value(p) is not None for p in profiles.values())]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    size = 4.0 * columns, (0.6 + 0.34 * len(profiles)) * rows
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    figure.get_layout_engine().set(hspace=0.1, wspace=0.05)
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    for place, (axis, panel) in enumerate(zip(axes.flat, shown, strict=False)):
        _draw(axis, panel, list(profiles.values()), [_words(c.get(panel.field)) for c in changes])
        axis.set_yticks(range(len(profiles)), list(profiles) if place % columns == 0 else [""] * len(profiles))
    pyplot.close(figure)  # shown once, as the value of the cell, not a second time by pyplot
    return figure


def roofline(profile: Profile | LayerProfile) -> Figure:
    """Each linear layer of a profile that timed them: operations a byte against the operations a second it reached.

    Lines are the ceilings of the machine: a slope for each level that weights lie in, a level line for each arithmetic.
    A layer is a point for each size of its calls, filled where one row is computed at a time; layers of one kind lie
    together and have one label. A device has a panel of its own. Raises BadInput where no layers were timed.
    """
    layers = profile.layers if isinstance(profile, Profile) else profile
    if not isinstance(layers, LayerProfile) or not layers.rows:
        raise BadInput("roofline takes a profile that timed its layers: %qprofile model --layers, or layers=True")
    count = len(layers.ceilings)
    figure, axes = pyplot.subplots(1, count, figsize=(8.5 * count, 5.2), squeeze=False, layout="constrained")
    for axis, known in zip(axes.flat, layers.ceilings, strict=True):
        _draw_roofline(axis, known, [row for row in layers.rows if row.device == known.device])
    pyplot.close(figure)
    return figure


def heat_map(sensitivity: Sensitivity) -> Figure:
    """KL of each layer alone in each scheme: rows are layers, columns schemes, colours on a logarithmic scale.

    Every cell carries its value as text; the colours (viridis) hold for colour-blind readers and in grey.
    """
    layers, formats = sensitivity.layers, sensitivity.schemes
    known = {(row.name, row.scheme): row.kl for row in sensitivity.rows}
    values = [[known.get((name, scheme), math.nan) for scheme in formats] for name in layers]
    positive = [v for row in values for v in row if v > 0]
    size = 2.6 + 1.15 * len(formats), 1.1 + 0.19 * len(layers)
    figure, axis = pyplot.subplots(figsize=size, layout="constrained")
    scale = LogNorm(min(positive, default=1e-9), max(positive, default=1.0))
    image = axis.imshow(values, norm=scale, cmap="viridis", aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            bright = value > 0 and scale(value) > 0.6
            words = "refused" if math.isnan(value) else _short(value)
            colour = _QUIET if math.isnan(value) else "black" if bright else "white"
            axis.text(x, y, words, ha="center", va="center", fontsize=8, color=colour)
    # A line between blocks, and names without what they all begin with.
    shared = _shared_path(layers)
    blocks = [name[len(shared) :].partition(".")[0] for name in layers]
    for y in range(1, len(layers)):
        if blocks[y] != blocks[y - 1] and blocks[y].isdigit():
            axis.axhline(y - 0.5, color="white", linewidth=1.6)
    axis.set_xticks(range(len(formats)), formats, fontsize=9.5)
    axis.set_yticks(range(len(layers)), [name[len(shared) :] for name in layers], fontsize=8)
    axis.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    how = "measured" if sensitivity.method == "exact" else "estimated from gradients"
    of = f" of {shared}*" if shared else ""
    axis.set_title(f"KL of each layer{of} alone, {how}", loc="left", fontsize=10.5, fontweight="bold")
    bar = figure.colorbar(image, ax=axis, location="bottom", shrink=0.8, aspect=40, pad=0.01)
    bar.set_label("nats per token", fontsize=8.5)
    pyplot.close(figure)
    return figure


def _short(value: float) -> str:
    """Two digits and a power of ten: the same width whatever the size, so that columns can be read downwards."""
    digits, power = f"{value:.1e}".split("e")
    return f"{digits}e{int(power)}"


def _shared_path(names: Sequence[str]) -> str:
    """What all names begin with, up to and with a dot; nothing where there is but one name."""
    path, dot, _ = os.path.commonprefix(list(names)).rpartition(".") if len(names) > 1 else ("", "", "")
    return path + dot


def pareto(found: Search) -> Figure:
    """Bytes against KL of everything that a search measured; the line joins what nothing else beats at both."""
    points = [(step.weight_bytes / 1e6, step.accuracy.kl, step) for step in found.tried]
    figure, axis = pyplot.subplots(figsize=(7.6, 4.4), layout="constrained")
    best, front = math.inf, []
    for size, kl, _ in sorted(points, key=lambda point: point[:2]):
        if kl < best:
            best = kl
            front.append((size, kl))
    axis.plot(*zip(*front, strict=True), color="#bbbbbb", linewidth=1.2, zorder=1, drawstyle="steps-post")
    limit = {"color": _COLOURS[1], "linewidth": 1.2, "linestyle": ":", "zorder": 1}
    if "max_kl" in found.limits:
        axis.axhline(found.limits["max_kl"], **limit)
    if "max_megabytes" in found.limits:
        axis.axvline(found.limits["max_megabytes"], **limit)
    axis.margins(0.12, 0.12)
    for size, kl, step in points:
        chosen = step.recipe is found.recipe
        look = {"color": _COLOURS[0], "marker": "o"} if step.holds else {"color": _COLOURS[1], "marker": "X"}
        axis.scatter(size, kl, s=90 if chosen else 42, zorder=2, edgecolors="white", linewidths=0.8, **look)
        words, weight = (f"{step.label}: chosen", "bold") if chosen else (step.label, "normal")
        axis.annotate(words, (size, kl), (7, 5), textcoords="offset points", fontsize=9.5, fontweight=weight)
    axis.set_xlabel("weights held, MB")
    axis.set_ylabel("KL to the original, nats per token")
    axis.set_title(f"Measured in this order: {found.budget}", loc="left", fontsize=10.5, fontweight="bold")
    axis.set_title("circle: kept; cross: broken", loc="right", fontsize=8.5, color=_QUIET)
    axis.grid(color="#ececec", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    pyplot.close(figure)
    return figure


def outcomes(experiment: Experiment, families: Mapping[str, Sequence[str]] | None = None) -> Figure:
    """KL of each outcome of an experiment with its 95 % interval, on a logarithmic scale, the bytes held beside it.

    families  heading -> names of outcomes, drawn together in one colour; without it all stand in the order tried
    Those that were refused, and the original, are left out. Raises BadInput for a name that was not measured.
    """
    known = {o.name: o for o in experiment.outcomes[1:] if o.accuracy is not None and o.accuracy.kl is not None}
    families = {"": list(known)} if families is None else families
    missing = [name for names in families.values() for name in names if name not in known]
    if missing or not known:
        raise BadInput(f"no KL of {', '.join(missing) or 'any outcome'} was measured: there are {', '.join(known)}")
    rows: list[tuple[str, str | None, str]] = []  # label, the outcome's name, colour
    for place, (heading, names) in enumerate(families.items()):
        rows += [(heading, None, _QUIET)] if heading else []
        rows += [(name, name, _COLOURS[place % len(_COLOURS)]) for name in names]
    figure, axis = pyplot.subplots(figsize=(8.4, 0.9 + 0.27 * len(rows)), layout="constrained")
    for y, (_, name, colour) in enumerate(rows):
        if name is None:
            continue
        accuracy = known[name].accuracy
        kl, half = accuracy.kl, student_95(max(1, accuracy.texts - 1)) * (accuracy.kl_se or 0.0)
        axis.plot([max(kl - half, kl / 10), kl + half], [y, y], color=colour, linewidth=2, alpha=0.45)
        axis.plot(kl, y, "o", color=colour, markersize=6.5)
        for place, words in ((1.13, format_number(kl, 2)), (1.27, format_bytes(known[name].weight_bytes))):
            at = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "center"}
            axis.annotate(words, (place, y), **at, fontsize=9, color=_QUIET)
    axis.set(xscale="log", ylim=(len(rows) - 0.4, -0.6))
    axis.set_yticks(range(len(rows)), [label for label, _, _ in rows], fontsize=9.5)
    for label, (_, name, _) in zip(axis.get_yticklabels(), rows, strict=True):
        if name is None:
            label.set(fontweight="bold", color=_QUIET)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#e4e4e4", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_xlabel("KL to the original, nats per token, with its 95 % interval: less is better")
    axis.set_title(f"The same {experiment.texts} texts", loc="left", fontsize=10.5, fontweight="bold")
    for place, words in ((1.13, "KL"), (1.27, "weights")):
        axis.annotate(words, (place, 1.02), xycoords="axes fraction", ha="right", fontsize=8.5, color=_QUIET)
    axis.spines[["top", "right", "left"]].set_visible(False)
    pyplot.close(figure)
    return figure


def _draw_roofline(axis: Axes, known: Ceilings, rows: Sequence[LayerRow]) -> None:
    arithmetics = list(dict.fromkeys(row.arithmetic for row in rows))
    tops = {name: known.gops_per_s[name] for name in arithmetics if name in known.gops_per_s}
    slopes = {level: known.gb_per_s[level] for level in dict.fromkeys(r.level for r in rows) if level in known.gb_per_s}
    ridges = [top / rate for top in tops.values() for rate in slopes.values()]
    xs = [row.intensity for row in rows] + ridges
    left, right = min(xs) / 2.5, max(xs) * 12  # room for the labels
    ys = [row.gops_per_s for row in rows if row.gops_per_s > 0] + list(tops.values())
    axis.set(xscale="log", yscale="log", xlim=(left, right), ylim=(min(ys, default=1) / 4, max(ys, default=1) * 3))
    for level, rate in slopes.items():
        end = max(tops.values(), default=right * rate) / rate
        axis.plot([left, min(end, right)], [rate * left, rate * min(end, right)], color=_FIRST, linewidth=1.4)
        words = f"{level} {format_number(rate)} GB/s"
        axis.annotate(
            words, (left, rate * left), (6, 6), textcoords="offset points", fontsize=9, color=_QUIET,
            rotation=45, rotation_mode="anchor", transform_rotates_text=True,
        )  # fmt: skip
    for name, top in tops.items():
        start = top / max(slopes.values(), default=top / left)
        colour = _COLOURS[arithmetics.index(name) % len(_COLOURS)]
        axis.plot([max(left, start), right], [top, top], color=colour, linewidth=1.4)
        words = f"{name} {format_number(top)} Gop/s"
        axis.annotate(words, (max(left, start), top), (40, 4), textcoords="offset points", fontsize=9, color=colour)
    groups: dict[tuple, list[LayerRow]] = {}
    for row in rows:
        colour = _COLOURS[arithmetics.index(row.arithmetic) % len(_COLOURS)]
        inside = colour if row.rows[1] == 1 else "white"
        axis.plot(row.intensity, row.gops_per_s, "o", markersize=6, color=colour, markerfacecolor=inside)
        groups.setdefault((row.kind, row.scheme, row.rows), []).append(row)
    axis.set_xlabel("operations a byte moved")
    axis.set_ylabel("10⁹ operations a second")
    axis.set_title(f"{known.name}: what layers reach", loc="left", fontsize=10.5, fontweight="bold")
    legend = "filled: one row a call; hollow: many; percent of a run"
    axis.set_title(legend, loc="right", fontsize=8.5, color=_QUIET)
    axis.spines[["top", "right"]].set_visible(False)
    _label(axis, list(groups.values()))


def _label(axis: Axes, groups: Sequence[Sequence[LayerRow]]) -> None:
    """A label for each kind of layer, beside the middle of its points, moved down where another one stands already.

    Where there are more kinds than fit, those that take most time have one.
    """
    axis.figure.draw_without_rendering()  # which settles where the points lie
    point = 72 / axis.figure.dpi
    wanted = []
    for rows in sorted(groups, key=lambda rows: -sum(r.time_ms for r in rows))[:_MOST_LABELS]:
        middle = [exp(fmean(log(v) for v in values)) for values in ([r.intensity for r in rows], _reached(rows))]
        x, y = axis.transData.transform(middle) * point
        name = ".".join([part for part in rows[0].kind.split(".") if part != "*"][-2:])
        share = format_number(100 * sum(r.share for r in rows), 2)
        wanted.append((y, x, middle, f"{one_line(name, 32)} {share} %"))
    taken: list[tuple[float, float, float]] = []  # left, right, middle of a label
    for y, x, middle, words in sorted(wanted, reverse=True):
        left, width, at = x + 14, 0.6 * _LABEL_SIZE * len(words), y
        while any(left < end and start < left + width and abs(at - m) < 1.15 * _LABEL_SIZE for start, end, m in taken):
            at -= 1
        taken.append((left, left + width, at))
        mark = axis.annotate(
            words, middle, (14, at - y), textcoords="offset points", va="center", fontsize=_LABEL_SIZE, color=_QUIET,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 3},
        )  # fmt: skip
        mark.set_in_layout(False)


def _reached(rows: Sequence[LayerRow]) -> list[float]:
    return [max(row.gops_per_s, 1e-9) for row in rows]


def _draw(axis: Axes, panel: _Panel, profiles: Sequence[Profile], changes: Sequence[str]) -> None:
    longest = 0.0
    for row, (profile, change) in enumerate(zip(profiles, changes, strict=True)):
        value = panel.value(profile)
        if value is None:
            axis.text(0, row, f" {_missing(panel, profile)}", va="center", fontsize=9, color=_QUIET, style="italic")
            continue
        low, high = panel.spread(profile, value) if panel.spread else (None, None)
        colour = _COLOURS[(row - 1) % len(_COLOURS)] if row else _FIRST
        axis.barh(row, value, height=0.64, color=colour)
        if low is not None and high is not None:
            ends = [[value - low], [high - value]]
            axis.errorbar(value, row, xerr=ends, color="#222222", capsize=3, elinewidth=1.2)
        end = value if high is None else high
        longest = max(longest, end)
        words = axis.annotate(
            panel.write(value), (end, row), (5, 0), textcoords="offset points", va="center", fontsize=9.5
        )
        axis.annotate(
            change, (1, 0.5), (6, 0), xycoords=words, textcoords="offset points", va="center", fontsize=9, color=_QUIET
        )
    axis.set_xlim(0, 1.85 * longest or 1)  # room for the words at the end of the longest bar
    axis.set_ylim(len(profiles) - 0.5, -0.5)
    axis.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold")
    axis.set_title(panel.better, loc="right", fontsize=8.5, color=_QUIET)
    axis.tick_params(axis="y", length=0, labelsize=10)
    axis.tick_params(axis="x", bottom=False, labelbottom=False)
    axis.spines[["top", "right", "bottom"]].set_visible(False)


def _missing(panel: _Panel, profile: Profile) -> str:
    unavailable = {} if profile.accuracy is None else profile.accuracy.unavailable
    return "the original itself" if unavailable.get(panel.field) == ITS_OWN_ORIGINAL else "unavailable"


def _words(change: object) -> str:
    """A change in percent, where there is one that is more than noise."""
    if change is None or not change.relative or change.verdict not in ("better", "worse"):
        return ""
    size = abs(100 * change.change)
    return f"{'+' if change.change > 0 else '−'}{f'{size:.0f}' if size >= 9.95 else format_number(size, 2)} %"


def _latency_spread(profile: Profile, value: float) -> tuple[float | None, float | None]:
    return profile.latency_p5_ms, profile.latency_p95_ms


def _kl_spread(profile: Profile, value: float) -> tuple[float | None, float | None]:
    se = profile.accuracy.kl_se
    return (None, None) if se is None else (max(0.0, value - _95_PERCENT * se), value + _95_PERCENT * se)


def _unit(unit: str) -> Callable[[float], str]:
    return lambda value: f"{format_number(value)} {unit}"


_LESS, _MORE = "less is better", "more is better"
_PANELS = (
    _Panel("latency_ms", "latency", _LESS, _unit("ms"), _latency_spread),
    _Panel("prefill_tokens_per_s", "prefill", _MORE, _unit("tokens/s")),
    _Panel("decode_tokens_per_s", "decoding", _MORE, _unit("tokens/s")),
    _Panel("weight_bytes", "weights", _LESS, lambda value: format_bytes(round(value))),
    _Panel("energy_mj_per_token", "energy", _LESS, _unit("mJ/token")),
    _Panel("perplexity", "perplexity", _LESS, format_number),
    _Panel("kl", "KL to the original", _LESS, _unit("nats"), _kl_spread),
)
