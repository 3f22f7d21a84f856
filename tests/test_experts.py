"""Mixtures of experts: their 3-D parameters run in schemes, expert by expert, and come back as the very objects."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qnb
from qnb.errors import BadCheckpoint, BadInput, LayerRefused, NotQuantized, NotSaveable
from qnb.model.experts import Experts
from qnb.model.linear import QLayer, held_storages, original_pass, quantized_layers
from qnb.model.recipe import Recipe

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
IDS = torch.arange(24).reshape(2, 12)
SIZES = {
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}  # fmt: skip


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**SIZES, intermediate_size=96, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def qwen() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        **SIZES, intermediate_size=64, moe_intermediate_size=96, num_experts=4, head_dim=32, decoder_sparse_step=1
    )
    return transformers.Qwen3MoeForCausalLM(config)


@pytest.fixture(params=[mixtral, qwen])
def model(request) -> nn.Module:
    torch.manual_seed(0)
    return request.param().eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def expected(block: nn.Module, variants: dict[str, object], x, index, weights) -> torch.Tensor:
    """The block's definition in float64, over what the codes stand for."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, (experts, shares) in enumerate(zip(index.tolist(), weights.double(), strict=True)):
        for number, share in zip(experts, shares, strict=True):
            gate_up, down = (
                variants[f"{number}.{m}"].dequantize(torch.float32).double() for m in ("gate_up_proj", "down_proj")
            )
            gate, up = (gate_up @ x[token].double()).chunk(2)
            out[token] += share * (down @ (nn.functional.silu(gate) * up))
    return out


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g64", "w4a16-g32-asym"])
def test_they_compute_what_their_codes_stand_for(model, scheme):
    qnb.quantize(model, scheme)
    name, layers = next((n, m) for n, m in model.named_modules() if isinstance(m, Experts))
    variants = {n.removeprefix(f"{name}."): q.variant for n, q in quantized_layers(model).items() if n.startswith(name)}
    assert len(variants) == 8 and {v.scheme.name for v in variants.values()} == {scheme}
    torch.manual_seed(1)
    x, index = torch.randn(7, 64), torch.stack([torch.randperm(4)[:2] for _ in range(7)])
    weights = torch.rand(7, 2)
    with torch.no_grad():
        got = layers(x, index, weights)
    # Sums of 64 and 96 products in f32, whose error is far below that of any code.
    torch.testing.assert_close(got.double(), expected(layers.block, variants, x, index, weights), rtol=1e-4, atol=1e-6)
    dropped = torch.full_like(index, 4)  # what a router sends that drops a token
    assert torch.equal(layers(x, dropped, weights), torch.zeros_like(x))


def test_undo_gives_the_very_block_and_bits(model):
    before, modules = logits(model), dict(model.named_modules())
    qnb.quantize(model, "w8a16")
    assert not torch.equal(logits(model), before)
    with original_pass():
        assert torch.equal(logits(model), before)
    qnb.quantize(model, "w4a16-g64", layers="*.experts")
    qnb.quantize(model, "none", layers="*.experts.1.*")
    with original_pass():
        assert torch.equal(logits(model), before)
    qnb.restore(model)
    assert all(module is modules[name] for name, module in model.named_modules())
    assert torch.equal(logits(model), before)


def test_the_last_expert_that_goes_back_brings_the_block_along(model):
    block = model.model.layers[0].mlp.experts
    qnb.quantize(model, "w8a16", layers=["model.layers.0.mlp.experts.2.down_proj"])
    assert isinstance(model.model.layers[0].mlp.experts, Experts)
    qnb.quantize(model, "none", layers=["model.layers.0.mlp.experts.2.down_proj"])
    assert model.model.layers[0].mlp.experts is block


@pytest.fixture
def elsewhere(monkeypatch):
    """Lets quantized layers and experts say that they compute on another device than their originals lie on."""

    def begin() -> None:
        for kind in (QLayer, Experts):
            monkeypatch.setattr(kind, "device", property(lambda self: torch.device("cpu", 0)))

    return begin


def test_what_runs_is_not_taken_for_a_piece_of_the_block_once_it_is_none(model, elsewhere):
    qnb.quantize(model, "w8a16", layers="*.experts.0.*")
    model.half()  # which gives the experts that run weights of their own
    live = model.model.layers[0].mlp.experts._modules["1"].down_proj.weight
    live.data.zero_()
    elsewhere()
    qnb.quantize(model, "w8a8", layers="model.layers.0.self_attn.q_proj")
    qnb.quantize(model, "w8a16", layers="*.experts.2.*")
    assert live.dtype == torch.float16 and not live.any()
    assert logits(model).isfinite().all()


def test_where_an_original_is_gone_the_others_stay(model, elsewhere):
    qnb.quantize(model, "w8a16")
    name = "model.layers.0.mlp.experts.1.down_proj"
    model.load_state_dict({**model.state_dict(), f"{name}.weight_scale": torch.ones(64, 1)})
    assert model.get_submodule(name).original is None
    elsewhere()
    qnb.quantize(model, "w8a8", layers="model.layers.0.self_attn.q_proj")
    qnb.quantize(model, "none", layers="*.experts.2.*")
    assert logits(model).isfinite().all()


