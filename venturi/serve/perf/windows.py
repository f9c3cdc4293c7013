"""From single answers to a figure: windows of time, and when the last of them agree. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

LAST = 3
PERCENTILES = (50, 90, 95, 99)


@dataclass
class Window:
    """Answers that arrived within `seconds`. latencies_us: of each; `late`: sent more than 1 ms after their time."""

    seconds: float
    latencies_us: list[float] = field(default_factory=list)
    errors: int = 0
    late: int = 0

    @property
    def per_s(self) -> float:
        return len(self.latencies_us) / self.seconds

    def level(self, percentile: int | None) -> float:
        """The latency that is compared between windows: the mean, or a percentile."""
        if not self.latencies_us:
            return 0.0
        if percentile is None:
            return sum(self.latencies_us) / len(self.latencies_us)
        return quantile(sorted(self.latencies_us), percentile)


def quantile(ordered: Sequence[float], percentile: int) -> float:
    """The smallest value that at least `percentile` % of the values do not exceed. `ordered` is not empty."""
    rank = -(-len(ordered) * percentile // 100)
    return ordered[max(rank, 1) - 1]


def is_stable(windows: Sequence[Window], share: float, percentile: int | None) -> bool:
    """The last three windows agree in throughput and latency within +-share of their mean."""
    last = windows[-LAST:]
    if len(last) < LAST or not all(w.latencies_us for w in last):
        return False
    for values in ([w.per_s for w in last], [w.level(percentile) for w in last]):
        mean = sum(values) / LAST
        if any(abs(v - mean) > share * mean for v in values):
            return False
    return True


@dataclass(frozen=True)
class Figure:
    """One level of load. Throughput in inferences (rows) a second, latencies in microseconds."""

    load: dict[str, float]
    infer_per_s: float
    requests: int
    errors: int
    late: int
    mean_us: float
    percentiles_us: dict[int, float]
    is_stable: bool
    server: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        shares = {f"p{p}_us": round(v, 1) for p, v in self.percentiles_us.items()}
        return {
            **self.load, "infer_per_s": round(self.infer_per_s, 2), "requests": self.requests, "errors": self.errors,
            "late": self.late, "avg_us": round(self.mean_us, 1), **shares, "stable": self.is_stable,
            **{k: round(v, 2) for k, v in self.server.items()},
        }  # fmt: skip


def figure(
    load: dict[str, float], windows: Sequence[Window], rows: int, stable: bool, server: dict[str, float]
) -> Figure:
    """The last windows joined."""
    last = windows[-LAST:]
    latencies = sorted(v for w in last for v in w.latencies_us)
    seconds = sum(w.seconds for w in last)
    shares = {p: quantile(latencies, p) if latencies else 0.0 for p in PERCENTILES}
    mean = sum(latencies) / len(latencies) if latencies else 0.0
    errors, late = sum(w.errors for w in last), sum(w.late for w in last)
    return Figure(load, len(latencies) * rows / seconds, len(latencies), errors, late, mean, shares, stable, server)


def sweep(text: str, name: str) -> list[float]:
    """START[:END[:STEP]] -> the levels; END is included."""
    parts = text.split(":")
    try:
        numbers = [float(p) for p in parts]
    except ValueError:
        numbers = []
    start, end, step = [*numbers, *[*numbers[:1], 1.0][len(numbers) - 1 :]][:3] if 1 <= len(numbers) <= 3 else (0, 0, 0)
    if start <= 0 or step <= 0 or end < start:
        raise ValueError(f"{name} must be START[:END[:STEP]] of positive numbers, got {text!r}")
    count = int((end - start) / step + 1e-9) + 1
    return [start + i * step for i in range(count)]


def breakdown(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """What the server says of the time between two model_stats: mean microseconds a request, and rows a batch."""
    out: dict[str, float] = {}
    for phase in ("queue", "compute_input", "compute_infer", "compute_output"):
        a, b = before["inference_stats"][phase], after["inference_stats"][phase]
        count = int(b["count"]) - int(a["count"])
        if count:
            out[f"server_{phase}_us"] = (int(b["ns"]) - int(a["ns"])) / count / 1e3
    runs = int(after["execution_count"]) - int(before["execution_count"])
    if runs:
        out["server_batch"] = (int(after["inference_count"]) - int(before["inference_count"])) / runs
    return out
