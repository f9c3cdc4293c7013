"""What convolutions of floating point read: an image, constant weights, perhaps a constant bias."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from venturi.backends.base import RegionView
from venturi.backends.cuda.codegen.element import FLOATS, Element
from venturi.ir.build import static_shape


@dataclass(frozen=True)
class ConvOperands:
    """`shape` is the weight's, `first` the image's place among the Region's dynamic inputs."""

    image: ir.Value
    weight: ir.Value
    shape: tuple[int, ...]
    bias: ir.Value | None
    element: Element
    first: int


def read_operands(region: RegionView, op_type: str, dims: int) -> ConvOperands | str:
    """Of an anchor of `op_type` over `dims` dimensions; or why it is none."""
    node = region.anchor
    if node.domain or node.op_type != op_type:
        return f"the anchor is not {op_type}"
    image, weight = node.inputs[0], node.inputs[1]
    first = region.position(image)
    if image is None or weight is None or not region.is_constant(weight) or first is None:
        return "weights are computed at run time"
    shape, dtype = static_shape(weight), weight.dtype
    if shape is None or len(shape) != dims + 2 or 0 in shape:
        return f"not a {dims}-D convolution"
    if dtype not in FLOATS or image.dtype != dtype:
        return "not floating point"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and not region.is_constant(bias):
        return "bias computed at run time"
    return ConvOperands(image, weight, tuple(shape), bias, Element(dtype, region.tf32), first)
