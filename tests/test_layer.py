"""The layer's promises: bytes really held, the same bits live and saved, weights read from outside, adapters, GPT-2."""

import copy
import gc
import io
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import qnb
from qnb.errors import FrozenWeight, QnbError
from qnb.model import cache
from qnb.model.linear import QConv1D, QLinear, held_storages, original_pass, quantized_layers

SCHEMES = ("w8a8", "w8a16")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 80), nn.ReLU(), nn.Linear(80, 48, bias=False), nn.LayerNorm(48)).eval()


@pytest.fixture
def x():
    return torch.randn(5, 48, generator=torch.Generator().manual_seed(1))


def tensors_within(thing, seen):
    """Every tensor that can be reached from the object by attributes, dictionaries and sequences, whoever holds it."""
    if id(thing) in seen or isinstance(thing, (str, bytes, int, float, type, torch.dtype, torch.device)):
        return
    seen[id(thing)] = thing  # kept, so that no address is given out twice
    if isinstance(thing, torch.Tensor):
        yield thing
        yield from tensors_within(thing.grad, seen)
    elif isinstance(thing, dict):
        for value in list(thing.values()):
            yield from tensors_within(value, seen)
    elif isinstance(thing, (list, tuple, set)):
        for value in thing:
            yield from tensors_within(value, seen)
    elif isinstance(thing, nn.Module) or type(thing).__module__.startswith("qnb."):
        yield from tensors_within(vars(thing) if hasattr(thing, "__dict__") else None, seen)


