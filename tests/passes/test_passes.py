"""Every pass: where it fires, and where it must not. Meaning is checked in both."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import venturi as vt
from tests.passes.harness import Build, check, gemm_bias_gelu, image, net_of, ops, optimize, rand
from venturi.frontends.onnx_import import import_onnx
from venturi.passes.pipeline import PIPELINE, run_pipeline
from venturi.passes.rewriting import PassContext

I64 = np.int64


def case(name: str, build: Build, expect: dict[str, int], **kw: Any) -> Any:
    """`expect`: operator → how often it is left."""
    return pytest.param(build, expect, kw, id=name)


def bn_args(c: int) -> list[Any]:
    return [rand(c, seed=1) + 2, rand(c, seed=2), rand(c, seed=3), rand(c, seed=4, low=0.5, high=2)]


# --- constants, identities, shapes ---------------------------------------------------------------------------------


def fold(net: vt.Network) -> None:
    x = net.input("x", (2, 3))
    net.output("y", x + net.exp(net.constant(rand(3))))


def fold_not_inputs(net: vt.Network) -> None:
    net.output("y", net.exp(net.input("x", (2, 3))))


def fold_shape(net: vt.Network) -> None:
    x = net.input("x", (2, 3, 4))
    net.output("y", net.reshape(x, net.concat(net.shape(x)[0:1], np.array([-1], I64), axis=0)))


def fold_random(net: vt.Network) -> None:
    net.output("y", net.input("x", (4,)) + net.op("RandomNormal", shape=[4], seed=1.0))


def fold_too_large(net: vt.Network) -> None:
    """A constant that would blow a few bytes up to 400 KB stays an operator."""
    net.output("y", net.input("x", (1,)) + net.expand(net.constant(rand(1)), np.array([100000], I64)))


def add_zero(net: vt.Network) -> None:
    x = net.input("x", (2, 3))
    net.output("y", net.relu((x + 0.0 * 1) * 1.0))


def add_zero_broadcasts(net: vt.Network) -> None:
    """Adding zeros of a larger shape is how models expand: it must stay."""
    net.output("y", net.relu(net.input("x", (1, 3)) + np.zeros((4, 3), np.float32)))


def identity_chain(net: vt.Network) -> None:
    net.output("y", net.relu(net.identity(net.identity(net.input("x", (2,))))))


def identity_of_input_to_output(net: vt.Network) -> None:
    net.output("y", net.input("x", (2,)))


def transposes_cancel(net: vt.Network) -> None:
    x = net.input("x", (2, 3, 4))
    net.output("y", net.relu(net.transpose(net.transpose(x, perm=[2, 0, 1]), perm=[1, 2, 0])))


def transposes_merge(net: vt.Network) -> None:
    x = net.input("x", (2, 3, 4))
    net.output("y", net.relu(net.transpose(net.transpose(x, perm=[2, 0, 1]), perm=[2, 1, 0])))


def transposes_used_between(net: vt.Network) -> None:
    t = net.transpose(net.input("x", (2, 3, 4)), perm=[2, 0, 1])
    net.output("t", t)
    net.output("y", net.relu(net.transpose(t, perm=[1, 2, 0])))


def casts_narrow_between(net: vt.Network) -> None:
    """fp32 → int32 → fp32 rounds: it is not nothing."""
    net.output("y", net.relu(net.cast(net.cast(net.input("x", (3,)), to=6), to=1)))


def casts_widen_between(net: vt.Network) -> None:
    net.output("y", net.relu(net.cast(net.cast(net.input("x", (3,)), to=11), to=1)))


def reshapes_merge(net: vt.Network) -> None:
    x = net.input("x", (2, 3, 4))
    net.output("y", net.relu(net.reshape(net.reshape(x, np.array([6, 4], I64)), np.array([4, 6], I64))))


def duplicates(net: vt.Network) -> None:
    x = net.input("x", (2, 3))
    net.output("y", net.exp(x) + net.relu(net.exp(x)))


def duplicates_differ(net: vt.Network) -> None:
    x = net.input("x", (2, 3))
    net.output("y", net.leaky_relu(x, alpha=0.1) + net.leaky_relu(x, alpha=0.2))


def dead(net: vt.Network) -> None:
    x = net.input("x", (2, 3))
    net.exp(x)
    net.output("y", net.relu(x))


BASICS = [
    case("fold", fold, {"Exp": 0, "Add": 1}),
    case("fold-not-inputs", fold_not_inputs, {"Exp": 1}),
    case("fold-shape", fold_shape, {"Shape": 0, "Concat": 0, "Reshape": 1}),
    case("fold-random", fold_random, {"RandomNormal": 1}, meaning=False),
    case("fold-too-large", fold_too_large, {"Expand": 1}),
    case("add-zero", add_zero, {"Mul": 0}),
    case("add-zero-broadcasts", add_zero_broadcasts, {"Add": 1}),
    case("identity-chain", identity_chain, {"Identity": 0, "Relu": 1}),
    case("identity-io", identity_of_input_to_output, {"Identity": 1}),
    case("transposes-cancel", transposes_cancel, {"Transpose": 0}),
    case("transposes-merge", transposes_merge, {"Transpose": 1}),
    case("transposes-used", transposes_used_between, {"Transpose": 1}),
    case("casts-narrow", casts_narrow_between, {"Cast": 2}),
    case("casts-widen", casts_widen_between, {"Cast": 0}),
    case("reshapes", reshapes_merge, {"Reshape": 1}),
    case("duplicates", duplicates, {"Exp": 1}),
    case("duplicates-differ", duplicates_differ, {"LeakyRelu": 2}),
    case("dead", dead, {"Exp": 0}),
]

# --- batch norm, scale, pads ----------------------------------------------------------------------------------------


def conv_bn(net: vt.Network) -> None:
    y = net.conv(image(net), rand(6, 4, 3, 3), rand(6, seed=9), pads=[1] * 4)
    net.output("y", net.batch_normalization(y, *bn_args(6)))


def grouped_conv_bn(net: vt.Network) -> None:
    net.output("y", net.batch_normalization(net.conv(image(net), rand(8, 2, 3, 3), group=2), *bn_args(8)))


def conv_transpose_bn(net: vt.Network) -> None:
    y = net.conv_transpose(image(net), rand(4, 3, 2, 2), strides=[2, 2], group=2)
    net.output("y", net.batch_normalization(y, *bn_args(6)))


def conv_bn_used_twice(net: vt.Network) -> None:
    y = net.conv(image(net), rand(4, 4, 1, 1))
    net.output("y", net.batch_normalization(y, *bn_args(4)) + y)


def conv_bn_output(net: vt.Network) -> None:
    y = net.conv(image(net), rand(4, 4, 1, 1))
    net.output("c", y)
    net.output("y", net.batch_normalization(y, *bn_args(4)))


def conv_bn_weight_input(net: vt.Network) -> None:
    w = net.input("w", (4, 4, 1, 1))
    net.output("y", net.batch_normalization(net.conv(image(net), w), *bn_args(4)))


def bn_conv(net: vt.Network) -> None:
    net.output("y", net.conv(net.batch_normalization(image(net), *bn_args(4)), rand(6, 4, 3, 3), rand(6)))


def bn_conv_padded(net: vt.Network) -> None:
    """Padding adds zeros after the norm: folding its shift would be wrong at the border."""
    net.output("y", net.conv(net.batch_normalization(image(net), *bn_args(4)), rand(6, 4, 3, 3), pads=[1] * 4))


def gemm_bn(net: vt.Network) -> None:
    y = net.gemm(net.input("x", ("n", 5)), rand(6, 5), rand(6, seed=3), transB=1)
    net.output("y", net.batch_normalization(y, *bn_args(6)))


def bn_training(net: vt.Network) -> None:
    y = net.conv(image(net), rand(4, 4, 1, 1))
    out = net.op("BatchNormalization", y, *bn_args(4), training_mode=1, num_outputs=3)
    net.output("y", out[0])


def conv_scale_shift(net: vt.Network) -> None:
    y = net.conv(image(net), rand(6, 4, 3, 3))
    net.output("y", y * rand(1, 6, 1, 1) + rand(6, 1, 1, seed=2))


def conv_scale_spatial(net: vt.Network) -> None:
    net.output("y", net.conv(image(net), rand(6, 4, 3, 3)) * rand(1, 1, 6, 6))


def pad_conv(net: vt.Network) -> None:
    x = net.pad(image(net), np.array([0, 0, 1, 2, 0, 0, 2, 1], I64))
    net.output("y", net.conv(x, rand(6, 4, 3, 3)))


def pad_conv_value(net: vt.Network) -> None:
    x = net.pad(image(net), np.array([0, 0, 1, 1, 0, 0, 1, 1], I64), np.float32(1))
    net.output("y", net.conv(x, rand(6, 4, 3, 3)))


def pad_conv_channels(net: vt.Network) -> None:
    x = net.pad(image(net), np.array([0, 1, 0, 0, 0, 1, 0, 0], I64))
    net.output("y", net.conv(x, rand(6, 6, 3, 3)))


def pad_reflect(net: vt.Network) -> None:
    x = net.pad(image(net), np.array([0, 0, 1, 1, 0, 0, 1, 1], I64), mode="reflect")
    net.output("y", net.conv(x, rand(6, 4, 3, 3)))


def pad_average(net: vt.Network) -> None:
    x = net.pad(image(net), np.array([0, 0, 1, 1, 0, 0, 1, 1], I64))
    net.output("y", net.average_pool(x, kernel_shape=[3, 3]))


def pad_max(net: vt.Network) -> None:
    """Zero padding before max pooling is not the pooling's own padding."""
    x = net.pad(image(net), np.array([0, 0, 1, 1, 0, 0, 1, 1], I64))
    net.output("y", net.max_pool(x, kernel_shape=[3, 3]))


