"""Epilogues of contractions of e4m3: sums are scaled, what follows is fp32, the result may be quantized again."""

from __future__ import annotations

from venturi.backends.cuda.codegen.requantize import Factor
from venturi.backends.cuda.codegen.tile import Operands, TileBody
from venturi.backends.real_view import Numbers, RealView

_LARGEST = 448.0


def read_fp8_tile(
    real: RealView, channel_axis: int, factor: Factor, summand: Factor | None, out: Numbers
) -> TileBody | str:
    """The epilogue of a quantized Region of e4m3. A sum times `factor`, plus `summand` is real; both have one element a
    column."""
    output, made = real.outputs[0], real.anchor.outputs[0]
    if len(real.outputs) != 1 or made.shape is None or list(output.shape or ()) != list(made.shape):
        return "more than one output, or the epilogue changes the shape"
    operands = Operands(real, channel_axis)
    scaled = f"acc * {operands.column(factor)}"
    start = [f"real = {scaled}" if summand is None else f"real = {scaled} + {operands.column(summand)}"]
    body = operands.read("real")
    if isinstance(body, str):
        return body
    result = body.names[real.nodes[-1].outputs[0]]
    if real.end is not None:
        stretched = f"{result} * {operands.number(1.0 / out.scale)}"
        nan = "propagate_nan=tl.PropagateNan.ALL"
        result = f"tl.minimum(tl.maximum({stretched}, -{_LARGEST}, {nan}), {_LARGEST}, {nan})"
    return TileBody(tuple(operands.columns), tuple(operands.tiles), (*start, *body.lines, f"result = {result}"), output)
