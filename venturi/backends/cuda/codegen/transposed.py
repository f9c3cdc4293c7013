"""Triton text of transposed convolutions on NHWC memory, without zeros between the pixels of the image.

Outputs whose position and pad together leave the same rest after division by the stride form a phase: they read the
same taps, so each phase is an ordinary implicit product over its own taps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from venturi.backends.base import RegionView
from venturi.backends.cuda.codegen.dots import first_sums, last_sums, low_rows, step_sums
from venturi.backends.cuda.codegen.element import Element
from venturi.backends.cuda.codegen.gemm import GROUPED_TILE, GemmConfig, store_lines
from venturi.backends.cuda.codegen.module import constexprs, indent, module, pointer_type
from venturi.backends.cuda.codegen.tile import TileBody
from venturi.backends.cuda.kernel import KernelSource

T = torch.Tensor


@dataclass(frozen=True)
class TransposedGeometry:
    """Ungrouped, undilated: `pads` are what is cut off (top, left), `extra` rows and columns are added at the end."""

    channels: int
    outputs: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    extra: tuple[int, int]

    @property
    def taps(self) -> tuple[int, int]:
        """The most taps that a phase has, vertically and horizontally."""
        rows, columns = (-(-k // s) for k, s in zip(self.kernel, self.strides))
        return rows, columns

    @property
    def phases(self) -> int:
        return self.strides[0] * self.strides[1]

    @property
    def depth(self) -> int:
        """Terms of a sum."""
        return self.taps[0] * self.taps[1] * self.channels

    def phase_size(self, p: int, q: int) -> tuple[int, int]:
        """Rows and columns of a phase of a result of p x q; those at its edges may lie outside."""
        rows, columns = (-(-n // s) + int(b % s != 0) for n, s, b in zip((p, q), self.strides, self.pads))
        return rows, columns

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        full = [(n - 1) * s + k for n, s, k in zip((height, width), self.strides, self.kernel)]
        cut = (self.pads[0] + self.pads[2], self.pads[1] + self.pads[3])
        p, q = (f + e - c for f, e, c in zip(full, self.extra, cut))
        return p, q

    def weights(self, stored: T) -> T:
        """[channels, outputs, R, S] as [phases * outputs, taps * channels], zeros where a phase has fewer taps."""
        (s, t), (rows, columns) = self.strides, self.taps
        missing = (columns * t - self.kernel[1], rows * s - self.kernel[0])
        padded = F.pad(stored, [0, missing[0], 0, missing[1]])
        split = padded.reshape(self.channels, self.outputs, rows, s, columns, t)
        return split.permute(3, 5, 1, 2, 4, 0).reshape(self.phases * self.outputs, self.depth).contiguous()


def transposed_source(
    region: RegionView, tile: TileBody, g: TransposedGeometry, element: Element, c: GemmConfig, arch: int
) -> KernelSource:
    """Rows are pixels of a phase, columns output channels; BK divides the channels. A row of programs is a phase."""
    (s, t), per_tap = g.strides, g.channels // c.bk
    ends = "(h >= 0) & (h < H) & (v >= 0) & (v < W) & (m < M)"
    weights = f"((up * {g.taps[1]} + left) * {g.channels} + channel)[:, None]"
    lines = [
        f"down = tl.program_id(1) // {t}",
        f"right = tl.program_id(1) % {t}",
        f"PH = tl.cdiv(P, {s}) + {int(g.pads[0] % s != 0)}",
        f"QW = tl.cdiv(Q, {t}) + {int(g.pads[1] % t != 0)}",
        "M = images * PH * QW",
        "tiles_m = tl.cdiv(M, BM)",
        "tiles_n = tl.cdiv(N, BN)",
        "tile = tl.program_id(0)",
        *GROUPED_TILE,
        "m = pm * BM + tl.arange(0, BM)",
        "n = pn * BN + tl.arange(0, BN)",
        # the first pixel of the image that reaches the phase's outputs, and those outputs
        f"h0 = (m // QW) % PH + {g.pads[0] // s}",
        f"v0 = m % QW + {g.pads[1] // t}",
        f"p = h0 * {s} + down - {g.pads[0]}",
        f"q = v0 * {t} + right - {g.pads[1]}",
        "real = (m < M) & (p >= 0) & (p < P) & (q >= 0) & (q < Q)",
        f"image = a + (m // (PH * QW)).to(tl.int64) * (H * W * {g.channels})",
        f"row_b = b + (tl.program_id(1) * N + n)[None, :] * {g.depth}",
        f"rows = ({g.kernel[0] + s - 1} - down) // {s}",
        f"columns = ({g.kernel[1] + t - 1} - right) // {t}",
        *first_sums(element),
        f"for k in range(rows * columns * {per_tap}):",
        f"    up = (k // {per_tap}) // columns",
        f"    left = (k // {per_tap}) % columns",
        f"    channel = (k % {per_tap}) * BK + tl.arange(0, BK)",
        "    h = h0 - up",
        "    v = v0 - left",
        f"    pixel = image + (h * W + v) * {g.channels}",
        f"    x = tl.load(pixel[:, None] + channel[None, :], mask=({ends} & real)[:, None], other=0.0)",
        f"    w = tl.load(row_b + {weights}, mask=(n < N)[None, :], other=0.0)",
        *low_rows(
            element,
            [f"    low = tl.load(row_b + N * {g.phases * g.depth} + {weights}, mask=(n < N)[None, :], other=0.0)"],
        ),
        *indent(step_sums(element, "x", "w", "low", c.rounded)),
        *last_sums(element),
        "mask = real[:, None] & (n < N)[None, :]",
        "at = (((m // (PH * QW)) * P + p).to(tl.int64) * Q + q)[:, None] * N + n[None, :]",
        *store_lines(tile, "n", "n < N"),
    ]
    sizes = ["images", "H", "W", "P", "Q", "N"]
    arguments = ["a", "b", "c", *tile.arguments, *sizes]
    text = module(region, "transposed", [*arguments, *constexprs("BM", "BN", "BK")], lines, arch)
    signature = [
        ("a", pointer_type(element.dtype)), ("b", pointer_type(element.dtype)), ("c", pointer_type(tile.output.dtype)),
        *zip(tile.arguments, (pointer_type(v.dtype) for v in tile.values)),
        *((name, "i32") for name in sizes), ("BM", "constexpr"), ("BN", "constexpr"), ("BK", "constexpr"),
    ]  # fmt: skip
    divisible = ["a", "b", "c", *tile.arguments, *(["N"] if g.outputs % 16 == 0 else [])]
    constants = (("BM", c.bm), ("BN", c.bn), ("BK", c.bk))
    return KernelSource("transposed", text, tuple(signature), constants, tuple(divisible), c.warps, c.stages, arch)
