"""Meters: each against a counter whose true reading is known, and with every way in which it can fail to read."""

from __future__ import annotations

import gc
import mmap
import sys
import threading
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from qnb.errors import BadInput
from qnb.measure import probes
from qnb.measure.probes import Missing, Probe, Reading, choose, counter, host_memory, rapl, using, window
from qnb.measure.probes.replay import replay

pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")

CPU = [torch.device("cpu")]
GPU = [torch.device("cuda", 0)]


def energy_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("qnb-")]


class TestChoosing:
    def test_every_quantity_has_a_meter_or_a_reason(self):
        for quantity in probes.QUANTITIES:
            for devices in (CPU, [torch.device("mps")]):
                meter = choose(quantity, devices)
                assert meter.quantity == quantity
                assert not isinstance(meter, Missing) or meter.stop().reason

    def test_the_energy_of_a_gpu_is_never_answered_by_the_processors_counter(self, powercap, monkeypatch):
        powercap(package=[0])
        monkeypatch.setattr(
            pynvml, "nvmlInit", mock.Mock(side_effect=pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED))
        )
        assert not isinstance(choose("energy_mj", CPU), Missing)
        reading = choose("energy_mj", [*CPU, *GPU]).stop()
        assert reading.value is None and "NVML gives no energy" in reading.reason

    def test_a_meter_of_an_unknown_quantity_is_refused_at_registration(self):
        class Odd(Probe):
            quantity = "joy"

        with pytest.raises(ValueError, match="Odd reads 'joy'"):
            probes.probe(Odd)

    def test_a_replacement_lasts_as_long_as_its_block(self):
        class Mine(Probe):
            quantity = "energy_mj"

        with using("energy_mj", Mine):
            assert isinstance(choose("energy_mj", CPU), Mine)
        assert not isinstance(choose("energy_mj", CPU), Mine)

    def test_window_stops_every_meter_when_the_block_fails(self):
        stopped = []

        class Meter(Probe):
            quantity = "energy_mj"

            def start(self):
                pass

            def stop(self):
                stopped.append(self)
                return Reading(1.0, "test")

        meters = [Meter(CPU), Meter(CPU)]
        with pytest.raises(KeyboardInterrupt), window(meters):
            raise KeyboardInterrupt
        assert sorted(map(id, stopped)) == sorted(map(id, meters))


class TestClock:
    def test_it_reads_the_time_of_the_block(self, monkeypatch):
        now = iter([10.0, 10.25])
        monkeypatch.setattr(time, "perf_counter", lambda: next(now))
        meter = choose("latency_ms", CPU)
        meter.start()
        reading = meter.stop()
        monkeypatch.undo()
        assert reading.value == pytest.approx(250.0)


def resident(size: int) -> mmap.mmap:
    """Pages of our own, all touched. The allocator might answer with pages that are resident already."""
    block = mmap.mmap(-1, size)
    for page in range(0, size, mmap.PAGESIZE):
        block[page] = 1
    return block


class TestHostMemory:
    size = 400 * 2**20  # beside which what other tests left behind, and is freed meanwhile, is small

    def peak_of(self, meter: Probe, size: int) -> int:
        meter.start()
        if size:
            before = getattr(meter, "_peak", 0)
            held = resident(size)
            while isinstance(meter, host_memory.SampledPeak) and meter._peak < before + size // 2:
                time.sleep(meter.interval_s)  # its thread must have looked, however busy the machine is
            held.close()
        return meter.stop().value

    @pytest.mark.parametrize("kind", [host_memory.KernelPeak, host_memory.SampledPeak])
    def test_a_peak_inside_the_window_is_seen_and_one_before_it_is_forgotten(self, kind):
        if not kind.covers(CPU) or kind.why_not(CPU):
            pytest.skip(f"{kind.__name__} cannot read here: {kind.why_not(CPU)}")
        gc.collect()
        resident(2 * self.size).close()
        quiet = self.peak_of(kind(CPU), 0)
        loud = self.peak_of(kind(CPU), self.size)
        assert 0.9 * self.size < loud - quiet < 1.5 * self.size

    def test_without_the_kernels_peak_a_thread_looks(self, monkeypatch, tmp_path):
        monkeypatch.setattr(host_memory, "_PROC", tmp_path)
        meter = choose("peak_host_bytes", CPU)
        assert isinstance(meter, host_memory.SampledPeak)
        meter.start()
        assert "qnb-memory" in energy_threads()
        assert meter.stop().value > 0
        assert energy_threads() == []

    def test_a_peak_that_cannot_be_reset_is_not_read(self, monkeypatch, tmp_path):
        (tmp_path / "clear_refs").mkdir()  # writing to it fails for every user
        monkeypatch.setattr(host_memory, "_PROC", tmp_path)
        assert "cannot be reset" in host_memory.KernelPeak.why_not(CPU)
        assert isinstance(choose("peak_host_bytes", CPU), host_memory.SampledPeak)

    def test_stopping_what_never_started_does_not_hang(self):
        assert host_memory.SampledPeak(CPU).stop().value > 0


