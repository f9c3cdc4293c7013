"""Products of what is rounded by its own range (dynamic quantization) by generated code, against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.backends.cpu.test_native_quantized import Model, pytestmark, tactics  # noqa: F401
from venturi.backends.reference.interpreter import Interpreter
from venturi.engine.engine import Engine


class Dynamic(Model):
    def rounded(self, x: str = "x") -> list[str]:
        names = [f"{p}{len(self.nodes)}" for p in ("bytes", "scale", "zero")]
        self.nodes.append(helper.make_node("DynamicQuantizeLinear", [x], names, name=f"round{len(self.nodes)}"))
        return names

    def product(self, x: list[str], shape: tuple[int, int], scales: bool) -> str:
        small, scale, zero = x
        stored = self.constant(self.rng.integers(-127, 128, shape).astype(np.int8))
        size = [shape[1]] if scales else []
        w_scale = self.constant(self.rng.uniform(0.001, 0.01, size).astype(np.float32))
        whole = self.add("MatMulInteger", [small, stored, zero, self.constant(np.zeros(size, np.int8))])
        return self.add("Mul", [self.add("Cast", [whole], to=TensorProto.FLOAT), self.add("Mul", [scale, w_scale])])


def agree(engine: Engine, plain: Interpreter, x: Any) -> None:
    with np.errstate(all="ignore"):
        (want,) = plain.run({"x": x}).values()
    got = np.asarray(engine(x))
    known = np.isfinite(want)
    np.testing.assert_array_equal(np.isfinite(got), known)
    scale = np.abs(want[known]).max(initial=1e-6)
    np.testing.assert_allclose(got[known], want[known], rtol=1e-5, atol=2e-6 * scale)


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize(
    "shape, width", [((5, 64), 32), ((1, 768), 96), ((3, 7, 100), 19), ((33, 1), 40), ((29, 65), 1)]
)
def test_products(shape: tuple[int, ...], width: int, scales: bool) -> None:
    m = Dynamic("u8", seed=width)
    y = m.product(m.rounded(), (shape[-1], width), scales)
    y = m.add("Relu", [m.add("Add", [y, m.constant(m.rng.standard_normal(width).astype(np.float32))])])
    engine, plain = m.build({"x": shape}, y, None)
    assert tactics(engine) == ["native-dynamic"]
    for x in (m.rng.standard_normal(shape), m.rng.uniform(1, 3, shape), -m.rng.uniform(1, 3, shape), np.zeros(shape)):
        agree(engine, plain, x.astype(np.float32))


def test_readers_of_one_rounded_operand_round_it_themselves() -> None:
    """Queries, keys and values; the sum of two products, a residual of the second's kernel; bytes also leave."""
    m = Dynamic("u8")
    x = m.rounded()
    a, b, c = (m.product(x, (64, 48), True) for _ in range(3))
    y = m.add("Add", [m.add("Mul", [a, b]), m.add("Relu", [c])])
    y = m.add("Add", [y, m.add("DequantizeLinear", [m.add("Slice", [x[0], *_slices(m)]), *m.numbers(0.1, 3)])])
    engine, plain = m.build({"x": (10, 64)}, y, None)
    assert tactics(engine).count("native-dynamic") == 3
    agree(engine, plain, m.rng.standard_normal((10, 64)).astype(np.float32))


def _slices(m: Model) -> list[str]:
    return [m.constant(np.array([n], np.int64)) for n in (0, 48, 1)]


def test_a_residual_is_added_inside() -> None:
    m = Dynamic("u8")
    y = m.add("Add", [m.product(m.rounded(), (64, 64), True), "x"])
    engine, plain = m.build({"x": (21, 64)}, y, None)
    assert tactics(engine) == ["native-dynamic"]
    agree(engine, plain, m.rng.standard_normal((21, 64)).astype(np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e-42])
def test_numbers_that_are_not_finite_or_tiny(value: float) -> None:
    m = Dynamic("u8")
    engine, plain = m.build({"x": (4, 64)}, m.product(m.rounded(), (64, 16), False), None)
    x = m.rng.standard_normal((4, 64)).astype(np.float32) if not np.isfinite(value) else np.zeros((4, 64), np.float32)
    x[1, 3] = value
    agree(engine, plain, x)


def test_any_number_of_rows() -> None:
    m = Dynamic("u8")
    engine, plain = m.build({"x": ("n", 64)}, m.product(m.rounded(), (64, 48), True), None)
    for rows in (1, 2, 15, 70, 0):
        agree(engine, plain, m.rng.standard_normal((rows, 64)).astype(np.float32))


@pytest.mark.parametrize("case", ["unsigned", "zero", "computed"])
def test_what_stays_with_the_libraries(case: str) -> None:
    """Weights of unsigned bytes, with a zero, or computed."""
    m = Dynamic("u8")
    small, scale, zero = m.rounded()
    stored: Any = m.rng.integers(0, 100, (64, 16))
    stored = stored.astype(np.uint8 if case == "unsigned" else np.int8)
    w_zero = m.constant(stored.dtype.type(5 if case == "zero" else 0))
    weight = m.constant(stored)
    if case == "computed":
        weight, _, _ = (m.add("Slice", [small, *_slices(m)]), 0, 0)
        w_zero = m.constant(np.uint8(0))
    whole = m.add("MatMulInteger", [small, weight, zero, w_zero])
    real = m.add("Cast", [whole], to=TensorProto.FLOAT)
    y = m.add("Mul", [real, m.add("Mul", [scale, m.constant(np.float32(0.01))])])
    engine, plain = m.build({"x": (64, 64)}, y, None)
    assert "native-dynamic" not in tactics(engine)
    agree(engine, plain, m.rng.standard_normal((64, 64)).astype(np.float32))
