"""Triton text of NHWC convolutions: implicit GEMM over taps and channels, and depthwise."""

from __future__ import annotations

from dataclasses import dataclass

from venturi.backends.base import RegionView
from venturi.backends.cuda.codegen.dots import first_sums, last_sums, low_rows, step_sums
from venturi.backends.cuda.codegen.element import Element
from venturi.backends.cuda.codegen.expressions import rounded
from venturi.backends.cuda.codegen.gemm import GROUPED_TILE, GemmConfig, finish_lines
from venturi.backends.cuda.codegen.module import constexprs, filler, indent, module, pointer_type
from venturi.backends.cuda.codegen.tile import TileBody
from venturi.backends.cuda.kernel import KernelSource
from venturi.ir.dtypes import DT


@dataclass(frozen=True)
class ConvGeometry:
    """A 2-D convolution: input channels, kernel, strides, pads (top, left, bottom, right), dilations, groups."""

    channels: int
    outputs: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]
    groups: int

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        spans = [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilations)]
        padded = (height + self.pads[0] + self.pads[2], width + self.pads[1] + self.pads[3])
        p, q = ((n - s) // t + 1 for n, s, t in zip(padded, spans, self.strides))
        return p, q

    @property
    def is_product(self) -> bool:
        """1x1 with unit strides and no padding: a plain matrix product over pixels."""
        return self.kernel == (1, 1) and self.strides == (1, 1) and not any(self.pads) and self.groups == 1


def implicit_source(
    region: RegionView, tile: TileBody, g: ConvGeometry, element: Element, c: GemmConfig, arch: int, fill: int = 0
) -> KernelSource:
    """Rows are output pixels, columns output channels; weights are [outputs, taps * channels].

    When BK divides the channels a step stays within one tap; otherwise taps and channels form one flat K.
    Pixels outside the image are `fill`.
    """
    flat = g.channels % c.bk != 0
    taps = g.kernel[0] * g.kernel[1]
    depth = taps * g.channels
    before, blank = filler(fill) if element.dtype == DT.INT8 else ([], "0.0")
    if flat:
        locate = [
            "    kk = k * BK + tl.arange(0, BK)",
            f"    tap = kk // {g.channels}",
            f"    channel = kk % {g.channels}",
            f"    h = h0[:, None] + ((tap // {g.kernel[1]}) * {g.dilations[0]})[None, :]",
            f"    v = v0[:, None] + ((tap % {g.kernel[1]}) * {g.dilations[1]})[None, :]",
            f"    ok = (h >= 0) & (h < H) & (v >= 0) & (v < W) & (m < M)[:, None] & (kk < {depth})[None, :]",
            f"    x = tl.load(image[:, None] + (h * W + v) * {g.channels} + channel[None, :], mask=ok, other={blank})",
        ]
        weights = ("kk[:, None]", f"(n < N)[None, :] & (kk < {depth})[:, None]")
    else:
        per_tap = g.channels // c.bk
        locate = [
            f"    tap = k // {per_tap}",
            f"    channel = (k % {per_tap}) * BK + tl.arange(0, BK)",
            f"    h = h0 + (tap // {g.kernel[1]}) * {g.dilations[0]}",
            f"    v = v0 + (tap % {g.kernel[1]}) * {g.dilations[1]}",
            "    ok = (h >= 0) & (h < H) & (v >= 0) & (v < W) & (m < M)",
            f"    pixel = image + (h * W + v) * {g.channels}",
            f"    x = tl.load(pixel[:, None] + channel[None, :], mask=ok[:, None], other={blank})",
        ]
        weights = (f"(tap * {g.channels} + channel)[:, None]", "(n < N)[None, :]")
    total = -(-depth // c.bk)
    lines = [
        *before,
        "M = images * P * Q",
        "tiles_m = tl.cdiv(M, BM)",
        "tiles_n = tl.cdiv(N, BN)",
        "tile = tl.program_id(0)",
        *GROUPED_TILE,
        "m = pm * BM + tl.arange(0, BM)",
        "n = pn * BN + tl.arange(0, BN)",
        f"h0 = ((m // Q) % P) * {g.strides[0]} - {g.pads[0]}",
        f"v0 = (m % Q) * {g.strides[1]} - {g.pads[1]}",
        f"image = a + (m // (P * Q)).to(tl.int64) * (H * W * {g.channels})",
        f"row_b = b + n[None, :] * {depth}",
        f"steps = tl.cdiv({total}, SPLIT)",
        "begin = tl.program_id(1) * steps",
        *first_sums(element),
        f"for k in range(begin, tl.minimum(begin + steps, {total})):",
        *locate,
        f"    w = tl.load(row_b + {weights[0]}, mask={weights[1]}, other=0.0)",
        *low_rows(element, [f"    low = tl.load(row_b + N * {depth} + {weights[0]}, mask={weights[1]}, other=0.0)"]),
        *indent(step_sums(element, "x", "w", "low", c.rounded)),
        *last_sums(element),
        "mask = (m < M)[:, None] & (n < N)[None, :]",
        "at = m.to(tl.int64)[:, None] * N + n[None, :]",
        *finish_lines(tile, element, "n", "n < N", "M * N"),
    ]
    sizes = ["images", "H", "W", "P", "Q", "N"]
    arguments = ["a", "b", "c", *tile.arguments, "work", "locks", *sizes]
    text = module(region, "conv", [*arguments, *constexprs("BM", "BN", "BK", "SPLIT")], lines, arch)
    out_type = tile.output.dtype
    signature = [
        ("a", pointer_type(element.dtype)), ("b", pointer_type(element.dtype)), ("c", pointer_type(out_type)),
        *zip(tile.arguments, (pointer_type(v.dtype) for v in tile.values)),
        ("work", element.partial), ("locks", "*i32"), *((s, "i32") for s in sizes),
        ("BM", "constexpr"), ("BN", "constexpr"), ("BK", "constexpr"), ("SPLIT", "constexpr"),
    ]  # fmt: skip
    divisible = ["a", "b", "c", *tile.arguments, "work", "locks", *(["N"] if g.outputs % 16 == 0 else [])]
    constants = (("BM", c.bm), ("BN", c.bn), ("BK", c.bk), ("SPLIT", c.split))
    return KernelSource("conv", text, tuple(signature), constants, tuple(divisible), c.warps, c.stages, arch)


def depthwise_source(
    region: RegionView, tile: TileBody, g: ConvGeometry, dtype: DT, pixels: int, width: int, warps: int, arch: int
) -> KernelSource:
    """One filter a channel: a program computes `pixels` outputs of `width` channels; weights are [taps, channels]."""
    rows, cols = g.kernel
    lines = [
        "M = images * P * Q",
        "m = tl.program_id(0) * BM + tl.arange(0, BM)",
        "n = tl.program_id(1) * BN + tl.arange(0, BN)",
        f"h0 = ((m // Q) % P) * {g.strides[0]} - {g.pads[0]}",
        f"v0 = (m % Q) * {g.strides[1]} - {g.pads[1]}",
        f"image = a + (m // (P * Q)).to(tl.int64) * (H * W * {g.channels})",
        f"inside = n < {g.channels}",
        "acc = tl.zeros((BM, BN), tl.float32)",
        f"for r in tl.static_range({rows}):",
        f"    for s in tl.static_range({cols}):",
        f"        h = h0 + r * {g.dilations[0]}",
        f"        v = v0 + s * {g.dilations[1]}",
        "        ok = (h >= 0) & (h < H) & (v >= 0) & (v < W) & (m < M)",
        f"        pixel = image + (h * W + v) * {g.channels}",
        "        x = tl.load(pixel[:, None] + n[None, :], mask=ok[:, None] & inside[None, :], other=0.0)",
        f"        w = tl.load(b + (r * {cols} + s) * {g.channels} + n, mask=inside, other=0.0)",
        "        acc += x.to(tl.float32) * w.to(tl.float32)[None, :]",
        "mask = (m < M)[:, None] & inside[None, :]",
        f"at = m.to(tl.int64)[:, None] * {g.channels} + n[None, :]",
        *tile.load_columns("n", "inside"),
        *(f"t{i} = tl.load(tile{i} + at, mask=mask, other=0.0).to(tl.float32)" for i in range(len(tile.tiles))),
        *tile.lines,
        f"tl.store(c + at, {rounded('result', tile.output.dtype)}, mask=mask)",
    ]
    sizes = ["images", "H", "W", "P", "Q"]
    arguments = ["a", "b", "c", *tile.arguments, *sizes]
    text = module(region, "depthwise", [*arguments, *constexprs("BM", "BN")], lines, arch)
    signature = [
        ("a", pointer_type(dtype)), ("b", pointer_type(dtype)), ("c", pointer_type(tile.output.dtype)),
        *zip(tile.arguments, (pointer_type(v.dtype) for v in tile.values)),
        *((s, "i32") for s in sizes), ("BM", "constexpr"), ("BN", "constexpr"),
    ]  # fmt: skip
    constants = (("BM", pixels), ("BN", width))
    divisible = ("a", "b", "c", *tile.arguments)
    return KernelSource("depthwise", text, tuple(signature), constants, divisible, warps, 1, arch)
