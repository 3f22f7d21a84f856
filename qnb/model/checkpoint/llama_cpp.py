"""GGUF, what llama.cpp runs: `w8a16-g32` as Q8_0 and `w4a16-g32` as Q4_0, code for code, for Llama architectures.

A block of either is 32 weights of a row: a scale d in f16 and the codes, value = code * d. Q4_0 holds code + 8, weights
0 to 15 in the low and 16 to 31 in the high half of its bytes. Scales that f16 does not hold exactly are rounded to it,
and the result says by how much.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qnb.errors import BadInput, NotSaveable
from qnb.model.checkpoint.folding import Folded
from qnb.model.linear import QLinear
from qnb.results import format_number, one_line
from qnb.schemes.coded import CodedVariant

FILE = "model.gguf"
_BLOCK = 32
_QUANTIZED = {"w8a16-g32": "Q8_0", "w4a16-g32": "Q4_0"}
_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write(model: nn.Module, path: Path, tokenizer: object, folded: Folded | None) -> list[str]:
    """Writes a model that `check` lets pass, and the tokenizer where there is one, to `path`; returns what a reader
    should know.

    Raises `NotSaveable` for a tokenizer that GGUF has no word for, and BadInput without `gguf`.
    """
    try:
        import gguf
    except ImportError as problem:
        raise BadInput(f'format="gguf" needs the gguf package ({problem}): pip install "qnb[gguf]"') from None
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds, rounded = set(), 0.0
    _write_config(writer, config, size)
    notes = _write_tokenizer(writer, tokenizer, config.vocab_size)
    for name, module in model.named_modules():
        target = _target(name)
        if target is None:
            continue
        order = None
        if target.endswith(("attn_q", "attn_k")):
            order = _rotation(heads if target.endswith("attn_q") else kv_heads, size)
        if isinstance(module, QLinear):
            variant = module.variant if folded is None else folded.variants.get(name, module.variant)
            kind = _QUANTIZED[variant.scheme.name]
            blocks, worst = _blocks(variant, order)
            writer.add_tensor(f"{target}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
            kinds.add(kind)
            rounded = max(rounded, worst)
        elif name != "lm_head" or module.weight is not model.get_input_embeddings().weight:
            weight = module.weight if folded is None else folded.tensors.get(f"{name}.weight", module.weight)
            _add(writer, gguf, f"{target}.weight", weight, order)
        bias = getattr(module, "bias", None)
        if bias is not None:
            bias = bias if folded is None else folded.tensors.get(f"{name}.bias", bias)
            _add(writer, gguf, f"{target}.bias", bias, order)
    main = "Q8_0" if kinds == {"Q8_0"} else "Q4_0"
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{main}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    if rounded:
        notes.append(f"scales were rounded to f16: by at most {format_number(100 * rounded, 2)} % of a weight's value")
    else:
        notes.append("codes and scales are exactly the model's")
    return notes


def check(model: nn.Module) -> None:
    """Raises `NotSaveable` for another architecture or scheme, naming it."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind != "llama":
        raise NotSaveable(f"GGUF is written for Llama architectures, not for {one_line(repr(kind), 40)}")
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise NotSaveable(f"GGUF is written for plain rotary positions, not for {one_line(rope['rope_type'], 40)}")
    for name, module in model.named_modules():
        if isinstance(module, QLinear):
            scheme = module.variant.scheme.name
            if scheme not in _QUANTIZED or not isinstance(module.variant, CodedVariant):
                raise NotSaveable(
                    f"layer {name} is {scheme}: GGUF takes {' and '.join(_QUANTIZED)}; quantize to one of these"
                )
            if module.in_features % _BLOCK:
                raise NotSaveable(
                    f"layer {name} has {module.in_features} inputs, which blocks of {_BLOCK} do not divide"
                )
        if module._parameters and any(p is not None for p in module._parameters.values()) and _target(name) is None:
            raise NotSaveable(f"{name} is a {type(module).__name__}, which GGUF's Llama has no place for")


def _target(name: str) -> str | None:
    """GGUF's name for a module: model.layers.3.mlp.up_proj -> blk.3.ffn_up."""
    parts = name.split(".")
    if len(parts) > 3 and parts[:2] == ["model", "layers"] and ".".join(parts[3:]) in _LAYER:
        return f"blk.{parts[2]}.{_LAYER['.'.join(parts[3:])]}"
    return _OUTSIDE.get(name)


def _rotation(heads: int, size: int) -> Tensor:
    """Order of rows: transformers rotates the two halves of a head against each other, llama.cpp neighbours."""
    return torch.arange(heads * size).view(heads, 2, size // 2).transpose(1, 2).reshape(-1)


def _blocks(variant: CodedVariant, order: Tensor | None) -> tuple[np.ndarray, float]:
    """u8 (N, bytes of a row), and the largest relative change of a scale by rounding it to f16."""
    codes, scale = variant.codes().cpu(), variant.levels.scale.cpu()
    if order is not None:
        codes, scale = codes[order], scale[order]
    n, k = codes.shape
    half = scale.half()
    if not half.isfinite().all() or ((half == 0) & (scale != 0)).any():
        raise NotSaveable("a layer has scales outside what f16 holds, in which GGUF keeps them")
    worst = float(((half.float() - scale) / scale.where(scale != 0, 1)).abs().max())
    d = half.view(n, k // _BLOCK, 1).view(torch.uint8)
    if variant.scheme.grid.bits == 8:
        body = codes.view(torch.uint8).view(n, k // _BLOCK, _BLOCK)
    else:
        low, high = (codes + 8).view(torch.uint8).view(n, k // _BLOCK, 2, _BLOCK // 2).unbind(2)
        body = low | high << 4
    return torch.cat([d, body], -1).reshape(n, -1).numpy(), worst


def _add(writer: Any, gguf: Any, name: str, tensor: Tensor, order: Tensor | None) -> None:
    """A tensor in its own type; vectors in f32, as llama.cpp wants them."""
    tensor = tensor.detach().cpu()
    tensor = tensor if order is None else tensor[order]
    if tensor.ndim == 1 or tensor.dtype == torch.float32:
        writer.add_tensor(name, tensor.float().contiguous().numpy())
    elif tensor.dtype == torch.float16:
        writer.add_tensor(name, tensor.contiguous().numpy())
    else:
        raw = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


def _write_config(writer: Any, config: Any, size: int) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float((getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _write_tokenizer(writer: Any, tokenizer: object, vocabulary: int) -> list[str]:
    if tokenizer is None:
        return ["no tokenizer is in the file: llama.cpp needs one, pass tokenizer="]
    import gguf

    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = {} if backend is None else json.loads(backend.to_str())
    kind = (described.get("model") or {}).get("type")
    before = described.get("pre_tokenizer") or {}
    if kind != "BPE" or before.get("type") != "ByteLevel" or not before.get("use_regex", True):
        raise NotSaveable(
            f"a tokenizer of kind {one_line(repr(kind), 40)} with {one_line(repr(before.get('type')), 40)} is not "
            "written to GGUF: byte-level BPE is, as GPT-2 has it"
        )
    tokens = [f"[PAD{i}]" for i in range(vocabulary)]
    types = [gguf.TokenType.UNUSED] * vocabulary
    for token, number in described["model"]["vocab"].items():
        tokens[number], types[number] = token, gguf.TokenType.NORMAL
    for added in described.get("added_tokens") or ():
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = described["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for name, add in [
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
    ]:
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None:
            add(number)
    start = getattr(tokenizer, "bos_token_id", None)
    writer.add_add_bos_token(start is not None and list(tokenizer("a")["input_ids"][:1]) == [start])
    return []
