"""Renders the Helm chart with the real helm, which the package helm-binary brings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "venturi"
HELM = Path(sys.executable).with_name("helm")


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(HELM), *arguments], capture_output=True, text=True, timeout=60)


def rendered(values: dict[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """The chart's objects by kind; there is one of each."""
    settings = [f"--set-json={name}={json.dumps(value)}" for name, value in (values or {}).items()]
    done = helm("template", "blue", str(CHART), *settings)
    assert done.returncode == 0, done.stderr
    found = [o for o in yaml.safe_load_all(done.stdout) if o]
    assert len({o["kind"] for o in found}) == len(found)
    return {o["kind"]: o for o in found}
