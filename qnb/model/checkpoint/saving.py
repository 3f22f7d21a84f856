"""`save`: a quantized model to disk, in a format that other programs read wherever one can say it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from qnb.errors import BadInput, NotSaveable, QnbError
from qnb.model import strict_json
from qnb.model.checkpoint import compressed, files, folding, native
from qnb.model.checkpoint.files import check_target, written_aside
from qnb.model.checkpoint.folding import Folded
from qnb.model.checkpoint.loading import RECIPE, load
from qnb.model.checkpoint.skeleton import CONFIG
from qnb.model.defaults import remembered
from qnb.model.divergence import mean_kl
from qnb.model.experts import Experts
from qnb.model.fused import fused_groups
from qnb.model.linear import QConv1D, QEmbedding, QLayer, QLinear, quantized_layers
from qnb.model.recipe import Recipe
from qnb.model.select import find_sites
from qnb.results import Cell, Result, Table, format_bytes, format_number, one_line
from qnb.schemes import Variant

FORMATS = ("compressed-tensors", "qnb", "gguf")
SHARD_BYTES = 5_000_000_000
# What only qnb's own format is written for.
_OURS_ALONE = {
    Experts: "holds quantized experts of a mixture",
    QEmbedding: "is a quantized embedding",
    QConv1D: "is a Conv1D",
}


@dataclasses.dataclass(frozen=True, repr=False)
class Saved(Result):
    """What `save` wrote: `nbytes` of all `files`; `folding_kl` is what folding cost, KL(model || saved) in nats."""

    path: str
    format: str
    layers: int
    nbytes: int
    files: tuple[str, ...]
    folding_kl: float | None = None
    notes: tuple[str, ...] = ()

    def _tables(self):
        rows = [
            ("format", self.format),
            ("quantized layers", str(self.layers)),
            ("size", format_bytes(self.nbytes)),
            ("files", ", ".join(self.files)),
        ]
        if self.folding_kl is not None:
            rows.append(("KL that folding cost", f"{format_number(self.folding_kl)} nats"))
        return [Table(("saved", ""), rows, [Cell(f"saved to {self.path}", "head")], self.notes)]


def save(
    model: nn.Module,
    directory: str | os.PathLike,
    *,
    format: str | None = None,
    tokenizer: object = None,
    texts: object = None,
    shard_bytes: int = SHARD_BYTES,
) -> Saved:
    """Writes a quantized model to a new directory, whole or not at all; `model` stays as it is.

    format       "compressed-tensors", which plain transformers and serving engines read; "qnb", which says whatever a
                 layer can be and which `load` alone reads; "gguf" for llama.cpp. None takes the first of them, and
                 refuses, by name, a layer that it cannot say
    tokenizer    saved along; by default the one that the model came with, if any
    texts        what the KL that folding smoothing costs is measured on; by default those that the model came with
    shard_bytes  a file holds about this much

    Smoothing has no word in compressed-tensors or GGUF: it is folded into what computes the layer's inputs, in a copy.
    Raises `NotSaveable` or BadInput in one line: a directory that exists, a layer that the format cannot say, a full
    disk. Nothing half-written is left, and no half-written directory ever has the name.
    """
    if format is not None and format not in FORMATS:
        raise BadInput(f"format={format!r} is unknown: use one of {', '.join(FORMATS)}")
    if not isinstance(model, nn.Module):
        raise BadInput(f"model is a {type(model).__name__}: give a torch.nn.Module")
    if not isinstance(shard_bytes, int) or shard_bytes < 1:
        raise BadInput(f"shard_bytes={shard_bytes!r}: give a number of bytes")
    model = getattr(model, "_orig_mod", model)
    target, layers = check_target(directory), quantized_layers(model)
    if not layers:
        raise NotSaveable("the model holds no quantized layer: quantize it first, or save it with save_pretrained")
    if format != "qnb":
        for name, module in model.named_modules():
            what = next((words for kind, words in _OURS_ALONE.items() if isinstance(module, kind)), None)
            if what is not None:
                raise NotSaveable(
                    f'{name} {what}, and qnb writes {format or FORMATS[0]} without such: save with format="qnb", or '
                    f"put it back first, qnb.quantize(model, 'none', layers={name!r})"
                )
    own_texts, tokenizer = remembered(model, tokenizer)
    write = {"qnb": _write_native, "gguf": _write_gguf}.get(format, _write_compressed)
    with written_aside(target) as aside:
        notes, folded = write(model, layers, aside, shard_bytes, tokenizer)
        if tokenizer is not None and hasattr(tokenizer, "save_pretrained") and format != "gguf":
            tokenizer.save_pretrained(aside)
        kl = None
        if folded is not None:
            kl, said = _folding_cost(model, aside, own_texts if texts is None else texts, tokenizer)
            notes = (*notes, *_folding_notes(folded), *said)
        written = sorted(p.name for p in aside.iterdir())
        size = sum(p.stat().st_size for p in aside.iterdir())
    return Saved(os.fspath(directory), format or FORMATS[0], len(layers), size, tuple(written), kl, tuple(notes))


def _write_compressed(model, layers, aside: Path, shard_bytes: int, tokenizer) -> tuple[list[str], Folded | None]:
    if not hasattr(getattr(model, "config", None), "save_pretrained"):
        raise NotSaveable(
            f"a {type(model).__name__} is no transformers model, and compressed-tensors is for those: save with "
            'format="qnb"'
        )
    refused = {name: compressed.why_not(layer.variant) for name, layer in layers.items()}
    refused = {name: reason for name, reason in refused.items() if reason is not None}
    if refused:
        name = next(iter(refused))
        raise NotSaveable(
            f'compressed-tensors cannot say layer {name}{_more(refused)}: {refused[name]}; save with format="qnb", or '
            "give the layer another scheme"
        )
    folded = folding.fold(model) if folding.divided_layers(model) else None
    variants = {name: layer.variant for name, layer in layers.items()} | (folded.variants if folded else {})
    tensors = _tensors(model, variants, compressed.tensors_of, folded)
    files.write_tensors(aside, tensors, shard_bytes)
    others = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, QLinear)]
    schemes = {name: layer.variant.scheme for name, layer in layers.items()}
    _write_config(model, aside, compressed.config_of(schemes, others))
    files.write_json(aside / RECIPE, Recipe.of(model).to_dict())
    return _fused_notes(model, schemes), folded


def _write_native(model, layers, aside: Path, shard_bytes: int, tokenizer) -> tuple[list[str], None]:
    variants = {name: layer.variant for name, layer in layers.items()}
    files.write_tensors(aside, _tensors(model, variants, native.tensors_of, None), shard_bytes)
    files.write_json(aside / native.FILE, native.description(Recipe.of(model)))
    if hasattr(getattr(model, "config", None), "save_pretrained"):
        _write_config(model, aside, None)
        return [], None
    return ["the model has no configuration: qnb.attach(model, directory) reads it into one of the same layers"], None


def _write_gguf(model, layers, aside: Path, shard_bytes: int, tokenizer) -> tuple[list[str], Folded | None]:
    from qnb.model.checkpoint import llama_cpp

    llama_cpp.check(model)
    folded = folding.fold(model) if folding.divided_layers(model) else None
    return llama_cpp.write(model, aside / llama_cpp.FILE, tokenizer, folded), folded


def _tensors(
    model: nn.Module, variants: dict[str, Variant], parts: Callable[[Variant], dict[str, Tensor]], folded: Folded | None
) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that is saved, one layer at a time; a shared tensor once, under its first name.

    Where the saved configuration unties embeddings, it is under each name: then all that a model ties comes apart.
    """
    seen: set[int] = set()
    untied = _comes_apart(model)
    other = {} if folded is None else folded.tensors
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, QLayer):
            yield from ((prefix + name, tensor) for name, tensor in parts(variants[path]).items())
        kept = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for name, tensor in (*module._parameters.items(), *kept.items()):
            if tensor is None or id(tensor) in seen:
                continue
            if tensor.is_meta:
                raise NotSaveable(f"{prefix}{name} is on the meta device, without values: load the weights first")
            if not untied:
                seen.add(id(tensor))
            yield prefix + name, other.get(prefix + name, tensor)


