"""Attention reads its three operands where one product left them; where they have other readers it does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import venturi as vt
from tests.passes.harness import check, regions
from venturi.backends.base import RegionView
from venturi.backends.cpu.tactics.reference import Reference
from venturi.backends.reference.interpreter import Interpreter
from venturi.backends.sdpa import SdpaAttention
from venturi.engine.builder import stored_weights
from venturi.frontends.onnx_import import import_onnx
from venturi.passes.pipeline import run_pipeline
from venturi.passes.rewriting import PassContext

PACKED = "attention:Split+Attention"


def network(case: str) -> vt.Network:
    net = vt.Network("packed")
    x = net.input("x", ("n" if case == "free" else 2, 6, 96))
    q, k, v = net.op("Split", x, np.array([32, 32, 32]), num_outputs=3, axis=-1)
    if case == "order":
        q, k = k, q
    mask = [net.input("mask", (6, 6))] if case == "mask" else []
    y = net.attention(q, k, v, *mask, q_num_heads=4, kv_num_heads=4, is_causal=int(case == "causal"))
    net.output("y", y + v if case == "shared" else y)
    return net


@pytest.mark.parametrize(
    "case, packed",
    [("plain", True), ("mask", True), ("causal", True), ("shared", False), ("order", False), ("free", False)],
)
@pytest.mark.parametrize("device_packs", [True, False])
def test_which_attention_takes_its_split_along(case: str, packed: bool, device_packs: bool) -> None:
    net = network(case)
    model = import_onnx(net.to_model())
    run_pipeline(model, PassContext(packed_attention=device_packs))
    assert (PACKED in regions(model)) is (packed and device_packs)
    check(net, model)


@pytest.mark.parametrize("case", ["plain", "mask", "causal"])
@pytest.mark.parametrize("level", [0, 3])
def test_engines_with_packed_attention(case: str, level: int) -> None:
    net = network(case)
    engine, plain = vt.build(net, opt_level=level), import_onnx(net.to_model())
    rng = np.random.default_rng(0)
    feed: dict[str, Any] = {s.name: rng.standard_normal(s.shape).astype(np.float32) for s in engine.inputs}  # type: ignore[arg-type]
    want = Interpreter(plain.graph).run(feed)["y"]
    np.testing.assert_allclose(engine.run(feed)["y"], want, rtol=1e-5, atol=1e-6)
    assert ("Split", "Attention") in [s.ops for s in engine.plan.steps]


@pytest.mark.parametrize("case", ["plain", "mask", "causal"])
def test_torch_attention_takes_the_split_too(case: str) -> None:
    """Where no code is generated."""
    model = import_onnx(network(case).to_model())
    run_pipeline(model, PassContext(packed_attention=True))
    (node,) = [n for n in model.graph if n.op_type == "Region"]
    region = RegionView(node, stored_weights(model.graph))
    args = [torch.randn([int(d) for d in v.shape or ()]) for v in region.dynamic]  # type: ignore[arg-type]
    assert SdpaAttention(Reference()).match(region) == [{}]
    got = SdpaAttention(Reference()).bind(region, {}).run(*args)
    want = Reference().bind(region, {}).run(*args)
    torch.testing.assert_close(got, want[0] if isinstance(want, tuple) else want, rtol=1e-5, atol=1e-6)
