"""Gluon text of stride-1 convolutions on Hopper whose lines of pixels are read once for all rows of taps.

A tile's pixels are 8 across and `height` down. Its operand in shared memory is the lines of the image that it reads,
`height` and those of the further taps, each of them one unit of the hardware's swizzle: the operand of the next row of
taps is the same memory, a line further on. Weights stay in shared memory as long as the program lives.

One warp requests lines, several warpgroups compute every n-th tile each: one's epilogue runs beside another's products.
A slot of the ring is one tile, so that a barrier is never two phases behind whoever waits for it.

Where the kernel is wider than what it may read (blocks of the stem reach beyond the taps), elements pass through
registers and those that no tap reads become zero there: their weight is zero, but a NaN times zero is none.
"""

from __future__ import annotations

from dataclasses import dataclass

from venturi.backends.base import RegionView
from venturi.backends.cuda.codegen.early import GLUON_HEADER, descriptor_type
from venturi.backends.cuda.codegen.element import HALF, Element
from venturi.backends.cuda.codegen.expressions import rounded
from venturi.backends.cuda.codegen.module import HEADER, OVERLAP_HEADER, described, functions, indent, pointer_type
from venturi.backends.cuda.codegen.pingpong import WARPS
from venturi.backends.cuda.codegen.stem import StemGeometry
from venturi.backends.cuda.codegen.sums import CONSUMER_REGISTERS, PRODUCER_REGISTERS, chunk_of, ordered, rows_layout
from venturi.backends.cuda.codegen.tile import TileBody
from venturi.backends.cuda.kernel import KernelSource

ACROSS = 8
PIECE = 4