def storages(model):
    """Bytes of the unique storages that are reachable from the model, found without its own book-keeping."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_within(model, {})}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("keep", ["memory", "none"])
def test_bytes_that_are_said_are_those_that_a_walk_finds(model, scheme, keep):
    before = sum(storages(model).values())
    assert held_storages(model) == (before, 0)
    report = qnb.quantize(model, scheme, keep=keep)
    weight, original = held_storages(model)
    assert weight + original == sum(storages(model).values())
    assert original == (2 * 48 * 80 * 4 if keep == "memory" else 0)
    # One resident form: what the report says, and the biases and norms that were there before.
    assert weight == sum(r.bytes_after for r in report.rows) + before - 2 * 48 * 80 * 4
    if keep == "memory":
        qnb.quantize(model, "w8a8" if scheme == "w8a16" else "w8a16")
        model.state_dict()
        model(torch.randn(2, 48))
        assert sum(storages(model).values()) == weight + original
        qnb.restore(model)
        assert sum(storages(model).values()) == before


def test_no_tensor_outlives_a_change(model):
    """As the garbage collector sees it: nothing but the result, the originals and what is said to be cached."""
    cache.clear()
    gc.collect()
    before = {id(o) for o in gc.get_objects() if isinstance(o, torch.Tensor)}
    for scheme in ("w8a8", "w8a16", "w8a8", "none"):
        qnb.quantize(model, scheme)
    cache.clear()
    gc.collect()
    assert [o.shape for o in gc.get_objects() if isinstance(o, torch.Tensor) and id(o) not in before] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_live_saved_and_reloaded_are_the_same_bits(model, x, scheme, dtype):
    model, x = model.to(dtype), x.to(dtype)
    fresh = copy.deepcopy(model)
    qnb.quantize(model, scheme)
    y, state = model(x), model.state_dict()
    through_torch = io.BytesIO()
    torch.save(state, through_torch)
    through_torch.seek(0)
    for loaded in (load(save(state)), torch.load(through_torch, weights_only=True)):
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[n], t) and loaded[n].dtype == t.dtype for n, t in state.items())
        other = copy.deepcopy(fresh)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.normal_()
        qnb.quantize(other, scheme)
        other.load_state_dict(loaded)
        for mine, theirs in zip(quantized_layers(model).values(), quantized_layers(other).values(), strict=True):
            for name, tensor in mine.variant.tensors().items():
                assert torch.equal(tensor, theirs.variant.tensors()[name])
        assert torch.equal(other(x), y)


def shown(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return layer.weight


def merge(layer):
    shown(layer).data += 1


def assign_data(layer):
    shown(layer).data = torch.zeros(80, 48)


def index(layer):
    shown(layer)[0] = 0


def index_a_view(layer):
    shown(layer).detach().T[3, 4] = 0


def add(layer):
    weight = shown(layer)
    weight += 1


def in_place(layer):
    shown(layer).mul_(2)


def initialize(layer):
    nn.init.normal_(shown(layer))


def train(layer):
    shown(layer).requires_grad_()


def train_by_flag(layer):
    shown(layer).requires_grad = True


def put_a_parameter(layer):
    layer.weight = nn.Parameter(torch.zeros(80, 48))


def put_a_tensor(layer):
    layer.weight = torch.zeros(80, 48)


WRITES = [
    merge, assign_data, index, index_a_view, add, in_place, initialize, train, train_by_flag, put_a_parameter,
    put_a_tensor,
]  # fmt: skip


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_a_weight_of_integers_is_not_changed_or_trained_without_a_word(model, x, write):
    qnb.quantize(model, "w8a8")
    y = model(x)
    with pytest.raises(FrozenWeight, match="qnb.finetune") as caught:
        write(model[0])
    assert "\n" not in str(caught.value)
    assert torch.equal(model(x), y)


def test_a_weight_that_is_read_is_a_plain_tensor_in_all_that_follows(model, x):
    qnb.quantize(model, "w8a8")
    with pytest.warns(UserWarning, match="slow"):
        weight = model[0].weight
    assert weight.dtype == torch.float32
    assert weight.shape == (80, 48)
    for result in (x @ weight.T, nn.functional.linear(x, weight), weight.abs(), weight.clone(), weight.float().sum(0)):
        assert (
            type(result) is torch.Tensor or result.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        )
    changed = weight.clone()
    changed += 1
    got, want = nn.functional.linear(x, weight, model[0].bias), model[0](x)
    assert (got - want).norm() < 0.02 * want.norm()
    assert weight.numpy().shape == (80, 48)
    assert float(weight[0, 0]) == float(weight.numpy()[0, 0])
    assert int(weight[0, 0]) == 0
    for twin in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert type(twin) is torch.Tensor
        assert torch.equal(twin, weight)


@pytest.fixture
def gpt2():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=48, n_layer=2, n_head=2, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_conv1d_is_a_linear_layer_whose_weight_lies_transposed(gpt2, scheme, keep):
    from transformers.pytorch_utils import Conv1D

    ids = torch.arange(20).reshape(2, 10)
    modules, before = dict(gpt2.named_modules()), {n: p.detach().clone() for n, p in gpt2.named_parameters()}
    with torch.no_grad():
        y = gpt2(ids).logits
        report = qnb.quantize(gpt2, scheme, keep=keep)
        row = next(r for r in report.rows if r.name == "transformer.h.0.mlp.c_fc")
        assert (row.shape, row.scheme) == ((192, 48), scheme)
        assert "quantized 100 % of the weights" in report.coverage
        assert len(quantized_layers(gpt2)) == 8
        assert not any(type(m) is Conv1D for m in gpt2.modules())
        changed = gpt2(ids).logits
        assert 0 < (changed - y).norm() < 0.05 * y.norm()
        with original_pass():
            assert torch.equal(gpt2(ids).logits, y)
        qnb.quantize(gpt2, "w8a16")
        qnb.restore(gpt2)
        assert torch.equal(gpt2(ids).logits, y)
    assert dict(gpt2.named_modules()) == modules
    assert all(torch.equal(p, before[n]) for n, p in gpt2.named_parameters())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_conv1d_computes_what_a_linear_of_its_transpose_does(gpt2, scheme):
    twin = nn.Sequential(nn.Linear(48, 144))
    conv = gpt2.transformer.h[0].attn.c_attn
    with torch.no_grad():
        nn.init.normal_(conv.bias)
        twin[0].weight.copy_(conv.weight.T)
        twin[0].bias.copy_(conv.bias)
    qnb.quantize(twin, scheme)
    qnb.quantize(gpt2, scheme)
    layer, x = gpt2.transformer.h[0].attn.c_attn, torch.randn(3, 48, requires_grad=True)
    assert isinstance(layer, QConv1D)
    assert (layer.nf, layer.nx) == (144, 48)
    assert torch.equal(layer(x), twin[0](x))
    assert torch.equal(shown(layer), shown(twin[0]).T)
    assert shown(layer).shape == (48, 144)
    with original_pass():
        assert torch.equal(layer.weight, conv.weight)
        torch.testing.assert_close(layer(x), twin[0](x))
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    with pytest.raises(FrozenWeight):
        shown(layer).data += 1
    with pytest.raises(FrozenWeight):
        layer.weight = nn.Parameter(torch.zeros(48, 144))
    other = copy.deepcopy(gpt2)
    other.load_state_dict(gpt2.state_dict())
    assert torch.equal(other.transformer.h[0].attn.c_attn(x), layer(x))
    gpt2.double().float()
    gpt2.half()
    qnb.restore(gpt2)
    assert conv.weight.dtype == torch.float16


def test_conv1d_compiles_and_is_refused_where_it_cannot_be(gpt2):
    from transformers.pytorch_utils import Conv1D

    class Own(Conv1D):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.Sequential(Conv1D(8, 16), Own(8, 8), Conv1D(8, 8).double())
    report = qnb.quantize(model, "w8a8")
    assert [r.scheme for r in report.rows] == ["w8a8", "none"], "a class of its own is no Conv1D"
    assert "float64" in report.rows[1].skipped
    with pytest.raises(QnbError, match="Sequential"):
        qnb.quantize(Conv1D(8, 8), "w8a8")
    small = nn.Sequential(Conv1D(8, 16))
    qnb.quantize(small, "w8a8")
    x = torch.randn(2, 16)
    with torch.no_grad():
        assert torch.equal(torch.compile(small, fullgraph=True, backend="aot_eager")(x), small(x))


def test_code_that_casts_to_the_type_of_a_weight():
    """T5's feed-forward reads `wo.weight.dtype` and casts its input to it."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).bfloat16().eval()
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        y = model(input_ids=ids, decoder_input_ids=ids).logits.float()
        qnb.quantize(model, "w8a8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            changed = model(input_ids=ids, decoder_input_ids=ids).logits
    assert changed.dtype == torch.bfloat16
    assert (changed.float() - y).norm() < 0.1 * y.norm()


def adapted(model, **more):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **more))


