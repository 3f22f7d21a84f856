"""The tutorials run from top to bottom and show what they showed when they were committed, apart from what varies.

nbval executes each in a kernel of its own and compares every output; `qnb/nbval_sanitize.cfg` says what varies and why.
Cells that show measurements alone are tagged `nbval-ignore-output`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qnb

TESTS = Path(__file__).parent
SANITIZE = Path(qnb.__file__).with_name("nbval_sanitize.cfg")
NOTEBOOKS = sorted((TESTS.parent / "notebooks").glob("*.ipynb"))


def outputs(notebook: Path) -> list[dict]:
    return [out for cell in json.loads(notebook.read_text("utf-8"))["cells"] for out in cell.get("outputs", [])]


def nbval(notebook: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    """The run of a notebook as a test, as the README has it."""
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "--nbval-cell-timeout=300", "-q"]
    shared = ["--nbval-sanitize-with", str(SANITIZE), "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, *shared, *options, str(notebook)],
        capture_output=True,
        text=True,
        cwd=TESTS,
        # Without what was added to the command that runs these tests: it means them, not the notebook's cells.
        env={**{k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"}, **environment},
    )


def test_there_are_notebooks():
    assert [path.name for path in NOTEBOOKS][:2] == ["01_quickstart.ipynb", "02_quality_gate.ipynb"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.name)
def test_it_runs_and_shows_the_same(notebook: Path, tmp_path: Path):
    """Progress bars are off, by the shell's own configuration: on a busy machine one more output would appear."""
    pytest.importorskip("nbval", reason="nbval is not installed")
    profile = tmp_path / "profile_default"
    profile.mkdir()
    (profile / "ipython_config.py").write_text("c.QnbMagics.progress = False\n", encoding="utf-8")
    done = nbval(notebook, "-rN", IPYTHONDIR=str(tmp_path))
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.name)
def test_it_is_committed_with_outputs_and_without_noise(notebook: Path):
    shown = outputs(notebook)
    assert shown and not [out for out in shown if out.get("name") == "stderr"]
    for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
        failed = [out for out in cell.get("outputs", []) if out["output_type"] == "error"]
        assert bool(failed) == ("raises-exception" in cell["metadata"].get("tags", []))
    assert not [out for out in shown if "application/vnd.jupyter.widget-view+json" in out.get("data", {})]
    words = json.dumps(shown)
    assert not re.search(r"(/home/|/root/|/tmp/|/usr/|[A-Z]:\\\\Users)", words), "a path of some machine"
    assert "Warning" not in words


class TestSanitizer:
    """What the shipped file lets differ, and what it does not."""

    def clean(self, words: str) -> str:
        plugin = pytest.importorskip("nbval.plugin", reason="nbval is not installed")
        for pattern, replacement in plugin.get_sanitize_patterns(SANITIZE.read_text("utf-8")):
            words = re.sub(pattern, replacement, words)
        return words

    def test_every_kernel_is_one_to_it(self):
        rows = re.findall(r"^QNB_ISA\((\w+),", (TESTS.parent / "csrc" / "isa.def").read_text("utf-8"), re.MULTILINE)
        assert len(rows) >= 6
        for name in (*rows, "reference", f"{rows[0]} / {rows[1]}"):
            assert self.clean(f"a {name} b") == "a KERNEL b"
            assert self.clean(f"<td>{name}</td>") == "<td>KERNEL</td>"

    def test_what_was_measured_may_differ_and_the_verdict_may_not(self):
        one = "passed: a <= 1\nmeasured: a 0.5 ± 0.1\n"
        assert self.clean(one) == self.clean("passed: a <= 1\nmeasured: a 0.6\nmeasured: note: waited 2 s\n")
        assert self.clean(one) != self.clean("broken: a <= 1\nmeasured: a 0.5 ± 0.1\n")
        assert self.clean(one) != self.clean("passed: a <= 2\nmeasured: a 0.5 ± 0.1\n")
        assert self.clean("broken: a <= 1; measured: 3") == self.clean("broken: a <= 1; measured: 4")
        assert self.clean("<p>measured: 3</p><p>1</p>") != self.clean("<p>measured: 3</p><p>2</p>")

    def test_free_memory_may_differ_and_what_is_needed_may_not(self):
        words = "fits: {} more on cpu at the worst moment, where {} can be had"
        assert self.clean(words.format("1.5 MB", "20.1 GB")) == self.clean(words.format("1.5 MB", "512 B"))
        assert self.clean(words.format("1.5 MB", "20.1 GB")) != self.clean(words.format("1.6 MB", "20.1 GB"))

    def test_a_gate_passes_with_other_numbers_and_fails_its_cell_where_it_breaks(self, tmp_path):
        """A user's own notebook: saved with numbers of another machine, and with a gate that no longer holds."""
        pytest.importorskip("nbval", reason="nbval is not installed")
        nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
        v4 = nbformat.v4
        setup = v4.new_code_cell("%load_ext qnb\nimport torch\nmodel = torch.nn.Sequential(torch.nn.Linear(64, 64))")
        saved = "passed: weights held <= {} MB\nmeasured: weights held 999 MB\n"
        cells = [
            v4.new_code_cell(f"%qcheck model --max-megabytes {limit}", outputs=[v4.new_output("stream", text=words)])
            for limit, words in ((1, saved.format(1)), (0, saved.format(0)), (2, saved.format(3)))
        ]
        expected = v4.new_code_cell("%qcheck model --max-megabytes 0", metadata={"tags": ["raises-exception"]})
        message = "broken: weights held <= 0 MB"
        expected.outputs = [
            v4.new_output("stream", text=f"{message}\nmeasured: weights held 5 MB\n"),
            v4.new_output("error", ename="BudgetBroken", evalue=f"{message}; measured: weights held 5 MB"),
        ]
        kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
        notebook = v4.new_notebook(cells=[setup, *cells, expected], metadata={"kernelspec": kernel})
        for number, cell in enumerate(notebook.cells, 1):
            cell.execution_count = number
        nbformat.write(notebook, tmp_path / "gate.ipynb")
        done = nbval(tmp_path / "gate.ipynb", "-rA")
        found = {cell: outcome for outcome, cell in re.findall(r"^(\w+) \S*::Cell (\d)", done.stdout, re.MULTILINE)}
        # kept; broken; the budget itself is another than that which was saved; broken as expected
        assert found == {"0": "PASSED", "1": "PASSED", "2": "FAILED", "3": "FAILED", "4": "PASSED"}, done.stdout
        assert "BudgetBroken: broken: weights held <= 0 MB" in done.stdout
