"""Runs side by side: shares of the cores, results, refits, errors, and how many threads a run may use."""

from __future__ import annotations

import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import venturi as vt
from tests.engine.models import mlp, x_of
from venturi.backends.cpu.native.openmp import max_threads, team_of
from venturi.core import fingerprint
from venturi.frontends.onnx_import import import_onnx
from venturi.runtime.streams import Threads, shares


def test_cores_are_shared_out_whole_and_once() -> None:
    for n in range(1, 9):
        for streams in range(1, n + 1):
            found = shares(list(range(10, 10 + n)), streams)
            assert [core for share in found for core in share] == list(range(10, 10 + n))
            assert max(map(len, found)) - min(map(len, found)) <= 1


@pytest.mark.parametrize("streams", [1, 2, "auto"])
def test_streams_give_what_one_run_gives(streams: int | str, tmp_path: Path) -> None:
    path = tmp_path / "m.vt"
    plain = vt.build(mlp(), opt_level=0)
    plain.save(path)
    engine = vt.load(path, streams=streams)
    assert engine.streams >= 1
    inputs = [x_of(n % 5 + 1, 8) + n for n in range(40)]
    want = [plain(x) for x in inputs]
    with ThreadPoolExecutor(6) as callers:
        for got, expected in zip(callers.map(engine, inputs), want):
            np.testing.assert_array_equal(got, expected)
    futures = [engine.submit({"x": x}) for x in inputs]
    for future, expected in zip(futures, want):
        np.testing.assert_array_equal(future.result(timeout=30)["y"], expected)
    engine.close()
    np.testing.assert_array_equal(engine(inputs[0]), want[0])
    engine.close()


def test_streams_batch_what_is_submitted() -> None:
    engine = vt.build(mlp(), opt_level=0, streams=2)
    x = x_of(12, 8)
    want = engine(x)
    engine.close()
    engine.batching = vt.Batching(max_batch=4, max_delay_ms=20)
    futures = [engine.submit({"x": x[i : i + 1]}) for i in range(12)]
    for i, future in enumerate(futures):
        np.testing.assert_allclose(future.result(timeout=30)["y"], want[i : i + 1], rtol=1e-5, atol=1e-6)
    engine.close()


def test_errors_reach_the_caller_and_the_stream_lives_on() -> None:
    engine = vt.build(mlp(), opt_level=0, streams=1)
    with pytest.raises(vt.ShapeError, match="must have shape"):
        engine(x_of(1, 7))
    assert engine(x_of(1, 8)).shape == (1, 4)
    engine.close()


def test_a_refit_reaches_every_stream() -> None:
    engine = vt.build(mlp(), opt_level=0, refit=True, streams=2)
    x = x_of(3, 8)
    before = engine(x)
    weights = {n: np.zeros(v.shape, np.float32) for n, v in engine._source.graph.initializers.items()}  # type: ignore[union-attr]
    engine.refit(weights)
    for _ in range(6):
        assert not np.array_equal(engine(x), before)
    engine.close()


@pytest.mark.parametrize("name", ["intra_threads", "streams"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "many", True])
def test_numbers_that_are_none(name: str, value: object) -> None:
    with pytest.raises(vt.RequestError, match=f"{name} must be a number from 1 on"):
        vt.build(mlp(), opt_level=0, **{name: value})  # type: ignore[arg-type]


def test_more_than_there_are_cores_is_cut_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    cores = fingerprint.num_physical_threads()
    with caplog.at_level(logging.WARNING, "venturi"):
        threads = Threads.of(cores + 5, cores + 7)
    assert threads == Threads(cores, cores)
    assert f"intra_threads={cores + 5}: this process has {cores} cores" in caplog.text


def test_a_run_keeps_to_its_threads_and_leaves_torch_alone() -> None:
    before = torch.get_num_threads()
    seen = []
    with team_of(1):
        seen.append(max_threads())
        other = threading.Thread(target=lambda: seen.append(max_threads()))
        other.start()
        other.join()
    assert seen == [1, before]
    assert max_threads() == before == torch.get_num_threads()
    with team_of(before + 3):
        assert max_threads() == before


