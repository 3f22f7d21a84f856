"""Installing without a compiler: the build still succeeds and says what is missing, unless it was told to insist."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "csrc"


def tool(name):
    """An executable that lies beside this Python or on the path."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    return found or pytest.skip(f"{name} is not installed")


@pytest.fixture
def configure(tmp_path):
    """Configures the build where no program at all is on the path but those of the build system."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("cmake", "ninja"):
        os.symlink(tool(name), tools / name)

    def run(native):
        command = [tools / "cmake", "-S", SOURCE, "-B", tmp_path / native, "-G", "Ninja", f"-DQNB_NATIVE={native}"]
        command += [f"-DCMAKE_INSTALL_PREFIX={tmp_path / 'installed'}"]
        env = {"PATH": str(tools), "HOME": str(tmp_path)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr, [tools / "cmake", "--install", tmp_path / native]

    return run


@pytest.mark.skipif(sys.platform != "linux", reason="the compiler is looked for on the path on Linux alone")
def test_without_a_compiler_nothing_is_built_and_that_is_said(configure, tmp_path):
    code, words, install = configure("AUTO")
    assert code == 0, words
    assert "the compiled part is not built: no C++ compiler was found" in words
    assert subprocess.run(install, capture_output=True, timeout=300).returncode == 0
    assert not list((tmp_path / "installed").rglob("*.so"))


@pytest.mark.skipif(sys.platform != "linux", reason="the compiler is looked for on the path on Linux alone")
def test_who_insists_is_told_why_it_fails(configure):
    code, words, _ = configure("ON")
    assert code != 0
    assert "QNB_NATIVE=ON, but the compiled part cannot be built: no C++ compiler was found" in words


def test_off_builds_nothing_though_there_is_a_compiler(configure):
    code, words, _ = configure("OFF")
    assert code == 0, words
    assert "no compiled library is built: QNB_NATIVE=OFF" in words


def test_a_word_that_is_none_of_the_three(configure):
    code, words, _ = configure("MAYBE")
    assert code != 0
    assert "QNB_NATIVE=MAYBE is none of AUTO, ON, OFF" in words
