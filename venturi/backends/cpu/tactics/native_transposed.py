"""Transposed convolutions whose kernel is as large as their stride, by generated code.

Every pixel makes a block of its own, so each row of a block is a product over the image's pixels. Its results are whole
rows of the output, with those of the block's other rows between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from venturi.backends.base import Config, Kernel, RegionView, Routine
from venturi.backends.cpu.codegen.element import BF16, OF_TORCH
from venturi.backends.cpu.codegen.geometry import ConvGeometry, Stretch
from venturi.backends.cpu.codegen.isa import Isa, host
from venturi.backends.cpu.epilogue import Epilogue, read_epilogue
from venturi.backends.cpu.native.contraction import Contraction, Direct, direct_configs, post_of
from venturi.backends.cpu.native.kernel import NativeKernel, Shapes
from venturi.backends.cpu.native.matrix import MOST_TAPS, Matrix, matrix_configs
from venturi.backends.cpu.native.openmp import max_threads
from venturi.ir.build import static_shape

T = torch.Tensor


@dataclass(frozen=True)
class TransposedSpec:
    """`weight` is [channels, outputs, rows, columns] of a block."""

    weight: T
    bias: T | None
    epilogue: Epilogue

    def row(self, number: int) -> tuple[T, T | None]:
        """(weight, bias) of the product that makes row `number` of all blocks: outputs are [columns, outputs]."""
        channels, _, _, columns = self.weight.shape
        weight = self.weight[:, :, number].permute(2, 1, 0).reshape(-1, channels, 1, 1).contiguous()
        return weight, None if self.bias is None else self.bias.repeat(columns)

    def plainly(self, *args: T) -> T:
        """By torch, for what generated code does not take."""
        y = F.conv_transpose2d(args[0], self.weight, self.bias, self.weight.shape[2:])
        return self.epilogue.apply_(y, args)


def read_native_transposed(region: RegionView) -> tuple[Isa, TransposedSpec] | str:
    """In fp32, or in bf16 where the CPU multiplies it; or why it is none."""
    node, isa = region.anchor, host()
    if isinstance(isa, str):
        return isa
    if node.op_type != "ConvTranspose" or node.domain:
        return "the anchor is not ConvTranspose"
    weight, bias_value = region.constant(node.inputs[1]), node.inputs[2] if len(node.inputs) > 2 else None
    bias = region.constant(bias_value)
    if weight is None or (bias_value is not None and bias is None) or region.position(node.inputs[0]) != 0:
        return "weights are computed at run time, or the input is not the first dynamic value"
    element = OF_TORCH.get(weight.dtype)
    if weight.dim() != 4 or weight.numel() == 0 or weight.dtype not in (torch.float32, torch.bfloat16):
        return "not a 2-D convolution in fp32 or bf16"
    if element == BF16 and (not isa.unit(quantized=False) or weight.shape[0] > MOST_TAPS):
        return "the CPU does not multiply bf16"
    attrs, kernel = region.attrs(node), list(weight.shape[2:])
    plain = (attrs.get("group", 1), attrs.get("auto_pad", "NOTSET"), attrs.get("output_shape")) == (1, "NOTSET", None)
    moved = [*(attrs.get("pads") or []), *(attrs.get("output_padding") or [])]
    if not plain or any(moved) or max(attrs.get("dilations") or [1]) > 1 or (attrs.get("strides") or [1, 1]) != kernel:
        return "blocks overlap, are cut or are apart"
    epilogue = read_epilogue(region)
    if isinstance(epilogue, str) or epilogue.bias is not None:
        return epilogue if isinstance(epilogue, str) else "bias as a separate Add"
    post = post_of(epilogue)
    return post if isinstance(post, str) else (isa, TransposedSpec(weight, bias, epilogue))


class NativeTransposed:
    """Upsampling by learned blocks, as U-Nets do it."""

    name = "native-transposed"

    def match(self, region: RegionView) -> list[Config] | str:
        found = read_native_transposed(region)
        if isinstance(found, str):
            return found
        (isa, spec), size = found, static_shape(region.anchor.inputs[0])
        shape = spec.row(0)[0].shape
        pixels = None if size is None else size[0] * size[2] * size[3]
        if spec.weight.dtype == torch.bfloat16:
            return list(matrix_configs(shape, pixels, max_threads(), isa.unit(quantized=False)))
        return list(direct_configs(isa, shape, pixels, pixels, tiles=1))

    def bind(self, region: RegionView, config: Config) -> Kernel:
        found = read_native_transposed(region)
        assert not isinstance(found, str)
        isa, spec = found
        way: Any = Matrix if spec.weight.dtype == torch.bfloat16 else Direct
        _, outputs, times, columns = spec.weight.shape
        rows: list[Contraction] = [way(isa, *spec.row(r), spec.epilogue, config) for r in range(times)]

        def plan(shapes: Shapes) -> Routine | None:
            batch, channels, height, width = shapes[0]
            shape = (batch, outputs, height * times, width * columns)
            residual = spec.epilogue.residual
            if 0 in shapes[0] or (residual is not None and shapes[residual] != shape):
                return None
            made = []
            for number, contraction in enumerate(rows):
                stretch = Stretch(width, times, number)
                geometry = ConvGeometry(height, width, channels, outputs * columns, stretch=stretch)
                made.append(contraction.routine(geometry, batch, shape, [torch.channels_last] * len(shapes)))
            phases = tuple(p for m in made for p in m.phases)
            return Routine(phases, shape, made[0].layout, made[0].layouts, dtype=made[0].dtype)

        return NativeKernel(plan, spec.plainly).as_kernel()
