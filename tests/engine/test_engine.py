"""Engines: running, shapes, profiles, contexts, batching, files, refit, stripping, progress, determinism."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

import venturi as vt
from tests.engine.models import conv_net, mlp, nonzero, x_of
from tests.passes.harness import rand
from venturi.backends.reference.interpreter import Interpreter
from venturi.frontends.onnx_import import import_onnx


def reference(net: vt.Network, inputs: dict[str, Any]) -> dict[str, Any]:
    return Interpreter(import_onnx(net.to_model()).graph).run(inputs)


@pytest.mark.parametrize("level", [0, 1, 3])
@pytest.mark.parametrize("make, shape", [(mlp, (8,)), (conv_net, (8, 10, 10))])
def test_engine_matches_the_reference_at_every_batch(make: Any, shape: tuple[int, ...], level: int) -> None:
    engine = vt.build(make(), opt_level=level)
    for batch in (1, 3, 0, 5, 3):
        x = x_of(batch, *shape)
        want = reference(make(), {"x": x})["y"]
        for _ in range(2):
            np.testing.assert_allclose(engine(x), want, rtol=2e-5, atol=2e-5)


def test_torch_in_gives_torch_out_and_numpy_numpy() -> None:
    engine = vt.build(mlp(), opt_level=0)
    x = x_of(2, 8)
    assert isinstance(engine(x), np.ndarray)
    out = engine(torch.from_numpy(x))
    assert isinstance(out, torch.Tensor)
    np.testing.assert_array_equal(out.numpy(), engine(x))


@pytest.mark.parametrize("view", ["strided", "reversed", "fortran", "readonly", "byteswapped"])
def test_odd_numpy_inputs(view: str) -> None:
    engine = vt.build(mlp(), opt_level=0)
    base = x_of(6, 16)
    x = {
        "strided": base[::2, ::2],
        "reversed": base[::-1, :8],
        "fortran": np.asfortranarray(base[:, :8]),
        "readonly": base[:, :8].copy(),
        "byteswapped": base[:, :8].astype(">f4"),
    }[view]
    if view == "readonly":
        x.flags.writeable = False
    want = engine(np.ascontiguousarray(x).astype(np.float32))
    np.testing.assert_array_equal(engine(x), want)


def test_nan_and_infinity_go_through_as_in_the_reference() -> None:
    engine = vt.build(conv_net())
    x = x_of(2, 8, 10, 10)
    x[0, 0, 0, 0], x[1, 2, 5, 5] = np.nan, np.inf
    want = reference(conv_net(), {"x": x})["y"]
    np.testing.assert_allclose(engine(x), want, rtol=2e-5, atol=2e-5, equal_nan=True)


def test_outputs_do_not_change_under_later_runs_or_inputs() -> None:
    engine = vt.build(conv_net())
    x = x_of(1, 8, 10, 10)
    first = engine(x)
    kept = first.copy()
    engine(x_of(1, 8, 10, 10, seed=8))
    np.testing.assert_array_equal(first, kept)


def test_an_output_never_shares_memory_with_an_input() -> None:
    net = vt.Network("view")
    x = net.input("x", (2, 3))
    net.output("y", net.transpose(x, perm=[1, 0]))
    engine = vt.build(net)
    given = x_of(2, 3)
    for _ in range(2):
        out = engine(given)
        assert not np.shares_memory(out, given)


def test_data_dependent_shapes() -> None:
    engine = vt.build(nonzero())
    for seed in range(4):
        x = (x_of(9, seed=seed) > 0.3).astype(np.float32) * x_of(9, seed=seed)
        got = engine.run({"x": x})
        np.testing.assert_array_equal(got["index"], np.stack(np.nonzero(x)))
        np.testing.assert_allclose(got["twice"], 2 * x[np.nonzero(x)[0]])


@pytest.mark.parametrize(
    "inputs, words",
    [
        ({}, ["missing ['x']"]),
        ({"X": x_of(1, 8)}, ["unknown ['X']", "Did you mean 'x'"]),
        ({"x": x_of(1, 7)}, ["'x'", "[1, 7]", "8"]),
        ({"x": x_of(8)}, ["[8]"]),
        ({"x": x_of(1, 8).astype(np.float64)}, ["float32", "float64", "cast"]),
    ],
)
def test_wrong_inputs_say_what_is_wrong(inputs: dict[str, Any], words: list[str]) -> None:
    engine = vt.build(mlp(), opt_level=0)
    with pytest.raises(vt.ShapeError) as error:
        engine.run(inputs)
    for word in words:
        assert word in str(error.value)


def test_symbols_must_agree_between_inputs() -> None:
    net = vt.Network("pair")
    a, b = net.input("a", ("n", 2)), net.input("b", ("n", 2))
    net.output("y", a + b)
    engine = vt.build(net, opt_level=0)
    with pytest.raises(vt.ShapeError, match="dimension 'n' is 2 in input 'a' but 3 in 'b'"):
        engine(x_of(2, 2), x_of(3, 2))


def test_profiles_limit_shapes() -> None:
    engine = vt.build(mlp(), profiles=[vt.Profile(x=((1, 8), (2, 8), (4, 8)))])
    assert engine(x_of(4, 8)).shape == (4, 4)
    with pytest.raises(vt.ShapeError, match="outside every profile"):
        engine(x_of(5, 8))
    assert engine.plan.tuned_shapes == {"x": [2, 8]}


@pytest.mark.parametrize(
    "profile, text",
    [
        (vt.Profile(z=((1, 8), (2, 8), (4, 8))), "names input 'z'"),
        (vt.Profile(x=((1, 9), (2, 9), (4, 9))), "the model fixes"),
        (vt.Profile(x=(1, 8, 1)), "3 dimensions"),
    ],
)
def test_impossible_profiles(profile: vt.Profile, text: str) -> None:
    with pytest.raises(vt.ShapeError, match=text):
        vt.build(mlp(), profiles=profile, opt_level=0)


def test_profile_needs_order() -> None:
    with pytest.raises(vt.ShapeError, match="min <= opt <= max"):
        vt.Profile(x=((4, 8), (2, 8), (8, 8)))


def test_contexts_have_profiles_of_their_own() -> None:
    profiles = [vt.Profile(x=((1, 8), (1, 8), (2, 8))), vt.Profile(x=((3, 8), (4, 8), (9, 8)))]
    engine = vt.build(mlp(), profiles=profiles, opt_level=0)
    with engine.context(profile=1) as context:
        assert context.run({"x": x_of(9, 8)})["y"].shape == (9, 4)
        with pytest.raises(vt.ShapeError):
            context.run({"x": x_of(2, 8)})
    with pytest.raises(vt.ShapeError, match="profile 2"), engine.context(profile=2):
        pass


def test_two_threads_give_the_answers_of_one() -> None:
    engine = vt.build(conv_net())
    inputs = [x_of(1 + i % 3, 8, 10, 10, seed=i) for i in range(12)]
    alone = [engine(x) for x in inputs]
    results: dict[int, Any] = {}

    def work(offset: int) -> None:
        with engine.context() as context:
            for i in range(offset, len(inputs), 2):
                for _ in range(3):
                    results[i] = context.run({"x": inputs[i]})["y"]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, want in enumerate(alone):
        np.testing.assert_array_equal(results[i], want)


def test_submit_gives_futures_and_batches_requests() -> None:
    engine = vt.build(mlp())
    x = x_of(6, 8)
    want = engine(x)
    engine.batching = vt.Batching(max_batch=4, max_delay_ms=20)
    futures = [engine.submit({"x": x[i : i + 1]}) for i in range(6)]
    for i, future in enumerate(futures):
        np.testing.assert_allclose(future.result(timeout=30)["y"], want[i : i + 1], rtol=1e-5, atol=1e-6)
    engine.close()


def test_a_bad_request_fails_alone() -> None:
    engine = vt.build(mlp(), opt_level=0)
    bad, good = engine.submit({"x": x_of(1, 7)}), engine.submit({"x": x_of(1, 8)})
    with pytest.raises(vt.ShapeError):
        bad.result(timeout=30)
    assert good.result(timeout=30)["y"].shape == (1, 4)
    engine.close()


def test_a_full_queue_refuses() -> None:
    from venturi.runtime.batching import Worker

    gate = threading.Event()
    worker = Worker(lambda _, inputs: (gate.wait(30), {})[1], vt.Batching(max_batch=1, max_queue=2))
    accepted = 0
    while accepted < 10:
        try:
            worker.submit({"x": x_of(1)})
        except vt.RequestError as exc:
            assert "queue is full" in str(exc)
            break
        accepted += 1
    assert 2 <= accepted <= 3
    gate.set()
    worker.close()


def test_progress_reports_and_cancels() -> None:
    events = []
    vt.build(mlp(), progress=lambda e: events.append(e) or True)
    assert {e.phase for e in events} == {"import", "passes", "plan"}
    with pytest.raises(vt.TuningError, match="cancelled"):
        vt.build(mlp(), progress=lambda e: e.phase != "plan")


def test_logger_hears_the_build() -> None:
    lines: list[tuple[str, str]] = []
    net = vt.Network("bad-index")
    x = net.input("x", (4,), "int64")
    net.output("y", net.gather(np.ones((1, 2), np.float32), x + 5))
    vt.build(net, logger=lambda level, text: lines.append((level, text)))
    assert any("planned without timing" in text for _, text in lines)


@pytest.mark.parametrize("options, text", [({"precison": "fp32"}, "precison"), ({"opt_level": 9}, "opt_level")])
def test_bad_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises((vt.VenturiError, TypeError), match=text):
        vt.build(mlp(), **options)
    with pytest.raises(vt.VenturiError, match=text):
        vt.BuildConfig.create(None, **options)


@pytest.mark.parametrize("device, text", [("cuda:99", "device"), ("tpu", "unknown device")])
def test_absent_devices(device: str, text: str) -> None:
    with pytest.raises(vt.DeviceError, match=text):
        vt.build(mlp(), device=device)


def test_unknown_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENTURI_VERIFFY", "1")
    with pytest.raises(vt.RequestError, match="Did you mean 'VENTURI_VERIFY'"):
        vt.build(mlp())
    monkeypatch.delenv("VENTURI_VERIFFY")
    monkeypatch.setenv("VENTURI_FUEL", "many")
    with pytest.raises(vt.RequestError, match="VENTURI_FUEL='many'"):
        vt.build(mlp())


def test_strict_mode_names_what_only_the_reference_can_do() -> None:
    with pytest.raises(vt.TuningError, match="strict"):
        vt.build(nonzero(), strict=True, opt_level=0)


@pytest.mark.parametrize("precision, bound", [("bf16", 0.03), ("fp16", 0.005), ("fp32", 1e-5)])
def test_precision_keeps_the_interface_and_nearly_the_answer(precision: Any, bound: float) -> None:
    for make, shape in ((mlp, (3, 8)), (conv_net, (2, 8, 10, 10))):
        engine = vt.build(make(), precision=precision)
        x = x_of(*shape)
        want = reference(make(), {"x": x})["y"]
        got = engine(x)
        assert got.dtype == np.float32
        assert np.abs(got - want).max() <= bound * np.abs(want).max()
        if precision != "fp32":
            assert any("Cast" in s.ops for s in engine.plan.steps)


def test_building_from_everything(tmp_path: Path) -> None:
    model = mlp().to_model()
    proto = ir.to_proto(model)
    x = x_of(2, 8)
    want = vt.build(model, opt_level=0)(x)
    onnx.save(proto, tmp_path / "m.onnx")
    module = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU())
    program = torch.export.export(module, (torch.zeros(2, 8),))
    for source in (proto, proto.SerializeToString(), tmp_path / "m.onnx", str(tmp_path / "m.onnx")):
        np.testing.assert_array_equal(vt.build(source, opt_level=0)(x), want)
    with torch.inference_mode():
        eager = module(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(vt.build(module, example=torch.zeros(2, 8), opt_level=0)(x), eager, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(vt.build(program, opt_level=0)(x), eager, rtol=1e-5, atol=1e-6)
    with pytest.raises(vt.ModelError, match="cannot build from dict"):
        vt.build({})
    with pytest.raises(vt.ModelError, match="needs example inputs"):
        vt.build(module)


def test_concat_parts_are_computed_in_place() -> None:
    net = vt.Network("concat")
    x, y = net.input("x", (1, 4, 8)), net.input("y", (1, 3, 8))
    a, b = net.sigmoid(x), net.tanh(y)
    joined = net.concat(a, b, x, axis=1)
    net.output("z", net.exp(joined) @ rand(8, 5))
    net.output("w", net.cos(a) @ rand(8, 2))
    engine = vt.build(net, device="cpu", opt_level=0)
    step = next(s for s in engine.plan.steps if s.ops == ("Concat",))
    assert step.tactic == "aten-join"
    with engine.context() as ctx:
        for seed in range(4):
            given = {"x": rand(1, 4, 8, seed=seed), "y": rand(1, 3, 8, seed=seed + 9)}
            got = ctx.run(given)
            want = Interpreter(import_onnx(net.to_model()).graph).run(given)
            for name in ("z", "w"):
                np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-6)
        binding = ctx._context.binding_of([torch.zeros(1, 4, 8), torch.zeros(1, 3, 8)])
        homes = dict(zip([s.ops[-1] for s in engine.plan.steps], binding.homes))
    start = homes["Concat"].data_ptr()
    assert homes["Sigmoid"].data_ptr() == start
    assert homes["Tanh"].data_ptr() == start + 4 * 8 * 4


@pytest.mark.parametrize("axis", [0, 2])
def test_concat_along_other_axes_copies(axis: int) -> None:
    net = vt.Network("concat")
    x = net.input("x", (2, 4, 8))
    net.output("z", net.exp(net.concat(net.sigmoid(x), net.tanh(x), net.tanh(x), axis=axis)))
    engine = vt.build(net, device="cpu", opt_level=0)
    for seed in range(3):
        given = {"x": rand(2, 4, 8, seed=seed)}
        want = Interpreter(import_onnx(net.to_model()).graph).run(given)["z"]
        np.testing.assert_allclose(engine.run(given)["z"], want, rtol=1e-5)


def test_first_loads_on_several_threads_at_once(tmp_path: Path) -> None:
    """Tables that fill at first use are whole for whoever comes while they fill."""
    net = vt.Network("identity")
    net.output("y", net.identity(net.input("x", ("n", 4))))
    vt.build(net, device="cpu", opt_level=0).save(tmp_path / "m.vt")
    code = (
        "import threading, venturi as vt\n"
        "start, failed = threading.Barrier(4), []\n"
        "def load():\n"
        "    start.wait()\n"
        "    try: vt.load('m.vt')\n"
        "    except BaseException as exc: failed.append(exc)\n"
        "threads = [threading.Thread(target=load) for _ in range(4)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "assert not failed, failed\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_empty_strings_whatever_numpy_takes_them_for() -> None:
    net = vt.Network("strings")
    net.output("y", net.string_concat(net.input("a", (2, 0), "string"), net.input("b", (2, 0), "string")))
    engine = vt.build(net, device="cpu", opt_level=0)
    for empty in (np.empty((2, 0)), np.empty((2, 0), dtype=object), np.array([[], []], dtype=str)):
        assert engine.run({"a": empty, "b": empty})["y"].shape == (2, 0)
