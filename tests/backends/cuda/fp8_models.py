"""Quantized models of e4m3. Imports nothing that asks for Triton's interpreter."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from onnx import TensorProto, helper

from tests.backends.cpu.test_native_quantized import Model

FP8 = ml_dtypes.float8_e4m3fn


class Fp8Model(Model):
    """Scales without zeros; weights are stored in e4m3, or quantized by a node where `folds` is set."""

    def __init__(self, seed=0, folds=False):
        super().__init__("e4m3", seed)
        self.folds = folds

    def fp8(self, x, shape):
        name = f"c{len(self.weights)}"
        data = np.asarray(x, np.float32).astype(FP8).tobytes()
        self.weights.append(helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, shape, data, raw=True))
        return name

    def numbers(self, scale, zero=0):
        return [self.constant(np.float32(scale)), self.fp8([0.0], [])]

    def quantized(self, value, scale, zero=0):
        at = self.numbers(scale)
        return self.add("DequantizeLinear", [self.add("QuantizeLinear", [value, *at]), *at])

    def weight(self, shape, axis):
        values = np.clip(self.rng.standard_normal(shape).astype(np.float32) * 100, -440, 440)
        size = [] if axis is None else [shape[axis]]
        scale = self.constant(self.rng.uniform(0.001, 0.003, size).astype(np.float32))
        zero = self.fp8(np.zeros(size), size)
        attrs = {} if axis is None else {"axis": axis}
        stored = self.fp8(values, shape)
        if self.folds:
            stored = self.add("QuantizeLinear", [self.constant(values * 0.002), scale, zero], **attrs)
        return self.add("DequantizeLinear", [stored, scale, zero], **attrs)


def convolution(residual=False, end=True, kernel=3, outputs=48, channels=64, folds=False):
    """(model, shape of x, output): two convolutions, the second one perhaps with what the first one reads added."""
    m = Fp8Model(folds=folds)
    x = m.quantized("x", 0.02)
    pads = [kernel // 2] * 4
    bias = m.constant(m.rng.standard_normal(outputs).astype(np.float32))
    y = m.add("Conv", [x, m.weight((outputs, channels, kernel, kernel), 0), bias], kernel_shape=[kernel] * 2, pads=pads)
    y = m.add("Relu", [m.add("Add", [y, x]) if residual else y])
    return m, (2, channels, 9, 8), m.quantized(y, 0.05) if end else y


def product(end=True, rows=33, axis=1, n=40, k=96):
    m = Fp8Model()
    x = m.quantized("x", 0.02)
    y = m.add("MatMul", [x, m.weight((k, n), axis)])
    y = m.add("Gelu", [m.add("Add", [y, m.constant(m.rng.standard_normal(n).astype(np.float32))])])
    return m, (2, rows, k), m.quantized(y, 0.05) if end else y
