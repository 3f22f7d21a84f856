"""From what a user hands in - strings, tensors, dicts, data loaders - to what a model is called with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qnb.errors import BadInput
from qnb.model.subject import context_of, input_device, predicts_next_token, takes_token_ids, vocabulary_of
from qnb.results import one_line

_FLOAT_OR_INT = (
    "give a list of strings (with tokenizer=), or an iterable of model inputs: tensors, tuples or dicts of tensors"
)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One call of the model, on its device: the text's place among the texts, and what to call with."""

    index: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def ids(self) -> Tensor | None:
        """The token ids (B, T); None for inputs that have none."""
        ids = self.kwargs.get("input_ids")
        return ids if isinstance(ids, Tensor) else None


def samples_of(
    model: nn.Module, texts: object, tokenizer: object = None, *, words: str = "texts"
) -> tuple[Iterator[Sample], int | None]:
    """The samples, one at a time, and their number where that is known. Raises BadInput, naming the text by index.

    Each text is alone in its batch, so that no padding touches a result. Token ids are cut to the model's context.
    `words` is the caller's name for the argument, for the messages.
    """
    if isinstance(texts, (str, bytes)):
        raise BadInput(f"{words} is one bare string, {one_line(repr(texts), 40)}: give a list of strings")
    if isinstance(texts, Mapping) or (isinstance(texts, Tensor) and (texts.is_floating_point() or texts.dim() < 2)):
        texts = [texts]  # one model input, not a collection of them
    if not isinstance(texts, Iterable):
        raise BadInput(f"{words} is {one_line(repr(texts), 60)} of type {type(texts).__name__}: {_FLOAT_OR_INT}")
    if isinstance(texts, Sequence) and any(isinstance(t, str) for t in texts):
        return _from_strings(model, texts, tokenizer, words)
    total = len(texts) if hasattr(texts, "__len__") else None
    if total == 0:
        raise BadInput(f"{words} is empty: {_FLOAT_OR_INT}")
    return _from_inputs(model, texts, tokenizer, words), total


def tokenize(tokenizer: object, text: str) -> dict[str, Tensor]:
    """What `tokenizer(text)` gives, as tensors (1, T) on the CPU."""
    if tokenizer is None:
        raise BadInput(
            "texts are strings but no tokenizer is given: pass tokenizer=, the one the model was trained with"
        )
    if not callable(tokenizer):
        raise BadInput(
            f"tokenizer is of type {type(tokenizer).__name__}, which cannot be called: give one of transformers"
        )
    encoded = tokenizer(text)
    if not isinstance(encoded, Mapping) or "input_ids" not in encoded:
        raise BadInput(
            f"tokenizer(text) gave {type(encoded).__name__} without input_ids: give a tokenizer of transformers"
        )
    tensors = {k: torch.as_tensor(v) for k, v in encoded.items() if isinstance(v, Tensor) or _is_numbers(v)}
    return {k: (v if v.dim() == 2 else v.reshape(1, -1)) for k, v in tensors.items()}


def check_ids(model: nn.Module, ids: Tensor, where: str) -> None:
    """Raises BadInput for token ids that the model's embedding has no row for."""
    if ids.is_floating_point() or ids.is_complex():
        raise BadInput(f"{where} holds token ids of {ids.dtype}: give integers")
    vocabulary = vocabulary_of(model)
    if vocabulary is None or ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        stray = high if high >= vocabulary else low
        raise BadInput(
            f"{where} holds the token id {stray}, and the model knows 0 to {vocabulary - 1}: is the tokenizer its own?"
        )


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors moved, containers of them walked, everything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: to_device(v, device) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        moved = [to_device(v, device) for v in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    return value


def _from_strings(model: nn.Module, texts: Sequence, tokenizer: object, words: str) -> tuple[Iterator[Sample], int]:
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            given = f"{words}[{index}] is {one_line(repr(text), 60)} of type {type(text).__name__}"
            raise BadInput(f"{given} among strings: give strings only")
    encoded = []
    for index, text in enumerate(texts):
        where = f"{words}[{index}]"
        inputs = _cut(tokenize(tokenizer, text), _longest(model, tokenizer))
        check_ids(model, inputs["input_ids"], where)
        _check_length(model, inputs["input_ids"], f"{where}, {one_line(repr(text), 40)},")
        encoded.append(inputs)
    device = input_device(model)
    return (Sample(i, (), to_device(inputs, device)) for i, inputs in enumerate(encoded)), len(encoded)


def _from_inputs(model: nn.Module, inputs: Iterable, tokenizer: object, words: str) -> Iterator[Sample]:
    device = input_device(model)
    index = -1
    for index, given in enumerate(inputs):
        where = f"{words}[{index}]"
        if isinstance(given, str):  # an iterable that is no list: a generator or a column of a data set
            kwargs: dict[str, Any] = _cut(tokenize(tokenizer, given), _longest(model, tokenizer))
            args: tuple = ()
        elif isinstance(given, Mapping):
            args, kwargs = (), dict(given)
        elif isinstance(given, tuple):
            args, kwargs = given, {}
        elif isinstance(given, Tensor) and not given.is_floating_point() and takes_token_ids(model):
            args, kwargs = (), {"input_ids": given}
        elif isinstance(given, Tensor):
            args, kwargs = (given,), {}
        else:
            raise BadInput(f"{where} is {one_line(repr(given), 60)} of type {type(given).__name__}: {_FLOAT_OR_INT}")
        ids = kwargs.get("input_ids")
        if isinstance(ids, Tensor):
            if ids.dim() == 1:
                kwargs["input_ids"] = ids = ids.unsqueeze(0)
            check_ids(model, ids, where)
            kwargs = _cut(_batched(kwargs, ids), _longest(model, None))
            _check_length(model, ids, where)
        yield Sample(index, to_device(args, device), to_device(kwargs, device))
    if index < 0:
        raise BadInput(f"{words} is empty: {_FLOAT_OR_INT}")


def _batched(kwargs: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    # A mask without the batch axis would be passed over in silence, and padding counted.
    beside = {k for k, v in kwargs.items() if isinstance(v, Tensor) and v.shape == ids.shape[1:]}
    return {k: (v.unsqueeze(0) if len(ids) == 1 and k in beside else v) for k, v in kwargs.items()}


def _cut(inputs: dict[str, Any], longest: int | None) -> dict[str, Any]:
    length = inputs["input_ids"].shape[-1]
    if longest is None or length <= longest:
        return inputs
    along = {k for k, v in inputs.items() if isinstance(v, Tensor) and v.dim() == 2 and v.shape[1] == length}
    return {k: (v[:, :longest] if k in along else v) for k, v in inputs.items()}


def _longest(model: nn.Module, tokenizer: object) -> int | None:
    context = context_of(model)
    if predicts_next_token(model):
        return context
    # Encoders with offset positions (RoBERTa) take fewer tokens than they have positions; their tokenizer knows.
    limits = [n for n in (context, getattr(tokenizer, "model_max_length", None)) if isinstance(n, int)]
    return min(limits, default=None)


def _check_length(model: nn.Module, ids: Tensor, where: str) -> None:
    fewest, tokens = 2 if predicts_next_token(model) else 1, ids.shape[-1]
    if tokens < fewest:
        raise BadInput(f"{where} has {tokens} token(s): give at least {fewest}, the first of a text is never predicted")


def _is_numbers(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(v, (int, list, tuple)) for v in value)
