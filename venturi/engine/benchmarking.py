"""trtexec's protocol: 200 ms of warm-up, at least 3 s and 10 runs, latency percentiles; one stream or several."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

PERCENTILES = (90, 95, 99)


@dataclass(frozen=True)
class Latency:
    """Milliseconds over `runs` runs; `throughput_qps` is runs over host wall time; `cv_percent` the relative spread."""

    runs: int
    wall_s: float
    throughput_qps: float
    min_ms: float
    max_ms: float
    mean_ms: float
    median_ms: float
    percentiles_ms: dict[int, float]
    cv_percent: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def percentile(sorted_times: Sequence[float], p: float) -> float:
    """trtexec's definition: sorted[max(n - 1 - int((1 - p/100) n), 0)].

    >>> percentile([1.0, 2.0, 3.0, 4.0], 50)
    2.0
    """
    n = len(sorted_times)
    return sorted_times[max(n - 1 - int((1 - p / 100) * n), 0)]


def measure(
    call: Callable[[], object],
    *,
    warm_up_ms: float = 200.0,
    duration_s: float = 3.0,
    iterations: int = 10,
    callers: int = 1,
) -> Latency:
    """Time `call` until both the duration and the number of iterations are reached, from `callers` threads at once."""
    end = time.perf_counter() + warm_up_ms / 1e3
    call()
    while time.perf_counter() < end:
        call()
    start = time.perf_counter()

    def loop(_: int = 0) -> list[float]:
        times: list[float] = []
        while len(times) * callers < iterations or time.perf_counter() - start < duration_s:
            t = time.perf_counter()
            call()
            times.append((time.perf_counter() - t) * 1e3)
        return times

    if callers == 1:
        times = loop()
    else:
        with ThreadPoolExecutor(callers) as pool:
            times = [t for part in pool.map(loop, range(callers)) for t in part]
    wall = time.perf_counter() - start
    ordered = sorted(times)
    mean = statistics.fmean(times)
    spread = statistics.pstdev(times) / mean * 100 if mean else 0.0
    return Latency(
        len(times), wall, len(times) / wall, ordered[0], ordered[-1], mean, statistics.median(times),
        {p: percentile(ordered, p) for p in PERCENTILES}, spread,
    )  # fmt: skip
