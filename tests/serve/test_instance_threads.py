"""Instances of a model on the CPU share its cores out, or take what the configuration says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.serve.running import add_engine, scaled
from venturi.core.fingerprint import num_physical_threads
from venturi.serve.config import parse_config
from venturi.serve.errors import ServeError
from venturi.serve.models import engine as kind

CORES = num_physical_threads()


def threads(folder: Path, config: str) -> int:
    add_engine(folder, "m", scaled(2.0))
    found, version, models = parse_config(config, "m"), folder / "m" / "1", kind.EngineKind()
    models.complete(found, version, 4)
    made: Any = models.load(found, version)
    count: int = made._engine._threads.of_a_run()
    made.close()
    return count


@pytest.mark.parametrize(
    "config, count",
    [
        ("", CORES),
        ("instance_group { count: 1 }", CORES),
        ("instance_group { count: 2 }", max(1, CORES // 2)),
        ("instance_group { count: 1 } instance_group { count: 3 }", max(1, CORES // 4)),
        ('parameters { key: "intra_threads" value { string_value: "1" } }', 1),
        ('instance_group { count: 4 } parameters { key: "intra_threads" value { string_value: "2" } }', min(2, CORES)),
    ],
)
def test_threads_of_an_instance(config: str, count: int, tmp_path: Path) -> None:
    assert threads(tmp_path, config) == count


@pytest.mark.parametrize("value", ["0", "-1", "many", ""])
def test_what_is_no_number_of_threads(value: str, tmp_path: Path) -> None:
    config = f'name: "m" parameters {{ key: "intra_threads" value {{ string_value: "{value}" }} }}'
    with pytest.raises(ServeError, match=f"intra_threads of model m must be a number from 1 on, got '{value}'"):
        threads(tmp_path, config)
