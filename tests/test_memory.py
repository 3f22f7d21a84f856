"""Ten thousand calls leave memory flat."""

import gc

import pytest
import torch
from torch import nn

import qnb
from qnb.model import cache
from qnb.model.linear import original_pass

psutil = pytest.importorskip("psutil", reason="psutil is not installed")

# A call that kept one row of its output would leave twice as much.
BOUND = 4 * 2**20


def resident():
    gc.collect()
    return psutil.Process().memory_info().rss


def growth(call, count, warm_up):
    """Bytes by which the process grows in `count` calls, and new tensors, once `warm_up` calls have been made."""
    for i in range(warm_up):
        call(i)
    tensors, before = live(), resident()
    for i in range(count):
        call(i)
    return resident() - before, live() - tensors


def live():
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256)).eval()


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_forwards(model, scheme):
    qnb.quantize(model, scheme)
    inputs = [torch.randn(m, 64) for m in (1, 2, 3, 5)]
    given = torch.randn(2, 64, requires_grad=True)

    def call(i):
        if i % 10 == 9:
            model(given).sum().backward()
        elif i % 10 == 8:
            with original_pass(), torch.no_grad():
                model(inputs[i % 4])
        else:
            with torch.no_grad():
                model(inputs[i % 4])

    grown, tensors = growth(call, 10_000, 1_000)
    assert grown < BOUND
    assert tensors == 0


@pytest.mark.parametrize("keep", ["memory", "disk"])
@pytest.mark.parametrize("cached", [True, False])
def test_changes(keep, cached, monkeypatch):
    model = nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 128))
    monkeypatch.setattr(cache, "CACHE_BYTES", cache.CACHE_BYTES if cached else 0)
    schemes = ("w8a8", "w8a16", "none")

    def call(i):
        qnb.quantize(model, schemes[i % 3], keep=keep, progress=False)
        model.state_dict()
        qnb.layers(model)

    grown, tensors = growth(call, 600, 60)
    assert grown < BOUND
    assert tensors == 0


def test_original_passes_of_an_original_on_disk_under_autocast():
    """Autocast keeps the cast of every parameter until it ends; one made for a pass must not be among them."""
    model = nn.Sequential(nn.Linear(1024, 1024))
    model[0].weight = nn.Parameter(torch.randn(1024, 1024).T)  # whose mapping lies otherwise
    x = torch.randn(2, 1024)
    qnb.quantize(model, "w8a16", keep="disk")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), original_pass():
        grown, tensors = growth(lambda i: model(x), 40, 3)  # a cast takes 2 MiB
        assert torch.is_autocast_cache_enabled()
    assert grown < 20 * 2**20 and tensors == 0
