"""Running a decoder from the first block that changed: what lies before it was computed for an earlier state.

transformers' decoders are a list of blocks, each of which is called with the hidden states and with arguments that do
not depend on the weights (mask, positions). One whole pass of a text, watched by hooks, keeps those arguments and the
hidden states that enter the blocks. The next pass of the same text calls the blocks alone, from the first one whose
weights changed, then what lies behind them. Whether that gives the same bits is tried once; where it does not, every
pass is a whole one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qnb.measure.original import logits_of
from qnb.model.blocks import block_list
from qnb.model.hooks import hooked
from qnb.model.inputs import Sample
from qnb.model.linear import QLayer
from qnb.model.subject import is_encoder_decoder

STATE_BYTES = 256 * 2**20

# A weak reference to each tensor or variant with what changes when it is written to.
_Signature = list[tuple[weakref.ref, int | None, int]]


@dataclasses.dataclass
class _Kept:
    """One text: how each block is called, the hidden states entering some blocks, and for which weights they hold."""

    calls: list[tuple[tuple, dict[str, Any]]]
    entering: dict[int, Tensor]
    rest: _Signature
    made_by: list[_Signature]  # of the blocks that the last kept hidden states have passed


class Decoder:
    """A model, held weakly, that is run from the first changed block on.

    why_whole  why every pass is a whole one, in words; None where blocks are reused
    """

    def __init__(self, model: nn.Module, tokens: int) -> None:
        self._model = weakref.ref(model)
        self._texts: dict[int, _Kept] = {}
        self._between: list[weakref.ref] = []  # modules between the blocks and the output embedding: a norm
        self._every = 1
        self._tokens = tokens
        self.blocks_run = 0  # in all passes so far, for tests and benchmarks
        self.why_whole: str | None = None
        self._path, blocks = block_list(model)
        if is_encoder_decoder(model):
            self.why_whole = "an encoder-decoder model has no single list of blocks"
        elif not blocks:
            self.why_whole = "no list of blocks of one class was found"

    def forget(self) -> None:
        """Drops all hidden states."""
        self._texts.clear()

    def run(self, sample: Sample, check: Callable[[], None]) -> Any:
        """What the model answers now; for a reused text an object with `logits` alone. `check` may raise, to stop."""
        model = self._model()
        if self.why_whole is not None:
            return whole(model, sample, check)
        kept = self._texts.get(sample.index)
        if kept is None or not _same(kept.rest, self._rest(model)):
            return self._watch(model, sample, check)
        return _Answer(self._resume(model, kept, check))

    def last_hidden(self, sample: Sample) -> Tensor | None:
        """The hidden states behind the last block, of the pass made last; None where they are not kept."""
        kept = self._texts.get(sample.index)
        return None if kept is None else kept.entering.get(len(kept.calls))

    def head(self, hidden: Tensor) -> Tensor:
        """What lies behind the last block."""
        for part in self._behind(self._model()):
            hidden = part(hidden)
        return hidden

    def entering(self, sample: Sample, block: int) -> int | None:
        """The last block at or before `block` whose entering hidden states are kept for the text."""
        kept = self._texts.get(sample.index)
        return None if kept is None else max((b for b in kept.entering if b <= block), default=None)

    def replay(self, sample: Sample, block: int, check: Callable[[], None]) -> Tensor:
        """Logits from `block` on as the weights are now, keeping nothing: for trials that leave the model as it is."""
        model, kept = self._model(), self._texts[sample.index]
        start = self.entering(sample, block)
        hidden = kept.entering[start]
        for number in range(start, len(kept.calls)):
            check()
            hidden = self._call(model, kept, number, hidden)
        return self.head(hidden)

    def _watch(self, model: nn.Module, sample: Sample, check: Callable[[], None]) -> Any:
        """A whole pass whose blocks are watched, and from whose hidden states the next one starts."""
        blocks = self._blocks(model)
        calls: dict[int, tuple] = {}
        outputs: dict[int, tuple[Tensor, Any]] = {}
        with _watching(blocks, calls), _outputs(self._beside(model), outputs):
            output = whole(model, sample, check, use_cache=False)
        logits = logits_of(output)
        why = self._not_reusable(model, blocks, calls, outputs, logits)
        if why is None:
            hidden = [
                args[0] if args else kwargs["hidden_states"] for args, kwargs in map(calls.get, range(len(blocks)))
            ]
            hidden.append(_first(outputs[id(blocks[-1])][1]))
            size = hidden[0].nbytes / max(1, hidden[0].shape[1]) * self._tokens * len(hidden)
            self._every = max(1, -(-int(size) // STATE_BYTES))
            kept = _Kept(
                [_without_hidden(*calls[b]) for b in range(len(blocks))],
                {b: h for b, h in enumerate(hidden) if self._keeps(b, len(blocks))},
                self._rest(model),
                [_signature(block) for block in blocks],
            )
            first_time = not self._texts
            if first_time:
                self._texts[sample.index] = kept
                if not torch.equal(self.replay(sample, 0, check), logits):
                    why = "the blocks called one by one do not give the same bits"
        if why is None:
            self._texts[sample.index] = kept
        else:
            self._texts.clear()
            self.why_whole = why
        return output

    def _keeps(self, block: int, last: int) -> bool:
        return block % self._every == 0 or block == last

    def _not_reusable(self, model, blocks, calls, outputs, logits) -> str | None:
        """Why passes of this model cannot be resumed; else None, and the tail is known."""
        if logits is None or len(calls) != len(blocks):
            return "not every block was called once with hidden states alone"
        last = _first(outputs[id(blocks[-1])][1])
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if head is None or id(head) not in outputs or not isinstance(last, Tensor):
            return "the model has no output embedding behind its blocks"
        into_head = outputs[id(head)][0]
        beside = [m for m in self._beside(model) if id(m) in outputs and m is not head]
        between = [m for m in beside if _alike(outputs[id(m)][0], last) and _alike(outputs[id(m)][1], into_head)]
        if not between and not _alike(into_head, last):
            return "what lies between the last block and the output embedding is no single module"
        self._between = [weakref.ref(m) for m in between[:1]]
        same = torch.equal(self.head(last), logits)
        return None if same else "the logits are changed behind the output embedding"

    def _resume(self, model: nn.Module, kept: _Kept, check: Callable[[], None]) -> Tensor:
        blocks = self._blocks(model)
        now = [_signature(block) for block in blocks]
        unchanged = 0
        while unchanged < len(kept.made_by) and _same(kept.made_by[unchanged], now[unchanged]):
            unchanged += 1
        start = max(b for b in kept.entering if b <= unchanged)
        for later in [b for b in kept.entering if b > start]:
            del kept.entering[later]
        del kept.made_by[unchanged:]
        hidden = kept.entering[start]
        for number in range(start, len(blocks)):
            check()
            hidden = self._call(model, kept, number, hidden)
            kept.made_by[number:] = [now[number]]
            if self._keeps(number + 1, len(blocks)):
                kept.entering[number + 1] = hidden
        return self.head(hidden)

    def _call(self, model: nn.Module, kept: _Kept, number: int, hidden: Tensor) -> Tensor:
        args, kwargs = kept.calls[number]
        self.blocks_run += 1
        return _first(self._blocks(model)[number](hidden, *args, **kwargs))

    def _rest(self, model: nn.Module) -> _Signature:
        """Of all that is neither in a block nor behind them."""
        inside = [m for block in self._blocks(model) for m in block.modules()]
        apart = {id(m) for m in (*inside, *self._behind(model))}
        return _signature(model, apart)

    def _behind(self, model: nn.Module) -> list[nn.Module]:
        # Asked for anew: the output embedding may be another module now, quantized or its original again.
        return [*(part() for part in self._between), model.get_output_embeddings()]

    def _blocks(self, model: nn.Module) -> nn.ModuleList:
        return model.get_submodule(self._path)

    def _beside(self, model: nn.Module) -> list[nn.Module]:
        """What may lie directly behind the blocks: the last, the modules beside their list, the output embedding."""
        blocks = self._blocks(model)
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        siblings = [m for m in model.get_submodule(self._path.rpartition(".")[0]).children() if m is not blocks]
        return [m for m in dict.fromkeys((blocks[-1], *siblings, head)) if m is not None]


@dataclasses.dataclass(frozen=True)
class _Answer:
    logits: Tensor


def whole(model: nn.Module, sample: Sample, check: Callable[[], None], **more: Any) -> Any:
    """A whole pass, uncompiled, that `check` may stop between blocks. `more` is passed on where the model takes it."""
    model = getattr(model, "_orig_mod", model)
    takes = inspect.signature(model.forward).parameters
    more = {k: v for k, v in more.items() if k in takes}
    with stoppable(model, check):
        # Not model(...): a model compiled in place would compile anew after each change.
        return model._call_impl(*sample.args, **{**sample.kwargs, **more})


def stoppable(model: nn.Module, check: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
    """Inside it, `check` is called before each block that this thread runs, and may raise; at least once in a pass."""
    return hooked([(module, lambda *_: check()) for module in block_list(model)[1] or (model,)])


def block_of(model: nn.Module, layer: nn.Module) -> int | None:
    """The number of the block that the layer lies in; None where it lies in none."""
    for number, block in enumerate(block_list(model)[1]):
        if any(m is layer for m in block.modules()):
            return number
    return None


def _watching(blocks: nn.ModuleList, calls: dict[int, tuple]) -> contextlib.AbstractContextManager[None]:
    """Inside it, (args, kwargs) of this thread's calls of blocks are noted by their number."""

    def watch(number: int) -> Callable:
        def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
            calls[number] = args, kwargs

        return note

    return hooked([(block, watch(number)) for number, block in enumerate(blocks)])


