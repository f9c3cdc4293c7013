"""Attention through torch's tiled kernels, which never store the score matrix; a tactic of every device."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from venturi.backends.base import Arguments, Config, Kernel, RegionView, Tactic
from venturi.ir.build import dim
from venturi.ops.attention import merge_heads, repeat_heads, split_heads

T = torch.Tensor


def packed_widths(region: RegionView) -> list[int] | None:
    """Of a Region Split, Attention: how wide its one operand's queries, keys and values are."""
    node = region.nodes[0]
    if region.kind != "attention" or node.op_type != "Split":
        return None
    widths = [dim(v, -1) for v in node.outputs]
    return [w for w in widths if w is not None]


def plain_attention(region: RegionView) -> str | None:
    """Why the Region is not a standard Attention with one output, no cache, no soft cap, no window; None when it is.
    A Split of its operands may be in front."""
    if len(region.nodes) > 1 and packed_widths(region) is None:
        return "not Attention"
    node = region.nodes[-1]
    if node.op_type != "Attention" or node.domain:
        return "not Attention"
    attrs = region.attrs(node)
    if len([v for v in node.outputs if v.name and (v.uses() or v.is_graph_output())]) > 1:
        return "more than the attention output is read"
    if len(node.inputs) > 4 and any(v is not None for v in node.inputs[4:]):
        return "cache or padding inputs"
    odd = [k for k in ("softcap", "softmax_precision") if attrs.get(k)]
    odd += [k for k in ("left_window_size", "right_window_size") if attrs.get(k, -1) >= 0]
    if odd:
        return f"attributes {', '.join(odd)}"
    if attrs.get("is_causal") and len(node.inputs) > 3 and node.inputs[3] is not None:
        return "causal and a mask"
    if len({v.dtype for v in node.inputs[:3] if v is not None}) != 1:
        return "mixed types"
    return None


class SdpaAttention:
    """Standard Attention with one output, no cache, no soft cap; boolean or additive mask."""

    name = "aten-sdpa"

    def __init__(self, reference: Tactic, *, guarded: bool = False) -> None:
        """`guarded`: a result that is not finite is computed again by the reference. torch's kernels add the mask to
        the scores, so that an infinity behind it becomes NaN. (On a GPU looking at the result would stall it.)"""
        self._reference, self._guarded = reference, guarded

    def match(self, region: RegionView) -> list[Config] | str:
        return plain_attention(region) or [{}]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        attrs, fill, widths = region.attrs(region.nodes[-1]), Arguments(region), packed_widths(region)
        at = region.position(region.nodes[0].inputs[0]) if widths else None
        mask_at = _mask_position(region) if widths else None
        causal, scale = bool(attrs.get("is_causal", 0)), attrs.get("scale")
        q_heads, kv_heads = attrs.get("q_num_heads"), attrs.get("kv_num_heads")
        reference, guarded = self._reference.bind(region, {}).run, self._guarded

        def run(*args: Any) -> T:
            inputs = fill(args)
            if widths:
                inputs = [*torch.split(args[at or 0], widths, -1), *([] if mask_at is None else [inputs[mask_at]])]
            q, k, v = inputs[0], inputs[1], inputs[2]
            mask = inputs[3] if len(inputs) > 3 else None
            flat = q.dim() == 3
            q, k, v = split_heads(q, q_heads), split_heads(k, kv_heads), split_heads(v, kv_heads)
            if q.numel() == 0 or k.numel() == 0 or (causal and q.shape[2] > k.shape[2]):
                result = reference(*args)
                return result[0] if isinstance(result, tuple) else result  # type: ignore[no-any-return]
            if mask is not None:
                mask = fit_mask(mask, q, k)
            k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
            y = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=causal,
                scale=scale if scale is not None else 1 / math.sqrt(q.shape[-1]),
            )
            if guarded and not math.isfinite(float(y.sum())):
                result = reference(*args)
                return result[0] if isinstance(result, tuple) else result  # type: ignore[no-any-return]
            return merge_heads(y) if flat else y

        return Kernel(run)


def _mask_position(region: RegionView) -> int | None:
    """Number of the mask among the Region's inputs."""
    operands = region.nodes[-1].inputs
    mask = operands[3] if len(operands) > 3 else None
    return next((i for i, v in enumerate(region.formal) if mask is not None and v is mask), None)


def fit_mask(mask: T, q: T, k: T) -> T:
    """Pad a short mask, and make it 4-D so that every kernel of torch takes it."""
    missing = k.shape[2] - mask.shape[-1]
    if missing > 0:
        mask = F.pad(mask, [0, missing], value=False if mask.dtype == torch.bool else -math.inf)
    if mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    while mask.dim() < 4:
        mask = mask[None]
    return mask
