"""What is run while the meters look: text generation, or one forward."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qnb.errors import BadInput
from qnb.model.inputs import check_ids, samples_of, to_device, tokenize
from qnb.model.subject import (
    context_of,
    devices_of,
    generates,
    input_device,
    is_encoder_decoder,
    synchronize,
    vocabulary_of,
)
from qnb.results import one_line

PROMPT_TOKENS = 128
NEW_TOKENS = 32
_PROMPT = (
    "The lighthouse keeper wrote a short report every evening. He noted the wind, the height of the waves and the "
    "ships that passed, and he drew a small map of the fog. On quiet nights he added a few lines about the birds that "
    "rested on the railing, and about the lamp, which had to be cleaned twice when it rained. One winter the reports "
    "grew longer. A ship had begun to pass at the same hour each night, without lights, and nobody in the harbour "
    "knew its name. He measured its speed against the clock, wrote the numbers in a column, and asked himself what "
    "they would look like in spring, when the days were longer and the sea was calm again."
)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one run: all of it, until the first new token, and from the first new token to the last."""

    total: float
    first: float | None = None
    rest: float | None = None


class Workload:
    """Something to run again and again, each time the same.

    rows                       how many sequences are run at once
    prompt_tokens, new_tokens  of all rows together; None where they are not known
    prompt                     where the prompt came from, in words
    """

    rows: int = 1
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    prompt = "inputs= as given"

    def run(self) -> Timing:
        """Runs once and says how long it took."""
        raise NotImplementedError


class Generation(Workload):
    """Greedy generation of exactly `new_tokens` tokens behind each row of a prompt of ids (B, T)."""

    def __init__(self, model: nn.Module, ids: Tensor, new_tokens: int, prompt: str) -> None:
        from transformers import StoppingCriteria, StoppingCriteriaList

        class Ticks(StoppingCriteria):
            """Stamps the time of each step, which writes one token in every row, and never stops."""

            def __call__(self, input_ids: Tensor, scores: Any, **rest: Any) -> Tensor:
                synchronize(devices)
                stamps.append(time.perf_counter())
                return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

        devices, stamps = devices_of(model), []
        self.rows, self.prompt = len(ids), prompt
        self.prompt_tokens, self.new_tokens = ids.numel(), len(ids) * new_tokens
        self._model, self._devices, self._steps, self._stamps = model, devices, new_tokens, stamps
        ids = ids.to(input_device(model))
        self._arguments = {
            "inputs": ids,
            "attention_mask": torch.ones_like(ids),
            "generation_config": _greedy(model, ids.shape[1], new_tokens),
            "stopping_criteria": StoppingCriteriaList([Ticks()]),
        }

    def run(self) -> Timing:
        self._stamps.clear()
        synchronize(self._devices)
        began = time.perf_counter()
        self._model.generate(**self._arguments)
        synchronize(self._devices)
        ended = time.perf_counter()
        stamps = self._stamps
        if len(stamps) != self._steps:
            raise BadInput(
                f"{type(self._model).__name__}.generate wrote {len(stamps)} tokens where {self._steps} were asked "
                "for: give inputs= to time one forward instead"
            )
        return Timing(ended - began, stamps[0] - began, stamps[-1] - stamps[0])


class Forward(Workload):
    """One forward of the model."""

    def __init__(self, model: nn.Module, args: tuple, kwargs: Mapping[str, Any], prompt: str) -> None:
        self._model, self._args, self._kwargs = model, args, dict(kwargs)
        self._devices = devices_of(model)
        self.prompt = prompt
        ids = kwargs.get("input_ids")
        if isinstance(ids, Tensor):
            self.rows, self.prompt_tokens = len(ids), ids.numel()

    def run(self) -> Timing:
        synchronize(self._devices)
        began = time.perf_counter()
        self._model(*self._args, **self._kwargs)
        synchronize(self._devices)
        return Timing(time.perf_counter() - began)


