"""The live panel as a person meets it: a browser opens the tutorial in JupyterLab and in Notebook 7 and clicks.

QNB_SCREENSHOTS=FOLDER keeps pictures of what the browser saw.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

import qnb
from qnb import schemes

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("anywidget", reason="anywidget is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "06_live_panel.ipynb"
FLAGS = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"
SCHEME = "w4a16-g64" if "w4a16-g64" in schemes.names() else "w8a8"
# The one layer of the demo model that changes what it writes when it runs in either scheme.
LAYER = "model.layers.7.mlp.down_proj"
# Generates for `most` seconds, or some seconds more once the layer has changed. Notes what the layer was in every pass:
# it may not change inside one `generate`.
GENERATES = f"""
import threading, time
kinds, mine = [], threading.get_ident()
def note(*_):
    if threading.get_ident() == mine:
        kinds[-1].add(type(model.get_submodule({LAYER!r})).__name__)
handle = model.register_forward_pre_hook(note)
ends = time.monotonic() + most
while time.monotonic() < ends:
    kinds.append(set())
    ids = tokenizer("The moon", return_tensors="pt")
    model.generate(**ids, max_new_tokens=64, do_sample=False)
    if len(kinds) == 1:
        print("writing", flush=True)
    elif "QLinear" in kinds[-1] - kinds[-2]:
        ends = time.monotonic() + 5
handle.remove()
print(sorted(set().union(*kinds)), max(map(len, kinds)))
"""
MEASURES = """
from qnb.measure.accuracy import QUANTITIES
samples = [dict(sample.kwargs) for sample in panel.session.stages.evaluation.samples]
found = qnb.evaluate(model, samples, progress=False)
print(*(q.show(getattr(found, q.field)) for q in QUANTITIES if q.field in ("perplexity", "kl")), sep="|")
"""
PATIENCE_MS = 100_000  # on a busy machine; nothing waits so long where it is not


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """A Jupyter server of its own, with no settings of this machine: its address and its folder."""
    home = tmp_path_factory.mktemp("jupyter")
    work = home / "work"
    work.mkdir()
    settings = home / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {"CONFIG_DIR": "config", "DATA_DIR": "data", "RUNTIME_DIR": "runtime"}
    environment = {
        **os.environ,
        **{f"JUPYTER_{name}": str(home / place) for name, place in places.items()},
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "IPYTHONDIR": str(home / "ipython"),
        "PYTHONPATH": str(Path(qnb.__path__[0]).parent),
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", f"--ServerApp.root_dir={work}"]
    command += ["--IdentityProvider.token=", "--ServerApp.allow_root=True", "--ServerApp.port_retries=0"]
    command += ["--ServerApp.disable_check_xsrf=True"]  # the test itself shuts kernels down
    with (home / "log.txt").open("wb") as log:
        running = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}"
            until = time.monotonic() + 60
            while time.monotonic() < until and running.poll() is None:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api"):
                    break
                time.sleep(0.2)
            else:
                pytest.fail(f"no Jupyter server: {(home / 'log.txt').read_text()[-2000:]}")
            yield address, work
        finally:
            running.terminate()
            running.wait(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        flags = [f"--{flag}" for flag in FLAGS.split()]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser) -> Iterator[sync_api.Page]:
    """A window that fails the test where the page's own code raises."""
    faults: list[str] = []
    page = browser.new_page(viewport={"width": 1440, "height": 1150})
    page.set_default_timeout(PATIENCE_MS)
    page.on("pageerror", lambda error: faults.append(str(error)))
    yield page
    if not page.is_closed():
        keep(page, "last")
        page.close()
    assert [fault for fault in faults if "qnb" in fault or "anywidget" in fault] == []


