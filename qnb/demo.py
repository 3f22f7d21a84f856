"""The language model and the texts that ship with qnb: trained, small, and there without a network.

`qnb/_demo/README.md` says what the model is and how its weights came to be.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

from qnb.errors import BadInput, QnbError

_FILES = Path(__file__).parent / "_demo"
_KINDS = ("calibration", "evaluation")


class _MissingTransformers(QnbError, ImportError):
    """transformers, which only the demo model needs, is not installed."""


def demo_lm(dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"):
    """The bundled language model and its tokenizer: `model, tokenizer = qnb.demo_lm()`.

    A Llama architecture of 11.5 million parameters, context 512, trained on the Python standard library's source; in
    eval mode. The weights are stored in bf16; `dtype` is what they are computed in. float32 is the default because
    every CPU computes it fast, where bf16 is emulated on those without AVX512-BF16 or AMX. The tokenizer puts the
    end-of-text token before each text, as in training. `qnb.evaluate` and `qnb.profile` take the evaluation texts and
    this tokenizer for this model where none are given. Nothing is fetched from a network.

    Raises QnbError (also an ImportError) without transformers, BadInput for a dtype that is no float type.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise BadInput(
            f"dtype={dtype!r}: the demo model computes in a float type; give torch.float32 or torch.bfloat16"
        )
    try:
        from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise _MissingTransformers(
            f'the demo model needs transformers, which does not import ({error}): pip install "qnb[notebook]"'
        ) from error
    from qnb.model.defaults import remember_defaults

    tokenizer = PreTrainedTokenizerFast.from_pretrained(_FILES, local_files_only=True)
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # for a third of a second a bar is noise in a notebook
    try:
        model = LlamaForCausalLM.from_pretrained(_FILES, dtype=dtype, local_files_only=True).to(device).eval()
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    remember_defaults(model, tokenizer, demo_texts("evaluation"), demo_texts("calibration"))
    return model, tokenizer


def demo_texts(kind: str) -> list[str]:
    """64 pieces of Python source, 500 tokens each, that the demo model was not trained on.

    `kind` is "calibration" or "evaluation"; the two come from different files. Raises BadInput for another.
    """
    if kind not in _KINDS:
        raise BadInput(f"demo texts of kind {kind!r}: there are {' and '.join(map(repr, _KINDS))}")
    return list(_read_texts(kind))


@functools.cache
def _read_texts(kind: str) -> tuple[str, ...]:
    lines = (_FILES / f"{kind}.jsonl").read_text("utf-8").splitlines()
    return tuple(json.loads(line)["text"] for line in lines)
