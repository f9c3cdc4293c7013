"""Q/DQ models of e4m3 on an NVIDIA GPU: their contractions run on tensor cores of e4m3, and agree with the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

import venturi as vt
from tests.backends.cuda.fp8_models import convolution, product

pytestmark = pytest.mark.gpu

CASES = {
    "conv": lambda: convolution(), "residual": lambda: convolution(True, outputs=64), "image": lambda: convolution(channels=3),
    "real": lambda: convolution(end=False, kernel=1, outputs=256), "folds": lambda: convolution(folds=True),
    "product": lambda: product(rows=300, n=512, k=1024), "real product": lambda: product(False, 300, None, 512, 1024),
    "vector": lambda: product(rows=1, n=512, k=1024), "odd": lambda: product(rows=33, n=37, k=50),
}  # fmt: skip


def model(made):
    m, shape, output = made
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    out = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    graph = helper.make_graph(m.nodes, "g", [given], [out], m.weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), shape


@pytest.mark.parametrize("case", CASES)
def test_contractions_of_e4m3(case):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("tensor cores of this GPU do not multiply e4m3")
    made, shape = model(CASES[case]())
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    engine = vt.build(made, device="cuda")
    want = vt.build(made, device="cpu", opt_level=0)(x)
    got = engine(x)
    assert np.abs(got - want).max() <= 0.13 * np.abs(want).max()
    assert np.linalg.norm(got - want) <= 0.01 * np.linalg.norm(want)
    (step,) = [s for s in engine.plan.steps if {"Conv", "MatMul"} & set(s.ops)]
    ours = [m for m in step.measurements if m.tactic.startswith("triton")]
    assert step.tactic.startswith("triton"), step.measurements
    assert not [m for m in ours if m.reason.startswith(("max error", "NaN"))]
