"""`sensitivity`: what each layer alone, in each scheme, does to the answers of the original."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qnb import schemes as registry
from qnb.errors import BadInput
from qnb.measure.original import logits_of
from qnb.measure.predictions import kl_of_logits
from qnb.measure.replay import Call, noting, reusable
from qnb.measure.statistics import ratio_with_se
from qnb.measure.token import alone
from qnb.model.blocks import block_list
from qnb.model.defaults import remembered
from qnb.model.hooks import hooked
from qnb.model.inputs import Sample, samples_of
from qnb.model.linear import original_pass
from qnb.model.select import Site, choose, sites_in_place
from qnb.model.subject import check_model, measuring_state
from qnb.model.trial import Trial, in_variant
from qnb.model.variants import Order, calibration_of, check_how, make, refusal
from qnb.progress import progress_bar
from qnb.results import Cell, Result, Table, format_bytes, format_number
from qnb.schemes import How, Scheme, Variant

_METHODS = ("exact", "gradient")


@dataclasses.dataclass(frozen=True)
class SensitivityRow:
    """One layer in one scheme, all others as the original: KL(original || so), nats per token, and bytes held."""

    name: str
    scheme: str
    kl: float
    kl_se: float | None
    bytes: int


@dataclasses.dataclass(frozen=True, repr=False)
class Sensitivity(Result):
    """`rows`, one for each layer and scheme; `method` is how `kl` was found."""

    rows: tuple[SensitivityRow, ...]
    method: str
    tokens: int
    texts: int
    how: How
    _sums: Mapping[tuple[str, str], tuple[float, ...]] = dataclasses.field(default_factory=dict)

    @property
    def schemes(self) -> tuple[str, ...]:
        """The schemes that were tried, in the order asked for."""
        return tuple(dict.fromkeys(row.scheme for row in self.rows))

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that were tried, in the model's order."""
        return tuple(dict.fromkeys(row.name for row in self.rows))

    def kl(self, layer: str, scheme: str) -> float:
        """The KL of that layer in that scheme."""
        for row in self.rows:
            if (row.name, row.scheme) == (layer, scheme):
                return row.kl
        raise BadInput(f"{layer} was not tried in {scheme}: it refuses that scheme, or was not asked for")

    def rank_correlation(self, other: Sensitivity) -> dict[str, float]:
        """Spearman's rank correlation of the layers' KL with another sensitivity's, for each scheme both have."""
        from scipy.stats import spearmanr

        theirs = {(row.name, row.scheme): row.kl for row in other.rows}
        found = {}
        for scheme in self.schemes:
            pairs = [
                (r.kl, theirs[r.name, scheme]) for r in self.rows if r.scheme == scheme and (r.name, scheme) in theirs
            ]
            if len(pairs) >= 3:
                found[scheme] = float(spearmanr(*zip(*pairs, strict=True)).statistic)
        if not found:
            raise BadInput("the two sensitivities share fewer than 3 layers in every scheme: ranks say nothing then")
        return found

    def _tables(self) -> Sequence[Table]:
        means = "measured" if self.method == "exact" else "estimated from one backward pass a text"
        lead = [Cell(f"KL to the original of each layer alone, {means}, most sensitive first", "head")]
        columns = ("layer", *self.schemes)
        kl = {(row.name, row.scheme): row for row in self.rows}
        worst = sorted(self.layers, key=lambda n: -max(kl[n, s].kl for s in self.schemes if (n, s) in kl))
        lines = [(name, *(_cell(kl.get((name, scheme))) for scheme in self.schemes)) for name in worst]
        sums = [sum(row.kl for row in self.rows if row.scheme == s) for s in self.schemes]
        lines.append(("sum", *(format_number(total) for total in sums)))
        sizes = [sum(row.bytes for row in self.rows if row.scheme == s) for s in self.schemes]
        lines.append(("bytes of these layers", *(format_bytes(size) for size in sizes)))
        notes = [f"nats per token, ± standard error over {self.texts} texts, {self.tokens:,} tokens; {self.how}"]
        return [Table(columns, lines, lead, notes, frozenset(range(1, len(columns))))]


def _cell(row: SensitivityRow | None) -> str:
    if row is None:
        return "refused"
    return format_number(row.kl) + ("" if row.kl_se is None else f" ± {format_number(row.kl_se, 2)}")


