"""What identifies this machine and this build of venturi: the keys of caches and engine files."""

from __future__ import annotations

import functools
import hashlib
import platform
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


@functools.cache
def source_hash(*folders: str) -> str:
    """Hash of the Python sources of these folders of the package (default all of it): 16 hex digits."""
    digest = hashlib.sha256()
    roots = [PACKAGE / f for f in folders] or [PACKAGE]
    for path in sorted(p for root in roots for p in root.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def cpu_name() -> str:
    """Model name of the processor and the vector extensions that change tactic choices."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    pairs = [line.split(":", 1) for line in text.splitlines() if ":" in line]
    fields = {key.strip(): value.strip() for key, value in pairs}
    flags = set(fields.get("flags", "").split())
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "avx512_fp16")
    return " ".join([fields.get("model name", platform.machine()), *(f for f in wanted if f in flags)])


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the libraries whose change may change a result or a time."""
    found = {}
    for name in ("torch", "onnx", "onnx-ir", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")


def num_physical_threads() -> int:
    """CPUs this process may use: affinity, cut by the cgroup quota, at least 1."""
    import os

    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if QUOTA_FILE.exists():
        quota, period = (QUOTA_FILE.read_text().split() + ["100000"])[:2]
        if quota != "max":
            count = min(count, max(1, round(int(quota) / int(period))))
    return max(1, count)
