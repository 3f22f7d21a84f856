"""Where originals lie while their layers are quantized: in memory, in files, or nowhere; and that undo stays exact."""

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qnb
from qnb.errors import BadInput, NotQuantized
from qnb.model import disk, swap
from qnb.model.linear import QLinear, disk_bytes, held_storages, original_pass, quantized_layers


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 80), nn.ReLU(), nn.Linear(80, 16), nn.Linear(16, 4, bias=False)).eval()


@pytest.fixture
def x():
    return torch.randn(5, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setattr(disk, "_folder", None)
    return folder


def files(folder):
    return [p for p in folder.rglob("*") if p.is_file()]


def linear_bytes(model):
    return sum(m.weight.numel() * m.weight.element_size() for m in model.modules() if type(m) is nn.Linear)


@pytest.fixture
def checkpoint(tmp_path):
    """A small language model in bf16, loaded from a local folder that it was saved to."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(config).bfloat16()
    made.save_pretrained(tmp_path / "checkpoint", max_shard_size="20KB")
    return tmp_path / "checkpoint"


def load(folder, kind="LlamaForCausalLM", dtype=torch.bfloat16):
    import transformers

    return getattr(transformers, kind).from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


@pytest.mark.parametrize("keep", ["memory", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_undo_is_exact_wherever_originals_lie(model, x, keep, dtype, own_temporary_folder):
    model, x = model.to(dtype), x.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    bits, y, size = {n: p.detach().clone() for n, p in parameters.items()}, model(x), linear_bytes(model)
    seen = []
    handle = model[0].register_forward_hook(lambda *_: seen.append(1))
    report = qnb.quantize(model, "w8a8", keep=keep)
    weight, original = held_storages(model)
    if keep == "disk":
        assert original == 0
        assert disk_bytes(model) == size
        assert "on disk" in report.title
        assert all(r.note == "original on disk" for r in report.rows)
        assert sum(os.path.getsize(f) for f in files(own_temporary_folder)) >= size
    else:
        assert (original, disk_bytes(model)) == (size, 0)
        assert not files(own_temporary_folder)
    with original_pass():
        assert torch.equal(model(x), y)
    qnb.quantize(model, "w8a16")
    qnb.restore(model)
    assert dict(model.named_modules()) == modules
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, bits[name])
    assert torch.equal(model(x), y)
    assert len(seen) == 2
    handle.remove()
    model(x).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, bits["0.weight"])


def test_the_temporary_folder_goes_with_its_last_user(model, own_temporary_folder):
    qnb.quantize(model, "w8a8", keep="disk")
    twin = copy.deepcopy(model)
    assert disk_bytes(twin) == 0, "a copy has its originals in memory"
    assert len(files(own_temporary_folder)) == 3
    qnb.restore(model)
    del twin
    gc.collect()
    assert not list(own_temporary_folder.iterdir())
    another = nn.Sequential(nn.Linear(8, 8))
    qnb.quantize(another, "w8a8", keep="disk")
    assert files(own_temporary_folder)
    del another
    gc.collect()
    assert not list(own_temporary_folder.iterdir())


def test_the_temporary_folder_goes_with_its_process(tmp_path):
    code = (
        "import qnb, torch; from torch import nn\n"
        "m = nn.Sequential(nn.Linear(64, 64)); qnb.quantize(m, 'w8a8', keep='disk')\n"
        "import os; print(len(os.listdir(os.environ['TMPDIR'])))"
    )
    (tmp_path / "t").mkdir()
    env = {**os.environ, "TMPDIR": str(tmp_path / "t"), "PYTHONPATH": str(Path(qnb.__path__[0]).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "1", done.stderr
    assert not list((tmp_path / "t").iterdir())


def test_the_files_are_safetensors_that_others_can_read(model, own_temporary_folder):
    weights = [m.weight.detach().clone() for m in model if isinstance(m, nn.Linear)]
    qnb.quantize(model, "w8a8", keep="disk")
    read = [load_file(f)["weight"] for f in sorted(files(own_temporary_folder), key=lambda f: int(f.stem))]
    assert all(torch.equal(a, b) for a, b in zip(read, weights, strict=True))


def test_a_disk_that_is_full_leaves_the_model_and_no_file(model, monkeypatch, own_temporary_folder):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    before = {n: id(m) for n, m in model.named_modules()}
    monkeypatch.setattr(disk, "open", full, raising=False)
    with pytest.raises(BadInput, match="No space left"):
        qnb.quantize(model, "w8a8", keep="disk")
    assert {n: id(m) for n, m in model.named_modules()} == before
    assert not files(own_temporary_folder)


def test_copies_and_pickles_are_models_of_their_own(model, x):
    y = model(x)
    qnb.quantize(model, "w8a8", keep="disk")
    changed = model(x)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    twins = copy.deepcopy(model), torch.load(stream, weights_only=False)
    assert pickle.loads(pickle.dumps(model[0].mapped)) is None
    qnb.restore(model)
    for twin in twins:
        assert torch.equal(twin(x), changed)
        qnb.restore(twin)
        assert torch.equal(twin(x), y)


def test_from_memory_to_disk_to_nowhere(model, x):
    y, size = model(x), linear_bytes(model)
    qnb.quantize(model, "w8a8")
    assert held_storages(model)[1] == size
    qnb.quantize(model, "w8a8", keep="disk")
    assert (held_storages(model)[1], disk_bytes(model)) == (0, size)
    qnb.quantize(model, "w8a16", layers="0")  # the default asks for nothing new
    assert disk_bytes(model) == size
    with original_pass():
        assert torch.equal(model(x), y)
    qnb.quantize(model, "w8a8", keep="none", layers="0")
    assert disk_bytes(model) < size
    with pytest.raises(NotQuantized, match='keep="none"'):
        qnb.restore(model)
    assert isinstance(model[2], QLinear), "a refused restore changed layers"


def test_writing_to_a_mapped_original_changes_no_file(model, own_temporary_folder):
    original = model[0]
    qnb.quantize(model, "w8a8", keep="disk")
    before = [f.read_bytes() for f in files(own_temporary_folder)]
    with torch.no_grad():
        original.weight.fill_(3)
    assert [f.read_bytes() for f in files(own_temporary_folder)] == before
    qnb.quantize(model, "w8a16")
    assert (model[0].variant.dequantize(torch.float32) == 3).all(), "codes are those of another weight"
    qnb.restore(model)
    assert (model[0].weight == 3).all()


def test_a_weight_that_is_used_elsewhere_stays_in_memory():
    model = nn.Sequential(nn.Embedding(16, 32), nn.Linear(32, 16, bias=False), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    qnb.quantize(model, "w8a8", keep="disk")
    assert disk_bytes(model) == 16 * 16 * 4
    model[0](torch.zeros(2, dtype=torch.long))
    qnb.restore(model)
    assert model[1].weight is model[0].weight


@pytest.mark.parametrize("layout", ["transposed", "inference"])
def test_weights_of_odd_kinds(layout):
    with torch.inference_mode(layout == "inference"):
        model = nn.Sequential(nn.Linear(32, 48))
        if layout == "transposed":
            model[0].weight = nn.Parameter(torch.randn(32, 48).T)
        bits = model[0].weight.detach().clone()
    parameter = model[0].weight
    for scheme in ("w8a8", "w8a16", "w8a8"):
        qnb.quantize(model, scheme, keep="disk")
    # A weight that was made in inference mode would no longer be one if it were moved.
    assert disk_bytes(model) == (0 if layout == "inference" else 32 * 48 * 4)
    qnb.restore(model)
    assert model[0].weight is parameter
    assert torch.equal(parameter, bits)
    assert parameter.is_inference() == (layout == "inference")


def test_a_model_that_changed_its_type_meanwhile(model, x):
    qnb.quantize(model, "w8a8", keep="disk")
    model.bfloat16()
    qnb.restore(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model(x.bfloat16())


@pytest.mark.parametrize("at", range(6))
def test_an_interrupt_leaves_originals_where_they_were(model, x, at, monkeypatch, own_temporary_folder):
    y, done, real = model(x), [], swap.Stow.do

    def do(self):
        real(self)
        done.append(self)
        if len(done) == at + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(swap.Stow, "do", do)
    if at < 3:
        with pytest.raises(KeyboardInterrupt):
            qnb.quantize(model, "w8a8", keep="disk")
        assert not quantized_layers(model)
        gc.collect()
        assert not files(own_temporary_folder)
    else:
        qnb.quantize(model, "w8a8", keep="disk")
        with pytest.raises(KeyboardInterrupt):
            qnb.restore(model)
        assert disk_bytes(model) == 80 * 48 * 4 + 16 * 80 * 4 + 4 * 16 * 4
        monkeypatch.setattr(swap.Stow, "do", real)
        qnb.restore(model)
    assert torch.equal(model(x), y)


def test_a_folder_that_cannot_be_written_to(model, monkeypatch, tmp_path):
    before = {n: id(m) for n, m in model.named_modules()}
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(BadInput, match="TMPDIR"):
        qnb.quantize(model, "w8a8", keep="disk")
    assert {n: id(m) for n, m in model.named_modules()} == before


def test_the_checkpoints_own_files_are_used(checkpoint, own_temporary_folder):
    model = load(checkpoint)
    assert len(list(checkpoint.glob("*.safetensors"))) > 1
    inputs = torch.arange(8).unsqueeze(0)
    bits = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        y = model(inputs).logits
        qnb.quantize(model, "w8a8", keep="disk")
        assert not files(own_temporary_folder)
        paths = {q.mapped.path.parent for q in quantized_layers(model).values()}
        assert paths == {checkpoint.resolve()}
        assert disk_bytes(model) == sum(p.nbytes for n, p in bits.items() if n.endswith("proj.weight"))
        with original_pass():
            assert torch.equal(model(inputs).logits, y)
        qnb.restore(model)
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())


def test_models_of_one_checkpoint_do_not_see_each_others_writes(checkpoint):
    models = load(checkpoint), load(checkpoint)
    bits = {n: p.detach().clone() for n, p in models[1].named_parameters()}
    qnb.quantize(models[0], "w8a8", keep="disk")
    with torch.no_grad():
        models[0].model.layers[0].mlp.up_proj.original.weight.fill_(7)
    qnb.quantize(models[1], "w8a8", keep="disk")
    for model in models:
        qnb.restore(model)
    assert (models[0].model.layers[0].mlp.up_proj.weight == 7).all()
    assert all(torch.equal(p, bits[n]) for n, p in models[1].named_parameters())


def test_only_weights_that_are_the_files_bits_are_taken_from_it(checkpoint, own_temporary_folder):
    model = load(checkpoint)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    qnb.quantize(model, "w8a8", keep="disk")
    own = [n for n, q in quantized_layers(model).items() if q.mapped.path.parent != checkpoint.resolve()]
    assert own == ["model.layers.0.mlp.up_proj"]
    assert len(files(own_temporary_folder)) == 1
    in_another_type = load(checkpoint, dtype=torch.float32)
    qnb.quantize(in_another_type, "w8a8", keep="disk")
    assert len(files(own_temporary_folder)) == 1 + 14


def test_a_body_without_its_head_finds_its_weights(checkpoint, own_temporary_folder):
    model = load(checkpoint, "LlamaModel")
    qnb.quantize(model, "w8a8", keep="disk")
    assert disk_bytes(model) > 0
    assert not files(own_temporary_folder)
    qnb.restore(model)


def rewrite(path):
    save_file({n: t + 1 for n, t in load_file(path).items()}, path.with_suffix(".new"))
    path.write_bytes(path.with_suffix(".new").read_bytes())


def test_a_checkpoint_that_was_written_to_is_no_original_any_more(checkpoint):
    model = load(checkpoint)
    for tensor in [*model.parameters(), *model.buffers()]:  # transformers itself may have mapped the files
        tensor.data = tensor.data.clone()
    qnb.quantize(model, "w8a8", keep="disk")
    y = model(torch.arange(4).unsqueeze(0)).logits
    for file in checkpoint.glob("*.safetensors"):
        rewrite(file)
    for call in (lambda: qnb.restore(model), lambda: qnb.quantize(model, "w8a16")):
        with pytest.raises(NotQuantized, match="was changed meanwhile"):
            call()
    assert torch.equal(model(torch.arange(4).unsqueeze(0)).logits, y)


def test_a_checkpoint_that_was_replaced_by_name_still_is_one(checkpoint):
    model = load(checkpoint)
    bits = {n: p.detach().clone() for n, p in model.named_parameters()}
    qnb.quantize(model, "w8a8", keep="disk")
    for file in list(checkpoint.glob("*.safetensors")):
        save_file({n: t + 1 for n, t in load_file(file).items()}, file.with_suffix(".new"), {"format": "pt"})
        os.replace(file.with_suffix(".new"), file)
    qnb.restore(model)
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())
    fresh = load(checkpoint)  # the same names, other files
    qnb.quantize(fresh, "w8a8", keep="disk")
    qnb.restore(fresh)
    assert not torch.equal(fresh.model.layers[0].mlp.up_proj.weight, bits["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b'\x10\0\0\0\0\0\0\0{"a": {"dtype":1'])
def test_files_that_are_no_safetensors_are_passed_by(checkpoint, content, own_temporary_folder):
    model = load(checkpoint)
    (checkpoint / "a.safetensors").write_bytes(content)
    qnb.quantize(model, "w8a8", keep="disk")
    assert not files(own_temporary_folder)


def test_two_threads_may_move_originals_at_once(own_temporary_folder):
    models = [nn.Sequential(*[nn.Linear(32, 32) for _ in range(8)]) for _ in range(4)]
    bits = [[m.weight.detach().clone() for m in model] for model in models]
    threads = [
        threading.Thread(target=lambda m=m: qnb.quantize(m, "w8a8", keep="disk", progress=False)) for m in models
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(files(own_temporary_folder)) == 32
    for model, kept in zip(models, bits, strict=True):
        qnb.restore(model)
        assert all(torch.equal(m.weight, k) for m, k in zip(model, kept, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_on_a_gpu_originals_leave_it_and_come_back(model, x, keep):
    model, x = model.cuda(), x.cuda()
    parameters, bits = dict(model.named_parameters()), {n: p.detach().clone() for n, p in model.named_parameters()}
    y = model(x)
    qnb.quantize(model, "w8a8", keep=keep)
    assert all(q.original.weight.device.type == "cpu" for q in quantized_layers(model).values())
    assert all(q.variant.packed.is_cuda for q in quantized_layers(model).values())
    assert bool(disk_bytes(model)) == (keep == "disk")
    first = [q.variant for q in quantized_layers(model).values()]
    qnb.quantize(model, "w8a16", keep=keep)
    qnb.quantize(model, "w8a8", keep=keep)
    assert [q.variant for q in quantized_layers(model).values()] == first, "a switch back was rounded anew"
    with original_pass():
        torch.testing.assert_close(model(x), y)
    qnb.restore(model)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert parameter.is_cuda
        assert torch.equal(parameter, bits[name])


def test_a_lookup_needs_no_copy_of_an_embedding_on_disk(monkeypatch):
    model = nn.Sequential(nn.Embedding(40, 64))
    model[0].weight = nn.Parameter(torch.randn(40 * 64 + 3)[3:].view(40, 64))
    y = model(torch.arange(5))
    qnb.quantize(model, "w8a16", layers="0", keep="disk")
    monkeypatch.setattr(type(model[0].mapped), "in_memory", lambda self: pytest.fail("the whole weight was copied"))
    with original_pass():
        assert torch.equal(model(torch.arange(5)), y)


def test_the_original_pass_takes_the_bias_that_the_layer_has_now(model, x):
    qnb.quantize(model, "w8a8")
    layer = next(q for q in quantized_layers(model).values() if q.bias is not None)
    layer.bias = nn.Parameter(layer.bias.detach() + 1)
    model.to(torch.bfloat16)
    given = torch.randn(3, layer.in_features, dtype=torch.bfloat16)
    with original_pass(), torch.no_grad():
        got = layer(given)
    weight = layer.original.weight.to(torch.bfloat16)
    assert torch.equal(got, nn.functional.linear(given, weight, layer.bias))


def laid_out(how: str) -> torch.Tensor:
    """f32 (8, 12), whose memory is not that of a new tensor."""
    torch.manual_seed(0)
    if how == "expanded":
        return torch.randn(1, 12).expand(8, 12)
    if how == "transposed":
        return torch.randn(12, 8).T
    if how == "shifted":
        return torch.randn(99)[3:].view(8, 12)
    return torch.randn(8, 1000)[:, :12]


@pytest.mark.parametrize("how", ["expanded", "transposed", "shifted", "a slice"])
def test_what_comes_back_from_disk_lies_as_it_did_unless_that_left_gaps(how):
    model, weight = nn.Sequential(nn.Linear(12, 8, bias=False)), laid_out(how)
    model[0].weight = nn.Parameter(weight)
    bits, x = weight.clone(), torch.randn(5, 12)
    with torch.no_grad():
        y = model(x)
        qnb.quantize(model, "w8a16", keep="disk")
        if how in ("transposed", "shifted"):
            with original_pass():
                assert torch.equal(model(x), y)
        qnb.restore(model)
        back = model[0].weight
        assert torch.equal(back, bits)
        if how in ("transposed", "shifted"):
            assert back.stride() == weight.stride() and back.data_ptr() % 64 == weight.data_ptr() % 64
            assert torch.equal(model(x), y)
        else:
            assert back.is_contiguous()
    assert back.untyped_storage().nbytes() <= weight.numel() * 4 + 64