def keep(page: sync_api.Page, name: str, whole: bool = True) -> None:
    if folder := os.environ.get("QNB_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        target = page if whole else page.locator(".qnb-panel").first
        target.screenshot(path=str(Path(folder) / f"{name}.png"))


def figure(page: sync_api.Page, field: str) -> str:
    return page.locator(f'.qnb-panel tr[data-field="{field}"] .qnb-now').first.inner_text()


def words(page: sync_api.Page) -> tuple[str, str]:
    original, now = page.locator(".qnb-panel .qnb-words pre").all_inner_texts()[:2]
    return original, now


def step(page: sync_api.Page) -> str:
    return page.locator(".qnb-head").first.inner_text()


def until(page: sync_api.Page, condition: str, *given: object) -> None:
    page.wait_for_function(condition, arg=list(given))


def settled(page: sync_api.Page, holds: str = "") -> None:
    """Waits until everything is measured, of a step whose heading holds the words."""
    until(
        page,
        """([holds]) => document.querySelector(".qnb-status")?.textContent === "settled"
        && document.querySelector(".qnb-head").textContent.includes(holds)""",
        holds,
    )


def choose(page: sync_api.Page, layer: str, scheme: str) -> None:
    """Clicks the layer and chooses a scheme, as a person does."""
    page.locator(f'.qnb-cell[data-layer="{layer}"]').first.click()
    until(page, "([name]) => document.querySelector('.qnb-selection')?.textContent === name", layer)
    page.locator(".qnb-controls select").first.select_option(scheme)


def menu(page: sync_api.Page, name: str, item: str) -> None:
    page.locator(".lm-MenuBar-itemLabel", has_text=name).first.click()
    page.locator(".lm-Menu-itemLabel", has_text=item).first.click()


def ready(page: sync_api.Page, address: str) -> None:
    """Waits until the notebook is shown and its kernel waits for work: cells run before that are dropped in silence."""
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    end = time.monotonic() + PATIENCE_MS / 1000
    while time.monotonic() < end:
        # The server answers 500 while a kernel that was shut down before goes away.
        with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(f"{address}/api/kernels") as answer:
            if any(k["execution_state"] == "idle" and k["connections"] for k in json.load(answer)):
                break
        page.wait_for_timeout(100)
    page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first.wait_for()
    page.wait_for_timeout(300)


def shown(page: sync_api.Page) -> None:
    """Waits until the panel is there; fails with what a cell raised instead."""
    page.locator(".qnb-cell, .jp-OutputArea-output[data-mime-type$=stderr]").first.wait_for()
    raised = page.locator(".jp-OutputArea-output[data-mime-type$=stderr]").all_inner_texts()
    assert raised == []


def kernels(address: str) -> list[str]:
    with urllib.request.urlopen(f"{address}/api/kernels") as answer:
        return [kernel["id"] for kernel in json.load(answer)]


def shut_down(address: str) -> None:
    for kernel in kernels(address):
        # The server answers 500 where the page that goes away has just let go of the kernel; it ends with the server.
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(urllib.request.Request(f"{address}/api/kernels/{kernel}", method="DELETE")).close()


def change_and_undo(page: sync_api.Page, name: str) -> None:
    """From the original: one layer quantized changes figures and words, undo brings back both."""
    page.locator(".qnb-panel").first.scroll_into_view_if_needed()
    page.get_by_role("button", name="Original").first.click()
    settled(page, "the original")
    before = {field: figure(page, field) for field in ("weight_bytes", "perplexity", "kl")}
    original, now = words(page)
    assert original == now and before["kl"] == "0"

    choose(page, LAYER, SCHEME)
    settled(page, f"{SCHEME}: {LAYER}")
    after = {field: figure(page, field) for field in before}
    assert all(after[field] != before[field] for field in before)
    original, now = words(page)
    assert original != now and page.locator(".qnb-words mark").count() == 2
    assert page.locator(f'.qnb-cell[data-layer="{LAYER}"]').first.inner_text() == SCHEME
    keep(page, f"{name}-changed")

    page.get_by_role("button", name="Undo").first.click()
    settled(page, "the original")
    assert {field: figure(page, field) for field in before} == before
    original, now = words(page)
    assert original == now


def test_jupyterlab(server, page):
    """Run all, click, undo; restart the kernel and run again; reopen without the kernel and read the record."""
    address, work = server
    shutil.copy(NOTEBOOK, work / "panel.ipynb")
    page.goto(f"{address}/lab/tree/panel.ipynb")
    ready(page, address)
    menu(page, "Run", "Run All Cells")
    shown(page)
    settled(page, "step 2")
    assert not page.locator(".qnb-record").first.is_visible(), "the record is for a page without the panel"
    change_and_undo(page, "lab")

    page.locator(".qnb-cell").first.click()
    page.keyboard.press("Shift+ArrowDown")
    page.keyboard.press("Shift+ArrowRight")
    until(page, "() => document.querySelector('.qnb-selection').textContent === '4 layers'")
    assert page.locator(".qnb-cell.qnb-selected").count() == 4
    page.keyboard.press("Control+a")
    assert page.locator(".qnb-cell.qnb-selected").count() == 57
    for tab in ("Layer", "History"):
        page.locator(".qnb-tabs .lm-TabBar-tab", has_text=tab).first.click()
    page.locator(".qnb-point[data-step='2']").first.click()
    settled(page, "step 2")
    keep(page, "lab-history")

    menu(page, "Kernel", "Restart Kernel and Run All Cells")
    page.locator(".jp-Dialog button.jp-mod-accept").click()
    until(page, "() => !document.querySelector('.qnb-panel') || document.querySelector('.qnb-busy')")
    shown(page)
    settled(page, "step 2")
    choose(page, LAYER, SCHEME)
    settled(page, f"{SCHEME}: {LAYER}")

    until(page, "([step]) => document.querySelector('.qnb-record')?.textContent.includes(step)", f"{SCHEME}: {LAYER}")
    end = time.monotonic() + PATIENCE_MS / 1000
    while f"{SCHEME}: {LAYER}" not in (work / "panel.ipynb").read_text("utf-8"):
        assert time.monotonic() < end, "the notebook was saved without the record of the last step"
        page.keyboard.press("Control+s")
        page.wait_for_timeout(500)
    page.close()
    shut_down(address)


def test_the_record_outlives_the_kernel(server, page):
    """In a window that never saw the panel: map, figures and steps are there to read."""
    address, work = server
    if not (work / "panel.ipynb").exists():
        pytest.skip("the notebook was not saved by the test before")
    page.goto(f"{address}/lab/tree/panel.ipynb")
    record = page.locator(".jp-OutputArea-output", has_text="weights held").first
    record.scroll_into_view_if_needed()
    text = record.inner_text()
    assert f"{SCHEME}: {LAYER}" in text and "perplexity" in text and "down_proj" in text
    coloured = "e => getComputedStyle(e).backgroundColor"
    cell = record.locator("td", has_text=SCHEME).first
    assert cell.evaluate(coloured) not in ("rgba(0, 0, 0, 0)", "transparent")
    keep(page, "record")
    page.close()
    shut_down(address)


def test_notebook_7(server, page):
    pytest.importorskip("notebook", reason="notebook is not installed")
    address, work = server
    shutil.copy(NOTEBOOK, work / "classic.ipynb")
    page.goto(f"{address}/notebooks/classic.ipynb")
    ready(page, address)
    menu(page, "Run", "Run All Cells")
    shown(page)
    settled(page, "step 2")
    change_and_undo(page, "notebook7")
    page.close()
    shut_down(address)


@pytest.mark.parametrize("subshells", [True, False], ids=["with subshells", "without subshells"])
def test_a_control_is_moved_while_a_cell_generates(server, page, subshells):
    """With subshells the change lands while the cell runs, between two calls of `generate`; without, after the cell."""
    address, work = server
    settings = work.parent / "settings" / "@jupyterlab" / "apputils-extension" / "kernels-settings.jupyterlab-settings"
    settings.write_text(json.dumps({"commsOverSubshells": "perCommTarget" if subshells else "disabled"}))
    opens = "import qnb\nmodel, tokenizer = qnb.demo_lm()\npanel = qnb.panel(model, tokens=300, new_tokens=8)\npanel"
    generates = f"most = {90 if subshells else 6}\n{GENERATES}"
    cells = [nbformat.v4.new_code_cell(source) for source in (opens, generates, MEASURES)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}  # else a dialog asks for one
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), work / "busy.ipynb")
    page.goto(f"{address}/lab/tree/busy.ipynb?reset")
    ready(page, address)
    execute(page, 0)
    shown(page)
    settled(page, "the original")
    page.locator(f'.qnb-cell[data-layer="{LAYER}"]').first.click()
    until(page, "([name]) => document.querySelector('.qnb-selection')?.textContent === name", LAYER)
    before = {field: figure(page, field) for field in ("weight_bytes", "perplexity", "kl")}

    execute(page, 1)
    page.locator(".jp-CodeCell").nth(1).locator(".jp-OutputArea-output", has_text="writing").wait_for()
    page.locator(".qnb-controls select").first.select_option(SCHEME)
    if subshells:
        until(
            page,
            f"""([holds]) => document.querySelector(".qnb-head").textContent.includes(holds) && ({RUNNING})(1)""",
            f"{SCHEME}: {LAYER}",
        )
        assert figure(page, "weight_bytes") != before["weight_bytes"]
        keep(page, "subshells")
    else:
        for heading in iter(lambda: step(page), None):
            if not page.evaluate(f"() => ({RUNNING})(1)"):
                break
            assert "the original" in heading, "the change landed while the cell ran"
            page.wait_for_timeout(100)
    settled(page, f"{SCHEME}: {LAYER}")
    until(page, f"() => !({RUNNING})(1)")
    kinds = "['Linear', 'QLinear']" if subshells else "['Linear']"
    assert output(page, 1) == f"writing\n{kinds} 1"
    assert all(figure(page, field) != value for field, value in before.items())
    execute(page, 2)
    until(page, f"() => !({RUNNING})(2)")
    assert output(page, 2) == "|".join(figure(page, field) for field in ("perplexity", "kl"))
    assert page.locator(".qnb-message, .jp-OutputArea-output[data-mime-type$=stderr]").count() == 0
    assert "Traceback" not in (work.parent / "log.txt").read_text().partition("busy.ipynb")[2]
    page.close()
    if not subshells:  # the other one goes on with the same kernel, which saves seconds
        shut_down(address)


# Whether the code cell of that number waits or runs.
RUNNING = """n => document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")[n].textContent.includes("*")"""


def execute(page: sync_api.Page, number: int) -> None:
    """Runs one code cell."""
    page.locator(".jp-CodeCell .jp-InputPrompt").nth(number).click()
    page.keyboard.press("Control+Enter")


def output(page: sync_api.Page, number: int) -> str:
    """What a code cell printed."""
    return page.locator(".jp-CodeCell").nth(number).locator(".jp-OutputArea-output").first.inner_text().strip()
