"""What follows a contraction in registers: residual and activation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from venturi.backends.cpu.codegen import mathlib as m
from venturi.backends.cpu.codegen.emit import Emitter, Val


@dataclass(frozen=True)
class Post:
    """`residual` is added before the activation, after it where `activation_first`. Numbers and `mode` as in ONNX."""

    activation: str = ""
    alpha: float = 0.0
    beta: float = 0.0
    low: float | None = None
    high: float | None = None
    mode: str = "none"
    residual: bool = False
    activation_first: bool = False


def emit_post(e: Emitter, post: Post, x: Val, residual: Val | None) -> Val:
    if residual is not None and not post.activation_first:
        x = e.b.fadd(x, residual)
    if post.activation:
        x = ACTIVATIONS[post.activation](e, x, post)
    return e.b.fadd(x, residual) if residual is not None and post.activation_first else x


def _clip(e: Emitter, x: Val, p: Post) -> Val:
    x = x if p.low is None else m.at_least(e, x, p.low)
    return x if p.high is None else m.at_most(e, x, p.high)


def _hard_sigmoid(e: Emitter, x: Val, alpha: float, beta: float) -> Val:
    return m.at_most(e, m.at_least(e, e.fma(x, e.constant(alpha), e.constant(beta)), 0.0), 1.0)


def _where_negative(e: Emitter, x: Val, negative: Val) -> Val:
    return e.b.select(e.b.fcmp_ordered("<", x, e.constant(0.0)), negative, x)


def _elu(e: Emitter, x: Val, p: Post) -> Val:
    return _where_negative(e, x, e.b.fmul(e.constant(p.alpha), m.expm1(e, x)))


def _gelu(e: Emitter, x: Val, p: Post) -> Val:
    half = e.b.fmul(x, e.constant(0.5))
    if p.mode == "tanh":
        cube = e.b.fmul(e.b.fmul(x, x), x)
        inner = e.b.fmul(e.constant(1.5957691216057308), e.fma(cube, e.constant(0.044715), x))
        return e.b.fmul(x, m.sigmoid(e, inner))  # (1 + tanh u) / 2 is the sigmoid of 2u
    return e.fma(half, m.erf(e, e.b.fmul(x, e.constant(0.7071067811865476))), half)


def _mish(e: Emitter, x: Val, p: Post) -> Val:
    """x tanh(log(1 + exp x)) without the logarithm: with u = (1 + exp x)^2 it is x (u - 1) / (u + 1)."""
    grown = m.exp(e, m.at_most(e, x, 20.0))
    v = e.b.fmul(grown, e.b.fadd(grown, e.constant(2.0)))
    return e.b.fmul(x, e.b.fdiv(v, e.b.fadd(v, e.constant(2.0))))


ACTIVATIONS: dict[str, Callable[[Emitter, Val, Post], Val]] = {
    "Relu": lambda e, x, p: m.at_least(e, x, 0.0),
    "Clip": _clip,
    "LeakyRelu": lambda e, x, p: _where_negative(e, x, e.b.fmul(x, e.constant(p.alpha))),
    "Elu": _elu,
    "Sigmoid": lambda e, x, p: m.sigmoid(e, x),
    "Tanh": lambda e, x, p: m.tanh(e, x),
    "HardSigmoid": lambda e, x, p: _hard_sigmoid(e, x, p.alpha, p.beta),
    "HardSwish": lambda e, x, p: e.b.fmul(x, _hard_sigmoid(e, x, 1 / 6, 0.5)),
    "Swish": lambda e, x, p: e.b.fmul(x, m.sigmoid(e, x if p.alpha == 1 else e.b.fmul(x, e.constant(p.alpha)))),
    "Gelu": _gelu,
    "Mish": _mish,
}
