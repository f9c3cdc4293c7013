"""Small models for engine tests, built through the Network API."""

from __future__ import annotations

from typing import Any

import numpy as np

import venturi as vt


def weights(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return (np.random.default_rng(seed).standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def mlp(batch: Any = "n") -> vt.Network:
    """x [n, 8] → gelu(x W + b) V [n, 4]."""
    net = vt.Network("mlp")
    x = net.input("x", (batch, 8))
    h = net.gelu(x @ net.constant(weights(8, 16), "W") + net.constant(weights(16, seed=1), "b"))
    net.output("y", h @ net.constant(weights(16, 4, seed=2), "V"))
    return net


def conv_net(batch: Any = "n") -> vt.Network:
    """A residual block with batch norm."""
    net = vt.Network("conv")
    x = net.input("x", (batch, 8, 10, 10))
    y = x
    for i in range(2):
        y = net.conv(y, weights(8, 8, 3, 3, seed=i), pads=[1, 1, 1, 1])
        scale, bias, mean = weights(8, seed=10 + i) + 1, weights(8, seed=20 + i), weights(8, seed=30 + i)
        y = net.batch_normalization(y, scale, bias, mean, np.abs(weights(8, seed=40 + i)) + 0.5)
        y = net.relu(y) if i == 0 else y
    net.output("y", net.relu(y + x))
    return net


def nonzero() -> vt.Network:
    """A data-dependent output shape, then more work on it."""
    net = vt.Network("nonzero")
    x = net.input("x", ("n",))
    index = net.op("NonZero", x)
    net.output("index", index)
    net.output("twice", net.op("Gather", x * 2.0, net.squeeze(index, np.array([0], dtype=np.int64))))
    return net


def x_of(*shape: int, seed: int = 7) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