def workload_of(
    model: nn.Module, tokenizer: object, prompt: object, new_tokens: int, texts: object, inputs: object
) -> Workload:
    """What to run for this model. Raises BadInput where it takes more than what was given to run it."""
    if not isinstance(new_tokens, int) or isinstance(new_tokens, bool) or new_tokens < 1:
        raise BadInput(f"new_tokens={one_line(repr(new_tokens), 40)}: give a whole number from 1 on")
    if inputs is not None:
        if prompt is not None:
            raise BadInput(
                "both prompt= and inputs= are given: a prompt is continued, inputs are run once; give one of them"
            )
        if isinstance(inputs, tuple):
            return Forward(model, to_device(inputs, input_device(model)), {}, "inputs= as given")
        sample = next(samples_of(model, [inputs], tokenizer, words="inputs")[0])
        return Forward(model, sample.args, sample.kwargs, "inputs= as given")
    ids, words = _prompt_ids(model, tokenizer, prompt, new_tokens, texts)
    if generates(model):
        _check_room(model, ids.shape[1], new_tokens)
        return Generation(model, ids, new_tokens, words)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Forward(model, (), to_device(given, input_device(model)), words)


def _prompt_ids(
    model: nn.Module, tokenizer: object, prompt: object, new_tokens: int, texts: object
) -> tuple[Tensor, str]:
    if isinstance(prompt, str):
        ids, words = tokenize(tokenizer, prompt)["input_ids"], "as given"
    elif isinstance(prompt, Tensor):
        ids, words = prompt.reshape(1, -1) if prompt.dim() < 2 else prompt, "token ids as given"
    elif prompt is not None:
        raise BadInput(
            f"prompt is {one_line(repr(prompt), 60)} of type {type(prompt).__name__}: give a string or a tensor of ids"
        )
    else:
        ids, words = _default_ids(model, tokenizer, texts)
        context = context_of(model)
        room = (
            PROMPT_TOKENS if context is None else min(PROMPT_TOKENS, context - (new_tokens if generates(model) else 0))
        )
        ids, words = ids[:, : max(1, room)], f"{words}, cut to {min(ids.shape[1], max(1, room))} tokens"
    if ids.dim() != 2 or ids.numel() == 0:
        raise BadInput(f"the prompt has the shape {tuple(ids.shape)}, which holds no tokens: give at least one")
    check_ids(model, ids, "the prompt")
    return ids, words


def _default_ids(model: nn.Module, tokenizer: object, texts: object) -> tuple[Tensor, str]:
    # Only of a list: taking the first of an iterator would take it away from the evaluation.
    first = texts[0] if isinstance(texts, Sequence) and not isinstance(texts, str) and len(texts) else None
    if isinstance(first, Mapping):
        first = first.get("input_ids")
    if isinstance(first, str) and tokenizer is not None:
        return tokenize(tokenizer, first)["input_ids"], "the first of the texts"
    if isinstance(first, Tensor) and not first.is_floating_point():
        return first.reshape(1, -1) if first.dim() < 2 else first[:1], "the first of the texts"
    if tokenizer is not None:
        return tokenize(tokenizer, _PROMPT)["input_ids"], "a plain English text"
    vocabulary = vocabulary_of(model)
    if vocabulary is None:
        raise BadInput(
            f"nothing to run {type(model).__name__} with: pass inputs=, a tensor, a tuple or a dict of tensors, "
            "or for a language model its tokenizer"
        )
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        vocabulary, (1, PROMPT_TOKENS), generator=generator
    ), "random token ids (seed 0), no tokenizer given"


def _check_room(model: nn.Module, prompt_tokens: int, new_tokens: int) -> None:
    context = context_of(model)
    if context is not None and prompt_tokens + new_tokens > context:
        raise BadInput(
            f"the prompt has {prompt_tokens} tokens and {new_tokens} new ones are asked for, but the model's context "
            f"is {context}: shorten the prompt to {max(0, context - new_tokens)} or ask for fewer"
        )


def _greedy(model: nn.Module, prompt_tokens: int, new_tokens: int) -> Any:
    """A generation configuration of our own: the model's stays as it is."""
    config = copy.deepcopy(model.generation_config)
    config.update(
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        max_length=None,
        min_length=None,
        temperature=1.0,  # these three at transformers' defaults: unset, it takes the model's own and warns of them
        top_p=1.0,
        top_k=50,
        return_dict_in_generate=False,
    )
    if model.generation_config.max_length is not None and not is_encoder_decoder(model):
        # Where the model itself has a max_length, transformers warns at each run of max_new_tokens beside it.
        config.update(max_length=prompt_tokens + new_tokens, max_new_tokens=None)
        if model.generation_config.max_new_tokens is not None:
            config.max_new_tokens = new_tokens
    if config.pad_token_id is None:
        end = config.eos_token_id
        config.pad_token_id = end[0] if isinstance(end, (list, tuple)) and end else end
    return config
