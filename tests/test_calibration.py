"""The calibration runner: what it sees block by block is what plain hooks see on the whole model."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn

import qnb
from qnb.errors import BadInput
from qnb.model import calibration
from qnb.model.calibration import _EvenRows, gather
from qnb.model.select import sites_in_place
from qnb.rounding import Statistics

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def gpt2() -> nn.Module:
    """Small, with nn.Linear where GPT-2 has layers of its own; its blocks get a cache as a positional argument."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=50, n_positions=40)
    model = transformers.GPT2LMHeadModel(config).eval()
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Conv1D":
            linear = nn.Linear(*module.weight.shape)
            linear.weight.data, linear.bias.data = module.weight.data.T.contiguous(), module.bias.data
            model.set_submodule(name, linear)
    return model


def bert() -> nn.Module:
    torch.manual_seed(2)
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=50,
        max_position_embeddings=40,
    )
    return transformers.BertModel(config).eval()


def t5() -> nn.Module:
    torch.manual_seed(3)
    config = transformers.T5Config(
        d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, vocab_size=50, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def llama() -> nn.Module:
    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, vocab_size=50
    )
    return transformers.LlamaForCausalLM(config).eval()


def sequential() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).eval()


def token_texts(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 50, (1, 9 + 4 * i), generator=generator)} for i in range(count)]


