"""Shared fixtures: an isolated timing cache, and small models."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _isolated_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests neither read nor write the user's timing cache."""
    monkeypatch.setenv("VENTURI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def digits() -> Path:
    return Path(__file__).resolve().parents[1] / "examples" / "digits" / "digits.onnx"
