"""ResNet-50, defined once over any set of operators: a vt.Network builds it, torch runs it eagerly.

Architecture: He et al., "Deep Residual Learning for Image Recognition" (2015), table 1, with the stride in the 3x3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))


class Ops(Protocol):
    """What the definition needs; weights are numpy arrays."""

    def conv(self, x: Any, w: Any, *, strides: list[int], pads: list[int]) -> Any: ...
    def batch_norm(self, x: Any, scale: Any, bias: Any, mean: Any, var: Any) -> Any: ...
    def relu(self, x: Any) -> Any: ...
    def max_pool(self, x: Any) -> Any: ...
    def classify(self, x: Any, w: Any, b: Any) -> Any: ...


class Weights:
    """Random weights of a seed, the same for every caller that asks in the same order."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)

    def normal(self, *shape: int) -> np.ndarray:
        fan_in = int(np.prod(shape[1:]))
        weights: np.ndarray = (self._rng.standard_normal(shape) * np.sqrt(2.0 / fan_in)).astype(np.float32)
        return weights

    def norm(self, channels: int, gain: float = 1.0) -> list[np.ndarray]:
        uniform = self._rng.uniform(0.8, 1.2, (2, channels)).astype(np.float32)
        small = (self._rng.standard_normal((2, channels)) * 0.05).astype(np.float32)
        return [uniform[0] * np.float32(gain), small[0], small[1], uniform[1]]


def resnet50(ops: Ops, x: Any, weights: Weights, classes: int = 1000) -> Any:
    """x [n, 3, 224, 224] → logits [n, classes]."""

    def unit(y: Any, channels_in: int, channels: int, kernel: int, stride: int, gain: float = 1.0) -> Any:
        w = weights.normal(channels, channels_in, kernel, kernel)
        y = ops.conv(y, w, strides=[stride] * 2, pads=[kernel // 2] * 4)
        return ops.batch_norm(y, *weights.norm(channels, gain))

    x = ops.max_pool(ops.relu(unit(x, 3, 64, 7, 2)))
    width = 64
    for stage, (blocks, channels) in enumerate(STAGES):
        for block in range(blocks):
            stride = 2 if block == 0 and stage > 0 else 1
            y = ops.relu(unit(x, width, channels, 1, 1))
            y = ops.relu(unit(y, channels, channels, 3, stride))
            y = unit(y, channels, 4 * channels, 1, 1, gain=0.3)
            shortcut = unit(x, width, 4 * channels, 1, stride) if block == 0 else x
            x = ops.relu(y + shortcut)
            width = 4 * channels
    return ops.classify(x, weights.normal(classes, width), np.zeros(classes, np.float32))


class NetworkOps:
    """Ops of a vt.Network."""

    def __init__(self, net: Any) -> None:
        self._net = net

    def conv(self, x: Any, w: Any, *, strides: list[int], pads: list[int]) -> Any:
        return self._net.conv(x, w, strides=strides, pads=pads)

    def batch_norm(self, x: Any, scale: Any, bias: Any, mean: Any, var: Any) -> Any:
        return self._net.batch_normalization(x, scale, bias, mean, var)

    def relu(self, x: Any) -> Any:
        return self._net.relu(x)

    def max_pool(self, x: Any) -> Any:
        return self._net.max_pool(x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])

    def classify(self, x: Any, w: Any, b: Any) -> Any:
        return self._net.gemm(self._net.flatten(self._net.global_average_pool(x)), w, b, transB=1)


class TorchOps:
    """Ops of eager torch."""

    def conv(self, x: Any, w: Any, *, strides: list[int], pads: list[int]) -> Any:
        return F.conv2d(x, torch.from_numpy(w), None, strides, pads[:2])

    def batch_norm(self, x: Any, scale: Any, bias: Any, mean: Any, var: Any) -> Any:
        m, v, s, b = (torch.from_numpy(a) for a in (mean, var, scale, bias))
        return F.batch_norm(x, m, v, s, b)

    def relu(self, x: Any) -> Any:
        return F.relu(x)

    def max_pool(self, x: Any) -> Any:
        return F.max_pool2d(x, 3, 2, 1)

    def classify(self, x: Any, w: Any, b: Any) -> Any:
        return F.linear(x.mean((2, 3)), torch.from_numpy(w), torch.from_numpy(b))


class Recorded(Weights):
    """Weights that are drawn once; `rewind` before every further run of the definition."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._kept: list[Any] = []
        self._next = 0

    def rewind(self) -> None:
        self._next = 0

    def _take(self, make: Callable[[], Any]) -> Any:
        if self._next == len(self._kept):
            self._kept.append(make())
        self._next += 1
        return self._kept[self._next - 1]

    def normal(self, *shape: int) -> np.ndarray:
        found: np.ndarray = self._take(lambda: super(Recorded, self).normal(*shape))
        return found

    def norm(self, channels: int, gain: float = 1.0) -> list[np.ndarray]:
        found: list[np.ndarray] = self._take(lambda: super(Recorded, self).norm(channels, gain))
        return found
