"""`venturi timings` on caches of two machines."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from venturi.cli.main import app
from venturi.core.errors import TuningError
from venturi.tuning.cache import FORMAT, Measurement, TimingCache


def run(*args):
    return CliRunner().invoke(app, ["timings", *map(str, args)])


@pytest.fixture
def cache(tmp_path):
    """Two problems of this machine, one of another with older kernels."""
    made = TimingCache(tmp_path / "a.json")
    slow = Measurement("reference", {}, 20.0, 1.0)
    made.put("Conv@float32[1]", [Measurement("native-conv", {"tile": 4}, 10.0, 0.5), slow])
    made.put("MatMul@float32[2]", [slow, Measurement("native-linear", {}, reason="weights are computed at run time")])
    made.save()
    data = json.loads((tmp_path / "a.json").read_text())
    other = {"device": "other", "cpu": "x", "kernels": "old"}
    data["machines"][json.dumps(other)] = {"Relu@": [vars(slow)]}
    (tmp_path / "a.json").write_text(json.dumps(data))
    return tmp_path / "a.json"


def problems(path):
    return sorted(p for known in json.loads(path.read_text())["machines"].values() for p in known)


def test_show(cache):
    listed = run("show", cache)
    assert listed.exit_code == 0, listed.output
    assert "other" in listed.output
    shown = run("show", cache, "--problem", "MatMul")
    assert "weights are" in shown.output
    found = json.loads(run("show", cache, "--problem", "Conv", "--json").stdout)
    assert [c["median_us"] for c in found[0]["candidates"]] == [10.0, 20.0]


def test_merge_keeps_the_first_ones_times_and_all_machines(cache, tmp_path):
    second = TimingCache(tmp_path / "b.json")
    second.put("Conv@float32[1]", [Measurement("native-conv", {"tile": 4}, 99.0)])
    second.put("Gelu@", [Measurement("reference", {}, 1.0)])
    second.save()
    done = run("merge", cache, tmp_path / "b.json", "-o", tmp_path / "c.json", "--json")
    assert json.loads(done.stdout)["problems"] == 4
    assert problems(tmp_path / "c.json") == ["Conv@float32[1]", "Gelu@", "MatMul@float32[2]", "Relu@"]
    merged = TimingCache(tmp_path / "c.json").get("Conv@float32[1]")
    assert merged is not None
    assert merged[0].median_us == 10.0
    assert problems(tmp_path / "b.json") == ["Conv@float32[1]", "Gelu@"]
    over = run("merge", tmp_path / "b.json", cache, "-o", cache)
    assert over.exit_code == 0, over.output
    assert TimingCache(cache).get("Conv@float32[1]")[0].median_us == 99.0


def test_drop(cache):
    assert run("drop", cache, "--stale").exit_code == 0
    assert problems(cache) == ["Conv@float32[1]", "MatMul@float32[2]"]
    assert run("drop", cache, "--problem", "Conv").exit_code == 0
    assert problems(cache) == ["MatMul@float32[2]"]
    assert json.loads(cache.read_text())["format"] == FORMAT


def test_bad_input(cache, tmp_path):
    assert "nothing to drop" in str(run("drop", cache).exception)
    assert "no timing cache" in str(run("show", tmp_path / "none.json").exception)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(TuningError, match="not readable"):
        TimingCache(tmp_path / "bad.json")
    assert problems(cache) == ["Conv@float32[1]", "MatMul@float32[2]", "Relu@"]
