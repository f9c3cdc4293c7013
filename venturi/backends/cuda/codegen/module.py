"""The frame of every generated kernel: a module one can read, dump and run by itself."""

from __future__ import annotations

from collections.abc import Sequence

from venturi.backends.base import RegionView
from venturi.backends.cuda.codegen.expressions import TRITON_TYPES, comment
from venturi.ir.dtypes import DT
from venturi.ir.quantization import FP8

HEADER = "import triton\nimport triton.language as tl\n"
OVERLAP_HEADER = "from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait\n"
OVERLAP_ARCH = 90
PRELUDE = """
@triton.jit
def _exp2(x):
    # The bare instruction: results below 2^-126 become zero, so nothing is scaled around it.
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocal(x):
    # The bare instruction, for x of at least 1: one unit in the last place.
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _sigmoid(x):
    return _reciprocal(1.0 + _exp2(-1.4426950408889634 * x))


@triton.jit
def _tanh(x):
    e = _exp2(-2.8853900817779268 * tl.abs(x))
    t = (1.0 - e) * _reciprocal(1.0 + e)
    return tl.where(x < 0.0, -t, t)


@triton.jit
def _erf(x):
    # Abramowitz and Stegun, formula 7.1.26: absolute error below 1.5e-7.
    t = _reciprocal(1.0 + 0.3275911 * tl.abs(x))
    p = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    y = 1.0 - p * _exp2(-1.4426950408889634 * x * x)
    return tl.where(x < 0.0, -y, y)


@triton.jit
def _gelu_half(x):
    # x * P(X < x) of a normal X, for results of 11 bits or fewer: log2 of P(X < -a) is close to a polynomial in a,
    # fitted so that the product is right to a sixth of the last of 11 bits.
    a = tl.minimum(tl.abs(x), 7.0)
    p = (-0.00032050575828179717 * a + 0.005827232263982296) * a - 0.04823704808950424
    p = ((p * a - 0.4641212522983551) * a - 1.1491756439208984) * a - 1.0001208782196045
    half = 0.5 * x
    return half + tl.abs(half) - a * _exp2(p)


@triton.jit
def _quantized(x, zero, low, high):
    # Adding 1.5 * 2^23, whose bits are 0x4B400000, rounds to an integer, half to even, and leaves it in the low bits.
    x = tl.minimum(tl.maximum(x, low - zero), high - zero)
    return (x + 12582912.0).to(tl.int32, bitcast=True) + (zero - 0x4B400000)


@triton.jit
def _softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(x)))

"""


def _larger_bytes(name: str, kind: str, dtype: str) -> str:
    larger = (
        f"{{ .reg .b32 p, q; shl.b32 p, $1, 8; shl.b32 q, $2, 8; max.{kind}16x2 q, p, q; max.{kind}16x2 p, $1, $2; "
        "prmt.b32 $0, p, q, 0x3715; }"
    )
    return f"""
@triton.jit
def {name}(x, y):
    # Four at a time, as the high halves of 16-bit numbers; what is below them does not matter.
    return tl.inline_asm_elementwise("{larger}", "=r,r,r", [x, y], dtype={dtype}, is_pure=True, pack=4)

"""


# Functions that few kernels call.
_SPECIAL = {
    "_high": """
@triton.jit
def _high(x):
    # The 11 bits that tensor cores read of an fp32 number.
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)

""",
    "_added": """
@triton.jit
def _added(x, y):
    # An addition that is not made part of the product in front of it.
    return tl.inline_asm_elementwise("add.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1)

""",
    "_low": """
@triton.jit
def _low(x, high):
    return tl.where(tl.abs(x) == float("inf"), 0.0, x - high)

""",
    "_larger_int8": _larger_bytes("_larger_int8", "s", "tl.int8"),
    "_larger_uint8": _larger_bytes("_larger_uint8", "u", "tl.uint8"),
    "_saturated": """
@triton.jit
def _saturated(x, y, z):
    # x * y + z between 0 and 1, in one instruction.
    return tl.inline_asm_elementwise(
        "fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [x, y, z], dtype=tl.float32, is_pure=True, pack=1)

""",
    "_real_bytes": """
@triton.jit
def _real_bytes(x):
    # The conversion of bytes is an instruction of few units. 0x4B0000xx is 2^23 + xx.
    return tl.inline_asm_elementwise(
        "{ .reg .b32 u; xor.b32 u, $4, 0x80808080; prmt.b32 $0, u, 0x4B000000, 0x7440; "
        "prmt.b32 $1, u, 0x4B000000, 0x7441; prmt.b32 $2, u, 0x4B000000, 0x7442; "
        "prmt.b32 $3, u, 0x4B000000, 0x7443; }",
        "=f,=f,=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=4) - 8388736.0

""",
}


def functions(*texts: Sequence[str]) -> str:
    """What generated lines may call."""
    called = [text for name, text in _SPECIAL.items() if any(f"{name}(" in line for lines in texts for line in lines)]
    return PRELUDE + "".join(called)


def module(
    region: RegionView,
    name: str,
    arguments: Sequence[str],
    lines: Sequence[str],
    arch: int,
) -> str:
    """Text of a module that defines the jit function `name` with `lines` as its body.

    Where the architecture has programmatic dependent launch, the next kernel may start at once and this one waits for
    the results of the one in front.
    """
    overlap = arch >= OVERLAP_ARCH
    start = ["gdc_launch_dependents()", "gdc_wait()"] if overlap else []
    head = [
        described(region),
        HEADER + (OVERLAP_HEADER if overlap else "") + functions(lines),
        "@triton.jit",
        f"def {name}({', '.join(arguments)}):",
    ]
    return "\n".join([*head, *indent(start), *indent(lines), ""])


def filler(value: int) -> tuple[list[str], str]:
    """(lines, text) of what a masked load of bytes gives where there are none, in a kernel that has `images`.

    Of a negative constant Triton 3.6 spreads the sign over three of four bytes; one that it cannot foresee is right.
    """
    return ([], str(value)) if value >= 0 else ([f"fill = tl.where(images > 0, {value}, 0).to(tl.int8)"], "fill")


def described(region: RegionView) -> str:
    """A comment on what the kernel computes, for the reader of the dump."""
    return comment(f"{region.name}: {' -> '.join(n.op_type for n in region.nodes)}").strip()


def constexprs(*names: str) -> list[str]:
    return [f"{n}: tl.constexpr" for n in names]


def indent(lines: Sequence[str], depth: int = 1) -> list[str]:
    return ["    " * depth + line for line in lines]


def element_type(dtype: DT | None) -> str:
    """Triton's name of a type in a kernel's signature."""
    assert dtype is not None
    return "fp8e4nv" if dtype == FP8 else TRITON_TYPES[dtype]


def pointer_type(dtype: DT | None) -> str:
    return "*" + element_type(dtype)
