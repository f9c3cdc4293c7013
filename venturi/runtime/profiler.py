"""Accumulates time by step."""

from __future__ import annotations

import statistics
from collections import defaultdict


class Profiler:
    """`times_us[i]` are the samples of call i; `runs` counts whole runs."""

    def __init__(self) -> None:
        self.times_us: dict[int, list[float]] = defaultdict(list)
        self.runs = 0

    def add(self, index: int, time_us: float) -> None:
        self.times_us[index].append(time_us)

    def medians_us(self, count: int) -> list[float]:
        """Median time of every call; 0 for calls never seen."""
        return [statistics.median(self.times_us[i]) if self.times_us.get(i) else 0.0 for i in range(count)]
