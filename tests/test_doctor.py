"""`doctor`, and the facts of the machine that it tells: what is there, what is not, and what would grant it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

import qnb
from qnb import env, ops, schemes
from qnb.measure import doctor as module
from qnb.measure.doctor import Diagnosis
from qnb.measure.probes import rapl
from qnb.ops import kernel_for


def finding(about: str, diagnosis: Diagnosis | None = None):
    """The one row about it."""
    [row] = [r for r in (diagnosis or qnb.doctor()).rows if r.about == about]
    return row


class TestSchemes:
    def test_every_scheme_has_an_answer_and_it_is_the_kernel_that_runs(self):
        answers = [a for a in qnb.doctor().schemes if a.device == "cpu"]
        assert [a.scheme for a in answers] == [name for name in schemes.names() if name != "none"]
        for answer in answers:
            model = torch.nn.Sequential(torch.nn.Linear(64, 64))
            qnb.quantize(model, answer.scheme, calibration=[torch.randn(4, 64)], progress=False)
            rows = (answer.many_rows, answer.one_row)
            beside = " + torch" if all(kernel.endswith(" + torch") for kernel in rows) else ""
            both = " / ".join(dict.fromkeys(kernel.removesuffix(beside) for kernel in rows)) + beside
            assert both == model[0].variant.kernel()

    @pytest.mark.parametrize(
        "kernel, many, one",
        [
            ("many / one", "many", "one"),
            ("both", "both", "both"),
            ("many / one + torch", "many + torch", "one + torch"),
        ],
    )
    def test_many_rows_and_one_row_are_told_apart(self, monkeypatch, kernel, many, one):
        monkeypatch.setattr("qnb.schemes.coded.ops.kernel_for", lambda op, device: kernel)
        coded = [a for a in qnb.doctor().schemes if "outliers" not in a.scheme]
        assert {(a.many_rows, a.one_row) for a in coded} == {(many, one)}

    def test_a_scheme_without_an_operator_of_its_own_is_shown(self, monkeypatch):
        class Plain(schemes.Scheme):
            name, grid = "plain", schemes.find("w8a8").grid

            def variant(self, rounded, how, inputs):
                return SimpleNamespace(nbytes=0, kernel=lambda: "reference")

        monkeypatch.setitem(schemes._registry, "plain", Plain())
        diagnosis = qnb.doctor()
        [answer] = [a for a in diagnosis.schemes if (a.scheme, a.device) == ("plain", "cpu")]
        assert (answer.op, answer.many_rows, answer.one_row) == (None, "reference", "reference")
        assert "none of its own" in diagnosis.text() and "more slowly" in diagnosis.text()

    def test_the_op_is_one_that_torch_knows(self):
        for answer in qnb.doctor().schemes:
            if answer.op is not None:
                namespace, name = answer.op.split("::")
                assert hasattr(getattr(torch.ops, namespace), name)


class TestInstructionSets:
    def test_they_are_those_of_the_library(self):
        if ops.native_missing:
            pytest.skip(f"no compiled kernels: {ops.native_missing}")
        sets = ops.instruction_sets()
        assert sets["portable"] is None and list(sets)[-1] == "portable"
        here = [name for name, why in sets.items() if why is None]
        assert set(kernel_for("linear_w8a8").split(" / ")) <= set(here)
        assert finding("instruction sets").words == ", ".join(here)

    def test_a_reason_for_each_that_is_not_usable(self, monkeypatch):
        sets = {"amx": "no kernel was built for it", "avx2": "this processor does not have it", "portable": None}
        monkeypatch.setattr(ops, "instruction_sets", lambda: sets)
        lacking = [r.words for r in qnb.doctor().rows if r.about == "more instruction sets"]
        assert lacking == ["amx: no kernel was built for it", "avx2: this processor does not have it"]

    def test_a_ceiling_and_what_it_leaves_unused(self, monkeypatch):
        sets = {"amx": "this processor does not have it", "avx512": None, "avx2": None, "portable": None}
        monkeypatch.setattr(ops, "instruction_sets", lambda: sets)
        monkeypatch.setenv("QNB_ISA", "avx2")
        row = finding("QNB_ISA")
        assert not row.here and "leaves avx512 unused" in row.words and "unset QNB_ISA" in row.command
        monkeypatch.setenv("QNB_ISA", "avx512")
        assert finding("QNB_ISA").here
        monkeypatch.delenv("QNB_ISA")
        assert finding("QNB_ISA").here and finding("QNB_ISA").command is None

    def test_no_compiled_kernels(self, monkeypatch):
        monkeypatch.setattr(ops, "native_missing", "no compiled library was built: install again")
        monkeypatch.setattr(ops, "instruction_sets", dict)
        diagnosis = qnb.doctor()
        row = finding("compiled kernels", diagnosis)
        assert not row.here and "plain torch answers" in row.words and row.command.startswith("QNB_NATIVE=ON pip")
        assert not [r for r in diagnosis.rows if "instruction" in r.about or r.about == "QNB_ISA"]

    def test_an_unusable_ceiling_is_told_and_does_not_stop_the_doctor(self, tmp_path):
        if ops.native_missing:
            pytest.skip(f"no compiled kernels: {ops.native_missing}")
        code = "import qnb, json; print(json.dumps(qnb.doctor().to_dict()))"
        environment = {**os.environ, "QNB_ISA": "mmx", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        # In an empty folder: Python looks for modules where it starts, and a checkout there has no compiled kernels.
        told = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment, cwd=tmp_path)
        told = json.loads(told)
        [row] = [r for r in told["rows"] if r["about"] == "compiled kernels"]
        assert not row["here"] and "QNB_ISA=mmx" in row["words"] and "unset QNB_ISA" in row["command"]
        assert told["schemes"] == [] and told["notes"]


class TestMeters:
    def test_energy_counters_that_need_a_right_come_with_the_command(self, monkeypatch):
        monkeypatch.setattr(rapl, "_domains", lambda: {"package-0": rapl.ROOT / "intel-rapl:0"})

        def forbidden(file):
            raise PermissionError(file)

        monkeypatch.setattr(rapl, "_number", forbidden)
        row = finding("energy of the processor")
        assert not row.here and row.words == "reading the processor's energy counters needs a right"
        assert row.command == "sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj"
        assert row.command in qnb.doctor().text()

    def test_energy_counters_that_can_be_read(self, monkeypatch, tmp_path):
        domain = tmp_path / "intel-rapl:0"
        domain.mkdir()
        (domain / "name").write_text("package-0\n")
        (domain / "energy_uj").write_text("1\n")
        monkeypatch.setattr(rapl, "ROOT", tmp_path)
        assert finding("energy of the processor").here

    def test_none_at_all_has_no_command(self, monkeypatch, tmp_path):
        monkeypatch.setattr(rapl, "ROOT", tmp_path)
        row = finding("energy of the processor")
        assert not row.here and "RAPL" in row.words and row.command is None


class TestGpus:
    def test_a_gpu_that_this_torch_cannot_use(self, monkeypatch):
        monkeypatch.setattr(env, "nvidia_driver", lambda: ("580.1", ("NVIDIA H100",), None))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", None)
        row = finding("CUDA")
        assert not row.here and "NVIDIA H100 is here" in row.words and "pip install torch" in row.command
        assert finding("NVIDIA driver").here

    def test_no_gpu_has_no_command(self, monkeypatch):
        monkeypatch.setattr(env, "nvidia_driver", lambda: (None, (), "no NVIDIA driver answers (not found)"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        diagnosis = qnb.doctor()
        for about in ("CUDA", "NVIDIA driver", "energy of the GPUs"):
            assert not finding(about, diagnosis).here and finding(about, diagnosis).command is None

    def test_without_nvidia_s_library_the_command_is_pip_s(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pynvml", None)
        row = finding("NVIDIA driver")
        assert not row.here and row.command == "pip install nvidia-ml-py"


class TestMachine:
    def test_threads_that_lie_idle(self, monkeypatch):
        monkeypatch.setattr(env, "cores", lambda: 8)
        monkeypatch.setattr(env, "usable_cpus", lambda: 4)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        row = finding("threads of torch")
        assert not row.here and row.command == "torch.set_num_threads(4)"
        monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
        assert finding("threads of torch").here

    def test_packages_are_told_without_importing_them(self, monkeypatch):
        versions = {"torch": "9.9", "peft": None}
        monkeypatch.setattr(env, "package_version", lambda name: versions.get(name, "1.0"))
        assert finding("torch").words.endswith("9.9")
        assert not finding("peft").here and finding("peft").command == "pip install peft"

    def test_it_is_a_result_as_every_other(self):
        diagnosis = qnb.doctor()
        told = json.loads(json.dumps(diagnosis.to_dict()))
        assert {row["about"] for row in told["rows"]} >= {"processor", "memory", "CUDA", "torch", *module._PACKAGES}
        assert repr(diagnosis) == diagnosis.text() and "<table" in diagnosis._repr_html_()
        with pytest.raises(AttributeError):
            diagnosis.rows = ()


class TestFacts:
    """What `env` reads, against another way to know it."""

    def test_package_version(self):
        assert env.package_version("torch") == torch.__version__
        assert env.package_version("no-such-distribution-as-this") is None

    def test_the_driver_that_answers(self, monkeypatch):
        pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
        monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda i: i)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda handle: f"GPU {handle}".encode())
        monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: "580.1")
        assert env.nvidia_driver() == ("580.1", ("GPU 0", "GPU 1"), None)

    @pytest.fixture
    def machine(self, monkeypatch, tmp_path):
        """A machine of 1000 bytes, 800 of them available, and an empty tree of control groups."""
        memory = SimpleNamespace(total=1000, available=800)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        monkeypatch.setattr(env, "_CGROUPS", tmp_path / "cgroup")
        monkeypatch.setattr(env, "_OWN_CGROUP", tmp_path / "own")
        return tmp_path

    def group(self, machine, path, limit, used, cached, names=("memory.max", "memory.current", "inactive_file")):
        folder = machine / "cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cached}\n")

    def test_memory_without_control_groups_is_the_machine_s(self, machine):
        assert env.host_memory() == (1000, 800)

    def test_the_narrowest_group_above_counts_and_caches_can_be_had(self, machine):
        (machine / "own").write_text("0::/a/b\n")
        self.group(machine, "a/b", "max", 100, 0)
        self.group(machine, "a", 500, 300, 50)
        assert env.host_memory() == (500, 250)
        assert env.available_bytes("cpu") == 250

    def test_a_container_that_sees_its_group_as_the_root(self, machine):
        (machine / "own").write_text("0::/not/visible/here\n")
        self.group(machine, "", 400, 500, 0)  # more used than allowed: nothing can be had, and no less
        assert env.host_memory() == (400, 0)

    def test_the_first_version_of_control_groups(self, machine):
        (machine / "own").write_text("5:cpu:/x\n4:memory:/job\n")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        self.group(machine, "memory/job", 600, 200, 10, names)
        self.group(machine, "memory", 2**63 - 4096, 900, 0, names)
        assert env.host_memory() == (600, 410)
