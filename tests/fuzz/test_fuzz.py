"""Damaged files: every .vt is refused, every .onnx is refused or built, nothing crashes or hangs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import venturi as vt
from tests.fuzz.mutate import mutate

ROOT = Path(__file__).resolve().parents[2]
ENGINE_CASES, ONNX_CASES, CHUNK = 1200, 1200, 200
SECONDS_PER_CHUNK = 300


@pytest.fixture(scope="module")
def engine_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("fuzz") / "digits.vt"
    vt.build(ROOT / "examples/digits/digits.onnx", opt_level=0, refit=True).save(path)
    return path.read_bytes()


def test_every_damaged_engine_is_refused(engine_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.vt"
    for seed in range(ENGINE_CASES):
        path.write_bytes(mutate(engine_bytes, seed))
        with pytest.raises(vt.EngineError):
            vt.load(path)


def test_damage_behind_the_seal_is_refused_too(engine_bytes: bytes, tmp_path: Path) -> None:
    """Somebody who can compute the seal can also lie inside it: without the check, content must still not crash."""
    path = tmp_path / "hostile.vt"
    refused = 0
    for seed in range(300):
        path.write_bytes(mutate(engine_bytes, 6 * seed + 3))
        try:
            vt.load(path, verify=False)
        except vt.VenturiError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize("model", ["tests/fuzz/small.onnx", "examples/digits/digits.onnx"])
@pytest.mark.parametrize("first", range(0, ONNX_CASES // 2, CHUNK))
def test_damaged_models_are_refused_or_built(model: str, first: int) -> None:
    command = [sys.executable, "-m", "tests.fuzz.onnx_worker", str(ROOT / model), str(first), str(CHUNK)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS_PER_CHUNK, check=False)
    last = done.stderr.strip().splitlines()[-1:] or ["nothing"]
    assert done.returncode == 0, f"the process died (status {done.returncode}) at {last[0]}"
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    assert summary["unexpected"] == []
    assert summary["refused"] + summary["built"] == CHUNK