class Scripted(counter.CounterProbe):
    """Counters that give the next value of a script at each read, polled only when asked."""

    quantity = "energy_mj"
    interval_s = None

    def __init__(self, script: dict[str, list[float]], limit: float | None = None) -> None:
        super().__init__(CPU)
        self.script = {name: iter(values) for name, values in script.items()}
        self.limit = limit

    def read(self):
        return {name: next(values) for name, values in self.script.items()}

    def wraps(self, name):
        return self.limit


def run(meter: counter.CounterProbe, polls: int) -> Reading:
    meter.start()
    for _ in range(polls):
        meter.poll()
    return meter.stop()


class TestCounter:
    def test_increments_add_up_and_steps_are_counted(self):
        reading = run(Scripted({"a": [100, 100, 110, 110, 125, 130, 131, 140]}), 6)
        assert (reading.value, reading.steps, reading.spread) == (40, 5, 8)

    def test_two_counters_add_up_and_the_slower_one_counts_the_steps(self):
        reading = run(Scripted({"a": range(8), "b": [0, 10, 10, 20, 30, 40, 50, 50]}), 6)
        assert (reading.value, reading.steps) == (7 + 50, 5)

    def test_every_wrap_around_within_a_window_counts(self):
        reading = run(Scripted({"a": [90, 20, 60, 95, 10, 50, 99]}, limit=100), 5)
        assert reading.value == (20 + 100 - 90) + 40 + 35 + (10 + 100 - 95) + 40 + 49

    def test_a_counter_that_goes_backwards_without_a_known_limit_is_no_reading(self):
        reading = run(Scripted({"a": [90, 95, 20, 21, 22, 23, 24]}), 5)
        assert reading.value is None and "a went backwards, from 95 to 20" in reading.reason

    def test_a_window_of_too_few_steps_is_no_reading(self):
        reading = run(Scripted({"a": [5, 5, 5, 9, 9]}), 3)
        assert reading.value is None
        assert "moved 1 time(s)" in reading.reason and reading.steps == 1

    def test_a_failing_read_is_a_reason_and_its_thread_ends(self):
        meter = Scripted({"a": [1, 2]})
        meter.interval_s = 0.001
        meter.start()
        meter._thread.join(10)
        assert energy_threads() == []
        assert "could not be read (StopIteration" in meter.stop().reason

    def test_it_is_enough_after_steps_and_seconds(self, monkeypatch):
        meter = Scripted({"a": range(1000)})
        seconds = 0.0
        meter.clock = lambda: seconds
        meter.start()
        asked = [meter.enough() for _ in range(counter.WANTED_STEPS + 5)]
        assert asked == [False] * len(asked)  # steps alone do not do
        seconds = counter.WANTED_SECONDS
        assert meter.enough()

    def test_the_thread_sees_what_the_caller_does_not_poll(self):
        meter = Scripted({"a": [*range(60)] + [59] * 10**6})
        meter.interval_s = 0.001
        meter.start()
        while meter._last["a"] < 59:
            time.sleep(0.001)
        reading = meter.stop()
        assert (reading.value, reading.steps) == (59, 59)
        assert energy_threads() == []


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    """Makes a tree as Linux shows it; each domain's counter gives its values one after the other."""

    def make(limit=10**6, **domains):
        monkeypatch.setattr(rapl, "ROOT", tmp_path)
        names = {
            "package": ("intel-rapl:0", "package-0"),
            "core": ("intel-rapl:0:0", "core"),
            "dram": ("intel-rapl:0:1", "dram"),
        }
        names["psys"] = ("intel-rapl:1", "psys")
        names["second"] = ("intel-rapl:2", "package-1")
        for key, values in domains.items():
            folder, name = names[key]
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "name").write_text(name + "\n")
            (tmp_path / folder / "max_energy_range_uj").write_text(f"{limit}\n")
            (tmp_path / folder / "energy_uj").write_text(f"{values[0]}\n")
        return tmp_path

    return make


