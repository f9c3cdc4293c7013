"""Writes one kernel as LLVM IR: loops, vectors and pointers over llvmlite's builder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from venturi.backends.cpu.codegen.element import FLOAT, Element, Place, narrow, widen
from venturi.backends.cpu.codegen.isa import Isa

F32, I32, I64, I1, PTR = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.IntType(1), ir.PointerType()
Val = Any


class Emitter:
    """The function `void kernel(ptr args, i64 begin, i64 end)` under construction.

    `args` points at 64-bit words: pointers and integers. [begin, end) is the range of tasks to do. Offsets are in
    elements of what lies at a Place; in registers everything is fp32. Integers may be given as Python ints.
    """

    def __init__(self, isa: Isa, name: str = "kernel") -> None:
        self.isa = isa
        self.module = ir.Module()
        self.module.triple = isa.triple
        self.vector = ir.VectorType(F32, isa.lanes)
        self._undefined = ir.Constant(self.vector, ir.Undefined)
        self._zeros = ir.Constant(self.vector, None)
        self._first_lane = ir.Constant(ir.VectorType(I32, isa.lanes), None)
        self._function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [PTR, I64, I64]), name)
        self.args, self.begin, self.end = self._function.args
        self.b = ir.IRBuilder(self._function.append_basic_block())

    def finish(self) -> str:
        self.b.ret_void()
        return str(self.module)

    # --- integers and pointers
    def i64(self, x: Val) -> Val:
        """`x` as a value of 64 bits."""
        return I64(x) if isinstance(x, int) else x

    def add(self, x: Val, y: Val) -> Val:
        if isinstance(x, int) and isinstance(y, int):
            return x + y
        if (isinstance(x, int) and x == 0) or (isinstance(y, int) and y == 0):
            return y if isinstance(x, int) else x
        return self.b.add(self.i64(x), self.i64(y))

    def sub(self, x: Val, y: Val) -> Val:
        return x - y if isinstance(x, int) and isinstance(y, int) else self.b.sub(self.i64(x), self.i64(y))

    def mul(self, x: Val, y: Val) -> Val:
        if isinstance(x, int) and isinstance(y, int):
            return x * y
        if x == 1 or y == 1:
            return y if x == 1 else x
        return self.b.mul(self.i64(x), self.i64(y))

    def divmod(self, x: Val, y: int) -> tuple[Val, Val]:
        """Of a non-negative `x` by a positive constant."""
        if isinstance(x, int):
            return divmod(x, y)
        return (x, 0) if y == 1 else (self.b.udiv(x, I64(y)), self.b.urem(x, I64(y)))

    def min(self, x: Val, y: Val) -> Val:
        if isinstance(x, int) and isinstance(y, int):
            return min(x, y)
        x, y = self.i64(x), self.i64(y)
        return self.b.select(self.b.icmp_signed("<", x, y), x, y)

    def max(self, x: Val, y: Val) -> Val:
        if isinstance(x, int) and isinstance(y, int):
            return max(x, y)
        x, y = self.i64(x), self.i64(y)
        return self.b.select(self.b.icmp_signed(">", x, y), x, y)

    def at(self, place: Place, offset: Val) -> Place:
        if isinstance(offset, int) and offset == 0:
            return place
        address = self.b.gep(place.address, [self.i64(offset)], source_etype=place.element.stored)
        return Place(address, place.element)

    def pointer(self, index: int, element: Element = FLOAT) -> Place:
        """The pointer in word `index` of the arguments."""
        return Place(self.b.load(self.b.gep(self.args, [I64(index)], source_etype=I64), typ=PTR), element)

    def word(self, index: int) -> Val:
        return self.b.load(self.b.gep(self.args, [I64(index)], source_etype=I64), typ=I64)

    def stack(self, count: int, element: Element = FLOAT) -> Place:
        """Memory for `count` elements, aligned to 64 bytes, that lives as long as the call."""
        with self.b.goto_entry_block():
            place = self.b.alloca(ir.ArrayType(element.stored, count))
            place.align = 64
            return Place(self.b.inttoptr(self.b.ptrtoint(place, I64), PTR), element)

    def buffer(self, size: Val, element: Element) -> Place:
        """Memory for `size` bytes, known when the code runs, aligned to 64; only where the function begins."""
        place = self.b.alloca(ir.IntType(8), size=self.i64(size))
        place.align = 64
        return Place(self.b.inttoptr(self.b.ptrtoint(place, I64), PTR), element)

    def choose(self, condition: Val, x: Place, y: Place) -> Place:
        """`x` where the condition holds, `y` otherwise; both are of `x`'s type."""
        return Place(self.b.select(condition, x.address, y.address), x.element)

    def inside(self, x: Val, size: int) -> Val:
        """0 <= x < size."""
        return self.b.icmp_unsigned("<", self.i64(x), I64(size))

    # --- vectors
    def constant(self, x: float) -> Val:
        if x == 0 and math.copysign(1.0, x) > 0:
            return self._zeros
        return ir.Constant(self.vector, [x] * self.isa.lanes)

    def splat(self, scalar: Val) -> Val:
        one = self.b.insert_element(self._undefined, scalar, I32(0))
        return self.b.shuffle_vector(one, self._undefined, self._first_lane)

    def to_float(self, x: Val) -> Val:
        return self.b.sitofp(self.i64(x), F32)

    def load_scalar(self, place: Place) -> Val:
        x = self.b.load(place.address, typ=place.element.stored, align=place.element.bytes)
        if place.element is FLOAT:
            return x
        one = self.b.insert_element(ir.Constant(ir.VectorType(place.element.stored, 1), ir.Undefined), x, I32(0))
        return self.b.extract_element(widen(self.b, one, place.element, 1), I32(0))

    def load(self, place: Place, count: Val | None = None) -> Val:
        """A vector; only its first `count` lanes are read where that is given, the others are 0."""
        return widen(self.b, self.load_raw(place, self.isa.lanes, count), place.element, self.isa.lanes)

    def store(self, value: Val, place: Place, count: Val | None = None) -> None:
        lanes = self.isa.lanes
        value = narrow(self.b, value, place.element, lanes, self.isa.rounds_bf16)
        self.store_raw(value, place, lanes, count)

    def load_raw(self, place: Place, lanes: int, count: Val | None = None) -> Val:
        """`lanes` elements as stored; only the first `count` are read where that is given, the others are 0."""
        kind, size = ir.VectorType(place.element.stored, lanes), place.element.bytes
        if count is None or (isinstance(count, int) and count == lanes):
            return self.b.load(place.address, typ=kind, align=size)
        name = f"llvm.masked.load.v{lanes}{place.element.suffix}.p0"
        load = self.intrinsic(name, kind, [PTR, I32, ir.VectorType(I1, lanes), kind])
        return self.b.call(load, [place.address, I32(size), self.mask(count, lanes), ir.Constant(kind, None)])

    def store_raw(self, value: Val, place: Place, lanes: int, count: Val | None = None) -> None:
        """The reverse."""
        kind, size = ir.VectorType(place.element.stored, lanes), place.element.bytes
        if count is None or (isinstance(count, int) and count == lanes):
            self.b.store(value, place.address, align=size)
            return
        if isinstance(count, int) and count == 1:  # LLVM 20 makes four bytes of a truncated lane under a mask
            self.b.store(self.b.extract_element(value, I32(0)), place.address, align=size)
            return
        name = f"llvm.masked.store.v{lanes}{place.element.suffix}.p0"
        store = self.intrinsic(name, ir.VoidType(), [kind, PTR, I32, ir.VectorType(I1, lanes)])
        self.b.call(store, [value, place.address, I32(size), self.mask(count, lanes)])

    def prefetch(self, place: Place, *, write: bool = False) -> None:
        """Ask for the cache line at `place`, to `write` it if so; it need not be memory of this process."""
        ask = self.intrinsic("llvm.prefetch.p0", ir.VoidType(), [PTR, I32, I32, I32])
        self.b.call(ask, [place.address, I32(int(write)), I32(3), I32(1)])

    def rotate(self, value: Val, step: int) -> Val:
        """Lane i takes lane i + `step`, around the end."""
        lanes = self.isa.lanes
        order = ir.Constant(ir.VectorType(I32, lanes), [(i + step) % lanes for i in range(lanes)])
        return self.b.shuffle_vector(value, ir.Constant(self.vector, ir.Undefined), order)

    def mask(self, count: Val, lanes: int = 0) -> Val:
        """True in the first `count` lanes."""
        lanes = lanes or self.isa.lanes
        if not isinstance(count, int):
            numbers = ir.VectorType(I64, lanes)
            bound = self.b.insert_element(ir.Constant(numbers, ir.Undefined), count, I32(0))
            zeros = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
            bound = self.b.shuffle_vector(bound, ir.Constant(numbers, ir.Undefined), zeros)
            return self.b.icmp_unsigned("<", ir.Constant(numbers, list(range(lanes))), bound)
        return ir.Constant(ir.VectorType(I1, lanes), [i < count for i in range(lanes)])

    def any(self, flags: Val) -> Val:
        """Whether one lane is true."""
        whole = ir.IntType(self.isa.lanes)
        return self.b.icmp_unsigned("!=", self.b.bitcast(flags, whole), whole(0))

    def store_word(self, x: int, place: Place) -> None:
        self.b.store(I64(x), place.address, align=8)

    def load_word(self, place: Place) -> Val:
        return self.b.load(place.address, typ=I64, align=8)

    def fma(self, x: Val, y: Val, z: Val) -> Val:
        return self.b.call(self.math("fma", 3), [x, y, z])

    def math(self, name: str, arity: int) -> Val:
        """LLVM's vector intrinsic of that name."""
        return self.intrinsic(f"llvm.{name}.v{self.isa.lanes}f32", self.vector, [self.vector] * arity)

    def scale_by_power_of_two(self, x: Val, n: Val) -> Val:
        """x * 2^n for whole n, in AVX-512's one instruction."""
        kinds = [self.vector, self.vector, self.vector, ir.IntType(16), I32]
        scale = self.intrinsic("llvm.x86.avx512.mask.scalef.ps.512", self.vector, kinds)
        return self.b.call(scale, [x, n, ir.Constant(self.vector, ir.Undefined), ir.IntType(16)(0xFFFF), I32(4)])

    def intrinsic(self, name: str, result: Any, types: Sequence[Any]) -> Val:
        found = self.module.globals.get(name)
        return found if found is not None else ir.Function(self.module, ir.FunctionType(result, types), name)

    # --- control
    def loop(
        self, start: Val, stop: Val, step: int, carried: Sequence[Val], body: Callable[[Val, list[Val]], Sequence[Val]]
    ) -> list[Val]:
        """`for i in range(start, stop, step): carried = body(i, carried)`; the last `carried`."""
        if isinstance(start, int) and isinstance(stop, int):
            if start >= stop:
                return list(carried)
            if start + step >= stop:
                return list(body(start, list(carried)))
        before = self.b.block
        head, inside, after = (self._function.append_basic_block() for _ in range(3))
        self.b.branch(head)
        self.b.position_at_end(head)
        i = self.b.phi(I64)
        i.add_incoming(self.i64(start), before)
        phis = []
        for value in carried:
            phi = self.b.phi(value.type)
            phi.add_incoming(value, before)
            phis.append(phi)
        self.b.cbranch(self.b.icmp_signed("<", i, self.i64(stop)), inside, after)
        self.b.position_at_end(inside)
        results = body(i, list(phis))
        i.add_incoming(self.b.add(i, I64(step)), self.b.block)
        for phi, value in zip(phis, results):
            phi.add_incoming(value, self.b.block)
        self.b.branch(head)
        self.b.position_at_end(after)
        return phis

    def each(self, start: Val, stop: Val, step: int, body: Callable[[Val], None]) -> None:
        """A loop that carries nothing."""

        def run(i: Val, carried: list[Val]) -> Sequence[Val]:
            body(i)
            return ()

        self.loop(start, stop, step, (), run)

    def when(self, condition: Val, body: Callable[[], None]) -> None:
        with self.b.if_then(condition):
            body()

    def switch(self, index: Val, cases: Sequence[Callable[[], None]]) -> None:
        """Run case number `index`; the last one where it is beyond."""
        if len(cases) == 1 or isinstance(index, int):
            cases[0 if len(cases) == 1 else min(index, len(cases) - 1)]()
            return
        blocks = [self._function.append_basic_block() for _ in cases]
        after = self._function.append_basic_block()
        choice = self.b.switch(index, blocks[-1])
        for i, block in enumerate(blocks[:-1]):
            choice.add_case(I64(i), block)
        for block, case in zip(blocks, cases):
            self.b.position_at_end(block)
            case()
            self.b.branch(after)
        self.b.position_at_end(after)

    def table(self, values: Sequence[int], index: Val) -> Val:
        """Element `index` of a constant table of small integers."""
        if isinstance(index, int):
            return values[index]
        if len(set(values)) == 1:
            return values[0]
        kind = ir.ArrayType(I64, len(values))
        name = f"table{len(self.module.globals)}"
        glob = ir.GlobalVariable(self.module, kind, name)
        glob.global_constant, glob.linkage = True, "internal"
        glob.initializer = ir.Constant(kind, list(values))
        return self.b.load(self.b.gep(glob, [I64(0), index], source_etype=kind), typ=I64)
