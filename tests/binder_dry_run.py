"""What Binder does with this repository, done here without Docker: minutes of work, so no part of the ordinary tests.

    python tests/binder_dry_run.py [--memory-gb 2] [--seconds 600]

It clones the last commit, makes an environment of the Python that binder/runtime.txt names, installs
binder/requirements.txt, runs binder/postBuild, and starts JupyterLab by binder/start. Then it runs every notebook, cell
by cell, in kernels that this server starts, and says how long each took and how much memory the server and its kernels
held together. Exit code 1 where a cell fails, a notebook takes longer than it may, JupyterLab would not open the
quickstart, or the memory is exceeded.

The limit is a memory cgroup where this process may make one (as Binder's own is, so that whoever exceeds it is killed);
elsewhere the resident memory of all processes is added up every 50 ms, which counts shared pages more than once.
Needs jupyter_client, nbformat and psutil: the extra "test" has them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import psutil
from jupyter_client import BlockingKernelClient

ROOT = Path(__file__).parents[1]
STEP_S = 1800  # the most that one step of the installation may take
INDEX = re.compile(r"^--(?:extra-)?index-url\s+(\S+)$", re.MULTILINE)


class Failed(Exception):
    """The dry run ends here, for the reason given."""


def say(words: str) -> None:
    print(f"== {words}", flush=True)


def run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Runs one step; its output is shown only where it fails."""
    began = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=STEP_S)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"{' '.join(command)} was still running after {STEP_S} s") from error
    if done.returncode:
        raise Failed(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    say(f"{' '.join(command)} ({time.perf_counter() - began:.0f} s)")


def build(repository: Path, home: Path) -> dict[str, str]:
    """Installs what binder/ says into a fresh environment, and returns the environment variables that use it."""
    python = "python" + (repository / "binder" / "runtime.txt").read_text().strip().removeprefix("python-")
    if shutil.which(python) is None:
        raise Failed(f"binder/runtime.txt asks for {python}, which is not installed here")
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "OMP_NUM_THREADS")}
    run([python, "-m", "venv", str(home / "env")], repository, clean)
    environment = {**clean, "HOME": str(home), "PATH": f"{home / 'env' / 'bin'}:{clean['PATH']}"}
    requirements = repository / "binder" / "requirements.txt"
    for index in INDEX.findall(requirements.read_text()):
        if not reachable(index):
            say(f"{index} cannot be reached from here: left out, and torch comes from wherever pip finds it")
            requirements.write_text(requirements.read_text().replace(f"--extra-index-url {index}\n", ""))
    run(["pip", "install", "--quiet", "-r", "binder/requirements.txt"], repository, environment)
    run(["binder/postBuild"], repository, environment)
    return environment


