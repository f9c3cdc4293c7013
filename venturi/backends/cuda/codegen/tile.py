"""What a contraction kernel does with a tile of sums before storing it: the nodes after the anchor, as Triton text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch

from venturi.backends.base import RegionView
from venturi.backends.cuda.codegen.expressions import BYTE_LIMITS, STORE_TYPES, TRITON_TYPES, WIDE, Body
from venturi.backends.cuda.codegen.pointwise import scalar_text
from venturi.backends.real_view import Numbers, RealView
from venturi.ir.build import static_shape
from venturi.ir.dtypes import DT


@dataclass(frozen=True)
class Computed:
    """A column that no weight of the model is, or `scalars` numbers for the whole tile; fp32."""

    make: Callable[[], torch.Tensor]
    scalars: int = 0
    dtype: DT = DT.FLOAT


@dataclass(frozen=True)
class TileBody:
    """Statements from `acc` ([rows, columns]) to `result`.

    `columns` are constants with one element a column, `tiles` computed values of the output's own shape.
    """

    columns: tuple[ir.Value | Computed, ...]
    tiles: tuple[ir.Value, ...]
    lines: tuple[str, ...]
    output: ir.Value

    def load_columns(self, index: str, mask: str) -> list[str]:
        lines = []
        for i, column in enumerate(self.columns):
            if isinstance(column, Computed) and column.scalars:
                lines += [f"b{i}_{j} = tl.load(col{i} + {j})" for j in range(column.scalars)]
            else:
                lines.append(f"b{i} = tl.load(col{i} + {index}, mask={mask}, other=0.0).to(tl.float32)[None, :]")
        return lines

    def column_tensors(self, region: RegionView) -> list[torch.Tensor]:
        """What the columns' arguments point to, flat, where the weights are."""
        found = [v.make() if isinstance(v, Computed) else region.constant(v) for v in self.columns]
        return [t.reshape(-1).contiguous() for t in found]

    @property
    def arguments(self) -> list[str]:
        return [f"col{i}" for i in range(len(self.columns))] + [f"tile{i}" for i in range(len(self.tiles))]

    @property
    def values(self) -> tuple[ir.Value | Computed, ...]:
        return (*self.columns, *self.tiles)


def read_tile(region: RegionView, channel_axis: int, bias: ir.Value | None) -> TileBody | str:
    """The epilogue of `region`, whose anchor's output has its columns along `channel_axis`; `bias` is the anchor's own.

    A text says which node has no place in it.
    """
    anchor = region.anchor
    if len(region.outputs) != 1 or len(anchor.outputs) != 1:
        return "more than one output"
    output = region.outputs[0]
    out = anchor.outputs[0]
    if out.shape is None or output.dtype not in WIDE or list(output.shape or ()) != list(out.shape):
        return "the epilogue changes the shape or leaves floating point"
    operands = _Operands(region, channel_axis, [] if bias is None else [bias], [])
    body = operands.read("acc" if bias is None else "biased")
    if isinstance(body, str):
        return body
    start = [] if bias is None else ["biased = acc + b0"]
    lines = (*start, *body.lines, f"result = {body.names[output]}")
    return TileBody(tuple(operands.columns), tuple(operands.tiles), lines, output)


def read_quantized_tile(real: RealView, channel_axis: int, columns: Sequence[Computed], out: Numbers) -> TileBody | str:
    """The epilogue of a quantized Region. `columns` make a sum real: a factor, and a summand if there is one."""
    output, last = real.outputs[0], real.nodes[-1].outputs[0]
    made = real.anchor.outputs[0]
    if len(real.outputs) != 1 or made.shape is None or list(output.shape or ()) != list(made.shape):
        return "more than one output, or the epilogue changes the shape"
    operands = _Operands(real, channel_axis, list(columns), [])
    body = operands.read("real")
    if isinstance(body, str):
        return body
    lines = ["real = acc.to(tl.float32) * b0" + (" + b1" if len(columns) > 1 else ""), *body.lines]
    result = body.names[last]
    if real.end is not None:
        low, high = BYTE_LIMITS[out.dtype]
        at = operands.numbers(1.0 / out.scale, float(out.zero))
        result = f"_quantized({result} * b{at}_0, b{at}_1.to(tl.int32), {low}, {high}).to({STORE_TYPES[out.dtype]})"
    return TileBody(tuple(operands.columns), tuple(operands.tiles), (*lines, f"result = {result}"), output)


