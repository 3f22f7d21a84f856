"""Embeddings, quantized when they are named: rows are looked up among the codes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import qnb
from qnb.errors import BadCheckpoint, LayerRefused, NotSaveable
from qnb.model.linear import QEmbedding, held_storages, original_pass, quantized_layers

IDS = torch.tensor([[0, 3, 99], [3, 70, 1]])


class Net(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 72, padding_idx=0)
        self.body = nn.Linear(72, 72)
        self.lm_head = nn.Linear(72, 100, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        return self.lm_head(self.body(self.embed(ids)))


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def model(request) -> Net:
    torch.manual_seed(0)
    return Net().to(request.param).eval()


@pytest.mark.parametrize("scheme", ["w8a16", "w8a16-g32", "w4a16-g64", "w3a16-g64-asym", "w2a16-g32", "nf4-g64", "fp8"])
def test_rows_are_those_of_the_dequantized_weight(model, scheme):
    embed, before = model.embed, model(IDS)
    foretold = qnb.dry_run(model, scheme, layers="embed")
    report = qnb.quantize(model, scheme, layers="embed")
    assert isinstance(model.embed, QEmbedding) and isinstance(model.embed, nn.Embedding)
    dtype = embed.weight.dtype
    assert torch.equal(model.embed(IDS), model.embed.variant.dequantize(torch.float32)[IDS].to(dtype))
    assert model.embed(IDS[:0]).shape == (0, 3, 72) and model.embed(IDS[0, 0]).shape == (72,)
    [row] = [row for row in report.rows if row.name == "embed"]
    assert (row.scheme, row.kernel, row.shape) == (scheme, "lookup", (100, 72))
    assert row.bytes_after == model.embed.variant.nbytes
    assert list(foretold.rows) == list(report.rows)
    assert (foretold.weight_bytes, foretold.original_bytes) == held_storages(model)
    with original_pass():
        assert torch.equal(model(IDS), before)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS), model(IDS))
    twin.load_state_dict(model.state_dict())
    qnb.quantize(model, "none", layers="embed")
    assert model.embed is embed and torch.equal(model(IDS), before)


def test_only_its_name_means_it(model):
    assert "embed" not in {row.name for row in qnb.quantize(model, "w8a16").rows}
    assert type(model.embed) is nn.Embedding
    with pytest.raises(LayerRefused, match="embedding, kept unless named"):
        qnb.quantize(model, "w8a16", layers="emb*")


@pytest.mark.parametrize(
    ("scheme", "how", "words"),
    [("w8a8", {}, "multiplies no activations"), ("w4a16-g64", {"rounding": "gptq"}, "not calibrated")],
)
def test_what_makes_no_sense_is_refused(model, scheme, how, words):
    with pytest.raises(LayerRefused, match=words):
        qnb.quantize(model, scheme, layers="embed", **how)


def test_a_limit_on_norms_is_refused():
    model = nn.Sequential(nn.Embedding(10, 8, max_norm=1.0), nn.Linear(8, 8))
    with pytest.raises(LayerRefused, match="limits the norms"):
        qnb.quantize(model, "w8a16", layers="0")


def test_tied_weights_are_said_and_not_untied():
    torch.manual_seed(0)
    model = Net(tied=True).eval()
    report = qnb.quantize(model, "w8a16", layers="embed")
    [row] = [row for row in report.rows if row.name == "embed"]
    assert row.note == "weight tied to lm_head, which stays as it was"
    assert model.lm_head.weight is model.embed.original.weight
    qnb.quantize(model, "w8a16", layers="lm_head")
    assert model.lm_head.variant is model.embed.variant  # one weight, one set of codes
    qnb.restore(model)
    assert model.lm_head.weight is model.embed.weight


def test_a_compiled_model_looks_rows_up_too(model):
    qnb.quantize(model, "w4a16-g64", layers="embed")
    with torch.no_grad():
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(IDS), model(IDS))


def test_a_variant_shares_no_memory_with_state_dicts(model):
    qnb.quantize(model, "w8a16", layers=["embed", "body"])
    y, state = model(IDS), model.state_dict()
    for name in ("embed.weight_scale", "body.weight_scale"):
        state[name].zero_()
    assert torch.equal(model(IDS), y)
    again = {name: tensor.clone() for name, tensor in state.items()}
    model.load_state_dict(again)
    y = model(IDS)
    again["body.weight_scale"].fill_(1)
    assert torch.equal(model(IDS), y)


@pytest.mark.parametrize("index", [-1, 100])
def test_an_index_outside_raises_as_ever(model, index):
    qnb.quantize(model, "w8a16", layers="embed")
    with pytest.raises(IndexError):
        model(torch.tensor([[index]]))


def test_a_format_without_a_word_for_it_is_refused_by_name(model, tmp_path):
    qnb.quantize(model, "w8a16", layers="embed")
    for format in (None, "gguf"):
        with pytest.raises(NotSaveable, match="embed is a quantized embedding"):
            qnb.save(model, tmp_path / "saved", format=format)


def test_what_is_saved_is_what_is_attached(model, tmp_path):
    twin = copy.deepcopy(model)
    qnb.quantize(model, "w4a16-g32", layers="embed")
    y = model(IDS)
    qnb.save(model, tmp_path / "saved", format="qnb")
    qnb.attach(twin, tmp_path / "saved")
    assert torch.equal(twin(IDS), y)
    assert quantized_layers(twin)["embed"].padding_idx == model.embed.padding_idx


@pytest.mark.parametrize("named", [["model.embed_tokens"], ["lm_head"], ["model.embed_tokens", "lm_head"]])
def test_a_tied_pair_is_saved_as_the_two_things_it_has_become(named, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True)
    torch.manual_seed(0)
    tied = transformers.LlamaForCausalLM(config).eval()
    qnb.quantize(tied, "w8a16", layers=named)
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        qnb.save(tied, tmp_path / "saved", format="qnb")
        loaded = qnb.load(tmp_path / "saved")
        assert torch.equal(loaded(ids).logits, tied(ids).logits)
    assert list(quantized_layers(loaded)) == list(quantized_layers(tied))


@pytest.mark.parametrize("named", ["bert.embeddings.word_embeddings", "cls.predictions.decoder"])
def test_what_else_a_model_ties_is_saved_under_each_name(named, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, intermediate_size=48)).eval()
    qnb.quantize(bert, "w8a16", layers=named)
    qnb.save(bert, tmp_path / "saved", format="qnb")
    loaded, ids = qnb.load(tmp_path / "saved"), torch.arange(12).view(1, 12)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, bert(ids).logits)


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 7 * super().forward(ids)


def test_a_layer_with_a_forward_of_its_own_takes_no_integers_of_a_checkpoint(model, tmp_path):
    twin = copy.deepcopy(model)
    twin.embed.__class__ = Scaled
    y = twin(IDS)
    qnb.quantize(model, "w8a16", layers="embed")
    qnb.save(model, tmp_path / "saved", format="qnb")
    with pytest.raises(BadCheckpoint, match="layer embed cannot run .* forward of its own"):
        qnb.attach(twin, tmp_path / "saved")
    assert torch.equal(twin(IDS), y)
