"""The timing cache: a readable JSON file from problem to measured candidates. Mergeable, editable, never required."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from venturi.core.errors import TuningError
from venturi.core.fingerprint import cpu_name, num_physical_threads, source_hash, versions
from venturi.core.folders import cache_folder

FORMAT = 1
_BLOCKED = "blocked@"


@dataclass(frozen=True)
class Measurement:
    """Median and spread of one candidate, or why it was rejected (`reason`)."""

    tactic: str
    config: dict[str, Any]
    median_us: float | None = None
    spread_us: float = 0.0
    reason: str = ""


def machine_key(device: str = "cpu") -> dict[str, str]:
    """Everything outside the problem that may change a time."""
    sources = source_hash("backends", "ops", "kernels", "tuning")
    return {
        "device": device,
        "cpu": cpu_name(),
        "threads": str(num_physical_threads()),
        "kernels": sources,
        **versions(),
    }


def default_path() -> Path:
    return cache_folder() / "timing.json"


class TimingCache:
    """Entries of this machine; those of other machines in the file are kept untouched."""

    def __init__(self, path: str | Path | None = None, device: str = "cpu") -> None:
        self.path = None if path is None else Path(path)
        self.hits = 0
        self.misses = 0
        self._machine = json.dumps(machine_key(device), sort_keys=True)
        self._all: dict[str, dict[str, list[dict[str, Any]]]] = {}
        if self.path is not None and self.path.exists():
            self._all = _read(self.path)
        self._mine = self._all.setdefault(self._machine, {})
        self._dirty = False

    def get(self, problem: str) -> list[Measurement] | None:
        found = self._mine.get(problem)
        self.hits += found is not None
        self.misses += found is None
        return None if found is None else [Measurement(**m) for m in found]

    def starting_with(self, prefix: str) -> list[list[Measurement]]:
        """What is known of every problem whose key starts so; counts neither hits nor misses."""
        return [[Measurement(**m) for m in found] for key, found in self._mine.items() if key.startswith(prefix)]

    def put(self, problem: str, measurements: list[Measurement]) -> None:
        self._mine[problem] = [asdict(m) for m in measurements]
        self._dirty = True

    def block(self, problem: str, tactic: str, config: Mapping[str, Any], reason: str) -> None:
        """Never try this candidate again for `problem`; `drop` with the problem's text makes it possible again."""
        known = [m for m in self.get(_BLOCKED + problem) or [] if (m.tactic, m.config) != (tactic, dict(config))]
        self.put(_BLOCKED + problem, [*known, Measurement(tactic, dict(config), reason=reason)])

    def blocked(self, problem: str) -> list[Measurement]:
        """Candidates that are not to be tried, with the reasons."""
        return [Measurement(**m) for m in self._mine.get(_BLOCKED + problem, [])]

    def merge(self, other: TimingCache) -> None:
        """Take over entries this cache lacks, of all machines."""
        for machine, entries in other._all.items():
            mine = self._all.setdefault(machine, {})
            for problem, found in entries.items():
                mine.setdefault(problem, found)
        self._dirty = True

    def machines(self) -> dict[str, dict[str, list[Measurement]]]:
        """All that is known, by machine (its key as JSON text) and problem; machines without problems are left out."""
        return {
            machine: {p: [Measurement(**m) for m in found] for p, found in problems.items()}
            for machine, problems in self._all.items()
            if problems
        }

    def drop(self, problem: str = "", stale: bool = False) -> None:
        """Forget problems whose text contains `problem`, with `stale` also those of other versions of the kernels."""
        kernels = json.loads(self._machine)["kernels"]
        for machine, problems in self._all.items():
            old = stale and json.loads(machine).get("kernels") != kernels
            for name in [p for p in problems if old or (problem and problem in p)]:
                del problems[name]
        self._dirty = True

    def save(self, *, replace: bool = False) -> None:
        """Write atomically: a temporary file beside the target, then a rename. Does nothing when nothing changed.

        What others wrote meanwhile is kept, unless with `replace`.
        """
        if self.path is None or not self._dirty:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not replace:
            with contextlib.suppress(TuningError):
                for machine, entries in _read(self.path).items():
                    self._all[machine] = entries | self._all.get(machine, {})
                self._mine = self._all[self._machine]
        text = json.dumps(
            {"format": FORMAT, "machines": {m: p for m, p in self._all.items() if p}}, indent=1, sort_keys=True
        )
        handle, name = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(name, self.path)
        self._dirty = False


def _read(path: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    try:
        data = json.loads(path.read_text())
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"format {data.get('format') if isinstance(data, dict) else '?'}, expected {FORMAT}")
        machines = data["machines"]
        for entries in machines.values():
            for found in entries.values():
                for m in found:
                    Measurement(**m)
        return dict(machines)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as exc:
        raise TuningError(
            f"the timing cache is not readable: {exc}. Delete it or pass another one", where=str(path)
        ) from exc
