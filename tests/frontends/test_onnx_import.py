"""ONNX importing: old opsets, functions, control flow, external data, and everything a model can get wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import venturi as vt
from venturi.backends.reference.interpreter import Interpreter
from venturi.frontends.onnx_import import import_onnx

F = TensorProto.FLOAT


def model(
    nodes: list[Any],
    inputs: dict[str, Any],
    outputs: list[str],
    opset: int = 13,
    weights: dict[str, Any] | None = None,
    functions: list[Any] | None = None,
    domains: tuple[tuple[str, int], ...] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info(
                n, F if not isinstance(s, tuple) else s[0], s if not isinstance(s, tuple) else s[1]
            )
            for n, s in inputs.items()
        ],
        [
            helper.make_empty_tensor_value_info(o) if opset < 0 else helper.make_tensor_value_info(o, F, None)
            for o in outputs
        ],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in (weights or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, v) for d, v in domains)]
    made = helper.make_model(graph, opset_imports=imports, functions=functions or [])
    made.ir_version = 10
    return made


def run(proto: onnx.ModelProto, **inputs: Any) -> list[Any]:
    """Through interpreter and engine; both must agree."""
    first = list(Interpreter(import_onnx(proto).graph).run(inputs).values())
    second = list(vt.build(proto, opt_level=0).run(inputs).values())
    for a, b in zip(first, second):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    return first


def x_of(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def softmax(x: Any, axis: int) -> Any:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def test_softmax_below_13_normalizes_a_2d_view() -> None:
    x = x_of(2, 3, 4)
    (y,) = run(model([helper.make_node("Softmax", ["x"], ["y"])], {"x": [2, 3, 4]}, ["y"], 11), x=x)
    np.testing.assert_allclose(y, softmax(x.reshape(2, 12), 1).reshape(2, 3, 4), rtol=1e-5)
    (y,) = run(model([helper.make_node("Softmax", ["x"], ["y"])], {"x": [2, 3, 4]}, ["y"], 13), x=x)
    np.testing.assert_allclose(y, softmax(x, 2), rtol=1e-5)


@pytest.mark.parametrize(
    "opset, node, want",
    [
        (9, helper.make_node("Slice", ["x"], ["y"], starts=[1], ends=[3], axes=[1]), lambda x: x[:, 1:3]),
        (9, helper.make_node("Squeeze", ["x"], ["y"], axes=[2]), lambda x: x[:, :, 0]),
        (11, helper.make_node("Unsqueeze", ["x"], ["y"], axes=[0]), lambda x: x[None]),
        (
            10,
            helper.make_node("Pad", ["x"], ["y"], pads=[0, 1, 0, 0, 2, 0], value=1.5),
            lambda x: np.pad(x, ((0, 0), (1, 2), (0, 0)), constant_values=1.5),
        ),
        (6, helper.make_node("Clip", ["x"], ["y"], min=-0.5, max=0.5), lambda x: np.clip(x, -0.5, 0.5)),
        (12, helper.make_node("ReduceSum", ["x"], ["y"], axes=[1], keepdims=0), lambda x: x.sum(1)),
        (17, helper.make_node("ReduceMean", ["x"], ["y"], axes=[0, 1]), lambda x: x.mean((0, 1), keepdims=True)),
        (10, helper.make_node("Dropout", ["x"], ["y"], ratio=0.9), lambda x: x),
        (
            7,
            helper.make_node("Upsample", ["x"], ["y"], scales=[1.0, 2.0, 1.0], mode="nearest"),
            lambda x: x.repeat(2, 1),
        ),
        (10, helper.make_node("TopK", ["x", "k"], ["y", "i"], axis=1), lambda x: -np.sort(-x, 1)[:, :2]),
        (1, helper.make_node("Concat", ["x", "x"], ["y"]), lambda x: np.concatenate([x, x], 1)),
    ],
    ids=lambda v: v.op_type if isinstance(v, onnx.NodeProto) else None,
)
def test_old_interfaces(opset: int, node: Any, want: Any) -> None:
    x = x_of(2, 4, 1)
    weights = {"k": np.array([2], np.int64)} if node.op_type == "TopK" else {}
    outputs = run(model([node], {"x": [2, 4, 1]}, ["y"], opset, weights), x=x)
    np.testing.assert_allclose(outputs[0], want(x), rtol=1e-5, atol=1e-6)


def test_split_and_group_norm_of_old_opsets() -> None:
    x = x_of(2, 4, 3)
    a, b = run(
        model([helper.make_node("Split", ["x"], ["a", "b"], axis=1, split=[1, 3])], {"x": [2, 4, 3]}, ["a", "b"], 11),
        x=x,
    )
    np.testing.assert_array_equal(np.concatenate([a, b], 1), x)
    node = helper.make_node("GroupNormalization", ["x", "s", "b"], ["y"], num_groups=2)
    weights = {"s": np.array([2, 3], np.float32), "b": np.array([0.5, -1], np.float32)}
    (y,) = run(model([node], {"x": [2, 4, 3]}, ["y"], 18, weights), x=x)
    g = x.reshape(2, 2, 6)
    n = ((g - g.mean(2, keepdims=True)) / np.sqrt(g.var(2, keepdims=True) + 1e-5)).reshape(2, 2, 2, 3)
    want = n * weights["s"].reshape(1, 2, 1, 1) + weights["b"].reshape(1, 2, 1, 1)
    np.testing.assert_allclose(y, want.reshape(2, 4, 3), rtol=1e-4, atol=1e-5)


def test_legacy_broadcast_of_opset_6() -> None:
    node = helper.make_node("Add", ["x", "b"], ["y"], broadcast=1, axis=1)
    x, b = x_of(2, 4, 3), x_of(4)
    (y,) = run(model([node], {"x": [2, 4, 3]}, ["y"], 6, {"b": b}), x=x)
    np.testing.assert_allclose(y, x + b[None, :, None], rtol=1e-6)


def test_local_functions_are_inlined() -> None:
    body = [helper.make_node("Mul", ["a", "a"], ["s"]), helper.make_node("Relu", ["s"], ["r"])]
    function = helper.make_function("my", "Square", ["a"], ["r"], body, [helper.make_opsetid("", 13)])
    proto = model(
        [helper.make_node("Square", ["x"], ["y"], domain="my")],
        {"x": [3]},
        ["y"],
        13,
        functions=[function],
        domains=(("my", 1),),
    )
    x = x_of(3)
    np.testing.assert_allclose(run(proto, x=x)[0], x * x, rtol=1e-6)


def branch(name: str, op: str) -> onnx.GraphProto:
    return helper.make_graph(
        [helper.make_node(op, ["x"], [name])], name, [], [helper.make_tensor_value_info(name, F, None)]
    )


def test_if_captures_outer_values() -> None:
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch("t", "Exp"), else_branch=branch("e", "Neg"))
    proto = model([node], {"x": [3], "c": (TensorProto.BOOL, [])}, ["y"])
    x = x_of(3)
    np.testing.assert_allclose(run(proto, x=x, c=np.array(True))[0], np.exp(x), rtol=1e-6)
    np.testing.assert_allclose(run(proto, x=x, c=np.array(False))[0], -x)


def test_if_with_a_constant_condition_disappears() -> None:
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch("t", "Exp"), else_branch=branch("e", "Neg"))
    engine = vt.build(model([node], {"x": [3]}, ["y"], weights={"c": np.array(False)}), opt_level=0)
    assert [s.ops for s in engine.plan.steps] == [("Neg",)]


def test_loop_and_its_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["again"]),
            helper.make_node("Add", ["s", "x"], ["next"]),
            helper.make_node("Identity", ["next"], ["row"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("s", F, [2]),
        ],
        [
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", F, [2]),
            helper.make_tensor_value_info("row", F, [2]),
        ],
    )
    node = helper.make_node("Loop", ["n", "", "x"], ["last", "rows"], body=body)
    proto = model([node], {"x": [2], "n": (TensorProto.INT64, [])}, ["last", "rows"])
    x = x_of(2)
    last, rows = run(proto, x=x, n=np.array(3))
    np.testing.assert_allclose(last, 4 * x, rtol=1e-6)
    np.testing.assert_allclose(rows, np.stack([2 * x, 3 * x, 4 * x]), rtol=1e-6)
    monkeypatch.setenv("VENTURI_MAX_TRIPS", "5")
    with pytest.raises(vt.RequestError, match="VENTURI_MAX_TRIPS"):
        vt.build(proto, opt_level=0).run({"x": x, "n": np.array(100)})


def save_external(folder: Path, location: str = "w.bin") -> Path:
    weight = x_of(64, 64)
    proto = model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": [2, 64]}, ["y"], weights={"w": weight})
    tensor = proto.graph.initializer[0]
    data = tensor.raw_data
    (folder / "w.bin").write_bytes(data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(len(data)))):
        tensor.external_data.add(key=key, value=value)
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def test_external_weights_are_mapped(tmp_path: Path) -> None:
    path = save_external(tmp_path)
    x = x_of(2, 64)
    engine = vt.build(path, opt_level=0)
    np.testing.assert_allclose(engine(x), x @ x_of(64, 64), rtol=1e-4, atol=1e-5)
    imported = import_onnx(path)
    assert isinstance(imported.graph.initializers["w"].const_value, ir.ExternalTensor)


@pytest.mark.parametrize("location", ["../w.bin", "/etc/passwd", "sub/../../w.bin"])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    path = save_external(inner, location)
    (tmp_path / "w.bin").write_bytes(b"\0" * 20000)
    with pytest.raises(vt.ModelError):
        vt.build(path)


def test_external_data_through_a_link_is_refused(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    path = save_external(inner)
    (inner / "w.bin").rename(tmp_path / "secret.bin")
    os.symlink(tmp_path / "secret.bin", inner / "w.bin")
    with pytest.raises(vt.ModelError):
        vt.build(path)


def test_external_data_missing_or_short(tmp_path: Path) -> None:
    path = save_external(tmp_path)
    (tmp_path / "w.bin").write_bytes(b"\0" * 100)
    with pytest.raises(vt.ModelError, match="which has 100"):
        vt.build(path)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(vt.ModelError, match=r"w\.bin"):
        vt.build(path)


def test_unsupported_nodes_are_all_listed() -> None:
    nodes = [
        helper.make_node("Softmaxx", ["x"], ["a"], name="first"),
        helper.make_node("Mystery", ["a"], ["b"], name="second", domain="acme"),
        helper.make_node("Relu", ["b"], ["y"], name="third", alpha=1.0),
    ]
    with pytest.raises(vt.ModelError) as error:
        vt.build(model(nodes, {"x": [2]}, ["y"], domains=(("acme", 1),)))
    text = str(error.value)
    assert "'first'" in text
    assert "Did you mean 'Softmax'" in text
    assert "'second'" in text
    assert "acme::Mystery" in text
    assert "'third': Relu has no attribute 'alpha'" in text


def test_cycles_and_undefined_values() -> None:
    cycle = [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    with pytest.raises(vt.ModelError):
        vt.build(model(cycle, {"x": [2]}, ["a"]))
    with pytest.raises(vt.ModelError, match="nowhere"):
        vt.build(model([helper.make_node("Relu", ["nowhere"], ["y"])], {"x": [2]}, ["y"]))


def test_nodes_out_of_order_are_sorted() -> None:
    nodes = [helper.make_node("Relu", ["a"], ["y"]), helper.make_node("Neg", ["x"], ["a"])]
    x = x_of(2)
    np.testing.assert_allclose(run(model(nodes, {"x": [2]}, ["y"]), x=x)[0], np.maximum(-x, 0))


def test_newer_opset_than_known() -> None:
    proto = model([helper.make_node("Relu", ["x"], ["y"])], {"x": [2]}, ["y"])
    proto.opset_import[0].version = 99
    with pytest.raises(vt.ModelError, match="opset 99"):
        vt.build(proto)


def test_weights_with_nan_and_empty_tensors() -> None:
    weight = np.array([np.nan, np.inf, 1.0], np.float32)
    proto = model([helper.make_node("Add", ["x", "w"], ["y"])], {"x": [3]}, ["y"], weights={"w": weight})
    np.testing.assert_array_equal(run(proto, x=np.ones(3, np.float32))[0], weight + 1)
    proto = model(
        [helper.make_node("Concat", ["x", "w"], ["y"], axis=0)],
        {"x": [3]},
        ["y"],
        weights={"w": np.zeros(0, np.float32)},
    )
    np.testing.assert_array_equal(run(proto, x=np.ones(3, np.float32))[0], np.ones(3))


@pytest.mark.parametrize("content", [b"\x00\x01\x02garbage", b"", b"\x08\x0a"])
def test_files_that_are_no_models(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(vt.ModelError):
        vt.build(tmp_path / "m.onnx")


def test_the_callers_model_is_not_changed() -> None:
    proto = model([helper.make_node("Softmax", ["x"], ["y"])], {"x": [2, 3]}, ["y"], 11)
    before = proto.SerializeToString()
    vt.build(proto, opt_level=0)
    assert proto.SerializeToString() == before
    loaded = ir.from_proto(proto)
    text = str(loaded)
    vt.build(loaded, opt_level=0)
    assert str(loaded) == text


def test_more_than_two_gigabytes_of_weights(tmp_path: Path) -> None:
    """A sparse 2.2 GB file of external weights: nothing on the way serializes or copies them."""
    rows = 280
    columns = 2_000_000
    path = tmp_path / "big.bin"
    with path.open("wb") as file:
        file.truncate(rows * columns * 4)
    proto = model([helper.make_node("Gather", ["w", "i"], ["y"])], {"i": (TensorProto.INT64, [1])}, ["y"])
    tensor = proto.graph.initializer.add(
        name="w", data_type=F, dims=[rows, columns], data_location=TensorProto.EXTERNAL
    )
    for key, value in (("location", "big.bin"), ("offset", "0"), ("length", str(rows * columns * 4))):
        tensor.external_data.add(key=key, value=value)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    engine = vt.build(tmp_path / "m.onnx", opt_level=0)
    out = engine(np.array([279]))
    assert out.shape == (1, columns)
    assert not out.any()
