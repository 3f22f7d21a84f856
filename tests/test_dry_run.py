"""`dry_run`: what it foretells is what `quantize` then does, to the byte, and nothing is touched."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

import qnb
from qnb import rounding, schemes
from qnb.errors import BadInput, LayerRefused, NotQuantized, UnknownRounding, UnknownScheme
from qnb.model import dry_run as module
from qnb.model.dry_run import DryRun, shell_of
from qnb.model.linear import disk_bytes, held_storages
from qnb.schemes.grammar import parse
from qnb.schemes.w8a8 import W8A8

EVERY_SCHEME = [name for name in schemes.names() if name != "none"]


class Block(nn.Module):
    """Sides that are no multiple of any tile, so that padding shows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(192, 100), nn.Linear(100, 192, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """Two blocks between an embedding and an output embedding that share a weight, and two layers that share one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(33, 192)
        self.blocks = nn.Sequential(Block(), Block())
        self.left, self.right = nn.Linear(192, 192), nn.Linear(192, 192)
        self.right.weight = self.left.weight
        self.lm_head = nn.Linear(192, 33, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("table", torch.zeros(7, 3))

    def forward(self, ids):
        return self.lm_head(self.right(self.left(self.blocks(self.embed(ids)))))


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def model(request) -> Net:
    torch.manual_seed(0)
    return Net().to(request.param).eval()


def assert_foretold(model: nn.Module, scheme: str, **given) -> DryRun:
    """`dry_run`, then the same `quantize`: the same rows, coverage and bytes."""
    before = held_storages(model)
    ids = torch.arange(33).reshape(1, 33)
    foretold = qnb.dry_run(model, scheme, calibration=[ids], **given)
    assert (foretold.weight_bytes_before, foretold.original_bytes_before) == before
    report = qnb.quantize(model, scheme, progress=False, calibration=[ids], **given)
    rows = list(foretold.rows)
    if given.get("keep") == "none" or disk_bytes(model):  # no longer told: which weights were tied; not foretold: files
        rows = [dataclasses.replace(row, note=now.note) for row, now in zip(rows, report.rows, strict=True)]
    assert rows == list(report.rows)
    assert foretold.coverage == report.coverage
    assert (foretold.weight_bytes, foretold.original_bytes) == held_storages(model)
    return foretold


class TestForetold:
    @pytest.mark.parametrize("keep", ["memory", "none"])
    @pytest.mark.parametrize("scheme", EVERY_SCHEME)
    def test_bytes_kernels_and_coverage_of_every_scheme(self, model, scheme, keep):
        foretold = assert_foretold(model, scheme, keep=keep)
        assert foretold.weight_bytes < foretold.weight_bytes_before
        assert (foretold.original_bytes > 0) == (keep == "memory")

    @pytest.mark.parametrize("scheme", EVERY_SCHEME)
    def test_some_layers_after_others_and_back_again(self, model, scheme):
        assert_foretold(model, scheme, layers="*.down")
        assert_foretold(model, scheme, skip="blocks.1.*")
        assert_foretold(model, "none", layers=["blocks.0.*"])
        assert_foretold(model, scheme)
        assert_foretold(model, "none")

    @pytest.mark.parametrize("first", ["w8a8", "w4a16-g64-asym", "nf4-g64", "w8a8-outliers8"])
    def test_another_scheme_over_one(self, model, first):
        for scheme in (first, "w8a8-static-aasym", "w3a16-g64", first):
            assert_foretold(model, scheme)

    def test_tied_weights_that_go_apart_count_once_each(self, model):
        assert_foretold(model, "w8a8", layers="left")  # whose weight `right` still holds
        assert_foretold(model, "w8a8", layers="lm_head")  # whose weight is the embedding's
        assert_foretold(model, "none")

    @pytest.mark.parametrize("then", ["memory", "disk", "none"])
    @pytest.mark.parametrize("first", ["memory", "disk"])
    def test_originals_that_were_kept_in_one_way_and_then_in_another(self, model, first, then):
        assert_foretold(model, "w8a8", keep=first)
        assert_foretold(model, "w8a16", layers="blocks.0.*", keep=then)
        if then != "none":
            assert_foretold(model, "none")

    def test_a_layer_that_went_to_another_type_meanwhile(self, model):
        qnb.quantize(model, "w8a8", progress=False)
        model.half()
        assert_foretold(model, "none")

    def test_roundings_change_no_byte(self, model):
        asked = schemes.find("w4a16-g64-asym")
        assert {"nearest", "hqq", "awq"} <= set(rounding.names())
        for name in rounding.names():  # awq's divisor is foretold as well
            rounding.find(name, asked)
            assert_foretold(model, asked, rounding=name)

    @pytest.mark.parametrize("keep", ["memory", "none"])
    def test_a_recipe(self, model, keep):
        ids = torch.arange(33).reshape(1, 33)
        made = copy.deepcopy(model)
        for layers, scheme, how in (
            ("*.up", "w8a8", {"smooth": 0.5}),
            ("*.down", "w4a16-g64", {"rounding": "awq"}),
            (["left", "right"], "nf4-g64", {}),
            ("lm_head", "w8a16", {}),
        ):
            qnb.quantize(made, scheme, layers=layers, calibration=[ids], progress=False, **how)
        qnb.quantize(model, "w2a16-g32", layers=["blocks.0.up", "left"], progress=False)  # one goes on, one is in it
        foretold = assert_foretold(model, qnb.Recipe.of(made), keep=keep)
        assert "as the recipe says" in foretold.title
        assert len({row.scheme for row in foretold.rows}) >= 4

    def test_a_compiled_model_is_looked_through(self, model):
        foretold = qnb.dry_run(torch.compile(model), "w8a8")
        assert foretold == dataclasses.replace(qnb.dry_run(model, "w8a8"), available_bytes=foretold.available_bytes)


class TestNothingIsTouched:
    def test_neither_modules_nor_bits_nor_random_numbers(self, model):
        modules = {name: (m, sorted(m.__dict__)) for name, m in model.named_modules()}
        tensors = {name: (t, t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
        state = torch.random.get_rng_state()
        qnb.dry_run(model, "w8a8")
        assert {name: (m, sorted(m.__dict__)) for name, m in model.named_modules()} == modules
        for name, tensor in model.state_dict(keep_vars=True).items():
            assert tensor is tensors[name][0] and torch.equal(tensor, tensors[name][1])
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_weights_are_not_looked_at(self, model):
        nn.init.constant_(model.left.weight, float("nan"))
        assert qnb.dry_run(model, "w8a8").rows[4].scheme == "w8a8"


class TestMeta:
    @pytest.mark.parametrize("scheme", EVERY_SCHEME)
    def test_it_says_of_a_model_without_values_what_it_says_of_the_model(self, model, scheme):
        with torch.device("meta"):
            empty = Net().to(model.embed.weight.dtype)
            empty.right.weight, empty.lm_head.weight = empty.left.weight, empty.embed.weight
        here, there = qnb.dry_run(model, scheme), qnb.dry_run(empty, scheme)
        assert there.rows == here.rows and there.coverage == here.coverage
        assert (there.weight_bytes, there.original_bytes) == (here.weight_bytes, here.original_bytes)
        # It has to be loaded first.
        assert there.needed_bytes == {"cpu": here.weight_bytes_before + here.needed_bytes["cpu"]}
        assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))

    def test_a_model_of_a_hundred_gigabytes(self, monkeypatch):
        monkeypatch.setattr(module, "available_bytes", lambda device: 150 * 10**9)
        with torch.device("meta"):
            big = nn.Sequential(*(nn.Linear(25_000, 25_000, bias=False, dtype=torch.bfloat16) for _ in range(80)))
        foretold = qnb.dry_run(big, "w8a8")
        assert foretold.weight_bytes_before == 100 * 10**9
        padded = 80 * (25_024 * 25_024 + 4 * 25_000)
        assert foretold.weight_bytes == padded and foretold.needed_bytes == {"cpu": 100 * 10**9 + padded}
        assert not foretold.fits and "does not fit" in foretold.text()


class TestFits:
    def test_what_is_needed_is_what_is_new_while_the_originals_are_there(self, model):
        foretold = qnb.dry_run(model, "w8a8", keep="none")
        new = {row.name: row.bytes_after for row in foretold.rows if row.scheme == "w8a8" and row.name != "right"}
        assert foretold.needed_bytes == {"cpu": sum(new.values())}

    @pytest.mark.parametrize("spare, fits", [(0, True), (-1, False)])
    def test_the_edge(self, model, monkeypatch, spare, fits):
        needed = qnb.dry_run(model, "w8a8").needed_bytes["cpu"]
        monkeypatch.setattr(module, "available_bytes", lambda device: needed + spare)
        foretold = qnb.dry_run(model, "w8a8")
        assert foretold.fits is fits
        assert foretold.text().splitlines()[1].startswith("fits" if fits else "does not fit")


def test_a_scheme_whose_code_looks_at_values_is_run_on_random_ones():
    class Looking(W8A8):
        def variant(self, rounded, how, inputs):
            assert rounded.codes.any() and rounded.codes.float().std() > 1
            return super().variant(rounded, how, inputs)

    state = torch.random.get_rng_state()
    looking = Looking(parse("w8a8"))
    assert shell_of(looking, (40, 70), torch.bfloat16) == shell_of(schemes.find("w8a8"), (40, 70), torch.bfloat16)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "error, scheme, given",
    [
        (UnknownScheme, "w9a9", {}),
        (UnknownRounding, "w8a8", {"rounding": "sideways"}),
        (BadInput, "w8a8", {"keep": "nowhere"}),
        (LayerRefused, "w8a8", {"layers": "*.nowhere"}),
    ],
)
def test_it_refuses_what_quantize_refuses_in_the_same_words(model, error, scheme, given):
    with pytest.raises(error) as here:
        qnb.dry_run(model, scheme, **given)
    with pytest.raises(error) as there:
        qnb.quantize(model, scheme, **given)
    assert str(here.value) == str(there.value)


def test_without_originals_another_scheme_is_refused(model):
    qnb.quantize(model, "w8a8", keep="none", progress=False)
    for scheme in ("w8a16", "none"):
        with pytest.raises(NotQuantized) as here:
            qnb.dry_run(model, scheme)
        with pytest.raises(NotQuantized) as there:
            qnb.quantize(model, scheme, progress=False)
        assert str(here.value) == str(there.value)


def test_it_shows_both_tables_and_goes_into_json(model):
    foretold = qnb.dry_run(model, "w8a8")
    words = foretold.text()
    assert "would change to w8a8" in words and "kept originals" in words and foretold.coverage in words
    assert json.loads(json.dumps(foretold.to_dict()))["weight_bytes"] == foretold.weight_bytes
    assert foretold._repr_html_().count("<table") == 2
