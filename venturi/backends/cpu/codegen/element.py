"""What lies in memory, and how it becomes fp32 in registers and comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from llvmlite import ir

from venturi.ir.dtypes import DT

Val = Any
F32, I16, I32 = ir.FloatType(), ir.IntType(16), ir.IntType(32)


@dataclass(frozen=True, repr=False)
class Element:
    """A type that kernels read and write; they compute in fp32."""

    name: str
    dtype: torch.dtype
    stored: Any

    def __repr__(self) -> str:
        return self.name

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize


FLOAT = Element("f32", torch.float32, F32)
BF16 = Element("bf16", torch.bfloat16, I16)
OF_GRAPH = {DT.FLOAT: FLOAT, DT.BFLOAT16: BF16}
OF_TORCH = {e.dtype: e for e in OF_GRAPH.values()}


@dataclass(frozen=True)
class Place:
    """An address in generated code and the type of what lies there."""

    address: Val
    element: Element = FLOAT


def widen(b: ir.IRBuilder, x: Val, lanes: int) -> Val:
    """Stored bf16, as integers, to fp32: its bits are the upper half."""
    words = ir.VectorType(I32, lanes)
    upper = b.shl(b.zext(x, words), ir.Constant(words, [16] * lanes))
    return b.bitcast(upper, ir.VectorType(F32, lanes))


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's type, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"


def narrow(b: ir.IRBuilder, x: Val, lanes: int, native: bool) -> Val:
    """fp32 to bf16 as stored, rounded to nearest, ties to even. NaN stays NaN: a quiet bit survives the cut. `native`:
    the CPU has an instruction for it, which takes numbers below 2^-126 for 0."""
    if native:
        return b.bitcast(b.fptrunc(x, ir.VectorType(_BFloat(), lanes)), ir.VectorType(I16, lanes))
    words = ir.VectorType(I32, lanes)

    def constant(n: int) -> Val:
        return ir.Constant(words, [n] * lanes)

    bits = b.bitcast(x, words)
    odd = b.and_(b.lshr(bits, constant(16)), constant(1))
    rounded = b.add(bits, b.add(odd, constant(0x7FFF)))
    kept = b.select(b.fcmp_unordered("uno", x, x), b.or_(bits, constant(0x400000)), rounded)
    return b.trunc(b.lshr(kept, constant(16)), ir.VectorType(I16, lanes))
