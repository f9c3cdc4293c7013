"""How many threads a run takes is chosen by timing, kept in the plan and in the cache, and bounded by what is asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import venturi as vt
from tests.engine.models import mlp, x_of
from venturi.engine import team
from venturi.runtime.streams import Threads
from venturi.tuning.cache import Measurement, TimingCache


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "num_physical_threads", lambda: 4)


def known(*times: tuple[int, float]) -> list[Measurement]:
    return [Measurement("threads", {"threads": n}, us) for n, us in times]


@pytest.mark.parametrize(
    "times, threads",
    [
        ([(4, 100.0), (2, 60.0), (1, 80.0)], 2),
        ([(4, 100.0), (2, 97.0), (1, 180.0)], None),
        ([(4, 50.0), (2, 60.0), (1, 80.0)], None),
        ([(4, 9000.0)], None),
    ],
    ids=["fewer", "hardly-faster", "all", "long"],
)
def test_fewer_threads_only_where_they_are_clearly_faster(
    times: list[tuple[int, float]],
    threads: int | None,
    four_cores: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(team, "_measured", lambda *args: known(*times))
    path = tmp_path / "m.vt"
    engine = vt.build(mlp(), device="cpu", timing_cache=tmp_path / "timing.json")
    assert engine.plan.threads == threads
    engine.save(path)
    again = vt.load(path)
    assert again.plan.threads == threads
    np.testing.assert_array_equal(again(x_of(3, 8)), engine(x_of(3, 8)))


def test_what_the_cache_knows_is_not_timed_again(
    four_cores: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    timed = []
    monkeypatch.setattr(team, "_measured", lambda *args: timed.append(1) or known((4, 9.0), (2, 5.0), (1, 6.0)))
    for _ in range(2):
        assert vt.build(mlp(), device="cpu", timing_cache=tmp_path / "timing.json").plan.threads == 2
    assert len(timed) == 1
    pinned = vt.build(mlp(), device="cpu", timing_cache=tmp_path / "timing.json", deterministic=True)
    assert pinned.plan.threads == 2
    cache = TimingCache(tmp_path / "timing.json")
    cache.drop("threads@")
    cache.save(replace=True)
    with pytest.raises(vt.TuningError, match="does not know how many threads"):
        vt.build(mlp(), device="cpu", timing_cache=tmp_path / "timing.json", deterministic=True)


def test_real_times_of_every_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "_LONG_US", float("inf"))  # a busy machine may take any time
    engine = vt.build(mlp(), opt_level=0)
    found = team._measured(engine._built.executable, [_tensor(x_of(3, 8))], [2, 1])
    assert [m.config["threads"] for m in found] == [2, 1]
    assert all(m.median_us is not None and m.median_us > 0 for m in found)


def _tensor(x: np.ndarray) -> object:
    import torch

    return torch.from_numpy(x)


def test_a_run_takes_the_least_of_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("venturi.runtime.streams.num_physical_threads", lambda: 8)
    assert Threads().of_a_run() == 8
    assert Threads().of_a_run(3) == 3
    assert Threads(intra=2).of_a_run(3) == 2
    assert Threads(intra=6, streams=4).of_a_run() == 2
    assert Threads(streams=8).of_a_run(3) == 1
