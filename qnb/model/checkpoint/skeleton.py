"""A transformers model without its weights, from a checkpoint's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from qnb.errors import BadCheckpoint, BadInput
from qnb.model import strict_json
from qnb.results import one_line

CONFIG = "config.json"


def read_config(directory: Path) -> dict[str, Any]:
    """The checkpoint's `config.json`; raises `BadCheckpoint` where there is none that can be read."""
    path = directory / CONFIG
    if not path.is_file():
        raise BadCheckpoint(f"{one_line(directory, 100)} is no checkpoint of a transformers model: it has no {CONFIG}")
    return strict_json.read(path, BadCheckpoint, "configuration")


def model_from(directory: Path, dtype: torch.dtype | None) -> nn.Module:
    """The model that `config.json` describes, in eval mode: large parameters on the meta device, buffers computed.

    `dtype` None takes what the configuration says. No code of the checkpoint is run. Raises `BadCheckpoint`.
    """
    try:
        import transformers
    except ImportError as problem:
        raise BadInput(
            f"transformers builds the model of a checkpoint, and does not import ({problem}): "
            'pip install "qnb[notebook]"'
        ) from None
    read_config(directory)  # strictly, before anybody else reads it
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as problem:  # its validation raises types of several packages
        raise BadCheckpoint(f"{CONFIG} describes no model that transformers knows: {one_line(problem)}") from None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    names = getattr(config, "architectures", None) or []
    kind = getattr(transformers, names[0], None) if names and isinstance(names[0], str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise BadCheckpoint(f"{CONFIG} names the architectures {one_line(names, 60)}, none of which transformers has")
    if dtype is None:
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    config.dtype = dtype
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with _EmptyOnMeta():
            model = kind(config)
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, ZeroDivisionError) as problem:
        raise BadCheckpoint(f"{CONFIG} describes a {names[0]} that cannot be built: {one_line(problem)}") from None
    finally:
        torch.set_default_dtype(before)
    if (directory / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory, local_files_only=True)
    return model.eval()


class _EmptyOnMeta(TorchFunctionMode):
    """Sends `torch.empty` without a device to meta: parameters to be loaded start so, while buffers are computed."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
