"""Calibration: statistics of layers' inputs, gathered by running the original model on texts, a block at a time.

One pass over the texts finds what enters the first block of layers; then each block runs by itself on what the one
before gave. So only one block's statistics and one block's hidden states are held at a time, and each block is run
twice: in that first pass, and for its statistics. Layers outside the blocks are seen in the first pass. A model whose
blocks do more than hand a hidden state on is run as a whole for each block.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qnb.errors import BadInput
from qnb.model.blocks import block_lists
from qnb.model.hooks import hooked
from qnb.model.inputs import samples_of
from qnb.model.linear import QLinear, original_pass
from qnb.model.select import Site
from qnb.model.subject import measuring_state
from qnb.rounding import Statistics
from qnb.rounding.base import Needs

# Rows of inputs that are kept of each layer, for roundings that compare outputs.
SAMPLE_ROWS = 1024


def gather(
    model: nn.Module,
    wanted: Mapping[str, Needs],
    sites: Sequence[Site],
    texts: object,
    tokenizer: object,
) -> Iterator[tuple[Site, Statistics]]:
    """Yields the sites named in `wanted` with the statistics of their inputs in the original model, block by block.

    `wanted` says for each site's name what its rounding needs. While the caller holds what was yielded, the model is as
    it was. Raises BadInput for texts that cannot be run, and for a layer that no text reaches.
    """
    samples, _ = samples_of(model, texts, tokenizer, words="calibration")
    samples = list(samples)
    chosen = [site for site in sites if site.name in wanted]
    chains = _chains(model, chosen)
    inside = {id(site) for chain in chains for block in chain for site in block.sites}
    recordings = [_Recording([block.module for block in chain]) for chain in chains]

    def run_model(watched: _Watched) -> None:
        for sample in samples:
            watched.next_text()
            model(*sample.args, **sample.kwargs)

    watched = _Watched([site for site in chosen if id(site) not in inside], wanted)
    with _running(model, watched), contextlib.ExitStack() as stack:
        for recording in recordings:
            stack.enter_context(hooked(recording.hooks(), recording.output_hooks()))
        run_model(watched)
    yield from watched.results()
    for chain, recording in zip(chains, recordings, strict=True):
        states = recording.first if len(recording.first) == len(samples) else None
        for number, block in enumerate(chain):
            if states is not None:
                watched = _Watched(block.sites, wanted)
                with _running(model, watched):
                    states = _run_alone(block.module, states, recording.calls(number), watched)
            if states is None:  # also where the block has just turned out not to stand alone
                watched = _Watched(block.sites, wanted)
                with _running(model, watched):
                    run_model(watched)
            yield from watched.results()


@dataclasses.dataclass(frozen=True)
class _Block:
    module: nn.Module
    sites: list[Site]


def _chains(model: nn.Module, sites: Sequence[Site]) -> list[list[_Block]]:
    """Lists of blocks that run one after another, outermost lists only; each block with the sites that lie in it alone.

    A list ends with its last block that has sites, and starts with its first. Where a layer stands in two blocks, or
    also outside them, only passes through the whole model see all of its inputs: it is in no block.
    """
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)

    def chain(path: str, modules: nn.ModuleList) -> list[_Block]:
        blocks = []
        for child, module in modules.named_children():
            prefix = f"{path}.{child}" if path else child
            own = [s for s in sites if all(p == prefix or p.startswith(f"{prefix}.") for p in paths[id(s.module)])]
            blocks.append(_Block(module, own))
        while blocks and not blocks[-1].sites:
            blocks.pop()
        while blocks and not blocks[0].sites:
            blocks.pop(0)
        return blocks

    return [chain(*found) for found in block_lists(model, lambda *given: bool(chain(*given)))]


def _run_alone(
    block: nn.Module, states: list[Tensor], calls: Sequence[_Call] | None, watched: _Watched
) -> list[Tensor] | None:
    """What the block gives for each text's state; None as soon as it is seen not to give what it gave in the model."""
    if calls is None:
        return None
    outputs: list[Tensor] = []
    for number, call in enumerate(calls):
        state, states[number] = states[number], None  # held no longer than needed
        if call.state is not None and not _same(call.state, state):
            return None
        watched.next_text()
        output = call.run(block, state)
        if output is None or (call.output is not None and not _same(call.output, output)):
            return None
        outputs.append(output)
    return outputs


def _same(there: Tensor, here: Tensor) -> bool:
    # NaN is equal to itself here: what the texts make of the model is not this question.
    return there.shape == here.shape and bool(((there == here) | (there.isnan() & here.isnan())).all())


