"""The pipeline as a whole: precision, fuel, names, and that every pass is exercised by its tests."""

from __future__ import annotations

import numpy as np

import venturi as vt
from tests.passes.harness import check, gemm_bias_gelu, image, net_of, ops, optimize, rand
from tests.passes.test_clean_passes import BASICS, CASTS
from tests.passes.test_folding import FOLDING, conv_bn
from tests.passes.test_recognition import RECOGNITION
from tests.passes.test_transformer_passes import TRANSFORMER, attention
from venturi.frontends.onnx_import import import_onnx
from venturi.ir.marks import rounds_to_tf32
from venturi.ir.region import members
from venturi.passes.pipeline import PIPELINE, run_pipeline
from venturi.passes.rewriting import PassContext

I64 = np.int64


def test_reduced_precision_keeps_sums_wide() -> None:
    net = vt.Network("wide")
    x = net.input("x", ("n", 8))
    y = net.exp(x @ rand(8, 8))
    net.output("y", net.reduce_sum(y, np.array([1], I64)) + net.cum_sum(y, np.int64(1))[:, 0:1])
    model = optimize(net, "bf16")
    types = {
        m.op_type: m.outputs[0].dtype.name
        for n in model.graph
        for m in ([n] if n.op_type != "Region" else list(n.attributes["body"].as_graph()))
    }
    assert types["MatMul"] == "BFLOAT16"
    assert types["Exp"] == types["ReduceSum"] == types["CumSum"] == "FLOAT"


def test_tf32_marks_products_of_fp32_and_casts_nothing() -> None:
    net = vt.Network()
    x, half = net.input("x", (4, 8)), net.input("half", (4, 8), "float16")
    parts = [x @ rand(8, 8, seed=i) for i in (1, 2)]
    net.output("y", net.relu(parts[0]) + parts[1])
    net.output("h", half @ rand(8, 8).astype(np.float16))
    model = optimize(net, "tf32")
    assert ops(model) == ops(optimize(net))
    products = [m for n in model.graph for m in members(n) if m.op_type == "MatMul"]
    assert sorted((rounds_to_tf32(m), m.inputs[0].dtype.name) for m in products) == [
        (False, "FLOAT16"),
        (True, "FLOAT"),
    ]
    assert not any(rounds_to_tf32(m) for n in optimize(net).graph for m in members(n))


def test_precision_model_inserts_nothing() -> None:
    net = net_of(gemm_bias_gelu)
    assert ops(optimize(net))["Cast"] == 0
    assert ops(optimize(net, "fp32"))["Cast"] == 0
    assert ops(optimize(net, "bf16"))["Cast"] == 2


def test_fuel_stops_after_so_many_rewrites() -> None:
    source = import_onnx(net_of(conv_bn).to_model())
    for fuel in range(4):
        ctx, model = PassContext(fuel=fuel), source.clone()
        run_pipeline(model, ctx)
        assert sum(ctx.rewrites.values()) <= fuel
        check(net_of(conv_bn), model)


def test_every_pass_is_exercised_by_these_cases() -> None:
    seen: dict[str, int] = {}
    for item in [*BASICS, *FOLDING, *RECOGNITION, *CASTS, *TRANSFORMER]:
        ctx = PassContext(precision="bf16")
        run_pipeline(import_onnx(net_of(item.values[0]).to_model()), ctx)
        for name, count in ctx.rewrites.items():
            seen[name.rstrip("-23")] = count
    missing = (
        {p.name.rstrip("-23") for p in PIPELINE} - set(seen) - {"stable-names", "inline-branches", "simplify-casts"}
    )
    elsewhere = {"assign-layout", "drop-neutral-masks", "flatten-heads", "sink-reshapes", "sink-dequantize"}
    elsewhere |= {
        "fuse-quantized",
        "sign-bytes",
        "hoist-quantize",
        "integers-as-numbers",
        "fuse-dynamic",
        "pack-attention",
        "linear-on-rows",
        "rows-as-images",
    }
    assert missing <= elsewhere, "which have tests of their own"


def test_layout_marks_convolution_nets_only() -> None:
    net = vt.Network("layout")
    x = image(net)
    y = net.max_pool(net.relu(net.conv(x, rand(4, 4, 3, 3))), kernel_shape=[2, 2])
    y = net.conv(y, rand(4, 4, 1, 1))
    net.output("y", net.reshape(y, np.array([0, -1], I64)) @ rand(100, 3))
    marked = {m.op_type: n.metadata_props.get("venturi.layout") for n in optimize(net).graph for m in [n]}
    assert marked["Region"] == marked["MaxPool"] == marked["Conv"] == "NHWC"
    assert marked["MatMul"] is None
    assert not any("venturi.layout" in n.metadata_props for n in optimize(net_of(attention("plain"))).graph)