def _comes_apart(model: nn.Module) -> bool:
    """Whether a tied embedding is quantized: integers, and another thing than the layer that it was tied to."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return False
    tied = []
    for method in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(NotImplementedError, AttributeError):  # models without such a layer raise
            tied.append(getattr(model, method)())
    return any(isinstance(layer, QLayer) for layer in tied)


def _write_config(model: nn.Module, aside: Path, quantization: dict | None) -> None:
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    config.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), config.dtype)
    if _comes_apart(model):
        config.tie_word_embeddings = False
    try:
        config.save_pretrained(aside)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(aside)
    except ValueError as problem:  # transformers refuses what generates by contradicting settings
        raise NotSaveable(f"transformers refuses to save the model's configuration: {one_line(problem)}") from None
    written = strict_json.read(aside / CONFIG, NotSaveable, "configuration")
    if quantization is not None:
        written["quantization_config"] = quantization
    files.write_json(aside / CONFIG, written)


def _fused_notes(model: nn.Module, schemes: dict[str, object]) -> list[str]:
    for group in fused_groups(site.name for site in find_sites(model)):
        together = {str(schemes.get(name, "none")) for name in group}
        if len(together) > 1:
            parent, parts = group[0].rpartition(".")[0], [name.rpartition(".")[2] for name in group]
            return [
                f"{parent} has {' and '.join(sorted(together))} among {', '.join(parts)}: serving engines run "
                "them as one and will refuse it; transformers and qnb read it"
            ]
    return []


def _folding_notes(folded: Folded) -> list[str]:
    anew = folded.anew
    said = ["smoothing was folded into what computes the layers' inputs"]
    if anew:
        said.append(f"{len(anew)} layers that share an input, first {anew[0]}, got one divisor and new codes")
    return ["; ".join(said)]


def _folding_cost(model: nn.Module, aside: Path, texts: Iterable | None, tokenizer: object):
    """(KL(model || what was saved) or None, notes)"""
    if not (aside / CONFIG).is_file():
        return None, ["what folding cost was not measured: qnb does not run GGUF"]
    if texts is None:
        return None, ["what folding cost was not measured: pass texts="]
    try:
        with torch.no_grad():
            saved = load(aside, device=next(model.parameters()).device)
            return mean_kl(model, saved, texts, tokenizer), []
    except QnbError as problem:
        raise NotSaveable(f"what was written does not measure up: {problem}") from None


def _more(refused: dict[str, str]) -> str:
    return "" if len(refused) == 1 else f" and {len(refused) - 1} more"
