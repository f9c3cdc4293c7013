"""Metrics of the machine, from made-up files and a made-up management library, and as the server gives them."""

from __future__ import annotations

import ctypes as C
import time
import urllib.request
from pathlib import Path

import pytest

from tests.serve.running import DIGITS, serving
from venturi.serve.machine import Machine


class Nvml:
    """Two GPUs; the second has no counter of energy. `broken` says which calls fail for all."""

    def __init__(self, broken: tuple[str, ...] = ()) -> None:
        self.broken = broken

    def __getattr__(self, name: str):
        if name in self.broken:
            return lambda *_: 999
        return getattr(type(self), f"do_{name}").__get__(self)

    def do_nvmlInit_v2(self) -> int:
        return 0

    def do_nvmlDeviceGetCount_v2(self, count) -> int:
        count._obj.value = 2
        return 0

    def do_nvmlDeviceGetHandleByIndex_v2(self, index: C.c_uint, handle) -> int:
        handle._obj.value = 100 + index.value
        return 0

    def do_nvmlDeviceGetUUID(self, handle: C.c_void_p, name, size: C.c_uint) -> int:
        name.value = f"GPU-{handle.value}".encode()
        assert len(name) == size.value
        return 0

    def do_nvmlDeviceGetMemoryInfo(self, handle: C.c_void_p, memory) -> int:
        memory._obj.total, memory._obj.free, memory._obj.used = 1000, 400, 600 + handle.value
        return 0

    def do_nvmlDeviceGetUtilizationRates(self, handle: C.c_void_p, rates) -> int:
        rates._obj.gpu, rates._obj.memory = 25, 99
        return 0

    def do_nvmlDeviceGetPowerUsage(self, handle: C.c_void_p, value) -> int:
        value._obj.value = 70_500
        return 0

    def do_nvmlDeviceGetEnforcedPowerLimit(self, handle: C.c_void_p, value) -> int:
        value._obj.value = 700_000
        return 0

    def do_nvmlDeviceGetTotalEnergyConsumption(self, handle: C.c_void_p, value) -> int:
        value._obj.value = 5_000_000_000_250
        return 3 if handle.value == 101 else 0


def samples(machine: Machine) -> dict[str, float]:
    return {name + labels: value for name, _, _, found in machine.families() for labels, value in found}


def proc(folder: Path, busy: int, idle: int) -> Path:
    (folder / "self").mkdir(exist_ok=True)
    (folder / "meminfo").write_text("MemTotal: 1000 kB\nMemAvailable: 300 kB\nHugePages_Total: 0\n")
    (folder / "stat").write_text(f"cpu  {busy} 0 0 {idle} 0 0 0 0 0 0\ncpu0 1 1 1 1\n")
    (folder / "self/statm").write_text("9 7 1 1 0 1 0\n")
    return folder


def test_gpus_as_the_management_library_has_them(tmp_path):
    found = samples(Machine(Nvml(), tmp_path))
    one, two = '{gpu_uuid="GPU-100"}', '{gpu_uuid="GPU-101"}'
    assert found[f"nv_gpu_memory_total_bytes{one}"] == 1000
    assert (found[f"nv_gpu_memory_used_bytes{one}"], found[f"nv_gpu_memory_used_bytes{two}"]) == (700, 701)
    assert found[f"nv_gpu_utilization{two}"] == 0.25
    assert found[f"nv_gpu_power_usage{one}"] == 70.5
    assert found[f"nv_gpu_power_limit{one}"] == 700
    assert found[f"nv_energy_consumption{one}"] == 5_000_000_000.25
    assert f"nv_energy_consumption{two}" not in found


@pytest.mark.parametrize("call", ["nvmlInit_v2", "nvmlDeviceGetCount_v2", "nvmlDeviceGetUUID"])
def test_a_library_that_does_not_work_says_nothing(tmp_path, call):
    assert not samples(Machine(Nvml((call,)), tmp_path))


def test_processors_and_memory(tmp_path):
    machine = Machine(Nvml(("nvmlInit_v2",)), proc(tmp_path, 100, 100))
    first = samples(machine)
    assert first["nv_cpu_memory_total_bytes"] == 1000 * 1024
    assert first["nv_cpu_memory_used_bytes"] == 700 * 1024
    assert "nv_cpu_utilization" not in first
    proc(tmp_path, 130, 110)
    assert samples(machine)["nv_cpu_utilization"] == 0.75
    assert samples(machine)["nv_cpu_utilization"] == 0.75  # no time has passed
    proc(tmp_path, 130, 210)
    assert samples(machine)["nv_cpu_utilization"] == 0.0


def test_the_server_gives_them():
    with serving(DIGITS) as server:
        time.sleep(0.1)  # ticks are 10 ms
        for _ in range(2):
            with urllib.request.urlopen(f"http://{server.url('metrics')}/metrics") as answer:
                lines = answer.read().decode().splitlines()
        assert lines.index("# TYPE nv_cpu_utilization gauge") + 1 < len(lines)
        share = next(line for line in lines if line.startswith("nv_cpu_utilization "))
        assert 0 <= float(share.split()[1]) <= 1
        assert any(line.startswith("venturi_process_resident_bytes ") for line in lines)
