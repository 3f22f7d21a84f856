"""The kernel tests once more, on a library built with address and undefined-behaviour sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
CMAKE = shutil.which("cmake")


def runtime(name):
    """The sanitizer's library, which must be loaded before Python."""
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(found):
        pytest.skip(f"{COMPILER} has no {name}: install the compiler's sanitizer libraries")
    return os.path.realpath(found)


def test_kernels_are_clean_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("the sanitizers are loaded by LD_PRELOAD, which is Linux's")
    if COMPILER is None:
        pytest.skip("no C++ compiler: set CXX, or install one")
    if CMAKE is None:
        pytest.skip("no cmake: install it")
    preload = ":".join(runtime(name) for name in ("libasan.so", "libubsan.so"))
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
    configure = [CMAKE, "-S", ROOT / "csrc", "-B", tmp_path, f"-DCMAKE_CXX_COMPILER={COMPILER}",
                 f"-DCMAKE_CXX_FLAGS={flags}", "-DPython_EXECUTABLE=/nonexistent"]  # fmt: skip
    subprocess.run(configure, check=True, capture_output=True)
    build = subprocess.run([CMAKE, "--build", tmp_path, "--target", "qnb_cpu", "-j2"], capture_output=True, text=True)
    assert build.returncode == 0, build.stdout[-3000:] + build.stderr[-3000:]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--noconftest", "-p", "no:cacheprovider", "tests/test_kernels.py"],
        cwd=ROOT,
        # Python itself never frees what it holds at exit: only what the kernels touch is of interest, not leaks.
        env={**os.environ, "QNB_CPU_LIBRARY": str(tmp_path / "libqnb_cpu.so"), "LD_PRELOAD": preload,
             "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
