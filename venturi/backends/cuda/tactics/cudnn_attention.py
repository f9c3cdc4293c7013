"""Attention through cuDNN's fused kernel, as torch calls it: strided heads, no mask or a mask that is added."""

from __future__ import annotations

import math
from typing import Any

import torch

from venturi.backends.base import Arguments, Config, Kernel, RegionView
from venturi.backends.cuda.codegen.element import HALF
from venturi.backends.cuda.tactics.reference import DeviceReference
from venturi.backends.sdpa import fit_mask, plain_attention
from venturi.ir.build import dim
from venturi.ir.dtypes import DT
from venturi.ops.attention import merge_heads, split_heads

MAX_HEAD = 128


class CudnnAttention:
    """Half precision, as many key heads as query heads, heads up to 128 wide in steps of 8."""

    name = "cudnn-attention"

    def match(self, region: RegionView) -> list[Config] | str:
        reason = plain_attention(region)
        if reason:
            return reason
        node, attrs = region.node, region.attrs(region.node)
        q = node.inputs[0]
        if q is None or q.dtype not in HALF:
            return "not half precision"
        heads, last = attrs.get("q_num_heads", 1), dim(q, -1)
        if last is None or (last // heads) % 8 or last // heads > MAX_HEAD:
            return f"heads must be a multiple of 8 up to {MAX_HEAD} wide"
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if mask is not None and mask.dtype == DT.BOOL:
            return "a boolean mask would have to be converted at every run"
        if not torch.backends.cudnn.is_available():
            return "cuDNN is not available"
        return [{}]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        attrs, fill = region.attrs(region.node), Arguments(region)
        causal, scale = bool(attrs.get("is_causal", 0)), attrs.get("scale")
        q_heads, kv_heads = attrs.get("q_num_heads"), attrs.get("kv_num_heads")
        fallback = DeviceReference().bind(region, {}).run

        def run(*args: Any) -> Any:
            given = fill(args)
            flat = given[0].dim() == 3
            q, k, v = split_heads(given[0], q_heads), split_heads(given[1], kv_heads), split_heads(given[2], kv_heads)
            if not _served(q, k, v) or (causal and q.shape[2] > k.shape[2]):
                result = fallback(*args)
                return result[0] if isinstance(result, tuple) else result
            mask = fit_mask(given[3], q, k) if len(given) > 3 and given[3] is not None else None
            factor = scale if scale is not None else 1 / math.sqrt(q.shape[-1])
            y = torch.ops.aten._scaled_dot_product_cudnn_attention(
                q, k, v, mask, False, 0.0, causal, False, scale=factor
            )[0]
            return merge_heads(y) if flat else y

        return Kernel(run)


def _served(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Shapes that the kernel computes: something to do, and one key head for every query head."""
    return bool(q.numel()) and bool(k.numel()) and q.shape[1] == k.shape[1] and k.shape[-1] == v.shape[-1]