def sensitivity(
    model: nn.Module,
    schemes: str | Scheme | Iterable[str | Scheme],
    texts: Iterable | None = None,
    tokenizer: object = None,
    *,
    method: str = "exact",
    layers: str | Iterable[str] | None = None,
    skip: str | Iterable[str] | None = None,
    rounding: str = "nearest",
    observer: str = "minmax",
    smooth: float | str | None = None,
    calibration: Iterable | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Sensitivity:
    """How much each layer alone, in each of `schemes`, changes what the original answers on `texts`.

    method  "exact": each layer in each scheme is measured, what lies before it computed once a text.
            "gradient": one backward pass a text for all layers and schemes. The KL of a small change d of a layer's
            outputs is half its product with the Fisher information (Kullback 1959, Information Theory and Statistics,
            section 2.6), estimated as in LeCun et al. 1990 (Optimal Brain Damage) and K-FAC (Martens and Grosse 2015):
            d times the gradient of the log-likelihood of tokens that the original itself draws, `seed` saying which.
    The others are as for `quantize` and `evaluate`. Nothing in the model changes; other threads that use it meanwhile
    get what they always got. Raises BadInput for texts without tokens to predict or a model that is no language model.
    """
    check_model(model)
    if method not in _METHODS:
        raise BadInput(f"method={method!r} is unknown: use one of {', '.join(_METHODS)}")
    asked = [schemes] if isinstance(schemes, (str, Scheme)) else list(schemes)
    formats = list({s.name: s for s in map(registry.find, asked) if s.grid is not None}.values())
    if not formats:
        raise BadInput("schemes is empty: give one or more names such as 'w8a8', 'w4a16-g64'")
    how = How(rounding, observer, smooth, seed)
    for scheme in formats:
        check_how(how, scheme)
    own_texts, tokenizer = remembered(model, tokenizer)
    texts = own_texts if texts is None else texts
    if texts is None:
        raise BadInput("no texts given: pass a list of strings with tokenizer=, or an iterable of model inputs")
    samples, total = samples_of(model, texts, tokenizer)
    own = calibration_of(model, calibration, tokenizer)
    with alone(model):
        candidates = list(_candidates(model, formats, how, layers, skip, own))
        run = _exact if method == "exact" else _by_gradient
        with progress_bar(total, f"sensitivity, {method}", progress) as bar:
            tokens, sums = run(model, candidates, samples, seed, bar)
    counts = torch.tensor(tokens)
    rows = []
    for candidate in candidates:
        kl, se = ratio_with_se(torch.tensor(sums[candidate.key], dtype=torch.double), counts)
        rows.append(SensitivityRow(*candidate.key, kl, se, candidate.variant.nbytes))
    return Sensitivity(tuple(rows), method, sum(tokens), len(tokens), how, sums)


@dataclasses.dataclass(frozen=True)
class _Candidate:
    site: Site
    variant: Variant

    @property
    def key(self) -> tuple[str, str]:
        return self.site.name, self.variant.scheme.name


def _candidates(model, formats: Sequence[Scheme], how: How, layers, skip, own) -> Iterator[_Candidate]:
    sites = sites_in_place(model)
    made: dict[tuple[str, str], Variant] = {}
    for scheme in formats:
        chosen = choose(sites, layers, skip, refusal(scheme, how))
        orders = [Order(site, scheme, how) for i, site in enumerate(sites) if chosen[i] is None]
        for site, variant in make(model, orders, sites, own, lambda n: None):
            made[site.name, scheme.name] = variant
    for site in sites:
        for scheme in formats:
            if (site.name, scheme.name) in made:
                yield _Candidate(site, made[site.name, scheme.name])


def _exact(model, candidates: Sequence[_Candidate], samples: Iterable[Sample], seed: int, bar):
    """(tokens of each text, summed KL of each candidate in each text)."""
    _, blocks = block_list(model, [c.site.name for c in candidates])
    # The block that each layer lies in; what no block holds is in none, and the whole model is run for it.
    place = {id(m): i for i, block in enumerate(blocks) for m in block.modules()}
    inside: dict[int | None, list[_Candidate]] = {}
    for candidate in candidates:
        inside.setdefault(place.get(id(candidate.site.module)), []).append(candidate)
    sums: dict[tuple[str, str], list[float]] = {c.key: [] for c in candidates}
    tokens: list[int] = []
    modules = [*(m for block in blocks for m in block.modules()), *(c.site.module for c in candidates)]
    with measuring_state(model), original_pass(), Trial(modules) as trial:
        for sample in samples:
            with noting(blocks) as passed:
                original = _predicting_logits(_answer(model, sample), sample)
            tokens.append(len(original))
            original = original.log_softmax(-1)
            for at, here in inside.items():
                before = {b: passed[b].answer for b in blocks[: at or 0] if b in passed and passed[b].output_is_intact}
                within = {} if at is None else _within(blocks[at], passed.get(blocks[at]))
                for candidate in here:
                    layer = candidate.site.module
                    answers = {**before, **reusable(within, layer), layer: in_variant(layer, candidate.variant)}
                    with trial.answering(answers):
                        now = _predicting_logits(_answer(model, sample), sample)
                    sums[candidate.key].append(float(kl_of_logits(original, now).double().sum()))
            bar.update()
    return tokens, sums


def _within(block: nn.Module, call: Call | None) -> dict[nn.Module, Call]:
    """The calls inside one block, run once more by itself: those of all blocks at once would be too much to hold."""
    if call is None or not call.given_is_intact:
        return {}
    with noting(block.modules()) as calls:
        block(*call.args, **call.kwargs)
    return calls


def _by_gradient(model, candidates: Sequence[_Candidate], samples: Iterable[Sample], seed: int, bar):
    """The same, estimated: half the square of what the candidate's change of outputs does to the log-likelihood."""
    sums: dict[tuple[str, str], list[float]] = {c.key: [] for c in candidates}
    tokens: list[int] = []
    generator = torch.Generator().manual_seed(seed)
    by_layer: dict[nn.Linear, list[_Candidate]] = {}
    for candidate in candidates:
        by_layer.setdefault(candidate.site.module, []).append(candidate)
    with measuring_state(model), original_pass():
        for sample in samples:
            with torch.enable_grad(), _recording(by_layer) as seen:
                logits = _predicting_logits(_answer(model, sample), sample)
                chances = logits.detach().softmax(-1).cpu()
                drawn = torch.multinomial(chances, 1, generator=generator).to(logits.device)
                likelihood = logits.log_softmax(-1).gather(1, drawn).sum()
                gradients = torch.autograd.grad(likelihood, [y for _, _, y in seen])
            for (layer, x, y), gradient in zip(seen, gradients, strict=True):
                for candidate in by_layer[layer]:
                    change = candidate.variant.linear(x, layer.bias) - y.detach()
                    along = (gradient.double() * change.double()).sum(-1)
                    sums[candidate.key].append(float(along.square().sum() / 2))
            tokens.append(len(logits))
            bar.update()
    return tokens, sums


@contextlib.contextmanager
def _recording(layers: Iterable[nn.Linear]) -> Iterator[list[tuple[nn.Linear, Tensor, Tensor]]]:
    """Inside it, each layer's input and output are noted, in this thread; the outputs carry a gradient."""
    seen: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def note(layer: nn.Linear, args: tuple[Tensor, ...], kwargs: dict, output: Tensor) -> None:
        seen.append((layer, args[0].detach(), output if output.requires_grad else output.requires_grad_()))

    with hooked(behind=[(layer, note) for layer in layers]):
        yield seen


def _answer(model: nn.Module, sample: Sample) -> Any:
    kwargs = {k: v for k, v in sample.kwargs.items() if k != "labels"}
    if "use_cache" in inspect.signature(model.forward).parameters:
        kwargs["use_cache"] = False  # keys and values of blocks that are not run would be missing in one
    return model(*sample.args, **kwargs)


def _predicting_logits(output: Any, sample: Sample) -> Tensor:
    """f32 (P, V): the logits at the positions that predict a token of the text."""
    logits, ids = logits_of(output), sample.ids
    if logits is None or ids is None or logits.shape[:2] != ids.shape:
        raise BadInput(
            f"texts[{sample.index}] gives no logits for each of its tokens: sensitivity is measured on language models "
            "that read token ids"
        )
    mask = sample.kwargs.get("attention_mask")
    attended = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    predicts = attended[:, 1:] & attended[:, :-1]
    if not predicts.any():
        raise BadInput(f"texts[{sample.index}] has nothing to predict: give texts of at least 2 tokens")
    # All of them, as a rule: then nothing has to be copied.
    return (logits[:, :-1].flatten(0, 1) if predicts.all() else logits[:, :-1][predicts]).float()
