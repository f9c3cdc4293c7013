"""Two 1x1 convolutions in one Region, as the engine joins them."""

from __future__ import annotations

import numpy as np

import venturi as vt
from tests.backends.cpu.test_native_quantized import Model
from tests.backends.cuda.quantized_models import optimized, quantized_regions
from tests.backends.cuda.test_early import weight
from tests.passes.harness import optimize
from venturi.backends.base import RegionView
from venturi.engine.builder import stored_weights
from venturi.ir.region import dissolve, form_region, is_region


def pair_region(size, depth, wide, narrow, *, residual=True, both=True, skip=False, kernel=1):
    """`both`: the wide tensor has other readers; `skip`: the second convolution has a residual too."""
    net = vt.Network()
    x = net.input("x", (size[0], depth, *size[1:]))
    y = net.conv(x, weight(wide, depth, 1, 1) * np.float32(depth**-0.5), weight(wide))
    if residual:
        y = y + net.input("r", (size[0], wide, *size[1:]))
    y = net.relu(y)
    if both:
        net.output("wide", y)
    w = weight(narrow, wide, kernel, kernel) * np.float32(wide**-0.5)
    z = net.conv(y, w, weight(narrow), pads=[kernel // 2] * 4)
    if skip:
        z = z + net.input("s", (size[0], narrow, *size[1:]))
    net.output("narrow", net.relu(z))
    model = optimize(net, "fp16")
    first, second = [n for n in model.graph if is_region(n)][-2:]
    pair = form_region("pair", [*dissolve(first), *dissolve(second)])
    return RegionView(pair, stored_weights(model.graph))


def quantized_pair(shape, wide, narrow, *, residual):
    """Of bytes, the wide tensor with another reader."""
    m = Model("s8")
    x = m.quantized("x", 0.02, 3)
    y = m.add("Conv", [x, m.weight((wide, shape[1], 1, 1), 0)], kernel_shape=[1, 1])
    if residual:
        skip = m.quantized(m.add("Conv", [x, m.weight((wide, shape[1], 1, 1), 0)], kernel_shape=[1, 1]), 0.0473, 0)
        y = m.add("Add", [y, skip])
    y = m.quantized(m.add("Relu", [y]), 0.0581, -5)
    z = m.add("Conv", [y, m.weight((narrow, wide, 1, 1), 0)], kernel_shape=[1, 1])
    z = m.quantized(m.add("Relu", [z]), 0.19, 0)
    model = optimized(m, shape, m.add("Concat", [z, y], axis=1))
    second = quantized_regions(model)[-1].node
    between = next(v for v in second.inputs if v.producer() is not None and is_region(v.producer()))
    pair = form_region("pair", [*dissolve(between.producer()), *dissolve(second)])
    return RegionView(pair, stored_weights(model.graph))


def branches_region(size, here, there, out, *, stride=1, bias=True, activation=True):
    """A 1x1 convolution of `here` channels, to which one of `there` channels is added."""
    net = vt.Network()
    images, height, width = size
    x = net.input("x", (images, here, height, width))
    z = net.input("z", (images, there, height * stride, width * stride))
    shortcut = net.conv(z, weight(out, there, 1, 1) * np.float32(there**-0.5), weight(out) if bias else None,
                        strides=[stride] * 2)  # fmt: skip
    y = net.conv(x, weight(out, here, 1, 1) * np.float32(here**-0.5), weight(out) * 0.5) + shortcut
    net.output("y", net.relu(y) if activation else y)
    model = optimize(net, "fp16")
    (last,) = [n for n in model.graph if is_region(n)]
    first = next(v.producer() for v in last.inputs if v.producer() is not None and v.producer().op_type == "Conv")
    pair = form_region("pair", [first, *dissolve(last)])
    return RegionView(pair, stored_weights(model.graph))
