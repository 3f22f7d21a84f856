"""`quantize`, `restore` and `layers`: what a person does to a model, and the report of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

from torch import nn
from torch.nn.parameter import UninitializedParameter

from qnb import schemes
from qnb.errors import BadInput, LayerRefused, NotQuantized
from qnb.model.disk import Keeper
from qnb.model.fingerprint import note_calibration
from qnb.model.linear import NOT_KEPT, QLayer, class_for, disk_bytes, walk
from qnb.model.recipe import FROM_CHECKPOINT, Recipe
from qnb.model.select import OUTPUT_EMBEDDING, Site, check_model, choose, find_sites
from qnb.model.stacks import move_steps, place_steps
from qnb.model.swap import Follow, Keep, Place, Step, Stow, Switch, land
from qnb.model.variants import Order, calibration_of, check_how, depends_on_inputs, make, refusal
from qnb.progress import progress_bar
from qnb.results import Cell, Result, Table, format_bytes, one_line
from qnb.schemes import How, Scheme, Variant

_KEEP = ("memory", "disk", "none")


@dataclasses.dataclass(frozen=True)
class Row:
    """One linear layer: `shape` is (N, K); bytes are those of its weight, scales and padding, before and after."""

    name: str
    shape: tuple[int, int]
    scheme: str
    rounding: str | None
    kernel: str
    bytes_before: int
    bytes_after: int
    skipped: str | None = None
    note: str | None = None


@dataclasses.dataclass(frozen=True, repr=False)
class Report(Result):
    """What every linear layer of a model is now. `title` says what was done, `coverage` of how many weights."""

    title: str
    rows: Sequence[Row]
    coverage: str

    def _tables(self) -> Sequence[Table]:
        groups: dict[tuple, list[Row]] = {}
        for row in self.rows:
            key = (_kind(row.name), row.shape, row.scheme, row.rounding, row.kernel, row.skipped)
            groups.setdefault(key, []).append(row)
        lines = []
        for (kind, shape, scheme, rounding, kernel, skipped), rows in groups.items():
            before, after = sum(r.bytes_before for r in rows), sum(r.bytes_after for r in rows)
            name = rows[0].name if len(rows) == 1 else kind
            remark = "; ".join(filter(None, (skipped, _of_several([row.note for row in rows]))))
            lines.append(
                (
                    name,
                    str(len(rows)),
                    f"{shape[0]} x {shape[1]}",
                    Cell(scheme, "muted" if scheme == "none" else ""),
                    rounding or "",
                    kernel,
                    format_bytes(before),
                    format_bytes(after),
                    Cell(remark, "muted"),
                )
            )
        before, after = sum(r.bytes_before for r in self.rows), sum(r.bytes_after for r in self.rows)
        lines.append(
            ("all linear layers", str(len(self.rows)), "", "", "", "", format_bytes(before), format_bytes(after), "")
        )
        columns = ("layers", "count", "N x K", "scheme", "rounding", "kernel", "original", "now", "")
        return [Table(columns, lines, [Cell(self.title, "head")], [self.coverage], frozenset({1, 2, 6, 7}))]


def quantize(
    model: nn.Module,
    scheme: str | Scheme | Recipe,
    *,
    layers: str | Iterable[str] | None = None,
    skip: str | Iterable[str] | None = None,
    rounding: str = "nearest",
    observer: str = "minmax",
    smooth: float | str | None = None,
    calibration: Iterable | None = None,
    tokenizer: object = None,
    seed: int = 0,
    keep: str = "memory",
    progress: bool = True,
) -> Report:
    """Changes `model`: its linear layers run in `scheme` from now on. All that were asked for change, or none.

    scheme       a name such as "w8a8"; "none" puts originals back; or a `Recipe`, which says all by itself but `keep`
    layers, skip names or globs (`"*.mlp.down_proj"`); without them every `nn.Linear` but the output embedding
    rounding     how the codes of a weight are chosen
    observer     how the fixed range of activations is read off calibration, for -static schemes
    smooth       moves the width of activations into the weights inside each layer (Xiao et al. 2022, SmoothQuant,
                 arXiv:2211.10438): an exponent from 0 to 1, or "auto" to choose one for each layer
    calibration  texts, as for `evaluate`, that whatever needs statistics of the inputs is calibrated on
    seed         of whatever a rounding draws at random
    keep         where the originals are kept meanwhile, so that `restore` is exact: "memory" as they are, "disk" in
                 files that are mapped into memory (the checkpoint's own where they hold the same bits, else temporary
                 ones), "none" nowhere. What something else uses as well stays where it is, and experts of a mixture
                 never go to disk. With "memory" originals leave a GPU for the host; experts do together, once all of a
                 block's are quantized. A layer that is quantized already goes from memory to disk or to nowhere when
                 asked, and not back.

    Codes are always chosen from the original weights, never from quantized ones. Raises `UnknownScheme`,
    `UnknownRounding`, `LayerRefused`, `BadWeights`, `BadInput` or `NotQuantized`, each before anything has changed.
    """
    if keep not in _KEEP:
        raise BadInput(f"keep={keep!r} is unknown: use one of {', '.join(_KEEP)}")
    model, remark = _inner(model)
    check_model(model)
    own = calibration_of(model, calibration, tokenizer)
    meant = what_is_meant(scheme, layers, skip, rounding, observer, smooth, seed)
    if isinstance(scheme, Recipe):
        what = "changed as the recipe says"
    else:
        asked = schemes.find(scheme)
        what = "back to the original" if asked.grid is None else f"quantized to {asked.name}"
    reasons: dict[str, str | None] = {}
    changed, calibrated = 0, False

    def plan() -> list[Step]:
        nonlocal changed, calibrated
        sites = find_sites(model)
        back, orders, why_not = meant(sites)
        reasons.update(why_not)
        keeper = Keeper(model) if keep == "disk" else None
        calibrated = own is not None and any(depends_on_inputs(o.scheme, o.how, own.given) for o in orders)
        forth = [order.site for order in orders]
        moved = move_steps(sites, forth, back, keep)
        changes = [*map(_back, back)]
        with progress_bar(len(orders), what, progress) as bar:
            changes += [_forth(site, made, keep, keeper) for site, made in make(model, orders, sites, own, bar.update)]
        changed = sum(bool(change) for change in changes)
        steps = [step for change in changes for step in change]
        return [*moved, *steps, *place_steps(sites, forth, back, keep)]

    landed = land(model, plan)
    if isinstance(scheme, Recipe):
        other = scheme.differences(model, own.texts if calibrated else None)
        remark += f"; it was made elsewhere: {', '.join(other)}" if other else ""
    if calibrated:
        note_calibration(model, own.texts)
    return _report(model, _when(f"{_count(changed)} {what}{remark}", landed), reasons)


def what_is_meant(
    scheme: str | Scheme | Recipe, layers, skip, rounding: str, observer: str, smooth: float | str | None, seed: int
) -> Callable[[Sequence[Site]], tuple[list[Site], list[Order], dict[str, str | None]]]:
    """Says of all sites which are put back, what becomes of which, and of each by name why it is skipped, or None.

    Raises at once for what no model could be changed to.
    """
    if isinstance(scheme, Recipe):
        return functools.partial(_by_recipe, scheme)
    asked, how = schemes.find(scheme), How(rounding, observer, smooth, seed)
    check_how(how, asked)
    return functools.partial(_by_pattern, asked, how, layers, skip)


def _by_pattern(asked: Scheme, how: How, layers, skip, sites: Sequence[Site]):
    """Where one scheme is asked for."""
    chosen = choose(sites, layers, skip, refusal(asked, how))
    reasons = {site.name: chosen[i] for i, site in enumerate(sites)}
    meant = [site for site in sites if reasons[site.name] is None]
    if asked.grid is None:
        return meant, [], reasons
    return [], [_order(site, asked, how) for site in meant], reasons


def _by_recipe(recipe: Recipe, sites: Sequence[Site]):
    """Where a recipe is: layers that it does not name go back to their originals."""
    known = {site.name: site for site in sites}
    unknown = [name for name in recipe.layers if name not in known]
    if unknown:
        raise LayerRefused(
            f"the recipe names {len(unknown)} layers that the model does not have, first "
            f"{one_line(repr(unknown[0]), 80)}: is it a recipe of another model?"
        )
    orders, back = [], []
    for site in sites:
        layer = recipe.layers.get(site.name)
        asked = None if layer is None else schemes.find(layer.scheme)
        if asked is None or asked.grid is None:
            back.append(site)
            continue
        if layer.how.rounding == FROM_CHECKPOINT:
            raise LayerRefused(
                f"the codes of layer {site.name} came with a checkpoint, and no recipe makes them: use qnb.attach"
            )
        check_how(layer.how, asked)
        refused = site.refused or refusal(asked, layer.how)(site)
        if refused:
            raise LayerRefused(f"layer {site.name} cannot be quantized to {asked.name}: {refused}")
        orders.append(_order(site, asked, layer.how))
    return back, orders, {site.name: "not in the recipe" for site in back}


def _order(site: Site, scheme: Scheme, how: How) -> Order:
    if isinstance(site.module, QLayer):
        site.module.require_original(f"quantizing {site.name} again")
    return Order(site, scheme, how)


def restore(model: nn.Module) -> Report:
    """Changes `model` back: every quantized layer gives its place to the very module that stood there before.

    The modules follow what the model went through meanwhile: device, floating type and training flag. Raises
    `NotQuantized` where there is nothing to restore, or an original was not kept.
    """
    model, remark = _inner(model)
    count = 0

    def plan() -> list[Step]:
        nonlocal count
        every = find_sites(model)
        sites = [site for site in every if isinstance(site.module, QLayer)]
        if not sites:
            raise NotQuantized("the model holds no quantized layer, so there is nothing to restore: quantize it first")
        count = len(sites)
        steps = [*move_steps(every, [], sites, "memory"), *(step for site in sites for step in _back(site))]
        return [*steps, *place_steps(every, [], sites, "memory")]

    landed = land(model, plan)
    return _report(model, _when(f"{_count(count)} restored: the same modules as before{remark}", landed), {})


def layers(model: nn.Module) -> Report:
    """What every linear layer of the model is now; changes nothing."""
    model, _ = _inner(model)
    return _report(model, f"the linear layers of {type(model).__name__}", {})


def _inner(model: nn.Module) -> tuple[nn.Module, str]:
    """The model behind torch.compile's wrapper, whose names its layers have, and what to say of it."""
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, nn.Module):
        return inner, "; the model is compiled: it compiles anew at its next call"
    return model, ""


