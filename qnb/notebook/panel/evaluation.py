"""Accuracy of the present model on a sample of the texts, growing text by text, against the original's kept answers."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qnb.measure.accuracy import Accuracy, Growing
from qnb.measure.original import ITS_OWN_ORIGINAL, Original, logits_of
from qnb.measure.token import alone
from qnb.model.inputs import Sample
from qnb.model.linear import original_pass, quantized_layers
from qnb.model.subject import measuring_state
from qnb.notebook.panel.prefix import Decoder, whole

ANSWER_BYTES = 256 * 2**20
# The most of a text that is used: many short texts say more than a few long ones, since texts are independent.
TEXT_TOKENS = 256
CHANGED_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class Changed:
    """One predicted token whose distribution moved: KL in nats, probabilities of the token that stands there."""

    kl: float
    before: tuple[int, ...]  # ids of the tokens in front of it
    wanted: int
    probability: tuple[float, float]  # the original's, the present model's
    top: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Progress:
    """What is known after `texts` of the texts."""

    texts: int
    accuracy: Accuracy
    changed: tuple[Changed, ...] = ()


def sample_of(samples: Iterator[Sample], tokens: int) -> list[Sample]:
    """The first texts, each cut to TEXT_TOKENS, until they hold `tokens` tokens; other inputs count as one each."""
    taken, held = [], 0
    for sample in samples:
        sample = _cut(sample)
        taken.append(sample)
        held += 1 if sample.ids is None else sample.ids.numel()
        if held >= tokens:
            break
    return taken


class Evaluation:
    """Measures a model, held weakly, again and again on the same samples."""

    def __init__(self, model: nn.Module, samples: Sequence[Sample]) -> None:
        self._model = weakref.ref(model)
        self.samples = samples
        tokens = sum(s.ids.numel() for s in samples if s.ids is not None)
        self.decoder = Decoder(model, tokens)
        self._kept = _Kept(self._model, self.decoder)
        self._marks = {2**i for i in range(len(samples).bit_length())} | {len(samples)}
        self._baseline: dict[int, Accuracy] = {}
        self._first: Tensor | None = None

    def original(self, check: Callable[[], None]) -> Iterator[Progress]:
        """Accuracy of the original after 1, 2, 4, ... texts; its answers are computed once and kept."""
        if len(self.samples) in self._baseline:
            yield from (Progress(n, accuracy) for n, accuracy in self._baseline.items())
            return
        growing = Growing(self._model(), _ItsOwn())
        for number, sample in enumerate(self.samples, 1):
            with self._slice(check):
                growing.add(sample, lambda asked: self._kept.answer(asked, check))
            if number in self._marks:
                self._baseline[number] = growing.accuracy()
                yield Progress(number, self._baseline[number])

    def baseline(self, texts: int) -> Accuracy | None:
        """Accuracy of the original on the first `texts` texts."""
        return self._baseline.get(texts)

    def present(self, check: Callable[[], None]) -> Iterator[Progress]:
        """Accuracy of the model as it is after 1, 2, 4, ... texts, and the tokens that changed most."""
        model = self._model()
        self._kept.reason = Original(model).reason
        growing = Growing(model, self._kept)
        changed: list[Changed] = []
        for number, sample in enumerate(self.samples, 1):
            with self._slice(check):
                output = growing.add(sample, lambda asked: self.decoder.run(asked, check))
                if number == 1:
                    self._first = logits_of(output)
                if (kl := growing.token_kl()) is not None:
                    changed += _changed(sample, kl, logits_of(output), self._kept.logits(sample))
            if number in self._marks:
                changed = sorted(changed, key=lambda c: -c.kl)[:CHANGED_TOKENS]
                yield Progress(number, growing.accuracy(), tuple(changed))

    def trusted(self, check: Callable[[], None]) -> bool:
        """Whether whole passes over the first text still give what was kept; False after weights changed unseen."""
        sample, model = self.samples[0], self._model()
        with self._slice(check):
            if self._first is not None and not self._repeats(self._first, lambda: whole(model, sample, check)):
                return False
            kept = self._kept.kept_logits(sample)
            if kept is None:
                return True
            with original_pass():
                return self._repeats(kept, lambda: whole(model, sample, check))

    def moved(self) -> None:
        """To be called when the model has changed: what it answered to the first text is no longer to be repeated."""
        self._first = None

    def forget(self) -> None:
        """Drops everything that was kept."""
        self.decoder.forget()
        self._kept = _Kept(self._model, self.decoder)
        self._baseline.clear()
        self._first = None

    def kl_of_trial(self, block: int | None, check: Callable[[], None]) -> float | None:
        """KL to the original on the first text of whatever this thread's hooks make of the model now."""
        sample, model = self.samples[0], self._model()
        self._kept.reason = None
        growing = Growing(model, self._kept)

        def answer(asked: Sample) -> Any:
            if block is None or self.decoder.why_whole is not None or self.decoder.entering(asked, block) is None:
                return whole(model, asked, check)
            return _Logits(self.decoder.replay(asked, block, check))

        growing.add(sample, answer)
        found = growing.accuracy()
        return found.kl if found.kl is not None else found.relative_error

    @contextlib.contextmanager
    def _slice(self, check: Callable[[], None]) -> Iterator[None]:
        """One text at a time, so that a person's own measurement or change never waits for more than that."""
        model = self._model()
        with alone(model), measuring_state(model):
            check()
            yield

    @staticmethod
    def _repeats(kept: Tensor, run: Callable[[], Any]) -> bool:
        now = logits_of(run())
        # Where two passes differ from each other already, differing from the kept one says nothing.
        return now is None or torch.equal(now, kept) or not torch.equal(now, logits_of(run()))


