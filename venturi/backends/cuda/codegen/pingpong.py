"""Gluon text of large products and convolutions on Hopper whose epilogues cost nothing: groups of warps take turns.

One warp requests operands through the tensor memory accelerator, in the order of a program's tiles; two warpgroups
multiply every other tile each (or three every third, where tiles are so small that their epilogues take longer). While
one computes and stores an epilogue, another has the tensor cores: the scheme that CUTLASS calls "pingpong".

Barriers tell phases apart by one bit only. A warpgroup may wait for an operand only when it is the next of the ring:
`turns` lets them through their products one after the other.

See codegen/sums.py for the order in which weights are stored, codegen/reader.py for steps of convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass

from venturi.backends.base import RegionView
from venturi.backends.cuda.codegen.conv import ConvGeometry
from venturi.backends.cuda.codegen.early import GLUON_HEADER, descriptor_type
from venturi.backends.cuda.codegen.element import Element
from venturi.backends.cuda.codegen.expressions import rounded
from venturi.backends.cuda.codegen.gemm import GROUPED_TILE
from venturi.backends.cuda.codegen.module import HEADER, OVERLAP_HEADER, PRELUDE, described, indent, pointer_type
from venturi.backends.cuda.codegen.reader import Box, Reader, branches_reader, conv_reader, product_reader
from venturi.backends.cuda.codegen.sums import (
    BYTES_PRELUDE,
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    chunk_of,
    ordered,
    rows_layout,
    widened,
)
from venturi.backends.cuda.codegen.tile import TileBody
from venturi.backends.cuda.kernel import KernelSource
from venturi.ir.dtypes import DT

WARPS = 4
# Residuals of these types are loaded before the sums: registers are enough to keep them.
_EARLY = (DT.INT8, DT.UINT8, DT.FLOAT16, DT.BFLOAT16)
# Elements of a tile that leave registers for the columns of its epilogue during the sums.
_SMALL = 64 * 128
_MOST_ACROSS = 16


@dataclass(frozen=True)
class PingpongTile:
    """`rows` and `columns` of a tile; `stages` steps are in flight; `groups` of warps take turns."""

    rows: int
    columns: int
    stages: int
    groups: int = 2


def product_source(
    region: RegionView, tile: TileBody, element: Element, size: PingpongTile, n: int, k: int, arch: int
) -> KernelSource:
    """D[M, n] = epilogue(A[M, k] @ B[n, k]^T), persistent."""
    reader = product_reader(n, k, size.rows, element.step)
    return _source("gemm_pingpong", region, tile, element, size, reader, arch)


def conv_source(
    region: RegionView, tile: TileBody, element: Element, size: PingpongTile, g: ConvGeometry, box: Box, step: int,
    arch: int,
) -> KernelSource:  # fmt: skip
    """A convolution over boxes of `size.rows` pixels, persistent; `step` channels of a tap at a time."""
    return _source("conv_pingpong", region, tile, element, size, conv_reader(g, box, step), arch)


def branches_source(
    region: RegionView, tile: TileBody, element: Element, size: PingpongTile, here: ConvGeometry, there: ConvGeometry,
    box: Box, step: int, arch: int,
) -> KernelSource:  # fmt: skip
    """The sum of two 1x1 convolutions over boxes of `size.rows` pixels, persistent."""
    reader = branches_reader(here, there, box, step)
    return _source("branches_pingpong", region, tile, element, size, reader, arch)


def _source(
    name: str, region: RegionView, tile: TileBody, element: Element, size: PingpongTile, reader: Reader, arch: int
) -> KernelSource:
    images = ["a", *(["other"] if reader.other else [])]
    operands = [*images, "b", "a_ring", "b_ring", "free", "there", "turns", *reader.sizes]
    results = ["c", *tile.arguments]
    constants = "BM: tl.constexpr, BN: tl.constexpr"
    registers = CONSUMER_REGISTERS[size.groups]
    prelude = BYTES_PRELUDE if any(v.dtype == DT.INT8 for v in tile.tiles) else ""
    everything = ", ".join([*operands, *results, "BM", "BN"])
    text = "\n".join([
        described(region),
        HEADER + GLUON_HEADER + OVERLAP_HEADER + PRELUDE + prelude,
        "@gluon.jit",
        f"def _produce({', '.join(operands)}, {constants}):",
        *indent(_produce(size, reader)),
        "\n\n@gluon.jit",
        f"def _consume({', '.join([*operands, *results])}, {constants}, TURN: tl.constexpr):",
        *indent(_consume(tile, element, size, reader)),
        "\n\n@gluon.jit",
        f"def {name}({', '.join([*images, 'b', *results, *reader.sizes])}, {constants}):",
        *indent([
            "gdc_launch_dependents()",
            f"a_ring = gl.allocate_shared_memory(a.dtype, [{size.stages}] + a.block_type.shape, a.layout)",
            f"b_ring = gl.allocate_shared_memory(b.dtype, [{size.stages}] + b.block_type.shape, b.layout)",
            f"free = gl.allocate_shared_memory(gl.int64, [{size.stages}, 1], mbarrier.MBarrierLayout())",
            f"there = gl.allocate_shared_memory(gl.int64, [{size.stages}, 1], mbarrier.MBarrierLayout())",
            f"turns = gl.allocate_shared_memory(gl.int64, [{size.groups}, 1], mbarrier.MBarrierLayout())",
            f"for i in gl.static_range({size.groups}):",
            "    mbarrier.init(turns.index(i), count=1)",
            f"for i in gl.static_range({size.stages}):",
            "    mbarrier.init(free.index(i), count=1)",
            "    mbarrier.init(there.index(i), count=1)",
            "fence_async_shared()",
            "gl.warp_specialize([",
            *(f"    (_consume, ({everything}, {turn}))," for turn in range(size.groups)),
            f"    (_produce, ({', '.join(operands)}, BM, BN)),",
            f"], {[*[WARPS] * (size.groups - 1), 1]}, {[*[registers] * (size.groups - 1), PRODUCER_REGISTERS]})",
        ]),
        "",
    ])  # fmt: skip
    signature = [
        ("a", descriptor_type(element, reader.block)),
        *([("other", descriptor_type(element, reader.other.block))] if reader.other else []),
        ("b", descriptor_type(element, (size.columns, reader.step))),
        ("c", pointer_type(tile.output.dtype)),
        *zip(tile.arguments, (pointer_type(v.dtype) for v in tile.values)),
        *((s, "i32") for s in reader.sizes), ("BM", "constexpr"), ("BN", "constexpr"),
    ]  # fmt: skip
    divisible = ("c", *tile.arguments, *(["N"] if reader.columns % 16 == 0 else []))
    blocks = (("BM", size.rows), ("BN", size.columns))
    return KernelSource(name, text, tuple(signature), blocks, divisible, WARPS, 1, arch)


def _produce(size: PingpongTile, reader: Reader) -> list[str]:
    return [
        f"tiles_m = {reader.tiles}",
        "tiles_n = tl.cdiv(N, BN)",
        f"steps = {reader.steps}",
        "count = 0",
        "gdc_wait()",
        "for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):",
        *indent([*_order(size, reader), *reader.locate]),
        "    for k in range(steps):",
        f"        slot = count % {size.stages}",
        f"        mbarrier.wait(free.index(slot), ((count // {size.stages}) & 1) ^ 1)",
        *indent(reader.step_lines, 2),
        "        mbarrier.expect(there.index(slot), a.block_type.nbytes + b.block_type.nbytes)",
        *indent(_request_image(reader), 2),
        f"        tma.async_copy_global_to_shared("
        f"b, [pn * BN, k * {reader.step}], there.index(slot), b_ring.index(slot))",
        "        count += 1",
    ]


def _request_image(reader: Reader) -> list[str]:
    copy = "tma.async_copy_global_to_shared({}, {}, there.index(slot), a_ring.index(slot){})".format
    if reader.other is None:
        return [copy("a", reader.coordinates, "")]
    as_other = "._reinterpret(other.dtype, other.block_type.shape, other.layout)"
    return [
        f"if k < {reader.other.first}:",
        "    " + copy("a", reader.coordinates, ""),
        "else:",
        "    " + copy("other", reader.other.coordinates, as_other),
    ]


def _consume(tile: TileBody, element: Element, size: PingpongTile, reader: Reader) -> list[str]:
    """Every second or third tile of the program, from TURN on.

    A slot is free again when the product after it has begun.
    """
    out_type = tile.output.dtype
    assert out_type is not None
    chunk = chunk_of(tile)
    wide = [v.dtype not in _EARLY for v in tile.tiles]
    early, late = ([i for i, w in enumerate(wide) if w is kind] for kind in (False, True))
    vectors, small = tile.load_vectors("n", "n < N"), size.rows * size.columns <= _SMALL
    flat = (
        ""
        if len(reader.block) == 2
        else f"._reinterpret(a.dtype, [BM, {reader.step}], gl.{element.shared(reader.step)})"
    )
    return [
        f"sums: gl.constexpr = {element.sums_layout(WARPS, size.columns)}",
        f"rows: gl.constexpr = {rows_layout(size.rows, size.columns, chunk)}",
        f"tiles_m = {reader.tiles}",
        "tiles_n = tl.cdiv(N, BN)",
        f"steps = {reader.steps}",
        "count = TURN * steps",
        "lap = 1 if TURN == 0 else 0",
        "gdc_wait()",
        *tile.load_numbers(),
        "first_tile = tl.program_id(0) + TURN * tl.num_programs(0)",
        f"for tile in range(first_tile, tiles_m * tiles_n, {size.groups} * tl.num_programs(0)):",
        *indent([*_order(size, reader), *reader.locate]),
        f"    m = gl.arange(0, BM, gl.SliceLayout(1, rows)) + {reader.row}",
        "    n = gl.arange(0, BN, gl.SliceLayout(0, rows)) + pn * BN",
        *indent(reader.address),
        *indent(vectors if small else []),
        *(f"    early{i} = tl.load(tile{i} + at, mask=mask, other=0.0)" for i in early),
        f"    acc = gl.zeros((BM, BN), {element.sums}, sums)",
        "    mbarrier.wait(turns.index(TURN), lap & 1)",
        "    lap += 1",
        "    for k in range(steps):",
        f"        slot = count % {size.stages}",
        f"        mbarrier.wait(there.index(slot), (count // {size.stages}) & 1)",
        f"        x = a_ring.index(slot){flat}",
        "        acc = warpgroup_mma(x, b_ring.index(slot).permute((1, 0)), acc, is_async=True)",
        "        acc = warpgroup_mma_wait(1, deps=(acc,))",
        f"        mbarrier.arrive(free.index((count + {size.stages - 1}) % {size.stages}), count=1, pred=k > 0)",
        "        count += 1",
        f"    mbarrier.arrive(turns.index((TURN + 1) % {size.groups}), count=1)",
        "    acc = warpgroup_mma_wait(0, deps=(acc,))",
        f"    mbarrier.arrive(free.index((count + {size.stages - 1}) % {size.stages}), count=1)",
        f"    count += {size.groups - 1} * steps",
        *indent(ordered(size.columns, chunk)),
        *indent([] if small else vectors),
        *(f"    t{i} = {widened(f'early{i}', tile.tiles[i].dtype)}" for i in early),
        *(f"    t{i} = tl.load(tile{i} + at, mask=mask, other=0.0).to(tl.float32)" for i in late),
        *indent(tile.lines),
        f"    tl.store(c + at, {rounded('result', out_type)}, mask=mask)",
    ]


def _order(size: PingpongTile, reader: Reader) -> list[str]:
    """From a tile's number to its place: all columns of some rows before the next, in groups where they are many."""
    across = -(-reader.columns // size.columns)
    return [f"pm = tile // {across}", f"pn = tile % {across}"] if across <= _MOST_ACROSS else GROUPED_TILE
