"""Switching: variants that are found again, what makes them invalid, and changes against a thread that generates."""

import copy
import gc
import itertools
import random
import threading
import weakref

import pytest
import torch
from torch import nn

import qnb
from qnb.model import cache, variants
from qnb.model.linear import held_storages, quantized_layers


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch):
    cache.clear()
    yield
    cache.clear()


@pytest.fixture
def made(monkeypatch):
    """The names of layers whose weight was rounded, in order."""
    names, real = [], variants._variant

    def count(order, *rest):
        names.append(order.site.name)
        return real(order, *rest)

    monkeypatch.setattr(variants, "_variant", count)
    return names


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 80), nn.Linear(80, 48))


def test_a_scheme_that_was_there_before_is_not_rounded_again(made):
    model = small()
    variants = {}
    for scheme in ("w8a8", "w8a16", "w8a8", "none", "w8a8", "w8a16", "none", "w8a16"):
        qnb.quantize(model, scheme)
        for name, layer in quantized_layers(model).items():
            assert variants.setdefault((name, scheme), layer.variant) is layer.variant
    assert made == ["0", "1"] * 2


def test_the_same_scheme_again_changes_nothing(made):
    model = small()
    qnb.quantize(model, "w8a8")
    before = [q.variant for q in quantized_layers(model).values()]
    qnb.quantize(model, "w8a8")
    assert [q.variant for q in quantized_layers(model).values()] == before
    assert len(made) == 2


def fill(weight):
    with torch.no_grad():
        weight.add_(0.5)


def step(weight):
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], 0.1).step()


def load(weight):
    with torch.no_grad():
        weight.copy_(torch.randn_like(weight))


def behind_torchs_back(weight):
    weight.data.mul_(1.5)


def by_numpy(weight):
    weight.detach().numpy()[:] *= 2


def other_data(weight):
    weight.data = weight.data + 1


def to_half_and_back(weight):
    weight.data = weight.data.half().float()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_variant_is_found_again_once_its_original_is_back_on_the_gpu(made):
    model = small().cuda()
    qnb.quantize(model, "w8a8")
    qnb.restore(model)
    before = len(made)
    qnb.quantize(model, "w8a8")
    assert len(made) == before


CHANGES = [fill, step, load, behind_torchs_back, by_numpy, other_data, to_half_and_back]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("while_quantized", [True, False])
def test_a_weight_that_changed_is_rounded_anew(change, while_quantized):
    model = small()
    weight = model[0].weight
    qnb.quantize(model, "w8a8")
    qnb.quantize(model, "w8a16")
    if not while_quantized:
        qnb.restore(model)
    change(weight)
    qnb.quantize(model, "w8a8")
    cache.clear()
    fresh = nn.Sequential(nn.Linear(48, 80))
    fresh[0].weight = nn.Parameter(weight.detach().clone())
    qnb.quantize(fresh, "w8a8")
    got, want = model[0].variant.plain(), fresh[0].variant.plain()
    assert all(torch.equal(got[n], want[n]) for n in want)
    qnb.restore(model)
    assert model[0].weight is weight


def test_other_weights_of_the_same_shape_are_not_mistaken(made):
    first = small()
    for scheme in ("w8a8", "w8a16"):
        qnb.quantize(first, scheme)
    del first
    for seed in range(5):  # the allocator hands the same addresses out again
        torch.manual_seed(seed)
        other = nn.Sequential(nn.Linear(48, 80), nn.Linear(80, 48))
        made.clear()
        qnb.quantize(other, "w8a8")
        assert made == ["0", "1"]


def test_weights_of_inference_mode_are_always_rounded(made):
    with torch.inference_mode():
        model = small()
    for scheme in ("w8a8", "w8a16", "w8a8"):
        qnb.quantize(model, scheme)
    assert len(made) == 6
    assert not cache.cached_bytes()


def test_a_rounding_or_a_scheme_that_was_registered_anew_is_another_recipe(made):
    from qnb import rounding, schemes

    model = small()
    qnb.quantize(model, "w8a8")
    qnb.quantize(model, "w8a16")
    before, families = schemes.find("w8a8"), list(schemes._families)
    try:
        schemes.register(type(before.__class__.__name__, (type(before),), {}))  # a family of the same name, anew
        qnb.quantize(model, "w8a8")
        assert model[0].variant.scheme is not before
    finally:
        schemes._families[:] = families
        schemes._found["w8a8"] = before
    assert len(made) == 6
    real = rounding._registry["nearest"]
    try:
        rounding.register("nearest")(lambda w, grid, dtype, statistics: real.choose(w.neg(), grid, dtype, statistics))
        qnb.quantize(model, "w8a8")
        assert len(made) == 8
    finally:
        rounding._registry["nearest"] = real


