"""Triton text that lays an image with few channels out as NHWC with 8: then every pixel is one 16-byte load."""

from __future__ import annotations

from venturi.backends.base import RegionView
from venturi.backends.cuda.codegen.module import constexprs, module, pointer_type
from venturi.backends.cuda.kernel import KernelSource
from venturi.ir.dtypes import DT

WIDTH = 8
PIXELS = 256


def pack_source(region: RegionView, dtype: DT, channels: int, arch: int) -> KernelSource:
    """Any strides in, [pixels, 8] out; channels beyond `channels` are zero."""
    lines = [
        "p = tl.program_id(0) * BM + tl.arange(0, BM)",
        f"channel = tl.arange(0, {WIDTH})[None, :]",
        "inside = p < images * H * W",
        "image = (p // (H * W)).to(tl.int64) * stride_n",
        "where = image + ((p // W) % H) * stride_h + (p % W) * stride_w",
        f"mask = inside[:, None] & (channel < {channels})",
        "x = tl.load(a + where[:, None] + channel * stride_c, mask=mask, other=0.0)",
        f"tl.store(c + p.to(tl.int64)[:, None] * {WIDTH} + channel, x, mask=inside[:, None])",
    ]
    sizes = ["images", "H", "W", "stride_n", "stride_c", "stride_h", "stride_w"]
    text = module(region, "pack", ["a", "c", *sizes, *constexprs("BM")], lines, arch)
    signature = (
        ("a", pointer_type(dtype)), ("c", pointer_type(dtype)), *((s, "i32") for s in sizes), ("BM", "constexpr"),
    )  # fmt: skip
    return KernelSource("pack", text, signature, (("BM", PIXELS),), ("c",), 4, 1, arch)
