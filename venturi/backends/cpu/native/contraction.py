"""A convolution or product with constant weights, packed once, as routines for whatever sizes come."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from venturi.backends.base import OUT, SCRATCH, Operand, Phase, Routine
from venturi.backends.cpu.codegen.activation import ACTIVATIONS, Post
from venturi.backends.cpu.codegen.direct import DirectSpec, emit_direct, pack_weights
from venturi.backends.cpu.codegen.geometry import ConvGeometry
from venturi.backends.cpu.codegen.isa import Isa
from venturi.backends.cpu.codegen.winograd import WinogradSpec, emit_patches, emit_products, pack_winograd
from venturi.backends.cpu.epilogue import Epilogue
from venturi.backends.cpu.native.jit import host_jit
from venturi.backends.cpu.native.memory import packed_by_pieces

T = torch.Tensor
TILES = {
    "avx512": ((7, 4, 4), (8, 3, 2), (6, 4, 2)),
    "avx2": ((6, 2, 2), (4, 2, 2)),
    "neon": ((7, 3, 2), (6, 4, 2)),
}
L1_BYTES, L2_BYTES = 32 << 10, 1 << 20


def post_of(epilogue: Epilogue) -> Post | str:
    """The epilogue in the code generator's words, or why it cannot say it."""
    act = epilogue.activation
    residual = epilogue.residual is not None
    if act is None:
        return Post(residual=residual, activation_first=epilogue.activation_first)
    if act.name not in ACTIVATIONS:
        return f"no code is generated for {act.name}"
    return Post(
        act.name, act.alpha, act.beta, act.low, act.high, act.mode,
        residual=residual, activation_first=epilogue.activation_first,
    )  # fmt: skip


