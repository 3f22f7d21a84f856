"""What the panel shows besides its map: figures, words, a look into a layer, and the record that outlives the kernel.

Everything from outside is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from qnb.measure.accuracy import QUANTITIES as ACCURACY
from qnb.measure.comparison import QUANTITIES as COSTS
from qnb.notebook.panel import continuation
from qnb.notebook.panel.colours import Face, by_scheme
from qnb.notebook.panel.look import BINS, Look
from qnb.notebook.panel.session import Session
from qnb.notebook.panel.step import Step
from qnb.results import Cell, Table, format_bytes, format_number

# Quantities in the order of the panel, with the short name that fits beside a sparkline.
_SHOWN = {
    "perplexity": "perplexity",
    "kl": "KL (nats/token)",
    "top1": "same top token",
    "relative_error": "relative error",
    "cosine": "cosine",
    "weight_bytes": "weights held",
    "latency_ms": "latency",
    "prefill_tokens_per_s": "prefill",
    "decode_tokens_per_s": "decoding",
    "energy_mj_per_token": "energy of a token",
    "metric": "your metric",
}
_SPEED = ("latency_ms", "prefill_tokens_per_s", "decode_tokens_per_s", "energy_mj_per_token")


def figures(session: Session) -> str:
    """The live table: original, now, change with its interval, and how the steps so far went."""
    rows = "".join(_figure(session, *row) for row in _figure_rows(session))
    head = "".join(f"<th>{name}</th>" for name in ("", "original", "now", "change (95 %)", "steps"))
    progress = session.present.progress
    over = ""
    if progress is not None:
        accuracy = progress.accuracy
        total = len(session.stages.evaluation.samples)
        tokens = f"{accuracy.tokens:,} tokens of " if accuracy.tokens else ""
        over = f"accuracy over {tokens}{progress.texts} of {total} {'text' if total == 1 else 'texts'}"
        if session.present.speed is not None and (about := session.present.speed.environment):
            new = about.get("new_tokens")
            over += f" · latency of {about.get('prompt_tokens')} prompt" + (
                f" + {new} new tokens" if new else " tokens"
            )
    return (
        f'<table class="qnb-figures"><colgroup>{"<col>" * 5}</colgroup><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table>"
        f'<div class="qnb-quiet">{escape(over) or "&nbsp;"}</div>'
    )


def words(session: Session) -> str:
    """Both continuations side by side, the first token that differs marked; then the tokens that changed most."""
    if session.stages.why_no_words is not None:
        text = f'<p class="qnb-quiet">No continuation: {escape(session.stages.why_no_words)}.</p>'
    else:
        text = _continuations(session)
    return text + _changed_tokens(session)


def layer(session: Session, name: str | None) -> str:
    """The look into one layer."""
    if name is None:
        return '<p class="qnb-quiet">Select a layer on the map to look into it.</p>'
    seen = session.stages.looked_at
    if seen is None or seen.name != name:
        return f'<p class="qnb-quiet">Looking into {escape(name)} …</p>'
    charts = [_histogram(seen), _channels(seen), _inputs(seen)]
    title = f'<div class="qnb-layer-name">{escape(name)} <b>{escape(seen.scheme)}</b></div>'
    return f'{title}<div class="qnb-charts">{"".join(charts)}</div>'


def legend(faces: Sequence[Face], mode: str, session: Session) -> str:
    """What the colours mean."""
    if mode == "scheme":
        shown: dict[str, Face] = {face.words: face for face in faces}
        counts = {w: sum(f.words == w for f in faces) for w in shown}
        chips = [
            f'<span class="qnb-chip"><i style="background:{f.paper}"></i>'
            f"{escape('original' if w == '·' else w)} <b>{counts[w]}</b></span>"
            for w, f in shown.items()
        ]
        return f'<div class="qnb-legend">{"".join(chips)}</div>'
    meanings = {
        "sensitivity": f"KL to the original if this layer alone ran in {session.stages.sensitivity_scheme}",
        "error": "relative error of the weight, as it is now",
        "bytes": "bytes of the weight, as it is now",
        "time": "milliseconds in one pass over the first text",
    }
    return f'<div class="qnb-legend">{escape(meanings[mode])}; dark is little, bright is much (logarithmic)</div>'


def search(session: Session) -> str:
    """How a search for a recipe goes, or how the last one went."""
    words = session.board.status if session.searching else session.board.found
    return f'<span class="qnb-quiet qnb-search">{escape(words or "")}</span>'


def message(session: Session, own: str | None) -> str:
    """What went wrong, if anything did."""
    if own is not None:
        return f'<div class="qnb-message" role="alert">{escape(own)}</div>'
    if session.board.message is None:
        return ""
    detail = session.board.message.detail
    more = "" if detail is None else f"<details><summary>traceback</summary><pre>{escape(detail)}</pre></details>"
    return f'<div class="qnb-message" role="alert">{escape(session.board.message.words)}{more}</div>'


def header(session: Session) -> str:
    """What model this is, and what is going on."""
    quantized = len(session.present.layers)
    state = "busy" if session.busy else "still"
    return (
        f'<div class="qnb-head"><span class="qnb-title">{escape(session.title)}</span>'
        f'<span class="qnb-quiet">{quantized} of {len(session.names)} layers quantized · step '
        f"{session.present.number}: {escape(session.present.words)}</span>"
        f'<span class="qnb-status qnb-{state}">{escape(session.board.status)}</span></div>'
    )


def record(session: Session, key: str) -> str:
    """The panel without its kernel: map, figures and steps, in styles that an untrusted page keeps.

    Where the panel itself is alive on the page, it hides its own record by the class.
    """
    parts = [
        f'<p style="margin:2px 0;font-weight:600">{escape(session.title)}: step {session.present.number}, '
        f"{escape(session.present.words)}</p>",
        _map_table(session),
        _figures_table(session).html(),
        _steps_table(session).html(),
    ]
    return f'<div class="qnb-record {escape(key)}" style="overflow-x:auto">{"".join(parts)}</div>'


def record_text(session: Session) -> str:
    """The same for a terminal."""
    return "\n\n".join(table.text() for table in (_figures_table(session), _steps_table(session)))


def shown(field: str, value: float | None) -> str:
    """The value of a quantity as a table writes it."""
    quantity = next(q for q in (*ACCURACY, *COSTS) if q.field == field)
    return quantity.show(value)


def value_of(step: Step, field: str) -> float | None:
    """The value of a quantity at a step; of the original, those that are so by definition."""
    if step.progress is not None and not step.layers and field in ("kl", "relative_error", "top1", "cosine"):
        other = {"kl": "perplexity", "top1": "perplexity", "relative_error": "texts", "cosine": "texts"}[field]
        language = step.progress.accuracy.perplexity is not None
        if language != (other == "perplexity"):
            return None
        return 0.0 if field in ("kl", "relative_error") else 1.0
    profile = step.profile()
    return getattr(profile, field, None) if hasattr(profile, field) else getattr(profile.accuracy, field, None)


def _figure_rows(session: Session) -> list[tuple[str, str, str, str, str]]:
    """(field, original, now, change, tone) of what there is to say of this model."""
    compared = session.comparison()
    original, now = compared.before, compared.now
    changes = {c.field: c for c in compared.changes}
    language = None if now.accuracy is None else now.accuracy.tokens is not None
    rows = []
    for field in _SHOWN:
        of_language = field in ("perplexity", "kl", "top1")
        of_others = field in ("relative_error", "cosine")
        if (of_others and language is not False) or (of_language and language is False):
            continue
        if field == "metric" and session.present.metric is None and session.present.why_no_metric is None:
            continue
        then, present = value_of(session.original, field), value_of(session.present, field)
        if field in ("perplexity", "metric"):  # over as many texts as the present ones, while they grow
            then = getattr(original.accuracy, field, None)
        change = changes.get(field)
        words, tone = ("", "") if change is None else (change.words, change.verdict)
        if session.present is session.original:
            words, tone = "", ""
        elif present is None:
            words, tone = _why(session, field), "unknown"
        elif change is not None and change.verdict == "within noise":
            words = f"{words}, noise"
        rows.append((field, _value(session, field, then), _value(session, field, present), words, tone))
    return rows


def _value(session: Session, field: str, value: float | None) -> str:
    if value is not None:
        return shown(field, value)
    return "–" if _why(session, field) or not session.busy else "…"


def _why(session: Session, field: str) -> str:
    profile = session.present.profile()
    reasons = {**(profile.accuracy.unavailable if profile.accuracy else {}), **profile.unavailable}
    why = reasons.get(field, "")
    if why == "not measured yet":
        return "" if session.busy else why
    return why.split(":")[0].split(";")[0]


def _figure(session: Session, field: str, then: str, now: str, change: str, tone: str) -> str:
    marks = {"worse": "▲ ", "better": "▼ "}
    quantity = next(q for q in (*ACCURACY, *COSTS) if q.field == field)
    rising = quantity.better > 0
    mark = marks.get(tone, "")
    if rising and mark:
        mark = {"▲ ": "▼ ", "▼ ": "▲ "}[mark]
    words = f"{mark}{change}"
    return (
        f'<tr data-field="{field}"><th>{_SHOWN[field]}</th><td>{escape(then)}</td>'
        f'<td class="qnb-now">{escape(now)}</td>'
        f'<td class="qnb-change qnb-{tone.replace(" ", "-")}" title="{escape(words)}">{escape(words)}</td>'
        f"<td>{_sparkline(session, field)}</td></tr>"
    )


def _sparkline(session: Session, field: str) -> str:
    steps = [(s.number, value_of(s, field)) for s in session.trail.steps]
    known = [(n, v) for n, v in steps if v is not None and math.isfinite(v)]
    width, height = 72, 20
    if len(known) < 2:
        return f'<svg class="qnb-spark" width="{width}" height="{height}"></svg>'
    low, high = min(v for _, v in known), max(v for _, v in known)
    span = high - low or 1.0
    last = len(session.trail.steps) - 1
    points = [(4 + n / last * (width - 8), height - 4 - (v - low) / span * (height - 8)) for n, v in known]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    here = next(((x, y) for (n, _), (x, y) in zip(known, points, strict=True) if n == session.present.number), None)
    dot = "" if here is None else f'<circle cx="{here[0]:.1f}" cy="{here[1]:.1f}" r="2.6"/>'
    return f'<svg class="qnb-spark" width="{width}" height="{height}"><polyline points="{line}"/>{dot}</svg>'


def _continuations(session: Session) -> str:
    then, now = session.original.written, session.present.written
    tokenizer = session.stages.tokenizer
    prompt = tokenizer.decode(session.stages.prompt_ids[0].tolist(), skip_special_tokens=True)
    same = 0
    if then is not None and now is not None:
        same = next((i for i, (a, b) in enumerate(zip(then, now, strict=False)) if a != b), min(len(then), len(now)))
    boxes = []
    for title, ids in (("the original writes", then), ("the model writes now", now)):
        if ids is None:
            body = '<span class="qnb-quiet">…</span>'
        else:
            parts = continuation.pieces(tokenizer, ids)
            differs = "".join(parts[:same]), "".join(parts[same : same + 1]), "".join(parts[same + 1 :])
            marked = f"<mark>{escape(_visible(differs[1]))}</mark>" if same < len(ids) else ""
            body = f"{escape(differs[0])}{marked}{escape(differs[2])}"
        boxes.append(f'<div class="qnb-words"><h4>{title}</h4><pre><i>{escape(prompt[-120:])}</i>{body}</pre></div>')
    verdict = ""
    if then is not None and now is not None and session.present is not session.original:
        whole = len(then) == len(now) == same
        verdict = (
            f"the same {same} tokens"
            if whole
            else f"the first {same} of {max(len(then), len(now))} tokens are the same"
        )
    return f'<div class="qnb-pair">{"".join(boxes)}</div><div class="qnb-quiet qnb-verdict">{verdict or "&nbsp;"}</div>'


def _changed_tokens(session: Session) -> str:
    progress = session.present.progress
    if progress is None or not progress.changed or not hasattr(session.stages.tokenizer, "decode"):
        return ""

    def text(*ids: int) -> str:
        return _visible(session.stages.tokenizer.decode(list(ids)))

    rows = "".join(
        f"<tr><td><code>{escape(text(*c.before))}</code></td><td><code><b>{escape(text(c.wanted))}</b></code></td>"
        f"<td>{_percent(c.probability[0])} → {_percent(c.probability[1])}</td>"
        f"<td><code>{escape(text(c.top[0]))}</code></td><td><code>{escape(text(c.top[1]))}</code></td>"
        f"<td>{format_number(c.kl)}</td></tr>"
        for c in progress.changed
    )
    names = ("behind", "the token", "its probability", "original's guess", "guess now", "KL")
    head = "".join(f"<th>{name}</th>" for name in names)
    return (
        '<h4 class="qnb-sub">evaluation tokens that changed most</h4>'
        f'<table class="qnb-tokens"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    )


def _visible(text: str) -> str:
    return text.replace("\n", "⏎").replace("\t", "⇥") or "∅"


def _percent(p: float) -> str:
    return f"{100 * p:.0f} %" if p >= 0.1 else f"{format_number(100 * p, 2)} %"


_W, _H = 300, 110


def _chart(title: str, body: str, left: str, right: str, note: str = "") -> str:
    return (
        f'<figure class="qnb-chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {_W} {_H + 16}" role="img" aria-label="{escape(title)}">{body}'
        f'<line class="qnb-axis" x1="0" y1="{_H}" x2="{_W}" y2="{_H}"/>'
        f'<text x="0" y="{_H + 12}">{escape(left)}</text>'
        f'<text x="{_W}" y="{_H + 12}" text-anchor="end">{escape(right)}</text></svg>'
        f'<div class="qnb-quiet">{escape(note) or "&nbsp;"}</div></figure>'
    )


def _histogram(seen: Look) -> str:
    highest = max(seen.histogram) or 1
    step = _W / BINS
    bars = "".join(
        f'<rect class="qnb-bar" x="{i * step:.2f}" y="{_H - n / highest * (_H - 14):.2f}" width="{step - 0.6:.2f}" '
        f'height="{n / highest * (_H - 14):.2f}"/>'
        for i, n in enumerate(seen.histogram)
        if n
    )
    span = seen.high - seen.low or 1.0
    levels = seen.levels or ()
    lines = "".join(
        f'<line class="qnb-level" x1="{x:.2f}" x2="{x:.2f}" y1="{0 if len(levels) <= 40 else _H - 10}" y2="{_H}"/>'
        for x in ((v - seen.low) / span * _W for v in levels)
        if -1 <= x <= _W + 1
    )
    note = "the original: no grid" if seen.levels is None else f"{len(levels)} values in use, drawn as lines"
    worst = "largest error" if seen.errors is not None else "largest weight"
    title = f"weights of output {seen.channel} ({worst}) on their grid"
    return _chart(title, bars + lines, format_number(seen.low), format_number(seen.high), note)


def _channels(seen: Look) -> str:
    if seen.errors is None:
        return _chart("error of each output channel", "", "0", "", "the original: no error")
    highest = max(seen.errors) or 1.0
    body = _profile(seen.errors, highest, "qnb-bar")
    middle = sorted(seen.errors)[len(seen.errors) // 2]
    note = f"middle {_percent(middle)}, largest {_percent(max(seen.errors))} (output {seen.channel})"
    return _chart("relative error of each output channel", body, "0", str(len(seen.errors) - 1), note)


def _inputs(seen: Look) -> str:
    if seen.inputs is None:
        return _chart("range of each input channel", "", "0", "", "the layer was not called")
    highest = max(*seen.inputs, seen.calibrated or 0.0) or 1.0
    body = _profile(seen.inputs, highest, "qnb-bar")
    if seen.calibrated is not None:
        y = _H - seen.calibrated / highest * (_H - 14)
        body += f'<line class="qnb-limit" x1="0" x2="{_W}" y1="{y:.1f}" y2="{y:.1f}"/>'
    named = ", ".join(f"{c} ({r:.0f}×)" for c, r in seen.outliers)
    note = f"outlier channels: {named}" if named else "no channel stands out"
    if seen.calibrated is not None:
        note = f"calibrated up to {format_number(seen.calibrated)}; {note}"
    return _chart(
        f"largest input of each channel, up to {format_number(max(seen.inputs))}",
        body,
        "0",
        str(len(seen.inputs) - 1),
        note,
    )


def _profile(values: Sequence[float], highest: float, name: str) -> str:
    """Bars of many values: as many as fit, each the largest of those that it stands for."""
    bars = min(len(values), 150)
    step = _W / bars
    cells = [
        max(values[i * len(values) // bars : max(i * len(values) // bars + 1, (i + 1) * len(values) // bars)])
        for i in range(bars)
    ]
    return "".join(
        f'<rect class="{name}" x="{i * step:.2f}" y="{_H - v / highest * (_H - 14):.2f}" '
        f'width="{max(0.4, step - 0.4):.2f}" height="{v / highest * (_H - 14):.2f}"/>'
        for i, v in enumerate(cells)
    )


def _map_table(session: Session) -> str:
    """The map as a plain table; a colour never stands without its word."""
    faces = by_scheme(session.rows, session.refused)
    cells: dict[tuple[int, int], Face] = {}
    alone: dict[int, Face] = {}
    for place, face in zip(session.grid.places, faces, strict=True):
        if place.alone:
            alone[place.row] = face
        else:
            cells[place.row, place.column] = face
    quiet = "color:#777777;font-weight:400;text-align:left;padding:2px 8px 2px 0"
    head = "".join(f'<th style="{quiet}">{escape(c)}</th>' for c in ("", *session.grid.columns))
    body = ""
    for number, row in enumerate(session.grid.rows):
        if number in alone:
            tds = _map_cell(alone[number])
        else:
            tds = "".join(_map_cell(cells.get((number, c))) for c in range(len(session.grid.columns)))
        body += f'<tr><th style="{quiet}">{escape(row)}</th>{tds}</tr>'
    look = "border-collapse:collapse;margin:4px 0 8px 0"
    return f'<table style="{look}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _map_cell(face: Face | None) -> str:
    if face is None:
        return "<td></td>"
    colours = f"background-color:{face.paper};color:{face.ink};" if face.ink else "color:#777777;"
    return f'<td style="{colours}text-align:center;padding:2px 8px;border:1px solid #cccccc">{escape(face.words)}</td>'


def _figures_table(session: Session) -> Table:
    tones = {"better": "good", "worse": "bad"}
    rows = [
        (_SHOWN[field], then, now, Cell(change, tones.get(tone, "muted")))
        for field, then, now, change, tone in _figure_rows(session)
    ]
    return Table(("quantity", "original", "now", "change"), rows, numeric=frozenset({1, 2, 3}))


def _steps_table(session: Session) -> Table:
    error = error_field(session)

    def show(step: Step) -> str:
        value = value_of(step, error)
        return "–" if value is None else shown(error, value)

    rows = [
        (f"{'→ ' if s is session.present else ''}{s.number}", s.words, format_bytes(s.weight_bytes), show(s))
        for s in session.trail.steps
    ]
    return Table(("step", "what", "weights held", _SHOWN[error]), rows, numeric=frozenset({0, 2, 3}))


def error_field(session: Session) -> str:
    """The quantity that says how far a step is from the original: KL, for other models the relative error."""
    for step in session.trail.steps:
        if step.progress is not None and step.layers:
            return "kl" if step.progress.accuracy.tokens is not None else "relative_error"
    return "kl"
