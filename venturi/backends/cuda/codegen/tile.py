"""What a contraction kernel does with a tile of sums before storing it: the nodes after the anchor, as Triton text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir
import torch

from venturi.backends.base import RegionView
from venturi.backends.cuda.codegen.expressions import TRITON_TYPES, WIDE, Body
from venturi.backends.cuda.codegen.pointwise import scalar_text
from venturi.backends.real_view import RealView
from venturi.ir.build import static_shape
from venturi.ir.dtypes import DT

# The bits of 1.5 * 2^23: as fp32, a number of few bits added to it is that number more than 1.5 * 2^23.
_START = 0x4B400000
RAISED_SUMS = f"(acc + {_START:#x})"


@dataclass(frozen=True)
class Computed:
    """A column that no weight of the model is, or `scalars` numbers for the whole tile; fp32."""

    make: Callable[[], torch.Tensor]
    scalars: int = 0
    dtype: DT = DT.FLOAT


@dataclass(frozen=True)
class TileBody:
    """Statements from `acc` ([rows, columns]) to `result`.

    `columns` are constants with one element a column, `tiles` computed values of the output's own shape. Sums begin at
    `start`.
    """

    columns: tuple[ir.Value | Computed, ...]
    tiles: tuple[ir.Value, ...]
    lines: tuple[str, ...]
    output: ir.Value
    start: int = 0

    def raised(self) -> TileBody:
        """The same, with what is added to all sums first as what they begin at."""
        lines = tuple(line.replace(RAISED_SUMS, "acc") for line in self.lines)
        return self if lines == self.lines else replace(self, lines=lines, start=_START)

    def first_sums(self, sums: str, layout: str, shape: str = "(BM, BN)") -> str:
        """What the sums begin at, in Gluon's words."""
        return (
            f"gl.full({shape}, {self.start:#x}, {sums}, {layout})"
            if self.start
            else f"gl.zeros({shape}, {sums}, {layout})"
        )

    def load_columns(self, index: str, mask: str) -> list[str]:
        """Of columns and single numbers."""
        return [*self.load_numbers(), *self.load_vectors(index, mask)]

    def load_numbers(self) -> list[str]:
        numbers = [(i, c.scalars) for i, c in enumerate(self.columns) if isinstance(c, Computed)]
        return [f"b{i}_{j} = tl.load(col{i} + {j})" for i, count in numbers for j in range(count)]

    def load_vectors(self, index: str, mask: str = "") -> list[str]:
        """Of columns; without a mask all are there."""
        wanted = [i for i, c in enumerate(self.columns) if not (isinstance(c, Computed) and c.scalars)]
        masked = f", mask={mask}, other=0.0" if mask else ""
        return [f"b{i} = tl.load(col{i} + {index}{masked}).to(tl.float32)[None, :]" for i in wanted]

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
    operands = Operands(region, channel_axis, [] if bias is None else [bias])
    body = operands.read("acc" if bias is None else "biased")
    if isinstance(body, str):
        return body
    start = [] if bias is None else ["biased = acc + b0"]
    lines = (*start, *body.lines, f"result = {body.names[output]}")
    return TileBody(tuple(operands.columns), tuple(operands.tiles), lines, output)


@dataclass
class Operands:
    """What the nodes after an anchor read, found out while their statements are written."""

    region: RegionView
    axis: int
    columns: list[ir.Value | Computed] = field(default_factory=list)
    tiles: list[ir.Value] = field(default_factory=list)

    def device(self) -> torch.device:
        """Where the weights are."""
        found = next(
            (self.region.constant(v) for v in self.region.formal if v is not None and self.region.is_constant(v)), None
        )
        return torch.device("cpu") if found is None else found.device

    def read(self, start: str) -> Body | str:
        """The statements of the nodes after the anchor, `start` being the anchor's output."""
        body = Body(self.region, {self.region.anchor.outputs[0]: start})
        for node in self.region.nodes[1:]:
            reason = self.bind(node, body)
            if reason:
                return reason
        for node in self.region.nodes[1:]:
            if not body.add(node):
                return f"no expression for {node.op_type}"
        return body

    def bind(self, node: ir.Node, body: Body) -> str:
        """Name what `node` reads from outside; a text says what has no place in a tile."""
        for value in node.inputs:
            if value is None or value in body.names or not self.region.is_input(value):
                continue
            text = self._operand(value, self.region.anchor.outputs[0])
            if text is None:
                return f"{node.op_type} reads {value.name!r}, neither one value a column nor of the output's shape"
            body.names[value] = text
        return ""

    def _operand(self, value: ir.Value, out: ir.Value) -> str | None:
        text = scalar_text(self.region, value)
        if text is not None:
            return text
        if value.dtype not in TRITON_TYPES or value.dtype not in WIDE or value.shape is None:
            return None
        size, rank = static_shape_of(out, self.axis), len(out.shape or ())
        if self.region.is_constant(value) and is_column(static_shape(value), size, rank, self.axis):
            if isinstance(self.region, RealView) and self.region.dequantizer(value) is not None:
                return self.column(lambda: self.region.constant(value))
            self.columns.append(value)
            return f"b{len(self.columns) - 1}"
        same = out.shape is not None and list(value.shape) == list(out.shape)
        if not same or not all(isinstance(d, int) or d.value is not None for d in value.shape):
            return None
        back = self.region.dequantizer(value) if isinstance(self.region, RealView) else None
        return self.tile(value) if back is None else self._dequantized(back)

    def tile(self, value: ir.Value) -> str:
        self.tiles.append(value)
        return f"t{len(self.tiles) - 1}"

    def _dequantized(self, back: ir.Node) -> str | None:
        assert isinstance(self.region, RealView)
        stored = back.inputs[0]
        found = self.region.numbers(back, stored)
        if found is None or stored is None:
            return None
        scale, zero = self.number(found.scale), self.number(float(found.zero))
        return f"(({self.tile(stored)} - {zero}) * {scale})"

    def number(self, x: float) -> str:
        """The variable of a number that is an argument of the kernel: layers that differ in it share machine code."""
        return self.column(lambda: torch.tensor([x]), 1)

    def column(self, make: Callable[[], torch.Tensor], scalars: int = 0) -> str:
        """The variable of a computed column, or of one number."""
        self.columns.append(Computed(lambda: make().float().to(self.device()), scalars))
        return f"b{len(self.columns) - 1}" + ("_0" if scalars else "")


def static_shape_of(value: ir.Value, axis: int) -> int | None:
    size = None if value.shape is None else value.shape[axis]
    return size if isinstance(size, int) else None


def is_column(shape: Sequence[int] | None, size: int | None, rank: int, axis: int) -> bool:
    """Whether a constant of `shape` has `size` elements, all along `axis` of a rank-`rank` value."""
    if shape is None or size is None or len(shape) > rank:
        return False
    full = [1] * (rank - len(shape)) + list(shape)
    return all(d == (size if i == axis % rank else 1) for i, d in enumerate(full))
