"""3-D convolutions as cuDNN plans with bias, residual and activation fused, channels last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from venturi.backends.base import Config, Kernel, RegionView
from venturi.backends.cuda.codegen.element import FLOATS, Element
from venturi.backends.cuda.codegen.tile import TileBody, read_tile
from venturi.backends.cuda.lib.cudnn import ConvPlan, ConvProblem
from venturi.backends.cuda.tactics.cudnn import MAX_PLANS, steps_of
from venturi.backends.cuda.tactics.products import TileOperands
from venturi.backends.cuda.tactics.reference import DeviceReference
from venturi.ir.build import static_shape
from venturi.kernels.cudnn import frontend
from venturi.ops.tensors import STORAGE

T = torch.Tensor
_LAST = torch.channels_last_3d


@dataclass(frozen=True)
class Volumes:
    problem: ConvProblem
    weight: ir.Value
    tile: TileBody
    first: int


def read_volumes(region: RegionView) -> Volumes | str:
    """Of floating point and fixed shapes, with constant weights [outputs, channels / groups, D, H, W]; or why it is
    none."""
    node = region.anchor
    if node.domain or node.op_type != "Conv":
        return "the anchor is not Conv"
    x, weight, attrs = node.inputs[0], node.inputs[1], region.attrs(node)
    if x is None or weight is None or not region.is_constant(weight) or region.position(x) is None:
        return "weights are computed at run time"
    image, shape, output = static_shape(x), static_shape(weight), static_shape(node.outputs[0])
    if shape is None or len(shape) != 5:
        return "not a 3-D convolution"
    if image is None or output is None or 0 in (*image, *shape, *output):
        return "cuDNN plans need fixed shapes"
    dtype = weight.dtype
    if dtype not in FLOATS or x.dtype != dtype or region.outputs[0].dtype != dtype:
        return "not floating point, or another output type"
    groups, unit = attrs.get("group", 1), Element(dtype, region.tf32).aligned
    if any(n % unit for n in (image[1], shape[0], image[1] // groups)):
        return f"{image[1]} to {shape[0]} channels in {groups} groups: multiples of {unit} are needed"
    pads = attrs.get("pads") or [0] * 6
    if attrs.get("auto_pad", "NOTSET") != "NOTSET" or pads[:3] != pads[3:] or min(pads) < 0:
        return "pads differ from side to side"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and not region.is_constant(bias):
        return "bias computed at run time"
    tile = read_tile(region, 1, bias)
    if isinstance(tile, str):
        return tile
    steps = steps_of(region, tile)
    if isinstance(steps, str):
        return steps
    strides, dilations = attrs.get("strides") or [1, 1, 1], attrs.get("dilations") or [1, 1, 1]
    problem = ConvProblem(
        tuple(image), tuple(shape), tuple(output), tuple(pads[:3]), tuple(strides), tuple(dilations), STORAGE[dtype],
        steps, region.tf32,
    )  # fmt: skip
    return Volumes(problem, weight, tile, region.position(x) or 0)


class CudnnVolumes:
    """Every plan that cuDNN offers is a candidate, up to a limit. Results have the channels last."""

    name = "cudnn-conv-3d"

    def match(self, region: RegionView) -> list[Config] | str:
        if frontend() is None:
            return "nvidia-cudnn-frontend is not installed"
        found = read_volumes(region)
        return found if isinstance(found, str) else [{"plan": i} for i in range(MAX_PLANS)]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        made = read_volumes(region)
        assert isinstance(made, Volumes)
        problem, operands = made.problem, TileOperands(region, made.tile)
        plan, fallback = ConvPlan(problem, config["plan"]), DeviceReference().bind(region, {}).run
        weight: T = region.constant(made.weight).contiguous(memory_format=_LAST)

        def run(*args: Any) -> Any:
            x: T = args[made.first]
            if tuple(x.shape) != problem.image:
                return fallback(*args)
            out = torch.empty(problem.output, dtype=x.dtype, device=x.device, memory_format=_LAST)
            tiles = [t.contiguous(memory_format=_LAST) for t in operands.tiles(args)]
            plan.run(x.contiguous(memory_format=_LAST), weight, out, [*operands.columns, *tiles])
            return out

        return Kernel(run)
