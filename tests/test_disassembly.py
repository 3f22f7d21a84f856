"""Instruction-set flags stay on their files: code that any processor may run holds no AVX or AMX register."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernels_library import kernels_library

LIBRARY = kernels_library()
SOURCES = Path(__file__).parents[1] / "csrc"
ISAS = re.findall(r"^QNB_ISA\((\w+),", (SOURCES / "isa.def").read_text(), re.M)
WIDE = re.compile(r"%(ymm|zmm|tmm|k)\d")
OBJDUMP, NM, CMAKE = (shutil.which(tool) for tool in ("objdump", "nm", "cmake"))


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Every source file of qnb_cpu, compiled as CMake compiles it: object file by stem."""
    if OBJDUMP is None or NM is None:
        pytest.skip("no objdump or nm: install binutils")
    if not sys.platform.startswith("linux") or os.uname().machine != "x86_64":
        pytest.skip("the names of registers looked for are those of x86-64 on Linux")
    if CMAKE is None or (shutil.which("c++") or os.environ.get("CXX")) is None:
        pytest.skip("no cmake or no C++ compiler: install both")
    folder = tmp_path_factory.mktemp("objects")
    configure = [CMAKE, "-S", SOURCES, "-B", folder, "-DPython_EXECUTABLE=/nonexistent"]
    subprocess.run(configure, check=True, capture_output=True)
    built = subprocess.run([CMAKE, "--build", folder, "--target", "qnb_cpu", "-j2"], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    return {path.name.split(".")[0]: path for path in folder.rglob("qnb_cpu.dir/**/*.o")}


def disassembly(path):
    return subprocess.run(
        [OBJDUMP, "-d", "--no-show-raw-insn", path], check=True, capture_output=True, text=True
    ).stdout


def test_baseline_objects_hold_no_wide_register(objects):
    baseline = [stem for stem in objects if stem.rsplit("_", 1)[-1] not in ISAS or stem.endswith("_portable")]
    assert {"dispatch", "isa", "pack", "w8a8", "w8a16", "gemm_s8s8_portable"} <= set(baseline)
    for stem in baseline:
        wide = sorted({line.strip() for line in disassembly(objects[stem]).splitlines() if WIDE.search(line)})
        assert not wide, f"{stem}: {wide[:3]}"
    # The search finds what it looks for: kernels of wide instruction sets do hold such registers.
    others = set(objects) - set(baseline)
    assert all(WIDE.search(disassembly(objects[stem])) for stem in others)


def test_kernel_objects_share_no_function_with_others(objects):
    """A weak function compiled with AVX-512 could be the one that the linker keeps for everybody."""
    for stem, path in objects.items():
        if stem.rsplit("_", 1)[-1] not in ISAS:
            continue
        symbols = subprocess.run([NM, "-C", path], check=True, capture_output=True, text=True).stdout
        shared = re.findall(r" [TWVuDBR] (.+)$", symbols, re.M)
        assert shared == [f"qnb_kernel_{stem}"]


def test_the_installed_library_outside_its_kernels_holds_no_wide_register():
    """The same on what was really installed, function by function; kernels export no function."""
    if OBJDUMP is None or not sys.platform.startswith("linux") or os.uname().machine != "x86_64":
        pytest.skip("needs objdump, on x86-64 Linux: install binutils")
    if not LIBRARY.exists():
        pytest.skip(f"no compiled library at {LIBRARY}: install with QNB_NATIVE=ON")
    table = subprocess.run([OBJDUMP, "-T", LIBRARY], check=True, capture_output=True, text=True).stdout
    # An installed library is stripped: address and size bound a function, no label of the next one does.
    found = re.findall(r"^([0-9a-f]+) g +DF \.text\s+([0-9a-f]+) .*\b(qnb_\w+)$", table, re.M)
    assert "qnb_linear_w8a8" in {name for _, _, name in found}
    for address, size, name in found:
        start = int(address, 16)
        bounds = [f"--start-address={start}", f"--stop-address={start + int(size, 16)}"]
        code = subprocess.run([OBJDUMP, "-d", *bounds, LIBRARY], check=True, capture_output=True, text=True).stdout
        assert re.search(rf"^ +{start:x}:\t", code, re.M), f"nothing was disassembled of {name}"
        assert not WIDE.search(code), name
