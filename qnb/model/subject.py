"""What is being measured: the checks, facts and states of a model that every measurement needs."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import nn

from qnb.errors import BadInput
from qnb.model.linear import QLayer
from qnb.results import one_line


def check_model(model: object) -> nn.Module:
    """The model itself; raises BadInput for anything that is no module, or whose weights are on `meta`."""
    if not isinstance(model, nn.Module):
        raise BadInput(f"model is {one_line(repr(model), 60)} of type {type(model).__name__}: give a torch.nn.Module")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise BadInput(f"{name} of the model is on the meta device, which holds no numbers: load the weights first")
    return model


@contextlib.contextmanager
def measuring_state(model: nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; each module's own training flag is back afterwards, whatever happened.

    `no_grad`, not `inference_mode`: a model that caches a tensor would keep one that later training cannot use.
    """
    training = [m for m in model.modules() if m.training]
    try:
        for m in training:
            m.training = False
        with torch.no_grad():
            yield
    finally:
        for m in training:
            m.training = True


def devices_of(model: nn.Module) -> list[torch.device]:
    """Every device that holds a parameter or a buffer, in order of first appearance; CPU for a model with neither."""
    tensors = (*model.parameters(), *model.buffers())
    return list(dict.fromkeys(t.device for t in tensors)) or [torch.device("cpu")]


def input_device(model: nn.Module) -> torch.device:
    """Where inputs go: the device of the input embedding, else of the first parameter or buffer."""
    embedding = _embedding(model)
    if isinstance(embedding, QLayer):  # whose weight would be made anew to be asked
        return embedding.device
    return embedding.weight.device if embedding is not None else devices_of(model)[0]


def context_of(model: nn.Module) -> int | None:
    """The most tokens the model takes at once, as its configuration says; None where it does not say."""
    length = getattr(_text_config(model), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def vocabulary_of(model: nn.Module) -> int | None:
    """How many token ids the model knows: rows of its input embedding, else the configuration's vocab_size."""
    embedding = _embedding(model)
    if isinstance(embedding, QLayer):
        return embedding.variant.shape[0]
    if embedding is not None:
        return embedding.weight.shape[0]
    size = getattr(_text_config(model), "vocab_size", None)
    return size if isinstance(size, int) else None


def takes_token_ids(model: nn.Module) -> bool:
    """Whether a bare tensor of integers is the model's `input_ids`."""
    return vocabulary_of(model) is not None or "input_ids" in inspect.signature(model.forward).parameters


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model reads one sequence and writes another."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def generates(model: nn.Module) -> bool:
    """Whether the model writes text by transformers' `generate`."""
    can_generate = getattr(model, "can_generate", None)
    return callable(getattr(model, "generate", None)) and callable(can_generate) and bool(can_generate())


def predicts_next_token(model: nn.Module) -> bool | None:
    """True for a language model, False where a transformers model says it is none, None where its output must tell."""
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate()) if callable(can_generate) else None


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile runs the model, or a part of it."""
    return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules())


def synchronize(devices: list[torch.device]) -> None:
    """Waits until every accelerator among `devices` has finished what it was given."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        elif device.type == "xpu":
            torch.xpu.synchronize(device)


def _text_config(model: nn.Module) -> object:
    config = getattr(model, "config", None)
    text_config = getattr(config, "get_text_config", None)
    return text_config() if callable(text_config) else config


def _embedding(model: nn.Module) -> nn.Embedding | None:
    find = getattr(model, "get_input_embeddings", None)
    if not callable(find):
        return None
    try:
        embedding = find()
    except (NotImplementedError, AttributeError):  # vision and audio models have none
        return None
    return embedding if isinstance(embedding, nn.Embedding) else None
