"""Contractions of bytes (Q/DQ models): what stands around the sums that the same kernels compute of halves."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch

from venturi.backends.base import RegionView
from venturi.backends.cuda.codegen.fp8 import read_fp8_tile
from venturi.backends.cuda.codegen.requantize import read_quantized_tile
from venturi.backends.cuda.codegen.tile import TileBody
from venturi.backends.real_view import Numbers, RealView
from venturi.ir.dtypes import DT
from venturi.ir.quantization import FP8

T = torch.Tensor
_RESULTS = (DT.INT8, DT.UINT8, DT.FLOAT, FP8)


@dataclass(frozen=True)
class Ends:
    """`weight` is the formal input behind weights, whose outputs lie along `axis` and have `scales`."""

    real: RealView
    image: Numbers
    out: Numbers
    weight: ir.Value
    axis: int
    scales: T

    @property
    def dtype(self) -> DT:
        """Of both operands."""
        return self.image.dtype

    def tile(self, channel_axis: int, bias: ir.Value | None) -> TileBody | str:
        """The epilogue, with the anchor's own bias; the result has its columns along `channel_axis`."""
        summand = None if bias is None and not self.image.zero else lambda: self._summand(bias)
        if self.dtype == FP8:
            return read_fp8_tile(self.real, channel_axis, self._factor, summand, self.out)
        return read_quantized_tile(self.real, channel_axis, self._depth(), self._factor, summand, self.out)

    def _depth(self) -> int:
        stored: T = RegionView.constant(self.real, self.weight)
        return stored.numel() // stored.shape[self.axis]

    def _factor(self) -> T:
        return self.scales.double() * self.image.scale

    def _summand(self, bias: ir.Value | None) -> T:
        """[outputs]: the bias less what the image's zero adds to every sum."""
        stored: T = RegionView.constant(self.real, self.weight)
        others = [i for i in range(stored.dim()) if i != self.axis]
        total = -float(self.image.zero) * self._factor() * stored.double().sum(others)
        return total if bias is None else total + self.real.constant(bias).double().reshape(-1)


def read_ends(real: RealView, axis: int) -> Ends | str:
    """Of a quantized Region of signed bytes or e4m3 whose constant weights have their outputs along `axis`."""
    image, weight = (real.dequantizer(v) for v in real.anchor.inputs[:2])
    if image is None or weight is None or weight.inputs[0] is None:
        return "operands that are not dequantized"
    given = real.numbers(image, image.inputs[0])
    out = real.numbers(real.end, real.outputs[0])
    if given is None or out is None or out.dtype not in _RESULTS or (out.dtype == DT.FLOAT) != (real.end is None):
        return "inputs or outputs have more than one scale"
    if given.dtype not in (DT.INT8, FP8) or weight.inputs[0].dtype != given.dtype:
        return "the operands are not both signed bytes or e4m3"
    if out.dtype != DT.FLOAT and (out.dtype == FP8) != (given.dtype == FP8):
        return "the result is of another kind than the operands"
    scales = real.weight_scales(axis, int(real.stored(real.anchor.inputs[1]).shape[axis]))
    return scales if isinstance(scales, str) else Ends(real, given, out, weight.inputs[0], axis, scales)
