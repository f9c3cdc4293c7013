"""Convolutions with their epilogue: oneDNN's fused primitive on packed weights, ATen in either layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from venturi.backends.base import Config, Kernel, RegionView
from venturi.backends.cpu import onednn
from venturi.backends.cpu.epilogue import Activation, Epilogue, read_epilogue
from venturi.ops.conv import CONV

T = torch.Tensor
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class ConvSpec:
    """A Conv anchor with constant weights: everything a kernel needs but the input."""

    weight: T
    bias: T | None
    strides: list[int]
    pads: list[int]
    before: list[int] | None
    dilations: list[int]
    group: int
    epilogue: Epilogue

    def pad(self, x: T) -> T:
        return x if self.before is None else F.pad(x, self.before)


def read_conv(region: RegionView) -> ConvSpec | str:
    node = region.anchor
    if node.op_type != "Conv" or node.domain:
        return "the anchor is not Conv"
    weight = region.constant(node.inputs[1])
    bias_value = node.inputs[2] if len(node.inputs) > 2 else None
    bias = region.constant(bias_value)
    if weight is None or (bias_value is not None and bias is None):
        return "weights are computed at run time"
    if region.position(node.inputs[0]) != 0:
        return "the input is not the first dynamic value"
    if not weight.dtype.is_floating_point:
        return f"weights are {weight.dtype}"
    attrs = region.attrs(node)
    n = weight.dim() - 2
    if attrs.get("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER"):
        return "auto_pad SAME depends on the input size"
    pads = attrs.get("pads") or [0] * 2 * n
    pads = [0] * 2 * n if attrs.get("auto_pad") == "VALID" else pads
    even = pads[:n] == pads[n:] and min(pads, default=0) >= 0
    before = None if even else [p for i in reversed(range(n)) for p in (pads[i], pads[i + n])]
    epilogue = read_epilogue(region)
    if isinstance(epilogue, str):
        return epilogue
    if epilogue.bias is not None:
        return "bias as a separate Add"
    return ConvSpec(
        weight, bias, attrs.get("strides") or [1] * n, pads[:n] if even else [0] * n, before,
        attrs.get("dilations") or [1] * n, attrs.get("group", 1), epilogue,
    )  # fmt: skip


class OneDnnConv:
    """One call: convolution, bias, residual add and activation on blocked weights; activations stay NHWC."""

    name = "onednn-conv"

    def match(self, region: RegionView) -> list[Config] | str:
        spec = read_conv(region)
        if isinstance(spec, str):
            return spec
        if spec.weight.dim() not in (4, 5) or not onednn.has_fused_conv() or not onednn.computes(spec.weight.dtype):
            return f"oneDNN has no fused {spec.weight.dim() - 2}-D convolution in {spec.weight.dtype} here"
        if spec.weight.numel() == 0:
            return "empty weights"
        return _spreads_infinity(spec) or [{}]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        spec = read_conv(region)
        assert isinstance(spec, ConvSpec)
        size = [1, spec.weight.shape[1] * spec.group, *[64] * (spec.weight.dim() - 2)]
        packed = torch.ops.mkldnn._reorder_convolution_weight(
            spec.weight.contiguous(), spec.pads, spec.strides, spec.dilations, spec.group, size
        )
        geometry = (packed, spec.bias, spec.pads, spec.strides, spec.dilations, spec.group)
        layout = _FORMATS[spec.weight.dim()]
        act, residual = spec.epilogue.activation, spec.epilogue.residual
        if residual is not None and not spec.epilogue.activation_first:
            return Kernel(_guard_empty(_conv_add(spec, geometry, layout, residual, act), region), reads=layout)
        post = ("none", [], "") if act is None else act.onednn()
        plain = torch.ops.mkldnn._convolution_pointwise

        def run(*args: Any) -> T:
            x = spec.pad(args[0]).contiguous(memory_format=layout)
            if post is not None:
                y: T = plain(x, *geometry, *post)
            else:
                assert act is not None
                y = act.apply_(plain(x, *geometry, "none", [], ""))
            return y if residual is None else y.add_(args[residual])

        return Kernel(_guard_empty(run, region), reads=layout)


def _conv_add(spec: ConvSpec, geometry: Any, layout: torch.memory_format, residual: int, act: Activation | None) -> Any:
    """Convolution with the residual added in the primitive; the activation after it in place."""
    binary = torch.ops.mkldnn._convolution_pointwise.binary

    def run(*args: Any) -> T:
        x, other = spec.pad(args[0]).contiguous(memory_format=layout), args[residual]
        y: T = binary(x, other.contiguous(memory_format=layout), *geometry, "add", 1.0, None, [], "")
        return y if act is None else act.apply_(y)

    return run


def _guard_empty(run: Any, region: RegionView) -> Any:
    """oneDNN refuses empty batches; the reference defines them."""
    from venturi.backends.cpu.tactics.reference import Reference

    empty = Reference().bind(region, {}).run
    return lambda *args: run(*args) if args[0].numel() else empty(*args)


def _spreads_infinity(spec: ConvSpec) -> str:
    """Why oneDNN's NHWC convolution is wrong for inputs that are not finite; empty when it is right."""
    channels = spec.weight.shape[1]
    if channels % 2 == 0 or onednn.pairs_channels_cleanly(spec.weight.dtype):
        return ""
    return f"oneDNN makes NaN of infinities where {channels} channels, an odd number, end"


class AtenConv:
    """torch's own convolution in one layout, epilogue in place."""

    def __init__(self, channels_last: bool) -> None:
        self.name = "aten-conv-nhwc" if channels_last else "aten-conv-nchw"
        self._channels_last = channels_last

    def match(self, region: RegionView) -> list[Config] | str:
        spec = read_conv(region)
        if isinstance(spec, str):
            return spec
        if self._channels_last and spec.weight.dim() not in _FORMATS:
            return "NHWC needs 2 or 3 spatial dimensions"
        if not self._channels_last and region.layout == "NHWC":
            return "the layout pass assigned NHWC"
        return (_spreads_infinity(spec) if self._channels_last else "") or [{}]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        spec = read_conv(region)
        assert isinstance(spec, ConvSpec)
        layout = _FORMATS[spec.weight.dim()] if self._channels_last else torch.contiguous_format
        weight = spec.weight.contiguous(memory_format=layout)
        fn = CONV[weight.dim() - 2]

        def run(*args: Any) -> T:
            x = spec.pad(args[0]).contiguous(memory_format=layout)
            y = fn(x, weight, spec.bias, spec.strides, spec.pads, spec.dilations, spec.group)
            return spec.epilogue.apply_(y, args)

        return Kernel(_guard_empty(run, region), reads=layout)
