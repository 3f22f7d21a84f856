"""`evaluate`: what a change did to the answers of a model, against its own original, with standard errors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from qnb.errors import BadInput
from qnb.measure.original import Original, logits_of
from qnb.measure.outputs import OutputSums
from qnb.measure.predictions import NO_LANGUAGE_MODEL, SEE_KL, PerText, TokenSums, WorstToken
from qnb.measure.token import Company, alone
from qnb.model.defaults import remembered
from qnb.model.inputs import Sample, samples_of
from qnb.model.subject import check_model, is_encoder_decoder, measuring_state, predicts_next_token
from qnb.progress import progress_bar
from qnb.results import Cell, Result, Table, format_number, one_line


@dataclasses.dataclass(frozen=True, repr=False)
class Accuracy(Result):
    """How good the answers are. A field that could not be measured is None, and `unavailable` says why.

    perplexity      exp of the mean negative log-likelihood; each text alone, cut to the context, first token not
                    predicted
    kl              mean over predicted tokens of KL(original || now), in nats; kl_p99 its 99th percentile
    top1            share of predicted tokens whose most likely next token is the original's, 0 to 1
    tokens, texts   how many tokens were predicted, in how many texts
    relative_error  ||now - original|| / ||original|| of the first output (other models than language models)
    cosine          mean over output rows of the cosine between now and original
    metric          what the caller's own measure returned; higher is better
    worst           the tokens at which now lies farthest from the original, the farthest first, as `WorstToken`s
    notes           what else ran, or waited to run, meanwhile
    ..._se          standard errors; texts (or input rows) are the independent units
    """

    perplexity: float | None = None
    perplexity_se: float | None = None
    kl: float | None = None
    kl_se: float | None = None
    kl_p99: float | None = None
    kl_p99_se: float | None = None
    top1: float | None = None
    top1_se: float | None = None
    tokens: int | None = None
    texts: int | None = None
    relative_error: float | None = None
    relative_error_se: float | None = None
    cosine: float | None = None
    cosine_se: float | None = None
    metric: float | None = None
    worst: tuple[WorstToken, ...] = ()
    unavailable: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    _per_text: tuple[PerText, ...] = ()
    _texts_key: str = ""

    def rows(self) -> list[tuple[str, str, str | Cell]]:
        """(quantity, value, how it was measured) of what can be said of this kind of model, for tables."""
        shown = [q for q in QUANTITIES if getattr(self, q.field) is not None or self._says_why(q.field)]
        return [(q.title, q.show(getattr(self, q.field)), self._how(q)) for q in shown]

    def _says_why(self, field: str) -> bool:
        return self.unavailable.get(field, NO_LANGUAGE_MODEL) not in (NO_LANGUAGE_MODEL, SEE_KL, _NO_METRIC)

    def _how(self, quantity: Quantity) -> str | Cell:
        if getattr(self, quantity.field) is None:
            return Cell(self.unavailable.get(quantity.field, ""), "muted")
        if quantity.field == "metric":
            return "your own measure, higher is better"
        se = getattr(self, f"{quantity.field}_se")
        over = f"{self.texts} texts, {self.tokens:,} tokens" if self.tokens else f"{self.texts} inputs"
        if se is None:
            return f"over {over}"
        error = quantity.show(se) if quantity.percent else format_number(se)
        return f"± {error} standard error, over {over}"

    def _tables(self) -> Sequence[Table]:
        notes = [f"note: {n}" for n in self.notes]
        tables = [Table(("accuracy", "value", "how measured"), self.rows(), notes=notes, numeric=frozenset({1}))]
        if self.worst:
            rows = [
                (format_number(w.kl), f"{w.text}, {w.position}", f"{w.context} [{w.token}]", w.original, w.now)
                for w in self.worst
            ]
            columns = "KL (nats)", "text, token", "farthest from the original: ... [the token]", "original says", "now"
            tables.append(Table(columns, rows, numeric=frozenset({0})))
        return tables


@dataclasses.dataclass(frozen=True)
class Quantity:
    """How one field of `Accuracy` is named and written, and which direction is better (+1 higher, -1 lower)."""

    field: str
    title: str
    better: int
    digits: int = 3
    percent: bool = False

    def show(self, value: float | None) -> str:
        """The value as a cell shows it."""
        if value is None:
            return "unavailable"
        if self.percent:
            return f"{100 * value:.2f} %"
        return format_number(value, self.digits)


QUANTITIES = (
    Quantity("perplexity", "perplexity", -1, digits=4),
    Quantity("kl", "KL to the original (nats/token)", -1),
    Quantity("kl_p99", "KL, 99th percentile (nats)", -1),
    Quantity("top1", "same top token as the original", 1, percent=True),
    Quantity("relative_error", "relative error", -1),
    Quantity("cosine", "cosine to the original", 1, digits=5),
    Quantity("metric", "metric", 1, digits=4),
)
_NO_METRIC = "no metric given: pass metric=, a function of the model, higher is better"
_ONE_TEXT = "one text: a standard error over texts needs at least two"


def evaluate(
    model: nn.Module,
    texts: Iterable | None = None,
    tokenizer: object = None,
    *,
    reference: nn.Module | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    progress: bool = True,
) -> Accuracy:
    """How good the model's answers are on `texts`, and how far they lie from the original's.

    texts      a list of strings (with `tokenizer`), or any iterable of model inputs: tensors, tuples, dicts of tensors.
               None takes what the model came with (the demo model), or nothing where only a `metric` is asked for.
    reference  the model to compare with; by default the model's own originals
    metric     your own measure of the model, higher is better

    The model is measured in eval mode and left as it was. Another thread's measurement is waited for, and other
    threads' changes of the model wait for this one. Raises BadInput for texts that cannot be measured.
    """
    check_model(model)
    reference = None if reference is None else check_model(reference)
    if metric is not None and not callable(metric):
        raise BadInput(
            f"metric is {one_line(repr(metric), 60)}: give a function that takes the model and returns a number"
        )
    own_texts, tokenizer = remembered(model, tokenizer)
    texts = own_texts if texts is None else texts
    if texts is None and metric is None:
        raise BadInput("no texts given: pass a list of strings with tokenizer=, or an iterable of model inputs")

    fields: dict[str, Any] = {}
    unavailable: dict[str, str] = {}
    with alone(model, *([] if reference is None else [reference])) as company:
        if texts is not None:
            _measure_texts(model, texts, tokenizer, reference, progress, company, fields, unavailable)
        else:
            unavailable.update({name: "no texts given" for name in (*(q.field for q in QUANTITIES), "tokens", "texts")})
        _measure_metric(model, metric, fields, unavailable)
        company.look()
    return _closed(fields, unavailable, company.notes)


def _measure_texts(
    model, texts, tokenizer, reference, progress, company: Company, fields: dict, unavailable: dict
) -> None:
    """Changes `fields` and `unavailable`: adds what the texts show."""
    samples, total = samples_of(model, texts, tokenizer)
    original = Original(model, reference)
    growing = Growing(model, original, tokenizer)
    with measuring_state(model), measuring_state(original.model), progress_bar(total, "evaluating", progress) as bar:
        original.check_kept()
        for sample in samples:
            growing.add(sample, lambda asked: model(*asked.args, **asked.kwargs))
            company.look()
            bar.update()
    growing.fill(fields, unavailable)


def _measure_metric(model, metric, fields: dict, unavailable: dict) -> None:
    """Changes `fields` and `unavailable`: adds the caller's own measure."""
    if metric is None:
        unavailable["metric"] = _NO_METRIC
        return
    with measuring_state(model):
        value = metric(model)
    try:
        value = float(value)
    except (TypeError, ValueError) as error:
        raise BadInput(
            f"metric returned {one_line(repr(value), 60)}: it must return one number, higher is better"
        ) from error
    if math.isfinite(value):
        fields["metric"] = value
    else:
        unavailable["metric"] = f"metric returned {value}"


