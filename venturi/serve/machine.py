"""Metrics of the machine: processors and memory from /proc, NVIDIA GPUs from the driver's management library."""

from __future__ import annotations

import ctypes as C
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

# name, kind, text, samples: labels in braces (or nothing) and value
Family = tuple[str, str, str, list[tuple[str, float]]]


class Machine:
    """What a scrape says of the machine. What cannot be read is left out.

    `nvml` stands in for libnvidia-ml.so.1 in tests.
    """

    def __init__(self, nvml: Any = None, proc: Path = Path("/proc")) -> None:
        self._gpus, self._proc = Gpus(nvml), proc
        self._busy_before = self._ticks()
        self._share: float | None = None

    def families(self) -> Iterator[Family]:
        memory = self._memory()
        if {"MemTotal", "MemAvailable"} <= memory.keys():
            total, used = memory["MemTotal"], memory["MemTotal"] - memory["MemAvailable"]
            yield "nv_cpu_memory_total_bytes", "gauge", "CPU total memory (RAM), in bytes", [("", total)]
            yield "nv_cpu_memory_used_bytes", "gauge", "CPU used memory (RAM), in bytes", [("", used)]
        before, now = self._busy_before, self._ticks()
        if before is not None and now is not None and now[1] > before[1]:
            self._share, self._busy_before = (now[0] - before[0]) / (now[1] - before[1]), now
        if self._share is not None:
            text = "CPU utilization rate [0.0 - 1.0] since the scrape before"
            yield "nv_cpu_utilization", "gauge", text, [("", self._share)]
        with suppress(OSError, ValueError):
            resident = int((self._proc / "self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            yield "venturi_process_resident_bytes", "gauge", "Resident memory of the server in bytes", [("", resident)]
        yield from self._gpus.families()

    def _memory(self) -> dict[str, int]:
        found = {}
        with suppress(OSError, ValueError):
            for line in (self._proc / "meminfo").read_text().splitlines():
                name, _, rest = line.partition(":")
                found[name] = int(rest.split()[0]) * 1024
        return found

    def _ticks(self) -> tuple[int, int] | None:
        """Busy and all ticks of all processors since the start."""
        with suppress(OSError, ValueError, IndexError):
            ticks = [int(t) for t in (self._proc / "stat").read_text().splitlines()[0].split()[1:9]]
            return sum(ticks) - ticks[3] - ticks[4], sum(ticks)
        return None


class _Memory(C.Structure):
    _fields_ = [("total", C.c_ulonglong), ("free", C.c_ulonglong), ("used", C.c_ulonglong)]


class _Utilization(C.Structure):
    _fields_ = [("gpu", C.c_uint), ("memory", C.c_uint)]


class Gpus:
    """The GPUs that the management library knows; none without it."""

    def __init__(self, library: Any = None) -> None:
        self._handles: list[tuple[str, C.c_void_p]] = []
        self._library = library
        if library is None:
            try:
                self._library = C.CDLL("libnvidia-ml.so.1")
            except OSError:
                return
        count = C.c_uint()
        if self._fails("nvmlInit_v2") or self._fails("nvmlDeviceGetCount_v2", C.byref(count)):
            return
        for index in range(count.value):
            handle, name = C.c_void_p(), C.create_string_buffer(96)
            if self._fails("nvmlDeviceGetHandleByIndex_v2", C.c_uint(index), C.byref(handle)):
                continue
            if not self._fails("nvmlDeviceGetUUID", handle, name, C.c_uint(len(name))):
                self._handles.append((name.value.decode(), handle))

    def _fails(self, name: str, *arguments: Any) -> bool:
        return bool(getattr(self._library, name)(*arguments))

    def families(self) -> Iterator[Family]:
        if not self._handles:
            return
        memory, used = [], []
        for labels, device in self._labelled():
            space = _Memory()
            if not self._fails("nvmlDeviceGetMemoryInfo", device, C.byref(space)):
                memory.append((labels, space.total))
                used.append((labels, space.used))
        yield "nv_gpu_memory_total_bytes", "gauge", "GPU total memory, in bytes", list(memory)
        yield "nv_gpu_memory_used_bytes", "gauge", "GPU used memory, in bytes", list(used)
        busy = []
        for labels, device in self._labelled():
            rates = _Utilization()
            if not self._fails("nvmlDeviceGetUtilizationRates", device, C.byref(rates)):
                busy.append((labels, rates.gpu / 100))
        yield "nv_gpu_utilization", "gauge", "GPU utilization rate [0.0 - 1.0)", busy
        watts = "GPU power {} in watts".format
        yield "nv_gpu_power_usage", "gauge", watts("usage"), self._milli("nvmlDeviceGetPowerUsage", C.c_uint)
        limit = self._milli("nvmlDeviceGetEnforcedPowerLimit", C.c_uint)
        yield "nv_gpu_power_limit", "gauge", watts("management limit"), limit
        energy = self._milli("nvmlDeviceGetTotalEnergyConsumption", C.c_ulonglong)
        yield "nv_energy_consumption", "counter", "GPU energy consumption in joules since the driver was loaded", energy

    def _labelled(self) -> Iterator[tuple[str, C.c_void_p]]:
        for name, handle in self._handles:
            yield f'{{gpu_uuid="{name}"}}', handle

    def _milli(self, name: str, kind: Any) -> list[tuple[str, float]]:
        """A figure that the library gives in thousandths, of the GPUs that have it."""
        found: list[tuple[str, float]] = []
        for labels, device in self._labelled():
            value = kind()
            if not self._fails(name, device, C.byref(value)):
                found.append((labels, value.value / 1000))
        return found
