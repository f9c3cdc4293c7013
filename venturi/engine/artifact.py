"""Engine files: what is in one, how it is written, checked and read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from venturi.core.errors import EngineError, mapped
from venturi.core.fingerprint import cpu_name, source_hash, versions
from venturi.engine.container import Chunks, Container, write_container
from venturi.engine.plan import Plan

FORMAT = 1
WEIGHTS = "weights.safetensors"
SOURCE_WEIGHTS = "source.safetensors"


@dataclass(frozen=True)
class Loaded:
    """An opened file: its manifest and plan are parsed, the rest is mapped."""

    container: Container
    manifest: dict[str, Any]
    plan: Plan


def manifest_of(plan: Plan, extra: Mapping[str, Any]) -> dict[str, Any]:
    import venturi

    return {
        "format": FORMAT,
        "venturi": venturi.__version__,
        "source_hash": source_hash(),
        "targets": [plan.target],
        "cpu": cpu_name(),
        "versions": versions(),
        **extra,
    }


def save_artifact(path: str | Path, plan: Plan, entries: Mapping[str, Chunks], extra: Mapping[str, Any]) -> None:
    """`entries` are graph.onnx, weights and, for refittable engines, the source; checksums are added here."""
    sums = {}
    listed = {name: list(chunks) for name, chunks in entries.items()}
    for name, chunks in listed.items():
        digest = hashlib.sha256()
        for chunk in chunks:
            digest.update(chunk)
        sums[name] = digest.hexdigest()
    plan_bytes = json.dumps(plan.to_json(), indent=1).encode()
    sums[f"plan-{plan.target}.json"] = hashlib.sha256(plan_bytes).hexdigest()
    manifest = json.dumps(manifest_of(plan, extra) | {"sha256": sums}, indent=1).encode()
    write_container(path, {"manifest.json": [manifest], f"plan-{plan.target}.json": [plan_bytes], **listed})


def open_artifact(path: str | Path, target: str | None = None, *, verify: bool = True) -> Loaded:
    """`target` None is the file's first. Raises EngineError for anything that is not an intact engine file of a
    format this version reads. Without `verify` only the manifest and the plan are checked, not the weights."""
    with mapped(str(path), EngineError):
        container = Container(path, verify=verify)
        manifest = read_json(container, "manifest.json")
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
            raise EngineError(f"engine format {found!r}, this version reads {FORMAT}; build the engine again")
        targets = manifest.get("targets", [])
        target = targets[0] if target is None and isinstance(targets, list) and targets else target
        if target not in targets:
            raise EngineError(f"the engine has plans for {targets}, not for {target!r}")
        name, sums = f"plan-{target}.json", manifest.get("sha256")
        found = hashlib.sha256(container.entry(name)).hexdigest()
        if not isinstance(sums, dict) or sums.get(name) != found:
            raise EngineError(f"entry {name!r} is damaged: its SHA-256 is not the one in the manifest; build it again")
        return Loaded(container, manifest, Plan.from_json(read_json(container, name)))


def read_json(container: Container, name: str) -> Any:
    try:
        return json.loads(bytes(container.entry(name)))
    except (ValueError, RecursionError) as exc:
        raise EngineError(f"entry {name!r} is not JSON: {exc}") from exc
