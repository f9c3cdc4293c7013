"""com.microsoft operators against onnxruntime, on random inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import venturi as vt

ort = pytest.importorskip("onnxruntime", reason="the peer that defines these operators")
RNG = np.random.default_rng(3)


def f(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32) * 0.5


def u8(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.integers(0, 255, shape).astype(np.uint8)


S, Z = np.float32(0.02), np.uint8(120)
B, T, H, D = 2, 6, 2, 8
HIDDEN = H * D
CASES: dict[str, tuple[str, list[Any], dict[str, Any], int]] = {
    "FusedMatMul": ("FusedMatMul", [f(3, 4, 5), f(3, 6, 5)], {"alpha": 0.7, "transB": 1}, 1),
    "FusedMatMul-transA": ("FusedMatMul", [f(3, 5, 4), f(3, 5, 6)], {"transA": 1}, 1),
    "BiasGelu": ("BiasGelu", [f(2, 3, 8), f(8)], {}, 1),
    "FastGelu": ("FastGelu", [f(2, 3, 8), f(8)], {}, 1),
    "QuickGelu": ("QuickGelu", [f(2, 8)], {"alpha": 1.702}, 1),
    "SkipLayerNormalization": (
        "SkipLayerNormalization",
        [f(2, 3, 8), f(2, 3, 8), f(8), f(8), f(8)],
        {"epsilon": 1e-5},
        1,
    ),
    "SkipSimplifiedLayerNormalization": (
        "SkipSimplifiedLayerNormalization",
        [f(2, 3, 8), f(2, 3, 8), f(8)],
        {"epsilon": 1e-5},
        1,
    ),
    "Attention": ("Attention", [f(B, T, HIDDEN), f(HIDDEN, 3 * HIDDEN), f(3 * HIDDEN)], {"num_heads": H}, 1),
    "Attention-causal": (
        "Attention",
        [f(B, T, HIDDEN), f(HIDDEN, 3 * HIDDEN), f(3 * HIDDEN)],
        {"num_heads": H, "unidirectional": 1},
        1,
    ),
    "MultiHeadAttention": (
        "MultiHeadAttention",
        [f(B, T, HIDDEN), f(B, 4, HIDDEN), f(B, 4, HIDDEN), f(3 * HIDDEN)],
        {"num_heads": H},
        1,
    ),
    "RotaryEmbedding": (
        "RotaryEmbedding",
        [f(B, H, T, D), np.tile(np.arange(T, dtype=np.int64), (B, 1)), f(16, D // 2), f(16, D // 2)],
        {},
        1,
    ),
    "RotaryEmbedding-interleaved": (
        "RotaryEmbedding",
        [f(B, H, T, D), np.tile(np.arange(T, dtype=np.int64), (B, 1)), f(16, D // 2), f(16, D // 2)],
        {"interleaved": 1},
        1,
    ),
    "GroupQueryAttention": (
        "GroupQueryAttention",
        [
            f(B, T, 4 * D),
            f(B, T, 2 * D),
            f(B, T, 2 * D),
            np.zeros((B, 2, 0, D), np.float32),
            np.zeros((B, 2, 0, D), np.float32),
            np.full(B, T - 1, np.int32),
            np.array(T, np.int32),
        ],
        {"num_heads": 4, "kv_num_heads": 2},
        3,
    ),
    "QLinearAdd": ("QLinearAdd", [u8(2, 8), S, Z, u8(2, 8), S, Z, np.float32(0.04), Z], {}, 1),
    "QLinearMul": ("QLinearMul", [u8(2, 8), S, Z, u8(2, 8), S, Z, np.float32(0.04), Z], {}, 1),
    "QLinearSigmoid": ("QLinearSigmoid", [u8(2, 8), S, Z, np.float32(1 / 256), np.uint8(0)], {}, 1),
    "QLinearGlobalAveragePool": ("QLinearGlobalAveragePool", [u8(1, 3, 4, 4), S, Z, S, Z], {"channels_last": 0}, 1),
    "QLinearConcat": ("QLinearConcat", [S, Z, u8(2, 3), np.float32(0.03), Z, u8(2, 4), S, Z], {"axis": 1}, 1),
    "QGemm": (
        "QGemm",
        [u8(3, 4), S, Z, u8(4, 5), S, Z, RNG.integers(-50, 50, 5).astype(np.int32), np.float32(0.1), Z],
        {},
        1,
    ),
    "DynamicQuantizeMatMul": ("DynamicQuantizeMatMul", [f(3, 8), u8(8, 5), np.float32(0.02), np.uint8(128)], {}, 1),
    "MatMulNBits": (
        "MatMulNBits",
        [f(3, 64), u8(5, 2, 16), f(5, 2).reshape(-1)],
        {"K": 64, "N": 5, "bits": 4, "block_size": 32},
        1,
    ),
    "MatMulNBits-zeros": (
        "MatMulNBits",
        [f(3, 64), u8(5, 2, 16), f(5, 2).reshape(-1), u8(5)],
        {"K": 64, "N": 5, "bits": 4, "block_size": 32},
        1,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_against_onnxruntime(name: str) -> None:
    op, values, attrs, num_outputs = CASES[name]
    names = [f"i{k}" for k in range(len(values))]
    dynamic = [n for n, v in zip(names, values) if np.ndim(v) > 1 and n in names[:3] and op != "MatMulNBits"] or names[
        :1
    ]
    types = {n: helper.np_dtype_to_tensor_dtype(np.asarray(v).dtype) for n, v in zip(names, values)}
    outputs = [f"o{k}" for k in range(num_outputs)]
    graph = helper.make_graph(
        [helper.make_node(op, names, outputs, domain="com.microsoft", **attrs)],
        "g",
        [helper.make_tensor_value_info(n, types[n], list(np.shape(v))) for n, v in zip(names, values) if n in dynamic],
        [onnx.ValueInfoProto(name=o) for o in outputs],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in zip(names, values) if n not in dynamic],
    )
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    )
    proto.ir_version = 9
    inputs = {n: np.asarray(v) for n, v in zip(names, values) if n in dynamic}
    options = ort.SessionOptions()
    options.log_severity_level = 4
    want = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
        None, inputs
    )
    for level in (0, 1):
        got = list(vt.build(proto, opt_level=level).run(inputs).values())
        for g, w in zip(got, want):
            assert g.dtype == w.dtype
            if w.dtype.kind in "iu":
                assert np.abs(g.astype(int) - w.astype(int)).max() <= 1
            else:
                np.testing.assert_allclose(g, w, rtol=2e-3, atol=2e-3 if "NBits" in name else 2e-5)
