"""compressed-tensors: what transformers and serving engines read.

A layer is 8-bit integers (`int-quantized`) or dense int32 words (`pack-quantized`), with scales by tensor, output or
group. Weight-only formats are always packed here, since that is what serving engines take.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qnb import schemes
from qnb.errors import BadCheckpoint, QnbError
from qnb.model.checkpoint import bits
from qnb.model.recipe import FROM_CHECKPOINT
from qnb.results import one_line
from qnb.schemes import How, Scheme, Variant, grammar
from qnb.schemes.coded import CodedVariant
from qnb.schemes.grammar import Spelling
from qnb.schemes.plain import build, checked

METHOD = "compressed-tensors"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INT, _PACK = "int-quantized", "pack-quantized"


# ---------------------------------------------------------------- writing


def why_not(variant: Variant) -> str | None:
    """Why the format cannot say this layer so that plain transformers reads it; None where it can."""
    name, k = variant.scheme.name, variant.shape[1]
    spelling = grammar.parse(name)
    if spelling is None or not isinstance(variant, CodedVariant):
        return f"{name} has codes that the format has no word for"
    if spelling.weight_bits not in (4, 8) or (spelling.weight_bits == 4 and spelling.activation_bits == 8):
        return f"no reader of it takes {name}"
    if spelling.asym:
        return f"{name} has zero points, which plain transformers fails to read back"
    if spelling.activation_bits == 16 and spelling.group < 0:
        return f"serving engines take no {name}: one scale for all is for 8-bit activations"
    if spelling.group > 0 and k % spelling.group:
        return f"{name}: a group of {spelling.group} does not divide its {k} inputs"
    return None


def tensors_of(variant: CodedVariant) -> dict[str, Tensor]:
    """The layer's tensors by their names in the format; the divisor of the inputs is no part of it."""
    spelling, levels, codes = grammar.parse(variant.scheme.name), variant.levels, variant.codes()
    scale = levels.scale.to(levels.scale_dtype)
    found = {"weight_scale": scale[:1, 0].clone() if spelling.group < 0 else scale}
    if spelling.activation_bits == 16:
        lowest = -(2 ** (spelling.weight_bits - 1))
        unsigned = (codes.to(torch.int16) - lowest).to(torch.uint8)
        found["weight_packed"] = bits.pack(unsigned, spelling.weight_bits)
        found["weight_shape"] = torch.tensor(variant.shape, dtype=torch.int64)
    else:
        found["weight"] = codes
    if spelling.static:
        # f32 whatever the model's type: the very number that the layer runs with.
        found["input_scale"] = torch.tensor([variant.inputs.scale], dtype=torch.float32)
        if spelling.aasym:
            found["input_zero_point"] = torch.tensor([variant.inputs.zero], dtype=torch.int8)
    return found


