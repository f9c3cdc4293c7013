"""Attention as our own tiled Triton kernel on strided heads: no copies before or after it."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch

from venturi.backends.base import Arguments, Config, Kernel, RegionView
from venturi.backends.cuda.codegen.attention import AttentionConfig, AttentionShape, attention_source
from venturi.backends.cuda.codegen.element import FLOATS, Element
from venturi.backends.cuda.device import KernelDevice
from venturi.backends.cuda.kernel import KernelSource
from venturi.backends.cuda.tactics.reference import DeviceReference
from venturi.backends.sdpa import plain_attention
from venturi.ir.build import dim, rank
from venturi.ir.dtypes import DT
from venturi.ops.attention import split_heads

T = torch.Tensor
_LOG2_E = 1.4426950408889634
_CONFIGS = (
    (128, 64, 3, 4), (128, 64, 3, 8), (64, 64, 3, 4), (128, 128, 2, 8), (64, 32, 4, 4), (32, 64, 3, 4), (64, 128, 2, 4),
    (32, 128, 2, 4), (16, 128, 2, 4), (32, 256, 2, 8), (16, 256, 2, 4), (64, 256, 2, 8), (16, 64, 3, 2),
    (64, 128, 2, 8), (64, 128, 1, 4), (128, 128, 1, 8), (64, 64, 1, 4), (32, 128, 1, 4), (64, 64, 2, 4),
)  # fmt: skip
_IN_PARTS = (
    (64, 32, 2, 4), (64, 64, 2, 8), (128, 32, 2, 8), (128, 64, 2, 8), (64, 32, 2, 8), (32, 64, 2, 4), (16, 64, 2, 4),
    (64, 64, 1, 8), (32, 32, 2, 4),
)  # fmt: skip
MAX_HEAD = 256


class TritonAttention:
    """Heads up to 256 wide, of fp32 up to 128, MHA/GQA/MQA, causal or with a mask that broadcasts."""

    name = "triton-attention"

    def __init__(self, device: KernelDevice) -> None:
        self._device = device

    def match(self, region: RegionView) -> list[Config] | str:
        shape = self._shape(region)
        if isinstance(shape, str):
            return shape
        in_parts = Element(shape.dtype, shape.tf32).in_parts
        wide = 2 * shape.head if shape.dtype == DT.FLOAT else shape.head
        configs = _IN_PARTS if in_parts else _CONFIGS
        found = [AttentionConfig(*c) for c in configs if wide <= 128 or c[0] * c[1] <= 64 * 64]
        return [asdict(c) for c in found]

    def _shape(self, region: RegionView) -> AttentionShape | str:
        reason = plain_attention(region)
        if reason:
            return reason
        node, attrs = region.node, region.attrs(region.node)
        q, k, v = node.inputs[:3]
        if q is None or k is None or v is None or q.dtype not in FLOATS:
            return "not floating point"
        last = dim(q, -1)
        heads = attrs.get("q_num_heads") if rank(q) == 3 else 1
        if last is None or not heads or rank(q) not in (3, 4) or dim(v, -1) is None or dim(k, -1) is None:
            return "the width of a head is not fixed"
        kv = attrs.get("kv_num_heads") if rank(q) == 3 else 1
        head = last // heads
        limit = MAX_HEAD // 2 if q.dtype == DT.FLOAT else MAX_HEAD
        if not kv or (dim(v, -1) or 0) // kv != head or head % 16 or head > limit:
            return f"heads of {head} (a multiple of 16 up to {limit}, the same for values)"
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if mask is not None and mask.dtype not in (DT.BOOL, q.dtype):
            return f"mask of type {mask.dtype}"
        assert q.dtype is not None
        kind = None if mask is None else mask.dtype
        return AttentionShape(head, bool(attrs.get("is_causal", 0)), kind, q.dtype, region.tf32)

    def sources(self, region: RegionView, config: Config) -> list[KernelSource]:
        shape = self._shape(region)
        assert isinstance(shape, AttentionShape)
        return [attention_source(region, shape, AttentionConfig(**config), self._device.arch)]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        shape = self._shape(region)
        assert isinstance(shape, AttentionShape)
        kernel = self._device.kernel(self.sources(region, config)[0])
        attrs, block = region.attrs(region.node), config["bm"]
        q_heads, kv_heads, scale = attrs.get("q_num_heads"), attrs.get("kv_num_heads"), attrs.get("scale")
        factor = (scale if scale is not None else 1 / math.sqrt(shape.head)) * _LOG2_E
        fill = Arguments(region)
        fallback = DeviceReference().bind(region, {}).run

        def run(*args: Any) -> Any:
            given = fill(args)
            flat = given[0].dim() == 3
            q, k, v = split_heads(given[0], q_heads), split_heads(given[1], kv_heads), split_heads(given[2], kv_heads)
            images, heads, rows, _ = q.shape
            keys = k.shape[2]
            if not q.numel() or not keys or (shape.causal and rows > keys):
                result = fallback(*args)
                return result[0] if isinstance(result, tuple) else result
            q, k, v = _strided(q), _strided(k), _strided(v)
            if flat:
                out = torch.empty((images, rows, heads, shape.head), dtype=q.dtype, device=q.device)
                o = out.transpose(1, 2)
            else:
                o = torch.empty((images, rows, heads, shape.head), dtype=q.dtype, device=q.device).transpose(1, 2)
                out = o
            strides = [x.stride(i) for x in (q, k, v, o) for i in range(3)]
            pointers = [q, k, v, o]
            if shape.mask is not None:
                mask = given[3]
                if mask.shape[-1] != keys:
                    result = fallback(*args)
                    return result[0] if isinstance(result, tuple) else result
                mask = mask.contiguous().expand(images, heads, rows, keys)
                pointers.append(mask)
                strides += [mask.stride(i) for i in range(3)]
            kernel.launch(
                (-(-rows // block), images * heads),
                [*pointers, *strides, heads, heads // k.shape[1], rows, keys, 0, factor],
            )
            return out.flatten(2) if flat else out

        return Kernel(run)


def _strided(x: T) -> T:
    """Last dimension contiguous, other strides and the address multiples of 16 elements and bytes; else a copy."""
    fine = x.stride(3) == 1 and all(x.stride(i) % 16 == 0 for i in range(3)) and x.data_ptr() % 16 == 0
    return x if fine else x.contiguous().clone()