@dataclass(frozen=True)
class Strip:
    """`height` lines of 8 pixels by `columns` outputs, of which `stages` are in flight; `groups` of warps compute."""

    height: int
    columns: int
    stages: int
    groups: int

    @property
    def rows(self) -> int:
        return self.height * ACROSS

    def lines(self, taps: int) -> int:
        """Of the image that a tile reads, in pieces of one request each."""
        return -(-(self.height + taps - 1) // PIECE) * PIECE

    def count(self, size: tuple[int, int, int]) -> int:
        """How many tiles cover [images, P, Q]."""
        images, p, q = size
        return images * -(-p // self.height) * -(-q // ACROSS)

    def shared_bytes(self, taps: int, row_bytes: int) -> int:
        """Of the ring and the weights."""
        return (self.stages * self.lines(taps) * ACROSS + taps * self.columns) * row_bytes


def strips_source(
    region: RegionView, tile: TileBody, element: Element, size: Strip, g: StemGeometry, arch: int
) -> KernelSource:
    """D[images, P, Q, N] = epilogue of the stem's stride-1 form over blocks [images, P + taps - 1, Q, row], whose
    neighbouring pixels overlap; weights [N, taps * row]."""
    tile = tile.raised()
    operands = ["a", "b", "ring", "weights", "free", "there", "ready", "images", "P", "Q", "N"]
    results = ["c", *tile.arguments]
    constants = "BM: tl.constexpr, BN: tl.constexpr"
    everything = ", ".join([*operands, *results, "BM", "BN"])
    pieces = size.lines(g.taps[0]) // PIECE
    text = "\n".join([
        described(region),
        HEADER + GLUON_HEADER + OVERLAP_HEADER + functions(tile.lines),
        "@gluon.jit",
        f"def _produce({', '.join(operands)}, {constants}):",
        *indent(_produce(size, g, pieces)),
        "\n\n@gluon.jit",
        f"def _consume({', '.join([*operands, *results])}, {constants}, TURN: tl.constexpr):",
        *indent(_consume(tile, element, size, g)),
        "\n\n@gluon.jit",
        f"def strips(a, b, {', '.join(results)}, images, P, Q, N, {constants}):",
        *indent([
            "gdc_launch_dependents()",
            f"ring = gl.allocate_shared_memory(a.dtype, [{size.stages * pieces}] + a.block_type.shape, a.layout)",
            f"weights = gl.allocate_shared_memory(b.dtype, [{g.taps[0]}] + b.block_type.shape, b.layout)",
            f"free = gl.allocate_shared_memory(gl.int64, [{size.stages}, 1], mbarrier.MBarrierLayout())",
            f"there = gl.allocate_shared_memory(gl.int64, [{size.stages}, 1], mbarrier.MBarrierLayout())",
            "ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())",
            "mbarrier.init(ready.index(0), count=1)",
            f"for i in gl.static_range({size.stages}):",
            "    mbarrier.init(free.index(i), count=1)",
            "    mbarrier.init(there.index(i), count=1)",
            "fence_async_shared()",
            "gl.warp_specialize([",
            *(f"    (_consume, ({everything}, {turn}))," for turn in range(size.groups)),
            f"    (_produce, ({', '.join(operands)}, BM, BN)),",
            f"], {[*[WARPS] * (size.groups - 1), 1]}, "
            f"{[*[CONSUMER_REGISTERS[size.groups]] * (size.groups - 1), PRODUCER_REGISTERS]})",
        ]),
        "",
    ])  # fmt: skip
    signature = [
        ("a", descriptor_type(element, (1, PIECE, ACROSS, g.row))),
        ("b", descriptor_type(element, (size.columns, g.row))),
        ("c", pointer_type(tile.output.dtype)),
        *zip(tile.arguments, (pointer_type(v.dtype) for v in tile.values)),
        *((s, "i32") for s in ("images", "P", "Q", "N")), ("BM", "constexpr"), ("BN", "constexpr"),
    ]  # fmt: skip
    divisible = ("c", *tile.arguments, *(["N"] if g.source.outputs % 16 == 0 else []))
    blocks = (("BM", size.rows), ("BN", size.columns))
    return KernelSource("strips", text, tuple(signature), blocks, divisible, WARPS, 1, arch)


def _place(size: Strip) -> list[str]:
    """From a tile's number to its image and first pixel."""
    return [
        f"across = tl.cdiv(Q, {ACROSS})",
        f"down = tl.cdiv(P, {size.height})",
        "image = tile // (across * down)",
        f"p0 = ((tile // across) % down) * {size.height}",
        f"q0 = (tile % across) * {ACROSS}",
    ]


def _tiles(size: Strip) -> str:
    return f"images * tl.cdiv(P, {size.height}) * tl.cdiv(Q, {ACROSS})"


def _produce(size: Strip, g: StemGeometry, pieces: int) -> list[str]:
    """Weights are asked for before the kernel in front has ended: nobody writes them."""
    return [
        f"mbarrier.expect(ready.index(0), {g.taps[0]} * b.block_type.nbytes)",
        f"for r in gl.static_range({g.taps[0]}):",
        f"    tma.async_copy_global_to_shared(b, [0, r * {g.row}], ready.index(0), weights.index(r))",
        "count = 0",
        "gdc_wait()",
        f"for tile in range(tl.program_id(0), {_tiles(size)}, tl.num_programs(0)):",
        *indent(_place(size)),
        f"    slot = count % {size.stages}",
        f"    mbarrier.wait(free.index(slot), ((count // {size.stages}) & 1) ^ 1)",
        f"    mbarrier.expect(there.index(slot), {pieces} * a.block_type.nbytes)",
        f"    for i in gl.static_range({pieces}):",
        f"        tma.async_copy_global_to_shared(a, [image, p0 + i * {PIECE}, q0, 0], "
        f"there.index(slot), ring.index(slot * {pieces} + i))",
        "    count += 1",
    ]


def _consume(tile: TileBody, element: Element, size: Strip, g: StemGeometry) -> list[str]:
    out_type = tile.output.dtype
    assert out_type is not None
    taps, lines = g.taps[0], size.lines(g.taps[0])
    operand = f"[BM, {g.row}], gl.{element.shared(g.row)}"
    masked = g.has_empty_taps and element.dtype in HALF
    return [
        f"sums: gl.constexpr = {element.sums_layout(WARPS, size.columns)}",
        f"rows: gl.constexpr = {rows_layout(size.rows, size.columns, chunk_of(tile))}",
        *(["operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)"] if masked else []),
        f"lines = ring._reinterpret(a.dtype, [{size.stages * lines}, {ACROSS}, {g.row}], gl.{element.shared(g.row)})",
        "count = TURN",
        *tile.load_numbers(),
        "n = gl.arange(0, BN, gl.SliceLayout(0, rows))",
        *(_real_taps(g) if masked else []),
        "mbarrier.wait(ready.index(0), 0)",
        "gdc_wait()",
        "first_tile = tl.program_id(0) + TURN * tl.num_programs(0)",
        f"for tile in range(first_tile, {_tiles(size)}, {size.groups} * tl.num_programs(0)):",
        *indent(_place(size)),
        "    m = gl.arange(0, BM, gl.SliceLayout(1, rows))",
        f"    p = p0 + m // {ACROSS}",
        f"    q = q0 + m % {ACROSS}",
        "    mask = ((p < P) & (q < Q))[:, None] & (n < N)[None, :]",
        "    at = ((image * P + p) * Q + q).to(tl.int64)[:, None] * N + n[None, :]",
        f"    slot = count % {size.stages}",
        f"    acc = {tile.first_sums(element.sums, 'sums')}",
        f"    mbarrier.wait(there.index(slot), (count // {size.stages}) & 1)",
        *indent(_masked_products(taps, lines, operand) if masked else _products(taps, lines, operand)),
        "    mbarrier.arrive(free.index(slot), count=1)",
        f"    count += {size.groups}",
        *indent(ordered(size.columns, chunk_of(tile))),
        *indent(tile.load_vectors("n", "n < N")),
        *(f"    t{i} = tl.load(tile{i} + at, mask=mask, other=0.0).to(tl.float32)" for i in range(len(tile.tiles))),
        *indent(tile.lines),
        f"    tl.store(c + at, {rounded('result', out_type)}, mask=mask)",
    ]


def _products(taps: int, lines: int, operand: str) -> list[str]:
    return [
        f"for r in gl.static_range({taps}):",
        f"    x = lines.index(slot * {lines} + r)._reinterpret(a.dtype, {operand})",
        "    acc = warpgroup_mma(x, weights.index(r).permute((1, 0)), acc, is_async=True)",
        "acc = warpgroup_mma_wait(0, deps=(acc,))",
    ]


def _masked_products(taps: int, lines: int, operand: str) -> list[str]:
    """Elements of the next row of taps are loaded while the tensor cores have the last: registers are theirs until
    they have finished."""
    out: list[str] = []
    for r in range(taps):
        out += [
            f"x{r} = lines.index(slot * {lines} + {r})._reinterpret(a.dtype, {operand}).load(operand)",
            f"x{r} = gl.where(real{r}, x{r}, 0.0)",
            f"acc = warpgroup_mma(x{r}, weights.index({r}).permute((1, 0)), acc, is_async=True)",
        ]
        if r > 0:
            out.append(f"acc, x{r - 1} = warpgroup_mma_wait(1, deps=(acc, x{r - 1}))")
    return [*out, f"acc, x{taps - 1} = warpgroup_mma_wait(0, deps=(acc, x{taps - 1}))"]


def _real_taps(g: StemGeometry) -> list[str]:
    """`real0`, `real1`, ...: which elements of a row of blocks taps of the kernel read, for every row."""
    (s, t), (up, left), (rows, columns) = g.source.strides, g.shift, g.source.kernel
    return [
        f"e = gl.arange(0, {g.row}, gl.SliceLayout(0, operand))",
        f"inner = e % {g.width}",
        f"dy = inner // {g.channels * t} - {up}",
        f"dx = (e // {g.width}) * {t} + (inner // {g.channels}) % {t} - {left}",
        f"wanted = (dx >= 0) & (dx < {columns}) & (inner < {g.channels * s * t})",
        *(f"real{r} = (wanted & (dy >= {-r * s}) & (dy < {rows - r * s}))[None, :]" for r in range(g.taps[0])),
    ]