def _forth(site: Site, variant: Variant, keep: str, keeper: Keeper | None) -> list[Step]:
    layer, again = site.module, isinstance(site.module, QLayer)
    original = site.source
    weight, steps = original.weight, []
    if again:
        if variant is not layer.variant:
            steps += [Switch(*site.places[0], layer, layer.variant, variant)]
        kept = layer.original, layer.original_missing, layer.mapped
    else:
        layer = class_for(original)(original, variant, keep=keep != "none")
        steps += [Place(parent, child, original, layer) for parent, child in site.places]
        kept = original, None, None
    if keep == "none" and again:
        steps.append(Keep(layer, kept, (None, NOT_KEPT, None)))
    elif keep == "disk" and site.alone and not layer.on_disk and not weight.is_inference():
        mapped = keeper.keep(site.name, weight)
        steps += [Keep(layer, kept, (original, None, mapped)), Stow(original, weight.data, mapped.tensor)]
    elif keep == "memory" and not again and weight.device.type != "cpu" and site.alone:
        steps.append(Stow(original, weight.data, weight.data.cpu()))
    return steps


def _back(site: Site) -> list[Step]:
    layer = site.module
    if not isinstance(layer, QLayer):
        return []
    original = layer.require_original(f"putting back {site.name}")
    steps: list[Step] = []
    if layer.on_disk:
        layer.mapped.verify(f"putting back {site.name}")
        steps.append(Stow(original, original.weight.data, layer.mapped.in_memory()))
    return [*steps, Follow(layer, original), *(Place(parent, child, layer, original) for parent, child in site.places)]


