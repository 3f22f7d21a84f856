"""The README does what it says: each Python block runs, magics included, and links lead somewhere."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

pytest.importorskip("IPython", reason="IPython is not installed")

from qnb.measure.profile import Profile  # noqa: E402
from qnb.measure.token import anyone_measures  # noqa: E402
from qnb.model.linear import quantized_layers  # noqa: E402

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def section(heading: str) -> str:
    return re.split(r"^## ", README.split(f"\n## {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


@pytest.fixture
def few_texts(monkeypatch):
    """Two evaluation texts instead of 64: what is held here is that the lines run, not what they measure."""
    from qnb import demo

    every = demo.demo_texts
    monkeypatch.setattr(demo, "demo_texts", lambda kind: every(kind)[:2])


def test_every_python_block_runs_in_a_shell(shell, few_texts, tmp_path, monkeypatch):
    """In the order of the page and in one namespace, the demo model standing in for the reader's own."""
    blocks = [code for language, code in FENCE.findall(README) if language == "python"]
    magic_lines = [line for code in blocks for line in code.splitlines() if line.startswith("%")]
    assert len(magic_lines) >= 10
    monkeypatch.chdir(tmp_path)
    saved = False
    for code in blocks:
        if not saved and "path/to/your/model" in code:
            shell.user_ns["model"].save_pretrained("path/to/your/model")
            shell.user_ns["tokenizer"].save_pretrained("path/to/your/model")
            saved = True
        shell.run_cell(code).raise_error()
        until = time.monotonic() + 120
        while anyone_measures() and time.monotonic() < until:
            time.sleep(0.05)  # a panel's own measuring, which a reader would see go on
    assert saved
    assert isinstance(shell.user_ns["hybrid"], Profile) and isinstance(shell.user_ns["before"], Profile)
    assert quantized_layers(shell.user_ns["model"]) == {}


@pytest.mark.parametrize("heading", ["Run it", "Test it"])
def test_one_command_under_the_heading(heading):
    fences = FENCE.findall(section(heading))
    assert [language for language, _ in fences] == ["bash"]
    assert fences[0][1].count("-c binder/constraints.txt") == fences[0][1].count("pip install")


def test_links_and_pictures_are_there_and_small():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target
    pictures = re.findall(r"!\[[^\]]+\]\((?!http)([^)]+)\)", README)
    assert pictures and all((ROOT / p).stat().st_size < 150_000 for p in pictures)