def test_a_dry_run_counts_experts_once(model, elsewhere):
    here = qnb.dry_run(model, "w8a16").needed_bytes["cpu"]
    empty = copy.deepcopy(model).to("meta")
    load = sum(p.nbytes for p in empty.parameters()) + sum(b.nbytes for b in empty.buffers())
    assert qnb.dry_run(empty, "w8a16").needed_bytes["cpu"] == load + here
    qnb.quantize(model, "w8a16", layers="*.experts.*")
    experts = sum(p.nbytes for block in blocks(model) for p in block.parameters())
    elsewhere()
    for layers, comes_back in (("*.experts.*", experts), ("model.layers.0.mlp.experts.1.*", experts / 2)):
        foretold = qnb.dry_run(model, "none", layers=layers)
        assert foretold.needed_bytes["cpu:0"] == comes_back
        assert foretold.original_bytes == experts - comes_back


def blocks(model: nn.Module) -> list[nn.Module]:
    return [m.block for m in model.modules() if isinstance(m, Experts)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_on_a_gpu_originals_leave_it_together_and_come_back(model):
    model, ids = model.cuda(), IDS.cuda()
    block = model.model.layers[0].mlp.experts
    parameters = dict(block.named_parameters())
    bits = {name: p.detach().clone() for name, p in parameters.items()}

    def lies_on(device: str) -> bool:
        """And each expert's original is a piece of the block's parameter."""
        names = {q: name for name, q in quantized_layers(model).items() if name.startswith("model.layers.0.mlp.exp")}
        for layer, name in names.items():
            _, number, matrix = name.rsplit(".", 2)
            assert layer.variant.packed.is_cuda
            assert layer.original.weight.data_ptr() == parameters[matrix].data[int(number)].data_ptr()
        return {p.device.type for p in parameters.values()} == {device}

    with torch.no_grad():
        before = model(ids).logits
        qnb.quantize(model, "w8a16", layers="*.experts.0.*")
        assert lies_on("cuda")  # of the others as well, which run
        needed = qnb.dry_run(model, "w8a16").needed_bytes["cpu"]
        assert needed >= 2 * sum(p.nbytes for p in parameters.values())  # of two blocks
        for scheme in ("w8a16", "w4a16-g64"):
            qnb.quantize(model, scheme)
            assert lies_on("cpu")
            with original_pass():
                assert torch.equal(model(ids).logits, before)
        qnb.quantize(model, "none", layers="*.experts.1.*")
        assert lies_on("cuda")
        with original_pass():
            assert torch.equal(model(ids).logits, before)
        qnb.quantize(model, "w4a16-g64")
        assert lies_on("cpu")
        qnb.restore(model)
        assert torch.equal(model(ids).logits, before)
    assert model.model.layers[0].mlp.experts is block
    for name, parameter in block.named_parameters():
        assert parameter is parameters[name] and parameter.is_cuda and torch.equal(parameter, bits[name])


def test_what_is_held_and_said(model):
    experts = sum(p.numel() for p in model.parameters() if p.dim() == 3)
    before, _ = held_storages(model)
    foretold = qnb.dry_run(model, "w4a16-g64")
    report = qnb.quantize(model, "w4a16-g64", progress=False)
    assert (foretold.weight_bytes, foretold.original_bytes) == held_storages(model)
    assert foretold.coverage == report.coverage and list(foretold.rows) == list(report.rows)
    assert report.coverage.startswith("quantized 9") or report.coverage.startswith("quantized 100")
    assert before - held_storages(model)[0] > 3 * experts  # of 4 bytes each
    assert held_storages(model)[1] >= 4 * experts
    qnb.quantize(model, "w4a16-g64", keep="none")
    assert held_storages(model)[1] == 0
    with pytest.raises(NotQuantized, match="keep"):
        qnb.restore(model)


def test_what_needs_calibration_leaves_them_alone(model):
    report = qnb.quantize(model, "w8a8-static", calibration=[{"input_ids": IDS}])
    assert report.coverage.startswith("Warning: quantized") and "Experts, 3-D;" in report.coverage
    [said] = {row.skipped for row in report.rows if ".experts." in row.name}
    assert "not calibrated" in said
    with pytest.raises(LayerRefused, match="not calibrated"):
        qnb.quantize(model, "w4a16-g64", rounding="gptq", layers="model.layers.0.mlp.experts.0.down_proj")


def test_copies_state_dicts_types_and_gradients(model):
    names = Recipe.of(model).provenance["model"]
    qnb.quantize(model, "w8a16")
    assert Recipe.of(model).provenance["model"] == names
    y, state = logits(model), model.state_dict()
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), y)
    twin.load_state_dict(state)
    assert torch.equal(logits(twin), y)
    qnb.restore(twin)
    again = qnb.quantize(twin, Recipe.of(model))
    assert torch.equal(logits(twin), y) and again.coverage == qnb.layers(model).coverage
    inputs = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=inputs).logits.square().mean().backward()
    assert inputs.grad.isfinite().all() and inputs.grad.abs().sum() > 0
    model.half()
    assert logits(model).dtype == torch.float16
    with original_pass():  # the block itself is still of the other type
        assert logits(model).dtype == torch.float16
    qnb.restore(model)
    assert model.model.layers[0].mlp.experts.down_proj.dtype == torch.float16