def test_results_do_not_depend_on_the_number_of_threads_of_generated_code() -> None:
    x = x_of(7, 8)
    one, all_of_them = (vt.build(mlp(), opt_level=0, intra_threads=n)(x) for n in (1, None))
    np.testing.assert_array_equal(one, all_of_them)


def test_a_quota_counts_as_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Half a CPU is one thread, however many cores the machine shows."""
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(fingerprint, "QUOTA_FILE", quota)
    for text, limit in (("50000 100000", 1), ("250000 100000", 2), ("max 100000", 1 << 30)):
        quota.write_text(text)
        assert fingerprint.num_physical_threads() == min(limit, len(os.sched_getaffinity(0)))
    quota.write_text("50000 100000")
    assert Threads.of(None, "auto") == Threads(None, 1)
    assert Threads().of_a_run() == 1
    assert vt.build(mlp(), opt_level=0)(x_of(2, 8)).shape == (2, 4)


def test_a_pinned_thread_does_not_share_its_cores_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two streams on eight cores take four threads each, though a stream's thread sees four cores only."""
    main = threading.main_thread()
    seen = lambda: 8 if threading.current_thread() is main else 4  # noqa: E731
    monkeypatch.setattr("venturi.runtime.streams.num_physical_threads", seen)
    engine = vt.build(mlp(), opt_level=0, streams=2)
    for future in [engine.submit({"x": x_of(1, 8)}) for _ in range(8)]:
        future.result(timeout=30)
    found = {context._threads for context in engine._of_streams.values()}  # type: ignore[attr-defined]
    assert found == {4}
    engine.close()


def test_streams_that_end_share_no_context_with_those_that_begin() -> None:
    """A context serves one thread at a time, and the last requests of a closed engine may still run."""
    engine, seen = vt.build(mlp(), opt_level=0, streams=2), []
    for _ in range(2):
        for future in [engine.submit({"x": x_of(1, 8)}) for _ in range(8)]:
            future.result(timeout=30)
        seen.append(list(engine._of_streams.values()))
        engine.close()
    assert all(seen)
    assert not any(a is b for a in seen[0] for b in seen[1])


def test_streams_serve_the_new_weights_after_a_refit() -> None:
    net = vt.Network()
    net.output("y", net.input("x", (1, 8)) @ np.eye(8, dtype=np.float32))
    (name,) = import_onnx(net.to_model()).graph.initializers
    engine, x = vt.build(net, device="cpu", opt_level=0, refit=True, streams=2), x_of(1, 8)
    for _ in range(4):
        np.testing.assert_array_equal(engine(x), x)
    engine.refit({name: 2 * np.eye(8, dtype=np.float32)})
    for _ in range(4):
        np.testing.assert_array_equal(engine(x), 2 * x)
    engine.close()


def test_calls_that_meet_a_closing_engine_end() -> None:
    """Each is answered or refused; none waits for ever."""
    engine = vt.build(mlp(), opt_level=0, streams=2)
    x, stop, outcomes = x_of(2, 8), threading.Event(), []

    def call() -> None:
        while not stop.is_set():
            try:
                outcomes.append(engine(x).shape == (2, 4))
            except vt.RequestError as exc:
                outcomes.append("was closed before" in str(exc))

    callers = [threading.Thread(target=call) for _ in range(6)]
    for caller in callers:
        caller.start()
    for _ in range(50):
        engine.close()
    stop.set()
    for caller in callers:
        caller.join(timeout=30)
        assert not caller.is_alive()
    assert outcomes
    assert all(outcomes)
    engine.close()


def test_what_comes_after_the_end_is_refused() -> None:
    from venturi.runtime.batching import Worker

    worker = Worker(lambda _, inputs: dict(inputs), None)
    worker.close()
    with pytest.raises(vt.RequestError, match="was closed before the request ran"):
        worker.call({"x": 1})
    with pytest.raises(vt.RequestError, match="was closed before the request ran"):
        worker.submit({"x": x_of(1)}).result(timeout=30)
