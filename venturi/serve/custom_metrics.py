"""Metrics of Python models' own: families of counters, gauges and histograms, beside the server's on one page."""

from __future__ import annotations

import bisect
import itertools
import math
import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from venturi.serve.errors import invalid
from venturi.serve.metrics import escaped, number

KINDS = ("counter", "gauge", "histogram")
MOST_SERIES = 10_000
_NAME, _LABEL = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*"), re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_RESERVED = ("nv_", "venturi_")

Labels = tuple[tuple[str, str], ...]


@dataclass
class _Series:
    """One set of labels. `counts` has an entry a bucket and one for what is above them all."""

    buckets: tuple[float, ...] = ()
    value: float = 0.0
    counts: list[int] = field(default_factory=list)


@dataclass
class _Family:
    kind: str
    text: str
    series: dict[Labels, _Series] = field(default_factory=dict)


class CustomMetrics:
    """Thread-safe. A family, and a set of labels in it, exist as long as one of the processes that made them holds
    it; all who hold the same count together."""

    def __init__(self) -> None:
        self._families: dict[str, _Family] = {}
        self._held: Counter[tuple[str, Labels | None]] = Counter()
        self._lock = threading.Lock()

    def hold_family(self, name: str, kind: str, text: str) -> None:
        """Raises ServeError for a name that is none, is the server's, or is known as something else."""
        if not _NAME.fullmatch(name) or name.startswith(_RESERVED):
            raise invalid(f"metric family {name!r}: a name has letters, digits, _ and :, and begins with none of "
                          f"{', '.join(_RESERVED)}")  # fmt: skip
        if kind not in KINDS:
            raise invalid(f"metric family {name!r} has kind {kind!r}, expected one of {', '.join(KINDS)}")
        with self._lock:
            known = self._families.setdefault(name, _Family(kind, text))
            if (known.kind, known.text) != (kind, text):
                raise invalid(f"metric family {name!r} is a {known.kind} already, {known.text!r}")
            self._held[name, None] += 1

    def hold_metric(self, name: str, labels: Labels, buckets: Sequence[float]) -> None:
        """Raises ServeError for labels or buckets that Prometheus would not take."""
        if wrong := next((k for k, _ in labels if not _LABEL.fullmatch(k) or k == "le"), None):
            raise invalid(f"metric of {name!r}: {wrong!r} is no name of a label")
        bounds = tuple(float(b) for b in buckets)
        with self._lock:
            if (family := self._families.get(name)) is None:
                raise invalid(f"there is no metric family {name!r}")
            rising = all(a < b for a, b in itertools.pairwise(bounds))
            if (family.kind == "histogram") != bool(bounds) or not rising:
                text = f"a histogram, and nothing else, has rising buckets, got {list(bounds)}"
                raise invalid(f"metric of {name!r}: {text}")
            if labels not in family.series and sum(len(f.series) for f in self._families.values()) >= MOST_SERIES:
                raise invalid(f"metric of {name!r}: there are {MOST_SERIES} metrics of Python models already")
            known = family.series.setdefault(labels, _Series(bounds, counts=[0] * (len(bounds) + 1)))
            if known.buckets != bounds:
                raise invalid(f"metric of {name!r}: these labels have the buckets {list(known.buckets)} already")
            self._held[name, labels] += 1

    def drop(self, name: str, labels: Labels | None) -> None:
        """One holder less of a family (no labels) or a metric."""
        with self._lock:
            self._held[name, labels] -= 1
            if self._held[name, labels] > 0:
                return
            del self._held[name, labels]
            if labels is not None:
                del self._families[name].series[labels]
            if not any(held == name for held, _ in self._held):
                del self._families[name]

    def change(self, name: str, labels: Labels, do: str, value: float) -> None:
        """`do`: increment, set or observe."""
        with self._lock:
            series = self._series(name, labels)
            series.value = value if do == "set" else series.value + value
            if do == "observe":
                series.counts[bisect.bisect_left(series.buckets, value)] += 1

    def value(self, name: str, labels: Labels) -> float:
        with self._lock:
            return self._series(name, labels).value

    def _series(self, name: str, labels: Labels) -> _Series:
        family = self._families.get(name)
        if family is None or labels not in family.series:
            raise invalid(f"there is no metric of {name!r} with the labels {dict(labels)}")
        return family.series[labels]

    def render(self) -> str:
        """Prometheus text."""
        with self._lock:
            return "".join(line + "\n" for name, f in sorted(self._families.items()) for line in _lines(name, f))


def _lines(name: str, family: _Family) -> list[str]:
    lines = [f"# HELP {name} {family.text}".replace("\n", " "), f"# TYPE {name} {family.kind}"]
    for labels, series in family.series.items():
        inner = ",".join(f'{k}="{escaped(v)}"' for k, v in labels)
        if family.kind != "histogram":
            lines.append(f"{name}{{{inner}}} {_text(series.value)}")
            continue
        total = 0
        for bound, count in zip((*map(_text, series.buckets), "+Inf"), series.counts):
            total += count
            lines.append(f'{name}_bucket{{{inner}{"," if inner else ""}le="{bound}"}} {total}')
        lines += [f"{name}_sum{{{inner}}} {_text(series.value)}", f"{name}_count{{{inner}}} {total}"]
    return lines


def _text(value: float) -> str:
    return number(value) if math.isfinite(value) else {math.inf: "+Inf", -math.inf: "-Inf"}.get(value, "NaN")


class Share:
    """What one worker process holds of the metrics; `close` drops what it did not drop itself."""

    def __init__(self, metrics: CustomMetrics) -> None:
        self._metrics = metrics
        self._held: Counter[tuple[str, Labels | None]] = Counter()

    def do(self, head: Mapping[str, Any]) -> float:
        """What the worker asks for. Raises ServeError."""
        name = str(head["name"])
        labels: Labels = tuple(sorted((str(k), str(v)) for k, v in head.get("labels", {}).items()))
        match head["do"]:
            case "family":
                self._metrics.hold_family(name, str(head["kind"]), str(head["text"]))
                self._held[name, None] += 1
            case "metric":
                self._metrics.hold_metric(name, labels, head["buckets"])
                self._held[name, labels] += 1
            case "value":
                return self._metrics.value(name, labels)
            case "drop":
                self._drop(name, labels if "labels" in head else None)
            case action:
                self._metrics.change(name, labels, action, float(head["value"]))
        return 0.0

    def _drop(self, name: str, labels: Labels | None) -> None:
        if self._held[name, labels] > 0:
            self._held[name, labels] -= 1
            self._metrics.drop(name, labels)

    def close(self) -> None:
        for (name, labels), count in sorted(self._held.items(), key=lambda item: item[0][1] is None):
            for _ in range(count):
                self._metrics.drop(name, labels)
        self._held.clear()
