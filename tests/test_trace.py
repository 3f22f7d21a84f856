"""Traces: what torch's profiler writes, under which name, what stays behind, and that TensorBoard's plugin reads it."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import torch
from torch import nn

import qnb
from qnb.errors import BadInput
from qnb.measure.workload import Forward

SECONDS = 120


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    qnb.quantize(model, "w8a8", layers="0", progress=False)
    return model


def profile(model, folder, **given):
    return qnb.profile(model, inputs=torch.ones(4, 64), repeat=1, trace=folder, progress=False, **given)


def events(file) -> list[dict]:
    return json.loads(Path(file).read_text())["traceEvents"]


def test_one_run_is_written_with_its_layers_named(model, tmp_path):
    folder = tmp_path / "made" / "on the way"
    result = profile(model, folder)
    (file,) = folder.iterdir()
    assert result.trace == str(file) and "trace" not in result.unavailable
    # The name by which torch-tb-profiler finds traces: worker, time, ending.
    assert re.fullmatch(r"[\w.-]+\.\d+\.pt\.trace\.json", file.name)
    names = [event.get("name") for event in events(file)]
    assert names.count("0 (w8a8)") == 1 and names.count("2") == 1
    assert names.count("qnb::linear_w8a8") == 1
    assert any(str(name).startswith("ProfilerStep#") for name in names)
    assert f"trace: {file}" in result.text() and "Perfetto" in result.text()


def test_the_home_folder_may_be_meant(model, tmp_path, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    assert Path(profile(model, "~/traces").trace).parent == tmp_path / "traces"


def test_a_layers_span_holds_its_operator(model, tmp_path):
    spans = {e["name"]: e for e in events(profile(model, tmp_path).trace) if e.get("ph") == "X"}
    layer, operator = spans["0 (w8a8)"], spans["qnb::linear_w8a8"]
    assert layer["ts"] <= operator["ts"] and operator["ts"] + operator["dur"] <= layer["ts"] + layer["dur"]


def test_each_trace_has_a_file_of_its_own_and_no_hook_stays(model, tmp_path):
    files = {profile(model, str(tmp_path)).trace for _ in range(2)}
    assert len(files) == 2 and {str(f) for f in tmp_path.iterdir()} == files
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not torch.autograd._profiler_enabled()


def test_a_run_that_fails_leaves_no_hook_and_no_profiler(model, tmp_path, monkeypatch):
    run = Forward.run

    def fails(work):
        if torch.autograd._profiler_enabled():
            run(work)
            raise ZeroDivisionError
        return run(work)

    monkeypatch.setattr(Forward, "run", fails)
    with pytest.raises(ZeroDivisionError):
        profile(model, tmp_path)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not torch.autograd._profiler_enabled()


def test_a_comparison_says_where_it_lies(model, tmp_path):
    before, now = profile(model, None), profile(model, tmp_path)
    assert before.trace is None and "trace=" in before.unavailable["trace"]
    assert f"trace: {now.trace}" in now.against(before).text()


def test_a_compiled_model_is_traced_without_names(tmp_path):
    compiled = nn.Sequential(nn.Linear(64, 8))
    compiled.compile(backend="eager")
    names = [event.get("name") for event in events(profile(compiled, tmp_path).trace)]
    assert "aten::linear" in names and "0" not in names


@pytest.mark.parametrize("given", ["", 5, b""])
def test_what_is_no_folder_is_refused(model, given, monkeypatch):
    monkeypatch.setattr(Forward, "run", None)  # nothing is run before that
    with pytest.raises(BadInput, match="trace="):
        profile(model, given)


def test_a_file_in_its_place_is_refused_and_left_alone(model, tmp_path, monkeypatch):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    monkeypatch.setattr(Forward, "run", None)
    for folder in (file, file / "below"):
        with pytest.raises(BadInput, match="no folder"):
            profile(model, folder)
    assert file.read_text() == "mine"


def test_beside_another_profiler_it_is_refused(model, tmp_path):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        with pytest.raises(BadInput, match="profiler runs already"):
            profile(model, tmp_path)


def test_tensorboards_plugin_reads_it(model, tmp_path):
    """TensorBoard itself on the folder, on loopback; ends with the test."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    pytest.importorskip("torch_tb_profiler", reason="torch-tb-profiler is not installed")
    folder = tmp_path / "traces"
    file = Path(profile(model, folder).trace)
    log = tmp_path / "log"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--host", "127.0.0.1", "--port", "0"]
    with log.open("w") as errors, subprocess.Popen(command, stdout=errors, stderr=errors) as server:
        try:
            address = wait_for(lambda: re.search(r"http://127\.0\.0\.1:\d+/", log.read_text()), server, log)[0]
            run = wait_for(lambda: ask(address, "runs")["runs"], server, log)[0]
            assert run == folder.name
            (worker,) = ask(address, "workers", run=run, view="Operator")
            assert file.name.startswith(worker)
            (span,) = ask(address, "spans", run=run, worker=worker)
            chosen = {"run": run, "worker": worker, "span": span}
            table = ask(address, "operation/table", **chosen, group_by="Operation")["data"]
            assert {row["name"]: row["calls"] for row in table}["qnb::linear_w8a8"] == 1
            assert "0 (w8a8)" in {e.get("name") for e in ask(address, "trace", **chosen)["traceEvents"]}
        finally:
            server.terminate()


def ask(address: str, what: str, **given: str):
    query = urllib.parse.urlencode(given)
    with urllib.request.urlopen(f"{address}data/plugin/pytorch_profiler/{what}?{query}", timeout=SECONDS) as answer:
        content = answer.read()
    return json.loads(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)


def wait_for(look, server: subprocess.Popen, log: Path):
    """What `look` finds, once it finds something; fails where the server ends or says nothing for too long."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until and server.poll() is None:
        try:
            if found := look():
                return found
        except urllib.error.URLError:
            pass  # not up yet
        time.sleep(0.1)
    pytest.fail(f"TensorBoard did not answer:\n{log.read_text()}")