def test_a_hook_on_the_block_runs_once(model):
    calls = []
    block = model.model.layers[0].mlp.experts
    block.register_forward_hook(lambda *_: calls.append(1))
    qnb.quantize(model, "w8a16")
    logits(model)
    with original_pass():
        logits(model)
    assert len(calls) == 2


def test_a_panel_shows_the_other_layers(model):
    pytest.importorskip("anywidget", reason="anywidget is not installed")
    from qnb.notebook.panel.session import Session

    qnb.quantize(model, "w8a16")
    qnb.quantize(model, "w8a16", layers="model.embed_tokens")
    session = Session(model)
    assert [row.name for row in session.rows] == session.names
    assert len(session.rows) == len(session.grid.places)


def test_a_block_or_an_embedding_alone_is_no_model(model):
    for part in (model.model.layers[0].mlp.experts, model.model.embed_tokens):
        with pytest.raises(BadInput, match="cannot be replaced from inside"):
            qnb.quantize(part, "w8a16")


def test_a_format_without_a_word_for_them_is_refused_by_name(model, tmp_path):
    qnb.quantize(model, "w8a16")
    for format in (None, "compressed-tensors", "gguf"):
        with pytest.raises(NotSaveable, match='model.layers.0.mlp.experts holds quantized experts.*format="qnb"'):
            qnb.save(model, tmp_path / "saved", format=format)
    assert not list(tmp_path.iterdir())


def mix(model: nn.Module) -> None:
    """Some experts quantized, one block and one expert as they were, and the embedding."""
    qnb.quantize(model, "w4a16-g32")
    qnb.quantize(model, "w8a8", layers="*.experts.1.*")
    qnb.quantize(model, "none", layers=["*.experts.2.*", "model.layers.1.mlp.experts"])
    qnb.quantize(model, "w8a16", layers="model.embed_tokens")


def test_what_is_saved_is_what_loads(model, tmp_path):
    mix(model)
    y = logits(model)
    saved = qnb.save(model, tmp_path / "saved", format="qnb")
    assert saved.layers == len(quantized_layers(model))
    loaded = qnb.load(tmp_path / "saved")
    assert torch.equal(logits(loaded), y)
    schemes = {name: layer.scheme for name, layer in quantized_layers(model).items()}
    assert {name: layer.scheme for name, layer in quantized_layers(loaded).items()} == schemes
    assert held_storages(loaded)[1] == 0
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())
    with pytest.raises(NotQuantized, match="checkpoint"):
        qnb.restore(loaded)
    qnb.save(loaded, tmp_path / "again", format="qnb")
    one, two = (tmp_path / name / "model.safetensors" for name in ("saved", "again"))
    assert one.read_bytes() == two.read_bytes()


def test_what_is_saved_can_be_put_into_a_model_of_the_same_layers(model, tmp_path):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    mix(model)
    y = logits(model)
    qnb.save(model, tmp_path / "saved", format="qnb")
    qnb.attach(twin, tmp_path / "saved")
    assert torch.equal(logits(twin), y)
    twin.to(torch.bfloat16)
    assert logits(twin).dtype == torch.bfloat16


def test_a_checkpoint_that_lacks_an_experts_tensor_changes_nothing(model, tmp_path):
    twin = copy.deepcopy(model)
    before, blocks = logits(twin), [layer.mlp.experts for layer in twin.model.layers]
    qnb.quantize(model, "w8a16")
    qnb.save(model, tmp_path / "saved", format="qnb")
    path = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.experts.3.down_proj.weight_scale"]
    save_file(tensors, path)
    with pytest.raises(BadCheckpoint, match="layer model.layers.1.mlp.experts.3.down_proj"):
        qnb.attach(twin, tmp_path / "saved")
    assert [layer.mlp.experts for layer in twin.model.layers] == blocks
    assert torch.equal(logits(twin), before)


def test_loading_their_floats_is_left_to_transformers(model, tmp_path):
    for own in (True, False):
        model.save_pretrained(tmp_path / f"{own}", save_original_format=own)
        with pytest.raises(BadCheckpoint, match="load the model with transformers, then call qnb.quantize"):
            qnb.from_pretrained(tmp_path / f"{own}", "w4a16-g32")


def test_another_layout_is_not_covered_and_said():
    config = transformers.GptOssConfig(
        **SIZES, intermediate_size=32, num_local_experts=4, head_dim=32, layer_types=["full_attention"] * 2
    )
    torch.manual_seed(0)
    report = qnb.quantize(transformers.GptOssForCausalLM(config).eval(), "w8a16")
    assert report.coverage.startswith("Warning: quantized") and "lie in GptOssExperts, 3-D" in report.coverage
    assert not [row for row in report.rows if ".experts." in row.name]
