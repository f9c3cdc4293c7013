"""Engines for a GPU that is not here, and engine files tuned anew."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

import venturi as vt
from tests.passes.harness import rand
from venturi.cli.main import app
from venturi.engine.artifact import open_artifact
from venturi.engine.opening import _check_device


def network():
    net = vt.Network()
    x = net.input("x", ("n", 16, 8, 8))
    y = net.relu(net.conv(x, rand(32, 16, 3, 3) * 0.1, rand(32), pads=[1, 1, 1, 1]))
    net.output("y", net.softmax(net.global_average_pool(y), axis=1))
    return net


def test_an_engine_for_an_absent_gpu_carries_its_kernels(tmp_path):
    engine = vt.build(network(), target="sm_90", precision="fp16", opt_level=0)
    with pytest.raises(vt.DeviceError, match="sm_90, which is not here: save it"):
        engine(rand(2, 16, 8, 8))
    engine.save(tmp_path / "m.vt")
    loaded = open_artifact(tmp_path / "m.vt")
    assert loaded.manifest["device"] == {"arch": "sm_90", "gpu": "", "libraries": ""}
    index = json.loads(bytes(loaded.container.entry("kernels/index.json")))
    assert index
    assert all(bytes(loaded.container.entry(f"kernels/{k['key']}.cubin"))[:4] == b"\x7fELF" for k in index)
    generated = [s.tactic for s in loaded.plan.steps if s.tactic.startswith("triton")]
    assert "triton-conv" in generated, [s.tactic for s in loaded.plan.steps]
    assert all(m.median_us is None for s in loaded.plan.steps for m in s.measurements)


def test_a_tactic_that_does_not_compile_gives_way_to_the_next(tmp_path):
    """128 x 256 fp32 results do not fit in shared memory beside three stages; the order of preference has it first."""
    net = vt.Network()
    net.output("y", net.cast(net.input("x", (8192, 768), "float16") @ rand(768, 3072).astype(np.float16), to=1))
    engine = vt.build(net, target="sm_80", opt_level=0)
    steps = [s for s in engine.plan.steps if "MatMul" in s.ops]
    assert steps
    assert all(s.tactic.startswith("triton-gemm") for s in steps), [s.tactic for s in steps]


@pytest.mark.parametrize("target", ["sm_75", "90", "cuda", "sm_"])
def test_unknown_targets_are_named(target):
    with pytest.raises(vt.DeviceError, match="known: sm_80"):
        vt.build(network(), target=target, opt_level=0)


def test_a_target_without_its_gpu_cannot_be_timed():
    with pytest.raises(vt.VenturiError, match="without timing kernels: pass opt_level=0"):
        vt.build(network(), target="sm_90")


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_a_target_contradicts_a_device(device):
    with pytest.raises(vt.VenturiError, match="leave one of them out"):
        vt.build(network(), target="sm_90", device=device, opt_level=0)


def test_load_says_that_kernels_are_guesses(caplog):
    here = {"arch": "sm_90", "gpu": "a", "libraries": "b"}
    with caplog.at_level("WARNING", "venturi"):
        _check_device({"arch": "sm_90", "gpu": "", "libraries": ""}, here)
    assert "venturi tune" in caplog.text


def test_tuning_times_what_the_file_only_guessed(tmp_path):
    net = network()
    profile = vt.Profile(x=((1, 16, 8, 8), (2, 16, 8, 8), (4, 16, 8, 8)))
    built = vt.build(net, device="cpu", opt_level=0, profiles=profile, refit=True)
    built.save(tmp_path / "m.vt")
    cache = tmp_path / "timing.json"
    tuned = vt.tune(tmp_path / "m.vt", opt_level=1, timing_cache=cache)
    timed = [m for s in tuned.plan.steps for m in s.measurements if m.median_us is not None]
    assert timed
    assert cache.exists()
    assert tuned.plan.tuned_shapes == {"x": [2, 16, 8, 8]}
    assert [s.name for s in tuned.plan.steps] == [s.name for s in built.plan.steps]
    x = rand(3, 16, 8, 8)
    np.testing.assert_allclose(tuned(x), built(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(vt.ShapeError):
        tuned(rand(5, 16, 8, 8))
    tuned.save(tmp_path / "t.vt")
    np.testing.assert_array_equal(vt.load(tmp_path / "t.vt")(x), tuned(x))
    weights = net.to_model().graph.initializers
    (name,) = [n for n, v in weights.items() if list(v.shape) == [32, 16, 3, 3]]
    tuned.refit({name: np.zeros((32, 16, 3, 3), np.float32)})
    assert not np.allclose(tuned(x), built(x))


def test_stripped_and_damaged_files_are_refused(tmp_path):
    vt.build(network(), device="cpu", opt_level=0, strip=True).save(tmp_path / "m.vt")
    with pytest.raises(vt.EngineError, match="stripped"):
        vt.tune(tmp_path / "m.vt")
    (tmp_path / "bad.vt").write_bytes(b"no")
    with pytest.raises(vt.EngineError):
        vt.tune(tmp_path / "bad.vt")


def test_commands(tmp_path):
    ir.save(network().to_model(), tmp_path / "m.onnx")
    run = CliRunner().invoke
    made = run(
        app, ["build", str(tmp_path / "m.onnx"), "--target", "sm_90", "--precision", "fp16", "--no-tune", "--json"]
    )
    assert made.exit_code == 0, made.output
    refused = run(app, ["build", str(tmp_path / "m.onnx"), "--target", "sm_90"])
    assert refused.exit_code != 0
    vt.build(network(), device="cpu", opt_level=0).save(tmp_path / "c.vt")
    tuned = run(app, ["tune", str(tmp_path / "c.vt"), "-o", str(tmp_path / "t.vt"), "--opt-level", "1", "--json"])
    assert tuned.exit_code == 0, tuned.output
    assert json.loads(tuned.stdout)["engine"].endswith("t.vt")
