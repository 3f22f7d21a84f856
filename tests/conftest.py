"""What several tests share: a line that says what is being tested, and a shell with the extension loaded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


def pytest_report_header() -> list[str]:
    import torch

    import qnb
    from qnb import ops

    answers = ops.native_missing or f"compiled kernels, linear on {ops.kernel_for('linear_w8a8')}"
    return [f"qnb {qnb.__version__} from {qnb.__path__[0]}", f"torch {torch.__version__}; {answers}"]


@pytest.fixture
def shell() -> Iterator[object]:
    """A real IPython shell with `%load_ext qnb` done, an empty namespace, and progress bars off."""
    interactiveshell = pytest.importorskip("IPython.core.interactiveshell", reason="IPython is not installed")
    shell = interactiveshell.InteractiveShell.instance()
    shell.reset(new_session=True)
    shell.run_line_magic("load_ext", "qnb")
    shell.run_line_magic("config", "QnbMagics.progress = False")
    yield shell
    shell.run_line_magic("unload_ext", "qnb")
    shell.reset(new_session=True)
