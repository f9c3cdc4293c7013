"""Triton text of strided convolutions on few channels: space to depth, then rows of taps as contiguous loads.

With stride s, output (p, q) reads pixels s*p - pad + r. Cut the padded image into s x s blocks and make each block one
pixel of s*s*C channels: the convolution becomes one of stride 1 whose taps along a row lie side by side in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from venturi.backends.base import RegionView
from venturi.backends.cuda.codegen.conv import ConvGeometry
from venturi.backends.cuda.codegen.dots import first_sums, last_sums, low_rows, step_sums
from venturi.backends.cuda.codegen.element import FLOATS, Element
from venturi.backends.cuda.codegen.gemm import GROUPED_TILE, GemmConfig, finish_lines
from venturi.backends.cuda.codegen.module import constexprs, indent, module, pointer_type
from venturi.backends.cuda.codegen.tile import TileBody
from venturi.backends.cuda.kernel import KernelSource
from venturi.ir.dtypes import DT

BLOCKS = 128


@dataclass(frozen=True)
class StemGeometry:
    """The stride-1 form: `taps` rows and columns of blocks, `width` channels a block (padded to a multiple of 8),
    `shift` zero taps put in front, `before` pixels of padding in front."""

    source: ConvGeometry
    channels: int

    @property
    def before(self) -> tuple[int, int]:
        (s, t), pads = self.source.strides, self.source.pads
        return -(-pads[0] // s) * s, -(-pads[1] // t) * t

    @property
    def shift(self) -> tuple[int, int]:
        return self.before[0] - self.source.pads[0], self.before[1] - self.source.pads[1]

    @property
    def taps(self) -> tuple[int, int]:
        r, s = (-(-(k + h) // t) for k, h, t in zip(self.source.kernel, self.shift, self.source.strides))
        return r, s

    @property
    def width(self) -> int:
        return -(-self.channels * self.source.strides[0] * self.source.strides[1] // 8) * 8

    @property
    def has_empty_taps(self) -> bool:
        """Whether blocks reach beyond the kernel."""
        covered = tuple(n * s for n, s in zip(self.taps, self.source.strides))
        return covered != self.source.kernel

    @property
    def by_rows(self) -> ConvGeometry:
        """The stride-1 form with whole rows of taps as the channels of overlapping pixels."""
        return ConvGeometry(self.row, self.source.outputs, (self.taps[0], 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)

    @property
    def row(self) -> int:
        """Contiguous elements of one row of taps."""
        return self.taps[1] * self.width


def blocks_source(region: RegionView, g: StemGeometry, dtype: DT, arch: int, fill: int = 0) -> KernelSource:
    """Any strides in, [images, P + taps - 1, Q + taps - 1, width] out; elsewhere `fill`."""
    (s, t), width = g.source.strides, g.width
    padded = 1 << max(width - 1, 0).bit_length()
    lines = [
        "row = tl.program_id(0)",
        "b = tl.program_id(1) * BM + tl.arange(0, BM)",
        f"e = tl.arange(0, {padded})",
        f"channel = e % {g.channels}",
        f"dx = (e // {g.channels}) % {t}",
        f"h = (row % BP) * {s} - {g.before[0]} + e // {g.channels * t}",
        f"v = (b * {t} - {g.before[1]})[:, None] + dx[None, :]",
        "line = a + (row // BP).to(tl.int64) * stride_n + channel * stride_c + h * stride_h",
        f"real = ((e < {g.channels * s * t}) & (h >= 0) & (h < H))[None, :] & (v >= 0) & (v < W)",
        f"x = tl.load(line[None, :] + v * stride_w, mask=real, other={fill})",
        f"at = row.to(tl.int64) * BQ * {width} + b[:, None] * {width} + e[None, :]",
        f"tl.store(c + at, x, mask=(b < BQ)[:, None] & (e < {width})[None, :])",
    ]
    sizes = ["H", "W", "BP", "BQ", "stride_n", "stride_c", "stride_h", "stride_w"]
    text = module(region, "blocks", ["a", "c", *sizes, *constexprs("BM")], lines, arch)
    signature = (
        ("a", pointer_type(dtype)), ("c", pointer_type(dtype)), *((n, "i32") for n in sizes), ("BM", "constexpr"),
    )  # fmt: skip
    block = max(1, min(BLOCKS, 4096 // padded))
    return KernelSource("blocks", text, signature, (("BM", block),), ("c",), 4, 1, arch)


def _real_taps(g: StemGeometry, per_row: int) -> list[str]:
    """Zero what no tap reads: its weight is zero, but a NaN there must not reach the sum."""
    (s, t), (up, left), (rows, columns) = g.source.strides, g.shift, g.source.kernel
    return [
        f"    e = (k % {per_row}) * BK + tl.arange(0, BK)",
        f"    inner = e % {g.width}",
        f"    r = (k // {per_row}) * {s} + inner // {g.channels * t} - {up}",
        f"    s = (e // {g.width}) * {t} + (inner // {g.channels}) % {t} - {left}",
        f"    real = (r >= 0) & (r < {rows}) & (s >= 0) & (s < {columns}) & (inner < {g.channels * s * t})",
        "    x = tl.where(real[None, :], x, 0.0)",
    ]


def block_rows(source: KernelSource) -> int:
    return int(dict(source.constants)["BM"])


def stem_source(
    region: RegionView, tile: TileBody, g: StemGeometry, element: Element, c: GemmConfig, arch: int
) -> KernelSource:
    """Implicit product over the blocked image: no masks on the taps, whole rows of taps in one load."""
    rows, per_row = g.taps[0], g.row // c.bk
    depth, taps = rows * g.row, "(k * BK + tl.arange(0, BK))[:, None]"
    lines = [
        "M = images * P * Q",
        "tiles_m = tl.cdiv(M, BM)",
        "tiles_n = tl.cdiv(N, BN)",
        "tile = tl.program_id(0)",
        *GROUPED_TILE,
        "m = pm * BM + tl.arange(0, BM)",
        "n = pn * BN + tl.arange(0, BN)",
        f"p = ((m // (P * Q)) * (P + {rows - 1}) + (m // Q) % P).to(tl.int64)",
        f"pixel = a + (p * (Q + {g.taps[1] - 1}) + m % Q) * {g.width}",
        f"line = (Q + {g.taps[1] - 1}) * {g.width}",
        f"row_b = b + n[None, :] * {depth}",
        f"steps = tl.cdiv({rows * per_row}, SPLIT)",
        "begin = tl.program_id(1) * steps",
        *first_sums(element),
        f"for k in range(begin, tl.minimum(begin + steps, {rows * per_row})):",
        f"    offset = (k // {per_row}) * line + (k % {per_row}) * BK + tl.arange(0, BK)",
        "    x = tl.load(pixel[:, None] + offset[None, :], mask=(m < M)[:, None], other=0.0)",
        *(_real_taps(g, per_row) if g.has_empty_taps and element.dtype in FLOATS else []),
        f"    w = tl.load(row_b + {taps}, mask=(n < N)[None, :], other=0.0)",
        *low_rows(element, [f"    low = tl.load(row_b + N * {depth} + {taps}, mask=(n < N)[None, :], other=0.0)"]),
        *indent(step_sums(element, "x", "w", "low", c.rounded)),
        *last_sums(element),
        "mask = (m < M)[:, None] & (n < N)[None, :]",
        "at = m.to(tl.int64)[:, None] * N + n[None, :]",
        *finish_lines(tile, element, "n", "n < N", "M * N"),
    ]
    sizes = ["images", "P", "Q", "N"]
    arguments = ["a", "b", "c", *tile.arguments, "work", "locks", *sizes]
    text = module(region, "stem", [*arguments, *constexprs("BM", "BN", "BK", "SPLIT")], lines, arch)
    signature = [
        ("a", pointer_type(element.dtype)), ("b", pointer_type(element.dtype)), ("c", pointer_type(tile.output.dtype)),
        *zip(tile.arguments, (pointer_type(v.dtype) for v in tile.values)),
        ("work", element.partial), ("locks", "*i32"), *((s, "i32") for s in sizes),
        ("BM", "constexpr"), ("BN", "constexpr"), ("BK", "constexpr"), ("SPLIT", "constexpr"),
    ]  # fmt: skip
    divisible = ["a", "b", "c", *tile.arguments, "work", "locks", *(["N"] if g.source.outputs % 16 == 0 else [])]
    constants = (("BM", c.bm), ("BN", c.bn), ("BK", c.bk), ("SPLIT", c.split))
    return KernelSource("stem", text, tuple(signature), constants, tuple(divisible), c.warps, c.stages, arch)
