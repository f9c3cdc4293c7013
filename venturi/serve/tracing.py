"""Traces of requests: the moments of their way, as JSON files that Triton's trace tools read, or as spans."""

from __future__ import annotations

import itertools
import json
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from venturi.core.log import logger
from venturi.serve.errors import invalid, unsupported
from venturi.serve.request import InferRequest
from venturi.serve.spans import Spans

LEVELS = ("OFF", "TIMESTAMPS")
MODES = ("triton", "opentelemetry")
_MOMENTS = (
    ("REQUEST_START", "start"), ("QUEUE_START", "queued"), ("COMPUTE_START", "compute"),
    ("COMPUTE_INPUT_END", "input_done"), ("COMPUTE_OUTPUT_START", "output"), ("COMPUTE_END", "end"),
    ("REQUEST_END", "end"),
)  # fmt: skip


@dataclass(frozen=True)
class TraceSettings:
    """rate: one of so many requests is traced. count: traces left, -1 without end. log_frequency: traces a file, 0: all
    in one file when the server stops or the settings change. mode "opentelemetry" writes no files: spans go to the
    collector at `url`, with `resource` attributes."""

    level: str = "OFF"
    rate: int = 1000
    count: int = -1
    log_frequency: int = 0
    file: str = ""
    mode: str = "triton"
    url: str = ""
    resource: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As the trace extension shows them: strings."""
        return {
            "trace_level": [self.level], "trace_rate": str(self.rate), "trace_count": str(self.count),
            "log_frequency": str(self.log_frequency), "trace_file": self.file, "trace_mode": self.mode,
        }  # fmt: skip


class Tracer:
    """Which requests are traced, and what has been seen of them. Thread-safe."""

    def __init__(self, settings: TraceSettings = TraceSettings()) -> None:
        self._start = settings
        self._settings = settings
        self._by_model: dict[str, dict[str, Any]] = {}
        self._seen: dict[str, int] = {}
        self._left: dict[str, int] = {}
        self._traces: list[dict[str, Any]] = []
        self._ids, self._files = itertools.count(1), itertools.count()
        self._lock = threading.Lock()
        self.is_on = settings.level != "OFF"
        self._spans = Spans(settings.url, dict(settings.resource)) if settings.mode == "opentelemetry" else None

    def settings_of(self, model: str = "") -> TraceSettings:
        """A model's own settings over the general ones; with "" the general ones."""
        return replace(self._settings, **self._by_model.get(model, {})) if model else self._settings

    def update(self, given: dict[str, Any], model: str = "") -> None:
        """`None` clears a setting. Raises ServeError that names it; then nothing has changed."""
        changes = {name: _parsed(name, value) for name, value in given.items()}
        with self._lock:
            if model:
                own = dict(self._by_model.get(model, {}))
                for field, value in changes.values():
                    own.pop(field, None)
                    if value is not None:
                        own[field] = value
                self._by_model[model] = own
            else:
                start = self._start
                cleared = {f: getattr(start, f) if v is None else v for f, v in changes.values()}
                self._settings = replace(self._settings, **cleared)
            for name in [model] if model else list(self._left):
                self._left.pop(name, None)
                self._seen.pop(name, None)
            levels = [self._settings.level, *(o.get("level", "OFF") for o in self._by_model.values())]
            self.is_on = any(level != "OFF" for level in levels)
            self._write()

    def takes(self, model: str) -> bool:
        """Whether this request is one of those to trace."""
        with self._lock:
            settings = self.settings_of(model)
            if settings.level == "OFF":
                return False
            seen = self._seen[model] = self._seen.get(model, 0) + 1
            left = self._left.setdefault(model, settings.count)
            if seen % settings.rate or not left:
                return False
            self._left[model] = left - 1 if left > 0 else left
            return True

    def record(self, request: InferRequest, model: str, version: int, error: str = "") -> None:
        """The request has been answered; `error` is what the client reads where it failed."""
        if self._spans is not None:
            self._spans.record(request, model, version, error)
            return
        moments = [{"name": n, "ns": getattr(request.times, f)} for n, f in _MOMENTS if getattr(request.times, f)]
        with self._lock:
            number = next(self._ids)
            head = {"id": number, "model_name": model, "model_version": version, "request_id": request.id}
            self._traces += [head, {"id": number, "timestamps": moments}]
            frequency = self.settings_of(model).log_frequency
            if frequency and len(self._traces) >= 2 * frequency:
                self._write(f".{next(self._files)}")

    def close(self) -> None:
        if self._spans is not None:
            self._spans.close()
        with self._lock:
            self._write()

    def _write(self, suffix: str = "") -> None:
        if not self._traces or not self._settings.file:
            self._traces.clear()
            return
        path = Path(self._settings.file + suffix)
        earlier = json.loads(path.read_text()) if not suffix and path.is_file() else []
        try:
            path.write_text(json.dumps(earlier + self._traces))
        except OSError as exc:
            logger.error("traces cannot be written to %s: %s", path, exc)
        self._traces.clear()


def _parsed(name: str, value: Any) -> tuple[str, Any]:
    """A setting of the protocol -> (field, value); None clears."""
    if name == "trace_file":
        raise unsupported("trace file location can not be updated through the network protocol")
    if name == "trace_level":
        levels = [value] if isinstance(value, str) else value
        if levels is None or levels == []:
            return "level", None
        if not isinstance(levels, list) or any(level not in LEVELS for level in levels):
            raise invalid(f"trace setting 'trace_level' must be of {', '.join(LEVELS)}, got {value!r}")
        return "level", "TIMESTAMPS" if "TIMESTAMPS" in levels else "OFF"
    least = {"trace_rate": 1, "trace_count": -1, "log_frequency": 0}
    if name not in least:
        raise invalid(f"unexpected trace setting '{name}', expected trace_level, {', '.join(least)}")
    field = name.removeprefix("trace_")
    if value is None:
        return field, None
    text = str(value)
    if not text.removeprefix("-").isdigit() or not text.isascii() or int(text) < least[name]:
        raise invalid(f"trace setting '{name}' must be a number from {least[name]} on, got {value!r}")
    return field, int(text)


def parse_trace_config(options: list[str]) -> TraceSettings:
    """--trace-config's words: level=, rate=, count=, mode=, triton,file=, triton,log-frequency=, opentelemetry,url=,
    opentelemetry,resource=KEY=VALUE. Raises ServeError."""
    settings = TraceSettings()
    for option in options:
        name, _, value = option.partition("=")
        name = name.removeprefix("triton,")
        if name == "mode" and value in MODES:
            settings = replace(settings, mode=value)
            continue
        if name == "file":
            settings = replace(settings, file=value)
            continue
        if name == "opentelemetry,url":
            settings = replace(settings, url=value)
            continue
        key, _, text = value.partition("=")
        if name == "opentelemetry,resource" and key and text:
            settings = replace(settings, resource=(*settings.resource, (key, text)))
            continue
        known = {"level": "trace_level", "rate": "trace_rate", "count": "trace_count", "log-frequency": "log_frequency"}
        if name not in known:
            words = [f"mode={'|'.join(MODES)}", "file", *known, "opentelemetry,url", "opentelemetry,resource=KEY=VALUE"]
            raise invalid(f"--trace-config: unknown option {option!r}; expected {', '.join(words)}")
        field, parsed = _parsed(known[name], value)
        settings = replace(settings, **{field: parsed})
    return settings
