"""Vector mathematics in fp32: within 2 ulp (sigmoid, log1p 3; expm1 4), NaN and infinities as the C library has them.

The polynomials are our own minimax fits (Lawson's weighted least squares on Chebyshev nodes) for the ranges written
beside them. exp reduces by Cody and Waite's two-part ln 2; log splits off the exponent.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from venturi.backends.cpu.codegen.emit import I32, Emitter, Val

_EXP = (0.4999999403953552, 0.1666651964187622, 0.041668396443128586, 0.008368796668946743, 0.001381443114951253)
_TANH = (
    -0.3333333134651184, 0.13333210349082947, -0.05394720286130905, 0.021702967584133148, -0.008182673715054989,
    0.0021475369576364756,
)  # fmt: skip
_ERF_SMALL = (
    0.128379225730896, -0.37612631916999817, 0.11283687502145767, -0.026858940720558167, 0.005199906416237354,
    -0.0008130011847242713, 8.316772436955944e-05,
)  # fmt: skip
_ERF_BIG = (
    0.00017733496497385204, -1.1295276880264282, -0.633321225643158, -0.10830827057361603, 0.02513762377202511,
    -0.0041779628954827785, 0.0004358848964329809, -2.12179384107003e-05,
)  # fmt: skip
_LOG = (
    0.3333331048488617, -0.24999986588954926, 0.20002226531505585, -0.16669251024723053, 0.14218659698963165,
    -0.12384349852800369, 0.11872969567775726, -0.11789797991514206, 0.06915370374917984,
)  # fmt: skip


def polynomial(e: Emitter, x: Val, coefficients: Sequence[float]) -> Val:
    """Horner's rule; coefficients from the constant upwards."""
    out = e.constant(coefficients[-1])
    for c in reversed(coefficients[:-1]):
        out = e.fma(out, x, e.constant(c))
    return out


def at_least(e: Emitter, x: Val, low: float) -> Val:
    """max(x, low) that keeps NaN."""
    bound = e.constant(low)
    return e.b.select(e.b.fcmp_ordered(">", bound, x), bound, x)


def at_most(e: Emitter, x: Val, high: float) -> Val:
    """min(x, high) that keeps NaN."""
    bound = e.constant(high)
    return e.b.select(e.b.fcmp_ordered("<", bound, x), bound, x)


def maximum(e: Emitter, x: Val, y: Val) -> Val:
    """NaN where either is NaN."""
    larger = e.b.select(e.b.fcmp_ordered(">", x, y), x, y)
    return e.b.select(e.b.fcmp_unordered("uno", x, x), x, larger)


def minimum(e: Emitter, x: Val, y: Val) -> Val:
    """NaN where either is NaN."""
    smaller = e.b.select(e.b.fcmp_ordered("<", x, y), x, y)
    return e.b.select(e.b.fcmp_unordered("uno", x, x), x, smaller)


def absolute(e: Emitter, x: Val) -> Val:
    return e.b.call(e.math("fabs", 1), [x])


def copysign(e: Emitter, magnitude: Val, sign: Val) -> Val:
    return e.b.call(e.math("copysign", 2), [magnitude, sign])


def exp(e: Emitter, x: Val) -> Val:
    """2^n (1 + r + r^2 P(r)). The clamp keeps n small; beyond it the result is 0 or infinite all the same."""
    x = at_most(e, at_least(e, x, -104.0), 89.0)
    n = e.b.call(e.math("rint", 1), [e.b.fmul(x, e.constant(1.4426950408889634))])
    r = e.fma(n, e.constant(-0.693145751953125), x)
    r = e.fma(n, e.constant(-1.428606765330187e-06), r)
    tail = e.b.fmul(e.b.fmul(r, r), polynomial(e, r, _EXP))
    p = e.b.fadd(e.b.fadd(tail, r), e.constant(1.0))
    if e.isa.name == "avx512":
        return e.scale_by_power_of_two(p, n)
    whole = e.b.fptosi(_not_nan(e, n), _ints(e))
    half = e.b.ashr(whole, _int(e, 1))
    return e.b.fmul(e.b.fmul(p, _power_of_two(e, half)), _power_of_two(e, e.b.sub(whole, half)))


def expm1(e: Emitter, x: Val) -> Val:
    """exp(x) - 1: x + x^2 P(x) where nothing need be reduced, |x| < ln 2 / 2."""
    small = e.fma(e.b.fmul(x, x), polynomial(e, x, _EXP), x)
    near = e.b.fcmp_ordered("<", absolute(e, x), e.constant(0.34))
    return e.b.select(near, small, e.b.fsub(exp(e, x), e.constant(1.0)))


