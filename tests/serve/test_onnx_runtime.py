"""Models that onnxruntime runs: the same answers as engines, batches, and what cannot be loaded."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import onnx
import pytest
import tritonclient.http as http_client
from onnx import TensorProto, helper

from tests.serve.running import DIGITS, serving
from venturi.serve.config import parse_config
from venturi.serve.errors import ServeError
from venturi.serve.models.onnx_runtime import OnnxRuntimeKind


def add(root, name, source, config='backend: "ort"'):
    folder = root / name / "1"
    folder.mkdir(parents=True)
    shutil.copy(source, folder / "model.onnx")
    (root / name / "config.pbtxt").write_text(config)
    return folder


def strings(path):
    """A model that gives its strings back."""
    ports = [helper.make_tensor_value_info(n, TensorProto.STRING, ["n", 2]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", ports[:1], ports[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)


def test_onnxruntime_and_engines_answer_the_same(tmp_path):
    add(tmp_path, "ort", DIGITS)
    add(tmp_path, "ours", DIGITS, 'backend: "onnxruntime"')
    images = np.random.default_rng(0).random((4, 1, 8, 8), dtype=np.float32)
    given = http_client.InferInput("image", [4, 1, 8, 8], "FP32")
    given.set_data_from_numpy(images)
    with serving(tmp_path) as running, http_client.InferenceServerClient(running.url("http")) as client:
        theirs, ours = (client.infer(m, [given]).as_numpy("logits") for m in ("ort", "ours"))
        assert client.get_model_config("ort")["max_batch_size"] == 4
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4)
        assert running.running.core.find("ort").model.inspect() == {"reason": "run by onnxruntime"}


def test_strings(tmp_path):
    strings(tmp_path / "s.onnx")
    add(tmp_path / "r", "s", tmp_path / "s.onnx")
    words = np.array([["a", "\u00e4\u00f6"], ["", "b"]], dtype=object)
    given = http_client.InferInput("x", [2, 2], "BYTES")
    given.set_data_from_numpy(words)
    with serving(tmp_path / "r") as running, http_client.InferenceServerClient(running.url("http")) as client:
        found = client.infer("s", [given]).as_numpy("y")
    assert [w.decode() for w in found.reshape(-1)] == list(words.reshape(-1))


@pytest.mark.parametrize(
    "config, content, text",
    [
        ("", b"no model", "onnxruntime [0-9.]+ cannot load"),
        ("", None, "no model file in .*: expected one of model.onnx"),
        ('default_model_filename: "../../x.onnx"', b"", "leaves its version folder"),
        ('parameters { key: "intra_threads" value { string_value: "many" } }', DIGITS.read_bytes(), "got 'many'"),
    ],
)
def test_what_cannot_be_loaded(tmp_path, config, content, text):
    if content is not None:
        (tmp_path / "model.onnx").write_bytes(content)
    found = parse_config('name: "m" backend: "ort" ' + config, "m")
    with pytest.raises(ServeError, match=text):
        OnnxRuntimeKind().load(found, tmp_path)


def test_without_onnxruntime(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ServeError, match="pip install onnxruntime"):
        OnnxRuntimeKind().load(parse_config('name: "m" backend: "ort"', "m"), tmp_path)