class Growing:
    """An accuracy that grows a sample at a time, for those who show it on the way.

    `original` has `reason` (why there is none, else None), `logits(sample)` and `output(sample)`.
    """

    def __init__(self, model: nn.Module, original: Any, tokenizer: object = None) -> None:
        self._model, self._original, self._tokenizer = model, original, tokenizer
        self._sums: TokenSums | OutputSums | None = None

    def add(self, sample: Sample, answer: Callable[[Sample], Any]) -> Any:
        """Adds the sample; `answer` runs the model on what is left of it without labels, and is handed back."""
        sample, labels = _split_labels(self._model, sample)
        if is_encoder_decoder(self._model) and labels is None:
            raise BadInput(f"texts[{sample.index}] has no labels: an encoder-decoder model needs input_ids and labels")
        output = answer(sample)
        if self._sums is None:
            language = _is_language_model(self._model, sample, output)
            self._sums = (
                TokenSums(self._model, self._original, self._tokenizer) if language else OutputSums(self._original)
            )
        self._sums.add(sample, labels, output)
        return output

    def token_kl(self) -> Tensor | None:
        """KL at each token of the text added last, in nats; None where there is no original, or no language model."""
        return self._sums.last_kl() if isinstance(self._sums, TokenSums) else None

    def fill(self, fields: dict, unavailable: dict) -> None:
        """Changes `fields` and `unavailable`: adds what the samples so far show."""
        self._sums.finish(fields, unavailable)

    def accuracy(self) -> Accuracy:
        """What the samples so far show."""
        fields: dict[str, Any] = {}
        unavailable = {"metric": _NO_METRIC}
        self.fill(fields, unavailable)
        return _closed(fields, unavailable, ())


def _closed(fields: dict[str, Any], unavailable: dict[str, str], notes: tuple[str, ...]) -> Accuracy:
    for field in (f.name for f in dataclasses.fields(Accuracy)):
        if field.endswith("_se") and fields.get(field) is None:
            unavailable.setdefault(field, unavailable.get(field.removesuffix("_se"), _ONE_TEXT))
    unavailable = {name: why for name, why in unavailable.items() if fields.get(name) is None}
    return Accuracy(**fields, unavailable=unavailable, notes=notes)


def _is_language_model(model: nn.Module, sample: Sample, output: Any) -> bool:
    logits = logits_of(output)
    return predicts_next_token(model) is not False and sample.ids is not None and logits is not None


def _split_labels(model: nn.Module, sample: Sample) -> tuple[Sample, Tensor | None]:
    labels = sample.kwargs.get("labels")
    if labels is None or is_encoder_decoder(model):  # which makes its decoder's inputs from them
        return sample, labels
    return dataclasses.replace(sample, kwargs={k: v for k, v in sample.kwargs.items() if k != "labels"}), labels
