"""Observers on inputs whose right range is known, and what they say of too little calibration."""

import math

import pytest
import torch
from torch import nn

import qnb
from qnb.errors import BadInput
from qnb.model import observers
from qnb.model.observers import divergence, find, fixed_scale
from qnb.rounding import Statistics


def seen(*texts: torch.Tensor) -> Statistics:
    """Of texts (R, K), all of their rows in the sample."""
    x = torch.cat(texts)
    low, high = torch.stack([t.amin(0) for t in texts]), torch.stack([t.amax(0) for t in texts])
    return Statistics(len(x), low, high, x.square().mean(0), x)


def test_the_names():
    assert observers.names() == ["average", "entropy", "minmax", "mse", "percentile"]


@pytest.mark.parametrize("name", ["percentile100", "percentile49", "percentile-1", "percentile99.99999999", "max", 3])
def test_an_unknown_name_is_refused_with_those_that_exist(name):
    with pytest.raises(BadInput, match="no observer is called .*average, entropy, minmax, mse, percentile") as caught:
        find(name)
    assert "\n" not in str(caught.value)


def test_minmax_takes_the_ends():
    statistics = seen(torch.tensor([[-1.0, 2.0], [0.5, 3.0]]), torch.tensor([[-4.0, 0.0]]))
    assert find("minmax")(statistics, True) == (-4.0, 3.0)
    assert fixed_scale("minmax", statistics, False) == (pytest.approx(4 / 127, rel=1e-7), 0)
    scale, zero = fixed_scale("minmax", statistics, True)
    assert (scale, zero) == (pytest.approx(7 / 255, rel=1e-7), round(-128 + 4 / (7 / 255)))


def test_average_moves_a_tenth_towards_each_text():
    texts = [torch.tensor([[-2.0, 10.0]]), torch.tensor([[-4.0, 20.0]]), torch.tensor([[-4.0, 1000.0]])]
    low, high = find("average")(seen(*texts), True)
    assert low == pytest.approx((-2 * 0.9 - 4 * 0.1) * 0.9 - 4 * 0.1)
    assert high == pytest.approx((10 * 0.9 + 20 * 0.1) * 0.9 + 1000 * 0.1)
    with pytest.raises(BadInput, match="averages over texts, and 1 reached it: give two or more"):
        find("average")(seen(texts[0]), True)


def test_percentile_is_the_nearest_rank():
    values = torch.arange(1.0, 1001).reshape(100, 10)
    statistics = seen(values[torch.randperm(100, generator=torch.Generator().manual_seed(1))])
    assert find("percentile99")(statistics, False) == (-990.0, 990.0)
    assert find("percentile99")(statistics, True) == (5.0, 995.0)
    assert find("percentile90")(seen(-values), False) == (-900.0, 900.0)
    assert find("percentile99.9")(statistics, False)[1] == 999.0
    with pytest.raises(BadInput, match=r"percentile99.9' needs 2,000 values .* gave 1,000: give longer texts"):
        find("percentile99.9")(statistics, True)
    with pytest.raises(BadInput, match="needs 10,000 values"):
        find("percentile")(statistics, False)


def test_mse_keeps_a_uniform_range_and_cuts_one_far_outlier():
    uniform = torch.linspace(-1, 1, 4000).reshape(400, 10)
    assert find("mse")(seen(uniform), False) == (-1.0, 1.0)
    assert find("mse")(seen(uniform), True) == (-1.0, 1.0)
    # 10^6 values of step s lose s^2 / 12 each, an outlier loses its distance squared: at t, (t / 127)^2 / 12 * 10^6
    # against (T - t)^2 with T = 3. Least where t * 10^6 / (12 * 127^2) = T - t, at t = 3 / (1 + 5.17) = 0.49: below 1,
    # where the bulk ends and loses far more. So the cut is at the first share that leaves the bulk whole.
    bulk = torch.linspace(-1, 1, 1_000_000).reshape(-1, 10)
    outlier = torch.zeros(1, 10)
    outlier[0, 0] = 3.0
    low, high = find("mse")(seen(torch.cat([bulk, outlier])), False)
    assert 1.0 <= high <= 3.0 * (1 / 3 + 2 / 40)
    low, high = find("mse")(seen(torch.cat([bulk, outlier])), True)
    assert low == -1.0 and 1.0 <= high <= 1.2


def test_entropy_keeps_a_uniform_distribution_and_cuts_a_tail():
    uniform = torch.linspace(-1, 1, 40_000).reshape(-1, 10)
    low, high = find("entropy")(seen(uniform), False)
    assert low == -1.0 and high == 1.0
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(20_000, 10, generator=generator)
    tail = normal.clone()
    tail[0, 0] = 100.0
    low, high = find("entropy")(seen(tail), True)
    assert low == float(normal.min())  # an end is cut, never widened
    assert 3 < high < 10
    with pytest.raises(BadInput, match="histogram of 2,048 bins, and the calibration texts gave 40"):
        find("entropy")(seen(torch.ones(4, 10)), False)
    assert find("entropy")(seen(torch.zeros(400, 10)), False) == (0.0, 0.0)


def test_the_divergence_is_that_of_the_slides():
    generator = torch.Generator().manual_seed(5)
    counts = torch.randint(0, 4, (40,), generator=generator).double()
    counts[7] = 9
    for kept in (8, 13, 40):
        p = [float(c) for c in counts[:kept]]
        inside = list(p)
        p[-1] += float(counts[kept:].sum())
        q = [0.0] * kept
        for level in range(8):
            bins = [i for i in range(kept) if i * 8 // kept == level]
            filled = [i for i in bins if p[i] > 0]
            for i in filled:
                q[i] = max(sum(inside[j] for j in bins) / len(filled), 1e-4)
        expected = 0.0
        for a, b in zip(p, q, strict=True):
            if a:
                expected += a / sum(p) * math.log((a / sum(p)) / (b / sum(q)))
        assert divergence(counts, kept, 8) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["minmax", "average", "percentile", "percentile99", "mse", "entropy"])
@pytest.mark.parametrize("scheme", ["w8a8-static", "w8a8-static-aasym"])
def test_each_serves_a_layer(name, scheme):
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randn(300, 64, generator=generator) for _ in range(3)]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32)).eval()
    exact = model(texts[0])
    qnb.quantize(model, scheme, observer=name, calibration=texts)
    assert model[0].variant.how.observer == name
    assert torch.linalg.norm(model(texts[0]) - exact) < 0.05 * torch.linalg.norm(exact)


def test_too_short_texts_are_refused_with_the_layer_and_nothing_changes():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(BadInput, match="layer 0: observer 'entropy' makes a histogram") as caught:
        qnb.quantize(model, "w8a8-static", observer="entropy", calibration=[torch.randn(3, 4)])
    assert "\n" not in str(caught.value)
    assert type(model[0]) is nn.Linear


def test_an_observer_with_nothing_to_observe_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(BadInput, match="scheme w8a8 fixes none: take a -static scheme"):
        qnb.quantize(model, "w8a8", observer="mse")
