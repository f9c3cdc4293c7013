"""Counts and durations of one model version, as the statistics extension and the metrics report them."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from venturi.serve.request import InferRequest

REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
BUCKETS_MS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


@dataclass(slots=True)
class Duration:
    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        self.count += count
        self.ns += ns

    def to_json(self) -> dict[str, int]:
        return {"count": self.count, "ns": self.ns}


@dataclass(slots=True)
class Phases:
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)


@dataclass
class Histogram:
    """Counts by upper bound in milliseconds, the last for everything above."""

    bounds: tuple[float, ...] = BUCKETS_MS
    total_ms: float = 0.0
    counts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, ms: float) -> None:
        self.counts[bisect_left(self.bounds, ms)] += 1
        self.total_ms += ms


@dataclass
class ModelStatistics:
    """Written under the scheduler's lock. `pending`: requests accepted and not yet handed to an instance."""

    inferences: int = 0
    executions: int = 0
    last_ms: int = 0
    pending: int = 0
    load_s: float = 0.0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    cache_hit: Duration = field(default_factory=Duration)
    cache_miss: Duration = field(default_factory=Duration)
    phases: Phases = field(default_factory=Phases)
    batches: dict[int, Phases] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    latency: Histogram = field(default_factory=Histogram)

    def record_batch(self, requests: Sequence[InferRequest]) -> None:
        """A batch was computed; its requests carry their times."""
        rows, count = sum(r.rows for r in requests), len(requests)
        times = requests[0].times
        spent = (times.input_done - times.compute, times.output - times.input_done, times.end - times.output)
        batch = self.batches.get(rows) or self.batches.setdefault(rows, Phases())
        own = self.phases
        for one, all_of_it, ns in (
            (batch.compute_input, own.compute_input, spent[0]),
            (batch.compute_infer, own.compute_infer, spent[1]),
            (batch.compute_output, own.compute_output, spent[2]),
        ):
            one.add(ns)
            all_of_it.add(ns * count, count)
        for request in requests:
            t = request.times
            self.queue.add(t.compute - t.queued)
            self.success.add(t.end - t.start)
            self.latency.add((t.end - t.start) / 1e6)
        self.inferences += rows
        self.executions += 1
        self.last_ms = int(time.time() * 1e3)

    def record_hit(self, request: InferRequest, lookup_ns: int) -> None:
        """Answered from the cache: a success that was not computed."""
        now = time.perf_counter_ns()
        self.cache_hit.add(lookup_ns)
        self.queue.add(now - request.times.queued)
        self.success.add(now - request.times.start)
        self.latency.add((now - request.times.start) / 1e6)
        self.last_ms = int(time.time() * 1e3)

    def record_failure(self, request: InferRequest, reason: str) -> None:
        self.fail.add(time.perf_counter_ns() - request.times.start)
        self.failures[reason] += 1

    def to_json(self, name: str, version: str, responses: dict[str, Any]) -> dict[str, Any]:
        """The statistics extension's model_stat; `responses` of decoupled models."""
        p = self.phases
        return {
            "name": name,
            "version": version,
            "last_inference": self.last_ms,
            "inference_count": self.inferences,
            "execution_count": self.executions,
            "inference_stats": {
                "success": self.success.to_json(), "fail": self.fail.to_json(), "queue": self.queue.to_json(),
                "compute_input": p.compute_input.to_json(), "compute_infer": p.compute_infer.to_json(),
                "compute_output": p.compute_output.to_json(), "cache_hit": self.cache_hit.to_json(),
                "cache_miss": self.cache_miss.to_json(),
            },
            "response_stats": responses,
            "batch_stats": [
                {
                    "batch_size": size, "compute_input": b.compute_input.to_json(),
                    "compute_infer": b.compute_infer.to_json(), "compute_output": b.compute_output.to_json(),
                }
                for size, b in sorted(self.batches.items())
            ],
            "memory_usage": [],
        }  # fmt: skip
