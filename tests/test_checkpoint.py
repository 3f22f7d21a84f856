"""Checkpoints: live, saved and reloaded are the same bits; others read ours, we run theirs; bad ones are refused."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qnb
from qnb.errors import BadCheckpoint, BadInput, NotSaveable, QnbError
from qnb.model.checkpoint import bits, compressed, folding
from qnb.model.divergence import mean_kl
from qnb.model.linear import quantized_layers

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def tiny(dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """A Llama of two blocks, two query heads to a key-value head, with weights that were drawn once."""
    sizes = dict(hidden_size=128, intermediate_size=192, num_hidden_layers=2, vocab_size=96, num_attention_heads=4)
    config = transformers.LlamaConfig(
        **{**sizes, "num_key_value_heads": 2, "max_position_embeddings": 64, **changes}, bos_token_id=0, eos_token_id=1
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for p in model.parameters():  # parameters alone: the angles of positions stay f32, as transformers loads them
        p.data = p.data.to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_(1 + torch.rand(p.shape) / 2)
            else:
                p.copy_(torch.randn(p.shape) * (0.12 if "proj" in name else 0.6))
    return model


def tokens(seed: int = 0, rows: int = 4) -> list[torch.Tensor]:
    return list(torch.randint(0, 96, (rows, 1, 24), generator=torch.Generator().manual_seed(seed)))


def same_bits(first: nn.Module, second: nn.Module) -> bool:
    a, b = quantized_layers(first), quantized_layers(second)
    assert a.keys() == b.keys()
    ours = [(n, k, t) for n, q in a.items() for k, t in q.variant.tensors().items()]
    assert all(b[n].scheme == q.scheme and b[n].variant.how == q.variant.how for n, q in a.items())
    return all(torch.equal(t, b[n].variant.tensors()[k]) for n, k, t in ours)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return torch.cat([model(ids).logits for ids in tokens()])


def plain(directory: Path) -> nn.Module:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    return transformers.AutoModelForCausalLM.from_pretrained(directory)


SPOKEN = ["w8a8", "w8a8-tensor", "w8a8-static", "w8a8-static-aasym", "w8a16", "w8a16-g64", "w4a16-g32", "w4a16-channel"]
OWN = ["nf4-g64", "kmeans3-g64", "w3a16-g64-asym", "w2a16-g32", "fp8", "w8a8-outliers8", "w4a8-g64", "w4a16-g64-asym"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SPOKEN)
def test_live_saved_and_reloaded_are_the_same_bits(scheme, dtype, tmp_path):
    model = tiny(dtype)
    qnb.quantize(model, scheme, calibration=tokens())
    saved = qnb.save(model, tmp_path / "saved")
    assert saved.format == "compressed-tensors" and saved.layers == 14 and saved.folding_kl is None
    again = qnb.load(tmp_path / "saved")
    (tmp_path / "saved" / "model.safetensors").write_bytes(b"gone")  # what was loaded is the model's own
    assert same_bits(model, again)
    assert torch.equal(logits(again), logits(model))
    assert not again.training and again.dtype == dtype
    with pytest.raises(qnb.errors.NotQuantized, match="came from a checkpoint"):
        qnb.restore(again)


@pytest.mark.parametrize("rounding", ["nearest", "mse"])  # whose 4-bit scales are negative where that is better
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static-aasym", "w8a16", "w4a16-g32"])
def test_plain_transformers_reads_it_and_we_attach_to_what_it_read(scheme, rounding, tmp_path):
    model = tiny()
    qnb.quantize(model, scheme, rounding=rounding, calibration=tokens())
    qnb.save(model, tmp_path / "saved")
    theirs = plain(tmp_path / "saved")
    report = qnb.attach(theirs)
    assert "14 linear layers" in report.title and not hasattr(theirs, "ct_decompress_hook")
    assert torch.equal(logits(theirs), logits(model))
    for name, layer in quantized_layers(theirs).items():
        ours = quantized_layers(model)[name].variant
        assert layer.scheme == scheme
        assert all(torch.equal(t, ours.tensors()[key]) for key, t in layer.variant.tensors().items())
        assert bool((ours.levels.scale < 0).any()) is (scheme.startswith("w4") and rounding == "mse")


@pytest.mark.parametrize("rounding", ["nearest", "mse"])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static", "w8a16", "w4a16-g32"])
def test_each_layer_of_plain_transformers_agrees_within_derived_bounds(scheme, rounding, tmp_path):
    """Weights the same; activations, where they are rounded, at most a step and a half apart.

    Ours rounds dynamic activations by absmax / 127 and theirs by absmax / 127.5: half a step from the true value each,
    and their last code cut off at 127 costs up to another half. Fixed scales are the same number, so codes differ only
    where f32 division meets a tie: no more than one step.
    """
    model = tiny()
    qnb.quantize(model, scheme, rounding=rounding, calibration=tokens())
    qnb.save(model, tmp_path / "saved")
    theirs = plain(tmp_path / "saved")
    logits(theirs)  # decompressed now
    for name, layer in quantized_layers(model).items():
        other = theirs.get_submodule(name)
        weight = layer.variant.dequantize(torch.float32)
        assert torch.equal(other.weight, weight), name
        torch.manual_seed(1)
        x = torch.randn(5, weight.shape[1])
        step = 0.0
        if scheme == "w8a8":
            step = 1.5 * x.abs().amax(-1, keepdim=True) / 127
        elif scheme == "w8a8-static":
            step = layer.variant.inputs.scale
        with torch.no_grad():
            apart = (layer(x) - other(x)).abs()
        rounding = (x.shape[1] + 3) * torch.finfo(torch.float32).eps * (x.abs() @ weight.abs().T) * 2
        assert (apart <= step * weight.abs().sum(1) + rounding).all(), name


@pytest.mark.parametrize("scheme", [*OWN, "w8a8-static", "w8a16-tensor"])
def test_our_own_format_says_whatever_a_layer_can_be(scheme, tmp_path):
    model = tiny()
    qnb.quantize(model, scheme, calibration=tokens())
    if scheme in OWN:
        with pytest.raises(NotSaveable, match='q_proj and 13 more: .*save with format="qnb"'):
            qnb.save(model, tmp_path / "saved")
        assert not list(tmp_path.iterdir())
    qnb.save(model, tmp_path / "saved", format="qnb")
    again = qnb.load(tmp_path / "saved")
    assert same_bits(model, again) and torch.equal(logits(again), logits(model))


def test_a_plain_module_goes_through_our_own_format(tmp_path):
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 16)).eval()

    model, x = make(), torch.randn(4, 64)
    qnb.quantize(model, "w4a16-g32", layers="0", calibration=[x], smooth=0.5)
    with pytest.raises(NotSaveable, match="no transformers model"):
        qnb.save(model, tmp_path / "saved")
    saved = qnb.save(model, tmp_path / "saved", format="qnb")
    assert "qnb.attach" in saved.notes[0]
    again = make()
    again[2].weight.data.zero_()
    report = qnb.attach(again, tmp_path / "saved")
    assert "1 linear layer loaded" in report.title
    assert torch.equal(again(x), model(x)) and same_bits(model, again)
    with pytest.raises(BadInput, match="restore"):
        qnb.attach(again, tmp_path / "saved")
    with pytest.raises(BadCheckpoint, match="has no config.json"):
        qnb.load(tmp_path / "saved")


def test_mixed_schemes_shards_and_fused_groups(tmp_path):
    model = tiny()
    qnb.quantize(model, "w8a8", layers="*.0.*")
    qnb.quantize(model, "w4a16-g32", layers=["*.1.mlp.*", "*.1.self_attn.q_proj"])
    saved = qnb.save(model, tmp_path / "saved", shard_bytes=60_000)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision" and len(config["config_groups"]) == 2
    assert {g["format"] for g in config["config_groups"].values()} == {"int-quantized", "pack-quantized"}
    assert len([f for f in saved.files if f.endswith(".safetensors")]) > 2
    assert "q_proj" in saved.notes[0] and "serving engines" in saved.notes[0]
    assert same_bits(model, qnb.load(tmp_path / "saved"))
    theirs = plain(tmp_path / "saved")
    qnb.attach(theirs)
    assert torch.equal(logits(theirs), logits(model))


def test_the_configuration_is_what_compressed_tensors_and_serving_engines_read(tmp_path):
    """Held to the package's own reader, and to what vLLM's loader asks: format checked, not run."""
    quantization = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    for scheme in SPOKEN:
        model = tiny()
        qnb.quantize(model, scheme, calibration=tokens())
        qnb.save(model, tmp_path / scheme)
        given = json.loads((tmp_path / scheme / "config.json").read_text())["quantization_config"]
        read = quantization.QuantizationConfig.model_validate(given)
        assert read.ignore == ["lm_head"] and str(read.quantization_status.value) == "compressed"
        group = read.config_groups["group_0"]
        weights, inputs = group.weights, group.input_activations
        if inputs is None:  # its WNA16: packed, 4 or 8 bits, by output or group, symmetric
            assert given["format"] == "pack-quantized" and weights.strategy in ("channel", "group")
            assert weights.num_bits in (4, 8) and weights.symmetric and not weights.dynamic
        else:  # its W8A8Int8: int-quantized, weights by output or tensor, activations by token or fixed by tensor
            assert given["format"] == "int-quantized" and weights.strategy in ("channel", "tensor")
            assert (inputs.strategy, inputs.dynamic) in (("token", True), ("tensor", False))
            assert weights.num_bits == inputs.num_bits == 8 and weights.symmetric
        stored = load_file(tmp_path / scheme / "model.safetensors")
        name = "model.layers.0.mlp.down_proj."
        shapes = {key.removeprefix(name): (t.dtype, tuple(t.shape)) for key, t in stored.items() if name in key}
        if inputs is None:
            assert shapes["weight_packed"] == (torch.int32, (128, 192 * weights.num_bits // 32))
            assert shapes["weight_shape"] == (torch.int64, (2,))
        else:
            assert shapes["weight"] == (torch.int8, (128, 192))


@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize("k", [1, 7, 32, 64, 100])
def test_dense_packing_is_undone_and_is_theirs(width, k):
    codes = torch.randint(0, 2**width, (5, k), generator=torch.Generator().manual_seed(k), dtype=torch.uint8)
    packed = bits.pack(codes, width)
    assert packed.dtype == torch.int32 and packed.shape == (5, -(-k * width // 32))
    assert torch.equal(bits.unpack(packed, k, width), codes)
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    signed = (codes.to(torch.int16) - 2 ** (width - 1)).to(torch.int8)
    assert torch.equal(helpers.unpack_from_int32(packed, width, torch.Size((5, k))), signed)
    assert torch.equal(bits.unpack(helpers.pack_to_int32(signed, width), k, width), codes)


# ---------------------------------------------------------------- checkpoints that others wrote


def theirs_by_hand(directory: Path, weights: dict, inputs: dict | None, write) -> nn.Module:
    """A checkpoint written here by the format's rules alone; returns the float model that it stands for."""
    directory.mkdir()
    model = tiny()
    group = {
        "targets": ["Linear"],
        "weights": {"type": "int", "dynamic": False, **weights},
        "input_activations": inputs,
    }
    packed = "weight_packed" in write(torch.ones(32, 32))
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if packed else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["re:.*lm_head"],
    }
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, p in model.state_dict().items():
        if name.endswith("_proj.weight"):
            parts = write(p)
            p.copy_(parts.pop("value"))
            tensors |= {name.removesuffix("weight") + key: t.contiguous() for key, t in parts.items()}
        else:
            tensors[name] = p.clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return model