FOLDING = [
    case("conv-bn", conv_bn, {"BatchNormalization": 0, "Conv": 1, "Mul": 0, "Add": 0}),
    case("grouped-conv-bn", grouped_conv_bn, {"BatchNormalization": 0, "Mul": 0}),
    case("conv-transpose-bn", conv_transpose_bn, {"BatchNormalization": 0, "Mul": 0}),
    case("conv-bn-used-twice", conv_bn_used_twice, {"BatchNormalization": 0, "Mul": 1}),
    case("conv-bn-output", conv_bn_output, {"BatchNormalization": 0, "Mul": 1}),
    case("conv-bn-weight-input", conv_bn_weight_input, {"BatchNormalization": 0, "Mul": 1}),
    case("bn-conv", bn_conv, {"BatchNormalization": 0, "Mul": 0}),
    case("bn-conv-padded", bn_conv_padded, {"BatchNormalization": 0, "Mul": 1}),
    case("gemm-bn", gemm_bn, {"BatchNormalization": 0, "Mul": 0, "Gemm": 1}),
    case("bn-training", bn_training, {"BatchNormalization": 1}),
    case("conv-scale-shift", conv_scale_shift, {"Mul": 0, "Add": 0}),
    case("conv-scale-spatial", conv_scale_spatial, {"Mul": 1}),
    case("pad-conv", pad_conv, {"Pad": 0}),
    case("pad-conv-value", pad_conv_value, {"Pad": 1}),
    case("pad-conv-channels", pad_conv_channels, {"Pad": 1}),
    case("pad-reflect", pad_reflect, {"Pad": 1}),
    case("pad-average", pad_average, {"Pad": 0}),
    case("pad-max", pad_max, {"Pad": 1}),
]