class TestRapl:
    def read(self, root, steps):
        meter = choose("energy_mj", CPU)
        meter.interval_s = None
        meter.start()
        for step in steps:
            for folder, value in step.items():
                (root / folder / "energy_uj").write_text(f"{value}\n")
            meter.poll()
        return meter.stop()

    def test_package_and_memory_add_up_and_what_they_contain_does_not(self, powercap):
        root = powercap(package=[1000], core=[0], dram=[500], psys=[0])
        steps = [
            {
                "intel-rapl:0": 1000 + 2000 * i,
                "intel-rapl:0:0": 9 * i,
                "intel-rapl:0:1": 500 + 100 * i,
                "intel-rapl:1": 7 * i,
            }
            for i in range(1, 11)
        ]
        reading = self.read(root, steps)
        assert reading.value == pytest.approx((20_000 + 1000) / 1000)  # microjoules shown as millijoules
        assert reading.steps == 10
        assert "package-0 + dram-0" in reading.source

    def test_two_packages_and_a_wrap_around(self, powercap):
        root = powercap(limit=10_000, package=[9000], second=[0])
        steps = [{"intel-rapl:0": (9000 + 500 * i) % 10_000, "intel-rapl:2": 100 * i} for i in range(1, 9)]
        assert self.read(root, steps).value == pytest.approx(4.0 + 0.8)

    def test_no_counters(self, powercap):
        powercap()
        reading = choose("energy_mj", CPU).stop()
        assert reading.value is None and "no energy counters of the processor" in reading.reason

    def test_a_missing_right_names_the_command_that_grants_it(self, powercap, monkeypatch):
        powercap(package=[0])
        monkeypatch.setattr(rapl, "_number", mock.Mock(side_effect=PermissionError))
        reason = choose("energy_mj", CPU).stop().reason
        assert "sudo chmod a+r" in reason and "intel-rapl:*/energy_uj" in reason

    def test_a_counter_that_holds_no_number(self, powercap):
        root = powercap(package=[0])
        (root / "intel-rapl:0" / "energy_uj").write_text("?\n")
        assert "cannot be read" in choose("energy_mj", CPU).stop().reason


@pytest.fixture
def nvml(monkeypatch):
    """NVML by autospec: two boards, of which torch sees the second alone, as its device 0."""
    fake = mock.create_autospec(pynvml, spec_set=False)
    for name in ("NVMLError", "NVMLError_NotSupported", "NVMLError_FunctionNotFound", "NVML_DEVICE_MIG_ENABLE"):
        setattr(fake, name, getattr(pynvml, name))
    fake.nvmlDeviceGetMigMode.return_value = [pynvml.NVML_DEVICE_MIG_DISABLE] * 2
    boards = {"GPU-aaaa": "first", "GPU-bbbb": "second"}

    def by_uuid(uuid):
        if uuid not in boards:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return boards[uuid]

    fake.nvmlDeviceGetHandleByUUID.side_effect = by_uuid
    fake.nvmlDeviceGetHandleByPciBusId.side_effect = {"00000000:0a:00.0": "second"}.__getitem__
    fake.energy = {"first": 10**6, "second": 5000}
    fake.watts = {"first": 700, "second": 100}
    fake.nvmlDeviceGetTotalEnergyConsumption.side_effect = lambda handle: fake.energy[handle]
    fake.nvmlDeviceGetPowerUsage.side_effect = lambda handle: int(1000 * fake.watts[handle])
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    properties = SimpleNamespace(name="test GPU", uuid="bbbb", pci_domain_id=0, pci_bus_id=10, pci_device_id=0)
    fake.properties = properties
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    fake.synchronized = []
    monkeypatch.setattr(torch.cuda, "synchronize", fake.synchronized.append)
    return fake


