"""The LLM's kernels compile ahead of time for three generations, within their shared memory. No GPU needed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.mark.parametrize("arch", sorted(SHARED_BYTES))
def test_kernels_compile(arch: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_all", str(arch)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    shared = {m[1]: int(m[2]) for m in re.finditer(r"^(.+): shared (\d+)$", done.stdout, re.MULTILINE)}
    assert len(shared) >= {80: 25, 90: 35, 100: 30}[arch]
    assert all(count <= SHARED_BYTES[arch] for count in shared.values()), shared
