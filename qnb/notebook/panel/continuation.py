"""What a model writes behind a prompt, greedily, and where two continuations part."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qnb.errors import BadInput
from qnb.measure.token import alone
from qnb.model.inputs import check_ids, tokenize
from qnb.model.linear import original_pass
from qnb.model.subject import context_of, generates, input_device, is_compiled, is_encoder_decoder, measuring_state
from qnb.notebook.panel.prefix import stoppable
from qnb.notebook.panel.speed import COMPILED


def why_no_words(model: nn.Module, tokenizer: object) -> str | None:
    """Why the model's continuation cannot be shown; None where it can."""
    if not generates(model) or is_encoder_decoder(model):
        return "this model does not continue a text"
    if tokenizer is None or not hasattr(tokenizer, "decode"):
        return "no tokenizer was given"
    return COMPILED if is_compiled(model) else None


def prompt_ids(model: nn.Module, tokenizer: object, prompt: str, new_tokens: int) -> Tensor:
    """The prompt as ids (1, T). Raises BadInput where it is empty, or leaves no room in the context."""
    if not isinstance(prompt, str) or not prompt:
        raise BadInput("the prompt is empty: type the beginning of a text")
    ids = tokenize(tokenizer, prompt)["input_ids"]
    if ids.numel() == 0:
        raise BadInput("the prompt holds no tokens: type the beginning of a text")
    check_ids(model, ids, "the prompt")
    context = context_of(model)
    if context is not None and ids.shape[1] + new_tokens > context:
        raise BadInput(
            f"the prompt has {ids.shape[1]} tokens and {new_tokens} new ones are written, but the model's context is "
            f"{context}: shorten the prompt to {max(0, context - new_tokens)} tokens"
        )
    return ids


def write(
    model: nn.Module, ids: Tensor, new_tokens: int, check: Callable[[], None], as_original: bool = False
) -> list[int]:
    """The ids that the model writes behind the prompt, each time the most likely one."""
    ids = ids.to(input_device(model))
    how = original_pass() if as_original else contextlib.nullcontext()
    end = getattr(model.generation_config, "eos_token_id", None)
    pad = getattr(model.generation_config, "pad_token_id", None)
    with alone(model), measuring_state(model), how, stoppable(model, check):
        check()
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            max_new_tokens=new_tokens,
            pad_token_id=pad if pad is not None else (end[0] if isinstance(end, (list, tuple)) else end),
        )
    return written[0, ids.shape[1] :].tolist()


def pieces(tokenizer: object, ids: Sequence[int]) -> list[str]:
    """The text of each token, so that together they are the text of all: a character may end in a later token."""
    texts, done = [], ""
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n])
        if text.endswith("�"):
            texts.append("")
            continue
        texts.append(text[len(done) :])
        done = text
    return texts