class _ItsOwn:
    reason = ITS_OWN_ORIGINAL


@dataclasses.dataclass(frozen=True)
class _Logits:
    logits: Tensor


class _Kept:
    """The original's answers: logits while they fit, else hidden states, else computed again."""

    def __init__(self, model: weakref.ref, decoder: Decoder) -> None:
        self._model, self._decoder = model, decoder
        self.reason: str | None = None
        self._answers: dict[int, Any] = {}
        self._hidden: dict[int, Tensor] = {}
        self._held = 0

    def answer(self, sample: Sample, check: Callable[[], None]) -> Any:
        """What the original answers, from what is kept where it is."""
        if sample.index in self._answers:
            return self._answers[sample.index]
        model = self._model()
        if sample.index in self._hidden:
            with original_pass():
                return _Logits(self._decoder.head(self._hidden[sample.index]))
        if quantized_layers(model):
            with original_pass():
                output, hidden = whole(model, sample, check), None
        else:
            output = self._decoder.run(sample, check)
            hidden = self._decoder.last_hidden(sample)
        self._keep(sample.index, output, hidden)
        return output

    def logits(self, sample: Sample) -> Tensor:
        """The original's logits (B, T, V)."""
        return logits_of(self.answer(sample, _never))

    def output(self, sample: Sample) -> Any:
        """The original's output."""
        return self.answer(sample, _never)

    def kept_logits(self, sample: Sample) -> Tensor | None:
        """The logits where they themselves are kept."""
        return logits_of(self._answers.get(sample.index))

    def _keep(self, index: int, output: Any, hidden: Tensor | None) -> None:
        logits = logits_of(output)
        size = logits.nbytes if logits is not None else 0
        if self._held + size <= ANSWER_BYTES:
            self._held += size
            self._answers[index] = output if logits is None else _Logits(logits)
        elif hidden is not None:
            self._hidden[index] = hidden


def _never() -> None:
    """Stops nothing."""


def _cut(sample: Sample) -> Sample:
    ids = sample.ids
    if ids is None or ids.shape[1] <= TEXT_TOKENS:
        return sample
    cut = {
        k: v[:, :TEXT_TOKENS] if isinstance(v, Tensor) and v.shape[:2] == ids.shape[:2] else v
        for k, v in sample.kwargs.items()
    }
    return dataclasses.replace(sample, kwargs=cut)


def _changed(sample: Sample, kl: Tensor, now: Tensor, then: Tensor) -> list[Changed]:
    """The tokens of the text whose distribution moved most."""
    ids = sample.ids
    if ids is None or len(ids) != 1 or len(kl) != ids.shape[1] - 1:  # rows or padding: the places are not those of kl
        return []
    found = []
    for position in kl.topk(min(CHANGED_TOKENS, len(kl))).indices.tolist():
        wanted = int(ids[0, position + 1])
        pair = [logits[0, position].float() for logits in (then, now)]
        found.append(
            Changed(
                kl=kl[position].item(),
                before=tuple(ids[0, max(0, position - 7) : position + 1].tolist()),
                wanted=wanted,
                probability=tuple(p.softmax(-1)[wanted].item() for p in pair),
                top=tuple(int(p.argmax()) for p in pair),
            )
        )
    return found