def _report(model: nn.Module, title: str, reasons: dict[str, str | None]) -> Report:
    rows, sites = [], find_sites(model)
    quantized_names = {site.name for site in sites if isinstance(site.module, QLayer)}
    for site in sites:
        layer = site.module
        quantized = isinstance(layer, QLayer)
        if site.embedding and not quantized:  # they count apart, and are there for who names them
            continue
        dtype = layer.dtype if quantized else layer.weight.dtype
        size = site.shape[0] * site.shape[1] * dtype.itemsize
        note = None if site.tied is None else f"weight tied to {site.tied}"
        if note and quantized and site.tied not in quantized_names:
            note += ", which stays as it was"
        if quantized:
            away = "original on disk" if layer.on_disk else None
            note = "; ".join(filter(None, (note, away, layer.variant.note))) or None
        rows.append(
            Row(
                name=site.name,
                shape=site.shape,
                scheme=layer.scheme if quantized else "none",
                rounding=str(layer.variant.how) if quantized else None,
                kernel=layer.kernel if quantized else "torch",
                bytes_before=size,
                bytes_after=layer.variant.nbytes if quantized else size,
                skipped=None if quantized else reasons.get(site.name) or site.refused,
                note=note,
            )
        )
    away = disk_bytes(model)
    title += f"; originals of {format_bytes(away)} on disk" if away else ""
    return Report(title, tuple(rows), coverage_line(model, rows, sites))


