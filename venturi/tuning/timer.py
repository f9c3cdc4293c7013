"""Times one call on the CPU: warm-up, then single calls with the caches swept in between.

The figure is the median of the faster half: a busy machine only ever adds time, often whole time slices.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

_SWEEP_BYTES = 8 << 20


@dataclass(frozen=True)
class Timing:
    median_us: float
    spread_us: float


class Timer(Protocol):
    def time(self, fn: Callable[[], object], repeats: int, deadline: float, beat_us: float | None = None) -> Timing: ...


class CpuTimer:
    """Reusable: owns the buffer that sweeps the caches."""

    def __init__(self) -> None:
        self._sweep = torch.zeros(_SWEEP_BYTES, dtype=torch.uint8)

    def time(self, fn: Callable[[], object], repeats: int, deadline: float, beat_us: float | None = None) -> Timing:
        """Of up to `repeats` calls; stops at `deadline` (time.perf_counter) and, after two calls, when a
        call is already three times slower than `beat_us`."""
        fn()
        times: list[float] = []
        for _ in range(repeats):
            self._sweep.add_(1)
            start = time.perf_counter()
            fn()
            times.append((time.perf_counter() - start) * 1e6)
            hopeless = beat_us is not None and len(times) >= 2 and min(times) > 3 * beat_us
            if hopeless or time.perf_counter() > deadline:
                break
        times.sort()
        median = statistics.median(times[: (len(times) + 1) // 2])
        return Timing(median, times[-1] - times[0])