def texts_for(model: nn.Module) -> list:
    if isinstance(model, nn.Sequential):
        return [torch.randn(7, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    texts = token_texts()
    return [{**t, "labels": t["input_ids"]} for t in texts] if type(model).__name__.startswith("T5") else texts


def by_plain_hooks(model: nn.Module, texts: list) -> dict[str, list[Tensor]]:
    """Name of each linear layer -> its inputs (rows, K), a text each."""
    inputs: dict[str, list[Tensor]] = {}
    handles = []
    for site in sites_in_place(model):
        seen = inputs.setdefault(site.name, [])
        hook = lambda m, args, seen=seen: seen.append(args[0].detach().reshape(-1, args[0].shape[-1]).clone())  # noqa: E731
        handles.append(site.module.register_forward_pre_hook(hook))
    lengths = {name: [] for name in inputs}
    with torch.no_grad():
        for text in texts:
            before = {name: len(seen) for name, seen in inputs.items()}
            model(**text) if isinstance(text, dict) else model(text)
            for name, seen in inputs.items():
                lengths[name].append(torch.cat(seen[before[name] :]))
    for handle in handles:
        handle.remove()
    return lengths


def gathered(model: nn.Module, texts: list, needs: str = "hessian", **options) -> dict[str, Statistics]:
    sites = sites_in_place(model)
    wanted = {site.name: needs for site in sites}
    return {site.name: found for site, found in gather(model, wanted, sites, texts, None, **options)}


def counting(model: nn.Module) -> tuple[list[int], object]:
    """A list whose only number is how often the model as a whole has run."""
    runs = [0]
    handle = model.register_forward_pre_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    return runs, handle


@pytest.mark.parametrize("make", [gpt2, bert, llama, t5, sequential])
def test_the_statistics_are_those_of_plain_hooks(make):
    model = make()
    texts = texts_for(model)
    expected = by_plain_hooks(model, texts)
    runs, handle = counting(model)
    found = gathered(model, texts)
    handle.remove()
    assert runs[0] == len(texts)  # every block stood alone
    assert set(found) == set(expected)
    for name, inputs in expected.items():
        x, got = torch.cat(inputs), found[name]
        assert got.rows == len(x)
        assert torch.equal(got.low, torch.stack([t.amin(0) for t in inputs])), name
        assert torch.equal(got.high, torch.stack([t.amax(0) for t in inputs])), name
        assert torch.equal(got.sample, x), name  # fewer than the limit: all of them
        exact = x.double()
        assert torch.allclose(got.mean_square.double(), exact.square().mean(0), rtol=1e-5)
        bound = len(x) * torch.finfo(torch.float32).eps * (exact.abs().T @ exact.abs() / len(x))
        assert ((got.hessian.double() - exact.T @ exact / len(x)).abs() <= bound + 1e-12).all(), name


def test_what_another_thread_runs_meanwhile_is_not_counted():
    model = llama()
    texts, others = token_texts(), token_texts(2)[::-1]
    expected = gathered(model, texts)
    mine = threading.get_ident()

    def serve(*_) -> None:
        if threading.get_ident() == mine:
            for text in others:
                serving = threading.Thread(target=model, kwargs=text)
                serving.start()
                serving.join()

    for at in (model, model.model.layers[1]):  # in the pass of the whole model, and of a block alone
        handle = at.register_forward_pre_hook(serve)
        found = gathered(model, texts)
        handle.remove()
        for name, wanted in expected.items():
            assert found[name].rows == wanted.rows and torch.equal(found[name].hessian, wanted.hessian)


def test_the_demo_model_runs_block_by_block():
    model, tokenizer = qnb.demo_lm()
    strings = [text[:60] for text in qnb.demo_texts("calibration")[:2]]
    texts = [{"input_ids": torch.tensor([tokenizer(s).input_ids])} for s in strings]
    expected = by_plain_hooks(model, texts)
    runs, handle = counting(model)
    sites = sites_in_place(model)
    found = {s.name: f for s, f in gather(model, {s.name: "inputs" for s in sites}, sites, strings, tokenizer)}
    handle.remove()
    assert runs[0] == 2 and len(found) == len(sites) == 57
    for name, inputs in expected.items():
        assert torch.equal(found[name].sample, torch.cat(inputs)), name
        assert found[name].hessian is None


class _Skip(nn.Module):
    """Blocks whose hidden state is changed between them: none but the first stands alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x) + number
        return x


class _Twice(_Skip):
    """Each block is called twice a text."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(block(x))
        return x


class _InPlace(_Skip):
    """Blocks that change the state they are given."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for block in self.blocks:
            x += 1
            x = block(x.mul_(2))
        return x


class _Remembers(_Skip):
    """A block that gives something else when it is run by itself: no input tells, only what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = False
        block = self.blocks[2]
        block.forward = lambda x: block[1](block[0](x if self.inside else -x))

    def forward(self, x: Tensor) -> Tensor:
        self.inside = True
        try:
            return super().forward(x)
        finally:
            self.inside = False


class _Shared(_Skip):
    """One layer stands in two blocks and outside them; one block stands twice in the list."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2][0] = self.blocks[0][0]
        self.blocks.append(self.blocks[1])
        self.last = self.blocks[0][0]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class _Named(_Skip):
    """The state is given by name, beside something that is no tensor; blocks give tuples, one of them a bare linear."""

    def __init__(self) -> None:
        super().__init__()

        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(8, 8)

            def forward(self, *, scale: float, state: Tensor):
                return self.fc(state) * scale, scale

        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x, _ = block(scale=number + 1.5, state=x)
        return x


@pytest.mark.parametrize(
    ("make", "passes"), [(_Skip, 3), (_Twice, 4), (_InPlace, 4), (_Remembers, 2), (_Shared, 1), (_Named, 1)]
)
def test_blocks_that_do_not_stand_alone_are_seen_in_the_whole_model(make, passes):
    model = make().eval()
    texts = [torch.randn(5, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    expected = by_plain_hooks(model, texts)
    runs, handle = counting(model)
    found = gathered(model, texts)
    handle.remove()
    for name, inputs in expected.items():
        assert torch.equal(found[name].sample, torch.cat(inputs)), name
        assert torch.equal(found[name].low, torch.stack([t.amin(0) for t in inputs])), name
    assert runs[0] <= passes * len(texts)


def test_a_layer_that_stands_in_two_places_is_gathered_once_with_all_its_inputs():
    model = _Shared().eval()
    qnb.quantize(model, "w4a16-g32", rounding="gptq", calibration=[torch.randn(5, 8)])
    assert model.blocks[0][0] is model.blocks[2][0] is model.last


def test_one_block_of_hessians_is_alive_at_a_time(monkeypatch):
    alive, most = weakref.WeakSet(), [0]
    original = calibration._Watch.__init__

    def noted(self, *args):
        original(self, *args)
        alive.add(self)
        most[0] = max(most[0], len(alive))

    monkeypatch.setattr(calibration._Watch, "__init__", noted)
    model = llama()
    sites = [site for site in sites_in_place(model) if not site.kept]
    gc.collect()
    for _ in gather(model, {site.name: "hessian" for site in sites}, sites, token_texts(), None):
        pass
    assert len(sites) == 21 and most[0] == 7


def state_of(model: nn.Module) -> list:
    hooks = [
        (len(m._forward_pre_hooks), len(m._forward_hooks), len(m._forward_pre_hooks_with_kwargs), m.training)
        for m in model.modules()
    ]
    return [hooks, [t.clone() for t in model.state_dict().values()]]


def same(a: list, b: list) -> bool:
    return a[0] == b[0] and all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


def test_the_model_is_as_it_was_while_statistics_are_held_and_afterwards():
    model = llama().train()
    before = state_of(model)
    sites = sites_in_place(model)
    running = gather(model, {site.name: "inputs" for site in sites}, sites, token_texts(), None)
    for _ in running:
        assert same(state_of(model), before)
        assert torch.is_grad_enabled()
    assert same(state_of(model), before)


@pytest.mark.parametrize("make", [llama, sequential])
def test_an_interrupt_anywhere_leaves_no_hook(make, monkeypatch):
    model = make().train()
    before, texts = state_of(model), texts_for(model)
    usual, texts_seen, at = calibration._Watched.next_text, 0, None

    def next_text(watched):  # called before each text of each pass
        nonlocal texts_seen
        if texts_seen == at:
            raise KeyboardInterrupt
        texts_seen += 1
        usual(watched)

    monkeypatch.setattr(calibration._Watched, "next_text", next_text)
    gathered(model, texts)
    assert texts_seen >= len(texts)
    for at in range(texts_seen):  # noqa: B007 - `next_text` reads it
        texts_seen = 0
        with pytest.raises(KeyboardInterrupt):
            gathered(model, texts)
        assert same(state_of(model), before)


def test_an_interrupt_between_two_hooks_leaves_none(monkeypatch):
    model = llama()
    before = state_of(model)
    for at in range(0, 25, 3):
        count = iter(range(1000))
        add = nn.Module.register_forward_pre_hook

        def interrupted(self, *args, at=at, count=count, add=add, **kwargs):
            handle = add(self, *args, **kwargs)  # the hook is there, its handle is not noted yet
            if next(count) == at:
                raise KeyboardInterrupt
            return handle

        with monkeypatch.context() as patched:
            patched.setattr(nn.Module, "register_forward_pre_hook", interrupted)
            with pytest.raises(KeyboardInterrupt):
                gathered(model, token_texts())
        assert same(state_of(model), before)


def test_a_quantized_model_is_calibrated_as_its_original():
    model = llama()
    expected = gathered(model, token_texts())
    fresh = copy.deepcopy(model)
    qnb.quantize(model, "w2a16-g32")
    found = gathered(model, token_texts())
    for name, statistics in expected.items():
        assert torch.equal(found[name].sample, statistics.sample)
        assert torch.equal(found[name].hessian, statistics.hessian)
    # and so quantizing again gives what quantizing the original gives
    for m in (model, fresh):
        qnb.quantize(m, "w4a16-g32", rounding="gptq", calibration=token_texts())
    assert torch.equal(model(**token_texts()[0]).logits, fresh(**token_texts()[0]).logits)


@pytest.mark.parametrize("form", ["strings", "tensors", "dicts", "generator"])
def test_every_form_of_texts_gives_the_same_codes(form):
    model, tokenizer = qnb.demo_lm()
    strings = [text[:40] for text in qnb.demo_texts("calibration")[:2]]
    ids = [torch.tensor([tokenizer(s).input_ids]) for s in strings]
    dicts = [{"input_ids": i} for i in ids]
    given = {"strings": strings, "tensors": ids, "dicts": dicts, "generator": (d for d in dicts)}[form]
    layer = "model.layers.0.self_attn.q_proj"
    qnb.quantize(model, "w3a16-g64", rounding="gptq", layers=layer, calibration=given)
    got = model.get_submodule(layer).variant.codes()
    qnb.quantize(model, "w3a16-g64", rounding="gptq", layers=layer, calibration=dicts)
    assert torch.equal(got, model.get_submodule(layer).variant.codes())


def test_a_layer_that_no_text_reaches_is_named():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Model()
    with pytest.raises(BadInput, match="no calibration text reaches layer unused: leave it out with skip='unused'"):
        qnb.quantize(model, "w8a8-static", calibration=[torch.randn(3, 4)])
    assert type(model.used) is nn.Linear
    qnb.quantize(model, "w8a8-static", calibration=[torch.randn(3, 4)], skip="unused")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_are_refused_with_the_layer(bad):
    model = sequential()
    x = torch.randn(3, 16)
    x[1, 2] = bad
    for options in ({"rounding": "gptq"}, {"rounding": "awq"}, {"smooth": 0.5}):
        with pytest.raises(BadInput, match="NaN or infinite inputs of layer 0") as caught:
            qnb.quantize(model, "w4a16-g32", calibration=[x], **options)
        assert "\n" not in str(caught.value)
    assert type(model[0]) is nn.Linear


def test_no_texts_at_all_is_refused():
    model = sequential()
    with pytest.raises(BadInput, match="rounding 'gptq' needs calibration: pass calibration="):
        qnb.quantize(model, "w4a16-g32", rounding="gptq")
    with pytest.raises(BadInput, match="calibration is empty"):
        qnb.quantize(model, "w4a16-g32", rounding="gptq", calibration=[])


def test_the_sampled_rows_are_spread_evenly_and_meet_no_beat():
    rows = _EvenRows(256)
    for text in range(64):
        rows.add(torch.stack([torch.full((512,), float(text)), torch.arange(512.0)], 1))
    kept = rows.rows()
    assert 128 <= len(kept) <= 256
    assert torch.bincount(kept[:, 0].long(), minlength=64).min() >= 1
    # places in the text: a stride of a power of two would take the same few of each text
    assert len(kept[:, 1].unique()) > 0.7 * len(kept)
    whole = _EvenRows(256)
    whole.add(torch.stack([torch.arange(64.0).repeat_interleave(512), torch.arange(512.0).repeat(64)], 1))
    assert torch.equal(whole.rows(), kept)  # however the rows come