def coverage_line(model: nn.Module, rows: Sequence[Row], sites: Sequence[Site]) -> str:
    """How much of the body (weights of two axes or more, embeddings apart) is quantized, and where the rest lies."""
    body: dict[str, int] = {}
    apart, seen = 0, set()
    output = {site.name for site in sites if site.kept == OUTPUT_EMBEDDING}
    linear = {id(site.module) for site in sites}
    quantized = {row.name for row in rows if row.scheme != "none"}
    uncovered = 0
    for path, module, _ in walk(model):
        for p in module._parameters.values():
            if p is None or isinstance(p, UninitializedParameter) or p.dim() < 2 or id(p) in seen:
                continue
            if path in quantized:  # not yet, where the rows are those of a dry run
                continue
            seen.add(id(p))
            if isinstance(module, nn.Embedding) or path in output:
                apart += p.numel()
            else:
                kind = type(module).__name__ + (f", {p.dim()}-D" if p.dim() > 2 else "")
                body[kind] = body.get(kind, 0) + p.numel()
                uncovered += 0 if id(module) in linear else p.numel()
    for site in sites:  # whose originals a dry run puts back
        if isinstance(site.module, QLayer) and site.name not in quantized and id(site.weight) not in seen:
            seen.add(id(site.weight))
            size = site.shape[0] * site.shape[1]
            apart += size if site.name in output else 0
            body["Linear"] = body.get("Linear", 0) + (0 if site.name in output else size)
    named = {row.name: row.shape[0] * row.shape[1] for row in rows if row.scheme != "none"}
    for site in sites:  # experts that a dry run would take out of their block
        if site.stack is not None and not site.stack.installed and site.name in named:
            kind = f"{type(site.stack.layers.block).__name__}, 3-D"
            body[kind] -= named[site.name]
            uncovered -= named[site.name]
    body = {kind: size for kind, size in body.items() if size}
    done = sum(r.shape[0] * r.shape[1] for r in rows if r.scheme != "none")
    total = done + sum(body.values())
    if not total:
        return "the model has no weights of two axes"
    rest = "; ".join(f"{_percent(n, total)} lie in {kind}" for kind, n in sorted(body.items(), key=lambda kv: -kv[1]))
    warning = "Warning: " if uncovered > 0.1 * total else ""
    line = f"{warning}quantized {_percent(done, total)} of the weights" + (f"; {rest}, not quantized" if rest else "")
    return line + (f" (embeddings apart: {apart / 1e6:.3g} M)" if apart else "")


def _when(title: str, landed: bool) -> str:
    return title if landed else f"when the present pass through the model ends: {title}"


def _count(n: int) -> str:
    return f"{n} linear layer{'' if n == 1 else 's'}"


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole
    return f"{share:.0f} %" if share in (0, 100) or 1 <= share <= 99 else f"{share:.1f} %"


def _of_several(notes: Sequence[str | None]) -> str | None:
    """The note that all layers of a line share, or each note with the number of layers that have it."""
    if len(set(notes)) == 1:
        return notes[0]
    counts = {note: notes.count(note) for note in notes if note is not None}
    return "; ".join(f"{note} ({count} of {len(notes)})" for note, count in counts.items())


def _kind(name: str) -> str:
    """The name with its numbers replaced: model.layers.3.mlp.up_proj -> model.layers.*.mlp.up_proj."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