# --- activations, norms ----------------------------------------------------------------------------------------------


def gelu_erf(order: int) -> Build:
    def build(net: vt.Network) -> None:
        x = net.input("x", ("n", 6))
        gate = net.erf(x / math.sqrt(2)) + 1.0
        y = {0: x * 0.5 * gate, 1: x * (gate * 0.5), 2: (x * gate) * 0.5}[order]
        net.output("y", y)

    return build


def gelu_tanh(net: vt.Network) -> None:
    x = net.input("x", ("n", 6))
    inner = (x + net.pow(x, 3.0) * 0.044715) * math.sqrt(2 / math.pi)
    net.output("y", x * 0.5 * (net.tanh(inner) + 1.0))


def gelu_wrong_number(net: vt.Network) -> None:
    x = net.input("x", ("n", 6))
    net.output("y", x * 0.5 * (net.erf(x / 1.5) + 1.0))


def gelu_gate_used(net: vt.Network) -> None:
    x = net.input("x", ("n", 6))
    gate = net.erf(x / math.sqrt(2)) + 1.0
    net.output("gate", gate)
    net.output("y", x * 0.5 * gate)


def silu(net: vt.Network) -> None:
    x = net.input("x", ("n", 6))
    net.output("y", x * net.sigmoid(x))


def silu_other(net: vt.Network) -> None:
    x = net.input("x", ("n", 6))
    net.output("y", x * net.sigmoid(net.exp(x)))


def quick_gelu(net: vt.Network) -> None:
    x = net.input("x", ("n", 6))
    net.output("y", x * net.sigmoid(x * 1.702))


def hard_swish(net: vt.Network) -> None:
    x = net.input("x", ("n", 6))
    net.output("y", x * net.clip(x + 3.0, np.float32(0), np.float32(6)) / 6.0)


