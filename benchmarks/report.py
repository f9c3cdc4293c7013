"""Where benchmark results go: a dated JSON file with machine and versions beside the figures."""

from __future__ import annotations

import datetime
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from venturi.core.fingerprint import cpu_name, num_physical_threads, source_hash, versions

RESULTS = Path(__file__).resolve().parent / "results"


def save(name: str, data: Any, peers: dict[str, str] | None = None) -> Path:
    """Write benchmarks/results/DATE-NAME.json and return its path."""
    date = datetime.date.today().isoformat()
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{date}-{name}.json"
    machine = {"cpu": cpu_name(), "threads": num_physical_threads(), "versions": versions() | (peers or {})}
    path.write_text(json.dumps({"date": date, "machine": machine, "source": source_hash(), "results": data}, indent=1))
    return path


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
