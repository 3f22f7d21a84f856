"""The demo model: its weights, its texts, what it has learnt, and the script that trained it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import qnb.demo
from qnb.errors import BadInput, QnbError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

FILES = Path(qnb.demo.__file__).parent / "_demo"
WEIGHTS_SHA256 = "cbf432298303c7b86b322f609110a1927a0e4061be740b2207bbcf6020126809"


def sources(kind: str) -> set[str]:
    lines = (FILES / f"{kind}.jsonl").read_text("utf-8").splitlines()
    return {json.loads(line)["source"] for line in lines}


@pytest.fixture(scope="module")
def demo():
    return qnb.demo.demo_lm()


@pytest.fixture(scope="module")
def token_losses(demo) -> torch.Tensor:
    """Loss of each predicted token of the evaluation texts, (texts, 500): column i is the token at position i + 1."""
    model, tokenizer = demo
    rows = torch.tensor([tokenizer(text).input_ids for text in qnb.demo.demo_texts("evaluation")])
    losses = []
    with torch.inference_mode():
        for batch in rows.split(4):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
            losses.append(F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none"))
    return torch.cat(losses)


def test_weights_are_the_recorded_ones():
    assert hashlib.sha256((FILES / "model.safetensors").read_bytes()).hexdigest() == WEIGHTS_SHA256


def test_perplexity_on_the_evaluation_texts(token_losses):
    assert token_losses.numel() == 32_000
    assert math.exp(token_losses.double().mean()) == pytest.approx(8.4934, abs=0.0005)


def test_later_positions_profit_from_their_context(token_losses):
    def mean_loss(first: int, last: int) -> float:
        return token_losses[:, first - 1 : last].mean().item()

    assert mean_loss(384, 511) <= mean_loss(128, 255)


def test_model_is_ready_to_use(demo):
    model, _ = demo
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) == 11_474_240
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_other_dtypes_are_as_asked():
    model, _ = qnb.demo.demo_lm(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_loading_is_silent_and_leaves_progress_bars_as_they_were(capfd):
    enabled = transformers.utils.logging.is_progress_bar_enabled()
    qnb.demo.demo_lm()
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.is_progress_bar_enabled() == enabled


def test_greedy_generation_repeats_its_words(demo):
    model, tokenizer = demo
    prompt = tokenizer("def read_lines(path):\n", return_tensors="pt")
    first, second = (model.generate(**prompt, max_new_tokens=24, do_sample=False) for _ in range(2))
    assert first.shape[1] > prompt.input_ids.shape[1]
    assert tokenizer.decode(first[0]) == tokenizer.decode(second[0])


@pytest.mark.parametrize("kind", ["calibration", "evaluation"])
def test_tokenizer_starts_as_in_training_and_gives_every_text_back(demo, kind):
    _, tokenizer = demo
    texts = qnb.demo.demo_texts(kind)
    assert len(texts) == len(set(texts)) == 64
    for text in texts:
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
        assert len(ids) == 501
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_cuts_a_long_text_only_when_asked(demo):
    _, tokenizer = demo
    text = "x = 1\n" * 400
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert len(tokenizer(text, truncation=True).input_ids) == 512


def test_texts_share_no_file_and_none_was_trained_on():
    calibration, evaluation = sources("calibration"), sources("evaluation")
    assert calibration and evaluation and not calibration & evaluation
    for source in calibration | evaluation:
        assert int(hashlib.sha256(source.encode()).hexdigest(), 16) % 50 == 0, source


def test_the_callers_list_of_texts_is_the_callers_own():
    qnb.demo.demo_texts("evaluation").clear()
    assert len(qnb.demo.demo_texts("evaluation")) == 64


@pytest.mark.parametrize("kind", ["training", "", None, 3, ["evaluation"]])
def test_unknown_kind_of_texts(kind):
    with pytest.raises(BadInput) as caught:
        qnb.demo.demo_texts(kind)
    assert "'calibration' and 'evaluation'" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int8, "float32", None])
def test_a_dtype_that_cannot_compute(dtype):
    with pytest.raises(BadInput, match="float type"):
        qnb.demo.demo_lm(dtype)


def test_without_transformers_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(QnbError, match=r'pip install "qnb\[notebook\]"') as caught:
        qnb.demo.demo_lm()
    assert isinstance(caught.value, ImportError) and "\n" not in str(caught.value)


def test_nothing_is_fetched(monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError(f"a network connection was tried: {arguments}")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    qnb.demo.demo_lm()


class TestTrainingScript:
    """`python -m qnb._demo.train`, on a library small enough for a test."""

    @pytest.fixture()
    def library(self, tmp_path) -> Path:
        """40 files of training text and the held-out ones among the first 200 names."""
        from qnb._demo import train

        folder = tmp_path / "library"
        (folder / "site-packages").mkdir(parents=True)
        names = [f"module_{i}.py" for i in range(200)]
        held_out = [name for name in names if train.is_held_out(name)]
        assert len(held_out) >= 2
        for number, name in enumerate([*[n for n in names if n not in held_out][:40], *held_out]):
            lines = (f"def function_{number}_{i}(value):\n    return value * {i} + {number}\n\n" for i in range(120))
            (folder / name).write_text("".join(lines), "utf-8")
        (folder / "bad_syntax.py").write_text("def (:\n", "utf-8")
        (folder / "bytes.py").write_bytes(b"x = '\xff'\n")
        (folder / "site-packages" / "installed.py").write_text("x = 1\n", "utf-8")
        return folder

    def test_takes_text_files_of_the_library_alone(self, library):
        from qnb._demo import train

        files = list(train.source_files(library))
        names = [file.name for file in files]
        assert names == sorted(names)
        assert not {"bad_syntax.py", "bytes.py", "site-packages/installed.py"} & set(names)
        assert [file.held_out for file in files] == [train.is_held_out(name) for name in names]

    def test_trains_resumes_and_writes_what_demo_lm_reads(self, library, tmp_path):
        from qnb._demo import train

        out = tmp_path / "out"
        options = ["--library", str(library), "--context", "32", "--batch", "2", "--minutes", "0.02", "--no-compile"]
        command = [sys.executable, "-m", "qnb._demo.train", str(out), *options, "--device", "cpu"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
        assert "steps" in done.stdout

        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(out)
        assert tokenizer("value").input_ids[0] == tokenizer.eos_token_id == train.END_OF_TEXT_ID
        assert tokenizer.model_max_length == 32
        for kind in ("evaluation", "calibration"):
            for line in (out / f"{kind}.jsonl").read_text("utf-8").splitlines():
                assert train.is_held_out(json.loads(line)["source"])

        def loss(model) -> float:
            text = (library / "module_0.py").read_text("utf-8")
            rows = torch.tensor([tokenizer(text).input_ids[: 33 * 20]]).view(20, 33)
            with torch.no_grad():
                return train.loss_of(model, rows, "cpu").item()

        torch.manual_seed(0)
        fresh = loss(train.new_model(32))
        trained = transformers.LlamaForCausalLM.from_pretrained(out)
        assert trained.dtype == torch.bfloat16
        assert loss(trained) < fresh
        train.main([str(out), *options, "--device", "cpu", "--resume", str(out)])
        assert loss(transformers.LlamaForCausalLM.from_pretrained(out)) < loss(trained)

    def test_too_little_text_is_said_in_one_line(self, tmp_path):
        from qnb._demo import train

        (tmp_path / "one.py").write_text("x = 1\n", "utf-8")
        with pytest.raises(SystemExit, match="a context of 512 needs more; give a larger --library"):
            train.main([str(tmp_path / "out"), "--library", str(tmp_path)])

    def test_held_out_texts_are_those_shipped(self):
        from tokenizers import Tokenizer

        from qnb._demo import train

        library = train.standard_library()
        if platform.python_version() != "3.11.7" or not (library / "test" / "test_difflib.py").exists():
            pytest.skip("needs the whole library of Python 3.11.7, from which the texts were cut")
        held_out = [file for file in train.source_files(library) if file.held_out]
        tokenizer = Tokenizer.from_file(str(FILES / "tokenizer.json"))
        for kind, stretches in train.held_out_stretches(tokenizer, held_out).items():
            assert {stretch.source for stretch in stretches} == sources(kind)
            assert [stretch.text for stretch in stretches] == qnb.demo.demo_texts(kind)