def hard_swish_wrong(net: vt.Network) -> None:
    x = net.input("x", ("n", 6))
    net.output("y", x * net.clip(x + 3.0, np.float32(0), np.float32(5)) / 6.0)


def mish(net: vt.Network) -> None:
    x = net.input("x", ("n", 6))
    net.output("y", x * net.tanh(net.softplus(x)))


def mean_of(net: vt.Network, x: Any, axis: int = -1) -> Any:
    return net.reduce_mean(x, np.array([axis], I64))


def layer_norm(variant: str) -> Build:
    def build(net: vt.Network) -> None:
        x = net.input("x", ("n", 5, 6))
        axis = 1 if variant == "axis" else -1
        d = x - mean_of(net, x, axis)
        var = mean_of(net, d * d if variant == "mul" else net.pow(d, 2.0), axis)
        root = net.sqrt(var + 1e-5)
        if variant == "used":
            net.output("root", root)
        y = d * net.reciprocal(root) if variant == "reciprocal" else d / root
        if variant == "axis":
            net.output("y", y * rand(6) + rand(6, seed=1))
        else:
            net.output("y", y * rand(6) + rand(6, seed=1) if variant != "bare" else y)

    return build


def rms_norm(variant: str) -> Build:
    def build(net: vt.Network) -> None:
        x = net.input("x", ("n", 5, 6))
        square = net.pow(x, 2.0) if variant != "other" else net.pow(net.exp(x), 2.0)
        root = net.sqrt(mean_of(net, square) + 1e-6)
        y = x * net.reciprocal(root) if variant == "reciprocal" else x / root
        net.output("y", y * rand(6))

    return build


def group_norm(variant: str) -> Build:
    def build(net: vt.Network) -> None:
        x = net.input("x", (2, 6, 4, 4))
        y = net.reshape(x, np.array([2, 3, -1], I64))
        scale = np.ones(3, np.float32) * (2 if variant == "scaled" else 1)
        y = net.instance_normalization(y, scale, np.zeros(3, np.float32))
        y = net.reshape(y, np.array([2, 6, 4, 4], I64))
        net.output("y", y * rand(6, 1, 1) + rand(6, 1, 1, seed=1))

    return build


RECOGNITION = [
    *[case(f"gelu-erf-{i}", gelu_erf(i), {"Gelu": 1, "Erf": 0}) for i in range(3)],
    case("gelu-tanh", gelu_tanh, {"Gelu": 1, "Tanh": 0}),
    case("gelu-wrong-number", gelu_wrong_number, {"Gelu": 0, "Erf": 1}),
    case("gelu-gate-used", gelu_gate_used, {"Gelu": 0, "Erf": 1}),
    case("silu", silu, {"Swish": 1, "Sigmoid": 0}),
    case("silu-other", silu_other, {"Swish": 0, "Sigmoid": 1}),
    case("quick-gelu", quick_gelu, {"Swish": 1, "Sigmoid": 0}),
    case("hard-swish", hard_swish, {"HardSwish": 1, "Clip": 0}),
    case("hard-swish-wrong", hard_swish_wrong, {"HardSwish": 0, "Clip": 1}),
    case("mish", mish, {"Mish": 1, "Softplus": 0}),
    *[
        case(f"layer-norm-{v}", layer_norm(v), {"LayerNormalization": 1, "ReduceMean": 0})
        for v in ("pow", "mul", "reciprocal", "bare")
    ],
    case("layer-norm-axis", layer_norm("axis"), {"LayerNormalization": 0, "ReduceMean": 2}),
    case("layer-norm-used", layer_norm("used"), {"LayerNormalization": 0, "ReduceMean": 2}),
    case("rms-norm", rms_norm("div"), {"RMSNormalization": 1, "ReduceMean": 0}),
    case("rms-norm-reciprocal", rms_norm("reciprocal"), {"RMSNormalization": 1, "ReduceMean": 0}),
    case("rms-norm-other", rms_norm("other"), {"RMSNormalization": 0, "ReduceMean": 1}),
    case("group-norm", group_norm("plain"), {"GroupNormalization": 1, "InstanceNormalization": 0}),
    case("group-norm-scaled", group_norm("scaled"), {"GroupNormalization": 0, "InstanceNormalization": 1}),
]

# --- types taken from another value -----------------------------------------------------------------------------------


