"""A convolution or product of bf16 or bytes with constant weights, as routines for whatever sizes come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from venturi.backends.base import OUT, Operand, Phase, Routine
from venturi.backends.cpu.codegen.activation import Post
from venturi.backends.cpu.codegen.element import BF16, S8, Element
from venturi.backends.cpu.codegen.geometry import ConvGeometry
from venturi.backends.cpu.codegen.isa import Isa
from venturi.backends.cpu.codegen.matrix import MatrixSpec, Schedule, emit_matrix, pack_matrix
from venturi.backends.cpu.codegen.units import BLOCK, HALF
from venturi.backends.cpu.epilogue import Epilogue
from venturi.backends.cpu.native.contraction import post_of
from venturi.backends.cpu.native.jit import host_jit
from venturi.backends.cpu.native.memory import packed_by_pieces

T = torch.Tensor
EVEN_BELOW = 256
PANEL_BYTES = 512 << 10
MOST_TAPS = 32768
MOST_ROWS = 14
SIGN = 128


def group_rows(pixels: int, unit: str) -> tuple[int, int]:
    """(rows, tiles) of a group.

    >>> group_rows(3136, "dots"), group_rows(49, "dots"), group_rows(49, "tiles")
    ((14, 1), (13, 1), (13, 2))
    """
    if unit == "tiles":
        return tile_rows(pixels)
    return -(-pixels // -(-pixels // MOST_ROWS)), 1


def tile_rows(pixels: int) -> tuple[int, int]:
    """(rows a tile, tiles a group) that leave least to compute twice; a group never exceeds `pixels`.

    >>> tile_rows(49), tile_rows(31), tile_rows(9), tile_rows(3136)
    ((13, 2), (16, 1), (9, 1), (16, 2))
    """
    if pixels <= HALF:
        return pixels, 1
    if pixels >= EVEN_BELOW:
        return HALF, 2
    if pixels < 2 * HALF:
        return -(-pixels // 2), 1
    return -(-pixels // (2 * -(-pixels // (2 * HALF)))), 2


def matrix_configs(weight: Sequence[int], pixels: int | None, threads: int, unit: str) -> list[dict[str, Any]]:
    """The schedules worth timing for weights [out, in, kh, kw], best guess first. They share one piece of code."""
    blocks = -(-weight[0] // BLOCK)
    if pixels is None:
        return [{"groups": 4, "blocks": min(4, blocks), "channels_first": False}]
    groups = -(-pixels // (2 * HALF if unit == "tiles" else MOST_ROWS))
    narrow = pixels < weight[0]
    some = max(1, min(8, groups // (4 * threads)))
    few = max(1, blocks // (2 * threads))
    by_pixels = [(some, blocks, False), (2, blocks, False), (8, blocks, False), (4, 4, False), (2, 4, False)]
    by_channels = [(8, few, True), (4, 1, True), (8, 4, True), (2, 2, True)]
    found = dict.fromkeys(
        (min(g, groups), min(b, blocks), first)
        for g, b, first in (by_channels + by_pixels if narrow else by_pixels + by_channels)
    )
    busy = [f for f in found if -(-groups // f[0]) * -(-blocks // f[1]) >= threads]
    return [dict(zip(("groups", "blocks", "channels_first"), f)) for f in busy or found]


@dataclass(frozen=True)
class Stored:
    """How a tensor keeps its numbers: as they are, or (stored - zero) * scale where the element is an integer."""

    element: Element
    scale: float = 1.0
    zero: int = 0


class Matrix:
    """`weight` is [out, in, kh, kw]: bf16, or s8 beside `scales` [out] that make its numbers. Thread-safe."""

    def __init__(
        self, isa: Isa, weight: T, bias: T | None, epilogue: Epilogue, config: Mapping[str, Any],
        image: Stored = Stored(BF16), out: Stored = Stored(BF16), residual: Stored = Stored(BF16),
        scales: T | None = None, within: Stored | None = None,
    ) -> None:  # fmt: skip
        post = post_of(epilogue)
        assert isinstance(post, Post)
        self._isa, self._config, self._post, self._residual = isa, config, post, epilogue.residual
        self._unit = isa.unit(scales is not None)
        self._elements, self._zero = (image.element, residual.element, out.element), image.zero
        self._weight = packed_by_pieces(weight, BLOCK, pack_matrix)
        self._bias = None if bias is None else bias.float().contiguous()
        self._scales = None if scales is None else (scales * image.scale).float().contiguous()
        inner = within or Stored(S8)
        self._within = None if within is None else within.element
        self._numbers = torch.tensor([
            residual.scale, -residual.zero * residual.scale, 1 / out.scale, float(out.zero),
            1 / inner.scale, float(inner.zero), inner.scale, -inner.zero * inner.scale,
        ])  # fmt: skip
        zero = image.zero + (SIGN if self._unit == "dots" and image.element is S8 else 0)
        if self._scales is not None and zero:
            shift = -self._scales.double() * zero * weight.double().flatten(1).sum(1)
            self._bias = (shift if self._bias is None else shift + self._bias.double()).float()

    def routine(
        self, geometry: ConvGeometry, batch: int, shape: Sequence[int], layouts: Sequence[torch.memory_format]
    ) -> Routine:
        """Of `batch` images into a result of `shape`; it lies as the first of `layouts`, the inputs' ones."""
        flat, c = geometry.flat(), self._config
        count = batch * geometry.height * geometry.width if flat.width == 0 else batch
        pixels = count if flat.width == 0 else count * flat.out_height * flat.out_width
        spec = MatrixSpec(
            flat, *group_rows(pixels, self._unit), self._bias is not None, self._post, *self._elements, self._unit,
            self._within,
        )  # fmt: skip
        most = PANEL_BYTES // (spec.group * spec.stride) if spec.gathers else c["groups"]
        schedule = Schedule(max(1, min(c["groups"], most)), c["blocks"], bool(c["channels_first"]))
        address = host_jit(self._isa).address(repr(spec), lambda: emit_matrix(self._isa, spec))
        words = (
            Operand(0), self._weight.data_ptr(), 0 if self._bias is None else self._bias.data_ptr(),
            0 if self._residual is None else Operand(self._residual), OUT, count, *schedule.words(spec, count),
            0 if self._scales is None else self._scales.data_ptr(), self._numbers.data_ptr(), self._zero & 0xFF,
        )  # fmt: skip
        phase = Phase(address, words, schedule.tasks(spec, count))
        return Routine((phase,), tuple(shape), layouts[0], tuple(layouts), dtype=spec.out.dtype)
