"""Two 1x1 convolutions in one Region, as the engine joins them."""

from __future__ import annotations

import numpy as np

import venturi as vt
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