def config_of(layers: Mapping[str, Scheme], others: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` for these layers; `others` are the linear layers that stay as they are."""
    by_scheme: dict[str, list[str]] = {}
    for name, scheme in layers.items():
        by_scheme.setdefault(scheme.name, []).append(name)
    groups = {}
    for number, (scheme, names) in enumerate(by_scheme.items()):
        targets = ["Linear"] if len(by_scheme) == 1 else names
        groups[f"group_{number}"] = {"targets": targets, **_group(grammar.parse(scheme))}
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(others),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _group(spelling: Spelling) -> dict[str, Any]:
    strategy = "tensor" if spelling.group < 0 else "group" if spelling.group else "channel"
    weights = {
        "num_bits": spelling.weight_bits,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "group_size": spelling.group if spelling.group > 0 else None,
        "dynamic": False,
    }
    inputs = None
    if spelling.activation_bits == 8:
        strategy = "tensor" if spelling.static else "token"
        inputs = {"num_bits": 8, "type": "int", "symmetric": not spelling.aasym, "strategy": strategy}
        inputs |= {"group_size": None, "dynamic": not spelling.static}
    return {
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": _INT if inputs else _PACK,
    }


# ---------------------------------------------------------------- reading


@dataclasses.dataclass(frozen=True)
class Form:
    """How a layer is stored, and the scheme that runs it."""

    scheme: Scheme
    strategy: str
    packed: bool

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """What a layer of this form has, apart from its bias."""
        spelling = grammar.parse(self.scheme.name)
        names = ("weight_packed", "weight_shape") if self.packed else ("weight",)
        names += ("weight_scale",) + (("weight_zero_point",) if spelling.asym else ())
        names += ("input_scale",) if spelling.static else ()
        return names + (("input_zero_point",) if spelling.aasym else ())


def form_of(group: Mapping[str, Any], default: str | None) -> Form:
    """The form that a config group describes, `default` being the checkpoint's format; raises `BadCheckpoint`."""
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, Mapping) or not (inputs is None or isinstance(inputs, Mapping)):
        raise BadCheckpoint("a config group of the checkpoint has no weights that can be read")
    if group.get("output_activations") is not None:
        raise BadCheckpoint("the checkpoint quantizes outputs of layers, which qnb does not")
    format = group.get("format") or default
    if format not in (_INT, _PACK, "naive-quantized"):
        raise BadCheckpoint(f"format {one_line(repr(format), 40)} is none that qnb reads: it reads {_INT} and {_PACK}")
    width, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy")
    size = weights.get("group_size")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if kind != "int" or width not in (4, 8) or strategy not in ("tensor", "channel", "group"):
        shown = one_line(f"{width}-bit {kind} by {strategy}", 60)
        raise BadCheckpoint(f"the checkpoint's weights are {shown}: qnb reads 4- and 8-bit integers by group or wider")
    if weights.get("actorder") in ("group", "dynamic"):
        raise BadCheckpoint("the checkpoint has inputs out of order (actorder group), which qnb does not read")
    if strategy == "group" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise BadCheckpoint(f"the checkpoint has groups of {one_line(repr(size), 40)} inputs")
    static, aasym = _activations(inputs)
    group_size = {"tensor": -1, "channel": 0}.get(strategy, size)
    asym = weights.get("symmetric", True) is not True
    spelling = Spelling(width, 16 if inputs is None else 8, static, group_size, asym, aasym)
    try:
        return Form(schemes.find(str(spelling)), strategy, format == _PACK)
    except QnbError as problem:
        raise BadCheckpoint(f"the checkpoint holds what no operator of qnb computes: {problem}") from None


def _activations(inputs: Mapping[str, Any] | None) -> tuple[bool, bool]:
    """(static, with a zero point)"""
    if inputs is None:
        return False, False
    static = inputs.get("dynamic", False) is False
    asym = inputs.get("symmetric", True) is not True
    usable = inputs.get("num_bits") == 8 and inputs.get("type", "int") == "int"
    if not usable or inputs.get("strategy") != ("tensor" if static else "token") or (asym and not static):
        raise BadCheckpoint(
            "the checkpoint quantizes activations otherwise than to 8 bits by token, or by tensor with a fixed scale"
        )
    return static, asym


def forms_of(config: Mapping[str, Any]) -> Callable[[str, nn.Module], Form | None]:
    """From a `quantization_config` to a function of a layer's name and module: its form, None where it stays float."""
    for key in ("sparsity_config", "transform_config"):
        if config.get(key):
            raise BadCheckpoint(f"the checkpoint has a {key}, which changes what its numbers mean: qnb reads none")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise BadCheckpoint("the checkpoint's quantization_config has no config_groups")
    targets: list[tuple[str, Form]] = []
    for name, group in groups.items():
        names = group.get("targets") if isinstance(group, Mapping) else None
        if not isinstance(names, Sequence) or isinstance(names, str) or not all(isinstance(t, str) for t in names):
            raise BadCheckpoint(f"config group {one_line(repr(name), 40)} of the checkpoint has no list of targets")
        form = form_of(group, config.get("format"))
        targets += [(target, form) for target in names]
    ignore = config.get("ignore") or []
    if not isinstance(ignore, Sequence) or not all(isinstance(t, str) for t in ignore):
        raise BadCheckpoint("the checkpoint's quantization_config has an ignore that is no list of names")
    ignored, wanted = _matcher(ignore), [(_matcher([target]), form) for target, form in targets]

    def find(name: str, module: nn.Module) -> Form | None:
        if ignored(name, module):
            return None
        return next((form for matches, form in wanted if matches(name, module)), None)

    return find


def _matcher(targets: Sequence[str]) -> Callable[[str, nn.Module], bool]:
    """Names, classes, and regular expressions after `re:`, as the format has them."""
    plain, patterns = set(targets), []
    for target in targets:
        if target.startswith("re:"):
            try:
                patterns.append(re.compile(target[3:]))
            except re.error as problem:
                raise BadCheckpoint(
                    f"the checkpoint's target {one_line(repr(target), 50)} is wrong: {problem}"
                ) from None
    classes = {"Linear"} & plain

    def matches(name: str, module: nn.Module) -> bool:
        if name in plain or any(pattern.match(name) for pattern in patterns):
            return True
        return bool(classes) and isinstance(module, nn.Linear)

    return matches


def variant_of(form: Form, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Variant:
    """The variant of a layer (n, k) whose tensors are given by their names in the format; raises `BadCheckpoint`.

    Codes are taken as they are, -128 among them: others choose scales by 127.5.
    """
    n, k = shape
    spelling = grammar.parse(form.scheme.name)
    width, group = spelling.weight_bits, form.scheme.grid.group_of(k)
    g = -(-k // group)
    if "weight_g_idx" in tensors:
        raise BadCheckpoint("weight_g_idx: inputs out of order (actorder group) are not read")
    half = 2 ** (width - 1)
    if form.packed:
        words = (n, -(-k * width // 32))
        packed = checked("weight_packed", tensors.get("weight_packed"), words, torch.int32)
        said = tensors.get("weight_shape")
        if said is not None and said.tolist() != [n, k]:
            raise BadCheckpoint(f"weight_shape says {one_line(said.tolist(), 40)}, but the layer has {n} x {k}")
        codes = (bits.unpack(packed, k, width).to(torch.int16) - half).to(torch.int8)
    else:
        codes = checked("weight", tensors.get("weight"), shape, torch.int8)
    scale = tensors.get("weight_scale")
    if scale is not None and form.strategy == "tensor" and scale.numel() == 1:
        scale = scale.reshape(1, 1).expand(n, 1)
    elif scale is not None and form.strategy == "channel" and tuple(scale.shape) == (n,):
        scale = scale.unsqueeze(1)
    plain = {"weight_codes": codes, "weight_scale": checked("weight_scale", scale, (n, g), *_FLOATS).contiguous()}
    if spelling.asym:
        plain["weight_zero"] = _zero(form, tensors.get("weight_zero_point"), n, g, width)
    if spelling.static:
        fixed = tensors.get("input_scale")
        fixed = checked("input_scale", None if fixed is None else fixed.reshape(-1), (1,), *_FLOATS)
        zero = torch.zeros(1, dtype=torch.int8)
        if spelling.aasym:
            given = tensors.get("input_zero_point")
            zero = checked("input_zero_point", None if given is None else given.reshape(-1), (1,), torch.int8)
        plain["input_scale_zero"] = torch.cat([fixed.double(), zero.double()]).cpu()
    return build(form.scheme, How(FROM_CHECKPOINT), shape, plain)


def _zero(form: Form, given: Tensor | None, n: int, g: int, width: int) -> Tensor:
    """s8 (n, g): zero points, which `pack-quantized` packs along the outputs."""
    if given is not None and form.strategy == "tensor" and given.numel() == 1:
        return checked("weight_zero_point", given.reshape(1, 1), (1, 1), torch.int8).expand(n, 1).contiguous()
    if form.packed and given is not None and given.dtype == torch.int32:
        words = checked("weight_zero_point", given, (-(-n * width // 32), g), torch.int32)
        return (bits.unpack(words.T, n, width).T.to(torch.int16) - 2 ** (width - 1)).to(torch.int8).contiguous()
    return checked("weight_zero_point", given, (n, g), torch.int8)
