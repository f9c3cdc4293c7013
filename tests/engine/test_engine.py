"""Engines: running, shapes, profiles, contexts, batching, files, refit, stripping, progress, determinism."""

from __future__ import annotations

import json
import os
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

import venturi as vt
from tests.engine.models import conv_net, mlp, nonzero, weights
from venturi.backends.reference.interpreter import Interpreter
from venturi.frontends.onnx_import import import_onnx


def reference(net: vt.Network, inputs: dict[str, Any]) -> dict[str, Any]:
    return Interpreter(import_onnx(net.to_model()).graph).run(inputs)


def x_of(*shape: int, seed: int = 7) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


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
    worker = Worker(lambda inputs: (gate.wait(30), {})[1], vt.Batching(max_batch=1, max_queue=2))
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


def test_save_and_load_keep_the_answers(tmp_path: Path) -> None:
    engine = vt.build(conv_net())
    x = x_of(3, 8, 10, 10)
    engine.save(tmp_path / "e.vt")
    loaded = vt.load(tmp_path / "e.vt")
    np.testing.assert_array_equal(loaded(x), engine(x))
    assert loaded.inputs == engine.inputs
    assert loaded.plan == engine.plan


def test_the_file_is_a_plain_aligned_zip_that_others_can_read(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    engine = vt.build(mlp())
    path = tmp_path / "e.vt"
    engine.save(path)
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        assert {"manifest.json", "plan-cpu.json", "graph.onnx", "weights.safetensors"} <= names
        assert archive.testzip() is None
        manifest = json.loads(archive.read("manifest.json"))
        archive.extractall(tmp_path / "x")
    assert set(manifest["sha256"]) == names - {"manifest.json"}
    stored = load_file(tmp_path / "x" / "weights.safetensors")
    assert any(a.shape == (8, 16) for a in stored.values())
    model = ir.load(tmp_path / "x" / "graph.onnx")
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        assert value.const_value.numpy().shape == tuple(value.const_value.shape.numpy())
    from venturi.engine.container import Container

    container = Container(path)
    base = container._data
    for view in container.entries.values():
        offset = bytes(base).find(bytes(view[:64])) if len(view) >= 64 else 0
        assert offset % 64 == 0 or len(view) < 64


def test_saving_to_a_full_or_missing_place_leaves_nothing(tmp_path: Path) -> None:
    engine = vt.build(mlp(), opt_level=0)
    with pytest.raises(vt.EngineError, match="cannot write"):
        engine.save(tmp_path / "no" / "such" / "e.vt")
    if os.path.exists("/dev/full"):
        from venturi.engine import container

        target = tmp_path / "e.vt"
        target.write_bytes(b"old")
        real = container._write_zip

        def full(file: Any, entries: Any) -> None:
            real(file, entries)
            raise OSError(28, "No space left on device")

        container._write_zip, saved = full, container._write_zip
        try:
            with pytest.raises(vt.EngineError, match="No space left"):
                engine.save(target)
        finally:
            container._write_zip = saved
        assert target.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["e.vt"]


@pytest.mark.parametrize(
    "content, text", [(b"", "empty"), (b"PK", "no engine"), (bytes(range(1, 250)) * 16, "no engine")]
)
def test_files_that_are_no_engines(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "e.vt").write_bytes(content)
    with pytest.raises(vt.EngineError, match=text):
        vt.load(tmp_path / "e.vt")
    with pytest.raises(vt.EngineError, match="cannot read"):
        vt.load(tmp_path / "absent.vt")


def test_refit_by_names_and_from_a_new_file(tmp_path: Path) -> None:
    engine = vt.build(conv_net(), refit=True)
    x = x_of(2, 8, 10, 10)
    names = [n for n in engine._source.graph.initializers if "const" in n]
    new = {
        n: weights(8, 8, 3, 3, seed=99) for n in names if engine._source.graph.initializers[n].const_value.size == 576
    }
    engine.refit(new)
    source = engine._source.clone()
    want = Interpreter(source.graph).run({"x": x})["y"]
    np.testing.assert_allclose(engine(x), want, rtol=2e-5, atol=2e-5)
    ir.save(source, tmp_path / "new.onnx")
    engine.save(tmp_path / "e.vt")
    other = vt.load(tmp_path / "e.vt", weights=tmp_path / "new.onnx")
    np.testing.assert_allclose(other(x), want, rtol=2e-5, atol=2e-5)


def test_refit_refuses_what_does_not_fit() -> None:
    engine = vt.build(mlp(), refit=True, opt_level=0)
    before = engine(x_of(2, 8))
    name = next(n for n in engine._source.graph.initializers if n.startswith("W"))
    with pytest.raises(vt.EngineError, match="shape"):
        engine.refit({name: np.zeros((3, 3), np.float32)})
    with pytest.raises(vt.EngineError, match="no weights named"):
        engine.refit({"nope": np.zeros((3, 3), np.float32)})
    np.testing.assert_array_equal(engine(x_of(2, 8)), before)
    with pytest.raises(vt.EngineError, match="refit=True"):
        vt.build(mlp(), opt_level=0).refit({})


def test_stripped_engines_get_their_weights_at_load(tmp_path: Path) -> None:
    model = mlp().to_model()
    ir.save(model, tmp_path / "m.onnx")
    engine = vt.build(tmp_path / "m.onnx", strip=True)
    engine.save(tmp_path / "thin.vt")
    with zipfile.ZipFile(tmp_path / "thin.vt") as archive:
        assert "weights.safetensors" not in archive.namelist()
    with pytest.raises(vt.EngineError, match="stripped"):
        vt.load(tmp_path / "thin.vt")
    x = x_of(2, 8)
    full = vt.load(tmp_path / "thin.vt", weights=tmp_path / "m.onnx")
    np.testing.assert_allclose(full(x), engine(x), rtol=1e-6)


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


def test_two_builds_with_one_cache_give_one_file(tmp_path: Path) -> None:
    files = []
    for i in range(2):
        path = tmp_path / f"{i}.vt"
        vt.build(conv_net(), timing_cache=tmp_path / "cache.json").save(path)
        with zipfile.ZipFile(path) as archive:
            plan = json.loads(archive.read("plan-cpu.json"))
            plan.pop("timings_ms")
            files.append((archive.read("graph.onnx"), archive.read("weights.safetensors"), plan))
    assert files[0] == files[1]


@pytest.mark.parametrize("options, text", [({"precison": "fp32"}, "precison"), ({"opt_level": 9}, "opt_level")])
def test_bad_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises((vt.VenturiError, TypeError), match=text):
        vt.build(mlp(), **options)
    with pytest.raises(vt.VenturiError, match=text):
        vt.BuildConfig.create(None, **options)


@pytest.mark.parametrize("device, text", [("cuda", "CUDA backend"), ("tpu", "unknown device")])
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


def test_debug_levels_explain_the_plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for level in ("0", "1", "2", "3"):
        monkeypatch.setenv("VENTURI_DEBUG", level)
        vt.build(conv_net(), opt_level=1)
        texts.append(capsys.readouterr().err)
    assert texts[0] == ""
    assert "steps on cpu" in texts[1]
    assert "Conv+Relu" in texts[2]
    assert "<--" in texts[3]
    assert len(texts[1]) < len(texts[2]) < len(texts[3])


def test_a_tactic_missing_on_this_machine_is_replaced_at_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from venturi.backends.cpu import onednn

    engine = vt.build(conv_net(), opt_level=0)
    assert any(s.tactic == "onednn-conv" for s in engine.plan.steps)
    engine.save(tmp_path / "e.vt")
    monkeypatch.setattr(onednn, "has_fused_conv", lambda: False)
    loaded = vt.load(tmp_path / "e.vt")
    assert not any(s.tactic == "onednn-conv" for s in loaded.plan.steps)
    assert any("not on this machine" in m.reason for s in loaded.plan.steps for m in s.measurements)
    x = x_of(2, 8, 10, 10)
    np.testing.assert_allclose(loaded(x), engine(x), rtol=1e-5, atol=1e-5)


def test_strict_mode_names_what_only_the_reference_can_do() -> None:
    with pytest.raises(vt.TuningError, match="strict"):
        vt.build(nonzero(), strict=True, opt_level=0)


def test_the_report_covers_every_source_node() -> None:
    net = conv_net()
    engine = vt.build(net)
    report = engine.profile({"x": x_of(2, 8, 10, 10)}, runs=3)
    assert len(report.layers) == len(engine.plan.steps)
    assert report.total_us > 0
    assert report.arena_bytes is not None
    named = {s for layer in report.layers for s in layer.sources}
    convs = {n.name for n in net.to_model().graph if n.op_type == "Conv"}
    assert convs <= named
    assert "Conv" in str(report)
    json.dumps(engine.inspect().to_json())


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
