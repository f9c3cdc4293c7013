"""One Triton kernel for a cluster around a reduction over the last dimensions: a block of rows in registers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from venturi.backends.base import RegionView
from venturi.backends.cuda.codegen.expressions import TRITON_TYPES, Body, comment, loaded, rounded
from venturi.backends.cuda.codegen.module import constexprs, module, pointer_type
from venturi.backends.cuda.codegen.pointwise import extent, scalar_text
from venturi.backends.cuda.codegen.space import Space, space_of
from venturi.backends.cuda.kernel import KernelSource
from venturi.ir.build import get_attr

MAX_COLUMNS = 16384


@dataclass(frozen=True)
class Rows:
    """A generated kernel over [rows, columns]; `columns` is fixed, rows are not."""

    space: Space
    columns: int
    pointers: tuple[ir.Value, ...]
    output: ir.Value
    lines: tuple[str, ...]
    region: RegionView

    def source(self, rows: int, warps: int, arch: int) -> KernelSource:
        arguments = [f"in{i}" for i in range(len(self.pointers))] + ["out0", "num_rows"]
        lead = len(self.space.axes) - 1
        runtime = [f"s{i}" for i in range(1, lead) if self.space.axes[i].size is None]
        width = next_power_of_2(self.columns)
        lines = [
            f"column = tl.arange(0, {width})[None, :]",
            "row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]",
            f"inside = column < {self.columns}",
            "mask = inside & (row < num_rows)",
            *self._indices(),
            *self._loads(),
            *self.lines,
            f"at = row.to(tl.int64) * {self.columns} + column",
            f"tl.store(out0 + at, {rounded('result', self.output.dtype)}, mask=mask)",
        ]
        text = module(self.region, "rows", [*arguments, *runtime, *constexprs("ROWS")], lines, arch)
        types = [pointer_type(v.dtype) for v in (*self.pointers, self.output)]
        signature = [*zip(arguments, [*types, "i32"]), *((s, "i32") for s in runtime), ("ROWS", "constexpr")]
        return KernelSource("rows", text, tuple(signature), (("ROWS", rows),), tuple(arguments[:-1]), warps, 1, arch)

    def _indices(self) -> list[str]:
        lead = len(self.space.axes) - 1
        lines, rest = [], "row"
        for i in reversed(range(1, lead)):
            lines += [f"i{i} = {rest} % {extent(self.space, i)}", f"r{i} = {rest} // {extent(self.space, i)}"]
            rest = f"r{i}"
        return [*lines, f"i0 = {rest}"] if lead else []

    def _loads(self) -> list[str]:
        lines = []
        lead = len(self.space.axes) - 1
        for i, value in enumerate(self.pointers):
            stride = [str(self.columns)] if self.space.axes[-1].spans[i] else []
            terms = ["column"] if self.space.axes[-1].spans[i] else []
            for a in reversed(range(lead)):
                if self.space.axes[a].spans[i]:
                    terms.append(" * ".join([f"i{a}.to(tl.int64)", *stride]))
                    stride.append(extent(self.space, a))
            guard = "mask" if self.space.axes[-1].spans[i] else "row < num_rows"
            where = " + ".join(terms) if terms else "0"
            load = f"tl.load(in{i} + {where}, mask={guard}, other=0.0)" if terms else f"tl.load(in{i})"
            lines.append(f"x{i} = {loaded(load, value.dtype)}{comment(value.name)}")
        return lines


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _softmax(body: Body, node: ir.Node, columns: int) -> list[str]:
    x = body.names[node.inputs[0]]  # type: ignore[index]
    lines = [
        f'shifted = {x} - tl.max(tl.where(inside, {x}, float("-inf")), 1, keep_dims=True)',
        "power = tl.where(inside, tl.exp(shifted), 0.0)",
        "total = tl.sum(power, 1, keep_dims=True)",
    ]
    result = "power / total" if node.op_type == "Softmax" else "shifted - tl.log(total)"
    return [*lines, f"normed = {result}"]


def _layer_norm(body: Body, node: ir.Node, columns: int) -> list[str]:
    x, scale = body.names[node.inputs[0]], body.names[node.inputs[1]]  # type: ignore[index]
    epsilon = float(get_attr(node, "epsilon", 1e-5))
    lines = [
        f"mean = tl.sum(tl.where(inside, {x}, 0.0), 1, keep_dims=True) / {columns}",
        f"centered = tl.where(inside, {x} - mean, 0.0)",
        f"variance = tl.sum(centered * centered, 1, keep_dims=True) / {columns}",
        f"normed = centered / tl.sqrt_rn(variance + {epsilon!r}) * {scale}",
    ]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        lines.append(f"normed = normed + {body.names[node.inputs[2]]}")
    return lines


def _rms_norm(body: Body, node: ir.Node, columns: int) -> list[str]:
    x, scale = body.names[node.inputs[0]], body.names[node.inputs[1]]  # type: ignore[index]
    epsilon = float(get_attr(node, "epsilon", 1e-5))
    return [
        f"square = tl.sum(tl.where(inside, {x} * {x}, 0.0), 1, keep_dims=True) / {columns}",
        f"normed = {x} / tl.sqrt_rn(square + {epsilon!r}) * {scale}",
    ]


_EMIT: dict[str, Callable[[Body, ir.Node, int], list[str]]] = {
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
}


def _tail(node: ir.Node) -> int | str:
    """How many trailing dimensions the node reduces."""
    value = node.inputs[0]
    if value is None or value.shape is None:
        return "a shape of unknown rank"
    rank = len(value.shape)
    axis = int(get_attr(node, "axis", -1)) % max(rank, 1)
    if node.op_type in ("Softmax", "LogSoftmax"):
        return 1 if axis == rank - 1 else "not along the last dimension"
    return rank - axis


def read_rows(region: RegionView) -> Rows | str:
    """The kernel of a Region (or node) with one row reduction, or why there is none."""
    found = [n for n in region.nodes if n.op_type in _EMIT and not n.domain]
    if len(found) != 1:
        return f"{len(found)} row reductions"
    if len(region.outputs) != 1 and len(region.nodes) > 1:
        return f"{len(region.outputs)} outputs"
    anchor, output = found[0], region.outputs[0]
    if any(v.uses() or v.is_graph_output() for v in anchor.outputs[1:]):
        return "more than the normalized output is read"
    tail = _tail(anchor)
    if isinstance(tail, str):
        return tail
    if output.dtype not in TRITON_TYPES or output.shape is None:
        return f"output type {output.dtype}"
    source = anchor.inputs[0]
    assert source is not None
    if source.shape is None or list(source.shape) != list(output.shape):
        return "the reduced value has another shape than the output"
    names: dict[ir.Value, str] = {}
    pointers: list[ir.Value] = []
    used = [v for v in dict.fromkeys(v for n in region.nodes for v in n.inputs) if v is not None]
    for value in (v for v in used if any(v is f for f in region.formal)):
        text = scalar_text(region, value)
        if text is None:
            if value.dtype not in TRITON_TYPES:
                return f"input type {value.dtype}"
            text = f"x{len(pointers)}"
            pointers.append(value)
        names[value] = text
    space = space_of(region, output, pointers, tail)
    if isinstance(space, str):
        return space
    columns = space.axes[-1].size if space.axes else None
    if columns is None or not 0 < columns <= MAX_COLUMNS or len(space.axes[-1].dims) != tail:
        return f"rows of {columns} elements (fixed, at most {MAX_COLUMNS}, no broadcasting inside)"
    body = Body(region, names)
    for node in region.nodes:
        if node is anchor:
            body.lines += _EMIT[node.op_type](body, node, columns)
            body.names[node.outputs[0]] = "normed"
        elif not body.add(node):
            return f"no expression for {node.op_type} on these types"
    lines = (*body.lines, f"result = {body.names[output]}")
    return Rows(space, columns, tuple(pointers), output, lines, region)
