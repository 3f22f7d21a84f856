"""`dry_run`: what `quantize` would make of a model, and whether that fits here. Nothing is changed or computed.

Each layer's shape is taken through the very code that quantizes it, by tensors that have a shape and no values, so the
bytes are those that will be held. It works for a model on the meta device, which has no values either.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from qnb import rounding as roundings
from qnb import schemes
from qnb.env import available_bytes
from qnb.errors import BadInput
from qnb.model.experts import Stack
from qnb.model.linear import LOOKUP, QLayer, held_storages
from qnb.model.quantize import _KEEP, Report, Row, coverage_line, what_is_meant
from qnb.model.recipe import Recipe
from qnb.model.select import Site, find_sites
from qnb.model.stacks import Moving, experts_that_move
from qnb.model.variants import Order, build, depends_on_inputs
from qnb.results import Cell, Result, Table, format_bytes
from qnb.rounding import Statistics
from qnb.schemes import How, Scheme


@dataclasses.dataclass(frozen=True, repr=False)
class DryRun(Result):
    """What a model would become; a device's name is "cpu" for this machine's memory.

    rows             what each linear layer would be, as in `Report`; coverage of how many weights
    weight_bytes     what the model would hold, each storage once, and weight_bytes_before what it holds
    original_bytes   what kept originals would hold apart, and original_bytes_before what they hold
    needed_bytes     device -> what has to be had beside all that is held now, at the worst moment: originals are let go
                     only once every layer has changed. A model on the meta device has to be loaded first.
    available_bytes  device -> what can be had there now
    fits             whether every device has what is needed
    """

    title: str
    rows: Sequence[Row]
    coverage: str
    weight_bytes: int
    weight_bytes_before: int
    original_bytes: int
    original_bytes_before: int
    needed_bytes: Mapping[str, int]
    available_bytes: Mapping[str, int]
    fits: bool

    def _tables(self) -> Sequence[Table]:
        [layers] = Report(self.title, self.rows, self.coverage)._tables()
        columns = ["then" if column == "now" else column for column in layers.columns]
        layers = dataclasses.replace(layers, columns=columns, lead=[*layers.lead, *self._verdict()])
        pairs = [
            ("weights held", self.weight_bytes_before, self.weight_bytes),
            ("kept originals", self.original_bytes_before, self.original_bytes),
        ]
        pairs.append(("together", sum(p[1] for p in pairs), sum(p[2] for p in pairs)))
        memory = [(name, format_bytes(before), format_bytes(then)) for name, before, then in pairs]
        return [layers, Table(("memory", "now", "then"), memory, numeric=frozenset({1, 2}))]

    def _verdict(self) -> list[Cell]:
        cells = []
        for device, needed in self.needed_bytes.items():
            free = self.available_bytes[device]
            words = (
                f"{format_bytes(needed)} more on {device} at the worst moment, where {format_bytes(free)} can be had"
            )
            fits = needed <= free
            cells.append(Cell(f"{'fits' if fits else 'does not fit'}: {words}", "good" if fits else "bad"))
        return cells


def dry_run(
    model: nn.Module,
    scheme: str | Scheme | Recipe,
    *,
    layers: str | Iterable[str] | None = None,
    skip: str | Iterable[str] | None = None,
    rounding: str = "nearest",
    observer: str = "minmax",
    smooth: float | str | None = None,
    calibration: object = None,
    tokenizer: object = None,
    seed: int = 0,
    keep: str = "memory",
) -> DryRun:
    """What `quantize` with the same arguments would make of the model; changes nothing, and looks at no value.

    Whether there is `calibration` decides what layers that share a weight share; into its texts nobody looks.

    A recipe replaces all arguments but `calibration` and `keep`.

    Works on a model on the meta device, which is taken as if it were to be loaded into this machine's memory. Raises
    what `quantize` would raise, apart from `BadWeights`.
    """
    meant = what_is_meant(scheme, layers, skip, rounding, observer, smooth, seed)
    if keep not in _KEEP:
        raise BadInput(f"keep={keep!r} is unknown: use one of {', '.join(_KEEP)}")
    model = getattr(model, "_orig_mod", model)  # behind torch.compile's wrapper
    sites = find_sites(model)
    back, orders, reasons = meant(sites)
    by_site, put_back = {id(order.site): order for order in orders}, set(map(id, back))
    moving = experts_that_move(sites, [order.site for order in orders], back, keep)
    plan = _Plan(model, calibration is not None, keep, moving)
    for site in sites:
        plan.add(site, by_site.get(id(site)), id(site) in put_back, reasons.get(site.name))
    rows = plan.rows()
    to = "as the recipe says" if isinstance(scheme, Recipe) else f"to {schemes.find(scheme).name}"
    weight_bytes, original_bytes = plan.held()
    before = held_storages(model)
    available = {device: available_bytes(device) for device in plan.needed}
    return DryRun(
        title=f"dry run: {plan.changes} linear layer{'' if plan.changes == 1 else 's'} would change {to}",
        rows=tuple(rows),
        coverage=coverage_line(model, rows, sites),
        weight_bytes=weight_bytes,
        weight_bytes_before=before[0],
        original_bytes=original_bytes,
        original_bytes_before=before[1],
        needed_bytes=dict(plan.needed),
        available_bytes=available,
        fits=all(needed <= available[device] for device, needed in plan.needed.items()),
    )


@dataclasses.dataclass(frozen=True)
class Shell:
    """What a layer of some shape would be in a scheme: bytes held, padding included, and the kernel that runs it."""

    nbytes: int
    kernel: str


def shell_of(
    scheme: Scheme,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    divided: bool = False,
) -> Shell:
    """The shell of a weight (N, K) of `dtype`; but for a divisor, how its codes are chosen changes no byte.

    A scheme whose code looks at values, which tensors without values refuse, is run on random ones.
    """
    try:
        with FakeTensorMode():
            return _shell(scheme, torch.empty(shape, dtype=dtype, device=device), divided)
    except DataDependentOutputException:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return _shell(scheme, values.to(device, dtype), divided)


def _shell(scheme: Scheme, weight: Tensor, divided: bool) -> Shell:
    statistics = None
    if scheme.calibrated or divided:
        ones = weight.new_ones((1, weight.shape[1]), dtype=torch.float32)
        statistics = Statistics(1, -ones, ones, ones[0], ones)
    variant = build(weight, scheme, How(smooth=0.5 if divided else None), statistics)
    return Shell(variant.nbytes, variant.kernel())


class _Plan:
    """What would change, a layer at a time."""

    def __init__(self, model: nn.Module, calibrated: bool, keep: str, moving: Sequence[Moving]) -> None:
        self._model, self._calibrated, self._keep = model, calibrated, keep
        self._shells: dict[tuple, Shell] = {}
        # id of the module that stands there now -> who holds what takes its place, and what that is
        self._forth: dict[int, tuple[Hashable, Shell]] = {}
        self._new: set[Hashable] = set()  # those holders
        self._back: set[int] = set()
        self._shared: set[int] = set()  # ids of modules whose weight lies in memory that something else uses as well
        self._stacks: dict[int, Stack] = {}  # by the id of their blocks, those whose place their layers would take
        self._rows: list[tuple[Site, Row]] = []
        self.changes = 0
        self.needed: Counter[str] = Counter()
        lacking = {id(t): t.untyped_storage().nbytes() for t in _tensors(model) if t.is_meta}
        self.needed["cpu"] = sum(lacking.values())
        self._moving: dict[int, dict[object, int]] = {}  # id of a module -> the storage in which its weight is to lie
        for block, name, matrices, device in moving:
            storage = {id(block._parameters[name]): block._parameters[name].nbytes}
            self._moving.update({id(site.module): storage for site in matrices})
            self.needed[str(device)] += block._parameters[name].nbytes

    def add(self, site: Site, order: Order | None, back: bool, reason: str | None) -> None:
        """Adds the row of a layer: it becomes what is ordered, goes `back`, or stays, for a reason if there is one."""
        layer, quantized = site.module, isinstance(site.module, QLayer)
        if site.embedding and not quantized and order is None:
            return
        shape, dtype = site.shape, layer.dtype if quantized else layer.weight.dtype
        if not site.alone:
            self._shared.add(id(layer))
        if order is not None and site.stack is not None and not site.stack.installed:
            self._stacks[id(site.stack.layers.block)] = site.stack
        size = shape[0] * shape[1] * dtype.itemsize
        now = (layer.scheme, str(layer.variant.how), layer.kernel, layer.variant.nbytes) if quantized else None
        if back:
            now = self._put_back(site) if quantized else None
        elif order is not None:
            shell = self._quantize(order)
            kernel = LOOKUP if site.embedding else shell.kernel
            now = (order.scheme.name, str(order.how), kernel, shell.nbytes)
        scheme, rounding, kernel, after = now or ("none", None, "torch", size)
        skipped = None if now else reason or site.refused
        self._rows.append((site, Row(site.name, shape, scheme, rounding, kernel, size, after, skipped)))

    def rows(self) -> list[Row]:
        """A row for each layer that was added, with what is to be said of weights that it shares."""
        quantized = {row.name for _, row in self._rows if row.scheme != "none"}
        rows = []
        for site, row in self._rows:
            stays = ", which stays as it was" if row.name in quantized and site.tied not in quantized else ""
            rows.append(
                row if site.tied is None else dataclasses.replace(row, note=f"weight tied to {site.tied}{stays}")
            )
        return rows

    def held(self) -> tuple[int, int]:
        """(weight_bytes, original_bytes) as `held_storages` would find them afterwards."""
        weight: dict[object, int] = {}
        original: dict[object, int] = {}
        for module in self._modules():
            own = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
            forth = self._forth.get(id(module))
            source = module.original if isinstance(module, QLayer) else module
            if id(module) in self._back:
                now = source.weight.dtype, source.weight.device
                moved = module.on_disk or now != (module.dtype, module.device)
                size = source.weight.numel() * module.dtype.itemsize
                lies = {id(source.weight): size} if moved else _storage(source.weight)
                weight.update(self._moving.get(id(module), lies))
            elif forth is not None:
                own = [t for t in own if t is not module._parameters.get("weight")]
                holder, shell = forth
                weight[holder] = shell.nbytes
                if self._stays_in_memory(module):
                    original.update(self._moving.get(id(module)) or _storage(source.weight))
            elif isinstance(module, QLayer):
                own += module.variant.tensors().values()
                if source is not None and not module.on_disk:
                    original.update(self._moving.get(id(module)) or _storage(source.weight))
            for tensor in own:
                weight.update(_storage(tensor))
        return sum(weight.values()), sum(size for key, size in original.items() if key not in weight)

    def _modules(self) -> Iterator[nn.Module]:
        for module in self._model.modules():
            stack = self._stacks.get(id(module))
            yield from [module] if stack is None else stack.layers.modules()

    def _quantize(self, order: Order) -> Shell:
        site, scheme, how = order.site, order.scheme, order.how
        layer = site.module
        again = isinstance(layer, QLayer)
        weight = layer.require_original(f"quantizing {site.name} again").weight if again else layer.weight
        device = layer.device if again else torch.device("cpu") if weight.is_meta else weight.device
        divided = how.smooth is not None or roundings.find(how.rounding, scheme).divides
        key = (scheme, site.shape, weight.dtype, device, divided)
        if key not in self._shells:
            self._shells[key] = shell_of(*key)
        shell = self._shells[key]
        self.changes += 1
        # Layers that share a weight share its variant too, unless that depends on their inputs.
        alone = depends_on_inputs(scheme, how, self._calibrated)
        holder = id(layer) if alone else (id(weight), scheme, how)
        self._forth[id(layer)] = holder, shell
        if holder not in self._new:
            self._new.add(holder)
            self.needed[str(device)] += shell.nbytes
            if self._keep == "memory" and not again and device.type != "cpu" and site.alone:
                self.needed["cpu"] += weight.nbytes
        return shell

    def _stays_in_memory(self, layer: nn.Module) -> bool:
        """Whether the original of a layer that is quantized lies in memory afterwards."""
        if isinstance(layer, QLayer) and layer.on_disk:
            return False
        return self._keep == "memory" or (self._keep == "disk" and id(layer) in self._shared)

    def _put_back(self, site: Site) -> None:
        layer = site.module
        weight = layer.require_original(f"putting back {site.name}").weight
        if id(layer) not in self._moving and (layer.on_disk or weight.device != layer.device):
            self.needed[str(layer.device)] += weight.numel() * layer.dtype.itemsize
        self._back.add(id(layer))
        self.changes += 1


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _storage(tensor: Tensor) -> dict[object, int]:
    storage = tensor.untyped_storage()
    return {(tensor.device, storage.data_ptr() or storage._cdata): storage.nbytes()}
