"""What the tests marked gpu must not bring along: they run compiled kernels, never Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "gpu"


def test_collecting_the_gpu_tests_does_not_ask_for_the_interpreter() -> None:
    names = [f"tests.gpu.{p.stem}" for p in sorted(TESTS.glob("test_*.py"))]
    assert len(names) > 5
    code = f"import importlib, os\nfor n in {names}: importlib.import_module(n)\n"
    code += "print(os.environ.get('TRITON_INTERPRET', 'unset'))"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=TESTS.parents[1], env=environment, capture_output=True, text=True, timeout=300
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert out.stdout.split()[-1] == "unset"
