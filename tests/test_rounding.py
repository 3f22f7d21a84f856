"""Roundings: each held to its paper's formula, written down here once more in float64 with plain loops."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

import qnb
from qnb import rounding, schemes
from qnb.errors import BadInput, UnknownRounding
from qnb.rounding import Statistics
from qnb.rounding.clipping import BOTH_WAYS, FACTORS, REFITS
from qnb.rounding.gptq import inverse_factor
from qnb.schemes.plain import build

N, K, ROWS = 6, 150, 400  # the last group of 64 is short
ALL = ["w8a16", "w8a16-g64", "w8a8-tensor", "w4a16-g64", "w3a16-g32-asym", "w2a16-channel", "nf4-g64", "fp8"]


def statistics_of(x: Tensor) -> Statistics:
    """Of rows (R, K), all of them in the sample."""
    low, high = x.amin(0, keepdim=True), x.amax(0, keepdim=True)
    hessian = (x.double().T @ x.double() / len(x)).float()
    return Statistics(len(x), low, high, x.double().square().mean(0).float(), x, hessian)


@pytest.fixture(scope="module")
def case() -> tuple[Tensor, Statistics]:
    """A weight, and correlated inputs of which some channels are wide and one is never used."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(N, K, generator=generator) * 0.05
    mixed = torch.randn(ROWS, 40, generator=generator) @ torch.randn(40, K, generator=generator)
    x = mixed + torch.randn(ROWS, K, generator=generator)
    x *= torch.rand(K, generator=generator) ** 3 * 4
    x[:, 17] = 0
    return weight, statistics_of(x)


def chosen(name: str, scheme: str, weight: Tensor, statistics: Statistics | None, dtype=torch.float32):
    asked = schemes.find(scheme)
    return rounding.find(name, asked).choose(weight, asked.grid, dtype, statistics), asked.grid


def output_error(weight: Tensor, rounded, grid, hessian: Tensor) -> float:
    value = grid.values(rounded.codes, rounded.levels).double()
    if rounded.divisor is not None:
        value = value / rounded.divisor.double()
    difference = value - weight.double()
    return float(((difference @ hessian.double()) * difference).sum())


def code_of(value: float, levels, row: int, column: int, grid) -> int:
    """The code nearest to `value`, found by looking at every code."""
    codes = range(grid.low, grid.high + 1) if levels.table is None else range(len(levels.table))
    return min(codes, key=lambda code: abs(value_of(code, levels, row, column) - value))


def value_of(code: int, levels, row: int, column: int) -> float:
    group = column // levels.group
    plain = code if levels.table is None else float(levels.table[code])
    zero = 0 if levels.zero is None else float(levels.zero[row, group])
    return (plain - zero) * float(levels.scale[row, group])


@pytest.mark.parametrize("scheme", ["w4a16-g64", "w3a16-g32-asym", "nf4-g64", "kmeans3-g64"])
def test_gptq_is_algorithm_1_of_the_paper(case, scheme):
    weight, statistics = case
    got, grid = chosen("gptq", scheme, weight, statistics)
    levels = got.levels
    hessian = statistics.hessian.double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    left = weight.double().clone()
    inverse = torch.linalg.inv(hessian)
    # Optimal brain surgery, a column at a time: no blocks, no Cholesky factor, the inverse shrunk by elimination.
    for column in sorted(range(K), key=lambda k: (-float(statistics.hessian[k, k]), k)):
        for row in range(N):
            code = code_of(float(left[row, column]), levels, row, column, grid)
            assert int(got.codes[row, column]) == code, (row, column)
            error = (float(left[row, column]) - value_of(code, levels, row, column)) / inverse[column, column]
            left[row] -= error * inverse[column]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1  # rounded: never read again
    nearest, _ = chosen("nearest", scheme, weight, statistics)
    assert output_error(weight, got, grid, statistics.hessian) < 0.8 * output_error(
        weight, nearest, grid, statistics.hessian
    )


def test_gptq_does_not_depend_on_the_size_of_its_blocks(case, monkeypatch):
    weight, statistics = case
    whole, _ = chosen("gptq", "w4a16-g64", weight, statistics)
    monkeypatch.setattr("qnb.rounding.gptq.BLOCK", 7)
    assert torch.equal(chosen("gptq", "w4a16-g64", weight, statistics)[0].codes, whole.codes)


def test_gptq_without_correlations_is_mse(case):
    weight, statistics = case
    alone = dataclasses.replace(statistics, mean_square=torch.ones(K), hessian=torch.eye(K))
    got, _ = chosen("gptq", "w4a16-g64", weight, alone)
    assert torch.equal(got.codes, chosen("mse", "w4a16-g64", weight, alone)[0].codes)


