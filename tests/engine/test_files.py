"""Engine files: round trips, layout, failures, refit, stripped weights, reproducible builds."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import venturi as vt
from tests.engine.models import conv_net, mlp, weights, x_of
from venturi.backends.reference.interpreter import Interpreter


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


def test_a_tactic_missing_on_this_machine_is_replaced_at_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from venturi.backends.cpu.tactics import native_conv

    engine = vt.build(conv_net(), opt_level=0)
    if not any(s.tactic == "native-conv" for s in engine.plan.steps):
        pytest.skip("no code is generated for this CPU")
    engine.save(tmp_path / "e.vt")
    monkeypatch.setattr(native_conv, "host", lambda: "a CPU without AVX2")
    loaded = vt.load(tmp_path / "e.vt")
    assert not any(s.tactic == "native-conv" for s in loaded.plan.steps)
    assert any("not on this machine" in m.reason for s in loaded.plan.steps for m in s.measurements)
    x = x_of(2, 8, 10, 10)
    np.testing.assert_allclose(loaded(x), engine(x), rtol=1e-5, atol=1e-5)