def log1p(e: Emitter, u: Val) -> Val:
    """log(1 + u) for u >= 0: what 1 + u rounds away is put back by the factor u / ((1 + u) - 1).

    Source: Kahan's, in Goldberg, "What Every Computer Scientist Should Know About Floating-Point Arithmetic" (1991).
    """
    one = e.constant(1.0)
    w = e.b.fadd(u, one)
    kept = e.b.fsub(w, one)
    nothing = e.b.fcmp_ordered("==", kept, e.constant(0.0))
    safe = e.b.select(nothing, one, kept)
    return e.b.select(nothing, u, e.b.fmul(log(e, w), e.b.fdiv(u, safe)))


def sigmoid(e: Emitter, x: Val) -> Val:
    one = e.constant(1.0)
    return e.b.fdiv(one, e.b.fadd(one, exp(e, e.b.fneg(x))))


def tanh(e: Emitter, x: Val) -> Val:
    """x + x^3 P(x^2) below 0.625, 1 - 2 / (exp(2|x|) + 1) above."""
    size, square = absolute(e, x), e.b.fmul(x, x)
    small = e.fma(e.b.fmul(x, square), polynomial(e, square, _TANH), x)
    one, two = e.constant(1.0), e.constant(2.0)
    grown = exp(e, e.b.fadd(size, size))
    large = e.b.fsub(one, e.b.fdiv(two, e.b.fadd(grown, one)))
    return copysign(e, e.b.select(e.b.fcmp_ordered("<", size, e.constant(0.625)), small, large), x)


def erf(e: Emitter, x: Val) -> Val:
    """x + x P(x^2) below 0.93, 1 - exp(Q(|x|)) up to 4, then 1."""
    size, square = absolute(e, x), e.b.fmul(x, x)
    small = e.fma(x, polynomial(e, square, _ERF_SMALL), x)
    below = exp(e, polynomial(e, at_most(e, size, 4.0), _ERF_BIG))
    large = e.b.fsub(e.constant(1.0), below)
    return copysign(e, e.b.select(e.b.fcmp_ordered("<", size, e.constant(0.93)), small, large), x)


def log(e: Emitter, x: Val) -> Val:
    """f - f^2 / 2 + f^3 P(f) + n ln 2 with x = 2^n (1 + f), f from sqrt(1/2) - 1 to sqrt(2) - 1."""
    tiny = e.b.fcmp_ordered("<", x, e.constant(1.1754943508222875e-38))
    scaled = e.b.select(tiny, e.b.fmul(x, e.constant(8388608.0)), x)
    bits = e.b.bitcast(scaled, _ints(e))
    shifted = e.b.sub(bits, _int(e, 0x3F3504F3))
    n = e.b.ashr(shifted, _int(e, 23))
    mantissa = e.b.bitcast(e.b.sub(bits, e.b.shl(n, _int(e, 23))), e.vector)
    exponent = e.b.sitofp(n, e.vector)
    exponent = e.b.select(tiny, e.b.fsub(exponent, e.constant(23.0)), exponent)
    f = e.b.fsub(mantissa, e.constant(1.0))
    square = e.b.fmul(f, f)
    tail = e.b.fmul(e.b.fmul(square, f), polynomial(e, f, _LOG))
    tail = e.fma(square, e.constant(-0.5), tail)
    tail = e.fma(exponent, e.constant(1.428606765330187e-06), tail)
    out = e.fma(exponent, e.constant(0.693145751953125), e.b.fadd(tail, f))
    inf = e.constant(float("inf"))
    out = e.b.select(e.b.fcmp_ordered("==", x, inf), inf, out)
    out = e.b.select(e.b.fcmp_ordered("==", x, e.constant(0.0)), e.constant(-float("inf")), out)
    wrong = e.b.fcmp_unordered("<", x, e.constant(0.0))
    return e.b.select(wrong, e.constant(float("nan")), out)


def quantize(e: Emitter, x: Val, zero: Val, limits: tuple[int, int]) -> Val:
    """round(x) + zero within `limits`, ties to even; 0 for NaN."""
    x = e.b.fadd(e.b.call(e.math("rint", 1), [x]), zero)
    return at_most(e, at_least(e, x, float(limits[0])), float(limits[1]))


def _ints(e: Emitter) -> ir.VectorType:
    return ir.VectorType(I32, e.isa.lanes)


def _int(e: Emitter, x: int) -> Val:
    return ir.Constant(_ints(e), [x] * e.isa.lanes)


def _not_nan(e: Emitter, x: Val) -> Val:
    """0 for NaN, whose conversion to an integer would be undefined."""
    return e.b.select(e.b.fcmp_ordered("ord", x, x), x, e.constant(0.0))


def _power_of_two(e: Emitter, n: Val) -> Val:
    return e.b.bitcast(e.b.shl(e.b.add(n, _int(e, 127)), _int(e, 23)), e.vector)