def test_a_hessian_that_is_not_positive_definite_is_damped_and_that_is_said(case):
    weight, statistics = case
    eigen = torch.linalg.eigh(statistics.hessian.double())
    mean = float(statistics.hessian.diagonal().mean())
    values = eigen.eigenvalues.clone()
    values[:3] = -0.05 * mean
    broken = (eigen.eigenvectors * values @ eigen.eigenvectors.T).float()
    upper, note = inverse_factor(broken)
    assert note == "Hessian not positive definite: damped by 0.1 of its mean"
    damped = broken.double() + 0.1 * broken.double().diagonal().mean() * torch.eye(K)
    assert torch.allclose(upper.double().T @ upper.double(), torch.linalg.inv(damped), rtol=1e-3, atol=1e-5 / mean)
    assert inverse_factor(statistics.hessian)[1] is None
    with pytest.raises(BadInput, match="not positive definite"):
        inverse_factor(-statistics.hessian)
    with pytest.raises(BadInput, match="not positive definite"):
        inverse_factor(torch.full((4, 4), torch.nan))


def least_error(found, grid):
    """Of the search for a clipped range: `found(factor)` is the error, and by what its values are best multiplied."""
    factors = BOTH_WAYS if grid.lopsided else FACTORS
    (error, t), factor = min(((found(f), f) for f in factors), key=lambda pair: pair[0][0])
    for _ in range(REFITS):
        moved = factor * t
        if found(moved)[0] < error:
            (error, t), factor = found(moved), moved
    return error


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scheme", ["w4a16-g64", "w3a16-g32-asym", "nf4-g64", "fp8", "w8a8-tensor"])
def test_mse_takes_the_share_of_the_range_with_the_least_squared_error(case, scheme, weighted):
    weight, statistics = case
    got, grid = chosen("mse", scheme, weight, statistics if weighted else None)
    importance = statistics.mean_square.double() if weighted else torch.ones(K, dtype=torch.float64)
    group = got.levels.group
    rows = [range(N)] if grid.group < 0 else [[row] for row in range(N)]
    for together in rows:
        for start in range(0, K, group):
            here = list(together), slice(start, start + group)
            w, m = weight.double()[here], importance.expand(N, K)[here]

            def found(factor, here=here, w=w, m=m):
                levels = grid.fit(weight, torch.float32, clip=torch.full(got.levels.scale.shape, factor))
                q = grid.values(grid.nearest(weight, levels), levels).double()[here]
                return float((m * (q - w).square()).sum()), float((m * q * w).sum() / (m * q * q).sum())

            q = grid.values(got.codes, got.levels).double()[here]
            assert math.isclose(float((m * (q - w).square()).sum()), least_error(found, grid), rel_tol=1e-4)


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w3a16-g32", "w2a16-channel", "nf4-g32"])
def test_a_weight_costs_as_much_as_its_negation(scheme):
    """Though a lopsided grid reaches further on one side of 0: the scale's sign says on which."""
    asked = schemes.find(scheme)
    grid = asked.grid
    values = torch.tensor(grid.table) if scheme == "nf4-g32" else torch.arange(grid.low, grid.high + 1.0)
    weight = 0.25 * values.repeat(32)[:64].view(2, 32)
    for sign in (1, -1):
        levels = grid.fit(sign * weight, torch.bfloat16)
        got, _ = chosen("mse", scheme, sign * weight, None, torch.bfloat16)
        assert torch.equal(got.levels.scale.sign(), torch.full_like(levels.scale, sign))
        size = (grid.values(got.codes, got.levels) - sign * weight).square().sum()
        assert size < 1e-3 * weight.square().sum()
        assert torch.equal(got.codes, chosen("mse", scheme, weight, None, torch.bfloat16)[0].codes)
        assert (chosen("nearest", scheme, sign * weight, None)[0].levels.scale > 0).all()