def rank_tiles(isa: Isa, channels: int, width: int | None) -> list[tuple[int, int, int]]:
    """(rows, vectors, unroll), those first whose work is of most use for rows of `width` pixels, if that is known."""

    def useful(tile: tuple[int, int, int]) -> float:
        rows, vectors, _ = tile
        rows = min(rows, width or rows)
        across = 1.0 if width is None else width / (-(-width // rows) * rows)
        lanes = -(-channels // isa.lanes)
        return across * lanes / (-(-lanes // vectors) * vectors) * min(1.0, rows * vectors / 12)

    return sorted(TILES[isa.name], key=lambda t: -round(useful(t), 2))


def direct_configs(
    isa: Isa, weight: Sequence[int], pixels: int | None, width: int | None, tiles: int
) -> list[dict[str, Any]]:
    """The candidates worth timing, best guess first, for weights [out, in, kh, kw] over `pixels` output pixels in rows
    of `width`; None where these are not known.

    Few, because each costs a tenth of a second to compile: the `tiles` of which most work is of use, sharing by
    whichever of pixels and weights is more. Blocking over channels is offered where a block's weights overflow half of
    the second cache.
    """
    out, depth = weight[0], math.prod(weight[1:])
    first = pixels is not None and out * depth > pixels * (weight[1] + out)
    found = []
    for rows, vectors, unroll in rank_tiles(isa, out, width)[:tiles]:
        tile = {"rows": rows, "vectors": vectors, "unroll": unroll, "block": 8, "channels_first": first}
        found.append({**tile, "depth": 0})
        if depth * vectors * isa.lanes * 4 > L2_BYTES // 2:
            found.append({**tile, "depth": L1_BYTES // (vectors * isa.lanes * 4)})
    return found


class Contraction(Protocol):
    """A convolution with packed weights. Made of (isa, weight [out, in, kh, kw], bias, epilogue, config)."""

    def routine(
        self, geometry: ConvGeometry, batch: int, shape: Sequence[int], layouts: Sequence[torch.memory_format]
    ) -> Routine: ...


class Direct:
    """`weight` is [out, in, kh, kw]. Thread-safe."""

    def __init__(self, isa: Isa, weight: T, bias: T | None, epilogue: Epilogue, config: Mapping[str, Any]) -> None:
        post = post_of(epilogue)
        assert isinstance(post, Post)
        self._isa, self._config, self._post, self._residual = isa, config, post, epilogue.residual
        block = config["vectors"] * isa.lanes
        self._weight = packed_by_pieces(weight, block, lambda w: pack_weights(w, block))
        self._bias = None if bias is None else bias.contiguous()

    def routine(
        self, geometry: ConvGeometry, batch: int, shape: Sequence[int], layouts: Sequence[torch.memory_format]
    ) -> Routine:
        """Of `batch` images into a result of `shape`; it lies as the first of `layouts`, the inputs' ones."""
        return Routine((self.phase(geometry, batch),), tuple(shape), layouts[0], tuple(layouts))

    def phase(self, geometry: ConvGeometry, batch: int, guarded: bool = False) -> Phase:
        """`guarded`: it does nothing where the first word of scratch memory is 0."""
        flat, c = geometry.flat(), self._config
        count, width = batch, flat.out_width
        if flat.width == 0:
            count = width = batch * geometry.height * geometry.width
        spec = DirectSpec(
            flat, min(c["rows"], width), c["vectors"], c["block"], c["unroll"],
            c["depth"], bool(c["channels_first"]), self._bias is not None, self._post,
        )  # fmt: skip
        address = host_jit(self._isa).address(repr(spec), lambda: emit_direct(self._isa, spec))
        words = (
            Operand(0), self._weight.data_ptr(), 0 if self._bias is None else self._bias.data_ptr(),
            0 if self._residual is None else Operand(self._residual), OUT, count, SCRATCH if guarded else 0,
        )  # fmt: skip
        return Phase(address, words, spec.tasks(self._isa, count))


class Winograd:
    """A 3x3 convolution of stride 1: patches, products, and the direct way for inputs that are not finite."""

    def __init__(self, isa: Isa, weight: T, bias: T | None, epilogue: Epilogue, config: Mapping[str, Any]) -> None:
        post = post_of(epilogue)
        assert isinstance(post, Post)
        rows, vectors, unroll = TILES[isa.name][0]
        plain = {"rows": rows, "vectors": vectors, "unroll": unroll, "block": 8, "depth": 0, "channels_first": False}
        self._direct = Direct(isa, weight, bias, epilogue, plain)
        self._isa, self._config, self._post, self._residual = isa, config, post, epilogue.residual
        block = config["vectors"] * isa.lanes
        self._weight = packed_by_pieces(weight, block, lambda w: pack_winograd(w, config["size"], block))
        self._bias = None if bias is None else bias.contiguous()
        self._zeros = torch.zeros(weight.shape[1])

    def routine(
        self, geometry: ConvGeometry, batch: int, shape: Sequence[int], layouts: Sequence[torch.memory_format]
    ) -> Routine:
        c, jit = self._config, host_jit(self._isa)
        tiles = WinogradSpec(geometry, c["size"], 1, 1, 1, 1, False, Post()).tiles(batch)
        rows = min(c["rows"], tiles)
        spec = WinogradSpec(
            geometry, c["size"], rows, c["vectors"], min(c["groups"], tiles // rows), c["unroll"],
            self._bias is not None, self._post,
        )  # fmt: skip
        patches = jit.address(f"patches {spec!r}", lambda: emit_patches(self._isa, spec))
        products = jit.address(f"products {spec!r}", lambda: emit_products(self._isa, spec))
        bias = 0 if self._bias is None else self._bias.data_ptr()
        residual: int | Operand = 0 if self._residual is None else Operand(self._residual)
        phases = (
            Phase(patches, (Operand(0), self._zeros.data_ptr(), SCRATCH, tiles), tiles),
            Phase(
                products, (SCRATCH, self._weight.data_ptr(), bias, residual, OUT, tiles),
                spec.product_tasks(self._isa, batch),
            ),
            self._direct.phase(geometry, batch, guarded=True),
        )  # fmt: skip
        return Routine(phases, tuple(shape), layouts[0], tuple(layouts), spec.scratch(batch))