def cast_like(variant: str) -> Build:
    def build(net: vt.Network) -> None:
        x = net.input("x", ("n", 3, 6, 6))
        if variant == "bias":
            bias = net.expand(net.cast_like(np.float64(0.5), x), np.array([4], I64))
            net.output("y", net.conv(x, rand(4, 3, 3, 3), bias))
        else:
            other = net.input("i", ("n", 3, 6, 6), "int32" if variant == "integer" else "float32")
            net.output("y", net.cast_like(other, x) * x)

    return build


CASTS = [
    case("cast-like-bias", cast_like("bias"), {"CastLike": 0, "Cast": 0, "Expand": 0, "Conv": 1}),
    case("cast-like-integer", cast_like("integer"), {"CastLike": 0, "Cast": 1}),
    case("cast-like-same", cast_like("same"), {"CastLike": 0, "Cast": 0}),
]

# --- attention, horizontal fusion --------------------------------------------------------------------------------------


def attention(variant: str) -> Build:
    def build(net: vt.Network) -> None:
        heads = 4
        q = net.input("q", ("b", heads, "s", 8))
        kv = 2 if variant == "gqa" else heads
        k, v = net.input("k", ("b", kv, "t", 8)), net.input("v", ("b", kv, "t", 8))
        if variant == "gqa":
            k, v = (_repeat(net, t, heads // kv) for t in (k, v))
        if variant == "flat":
            raise AssertionError
        kt = net.transpose(k, perm=[0, 1, 3, 2])
        scores = (q * 0.5) @ (kt * 0.5) if variant == "split-scale" else (q @ kt) / math.sqrt(8)
        if variant == "mask":
            scores = scores + net.input("m", ("b", 1, "s", "t"))
        if variant == "used":
            net.output("scores", scores)
        p = net.softmax(scores, axis=2 if variant == "axis" else -1)
        if variant == "guard":
            p = net.where(net.is_nan(p), np.float32(0), p)
        if variant == "probabilities":
            net.output("p", p)
        net.output("y", p @ v)

    return build


def _repeat(net: vt.Network, x: Any, groups: int) -> Any:
    """[b, g, t, d] → [b, g * groups, t, d], as transformers does it; sizes are fixed here."""
    wide = net.expand(net.unsqueeze(x, np.array([2], I64)), np.array([1, 1, groups, 1, 1], I64))
    return net.reshape(wide, np.array([0, 4, -1, 8], I64))


def attention_3d(net: vt.Network) -> None:
    q, k, v = (net.input(n, (6, 5, 8)) for n in "qkv")
    scores = q @ net.transpose(k, perm=[0, 2, 1]) * 0.3
    net.output("y", net.softmax(scores, axis=-1) @ v)


def qkv(variant: str) -> Build:
    def build(net: vt.Network) -> None:
        x = net.input("x", ("n", 3, 8))
        outs = []
        for i in range(3):
            y = x @ rand(8, 4 + i, seed=i)
            if variant == "bias" or (variant == "mixed" and i == 0):
                y = y + rand(4 + i, seed=10 + i)
            outs.append(y)
        if variant == "output":
            net.output("first", outs[0])
        for i, y in enumerate(outs):
            net.output(f"y{i}", net.relu(y))

    return build


TRANSFORMER = [
    *[
        case(f"attention-{v}", attention(v), {"Attention": 1, "Softmax": 0})
        for v in ("plain", "split-scale", "mask", "guard")
    ],
    case("attention-gqa", attention("gqa"), {"Attention": 1, "Softmax": 0}),
    *[case(f"attention-{v}", attention(v), {"Attention": 0, "Softmax": 1}) for v in ("used", "axis", "probabilities")],
    case("attention-3d", attention_3d, {"Attention": 1, "Softmax": 0}),
    case("qkv", qkv("plain"), {"MatMul": 1, "Split": 1}),
    case("qkv-bias", qkv("bias"), {"MatMul": 1, "Split": 1, "Add": 1}),
    case("qkv-mixed", qkv("mixed"), {"Split": 0, "MatMul": 3}),
    case("qkv-output", qkv("output"), {"MatMul": 2, "Split": 1}),
]


@pytest.mark.parametrize("build, expect, options", [*BASICS, *FOLDING, *RECOGNITION, *CASTS, *TRANSFORMER])
def test_rewrites(build: Build, expect: dict[str, int], options: dict[str, Any]) -> None:
    net = net_of(build)
    model = optimize(net)
    found = ops(model)
    assert {k: found[k] for k in expect} == expect
    if options.get("meaning", True):
        check(net, model, rtol=2e-5)


# --- precision, fuel, names ------------------------------------------------------------------------------------------


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
    elsewhere = {"assign-layout", "drop-neutral-masks", "sink-reshapes"}
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
