"""A quantized Region seen as if its numbers were real: what contractions of bytes have in common on all devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from venturi.backends.base import RegionView
from venturi.ir.build import get_attr
from venturi.ir.dtypes import DT
from venturi.ir.quantization import BYTES, FP8
from venturi.ops.quantize import dequantize_linear

_SMALL = (*BYTES, FP8)


@dataclass(frozen=True)
class Numbers:
    """What the elements of a tensor stand for: (stored - zero) * scale."""

    dtype: DT
    scale: float = 1.0
    zero: int = 0


class RealView(RegionView):
    """A Region of kind "quantized" without its ends: what is dequantized in it are its inputs and constants.

    Pairs of QuantizeLinear and DequantizeLinear between the ends stay."""

    def __init__(self, region: RegionView) -> None:
        made = {v for n in region.nodes for v in n.outputs}
        back = [n for n in region.nodes if n.op_type == "DequantizeLinear" and n.inputs[0] not in made]
        self._back = {n.outputs[0]: n for n in back}
        self.__dict__.update(vars(region))
        self.end = self.nodes[-1] if self.nodes[-1].op_type == "QuantizeLinear" else None
        self.nodes = [n for n in self.nodes if n not in back and n is not self.end]

    def dequantizer(self, value: ir.Value | None) -> ir.Node | None:
        return None if value is None else self._back.get(value)

    def reader(self, value: ir.Value) -> ir.Node | None:
        """The node that dequantizes an input."""
        return next((n for n in self._back.values() if n.inputs[0] is value), None)

    def is_input(self, value: ir.Value) -> bool:
        return value in self._back or super().is_input(value)

    def stored(self, value: ir.Value | None) -> Any:
        """The integers behind a dequantized constant."""
        back = self.dequantizer(value)
        return None if back is None else super().constant(back.inputs[0])

    def constant(self, value: ir.Value | None) -> Any:
        back = self.dequantizer(value)
        if back is None:
            return super().constant(value)
        parts = [super(RealView, self).constant(v) for v in back.inputs]
        return None if any(p is None for p in parts) else dequantize_linear(*parts, axis=int(get_attr(back, "axis", 1)))

    def is_constant(self, value: ir.Value | None) -> bool:
        back = self.dequantizer(value)
        return super().is_constant(value if back is None else back.inputs[0])

    def position(self, value: ir.Value | None) -> int | None:
        back = self.dequantizer(value)
        return super().position(value if back is None else back.inputs[0])

    def numbers(self, node: ir.Node | None, value: ir.Value | None) -> Numbers | None:
        """Of `value`, bytes that `node` (de)quantizes with one scale; without a node, of floating point."""
        kind = None if value is None else value.dtype
        if node is None or kind is None:
            return None if kind is None else Numbers(kind)
        scale = super().constant(node.inputs[1])
        zero = super().constant(node.inputs[2]) if len(node.inputs) > 2 else torch.zeros(1)
        if kind not in _SMALL or scale is None or zero is None or scale.numel() != 1 or zero.numel() != 1:
            return None
        return Numbers(kind, float(scale), int(zero.float()))

    def weight_scales(self, axis: int, count: int) -> torch.Tensor | str:
        """[count]: of symmetric weights of the anchor, int8 or e4m3, one or `count` along `axis`; or why not."""
        back = self.dequantizer(self.anchor.inputs[1])
        stored = self.stored(self.anchor.inputs[1])
        if (
            back is None
            or stored is None
            or stored.dtype not in (torch.int8, torch.float8_e4m3fn)
            or get_attr(back, "block_size", 0)
        ):
            return "weights are neither int8 nor e4m3"
        scale = super().constant(back.inputs[1])
        zero = super().constant(back.inputs[2]) if len(back.inputs) > 2 else None
        if scale is None or scale.dtype != torch.float32 or (zero is not None and bool((zero.float() != 0).any())):
            return "weights are not symmetric, or their scale is not a constant in fp32"
        if scale.numel() == 1:
            return scale.reshape(1).expand(count).contiguous()  # type: ignore[no-any-return]
        if scale.numel() != count or int(get_attr(back, "axis", 1)) % stored.dim() != axis:
            return "weights have scales along another axis than the output's"
        found: torch.Tensor = scale.reshape(-1)
        return found