def full_range_int8(weight: torch.Tensor) -> dict:
    """Codes from -128 with scale = absmax / 127.5, as compressed-tensors chooses them."""
    scale = weight.abs().amax(1, keepdim=True) / 127.5
    codes = (weight / scale).round().clamp(-128, 127)
    return {"weight": codes.to(torch.int8), "weight_scale": scale, "value": codes * scale}


def packed_int4(weight: torch.Tensor, asym: bool = False) -> dict:
    n, k = weight.shape
    groups = weight.view(n, -1, 32)
    zero = torch.zeros(n, k // 32, 1)
    scale = groups.abs().amax(-1, keepdim=True) / 7.5
    if asym:
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / 15
        zero = (-8 - low / scale).round().clamp(-8, 7)
    codes = (groups / scale + zero).round().clamp(-8, 7)
    shifts = torch.arange(0, 32, 4)

    def words(values):  # value + 8, element 0 in the lowest bits
        return ((values + 8).long().view(len(values), -1, 8) << shifts).sum(-1).to(torch.int64).to(torch.int32)

    found = {
        "weight_packed": words(codes.view(n, k)),
        "weight_shape": torch.tensor([n, k]),
        "weight_scale": scale.squeeze(-1),
        "value": ((codes - zero) * scale).view(n, k),
    }
    if asym:
        found["weight_zero_point"] = words(zero.squeeze(-1).T.contiguous()).T
    return found


DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize("way", ["load", "attach"])
def test_codes_of_minus_128_run_as_integers(way, tmp_path):
    weights = {"num_bits": 8, "symmetric": True, "strategy": "channel"}
    float_model = theirs_by_hand(tmp_path / "t", weights, DYNAMIC, full_range_int8)
    if way == "load":
        model = qnb.load(tmp_path / "t")
    else:
        model = plain(tmp_path / "t")
        qnb.attach(model)
    layers = quantized_layers(model)
    assert {q.scheme for q in layers.values()} == {"w8a8"}
    assert any(int(q.variant.codes().min()) == -128 for q in layers.values())
    for name, layer in layers.items():
        assert torch.equal(layer.variant.dequantize(torch.float32), float_model.get_submodule(name).weight)
    assert mean_kl(float_model, model, tokens(), None) < 0.05
    assert qnb.Recipe.of(model).layers["model.layers.0.mlp.up_proj"].rounding == "checkpoint"


@pytest.mark.parametrize("asym", [False, True])
def test_packed_int4_of_others_is_read_zero_points_too(asym, tmp_path):
    weights = {"num_bits": 4, "symmetric": not asym, "strategy": "group", "group_size": 32}
    float_model = theirs_by_hand(tmp_path / "t", weights, None, lambda w: packed_int4(w, asym))
    model = qnb.load(tmp_path / "t")
    assert {q.scheme for q in quantized_layers(model).values()} == {"w4a16-g32-asym" if asym else "w4a16-g32"}
    for name, layer in quantized_layers(model).items():
        assert torch.equal(layer.variant.dequantize(torch.float32), float_model.get_submodule(name).weight)
    assert (logits(model) - logits(float_model)).abs().max() < 1e-3


def test_attach_refuses_what_has_run_and_what_is_none(tmp_path):
    model = tiny()
    with pytest.raises(BadInput, match="no layer of compressed-tensors"):
        qnb.attach(model)
    qnb.quantize(model, "w8a16")
    qnb.save(model, tmp_path / "saved")
    theirs = plain(tmp_path / "saved")
    logits(theirs)
    with pytest.raises(BadInput, match="turned to floats"):
        qnb.attach(theirs)


# ---------------------------------------------------------------- smoothing


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32"])
def test_smoothing_is_folded_in_a_copy_and_its_cost_is_said(scheme, tmp_path):
    model = tiny()
    qnb.quantize(model, scheme, smooth=0.5, calibration=tokens())
    before = logits(model)
    saved = qnb.save(model, tmp_path / "saved", texts=tokens())
    assert torch.equal(logits(model), before)
    assert saved.folding_kl > 0 and "new codes" in saved.notes[0]
    again = qnb.load(tmp_path / "saved")
    assert mean_kl(tiny(), again, tokens(), None) < 1.5 * mean_kl(tiny(), model, tokens(), None)
    assert not folding.divided_layers(again)
    assert mean_kl(model, again, tokens(), None) == pytest.approx(saved.folding_kl, rel=1e-6)
    theirs = plain(tmp_path / "saved")
    qnb.attach(theirs)
    assert torch.equal(logits(theirs), logits(again))


def test_folding_without_rounding_changes_nothing_but_float_rounding():
    """The float model with norms and rows divided and columns multiplied computes what it did before."""
    model = tiny(dtype=torch.float64)
    for block in model.model.layers:
        torch.manual_seed(3)
        for giver, takers in [
            (block.input_layernorm, [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj]),
            (block.post_attention_layernorm, [block.mlp.gate_proj, block.mlp.up_proj]),
        ]:
            d = torch.rand(128, dtype=torch.float64) + 0.5
            giver.weight.data /= d
            for taker in takers:
                taker.weight.data *= d
    edges = list(folding._edges(model, dict(model.named_modules())))
    assert len(edges) == 8
    for edge in edges:
        if edge.giver.endswith(("v_proj", "up_proj")):
            torch.manual_seed(4)
            giver, taker = model.get_submodule(edge.giver), model.get_submodule(edge.takers[0])
            d = torch.rand(giver.out_features, dtype=torch.float64) + 0.5
            giver.weight.data /= d.unsqueeze(1)
            taker.weight.data *= d[edge.source]
    assert (logits(model) - logits(tiny(dtype=torch.float64))).abs().max() < 1e-4


def test_a_layer_alone_folds_without_new_codes(tmp_path):
    """What folding costs then is float rounding, and activation codes that it pushes over a half.

    No code may differ but where both inputs, in units of codes, are as near as f32 sums of at most 192 products are:
    eps * (K + 1) of the largest, which is 127. With the folded model's codes the original writes what it writes.
    """
    model = tiny(num_key_value_heads=4)
    qnb.quantize(model, "w8a8", layers=["*.down_proj", "*.o_proj"], smooth=0.5, calibration=tokens())
    qnb.quantize(model, "w4a16-g32", layers="*.up_proj")
    saved = qnb.save(model, tmp_path / "saved", texts=tokens())
    assert "new codes" not in saved.notes[0]
    again = qnb.load(tmp_path / "saved")
    folded = quantized_layers(again)
    for name, layer in quantized_layers(model).items():
        assert torch.equal(folded[name].variant.codes(), layer.variant.codes())

    as_they_are = logits(model)
    noted: dict[str, list] = {name: [] for name, layer in folded.items() if layer.scheme == "w8a8"}
    for name, found in noted.items():
        folded[name].register_forward_pre_hook(lambda m, x, found=found: found.append(activation_codes(m, *x)))
    theirs = logits(again)
    off: list[float] = []
    for name, found in noted.items():
        model.get_submodule(name).register_forward_hook(with_codes_of(found, off))
    ours = logits(model)
    assert max(off) <= 127 * torch.finfo(torch.float32).eps * (192 + 1)
    assert kl_of(as_they_are, theirs) == pytest.approx(saved.folding_kl, rel=1e-6)
    assert kl_of(ours, theirs) < 1e-6


def activation_codes(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes and scales of a w8a8 layer's input, and the input in units of codes."""
    divisor = layer.variant.inputs.divisor
    codes, scales = torch.ops.qnb.quantize_rows(x, divisor)
    return codes, scales, (x if divisor is None else x / divisor) / scales.unsqueeze(-1)


def with_codes_of(noted: list, off: list[float]):
    """A hook that lets a w8a8 layer sum the codes noted in another, and says how far off the inputs are."""

    def sum_them(layer: nn.Module, given: tuple, out: torch.Tensor) -> torch.Tensor:
        _, scales, values = activation_codes(layer, given[0])
        codes, _, other_values = noted.pop(0)
        off.append(float((values - other_values).abs().max()))
        variant, n = layer.variant, layer.out_features
        return torch.ops.qnb.gemm_w8a8(codes, scales, variant.packed, variant.levels.scale, layer.bias, n, out.dtype)

    return sum_them


def kl_of(first: torch.Tensor, second: torch.Tensor) -> float:
    logs = [torch.log_softmax(given.double(), -1) for given in (first, second)]
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


def test_where_folding_is_impossible_it_is_said(tmp_path):
    model = tiny()
    qnb.quantize(model, "w8a8-static", smooth=0.5, calibration=tokens())
    with pytest.raises(NotSaveable, match="fixed activation range"):
        qnb.save(model, tmp_path / "saved")
    model = tiny()
    qnb.quantize(model, "w8a8", smooth=0.5, calibration=tokens(), keep="none")
    with pytest.raises(NotSaveable, match='not kept.*format="qnb"'):
        qnb.save(model, tmp_path / "saved")
    model.config.model_type = "a_family_of_its_own"
    with pytest.raises(NotSaveable, match="nothing is known to take that over"):
        qnb.save(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- whole or not at all


def test_what_is_there_is_not_overwritten(tmp_path):
    model = tiny()
    with pytest.raises(NotSaveable, match="no quantized layer"):
        qnb.save(model, tmp_path / "new")
    qnb.quantize(model, "w8a8")
    with pytest.raises(NotSaveable, match="exists already"):
        qnb.save(model, tmp_path)
    with pytest.raises(NotSaveable, match="is no directory"):
        qnb.save(model, tmp_path / "no" / "such")
    with pytest.raises(NotSaveable, match="give a path"):
        qnb.save(model, 3)
    with pytest.raises(BadInput, match="use one of"):
        qnb.save(model, tmp_path / "new", format="onnx")
    with pytest.raises(NotSaveable, match="qnb.save"):
        model.save_pretrained(tmp_path / "new")


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    """The operating system itself refuses to write more than 40 kB to a file, in a process of its own."""
    script = f"""
import resource, signal
from torch import nn
import qnb
model = nn.Sequential(nn.Linear(256, 256))
qnb.quantize(model, "w8a8")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
try:
    qnb.save(model, {str(tmp_path / "saved")!r}, format="qnb")
except qnb.errors.NotSaveable as problem:
    print(problem)
"""
    assert hasattr(resource, "RLIMIT_FSIZE")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "cannot be written" in done.stdout and "nothing of it is left behind" in done.stdout
    assert not list(tmp_path.iterdir())


def test_an_interrupt_while_saving_leaves_nothing_behind(tmp_path, monkeypatch):
    model = tiny()
    qnb.quantize(model, "w8a8")

    def stop(*_):
        assert [p.name.startswith(".saved.") for p in tmp_path.iterdir()] == [True]  # aside, never by its name
        raise KeyboardInterrupt

    monkeypatch.setattr(compressed, "config_of", stop)
    with pytest.raises(KeyboardInterrupt):
        qnb.save(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_the_magic_saves(shell, tmp_path, monkeypatch):
    from IPython.core.error import UsageError

    monkeypatch.chdir(tmp_path)
    shell.user_ns["model"] = tiny()
    with pytest.raises(UsageError, match="no quantized layer"):
        shell.run_line_magic("quantize", "model --save first")
    shell.run_line_magic("quantize", "model w8a8 --save first -q")
    saved = shell.run_line_magic("quantize", "model --save second -o -q")
    assert saved.layers == 14 and same_bits(qnb.load("first"), qnb.load("second"))
    with pytest.raises(UsageError, match="exists already"):
        shell.run_line_magic("quantize", "model w8a16 --save first")
    assert {q.scheme for q in quantized_layers(shell.user_ns["model"]).values()} == {"w8a8"}


# ---------------------------------------------------------------- hostile


@pytest.fixture
def good(tmp_path) -> Path:
    model = tiny()
    qnb.quantize(model, "w8a8")
    qnb.save(model, tmp_path / "good")
    return tmp_path / "good"


UP = "model.layers.0.mlp.up_proj."


def change_tensors(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def change_config(directory: Path, change) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def _nan(tensors):
    tensors[UP + "weight_scale"][3] = torch.nan


def _set(key, value):
    return lambda tensors: tensors.__setitem__(key, value)


BAD_TENSORS = {
    "a missing scale": (lambda t: t.pop(UP + "weight_scale"), "weight_scale is missing"),
    "a missing weight": (lambda t: t.pop(UP + "weight"), "weight is missing"),
    "a missing norm": (lambda t: t.pop("model.norm.weight"), "lacks 1 tensors of the model, first model.norm.weight"),
    "an extra tensor": (
        _set("model.layers.9.mlp.up_proj.weight", torch.zeros(2)),
        "no place for, first model.layers.9",
    ),
    "a NaN scale": (_nan, "NaN or infinite"),
    "a shape that lies": (_set(UP + "weight", torch.zeros(64, 64, dtype=torch.int8)), "needs int8 (192, 128)"),
    "a scale of another shape": (_set(UP + "weight_scale", torch.ones(3, 1)), "needs float32"),
    "floats for integers": (_set(UP + "weight", torch.zeros(192, 128)), "is float32"),
    "integers for floats": (_set("model.norm.weight", torch.zeros(128, dtype=torch.int64)), "is int64"),
    "inputs out of order": (_set(UP + "weight_g_idx", torch.zeros(128, dtype=torch.int32)), "out of order"),
}


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_bad_tensors_are_one_line(what, good):
    change, words = BAD_TENSORS[what]
    change_tensors(good, change)
    with pytest.raises(BadCheckpoint) as caught:
        qnb.load(good)
    said = str(caught.value)
    assert words in said and "\n" not in said and len(said) < 400


def _quantization(**changes):
    return lambda config: config["quantization_config"].update(changes)


def _weights(**changes):
    return lambda config: config["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)


def _inputs(**changes):
    return lambda config: config["quantization_config"]["config_groups"]["group_0"]["input_activations"].update(changes)


BAD_CONFIGS = {
    "no quantization": (lambda c: c.pop("quantization_config"), "is not quantized"),
    "another method": (_quantization(quant_method="gptq"), "quant_method 'gptq'"),
    "a method that is a list": (_quantization(quant_method=["x"] * 999), "quant_method"),
    "no groups": (_quantization(config_groups={}), "no config_groups"),
    "groups of another form": (_quantization(config_groups={"g": [1]}), "no list of targets"),
    "a wrong pattern": (_quantization(ignore=["re:(("]), "is wrong"),
    "a format of its own": (
        lambda c: c["quantization_config"]["config_groups"]["group_0"].update(format="<b>"),
        "none that qnb reads",
    ),
    "floats": (_weights(type="float"), "8-bit float by channel"),
    "3 bits": (_weights(num_bits=3), "3-bit int"),
    "groups of none": (_weights(strategy="group", group_size="x"), "groups of 'x'"),
    "4-bit activations": (_inputs(num_bits=4), "quantizes activations otherwise"),
    "a sparsity": (_quantization(sparsity_config={"format": "2:4"}), "sparsity_config"),
    "targets that match nothing": (
        lambda c: c["quantization_config"]["config_groups"]["group_0"].update(targets=["nowhere"]),
        "match no linear layer",
    ),
    "no architecture": (lambda c: c.update(architectures=["os"]), "none of which transformers has"),
    "no model type": (lambda c: c.update(model_type="no such"), "no model that transformers knows"),
    "negative sizes": (lambda c: c.update(hidden_size=-128), "config.json describes"),
}


@pytest.mark.parametrize("what", BAD_CONFIGS)
def test_bad_configurations_are_one_line(what, good):
    change, words = BAD_CONFIGS[what]
    change_config(good, change)
    with pytest.raises(BadCheckpoint) as caught:
        qnb.load(good)
    said = str(caught.value)
    assert words in said and "\n" not in said and len(said) < 400


def test_directories_that_are_no_checkpoint(tmp_path, good):
    for given, words in [
        (tmp_path / "missing", "does not exist"),
        (good / "config.json", "is a file"),
        (tmp_path, "has no config.json"),
        (3, "given as a path"),
    ]:
        with pytest.raises(BadCheckpoint, match=words):
            qnb.load(given)
    weights = good / "model.safetensors"
    content = weights.read_bytes()
    for broken, words in [(content[:-100], "no whole safetensors"), (b"", "no whole"), (b"\xff" * 99, "no whole")]:
        weights.write_bytes(broken)
        with pytest.raises(BadCheckpoint, match=words):
            qnb.load(good)
    weights.unlink()
    (good / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(BadCheckpoint, match="a pickle"):
        qnb.load(good)
    index = good / "model.safetensors.index.json"
    for text, words in [
        ("{", "no JSON"),
        ('{"weight_map": {}}', "no 'weight_map'"),
        ('{"weight_map": {"a": "../good/config.json"}}', "none beside it"),
        ('{"weight_map": {"a": "/etc/x.safetensors"}}', "none beside it"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "lacks the file gone"),
    ]:
        index.write_text(text)
        with pytest.raises(BadCheckpoint, match=words):
            qnb.load(good)
    (good / "config.json").write_text("{]")
    with pytest.raises(BadCheckpoint, match="no JSON"):
        qnb.load(good)


def test_our_own_format_refuses_as_well(tmp_path):
    model = tiny()
    qnb.quantize(model, "w4a8-g64")
    qnb.save(model, tmp_path / "own", format="qnb")
    described = (tmp_path / "own" / "qnb.json").read_text()
    for text, words in [
        (described.replace('"qnb_checkpoint": 1', '"qnb_checkpoint": 2'), "another version"),
        (described.replace("up_proj", "no_proj"), "is missing|that the model has not|no place"),
        (described.replace('"w4a8-g64"', '"w8a8"'), "weight_codes is missing"),
        ("{}", "another version"),
    ]:
        (tmp_path / "own" / "qnb.json").write_text(text)
        with pytest.raises(QnbError, match=words):
            qnb.load(tmp_path / "own")
    (tmp_path / "own" / "qnb.json").write_text(described)
    change_tensors(tmp_path / "own", lambda t: t.__setitem__(UP + "weight_scale", t[UP + "weight_scale"][:1]))
    with pytest.raises(BadCheckpoint, match="up_proj: weight_scale"):
        qnb.load(tmp_path / "own")


def test_a_failed_attach_changes_nothing(good):
    change_tensors(good, _nan)
    model = tiny()
    before, ids = logits(model), {n: id(m) for n, m in model.named_modules()}
    with pytest.raises(BadCheckpoint):
        qnb.attach(model, good)
    assert {n: id(m) for n, m in model.named_modules()} == ids and torch.equal(logits(model), before)


def test_nothing_is_ever_unpickled_or_evaluated():
    words = re.compile(
        r"\b(pickle|unpickle|joblib|cloudpickle|dill|shelve|marshal)\b.*\bimport\b|"
        r"\bimport\s+(pickle|joblib|cloudpickle|dill|shelve|marshal)\b|"
        r"torch\.load\(|np\.load\(|numpy\.load\(|allow_pickle=True|(?<![\w.])(eval|exec)\("
    )
    package = Path(qnb.__file__).parent
    sources = [p for p in package.rglob("*.py") if "_lib" not in p.parts]
    assert len(sources) > 50
    found = [f"{p.name}: {line}" for p in sources for line in p.read_text("utf-8").splitlines() if words.search(line)]
    assert found == []
    assert words.search("x = torch.load(f)") and words.search("import pickle") and not words.search("model.eval()")


def test_the_demo_model_goes_through(tmp_path):
    model, tokenizer = qnb.demo_lm()
    qnb.quantize(model, "w4a16-g64", progress=False)
    saved = qnb.save(model, tmp_path / "demo")
    assert saved.nbytes < 12e6 and "tokenizer.json" in saved.files
    assert same_bits(model, qnb.load(tmp_path / "demo"))
    theirs = plain(tmp_path / "demo")
    ids = tokenizer("def main(", return_tensors="pt").input_ids
    with torch.no_grad():
        apart = (theirs(ids).logits - model(ids).logits).abs().max()
    assert apart < 1e-3 * model(ids).logits.abs().max()  # same weights, other order of f32 sums
    assert os.path.isfile(tmp_path / "demo" / "qnb_recipe.json")


# ---------------------------------------------------------------- llama.cpp


def in_gguf(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the file, dequantized by the gguf package itself."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    reader = gguf.GGUFReader(path)
    return {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}


def rotated_back(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes llama.cpp's order of rows, written out: row 2 i + j of a head was row j * size / 2 + i."""
    n, size = len(weight), len(weight) // heads
    back = torch.empty_like(weight)
    for row in range(n):
        head, within = divmod(row, size)
        back[head * size + within % 2 * (size // 2) + within // 2] = weight[row]
    return back


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", ["nearest", "mse"])
@pytest.mark.parametrize(("scheme", "kind"), [("w8a16-g32", "Q8_0"), ("w4a16-g32", "Q4_0")])
def test_gguf_is_our_codes(scheme, kind, rounding, dtype, tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    model = tiny(dtype)
    qnb.quantize(model, scheme, rounding=rounding)
    saved = qnb.save(model, tmp_path / "saved", format="gguf")
    assert saved.files == ("model.gguf",)
    path = tmp_path / "saved" / "model.gguf"
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds["blk.1.ffn_down.weight"] == kind and kinds["output_norm.weight"] == "F32"
    assert kinds["token_embd.weight"] == {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    stored = in_gguf(path)
    parts = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "ffn_down": "mlp.down_proj"}
    for block in range(2):
        for theirs, ours in parts.items():
            weight = stored[f"blk.{block}.{theirs}.weight"]
            if theirs in ("attn_q", "attn_k"):
                weight = rotated_back(weight, 4 if theirs == "attn_q" else 2)
            variant = model.get_submodule(f"model.layers.{block}.{ours}").variant
            codes = variant.codes().float().view(len(weight), -1, 32)
            assert torch.equal(weight, (codes * variant.levels.scale.half().float().unsqueeze(-1)).flatten(1))
            if dtype != torch.float32:  # f16 holds scales of f16, and of bf16 in its range: nothing is rounded
                assert torch.equal(weight, variant.dequantize(torch.float32))
    assert torch.equal(stored["token_embd.weight"], model.model.embed_tokens.weight.float())
    said = saved.notes[-1]
    assert ("exactly the model's" in said) if dtype != torch.float32 else ("rounded to f16" in said)


def test_transformers_reads_the_gguf_as_the_same_model(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    model, tokenizer = qnb.demo_lm(torch.float16)
    qnb.quantize(model, "w8a16-g32", progress=False)
    qnb.save(model, tmp_path / "saved", format="gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", gguf_file="model.gguf")
    for name, layer in quantized_layers(model).items():
        assert torch.equal(theirs.get_submodule(name).weight.float(), layer.variant.dequantize(torch.float32)), name
    reread = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved", gguf_file="model.gguf")
    text = qnb.demo_texts("evaluation")[0][:300]
    assert reread(text)["input_ids"][-50:] == tokenizer(text)["input_ids"][-50:]


def test_gguf_refuses_what_it_cannot_say(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    model = tiny()
    qnb.quantize(model, "w8a8")
    with pytest.raises(NotSaveable, match="is w8a8: GGUF takes w8a16-g32 and w4a16-g32"):
        qnb.save(model, tmp_path / "saved", format="gguf")
    qnb.quantize(model, "w8a16-g32")
    model.config.model_type = "mistral"
    with pytest.raises(NotSaveable, match="not for 'mistral'"):
        qnb.save(model, tmp_path / "saved", format="gguf")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- quantizing while loading


@pytest.fixture
def floats(tmp_path) -> Path:
    tiny().save_pretrained(tmp_path / "floats", max_shard_size="100KB")
    assert len(list((tmp_path / "floats").glob("*.safetensors"))) > 2
    return tmp_path / "floats"


@pytest.mark.parametrize(
    ("scheme", "how"),
    [
        ("w8a8", {}),
        ("w4a16-g32", {"skip": "*.0.*"}),
        ("w4a16-g32", {"layers": ["model.embed_tokens", "lm_head", "*.mlp.*"]}),
        ("w8a8-static", {"calibration": tokens()}),
        ("w8a8", {"smooth": 0.5, "calibration": tokens()}),
    ],
)
def test_quantized_while_loading_is_quantized_after_loading(scheme, how, floats, monkeypatch):
    monkeypatch.setattr("qnb.model.checkpoint.streaming.BATCH_BYTES", 100_000)  # several batches
    model, after = qnb.from_pretrained(floats, scheme, **how), tiny()
    report = qnb.quantize(after, scheme, **how)
    assert same_bits(model, after) and torch.equal(logits(model), logits(after))
    layers = quantized_layers(model).values()
    assert all(q.on_disk for q in layers) and len(layers) == sum(r.scheme != "none" for r in report.rows)
    with qnb.model.linear.original_pass():
        assert torch.equal(logits(model), logits(tiny()))
    qnb.restore(model)
    assert torch.equal(logits(model), logits(tiny())) and not quantized_layers(model)


def test_a_recipe_while_loading_and_another_type(floats):
    after = tiny()
    qnb.quantize(after, "w4a16-g32", layers="*.mlp.*")
    model = qnb.from_pretrained(floats, qnb.Recipe.of(after), dtype=torch.bfloat16)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert same_bits(model, after)


def test_originals_cost_no_memory_and_a_changed_file_is_noticed(floats):
    from qnb.errors import NotQuantized
    from qnb.model.linear import held_storages

    model = qnb.from_pretrained(floats, "w8a8")
    held, originals = held_storages(model)
    assert originals == 0 and held < 0.6 * sum(p.nbytes for p in tiny().parameters())
    file = next(p for p in sorted(floats.glob("*.safetensors")) if b"down_proj" in p.read_bytes()[:5000])
    content, times = file.read_bytes(), os.stat(file)
    with open(file, "r+b") as stream:
        stream.seek(len(content) // 2)
        stream.write(b"\x11" * (len(content) // 2))
    with pytest.raises(NotQuantized, match="was changed"):
        qnb.restore(model)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # the clock says nothing happened: the hash does not
    with pytest.raises(NotQuantized, match="its hash is not"):
        qnb.restore(model)
    assert len(quantized_layers(model)) == 14
    with open(file, "r+b") as stream:
        stream.write(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    qnb.restore(model)
    with open(file, "r+b") as stream:  # restored weights are the model's own again
        stream.write(b"\x00" * len(content))
    assert torch.equal(logits(model), logits(tiny()))


def test_what_from_pretrained_refuses(floats, good):
    for given, scheme, how, words in [
        (good, "w8a8", {}, "quantized already"),
        (floats, "none", {}, "quantizes nothing"),
        (floats, "w8a8", {"dtype": torch.int8}, "give torch.float32"),
        (floats, "w8a8", {"layers": "nowhere"}, "matches none"),
        (floats / "missing", "w8a8", {}, "does not exist"),
    ]:
        with pytest.raises(QnbError, match=words):
            qnb.from_pretrained(given, scheme, **how)
    (floats / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00009.safetensors"}}')
    with pytest.raises(BadCheckpoint):
        qnb.from_pretrained(floats, "w8a8")


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32", "nf4-g64"])
def test_a_conv1d_is_saved_in_qnbs_own_format_alone(scheme, tmp_path):
    config = transformers.GPT2Config(
        n_embd=96, n_layer=2, n_head=2, vocab_size=96, n_positions=32, bos_token_id=0, eos_token_id=1
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    qnb.quantize(model, scheme, smooth=0.5 if scheme == "w8a8" else None, calibration=tokens())
    with pytest.raises(NotSaveable, match='c_attn is a Conv1D, .*format="qnb"'):
        qnb.save(model, tmp_path / "saved")
    qnb.save(model, tmp_path / "saved", format="qnb")
    loaded = qnb.load(tmp_path / "saved")
    assert same_bits(model, loaded) and torch.equal(logits(model), logits(loaded))
    layer = loaded.transformer.h[0].mlp.c_fc
    assert (layer.nx, layer.nf) == (96, 384) and layer.weight.shape == (96, 384)
