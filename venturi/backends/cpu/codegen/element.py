"""What lies in memory, and how it becomes fp32 in registers and comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from llvmlite import ir

from venturi.ir.dtypes import DT

Val = Any
F32, I8, I16, I32 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32)


@dataclass(frozen=True, repr=False)
class Element:
    """A type that kernels read and write; they compute in fp32. `suffix` is LLVM's name of the stored type."""

    name: str
    dtype: torch.dtype
    stored: Any
    suffix: str

    def __repr__(self) -> str:
        return self.name

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize

    @property
    def limits(self) -> tuple[int, int] | None:
        """The least and the greatest integer; None for floating point."""
        if self.dtype.is_floating_point:
            return None
        info = torch.iinfo(self.dtype)
        return info.min, info.max


FLOAT = Element("f32", torch.float32, F32, "f32")
BF16 = Element("bf16", torch.bfloat16, I16, "i16")
U8 = Element("u8", torch.uint8, I8, "i8")
S8 = Element("s8", torch.int8, I8, "i8")
S32 = Element("s32", torch.int32, I32, "i32")
OF_GRAPH = {DT.FLOAT: FLOAT, DT.BFLOAT16: BF16}
BYTES = {DT.UINT8: U8, DT.INT8: S8}
OF_TORCH = {e.dtype: e for e in (FLOAT, BF16, U8, S8)}


@dataclass(frozen=True)
class Place:
    """An address in generated code and the type of what lies there."""

    address: Val
    element: Element = FLOAT


def widen(b: ir.IRBuilder, x: Val, element: Element, lanes: int) -> Val:
    """Stored elements to fp32. Of bf16, the bits are the upper half."""
    if element is FLOAT:
        return x
    words, floats = ir.VectorType(I32, lanes), ir.VectorType(F32, lanes)
    if element is BF16:
        return b.bitcast(b.shl(b.zext(x, words), ir.Constant(words, [16] * lanes)), floats)
    if element is not S32:
        x = b.zext(x, words) if element is U8 else b.sext(x, words)
    return b.sitofp(x, floats)


def narrow(b: ir.IRBuilder, x: Val, element: Element, lanes: int, rounds_bf16: bool) -> Val:
    """fp32 as it is stored. bf16 is rounded to nearest, ties to even, NaN stays NaN; where the CPU `rounds_bf16`, its
    instruction takes numbers below 2^-126 for 0. Integers must be whole and in range already; NaN becomes 0."""
    if element is FLOAT:
        return x
    stored = ir.VectorType(element.stored, lanes)
    if element is BF16:
        return _round(b, x, lanes, rounds_bf16)
    zeros = ir.Constant(x.type, None)
    whole = b.fptosi(b.select(b.fcmp_ordered("ord", x, x), x, zeros), ir.VectorType(I32, lanes))
    return whole if element is S32 else b.trunc(whole, stored)


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's type, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"


def bfloats(lanes: int) -> Any:
    """A vector of LLVM's bf16 numbers; elsewhere they are their bits."""
    return ir.VectorType(_BFloat(), lanes)


def _round(b: ir.IRBuilder, x: Val, lanes: int, native: bool) -> Val:
    if native:
        return b.bitcast(b.fptrunc(x, bfloats(lanes)), ir.VectorType(I16, lanes))
    words = ir.VectorType(I32, lanes)

    def constant(n: int) -> Val:
        return ir.Constant(words, [n] * lanes)

    bits = b.bitcast(x, words)
    odd = b.and_(b.lshr(bits, constant(16)), constant(1))
    rounded = b.add(bits, b.add(odd, constant(0x7FFF)))
    kept = b.select(b.fcmp_unordered("uno", x, x), b.or_(bits, constant(0x400000)), rounded)
    return b.trunc(b.lshr(kept, constant(16)), ir.VectorType(I16, lanes))