class TestNvml:
    def meter(self, seconds=1.0, interval_s=None):
        meter = choose("energy_mj", [*GPU, *CPU])
        assert not isinstance(meter, Missing), meter.stop().reason
        meter.interval_s = interval_s
        ticks = iter([0.0])
        meter.clock = lambda: next(ticks, seconds)
        return meter

    def run(self, nvml, meter, steps=10, millijoules=200):
        meter.start()
        for _ in range(steps):
            nvml.energy["second"] += millijoules
            nvml.energy["first"] += 999
            meter.poll()
        return meter.stop()

    def test_only_the_models_gpu_is_read_and_found_by_its_uuid(self, nvml):
        reading = self.run(nvml, self.meter())
        assert (reading.value, reading.steps, reading.notes) == (2000, 10, ())
        assert "cuda:0" in reading.source
        assert {call.args[0] for call in nvml.nvmlDeviceGetTotalEnergyConsumption.call_args_list} == {"second"}

    def test_a_gpu_that_its_uuid_does_not_find_is_found_on_the_bus(self, nvml):
        del nvml.properties.uuid
        assert self.run(nvml, self.meter()).value == 2000

    @pytest.mark.parametrize("uuid", ["bbbb", "a slice's own"])
    def test_a_slice_of_a_gpu_is_never_given_the_energy_of_the_whole_board(self, nvml, uuid):
        nvml.properties.uuid = uuid
        nvml.nvmlDeviceGetMigMode.side_effect = {"second": [pynvml.NVML_DEVICE_MIG_ENABLE] * 2}.__getitem__
        reading = choose("energy_mj", GPU).stop()
        assert reading.value is None
        assert reading.reason == (
            "NVML gives no energy of this GPU: test GPU is a slice (MIG) of a GPU, whose counter is of the whole board"
        )

    @pytest.mark.parametrize("code", [pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND])
    def test_a_gpu_or_a_driver_that_knows_no_slices_is_read(self, nvml, code):
        nvml.nvmlDeviceGetMigMode.side_effect = pynvml.NVMLError(code)
        assert self.run(nvml, self.meter()).value == 2000

    def test_where_nobody_says_whether_it_is_a_slice_nothing_is_read(self, nvml):
        nvml.nvmlDeviceGetMigMode.side_effect = pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
        assert "Insufficient Permissions" in choose("energy_mj", GPU).stop().reason

    def test_the_device_is_synchronized_before_both_readings(self, nvml, monkeypatch):
        order = []
        nvml.nvmlDeviceGetTotalEnergyConsumption.side_effect = lambda h: order.append("read") or len(order)
        meter = self.meter()
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("synchronize"))
        order.clear()
        meter.start()
        assert order[:2] == ["synchronize", "read"]
        order.clear()
        meter.stop()
        assert order[:2] == ["synchronize", "read"]

    def test_a_second_meter_that_disagrees_is_told(self, nvml):
        nvml.watts["second"] = 130
        reading = self.run(nvml, self.meter(seconds=5.0), steps=20, millijoules=25_000)  # 500 J in 5 s are 100 W
        assert reading.value == 500_000
        assert reading.notes == ("NVML's power reading says 130.0 W and its energy counter 100.0 W over 5.0 s",)

    def test_two_meters_that_agree_say_nothing(self, nvml):
        nvml.watts["second"] = 105
        assert self.run(nvml, self.meter(seconds=5.0), steps=20, millijoules=25_000).notes == ()

    def test_a_gpu_without_a_power_reading_still_gives_energy(self, nvml):
        nvml.nvmlDeviceGetPowerUsage.side_effect = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        reading = self.run(nvml, self.meter(seconds=5.0))
        assert reading.value == 2000 and reading.notes == ()

    @pytest.mark.parametrize("call", ["nvmlInit", "nvmlDeviceGetTotalEnergyConsumption"])
    def test_what_the_driver_refuses_is_a_reason(self, nvml, call):
        getattr(nvml, call).side_effect = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        reading = choose("energy_mj", GPU).stop()
        assert reading.value is None and reading.reason == "NVML gives no energy of this GPU: Not Supported"

    def test_a_driver_that_fails_in_the_window_is_a_reason(self, nvml):
        meter = self.meter()
        meter.start()
        nvml.nvmlDeviceGetTotalEnergyConsumption.side_effect = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        assert "GPU is lost" in meter.stop().reason

    def test_a_counter_that_stands_still_is_no_reading(self, nvml):
        reading = self.run(nvml, self.meter(), millijoules=0)
        assert reading.value is None and "moved 0 time(s)" in reading.reason