@dataclasses.dataclass
class _Call:
    """What a block was called with besides the hidden state, which came first, or first by `name`.

    `state` and `output` are copies of what entered and left, kept of the first text alone, to compare with.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str | None
    state: Tensor | None
    output: Tensor | None = None

    def run(self, block: nn.Module, state: Tensor) -> Tensor | None:
        if self.name is not None:
            return _state_of(block(*self.args, **{**self.kwargs, self.name: state}))
        return _state_of(block(state, *self.args, **self.kwargs))


def _state_of(output: Any) -> Tensor | None:
    """The hidden state in what a block gave: itself, or first in a tuple."""
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    return first if isinstance(first, Tensor) else None


class _Recording:
    """Notes every call of a chain's blocks: the first block's hidden states, and all blocks' other arguments.

    Masks and position embeddings are shared between blocks, so keeping all calls' arguments keeps few tensors.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = blocks
        self._calls: list[list[_Call | None]] = [[] for _ in blocks]
        self.first: list[Tensor] = []

    def calls(self, number: int) -> list[_Call] | None:
        """The block's calls, one a text; None where it was called otherwise."""
        calls = self._calls[number]
        return None if None in calls or len(calls) != len(self._calls[0]) else calls

    def hooks(self) -> list[tuple[nn.Module, Callable]]:
        """What notes each block's calls."""
        return [(block, self._note(number)) for number, block in enumerate(self._blocks)]

    def output_hooks(self) -> list[tuple[nn.Module, Callable]]:
        """What notes each block's first output."""
        return [(block, self._note_output(number)) for number, block in enumerate(self._blocks)]

    def _note(self, number: int) -> Callable:
        def note(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            name = next((k for k, v in kwargs.items() if isinstance(v, Tensor)), None)
            if args and isinstance(args[0], Tensor):
                name, state = None, args[0]
            elif args or name is None:
                self._calls[number].append(None)
                return
            else:
                state = kwargs[name]
            # A cache that this pass fills would give a block its own keys twice.
            rest = {k: None if _is_cache(v) else v for k, v in kwargs.items() if k != name}
            others = tuple(None if _is_cache(v) else v for v in args[1:])
            kept = None if self._calls[number] else state.detach().clone()  # a block may change its state in place
            self._calls[number].append(_Call(others, rest, name, kept))
            if number == 0:
                self.first.append(state.detach().clone())

        return note

    def _note_output(self, number: int) -> Callable:
        def note(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            calls = self._calls[number]
            if len(calls) == 1 and calls[0] is not None:
                state = _state_of(output)
                calls[0].output = None if state is None else state.detach().clone()

        return note


def _is_cache(value: object) -> bool:
    return hasattr(value, "get_seq_length")


class _Watch:
    """Sums over the inputs of one layer."""

    def __init__(self, k: int, needs: Needs, device: torch.device) -> None:
        self.rows = 0
        self._low: list[Tensor] = []
        self._high: list[Tensor] = []
        self._squares = torch.zeros(k, dtype=torch.float64, device=device)
        self._hessian = torch.zeros(k, k, dtype=torch.float32, device=device) if needs == "hessian" else None
        self._sample = _EvenRows(SAMPLE_ROWS)
        self._begun = False

    def next_text(self) -> None:
        self._begun = False

    def add(self, x: Tensor) -> None:
        x = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(x):
            return
        low, high = x.amin(0), x.amax(0)
        if self._begun:  # a layer that is called twice for one text
            self._low[-1], self._high[-1] = torch.minimum(self._low[-1], low), torch.maximum(self._high[-1], high)
        else:
            self._low.append(low)
            self._high.append(high)
            self._begun = True
        self._squares += x.square().sum(0, dtype=torch.float64)
        if self._hessian is not None:
            self._hessian.addmm_(x.T, x)
        self._sample.add(x)
        self.rows += len(x)

    def statistics(self) -> Statistics:
        hessian = None if self._hessian is None else self._hessian.div_(self.rows)
        squares = (self._squares / self.rows).float()
        low, high = torch.stack(self._low), torch.stack(self._high)
        return Statistics(self.rows, low, high, squares, self._sample.rows(), hessian)


class _EvenRows:
    """At most `limit` rows of a stream of unknown length, spread evenly and always the same.

    Row i is kept while the fraction of i times the golden ratio lies below a share, which halves when there are too
    many. A stride would meet every text of one length in the same places, its first token among them.
    """

    _STEP, _WHOLE = 2654435769, 1 << 32  # 2^32 over the golden ratio (Knuth, TAOCP 3, 6.4)

    def __init__(self, limit: int) -> None:
        self._limit, self._below, self._seen = limit, self._WHOLE, 0
        self._kept: list[tuple[Tensor, Tensor]] = []  # (places on the scale of _WHOLE, rows)

    def add(self, x: Tensor) -> None:
        numbers = torch.arange(self._seen, self._seen + len(x), device=x.device) % self._WHOLE
        self._seen += len(x)
        self._kept.append(self._thinned(numbers * self._STEP % self._WHOLE, x))
        while sum(len(places) for places, _ in self._kept) > self._limit:
            self._below //= 2
            self._kept = [self._thinned(*kept) for kept in self._kept]

    def _thinned(self, places: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        kept = places < self._below
        return places[kept], rows[kept]

    def rows(self) -> Tensor:
        return torch.cat([rows for _, rows in self._kept])


def _computes_on(site: Site) -> torch.device:
    # Not where a GPU's original is kept meanwhile.
    return site.module.device if isinstance(site.module, QLinear) else site.weight.device


class _Watched:
    """The sites that a run of texts is watched for, and what was seen of them."""

    def __init__(self, sites: Sequence[Site], wanted: Mapping[str, Needs]) -> None:
        self._sites = sites
        self._watches = {id(site): _Watch(site.shape[1], wanted[site.name], _computes_on(site)) for site in sites}

    def next_text(self) -> None:
        for watch in self._watches.values():
            watch.next_text()

    def hooks(self) -> list[tuple[nn.Module, Callable]]:
        """What watches the inputs of each site's layer."""

        def hook(watch: _Watch) -> Callable:
            return lambda module, args, kwargs: watch.add(args[0] if args else kwargs["input"])

        return [(site.module, hook(self._watches[id(site)])) for site in self._sites]

    def results(self) -> Iterator[tuple[Site, Statistics]]:
        """Each site with its statistics, which are let go once the caller does."""
        for site in self._sites:
            watch = self._watches.pop(id(site))
            if not watch.rows:
                raise BadInput(f"no calibration text reaches layer {site.name}: leave it out with skip={site.name!r}")
            yield site, watch.statistics()


@contextlib.contextmanager
def _running(model: nn.Module, watched: _Watched) -> Iterator[None]:
    """The original model, in the state in which it is measured, with its sites watched."""
    with measuring_state(model), original_pass(), hooked(watched.hooks()):
        yield