def _outputs(
    modules: list[nn.Module], outputs: dict[int, tuple[Tensor, Any]]
) -> contextlib.AbstractContextManager[None]:
    """Inside it, (first argument, output) of this thread's calls of the modules is noted by id."""

    def note(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        outputs[id(module)] = (args[0] if args else None), output

    return hooked(behind=[(module, note) for module in modules])


def _alike(a: Any, b: Any) -> bool:
    """Whether the two are one tensor, or views of the same numbers: a slice that takes all is another object."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) else output


def _without_hidden(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}


def _signature(module: nn.Module, apart: frozenset[int] | set[int] = frozenset()) -> _Signature:
    found: _Signature = []
    for m in module.modules():
        if id(m) in apart:
            continue
        if isinstance(m, QLayer):
            found.append((weakref.ref(m.variant), None, 0))
        for kind in (m._parameters, m._buffers):
            for tensor in kind.values():
                if tensor is not None:
                    version = None if tensor.is_inference() else tensor._version
                    found.append((weakref.ref(tensor), version, tensor.data_ptr()))
    return found


def _same(before: _Signature, now: _Signature) -> bool:
    return len(before) == len(now) and all(
        b[0]() is n[0]() and b[0]() is not None and b[1:] == n[1:] for b, n in zip(before, now, strict=True)
    )
