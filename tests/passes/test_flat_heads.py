"""Attention between transposes of heads reads and writes tokens as they lie; everything else is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from venturi.backends.reference.interpreter import Interpreter
from venturi.frontends.onnx_import import import_onnx
from venturi.passes.pipeline import run_pipeline
from venturi.passes.rewriting import PassContext


def model(perm: list[int], *, back: list[int] | None, cache: bool = False, kv_heads: int = 4) -> Any:
    """x [2, tokens, heads * 8] for q, k and v, attention over heads, and perhaps the way back."""
    nodes, inputs = [], []
    shape = helper.make_tensor("shape", TensorProto.INT64, [4], [2, 6, -1, 8])
    for name, heads in (("q", 4), ("k", kv_heads), ("v", kv_heads)):
        inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 6, heads * 8]))
        nodes.append(helper.make_node("Reshape", [name, "shape"], [f"{name}4"]))
        nodes.append(helper.make_node("Transpose", [f"{name}4"], [f"{name}t"], perm=perm))
    extra = []
    if cache:
        inputs += [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, kv_heads, 3, 8]) for n in ("pk", "pv")]
        extra = ["", "pk", "pv"]
    nodes.append(helper.make_node("Attention", ["qt", "kt", "vt", *extra], ["y"], scale=0.25))
    out = "y"
    if back:
        nodes.append(helper.make_node("Transpose", ["y"], ["z"], perm=back))
        out = "z"
    graph = helper.make_graph(
        nodes, "g", inputs, [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)], [shape]
    )
    return import_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10))


def flattened(made: Any, flat: bool = True) -> int:
    feed = {
        v.name: np.random.default_rng(0).standard_normal([int(d) for d in v.shape]).astype(np.float32)
        for v in made.graph.inputs
    }
    want = Interpreter(made.clone().graph).run(feed)
    context = PassContext(flat_attention=flat)
    run_pipeline(made, context)
    got = Interpreter(made.graph).run(feed)
    for a, b in zip(got.values(), want.values()):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6, atol=1e-6)
    return context.rewrites.get("flatten-heads", 0)


SWAP = [0, 2, 1, 3]


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("back", [SWAP, None, [1, 0, 2, 3]], ids=str)
def test_heads_side_by_side(back: list[int] | None, kv_heads: int) -> None:
    made = model(SWAP, back=back, kv_heads=kv_heads)
    assert flattened(made) == 1
    turns = [n for n in made.graph if n.op_type == "Transpose"]
    assert len(turns) == (0 if back == SWAP else 1), "what is left of two transpositions is one"


def test_what_is_left_alone() -> None:
    assert flattened(model(SWAP, back=SWAP), flat=False) == 0, "a device whose kernels want heads apart"
    assert flattened(model([0, 2, 1, 3], back=SWAP, cache=True)) == 0, "caches are laid out by heads"
    assert flattened(model([2, 0, 1, 3], back=None)) == 0, "another transposition"
