"""`python -m qnb.notebook.run NOTEBOOK EXECUTED`: runs a notebook without a browser.

Prints what each cell shows, as text and as soon as the cell is done, and writes the notebook with its outputs to
EXECUTED, also where a cell fails. The exit code is 1 where one did.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

_CELL_SECONDS = 600
_RECORD = 'class="qnb-record'
_VIEW = "application/vnd.jupyter.widget-view+json"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class _Client(NotebookClient):
    """Forgets widgets that were closed, as a page does: progress bars leave no trace in the executed notebook."""

    def handle_comm_msg(self, outs: list, msg: dict, cell_index: int) -> None:
        super().handle_comm_msg(outs, msg, cell_index)
        if msg["msg_type"] == "comm_close":
            self.widget_state.pop(msg["content"]["comm_id"], None)

    def set_widgets_metadata(self) -> None:
        # No page brings a panel back to life; the record that it keeps beside its controls stands for it.
        for cell in self.nb.cells:
            if any(_RECORD in "".join(o.get("data", {}).get("text/html", "")) for o in cell.get("outputs", [])):
                cell.outputs = [o for o in cell.outputs if _VIEW not in o.get("data", {})]
        for cell in self.nb.cells:
            if cell.cell_type == "code":
                views = [output.get("data", {}).get(_VIEW) for output in cell.outputs]
                gone = [view is not None and view["model_id"] not in self.widget_state for view in views]
                cell.outputs = [output for output, drop in zip(cell.outputs, gone, strict=True) if not drop]
        if any(_VIEW in output.get("data", {}) for cell in self.nb.cells for output in cell.get("outputs", [])):
            super().set_widgets_metadata()


def run(notebook: Path, executed: Path) -> bool:
    """Executes `notebook` in its own folder and writes it to `executed`; returns whether every cell succeeded."""
    content = nbformat.read(notebook, as_version=4)
    content.metadata.pop("widgets", None)  # those of an earlier run
    client = _Client(
        content,
        timeout=_CELL_SECONDS,
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],  # a kernel's advice on encryption is not for one that runs right here
        resources={"metadata": {"path": str(notebook.parent)}},
        on_cell_executed=lambda cell, **_: print(_text(cell), end="", flush=True),
    )
    try:
        client.execute()
    except CellExecutionError as failure:
        print(_COLOUR.sub("", str(failure)), file=sys.stderr)
        return False
    finally:
        nbformat.write(content, executed)
    return True


def _text(cell: nbformat.NotebookNode) -> str:
    """What a terminal would have shown of a cell's outputs."""
    shown = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            shown.append(output.text)
        elif "data" in output and not any(kind.startswith(("image/", "application/")) for kind in output.data):
            shown.append(output.data.get("text/plain", "") + "\n")
    return "".join(f"{text.rstrip()}\n\n" for text in shown if text.strip())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m qnb.notebook.run", description=__doc__.split("\n\n")[1])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("executed", type=Path)
    given = parser.parse_args()
    sys.exit(0 if run(given.notebook, given.executed) else 1)
