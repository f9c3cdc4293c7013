"""Builds pinned to a timing cache: the same file every time, or an error that says what is missing."""

from __future__ import annotations

import numpy as np
import pytest

import venturi as vt
from tests.engine.test_in_place import CLOSE, Bench, neighbours_matter
from tests.passes.harness import rand


def network(width=32):
    net = vt.Network()
    x = net.input("x", (4, 16, 8, 8))
    y = net.relu(net.conv(x, rand(width, 16, 3, 3) * 0.1, rand(width), pads=[1, 1, 1, 1]))
    net.output("y", net.softmax(net.global_average_pool(y), axis=1))
    return net


def test_the_same_cache_gives_the_same_bytes(tmp_path):
    cache = tmp_path / "timing.json"
    free = vt.build(network(), device="cpu", opt_level=1, timing_cache=cache)
    before = cache.read_bytes()
    files = []
    for name in ("a.vt", "b.vt"):
        engine = vt.build(network(), device="cpu", opt_level=1, timing_cache=cache, deterministic=True)
        engine.save(tmp_path / name)
        files.append((tmp_path / name).read_bytes())
        assert [(s.tactic, s.config) for s in engine.plan.steps] == [(s.tactic, s.config) for s in free.plan.steps]
    assert files[0] == files[1]
    assert cache.read_bytes() == before
    x = rand(4, 16, 8, 8)
    np.testing.assert_array_equal(vt.load(tmp_path / "a.vt")(x), free(x))


def test_what_the_cache_does_not_know_is_named(tmp_path):
    cache = tmp_path / "timing.json"
    vt.build(network(), device="cpu", opt_level=1, timing_cache=cache)
    with pytest.raises(vt.TuningError, match=r"timing\.json does not know .*Conv"):
        vt.build(network(48), device="cpu", opt_level=1, timing_cache=cache, deterministic=True)
    with pytest.raises(vt.TuningError, match="does not know"):
        vt.build(network(), device="cpu", opt_level=1, timing_cache=tmp_path / "none.json", deterministic=True)


def test_without_timing_every_build_is_deterministic(tmp_path):
    for name in ("a.vt", "b.vt"):
        vt.build(network(), device="cpu", opt_level=0, deterministic=True).save(tmp_path / name)
    assert (tmp_path / "a.vt").read_bytes() == (tmp_path / "b.vt").read_bytes()


def test_choices_in_place_are_recalled_or_missed():
    first = Bench(neighbours_matter, CLOSE)
    first.in_place.pinned = True
    with pytest.raises(vt.TuningError, match="choices in place"):
        first.in_place.settle(first.plan, 2)
    first.in_place.pinned = False
    first.in_place.settle(first.plan, 2)
    again = Bench(neighbours_matter, CLOSE, cache=first.cache)
    again.in_place.pinned = True
    again.in_place.settle(again.plan, 2)
    assert again.names() == first.names()
    nothing_to_time = Bench(lambda *names: None, CLOSE)
    nothing_to_time.in_place.pinned = True
    nothing_to_time.in_place.settle(nothing_to_time.plan, 2)
