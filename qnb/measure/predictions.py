"""What a language model's predictions say: perplexity, KL to the original, agreement, and the tokens it strays at."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qnb.errors import BadInput
from qnb.measure.original import Original, logits_of
from qnb.measure.statistics import first_not_finite, percentile_with_se, ratio_with_se
from qnb.model.inputs import Sample
from qnb.model.subject import is_encoder_decoder

NO_LANGUAGE_MODEL = "the model is no language model"
SEE_KL = "for a language model see kl and top1"

# Log-probabilities are computed for so many numbers at once, whatever the vocabulary: a few float32 copies of 2 MB, for
# which memory is at hand. For larger ones the system's fresh pages cost several times the arithmetic.
_CHUNK = 2**19
_WORST = 5
_CONTEXT = 48  # characters; and tokens, of which hardly one is shorter than a character


@dataclasses.dataclass(frozen=True)
class PerText:
    """Sums over the predicted tokens of one text; kl and agreed are None where there is no original."""

    tokens: int
    nll: float
    kl: float | None
    agreed: int | None


@dataclasses.dataclass(frozen=True)
class WorstToken:
    """A predicted token at which the model lies far from its original.

    text, position  number of its text, and its place in that text; both count from 0
    token           what stands there; `context` is the end of what stands before it
    original, now   what the original holds for most likely there, and the model as it is now
    kl              KL(original || now) there, in nats

    Tokens are decoded where there is a tokenizer; else they are their numbers in the vocabulary.
    """

    text: int
    position: int
    context: str
    token: str
    original: str
    now: str
    kl: float


@dataclasses.dataclass(frozen=True)
class _Stray:
    """A `WorstToken` before it is decoded."""

    kl: float
    text: int
    position: int
    context: list[int]
    token: int
    original: int
    now: int


class TokenSums:
    """What each predicted token says, a text at a time."""

    def __init__(self, model: nn.Module, original: Original, tokenizer: object = None) -> None:
        self._encoder_decoder = is_encoder_decoder(model)
        self._original = original
        self._tokenizer = tokenizer
        self._texts: list[PerText] = []
        self._kl: list[Tensor] = []
        self._worst: list[_Stray] = []
        self._key = hashlib.blake2b(digest_size=16)

    def add(self, sample: Sample, labels: Tensor | None, output: Any) -> None:
        """Adds the text(s) of one sample; each row of a batch is a text."""
        where = f"texts[{sample.index}]"
        logits = _checked_logits(logits_of(output), where)
        logits0 = None
        if self._original.reason is None:
            logits0 = _checked_logits(self._original.logits(sample), where).to(logits.device)
            if logits0.shape != logits.shape:
                raise BadInput(
                    f"the original gives logits of shape {tuple(logits0.shape)} for {where} and this model "
                    f"{tuple(logits.shape)}: reference= must be a model of the same vocabulary"
                )
        predictors, targets, mask = self._predicted(sample, labels, logits, where)
        written = self._written(sample, labels)
        for row in range(len(targets)):
            at = predictors[row][mask[row]]
            wanted = targets[row][mask[row]]
            if not len(wanted):
                raise BadInput(f"{where} has nothing to predict: give texts of at least 2 tokens that are not padding")
            self._key.update(repr(wanted.tolist()).encode())
            self._texts.append(
                self._text(logits[row], None if logits0 is None else logits0[row], at, wanted, written[row])
            )

    def finish(self, fields: dict, unavailable: dict) -> None:
        """Changes `fields` and `unavailable`: adds means and standard errors over the texts."""
        texts = self._texts
        tokens = torch.tensor([t.tokens for t in texts])
        fields.update(tokens=int(tokens.sum()), texts=len(texts))
        fields.update(_per_text=tuple(texts), _texts_key=self._key.hexdigest())
        unavailable.update(relative_error=SEE_KL, cosine=SEE_KL)

        broken = first_not_finite([t.nll for t in texts])
        mean, se = ratio_with_se(torch.tensor([t.nll for t in texts], dtype=torch.double), tokens)
        if broken is None and mean < math.log(1e300):
            perplexity = math.exp(mean)
            fields.update(perplexity=perplexity, perplexity_se=None if se is None else perplexity * se)
        else:
            unavailable["perplexity"] = "the loss is too large to be raised" if broken is None else _not_finite(broken)

        if self._original.reason is not None:
            unavailable.update(dict.fromkeys(("kl", "kl_p99", "top1"), self._original.reason))
            return
        broken_kl = first_not_finite([t.kl for t in texts])
        if broken_kl is not None:
            why = _not_finite(broken) if broken is not None else f"KL is not finite, first in text {broken_kl}"
            unavailable.update(dict.fromkeys(("kl", "kl_p99", "top1"), why))
            return
        fields["kl"], fields["kl_se"] = ratio_with_se(torch.tensor([t.kl for t in texts], dtype=torch.double), tokens)
        fields["top1"], fields["top1_se"] = ratio_with_se(torch.tensor([t.agreed for t in texts]), tokens)
        numbers = torch.repeat_interleave(torch.arange(len(texts)), tokens)
        fields["kl_p99"], fields["kl_p99_se"] = percentile_with_se(torch.cat(self._kl), numbers, 0.99)
        fields["worst"] = tuple(_decoded(stray, self._tokenizer) for stray in self._worst)

    def _predicted(self, sample: Sample, labels: Tensor | None, logits: Tensor, where: str):
        """(predictors, targets, mask), each (B, P): the position whose logits predict each target, and which count."""
        if self._encoder_decoder:
            targets, mask = labels, labels != -100
            predictors = torch.arange(labels.shape[1], device=logits.device).expand_as(labels)
            return predictors, targets, mask
        ids = sample.ids
        if logits.shape[1] != ids.shape[1]:
            raise BadInput(
                f"{where} has {ids.shape[1]} tokens and the model gave logits for {logits.shape[1]} positions: "
                "only models that predict from each token can be evaluated"
            )
        targets = ids[:, 1:]
        mask = torch.ones_like(targets, dtype=torch.bool)
        attended = sample.kwargs.get("attention_mask")
        if isinstance(attended, Tensor) and attended.shape == ids.shape:
            mask = (attended[:, 1:] != 0) & (attended[:, :-1] != 0)
        if labels is not None:
            mask = mask & (labels[:, 1:] != -100)[:, : mask.shape[1]]
        return torch.arange(targets.shape[1], device=ids.device).expand_as(targets), targets, mask

    def _written(self, sample: Sample, labels: Tensor | None) -> Tensor:
        """The tokens (B, T) that targets and their contexts are read from, on the CPU; padding is -100."""
        if self._encoder_decoder:
            return labels.cpu()
        attended = sample.kwargs.get("attention_mask")
        if isinstance(attended, Tensor) and attended.shape == sample.ids.shape:
            return sample.ids.where(attended != 0, -100).cpu()
        return sample.ids.cpu()

    def _text(self, logits: Tensor, logits0: Tensor | None, at: Tensor, wanted: Tensor, written: Tensor) -> PerText:
        step = max(1, _CHUNK // logits.shape[-1])
        nll, kl, agreed = 0.0, [], 0
        for start in range(0, len(at), step):
            positions = at[start : start + step].to(logits.device)
            now = _log_probabilities(logits[positions])
            nll -= now.gather(1, wanted[start : start + step, None].to(now.device)).double().sum().item()
            if logits0 is None:
                continue
            then = _log_probabilities(logits0[positions])
            kl.append(kl_per_token(then, now).cpu())
            tops = then.argmax(-1), now.argmax(-1)
            agreed += int((tops[0] == tops[1]).sum())
            self._keep_worst(kl[-1], positions, tops, written)
        if logits0 is None:
            return PerText(len(at), nll, None, None)
        self._kl.append(torch.cat(kl))
        return PerText(len(at), nll, self._kl[-1].double().sum().item(), agreed)

    def last_kl(self) -> Tensor | None:
        """KL at each token of the text added last, in nats, on the CPU; None where there is no original."""
        return self._kl[-1] if self._kl else None

    def _keep_worst(self, kl: Tensor, positions: Tensor, tops: tuple[Tensor, Tensor], written: Tensor) -> None:
        """Adds the farthest of these tokens to the farthest so far; where nothing strays there is none."""
        least = self._worst[-1].kl if len(self._worst) == _WORST else 0.0
        for value, i in zip(*(t.tolist() for t in kl.topk(min(_WORST, len(kl)))), strict=True):
            if not value > least:
                break
            place = int(positions[i]) + (0 if self._encoder_decoder else 1)
            before = [t for t in written[max(0, place - _CONTEXT) : place].tolist() if t >= 0]
            original, now = (int(t[i]) for t in tops)
            self._worst.append(_Stray(value, len(self._texts), place, before, int(written[place]), original, now))
        self._worst = sorted(self._worst, key=lambda s: (-s.kl, s.text, s.position))[:_WORST]


def _decoded(stray: _Stray, tokenizer: object) -> WorstToken:
    context = _words(stray.context, tokenizer)
    if len(context) > _CONTEXT:
        context = "…" + context[1 - _CONTEXT :]
    token, original, now = (_words([t], tokenizer) for t in (stray.token, stray.original, stray.now))
    return WorstToken(stray.text, stray.position, context, token, original, now, stray.kl)


def _words(ids: list[int], tokenizer: object) -> str:
    """The tokens as text in one line, white space inside spelled out; their numbers where nothing can decode them."""
    decode = getattr(tokenizer, "decode", None)
    if callable(decode):
        try:
            return repr(decode(ids))[1:-1]
        except (TypeError, ValueError, LookupError, OverflowError):
            pass  # a model may predict tokens that its tokenizer has no words for: padding of the vocabulary
    return " ".join(map(str, ids))


def _checked_logits(logits: Tensor | None, where: str) -> Tensor:
    if logits is None:
        raise BadInput(
            f"no logits of shape (B, T, V) came out for {where}: the model or its reference is no language model"
        )
    return logits


def _log_probabilities(logits: Tensor) -> Tensor:
    # float32 is enough: against float64 the mean KL of the demo model at w8a16, 0.00009, differs by 1e-5 of itself.
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def kl_per_token(then: Tensor, now: Tensor) -> Tensor:
    """KL(then || now) of each row of log-probabilities (P, V), in nats; where `then` is 0 a token adds nothing."""
    terms = F.kl_div(now, then, reduction="none", log_target=True)
    total = terms.sum(-1)
    if total.isnan().any():
        # Masked vocabulary: log-probability -inf in both, and -inf - -inf is NaN. Only here: to look for it
        # takes longer than all the rest.
        total = terms.masked_fill_(then == -math.inf, 0.0).sum(-1)
    return total


def kl_of_logits(then: Tensor, logits: Tensor) -> Tensor:
    """KL(then || softmax of the logits) of each row, in nats; `then` are log-probabilities (P, V)."""
    rows = max(1, _CHUNK // logits.shape[-1])
    pairs = zip(then.split(rows), logits.split(rows), strict=True)
    return torch.cat([kl_per_token(before, _log_probabilities(now)) for before, now in pairs])


def _not_finite(text: int) -> str:
    return f"the logits hold NaN or infinity, first in text {text}"
