"""Prometheus text with the names and labels that dashboards for Triton read, and histograms."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from venturi.serve.machine import Family
from venturi.serve.served import ServedVersion
from venturi.serve.statistics import REASONS, Duration, Histogram, ModelStatistics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def render(versions: Iterable[ServedVersion], machine: Iterable[Family] = ()) -> str:
    """All metrics of all ready versions, and those of the machine."""
    served = list(versions)
    lines: list[str] = []

    def family(name: str, kind: str, text: str, samples: Iterable[tuple[str, float]]) -> None:
        lines.append(f"# HELP {name} {text}")
        lines.append(f"# TYPE {name} {kind}")
        lines.extend(f"{name}{labels} {number(value)}" for labels, value in samples)

    def each(value: Callable[[ModelStatistics], float]) -> list[tuple[str, float]]:
        return [(f"{{{_labels(v)}}}", value(v.statistics)) for v in served]

    failures = [
        (f'{{model="{escaped(v.name)}",reason="{r}",version="{v.version}"}}', v.statistics.failures[r])
        for v in served
        for r in REASONS
    ]
    counted = "does not include cached requests"
    family("nv_inference_request_success", "counter", "Successful requests, all batch sizes", each(_successes))
    family("nv_inference_request_failure", "counter", "Failed requests, all batch sizes", failures)
    family("nv_inference_count", "counter", f"Inferences ({counted})", each(lambda s: s.inferences))
    family("nv_inference_exec_count", "counter", f"Model executions ({counted})", each(lambda s: s.executions))
    family("nv_inference_pending_request_count", "gauge", "Requests awaiting execution", each(lambda s: s.pending))
    for phase in ("request", "queue", "compute_input", "compute_infer", "compute_output"):
        text = f"Cumulative {phase.replace('_', ' ')} duration in microseconds ({counted})"
        family(f"nv_inference_{phase}_duration_us", "counter", text, each(partial(_phase_us, phase)))
    caching = [v for v in served if v.cache is not None and v.config.response_cache.enable]
    for kind, plural in (("hit", "hits"), ("miss", "misses")):
        durations = [(f"{{{_labels(v)}}}", getattr(v.statistics, f"cache_{kind}")) for v in caching]
        counts = [(labels, d.count) for labels, d in durations]
        spent = [(labels, d.ns // 1000) for labels, d in durations]
        family(f"nv_cache_num_{plural}_per_model", "counter", f"Cache {plural} of a model", counts)
        family(f"nv_cache_{kind}_duration_per_model", "counter", f"Microseconds of a model's cache {plural}", spent)
    family("nv_model_load_duration_secs", "gauge", "Model load time in seconds", each(lambda s: s.load_s))
    lines += _histogram(
        "venturi_request_duration_ms", "Time from a request's arrival to its answer in milliseconds",
        [(_labels(v), v.statistics.latency) for v in served],
    )  # fmt: skip
    lines += _histogram(
        "nv_inference_first_response_histogram_ms", "Time from a request's arrival to its first response (decoupled)",
        [(_labels(v), v.responses.first) for v in served if v.signature.decoupled],
    )  # fmt: skip
    for name, kind, text, samples in machine:
        family(name, kind, text, samples)
    return "\n".join(lines) + "\n"


def _histogram(name: str, text: str, found: list[tuple[str, Histogram]]) -> list[str]:
    lines = [f"# HELP {name} {text}", f"# TYPE {name} histogram"]
    for labels, histogram in found:
        total = 0
        for bound, count in zip((*histogram.bounds, "+Inf"), histogram.counts):
            total += count
            lines.append(f'{name}_bucket{{{labels},le="{bound}"}} {total}')
        lines.append(f"{name}_sum{{{labels}}} {number(histogram.total_ms)}")
        lines.append(f"{name}_count{{{labels}}} {total}")
    return lines


def _successes(s: ModelStatistics) -> int:
    return s.success.count


def _phase_us(phase: str, s: ModelStatistics) -> int:
    own = {"request": s.success, "queue": s.queue}
    duration: Duration = own[phase] if phase in own else getattr(s.phases, phase)
    return duration.ns // 1000


def _labels(version: ServedVersion) -> str:
    tags = "".join(f',_{k}="{escaped(v)}"' for k, v in sorted(version.config.metric_tags.items()))
    return f'model="{escaped(version.name)}",version="{version.version}"{tags}'


def escaped(text: str) -> str:
    """A label's value as it stands between quotes."""
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def number(value: float) -> str:
    """Of a finite number, without a fraction where there is none."""
    return repr(int(value)) if float(value).is_integer() else repr(float(value))
