"""Batch norm, scale and shift, pads folded into convolutions: where they fire, and where they must not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import venturi as vt
from tests.passes.harness import Build, bn_args, case, check_rewrites, image, rand

I64 = np.int64


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


@pytest.mark.parametrize("build, expect, options", FOLDING)
def test_rewrites(build: Build, expect: dict[str, int], options: dict[str, Any]) -> None:
    check_rewrites(build, expect, options)