def reachable(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/torch/", timeout=10).close()
    except OSError:
        return False
    return True


class Limit:
    """A cgroup of its own with a memory limit, or, where none can be made, nothing: `words` says which."""

    def __init__(self, size: int) -> None:
        name = f"binder-dry-run-{os.getpid()}"
        for folder, file in (
            (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
            (Path("/sys/fs/cgroup"), "memory.max"),
        ):
            self.group: Path | None = folder / name
            try:
                self.group.mkdir()
                (self.group / file).write_text(str(size))
                self.words = f"a memory cgroup limits all processes to {size / 1e9:.1f} GB"
                return
            except OSError:
                with contextlib.suppress(OSError):
                    self.group.rmdir()
        self.group = None
        self.words = f"no cgroup can be made here: resident memory is added up and may not exceed {size / 1e9:.1f} GB"

    def enter(self) -> None:
        """Puts the calling process, and all that it starts, under the limit."""
        if self.group is not None:
            (self.group / "cgroup.procs").write_text(str(os.getpid()))

    def end(self) -> None:
        """Takes the cgroup away, once its processes are gone."""
        if self.group is not None:
            with contextlib.suppress(OSError):
                self.group.rmdir()


class Memory:
    """The most that a process and all below it held resident together, since `peak` was last set to 0."""

    def __init__(self, process: psutil.Process) -> None:
        self.peak, self._process, self._done = 0, process, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(0.05):
            total = 0
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in (self._process, *self._process.children(recursive=True)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        total += process.memory_info().rss
            self.peak = max(self.peak, total)

    def stop(self) -> None:
        """Looks no more."""
        self._done.set()
        self._thread.join()


class Server:
    """JupyterLab, started by binder/start."""

    def __init__(self, repository: Path, environment: dict[str, str], runtime: Path, limit: Limit) -> None:
        self._token, self._runtime = secrets.token_hex(16), runtime
        runtime.mkdir()
        command = ["binder/start", "jupyter", "lab", "--no-browser", "--allow-root", "--port=0", "--ip=127.0.0.1"]
        command += [f"--IdentityProvider.token={self._token}", "--ServerApp.log_level=ERROR"]
        environment = {**environment, "JUPYTER_RUNTIME_DIR": str(runtime)}
        self.process = subprocess.Popen(command, cwd=repository, env=environment, preexec_fn=limit.enter)
        try:
            self._address = self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> str:
        for _ in range(600):
            if self.process.poll() is not None:
                raise Failed(f"JupyterLab ended with exit code {self.process.returncode}")
            with contextlib.suppress(OSError, ValueError, KeyError, StopIteration):
                address = json.loads(next(self._runtime.glob("jpserver-*.json")).read_text())["url"]
                self._address = address
                self.ask("api/status")
                return address
            time.sleep(0.2)
        raise Failed("JupyterLab did not answer within two minutes")

    def ask(self, path: str, method: str = "GET", body: object = None) -> tuple[str, bytes]:
        """(the address that answered, the answer)."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"token {self._token}", "Content-Type": "application/json"}
        request = urllib.request.Request(self._address + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.geturl(), answer.read()

    @contextlib.contextmanager
    def kernel(self, notebook: str) -> Iterator[BlockingKernelClient]:
        """A session of a notebook, as the page would open it."""
        asked = {"path": notebook, "name": notebook, "type": "notebook", "kernel": {"name": "python3"}}
        session = json.loads(self.ask("api/sessions", "POST", asked)[1])
        client = BlockingKernelClient(connection_file=str(self._runtime / f"kernel-{session['kernel']['id']}.json"))
        client.load_connection_file()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=120)
            yield client
        finally:
            client.stop_channels()
            self.ask(f"api/sessions/{session['id']}", "DELETE")

    def stop(self) -> None:
        """Ends the server, and its kernels with it."""
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def run_notebook(server: Server, notebook: Path, seconds: float) -> None:
    """Runs every cell; raises Failed at the first that fails, or that is still running when the time is up.

    A cell tagged `raises-exception` shows a failure on purpose, and has to.
    """
    ends = time.perf_counter() + seconds
    with server.kernel(f"notebooks/{notebook.name}") as client:
        for number, cell in enumerate(nbformat.read(notebook, as_version=4).cells):
            if cell.cell_type != "code":
                continue
            where = f"{notebook.name}, cell {number}"
            try:
                reply = client.execute_interactive(
                    cell.source, timeout=max(1.0, ends - time.perf_counter()), output_hook=lambda message: None
                )
            except TimeoutError as error:
                raise Failed(f"{where} was still running after {seconds:.0f} s") from error
            except RuntimeError as error:
                raise Failed(f"{where}: the kernel died ({error}); out of memory?") from error
            problem = reply["content"]
            failed, meant = problem["status"] != "ok", "raises-exception" in cell.metadata.get("tags", [])
            if failed and not meant:
                raise Failed(f"{where}: {problem.get('ename')}: {problem.get('evalue')}")
            if meant and not failed:
                raise Failed(f"{where} is there to show a failure, and did not fail")


def dry_run(memory: int, seconds: float) -> None:
    """All of it, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="binder-dry-run-") as scratch:
        home, repository = Path(scratch, "home"), Path(scratch, "repository")
        home.mkdir()
        run(["git", "clone", "--quiet", str(ROOT), str(repository)], Path(scratch), dict(os.environ))
        environment = build(repository, home)
        limit = Limit(memory)
        say(limit.words)
        server = None
        try:
            server = Server(repository, environment, home / "runtime", limit)
            held = Memory(psutil.Process(server.process.pid))
            opened = server.ask("")[0]
            say(f"JupyterLab opens {opened.rpartition('/lab')[1]}{opened.rpartition('/lab')[2]}")
            if not opened.endswith("/lab/tree/notebooks/01_quickstart.ipynb"):
                raise Failed("JupyterLab would not open the quickstart")
            highest = 0
            for notebook in sorted((repository / "notebooks").glob("*.ipynb")):
                held.peak, began = 0, time.perf_counter()
                run_notebook(server, notebook, seconds)
                highest = max(highest, held.peak)
                say(f"{notebook.name}: {time.perf_counter() - began:.0f} s, at most {held.peak / 1e6:,.0f} MB")
            held.stop()
            if highest > memory:
                raise Failed(f"{highest / 1e6:,.0f} MB were held, and Binder gives {memory / 1e6:,.0f}")
        finally:
            if server is not None:
                server.stop()
            limit.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--memory-gb", type=float, default=2.0, help="what Binder gives (%(default)s)")
    parser.add_argument("--seconds", type=float, default=600, help="the most that a notebook may take (%(default)s)")
    given = parser.parse_args()
    # Whoever ends it from outside leaves no server and no folder behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))
    try:
        dry_run(int(given.memory_gb * 1e9), given.seconds)
    except Failed as reason:
        print(f"FAILED: {reason}", file=sys.stderr)
        raise SystemExit(1) from None
    say("passed")


if __name__ == "__main__":
    main()