def lloyd(values: Tensor, mass: Tensor, centres: Tensor) -> Tensor:
    for _ in range(100):
        owner = (values[:, None] - centres).abs().argmin(1)
        means = [(mass * values)[owner == i].sum() / mass[owner == i].sum() for i in range(len(centres))]
        centres = torch.stack([c if m.isnan() else m for c, m in zip(centres, means, strict=True)]).sort().values
    return centres


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scheme", ["kmeans3-g32", "kmeans4-g64"])
def test_kmeans_is_lloyds_algorithm_between_least_squares_of_the_scales(case, scheme, weighted):
    weight, statistics = case
    asked = schemes.find(scheme)
    grid, w = asked.grid, weight.double()
    m = (statistics.mean_square.double() if weighted else torch.ones(K, dtype=torch.float64)).expand(N, K)
    levels = grid.fit(weight, torch.float32, importance=statistics.mean_square if weighted else None)
    error = float((m * (grid.values(grid.nearest(weight, levels), levels).double() - w).square()).sum())

    def each_group(values: Tensor) -> Tensor:
        """(N, K): the sum of each weight's group."""
        return torch.cat([part.sum(1, keepdim=True).expand_as(part) for part in values.split(grid.group, 1)], 1)

    def widest(part: Tensor) -> Tensor:
        return part.gather(1, part.abs().argmax(1, keepdim=True)).expand_as(part)

    scale = torch.cat([widest(part) for part in w.split(grid.group, 1)], 1)
    order = (w / scale).flatten().sort()
    share = (m * scale.square()).flatten()[order.indices].cumsum(0)
    wanted = (torch.arange(2**grid.bits) + 0.5) / 2**grid.bits * share[-1]
    centres = order.values[torch.searchsorted(share, wanted)]
    errors = []
    for _ in range(6):
        centres = lloyd((w / scale).flatten(), (m * scale.square()).flatten(), centres)
        table = centres[((w / scale)[..., None] - centres).abs().argmin(-1)]
        errors.append(float((m * (table * scale - w).square()).sum()))
        scale = each_group(m * table * w) / each_group(m * table.square())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.98 * errors[0]  # fitting the scales is worth it
    # Lloyd's algorithm ends in one of many places; here it ran on the values, there on a histogram of them.
    assert error < 1.01 * errors[-1]


@pytest.mark.parametrize("rows", [100, ROWS])  # fewer than channels, and more
def test_awq_is_equations_4_and_5_of_the_paper(case, rows):
    weight, statistics = case
    x = statistics.sample[:rows]
    got, grid = chosen("awq", "w4a16-g64", weight, statistics_of(x))
    losses = []
    for step in range(21):
        magnitude = x.double().abs().mean(0)
        scale = torch.where(magnitude > 0, magnitude, 1) ** (step / 20)
        seen = magnitude > 0
        scale = torch.where(seen, scale / (scale[seen].max() * scale[seen].min()).sqrt(), 1)
        scaled = (weight.double() * scale).float()
        levels = grid.fit(scaled, torch.float32)
        value = grid.values(grid.nearest(scaled, levels), levels).double() / scale
        losses.append((float(((value - weight.double()) @ x.double().T).square().sum()), step, scale))
    _, step, scale = min(losses, key=lambda loss: loss[0])
    assert 0 < step < 20  # else the case shows nothing
    assert torch.allclose(got.divisor.double(), scale, rtol=1e-5)
    # The clipping search: each group by itself, the output error of that group's inputs.
    scaled, inputs = weight * got.divisor, x.double() / got.divisor.double()
    for start in range(0, K, 64):
        columns = slice(start, start + 64)
        for row in range(N):
            wanted = inputs[:, columns] @ scaled.double()[row, columns]

            def outputs(codes, levels, row=row, columns=columns):
                return inputs[:, columns] @ grid.values(codes, levels).double()[row, columns]

            def found(factor, wanted=wanted, outputs=outputs):
                levels = grid.fit(scaled, torch.float32, clip=torch.full((N, 3), factor))
                given = outputs(grid.nearest(scaled, levels), levels)
                return float((given - wanted).square().sum()), float(given @ wanted / (given @ given))

            error = float((outputs(got.codes, got.levels) - wanted).square().sum())
            assert math.isclose(error, least_error(found, grid), rel_tol=1e-3)


