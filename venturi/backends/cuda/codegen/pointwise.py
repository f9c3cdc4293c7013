"""One Triton kernel for a pointwise cluster: every element of the output by one thread, all nodes in registers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from venturi.backends.base import RegionView
from venturi.backends.cuda.codegen.expressions import TRITON_TYPES, Body, comment, literal, loaded, rounded
from venturi.backends.cuda.codegen.module import constexprs, module, pointer_type
from venturi.backends.cuda.codegen.space import Space, space_of
from venturi.backends.cuda.kernel import KernelSource
from venturi.ir.dtypes import DT, INTS


@dataclass(frozen=True)
class Pointwise:
    """A generated kernel: `pointers` are the inputs it loads, in order; scalars are written into the text."""

    space: Space
    pointers: tuple[ir.Value, ...]
    output: ir.Value
    lines: tuple[str, ...]
    region: RegionView

    def source(self, block: int, warps: int, arch: int) -> KernelSource:
        arguments = [f"in{i}" for i in range(len(self.pointers))] + ["out0", "n"]
        runtime = [f"s{i}" for i, axis in enumerate(self.space.axes) if i and axis.size is None]
        total = static_total(self.space)
        lines = [
            "offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)",
            "mask = offset < n",
            *index_lines(self.space, "offset"),
            *load_lines(self.space, self.pointers, "offset", "mask"),
            *self.lines,
            f"tl.store(out0 + offset, {rounded('result', self.output.dtype)}, mask=mask)",
        ]
        text = module(self.region, "pointwise", [*arguments, *runtime, *constexprs("BLOCK")], lines, arch)
        types = [pointer_type(v.dtype) for v in (*self.pointers, self.output)]
        signature = [*zip(arguments, [*types, "i32"]), *((s, "i32") for s in runtime), ("BLOCK", "constexpr")]
        divisible = arguments[:-1] + (["n"] if total is not None and total % 16 == 0 else [])
        return KernelSource("pointwise", text, tuple(signature), (("BLOCK", block),), tuple(divisible), warps, 1, arch)


def static_total(space: Space) -> int | None:
    total = 1
    for axis in space.axes:
        if axis.size is None:
            return None
        total *= axis.size
    return total


def index_lines(space: Space, offset: str) -> list[str]:
    """Coordinates i0.. of a linear offset; none are needed when every input is flat or scalar."""
    if all(space.is_flat(i) for i in range(len(space.ranks))) or len(space.axes) < 2:
        return []
    lines, rest = [], offset
    for i in reversed(range(1, len(space.axes))):
        size = extent(space, i)
        lines += [f"i{i} = {rest} % {size}", f"r{i} = {rest} // {size}"]
        rest = f"r{i}"
    return [*lines, f"i0 = {rest}"]


def extent(space: Space, i: int) -> str:
    size = space.axes[i].size
    return f"s{i}" if size is None else str(size)


def offset_of(space: Space, i: int, offset: str) -> str:
    """Where element `offset` of the output reads input i."""
    if space.is_flat(i) or not space.axes:
        return offset
    terms: list[str] = []
    stride: list[str] = []
    for a in reversed(range(len(space.axes))):
        if not space.axes[a].spans[i]:
            continue
        index = f"i{a}" if len(space.axes) > 1 else offset
        terms.append(" * ".join([index, *stride]))
        stride.append(extent(space, a))
    return " + ".join(terms) if terms else "0"


def load_lines(space: Space, pointers: Sequence[ir.Value], offset: str, mask: str) -> list[str]:
    lines = []
    for i, value in enumerate(pointers):
        where = offset_of(space, i, offset)
        guard = "" if where == "0" else f", mask={mask}"
        lines.append(f"x{i} = {loaded(f'tl.load(in{i} + {where}{guard})', value.dtype)}{comment(value.name)}")
    return lines


def scalar_text(region: RegionView, value: ir.Value) -> str | None:
    """A constant of one element as a literal."""
    weight = region.constant(value)
    if weight is None or weight.numel() != 1 or value.dtype not in TRITON_TYPES:
        return None
    number = weight.reshape(()).item()
    if value.dtype == DT.BOOL:
        return str(bool(number))
    return str(int(number)) if value.dtype in INTS else literal(float(number))


def read_pointwise(region: RegionView) -> Pointwise | str:
    """The kernel of a pointwise Region or node, or why there is none."""
    if len(region.outputs) != 1:
        return f"{len(region.outputs)} outputs"
    output = region.outputs[0]
    if output.dtype not in TRITON_TYPES:
        return f"output type {output.dtype}"
    used = [v for v in dict.fromkeys(v for n in region.nodes for v in n.inputs) if v is not None]
    outer = [v for v in used if any(v is f for f in region.formal)]
    names: dict[ir.Value, str] = {}
    pointers: list[ir.Value] = []
    for value in outer:
        text = scalar_text(region, value)
        if text is None:
            if value.dtype not in TRITON_TYPES:
                return f"input type {value.dtype}"
            text = f"x{len(pointers)}"
            pointers.append(value)
        names[value] = text
    space = space_of(region, output, pointers)
    if isinstance(space, str):
        return space
    if not pointers or not any(region.constant(v) is None for v in pointers):
        return "no computed tensor input"
    body = Body(region, names)
    for node in region.nodes:
        if not body.add(node):
            return f"no expression for {node.op_type} on these types"
    total = static_total(space)
    if total is not None and total >= 2**31:
        return f"{total} elements"
    lines = (*body.lines, f"result = {body.names[output]}")
    return Pointwise(space, tuple(pointers), output, lines, region)
