"""Depthwise convolutions in NHWC: every lane is a channel, a tile is a run of output pixels of one row.

Columns of the kernel that meet the padding are left out when the code is written, rows of the kernel when it runs.
Weights lie as [block of channels][kernel row][kernel column][lane].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from venturi.backends.cpu.codegen import mathlib as m
from venturi.backends.cpu.codegen.activation import Post, emit_post
from venturi.backends.cpu.codegen.element import FLOAT, Element
from venturi.backends.cpu.codegen.emit import Emitter, Val
from venturi.backends.cpu.codegen.geometry import ConvGeometry, kernel_rows, tile_starts
from venturi.backends.cpu.codegen.isa import Isa


@dataclass(frozen=True)
class DepthwiseSpec:
    """`geometry.channels` equals `geometry.out_channels`. A task is one row of output pixels. Images are of `element`,
    results of `out` (the same where it is None), weights and bias fp32. Bytes stand for numbers: the image's less their
    zero, what `out` is made of by its inverse scale and zero."""

    geometry: ConvGeometry
    rows: int
    vectors: int
    bias: bool
    post: Post
    element: Element = FLOAT
    out: Element | None = None


def pack_depthwise(weight: torch.Tensor, block: int) -> torch.Tensor:
    """[channels, 1, kh, kw] to [channels / block, kh, kw, block], filled up with zeros."""
    channels, _, kh, kw = weight.shape
    blocks = -(-channels // block)
    padded = weight.new_zeros((blocks * block, kh, kw))
    padded[:channels] = weight[:, 0]
    return padded.view(blocks, block, kh, kw).permute(0, 2, 3, 1).contiguous()


def emit_depthwise(isa: Isa, spec: DepthwiseSpec) -> str:
    """Words: x, weights, bias, residual, out, number of images; where there are bytes also the address of the image's
    zero, the output's inverse scale and its zero, in fp32. Tasks: images times output rows."""
    e = Emitter(isa)
    kernel = _Depthwise(e, spec)
    e.each(e.begin, e.end, 1, kernel.task)
    return e.finish()


class _Depthwise:
    def __init__(self, e: Emitter, spec: DepthwiseSpec) -> None:
        self.e, self.spec, self.g = e, spec, spec.geometry
        self.x, self.residual = e.pointer(0, spec.element), e.pointer(3, spec.element)
        self.out = e.pointer(4, spec.out or spec.element)
        if spec.element.limits or self.out.element.limits:
            numbers = e.pointer(6)
            self.zero, self.scale, self.out_zero = (e.splat(e.load_scalar(e.at(numbers, i))) for i in range(3))
        self.weight, self.bias = e.pointer(1), e.pointer(2)
        self.width = spec.vectors * e.isa.lanes
        self.starts = tile_starts(self.g.out_width, spec.rows)
        patterns = [self.g.valid_rows(s, spec.rows) for s in self.starts]
        self.patterns = list(dict.fromkeys(patterns))
        self.kinds = [self.patterns.index(p) for p in patterns]

    def task(self, t: Val) -> None:
        e, g = self.e, self.g
        image, y = e.divmod(t, g.out_height)
        whole, left = divmod(g.channels, self.width)
        e.each(0, whole, 1, lambda block: self._line(image, y, block, self.spec.vectors, None))
        if left:
            self._line(image, y, whole, -(-left // e.isa.lanes), left % e.isa.lanes or None)

    def _line(self, image: Val, y: Val, block: Val, vectors: int, masked: int | None) -> None:
        e = self.e

        def tile(column: Val) -> None:
            codes = [partial(self._tile, p, image, y, column, block, vectors, masked) for p in self.patterns]
            e.switch(e.table(self.kinds, column), codes)

        e.each(0, len(self.starts), 1, tile)

    def _tile(
        self,
        pattern: Sequence[Sequence[int]],
        image: Val,
        y: Val,
        column: Val,
        block: Val,
        vectors: int,
        masked: int | None,
    ) -> None:
        e, g, spec, lanes = self.e, self.g, self.spec, self.e.isa.lanes
        x0, c0 = e.table(self.starts, column), e.mul(block, self.width)
        count = [masked if v == vectors - 1 else None for v in range(vectors)]
        top = e.sub(e.mul(y, g.strides[0]), g.pads[0])
        base = e.add(e.mul(e.add(e.mul(image, g.height), top), g.width), e.sub(e.mul(x0, g.strides[1]), g.pads[1]))
        if spec.bias:
            bias = [e.load(e.at(self.bias, e.add(c0, v * lanes)), count[v]) for v in range(vectors)]
        else:
            bias = [e.constant(0.0)] * vectors
        weights = e.at(self.weight, e.mul(block, g.kernel[0] * g.kernel[1] * self.width))

        def kernel_row(r: Val, acc: list[Val]) -> list[Val]:
            line = e.at(self.x, e.add(e.mul(e.add(base, e.mul(r, g.dilations[0] * g.width)), g.channels), c0))
            row = e.at(weights, e.mul(r, g.kernel[1] * self.width))
            acc = list(acc)
            for v in range(vectors):
                inputs: dict[int, Val] = {}
                for s, rows in enumerate(pattern):
                    w = e.load(e.at(row, s * self.width + v * lanes))
                    for i in rows:
                        at = i * g.strides[1] + s * g.dilations[1]
                        if at not in inputs:
                            x = e.load(e.at(line, at * g.channels + v * lanes), count[v])
                            inputs[at] = e.b.fsub(x, self.zero) if spec.element.limits else x
                        acc[i * vectors + v] = e.fma(inputs[at], w, acc[i * vectors + v])
            return acc

        lowest, highest = kernel_rows(e, g, top)
        acc = e.loop(lowest, highest, 1, [bias[v] for _ in range(spec.rows) for v in range(vectors)], kernel_row)
        pixel = e.add(e.mul(e.add(e.mul(image, g.out_height), y), g.out_width), x0)
        offset = e.add(e.mul(pixel, g.channels), c0)
        for i in range(spec.rows):
            for v in range(vectors):
                at = e.add(offset, i * g.channels + v * lanes)
                other = e.load(e.at(self.residual, at), count[v]) if spec.post.residual else None
                value = emit_post(e, spec.post, acc[i * vectors + v], other)
                limits = self.out.element.limits
                if limits:
                    value = m.quantize(e, e.b.fmul(value, self.scale), self.out_zero, limits)
                e.store(value, e.at(self.out, at), count[v])