def test_an_adapter_is_trained_on_a_quantized_model(tmp_path):
    """LoRA by peft on the demo model in int8: the loss falls, the integers stay, and the adapter is saved alone."""
    model, tokenizer = qnb.demo_lm()
    qnb.quantize(model, "w8a8", progress=False)
    frozen = {n: t.clone() for n, t in model.model.layers[0].mlp.up_proj.variant.tensors().items()}
    # Text unlike what the model was trained on.
    batch = tokenizer(["Der Zug nach Hamburg faehrt um zehn Uhr von Gleis sieben ab. " * 3], return_tensors="pt")
    wrapped = adapted(model, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    trained = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in n for n in trained)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], 1e-2)
    wrapped.train()
    losses = []
    for _ in range(10):
        loss = wrapped(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0], losses
    base = wrapped.base_model.model.model.layers[0].mlp.up_proj.base_layer
    assert isinstance(base, QLinear)
    assert all(torch.equal(t, frozen[n]) for n, t in base.variant.tensors().items())
    assert "skip" not in qnb.quantize(wrapped, "w8a16", progress=False).title
    assert not any("lora_" in n for n in quantized_layers(wrapped)), "a glob took adapters along"
    wrapped.save_pretrained(tmp_path)
    assert all("lora_" in n for n in load((tmp_path / "adapter_model.safetensors").read_bytes()))
    with pytest.raises(FrozenWeight, match="restore"):
        wrapped.merge_and_unload()
    qnb.restore(wrapped)
    wrapped.eval()
    with torch.no_grad():
        adapted_loss = float(wrapped(**batch, labels=batch["input_ids"]).loss)
        wrapped.merge_and_unload()
        merged_loss = float(model(**batch, labels=batch["input_ids"]).loss)
    assert adapted_loss < 0.8 * losses[0]
    assert merged_loss == pytest.approx(adapted_loss, rel=1e-3)


def test_an_adapter_on_a_quantized_gpt2(gpt2):
    qnb.quantize(gpt2, "w8a8")
    wrapped, ids = adapted(gpt2, target_modules=["c_attn"]), torch.arange(20).reshape(2, 10)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        loss = wrapped(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_an_adapter_that_was_there_first(gpt2):
    wrapped, ids = adapted(gpt2, target_modules=["c_attn"]), torch.arange(20).reshape(2, 10)
    report = qnb.quantize(wrapped, "w8a8")
    names = [r.name for r in report.rows if r.scheme == "w8a8"]
    assert any(n.endswith("c_attn.base_layer") for n in names)
    assert not any("lora_" in n for n in names)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in wrapped.named_parameters() if "lora_" in n)
    qnb.restore(wrapped)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_a_captured_cuda_graph_keeps_its_variant():
    model, x = nn.Sequential(nn.Linear(512, 512)).cuda().eval(), torch.randn(4, 512, device="cuda")
    qnb.quantize(model, "w8a16")
    with torch.no_grad():
        y = model(x)
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(x)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            out = model(x)
        held, _ = held_storages(model)
        qnb.quantize(model, "w8a8")
        cache.clear()
        gc.collect()
        torch.cuda.empty_cache()
        junk = [torch.full((512, 512), 77, dtype=torch.int8, device="cuda") for _ in range(64)]
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, y)
        assert not torch.equal(model(x), y)
        assert held_storages(model)[0] > held, "what a graph holds is not among the bytes"
        del junk
