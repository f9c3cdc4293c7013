"""Metrics of a model's own, as `triton_python_backend_utils` has them: the server keeps them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


class TritonModelException(Exception):
    """Raised by models to fail what they were doing."""


class MetricFamily:
    """Metrics of one name on the server's page. Families and labels made twice, also in other processes, are the same.

    Raises TritonModelException for what Prometheus would not take.
    """

    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
    asked: Callable[[dict[str, Any]], float]
    told: Callable[[dict[str, Any]], None]

    def __init__(self, name: str, description: str, kind: str) -> None:
        self._is_held = False
        self.name, self.kind = name, kind
        MetricFamily.asked({"do": "family", "name": name, "text": description, "kind": kind})
        self._is_held = True

    def Metric(self, labels: Mapping[str, str] | None = None, buckets: Sequence[float] | None = None) -> Metric:
        return Metric(self, dict(labels or {}), list(buckets or []))

    def __del__(self) -> None:
        if self._is_held:
            MetricFamily.told({"do": "drop", "name": self.name})


class Metric:
    """One set of labels of a family."""

    def __init__(self, family: MetricFamily, labels: dict[str, str], buckets: list[float]) -> None:
        self._is_held = False
        self._family, self._labels = family, labels
        MetricFamily.asked(self._head("metric") | {"buckets": buckets})
        self._is_held = True

    def increment(self, value: float) -> None:
        """A counter by what is not below zero, a gauge by anything."""
        if self._family.kind == MetricFamily.COUNTER and not value >= 0:
            raise TritonModelException(f"a counter cannot be incremented by {value}")
        self._change("increment", value, MetricFamily.COUNTER, MetricFamily.GAUGE)

    def set(self, value: float) -> None:
        """A gauge."""
        self._change("set", value, MetricFamily.GAUGE)

    def observe(self, value: float) -> None:
        """A histogram."""
        self._change("observe", value, MetricFamily.HISTOGRAM)

    def value(self) -> float:
        """Of a counter or a gauge, everybody's changes included."""
        self._check("value", MetricFamily.COUNTER, MetricFamily.GAUGE)
        return MetricFamily.asked(self._head("value"))

    def _change(self, do: str, value: float, *kinds: str) -> None:
        self._check(do, *kinds)
        MetricFamily.told(self._head(do) | {"value": float(value)})

    def _check(self, do: str, *kinds: str) -> None:
        if self._family.kind not in kinds:
            raise TritonModelException(
                f"'{do}' is for a {' or a '.join(kinds)}, '{self._family.name}' is a {self._family.kind}"
            )

    def _head(self, do: str) -> dict[str, Any]:
        return {"do": do, "name": self._family.name, "labels": self._labels}

    def __del__(self) -> None:
        if self._is_held:
            MetricFamily.told(self._head("drop"))
