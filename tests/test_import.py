"""`import qnb` and the extension stay light: the libraries of figures, widgets and models load when they are used."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

HEAVY = ("transformers", "matplotlib", "ipywidgets")


def heavy_after(code: str, heavy: tuple[str, ...]) -> list[str]:
    """Which of the `heavy` packages a fresh Python holds once it has run `code`, apart from those `IPython` brought."""
    script = f"import sys\nbefore = set()\n{code}\nimport json\nprint(json.dumps(sorted(set(sys.modules) - before)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert any(name == "qnb" or name.startswith("qnb.") for name in loaded)
    return [name for name in heavy if name in loaded]


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# A package that is not there cannot be imported: the test would pass whatever the code does.
pytestmark = pytest.mark.skipif(
    not all(installed(name) for name in HEAVY), reason=f"needs {', '.join(HEAVY)} installed, to see that none is loaded"
)


def test_import_alone():
    assert heavy_after("import qnb", (*HEAVY, "IPython")) == []


def test_the_public_names_that_need_no_model_library():
    names = ("quantize", "restore", "layers", "evaluate", "profile", "monitor")
    code = f"import qnb\nfor name in {names}: getattr(qnb, name)"
    assert heavy_after(code, (*HEAVY, "IPython")) == []


def test_the_extension_loaded_as_a_shell_loads_it():
    pytest.importorskip("IPython", reason="IPython is not installed")
    code = (
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance()\n"
        "before = set(sys.modules)\n"
        "assert shell.run_line_magic('load_ext', 'qnb') is None\n"
        "assert 'quantize' in shell.magics_manager.magics['line']"
    )
    assert heavy_after(code, HEAVY) == []


def test_a_bar_in_a_notebook_without_widgets_gives_no_advice():
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    code = (
        "import sys, warnings, ipykernel.zmqshell\n"  # by which tqdm knows a notebook
        "sys.modules['ipywidgets'] = None\n"
        "from qnb.progress import progress_bar\n"
        "with warnings.catch_warnings(record=True) as said, progress_bar(1, 'waiting', True) as bar:\n"
        "    bar.update()\n"
        "assert not said, said[0].message"
    )
    assert heavy_after(code, ()) == []