@dataclass
class _Operands:
    """What the nodes after an anchor read, found out while their statements are written."""

    region: RegionView
    axis: int
    columns: list[ir.Value | Computed]
    tiles: list[ir.Value]

    def read(self, start: str) -> Body | str:
        """The statements, `start` being the anchor's output."""
        out = self.region.anchor.outputs[0]
        body = Body(self.region, {out: start})
        for node in self.region.nodes[1:]:
            for value in node.inputs:
                if value is None or value in body.names or not self.region.is_input(value):
                    continue
                text = self._operand(value, out)
                if text is None:
                    return f"{node.op_type} reads {value.name!r}, neither one value a column nor of the output's shape"
                body.names[value] = text
        for node in self.region.nodes[1:]:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                if not self._round(node, body):
                    return f"{node.op_type} with more than one scale"
            elif not body.add(node):
                return f"no expression for {node.op_type}"
        return body

    def _operand(self, value: ir.Value, out: ir.Value) -> str | None:
        text = scalar_text(self.region, value)
        if text is not None:
            return text
        if value.dtype not in TRITON_TYPES or value.dtype not in WIDE or value.shape is None:
            return None
        size, rank = static_shape_of(out, self.axis), len(out.shape or ())
        if self.region.is_constant(value) and is_column(static_shape(value), size, rank, self.axis):
            quantized = isinstance(self.region, RealView) and self.region.dequantizer(value) is not None
            self.columns.append(Computed(lambda: self.region.constant(value)) if quantized else value)
            return f"b{len(self.columns) - 1}"
        same = out.shape is not None and list(value.shape) == list(out.shape)
        if not same or not all(isinstance(d, int) or d.value is not None for d in value.shape):
            return None
        back = self.region.dequantizer(value) if isinstance(self.region, RealView) else None
        return self._tile(value) if back is None else self._dequantized(back)

    def _tile(self, value: ir.Value) -> str:
        self.tiles.append(value)
        return f"t{len(self.tiles) - 1}"

    def _dequantized(self, back: ir.Node) -> str | None:
        assert isinstance(self.region, RealView)
        stored = back.inputs[0]
        found = self.region.numbers(back, stored)
        if found is None or stored is None:
            return None
        at = self.numbers(found.scale, float(found.zero))
        return f"(({self._tile(stored)} - b{at}_1) * b{at}_0)"

    def _round(self, node: ir.Node, body: Body) -> bool:
        """One of a QuantizeLinear and a DequantizeLinear between the ends; in between, integers of 32 bits."""
        given, made = node.inputs[0], node.outputs[0]
        quantizes = node.op_type == "QuantizeLinear"
        small = made if quantizes else given
        if not isinstance(self.region, RealView) or given is None or small is None or small.dtype not in BYTE_LIMITS:
            return False
        found = self.region.numbers(node, small)
        if found is None:
            return False
        at = self.numbers(1.0 / found.scale if quantizes else found.scale, float(found.zero))
        low, high = BYTE_LIMITS[found.dtype]
        x, name = body.names[given], f"v{len(body.names)}"
        text = f"_quantized({x} * b{at}_0, b{at}_1.to(tl.int32), {low}, {high})"
        body.lines.append(f"{name} = " + (text if quantizes else f"({x}.to(tl.float32) - b{at}_1) * b{at}_0"))
        body.names[made] = name
        return True

    def numbers(self, *numbers: float) -> int:
        """The index of a new column of single numbers, on the device where the first column is."""
        first = self.columns[0]
        assert isinstance(first, Computed)
        self.columns.append(Computed(lambda: torch.tensor(numbers).to(first.make().device), len(numbers)))
        return len(self.columns) - 1


def static_shape_of(value: ir.Value, axis: int) -> int | None:
    size = None if value.shape is None else value.shape[axis]
    return size if isinstance(size, int) else None


def is_column(shape: Sequence[int] | None, size: int | None, rank: int, axis: int) -> bool:
    """Whether a constant of `shape` has `size` elements, all along `axis` of a rank-`rank` value."""
    if shape is None or size is None or len(shape) > rank:
        return False
    full = [1] * (rank - len(shape)) + list(shape)
    return all(d == (size if i == axis % rank else 1) for i, d in enumerate(full))
