"""Triton text of tiled attention with a running softmax: scores never leave the chip.

Source: Dao, "FlashAttention-2" (2023), forward pass; one program a block of queries of one head.
"""

from __future__ import annotations

from dataclasses import dataclass

from venturi.backends.base import RegionView
from venturi.backends.cuda.codegen.dots import parts, product
from venturi.backends.cuda.codegen.element import Element
from venturi.backends.cuda.codegen.expressions import TRITON_TYPES, rounded
from venturi.backends.cuda.codegen.module import constexprs, indent, module, pointer_type
from venturi.backends.cuda.codegen.rows import next_power_of_2
from venturi.backends.cuda.kernel import KernelSource
from venturi.ir.dtypes import DT

STRIDES = [f"{t}_{d}" for t in ("q", "k", "v", "o") for d in ("image", "head", "row")]
MASK_STRIDES = ["m_image", "m_head", "m_row"]


@dataclass(frozen=True)
class AttentionShape:
    """What the machine code depends on. `mask` is None, a floating type (added) or BOOL (True keeps). `tf32`: operands
    of fp32 may be rounded to it."""

    head: int
    causal: bool
    mask: DT | None
    dtype: DT
    tf32: bool = False


@dataclass(frozen=True)
class AttentionConfig:
    bm: int
    bn: int
    stages: int
    warps: int


def attention_source(region: RegionView, s: AttentionShape, c: AttentionConfig, arch: int) -> KernelSource:
    """Strides are in elements and, but for the mask's, multiples of 16; keys of the mask are neighbours. `offset` is
    the number of keys before the first query."""
    width = max(16, next_power_of_2(s.head))
    inside = "" if width == s.head else f" & (d < {s.head})[None, :]"
    masked = s.mask is not None
    element = Element(s.dtype, s.tf32)
    scores = [
        *indent(product("scores", "x", "y", element, transposed=True)),
        "    scores = scores * scale",
    ]
    if masked:
        where = "bias + rows[:, None] * m_row + keys[None, :]"
        load = f"tl.load({where}, mask=(rows < num_q)[:, None] & (keys < num_k)[None, :], other=0)"
        if s.mask == DT.BOOL:
            scores.append(f'    scores = tl.where({load} != 0, scores, float("-inf"))')
        else:
            scores.append(f"    scores += {load}.to(tl.float32) * 1.4426950408889634")
    allowed = "(keys < num_k)[None, :]"
    if s.causal:
        allowed += " & (keys[None, :] <= rows[:, None] + offset)"
    end = f"tl.minimum(num_k, (tl.program_id(0) + 1) * {c.bm} + offset)" if s.causal else "num_k"
    lines = [
        "image = tl.program_id(1) // heads",
        "head = tl.program_id(1) % heads",
        "rows = tl.program_id(0) * BM + tl.arange(0, BM)",
        f"d = tl.arange(0, {width})",
        "q += image.to(tl.int64) * q_image + head * q_head",
        "k += image.to(tl.int64) * k_image + (head // group) * k_head",
        "v += image.to(tl.int64) * v_image + (head // group) * v_head",
        *(["bias = mask + image.to(tl.int64) * m_image + head * m_head"] if masked else []),
        f"x = tl.load(q + rows[:, None] * q_row + d[None, :], mask=(rows < num_q)[:, None]{inside}, other=0.0)",
        *(parts("x") if element.in_parts else []),
        'top = tl.full((BM,), float("-inf"), tl.float32)',
        "total = tl.zeros((BM,), tl.float32)",
        f"acc = tl.zeros((BM, {width}), tl.float32)",
        f"for start in range(0, {end}, BN):",
        "    keys = start + tl.arange(0, BN)",
        f"    y = tl.load(k + keys[:, None] * k_row + d[None, :], mask=(keys < num_k)[:, None]{inside}, other=0.0)",
        *(indent(parts("y")) if element.in_parts else []),
        *scores,
        f'    scores = tl.where({allowed}, scores, float("-inf"))',
        "    higher = tl.maximum(top, tl.max(scores, 1))",
        '    base = tl.where(higher == float("-inf"), 0.0, higher)',
        "    power = tl.math.exp2(scores - base[:, None])",
        "    shrink = tl.math.exp2(top - base)",
        "    total = total * shrink + tl.sum(power, 1)",
        f"    z = tl.load(v + keys[:, None] * v_row + d[None, :], mask=(keys < num_k)[:, None]{inside}, other=0.0)",
        *indent([f"power = {rounded('power', s.dtype)}"]),
        *(indent([*parts("power"), *parts("z")]) if element.in_parts else []),
        *indent(product("acc", "power", "z", element, "acc * shrink[:, None]")),
        "    top = higher",
        "acc = acc / total[:, None]",
        "o += image.to(tl.int64) * o_image + head * o_head",
        f"tl.store(o + rows[:, None] * o_row + d[None, :], {rounded('acc', s.dtype)}, "
        f"mask=(rows < num_q)[:, None]{inside})",
    ]
    numbers = ["heads", "group", "num_q", "num_k", "offset"]
    pointers = ["q", "k", "v", "o", *(["mask"] if masked else [])]
    strides = [*STRIDES, *(MASK_STRIDES if masked else [])]
    text = module(region, "attention", [*pointers, *strides, *numbers, "scale", *constexprs("BM", "BN")], lines, arch)
    assert s.dtype in TRITON_TYPES
    signature = [
        *((p, pointer_type(s.dtype)) for p in pointers[:4]),
        *((p, pointer_type(s.mask)) for p in pointers[4:]),
        *((n, "i32") for n in (*strides, *numbers)),
        ("scale", "fp32"), ("BM", "constexpr"), ("BN", "constexpr"),
    ]  # fmt: skip
    divisible = (*pointers[:4], *STRIDES)
    constants = (("BM", c.bm), ("BN", c.bn))
    return KernelSource("attention", text, tuple(signature), constants, divisible, c.warps, c.stages, arch)