def test_nvml_on_hardware():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: NVML is tested on a real GPU only")
    meter = choose("energy_mj", GPU)
    if isinstance(meter, Missing):
        pytest.skip(meter.reason)
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    readings = []
    for busy in (True, False):
        meter = choose("energy_mj", GPU)
        began = time.perf_counter()
        with window([meter]) as reading:
            while not meter.enough() or time.perf_counter() - began < 4:
                if busy:
                    for _ in range(50):
                        a @ a
                    torch.cuda.synchronize()
                else:
                    time.sleep(0.01)
        seconds = time.perf_counter() - began
        readings.append((reading["energy_mj"], seconds))
    (hot, hot_s), (cool, cool_s) = readings
    assert hot.reason is None and cool.reason is None
    assert hot.steps >= counter.WANTED_STEPS
    assert hot.value / hot_s > 1.5 * cool.value / cool_s  # working takes more power than waiting
    assert 10 < cool.value / 1000 / cool_s < hot.value / 1000 / hot_s < 3000  # watts of one board
    assert hot.notes == ()  # the driver's power reading agrees


def test_cuda_memory_on_hardware():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch's CUDA allocator is tested on a real GPU only")
    held = torch.cuda.memory_allocated()
    meter = choose("peak_cuda_bytes", GPU)
    meter.start()
    block = torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda")
    del block
    assert meter.stop().value - held == pytest.approx(64 * 2**20, rel=0.05)


def test_cuda_memory_without_a_gpu_says_why():
    assert choose("peak_cuda_bytes", CPU).stop().reason == "nothing here is on a CUDA device"


class TestReplay:
    def recording(self, tmp_path, rows):
        file = tmp_path / "energy.csv"
        file.write_text("time,value\n" + "".join(f"{t},{v}\n" for t, v in rows))
        return file

    def test_it_reads_the_recorded_counter(self, tmp_path):
        file = self.recording(tmp_path, [(5 + i, 1000 + 30 * i) for i in range(20)])
        now = [100.0]
        with using("energy_mj", replay(file, clock=lambda: now[0])):
            meter = choose("energy_mj", CPU)
            meter.start()
            for _ in range(7):
                now[0] += 1.0
                meter.poll()
            now[0] += 0.5  # between two lines: the counter stands still
            reading = meter.stop()
        assert (reading.value, reading.steps, reading.source) == (210, 7, "replay of energy.csv")

    def test_a_second_window_goes_on_where_the_first_ended(self, tmp_path):
        file = self.recording(tmp_path, [(i, i * i) for i in range(30)])
        now = [0.0]
        kind = replay(file, clock=lambda: now[0])
        values = []
        for _ in range(2):
            meter = kind(CPU)
            meter.start()
            for _ in range(10):
                now[0] += 1.0
                meter.poll()
            values.append(meter.stop().value)
        assert values == [100, 300]

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ("t,v\n1,2\n", "has the columns time and value"),
            ("time,value\n1,x\n", "line 2"),
            ("time,value\n2,1\n1,2\n", "its times grow"),
            ("time,value\n", "at least one"),
            ("", "has the columns None"),
        ],
    )
    def test_what_is_no_recording_is_refused(self, tmp_path, content, says):
        file = tmp_path / "bad.csv"
        file.write_text(content)
        with pytest.raises(BadInput, match=says):
            replay(file)
