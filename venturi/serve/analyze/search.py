"""Which configurations are tried, when a level of load is the last, and which result is best. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

_GAIN = 1.05


@dataclass(frozen=True)
class Variant:
    """What is changed in the model's configuration. `max_batch` 0: the model does not batch."""

    instances: int
    max_batch: int
    delay_us: int

    def apply(self, config: dict[str, Any]) -> dict[str, Any]:
        """The configuration (as the model configuration extension gives it) with this variant's settings."""
        out = dict(config)
        groups = config.get("instance_group") or [{"kind": "KIND_CPU"}]
        out["instance_group"] = [{**groups[0], "count": self.instances}]
        out["max_batch_size"] = self.max_batch
        out.pop("dynamic_batching", None)
        if self.max_batch > 1:
            out["dynamic_batching"] = {"max_queue_delay_microseconds": self.delay_us}
        return out

    @property
    def label(self) -> str:
        batch = f"batch {self.max_batch}" if self.max_batch else "no batching"
        delay = f", {self.delay_us} us" if self.delay_us and self.max_batch > 1 else ""
        return f"{self.instances} instance{'s' * (self.instances > 1)}, {batch}{delay}"


@dataclass(frozen=True)
class Result:
    """One variant at one concurrency. Latency is the compared percentile."""

    variant: Variant
    concurrency: int
    infer_per_s: float
    latency_us: float
    mean_us: float
    rows_a_batch: float

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self.variant), **{k: v for k, v in asdict(self).items() if k != "variant"}}


def variants(instances: Iterable[int], batches: Iterable[int], delays: Iterable[int], limit: int) -> list[Variant]:
    """Every combination that differs; `limit` is the model's own max_batch_size."""
    found = []
    for count, batch, delay in itertools.product(instances, batches, delays):
        if limit == 0 or batch <= limit:
            made = Variant(count, batch if limit else 0, delay if limit and batch > 1 else 0)
            if made not in found:
                found.append(made)
    return found


def is_enough(levels: Sequence[Result], budget_us: float | None) -> bool:
    """No higher concurrency can be better: the last is over the budget, or gave less than 5 % over the best before."""
    if not levels:
        return False
    last = levels[-1]
    if budget_us is not None and last.latency_us > budget_us:
        return True
    return len(levels) > 1 and last.infer_per_s < _GAIN * max(r.infer_per_s for r in levels[:-1])


def best(results: Sequence[Result], objective: str, budget_us: float | None) -> Result | None:
    """Most throughput, or least latency, among those within the budget; None when there is none."""
    allowed = [r for r in results if budget_us is None or r.latency_us <= budget_us]
    if objective == "latency":
        return min(allowed, key=lambda r: (r.latency_us, -r.infer_per_s), default=None)
    return max(allowed, key=lambda r: (r.infer_per_s, -r.latency_us), default=None)


def frontier(results: Sequence[Result]) -> list[Result]:
    """Those that no other beats in both throughput and latency, from the least latency on."""
    found: list[Result] = []
    for result in sorted(results, key=lambda r: (r.latency_us, -r.infer_per_s)):
        if not found or result.infer_per_s > found[-1].infer_per_s:
            found.append(result)
    return found