@pytest.mark.parametrize("name", ["mse", "gptq", "awq", "nearest"])
@pytest.mark.parametrize("scheme", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_pair_gives_codes_of_its_grid_no_worse_than_nearest(case, name, scheme, dtype):
    weight, statistics = case
    got, grid = chosen(name, scheme, weight.to(dtype).float(), statistics, dtype)
    assert got.codes.shape == (N, K)
    assert torch.equal(got.levels.scale.to(dtype).float(), got.levels.scale)
    again = grid.nearest(grid.values(got.codes, got.levels), got.levels)
    values = grid.values(got.codes, got.levels)
    assert torch.equal(grid.values(again, got.levels), values)  # every value is one of the grid
    nearest, _ = chosen("nearest", scheme, weight.to(dtype).float(), None, dtype)
    error = {r: output_error(weight, r, grid, statistics.hessian) for r in (got, nearest)}
    assert error[got] <= error[nearest] * (1.02 if grid.bits == 8 else 1.2)


@pytest.mark.parametrize("name", ["mse", "gptq", "awq", "hqq", "nearest"])
def test_a_weight_of_zeros_and_a_single_one(name):
    scheme = "w4a16-g64-asym"
    for weight in (torch.zeros(3, 5), torch.full((1, 1), -0.3)):
        x = torch.randn(9, weight.shape[1], generator=torch.Generator().manual_seed(0))
        got, grid = chosen(name, scheme, weight, statistics_of(x))
        value = grid.values(got.codes, got.levels)
        value = value if got.divisor is None else value / got.divisor
        assert torch.allclose(value, weight, rtol=0.05)


@pytest.mark.parametrize("scheme", ["w4a16-g64-asym", "w2a16-g32-asym", "w3a16-channel-asym"])
def test_hqq_is_the_half_quadratic_splitting_of_its_authors(case, scheme):
    weight = case[0] * 20  # wide enough for errors that count as outliers
    got, grid = chosen("hqq", scheme, weight, None)
    start = grid.fit(weight, torch.float32)
    p, outliers_seen = 0.7, 0
    for row in range(N):
        for group in range(start.scale.shape[1]):
            w = [float(v) for v in weight[row, group * start.group : (group + 1) * start.group]]
            s, z, beta, tried = float(start.scale[row, group]), float(start.zero[row, group]), 10.0, []
            for _ in range(21):
                q = [min(max(round(v / s + z), grid.low), grid.high) for v in w]
                e = [v - (c - z) * s for v, c in zip(w, q, strict=True)]
                tried.append((sum(abs(v) ** p for v in e), s, z))
                shrunk = [math.copysign(max(abs(v) - abs(v) ** (p - 1) / beta, 0), v) if v else 0.0 for v in e]
                outliers_seen += sum(v != 0 for v in shrunk)
                beta *= 1.01
                t = [v - o for v, o in zip(w, shrunk, strict=True)]
                moved = sum((c - z) * v for c, v in zip(q, t, strict=True)) / sum((c - z) ** 2 for c in q)
                z, s = sum(c - v / s for c, v in zip(q, t, strict=True)) / len(w), moved
            error, s, z = min(tried)
            mine = (weight - grid.values(got.codes, got.levels))[row, group * start.group : (group + 1) * start.group]
            # A code on the edge may fall otherwise in f32 and lead elsewhere, to an error as small.
            assert float(mine.double().abs().pow(p).sum()) == pytest.approx(error, rel=0.02)
    assert outliers_seen
    nearest, _ = chosen("nearest", scheme, weight, None)

    def power(rounded) -> float:
        return float((weight - grid.values(rounded.codes, rounded.levels)).abs().pow(p).sum())

    assert power(got) < 0.97 * power(nearest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_zero_points_are_saved_as_floats_and_come_back(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 8)).to(dtype)
    x = torch.randn(5, 128, dtype=dtype)
    qnb.quantize(model, "w4a16-g64-asym", rounding="hqq")
    variant = model[0].variant
    plain = variant.plain()
    assert plain["weight_zero"].dtype == dtype and (plain["weight_zero"] != plain["weight_zero"].round()).any()
    again = build(variant.scheme, variant.how, variant.shape, plain)
    assert torch.equal(again.levels.zero, variant.levels.zero)
    assert torch.equal(again.plain()["weight_zero"], plain["weight_zero"])
    exact = x.double() @ variant.dequantize(torch.float32).double().T + model[0].bias.double()
    assert torch.allclose(model(x).double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("name", "scheme", "words"),
    [
        ("hqq", "w4a16-g64", "such as w4a16-g64-asym"),
        ("hqq", "nf4-g64", "such as w4a16-g64-asym"),
        ("hqq", "w8a16-tensor-asym", "take -gN or -channel"),
        ("mse", "kmeans4-g64", "take nearest"),
    ],
)
def test_a_pair_that_makes_no_sense_is_refused_by_name(name, scheme, words):
    with pytest.raises(UnknownRounding, match=words) as caught:
        rounding.find(name, schemes.find(scheme))
    assert f"rounding {name!r} does not fit scheme {scheme}" in str(caught.value) and "\n" not in str(caught.value)


def test_what_was_damped_is_said_in_the_report(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8))
    monkeypatch.setattr("qnb.rounding.gptq.DAMPING", (-2.0, 0.1))  # the first share makes every Hessian indefinite
    report = qnb.quantize(model, "w4a16-g32", rounding="gptq", calibration=[torch.randn(99, 64)])
    assert report.rows[0].note == "Hessian not positive definite: damped by 0.1 of its mean"
    assert "damped by 0.1" in str(report) and "damped by 0.1" in str(qnb.layers(model))


def test_statistics_that_are_not_needed_are_used_where_texts_are_given():
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randn(50, 64, generator=generator) * torch.linspace(0.01, 5, 64)]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8))
    qnb.quantize(model, "w3a16-g32", rounding="mse")
    without = model[0].variant.codes()
    qnb.quantize(model, "w3a16-g32", rounding="mse", calibration=texts)
    assert not torch.equal(model[0].variant.codes(), without)
