"""What a contraction kernel does with a tile of sums before storing it: the nodes after the anchor, as Triton text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from venturi.backends.base import RegionView
from venturi.backends.cuda.codegen.expressions import TRITON_TYPES, WIDE, Body
from venturi.backends.cuda.codegen.pointwise import scalar_text
from venturi.ir.build import static_shape


@dataclass(frozen=True)
class TileBody:
    """Statements from `acc` (fp32, [rows, columns]) to `result`.

    `columns` are constants with one element a column, `tiles` computed values of the output's own shape.
    """

    columns: tuple[ir.Value, ...]
    tiles: tuple[ir.Value, ...]
    lines: tuple[str, ...]
    output: ir.Value

    def load_columns(self, index: str, mask: str) -> list[str]:
        return [
            f"b{i} = tl.load(col{i} + {index}, mask={mask}, other=0.0).to(tl.float32)[None, :]"
            for i in range(len(self.columns))
        ]

    @property
    def arguments(self) -> list[str]:
        return [f"col{i}" for i in range(len(self.columns))] + [f"tile{i}" for i in range(len(self.tiles))]

    @property
    def values(self) -> tuple[ir.Value, ...]:
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
    names: dict[ir.Value, str] = {out: "acc"}
    columns: list[ir.Value] = []
    tiles: list[ir.Value] = []
    if bias is not None:
        columns.append(bias)
        names[out] = "biased"
    for node in region.nodes[1:]:
        for value in node.inputs:
            if value is None or value in names or not any(value is f for f in region.formal):
                continue
            text = _operand(region, value, out, channel_axis, columns, tiles)
            if text is None:
                return f"{node.op_type} reads {value.name!r}, neither one value a column nor of the output's shape"
            names[value] = text
    body = Body(region, names)
    if bias is not None:
        body.lines.append("biased = acc + b0")
    for node in region.nodes[1:]:
        if not body.add(node):
            return f"no expression for {node.op_type}"
    return TileBody(tuple(columns), tuple(tiles), (*body.lines, f"result = {body.names[output]}"), output)


def _operand(
    region: RegionView,
    value: ir.Value,
    out: ir.Value,
    axis: int,
    columns: list[ir.Value],
    tiles: list[ir.Value],
) -> str | None:
    text = scalar_text(region, value)
    if text is not None:
        return text
    if value.dtype not in TRITON_TYPES or value.dtype not in WIDE or value.shape is None:
        return None
    size, rank = static_shape_of(out, axis), len(out.shape or ())
    if region.is_constant(value) and is_column(static_shape(value), size, rank, axis):
        columns.append(value)
        return f"b{len(columns) - 1}"
    same = out.shape is not None and list(value.shape) == list(out.shape)
    if same and all(isinstance(d, int) or d.value is not None for d in value.shape):
        tiles.append(value)
        return f"t{len(tiles) - 1}"
    return None


def static_shape_of(value: ir.Value, axis: int) -> int | None:
    size = None if value.shape is None else value.shape[axis]
    return size if isinstance(size, int) else None


def is_column(shape: Sequence[int] | None, size: int | None, rank: int, axis: int) -> bool:
    """Whether a constant of `shape` has `size` elements, all along `axis` of a rank-`rank` value."""
    if shape is None or size is None or len(shape) > rank:
        return False
    full = [1] * (rank - len(shape)) + list(shape)
    return all(d == (size if i == axis % rank else 1) for i, d in enumerate(full))
