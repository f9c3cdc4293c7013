"""Candidates that fault, hang or crash, and builds that are stopped."""

from __future__ import annotations

import json
import multiprocessing
import os

import numpy as np
import pytest
import torch

import venturi as vt
from tests.passes.harness import optimize
from venturi.backends.base import Backend, Kernel, RegionView
from venturi.backends.cpu.tactics.reference import Reference
from venturi.core.errors import DeviceError
from venturi.tuning import tuner as tuning
from venturi.tuning.attempts import ENDED, Attempts
from venturi.tuning.cache import TimingCache
from venturi.tuning.tuner import Tuner


class Fast:
    """A right kernel, unless it has another `deed`."""

    def __init__(self, name="fast", deed=None):
        self.name, self._deed, self.tried, self.runs = name, deed, 0, 0

    def match(self, region):
        return [{"size": 1}]

    def bind(self, region, config):
        self.tried += 1
        right = Reference().bind(region, {}).run

        def run(*args):
            self.runs += 1
            return right(*args) if self._deed is None else self._deed()

        return Kernel(run)


def region():
    net = vt.Network()
    net.output("y", net.softmax(net.input("x", (4, 8))))
    (node,) = optimize(net).graph
    return RegionView(node, {})


ARGS = [torch.from_numpy(np.random.default_rng(0).standard_normal((4, 8), np.float32))]


def choose(path, *tactics, well=lambda: True):
    tuner = Tuner(Backend("fake", (*tactics, Reference()), is_well=well), TimingCache(path), 1)
    return tuner, tuner.choose(region(), ARGS)


def reasons(choice):
    return {m.tactic: m.reason for m in choice.measurements}


def die_trying(path):
    choose(path, Fast("deadly", lambda: os._exit(9)))


def test_what_its_process_did_not_survive_is_not_tried_again(tmp_path):
    path = tmp_path / "timing.json"
    process = multiprocessing.get_context("spawn").Process(target=die_trying, args=(path,))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    (left,) = tmp_path.glob("timing.*.attempt")
    assert json.loads(left.read_text())["tactic"] == "deadly"
    deadly, fine = Fast("deadly"), Fast("fine")
    tuner, choice = choose(path, deadly, fine)
    assert deadly.tried == 0
    assert fine.tried == 1
    assert reasons(choice)["deadly"] == ENDED
    assert not list(tmp_path.glob("*.attempt"))
    tuner.cache.save()
    assert reasons(choose(path, deadly, Fast("fine"))[1])["deadly"] == ENDED, "nor in the builds after that"


def test_a_fault_loses_the_device_but_not_the_next_build(tmp_path):
    path, state = tmp_path / "timing.json", {"well": True}

    def fault():
        state["well"] = False
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    with pytest.raises(DeviceError, match="'size': 1} faulted and the device is lost to this process: CUDA error: an"):
        choose(path, Fast("faulty", fault), Fast("fine"), well=lambda: state["well"])
    assert not list(tmp_path.glob("*.attempt"))
    faulty = Fast("faulty")
    _, choice = choose(path, faulty, Fast("fine"))
    assert faulty.tried == 0
    assert reasons(choice)["faulty"].startswith("blocked: it faulted: CUDA error: an illegal memory access")


def test_what_only_fails_is_rejected_as_before(tmp_path):
    def fail():
        raise RuntimeError("not this shape")

    _, choice = choose(tmp_path / "timing.json", Fast("failing", fail), Fast("fine"))
    assert reasons(choice)["failing"] == "failed: not this shape"
    assert not list(tmp_path.glob("*.attempt"))


def test_blocked_candidates_can_be_allowed_again(tmp_path):
    path = tmp_path / "timing.json"
    cache = TimingCache(path)
    problem = choose(None, Fast())[1].problem
    cache.block(problem, "fast", {"size": 1}, "blocked: because")
    cache.save()
    fast = Fast()
    tuner, choice = choose(path, fast)
    assert reasons(choice)["fast"] == "blocked: because"
    tuner.cache.save()
    assert reasons(choose(path, fast)[1])["fast"] == "blocked: because"
    assert fast.runs == 0
    cache = TimingCache(path)
    cache.drop("blocked@")
    cache.save(replace=True)
    assert reasons(choose(path, fast)[1])["fast"] == ""
    assert fast.runs > 0


def test_an_attempt_of_a_living_process_is_left_alone(tmp_path):
    cache = TimingCache(tmp_path / "timing.json")
    with Attempts(cache).of("problem", "fast", {}):
        Attempts(cache)
        assert len(list(tmp_path.glob("*.attempt"))) == 1
    assert not cache.blocked("problem")
    assert not list(tmp_path.glob("*.attempt"))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"problem": "p"}'])
def test_a_file_that_says_nothing_is_removed(tmp_path, text):
    (tmp_path / "timing.1.attempt").write_text(text)
    Attempts(TimingCache(tmp_path / "timing.json"))
    assert not list(tmp_path.glob("*.attempt"))


def test_a_folder_that_cannot_be_written_stops_nobody(tmp_path):
    (tmp_path / "file").write_text("")
    assert choose(tmp_path / "file" / "timing.json", Fast("fine"))[1].tactic in ("fine", "reference")


def test_a_file_system_without_locks_stops_nobody(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    (tmp_path / "timing.old.attempt").write_text('{"problem": "p", "tactic": "t", "config": {}}')
    fine = Fast("fine")
    tuner, _ = choose(tmp_path / "timing.json", fine)
    assert fine.runs > 0
    assert [f.name for f in tmp_path.glob("*.attempt")] == ["timing.old.attempt"], "whose it is nobody can tell"
    assert not tuner.cache.blocked("p")


def test_a_build_that_is_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "_SAVE_EVERY_S", 0.0)
    path = tmp_path / "timing.json"
    choose(path, Fast("fine"))  # nobody saves the cache at the end
    again = Fast("fine")
    choose(path, again)
    assert again.runs == 0, "what was timed is known"
    choose(None, again)
    assert again.runs > 0