def test_the_oldest_go_first_beyond_the_limit(made, monkeypatch):
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(4)])
    qnb.quantize(model, "w8a8")
    size = model[0].variant.nbytes
    monkeypatch.setattr(cache, "CACHE_BYTES", 2 * size)
    qnb.quantize(model, "w8a16")
    assert cache.cached_bytes() == 2 * size
    made.clear()
    qnb.quantize(model, "w8a8", layers=["2", "3"])
    assert made == []
    assert cache.cached_bytes() == 2 * size
    qnb.quantize(model, "w8a8", layers=["0", "1"])
    assert made == ["0", "1"]
    monkeypatch.setattr(cache, "CACHE_BYTES", 0)
    qnb.quantize(model, "none")
    assert cache.cached_bytes() == 0


def test_what_is_cached_is_not_among_the_models_bytes():
    model = small()
    qnb.quantize(model, "w8a8")
    held = held_storages(model)
    qnb.quantize(model, "w8a16")
    assert held_storages(model) == held
    assert cache.cached_bytes() == sum(q.variant.nbytes for q in quantized_layers(model).values())


def test_cached_variants_die_with_their_model():
    model = small()
    qnb.quantize(model, "w8a8")
    qnb.quantize(model, "w8a16")
    gone = weakref.ref(model), weakref.ref(model[0].variant)
    assert cache.cached_bytes()
    gc.disable()
    try:
        del model
        assert [g() for g in gone] == [None, None]
        assert cache.cached_bytes() == 0
    finally:
        gc.enable()
    cache.shrink()
    assert not cache._made
    assert not cache._keys


def test_nothing_is_cached_of_a_model_that_let_its_originals_go():
    model = small()
    qnb.quantize(model, "w8a8")
    qnb.quantize(model, "w8a16", keep="none")
    gc.collect()
    assert cache.cached_bytes() == 0


def test_loaded_weights_are_not_taken_for_those_of_the_original(made):
    model = small()
    qnb.quantize(model, "w8a8")
    state = copy.deepcopy(model.state_dict())
    same = model[0].variant.plain()
    model.load_state_dict(state)  # the same bits, in a variant that nobody made from the original
    qnb.quantize(model, "w8a16")
    made.clear()
    qnb.quantize(model, "w8a8")
    assert made == ["0", "1"]
    assert all(torch.equal(t, same[n]) for n, t in model[0].variant.plain().items())


def test_a_copy_finds_its_own(made):
    model = small()
    qnb.quantize(model, "w8a8")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].original.weight.zero_()
    qnb.quantize(twin, "w8a16")
    assert (twin[0].variant.dequantize(torch.float32) == 0).all()
    qnb.quantize(model, "w8a16")
    assert (model[0].variant.dequantize(torch.float32) != 0).any()


def test_many_changes_leave_nothing_behind():
    model = small()
    for i in range(300):
        fill(model[0].weight if i % 3 else model[1].weight)
        qnb.quantize(model, ("w8a8", "w8a16")[i % 2])
        qnb.restore(model)
    cache.shrink()
    assert len(cache._made) <= 4
    assert len(cache._keys) <= 4
    assert len(cache._away) <= 4


class Writer(nn.Module):
    """A small recurrent network that generates: each step's input is the last step's output."""

    def __init__(self, layers=4, width=32):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x

    @torch.no_grad()
    def generate(self, x, steps=4):
        seen = []
        for _ in range(steps):
            x = self(x)
            seen.append(x)
            x = x / x.norm()
        return torch.stack(seen)


def test_500_random_swaps_against_a_generating_thread():
    """Every answer, of several forwards, is wholly that of one of the 81 states that the four layers can be in."""
    torch.manual_seed(0)
    model, schemes = Writer().eval(), ("none", "w8a8", "w8a16")
    originals, x = list(model.layers), torch.randn(1, 32)
    names = [f"layers.{i}" for i in range(4)]
    known = {}
    for state in itertools.product(schemes, repeat=4):
        for scheme in set(state):
            qnb.quantize(model, scheme, layers=[n for n, s in zip(names, state, strict=True) if s == scheme])
        known[bytes(model.generate(x).numpy())] = state
    assert len(known) == 81
    qnb.quantize(model, "none")
    rng, stop, seen, bad = random.Random(0), threading.Event(), [], []

    def read():
        while not stop.is_set():
            state = known.get(bytes(model.generate(x).numpy()))
            (bad if state is None else seen).append(state)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    state = ["none"] * 4
    try:
        for _ in range(500):
            scheme, changed = rng.choice(schemes), rng.sample(range(4), rng.randint(1, 4))
            qnb.quantize(model, scheme, layers=[names[i] for i in changed], progress=False)
            for i in changed:
                state[i] = scheme
            # Of the writer's own thread, between two of its changes: exactly the state that it asked for.
            assert known[bytes(model.generate(x).numpy())] == tuple(state)
    finally:
        stop.set()
        for reader in readers:
            reader.join(60)
    assert not bad
    assert len(set(seen)) > 20, "the readers saw hardly any state"
    qnb.quantize(model, "w8a8")
    qnb.restore(model)
    assert list(model.layers) == originals
