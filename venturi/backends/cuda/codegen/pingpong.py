"""Gluon text of large products and convolutions on Hopper whose epilogues cost nothing: groups of warps take turns.

One warp requests operands through the tensor memory accelerator, in the order of a program's tiles; two warpgroups
multiply every other tile each (or three every third, where tiles are so small that their epilogues take longer). While
one computes and stores an epilogue, another has the tensor cores: the scheme that CUTLASS calls "pingpong".

Residuals may come that way too: what registers could hold is too little to have in flight where memory is the limit.
Weights may stay in shared memory as long as the program lives, which then keeps to one tile of columns.

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
from venturi.backends.cuda.codegen.module import HEADER, OVERLAP_HEADER, described, functions, indent, pointer_type
from venturi.backends.cuda.codegen.reader import Box, Reader, branches_reader, conv_reader, product_reader
from venturi.backends.cuda.codegen.sums import (
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
# Tiles of columns beside each other before rows are taken in groups.
MOST_ACROSS = 16


@dataclass(frozen=True)
class PingpongTile:
    """`rows` and `columns` of a tile; `stages` steps are in flight; `groups` of warps take turns.

    `ahead`: tiles of the residual that are requested before they are needed; 0 where registers are loaded with it.
    `stays`: the weights of a tile of columns are requested once; programs must be a multiple of these tiles.
    """

    rows: int
    columns: int
    stages: int
    groups: int = 2
    ahead: int = 0
    stays: bool = False


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
    assert not size.ahead or len(tile.tiles) == 1
    tile = tile.raised()
    images = ["a", *(["other"] if reader.other else []), "b", *(["skip"] if size.ahead else [])]
    memory = ["a_ring", "b_ring", "free", "there", "turns", *(["residuals", "taken", "given"] if size.ahead else [])]
    operands = [*images, *memory, *(["ready"] if size.stays else []), *reader.sizes]
    arguments = tile.arguments[: len(tile.columns)] if size.ahead else tile.arguments
    results = ["c", *arguments]
    constants = "BM: tl.constexpr, BN: tl.constexpr"
    registers = CONSUMER_REGISTERS[size.groups]
    produce, consume = _produce(size, reader), _consume(tile, element, size, reader)
    everything = ", ".join([*operands, *results, "BM", "BN"])
    text = "\n".join([
        described(region),
        HEADER + GLUON_HEADER + OVERLAP_HEADER + functions(consume),
        "@gluon.jit",
        f"def _produce({', '.join(operands)}, {constants}):",
        *indent(produce),
        "\n\n@gluon.jit",
        f"def _consume({', '.join([*operands, *results])}, {constants}, TURN: tl.constexpr):",
        *indent(consume),
        "\n\n@gluon.jit",
        f"def {name}({', '.join([*images, *results, *reader.sizes])}, {constants}):",
        *indent([
            "gdc_launch_dependents()",
            *_memory(size, reader),
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
        *([("skip", descriptor_type(_skipped(tile), (*reader.result, size.columns)))] if size.ahead else []),
        ("c", pointer_type(tile.output.dtype)),
        *zip(arguments, (pointer_type(v.dtype) for v in tile.values)),
        *((s, "i32") for s in reader.sizes), ("BM", "constexpr"), ("BN", "constexpr"),
    ]  # fmt: skip
    divisible = ("c", *arguments, *(["N"] if reader.columns % 16 == 0 else []))
    blocks = (("BM", size.rows), ("BN", size.columns))
    return KernelSource(name, text, tuple(signature), blocks, divisible, WARPS, 1, arch)


def _memory(size: PingpongTile, reader: Reader) -> list[str]:
    barriers = "{0} = gl.allocate_shared_memory(gl.int64, [{1}, 1], mbarrier.MBarrierLayout())".format
    ring = "{0} = gl.allocate_shared_memory({1}.dtype, [{2}] + {1}.block_type.shape, {1}.layout)".format
    counts = {"free": size.stages, "there": size.stages, "turns": size.groups}
    counts |= {"taken": size.ahead, "given": size.ahead} if size.ahead else {}
    counts |= {"ready": 1} if size.stays else {}
    return [
        ring("a_ring", "a", size.stages),
        ring("b_ring", "b", reader.count if size.stays else size.stages),
        *([ring("residuals", "skip", size.ahead)] if size.ahead else []),
        *(barriers(name, count) for name, count in counts.items()),
        *(
            line
            for name, count in counts.items()
            for line in (f"for i in gl.static_range({count}):", f"    mbarrier.init({name}.index(i), count=1)")
        ),
    ]


def _skipped(tile: TileBody) -> Element:
    dtype = tile.tiles[0].dtype
    assert dtype is not None
    return Element(dtype)


def _produce(size: PingpongTile, reader: Reader) -> list[str]:
    weights = "tma.async_copy_global_to_shared(b, [{} * BN, k * {}], {}, b_ring.index({}))".format
    arriving = "a.block_type.nbytes" + ("" if size.stays else " + b.block_type.nbytes")
    across = -(-reader.columns // size.columns)
    stay = [
        f"mbarrier.expect(ready.index(0), {reader.count} * b.block_type.nbytes)",
        f"for k in range({reader.count}):",
        "    " + weights(f"(tl.program_id(0) % {across})", reader.step, "ready.index(0)", "k"),
    ]
    residual = [
        f"place = asked % {size.ahead}",
        f"mbarrier.wait(taken.index(place), ((asked // {size.ahead}) & 1) ^ 1)",
        "mbarrier.expect(given.index(place), skip.block_type.nbytes)",
        f"tma.async_copy_global_to_shared(skip, [{reader.place}, pn * BN], given.index(place), residuals.index(place))",
        "asked += 1",
    ]
    return [
        f"tiles_m = {reader.tiles}",
        "tiles_n = tl.cdiv(N, BN)",
        f"steps = {reader.count if size.stays else reader.steps}",
        "count = 0",
        *(["asked = 0"] if size.ahead else []),
        *(stay if size.stays else []),
        "gdc_wait()",
        "for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):",
        *indent([*_order(size, reader), *reader.locate, *(residual if size.ahead else [])]),
        "    for k in range(steps):",
        f"        slot = count % {size.stages}",
        f"        mbarrier.wait(free.index(slot), ((count // {size.stages}) & 1) ^ 1)",
        *indent(reader.step_lines, 2),
        f"        mbarrier.expect(there.index(slot), {arriving})",
        *indent(_request_image(reader), 2),
        *([] if size.stays else ["        " + weights("pn", reader.step, "there.index(slot)", "slot")]),
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
    wide = [] if size.ahead else [v.dtype not in _EARLY for v in tile.tiles]
    early, late = ([i for i, w in enumerate(wide) if w is kind] for kind in (False, True))
    vectors = tile.load_vectors("n", "" if reader.is_whole(size.columns) else "n < N")
    small = size.rows * size.columns <= _SMALL
    columns = "n = gl.arange(0, BN, gl.SliceLayout(0, rows)) + {} * BN".format
    once = size.stays and small
    flat = _flat("a", reader, element, reader.step)
    return [
        f"sums: gl.constexpr = {element.sums_layout(WARPS, size.columns)}",
        f"rows: gl.constexpr = {rows_layout(size.rows, size.columns, chunk)}",
        f"tiles_m = {reader.tiles}",
        "tiles_n = tl.cdiv(N, BN)",
        f"steps = {reader.count if size.stays else reader.steps}",
        "count = TURN * steps",
        "lap = 1 if TURN == 0 else 0",
        *(["asked = TURN"] if size.ahead else []),
        *(["mbarrier.wait(ready.index(0), 0)"] if size.stays else []),
        "gdc_wait()",
        *tile.load_numbers(),
        *([columns(f"(tl.program_id(0) % {-(-reader.columns // size.columns)})"), *vectors] if once else []),
        "first_tile = tl.program_id(0) + TURN * tl.num_programs(0)",
        f"for tile in range(first_tile, tiles_m * tiles_n, {size.groups} * tl.num_programs(0)):",
        *indent([*_order(size, reader), *reader.locate]),
        f"    m = gl.arange(0, BM, gl.SliceLayout(1, rows)) + {reader.row}",
        *indent([] if once else [columns("pn")]),
        *indent([*reader.address, f"mask = {reader.mask(size.columns)}"]),
        *indent(vectors if small and not once else []),
        *(f"    early{i} = tl.load(tile{i} + at, mask=mask, other=0.0)" for i in early),
        f"    acc = {tile.first_sums(element.sums, 'sums')}",
        "    mbarrier.wait(turns.index(TURN), lap & 1)",
        "    lap += 1",
        "    for k in range(steps):",
        f"        slot = count % {size.stages}",
        f"        mbarrier.wait(there.index(slot), (count // {size.stages}) & 1)",
        f"        x = a_ring.index(slot){flat}",
        f"        y = b_ring.index({'k' if size.stays else 'slot'})",
        "        acc = warpgroup_mma(x, y.permute((1, 0)), acc, is_async=True)",
        "        acc = warpgroup_mma_wait(1, deps=(acc,))",
        f"        mbarrier.arrive(free.index((count + {size.stages - 1}) % {size.stages}), count=1, pred=k > 0)",
        "        count += 1",
        f"    mbarrier.arrive(turns.index((TURN + 1) % {size.groups}), count=1)",
        "    acc = warpgroup_mma_wait(0, deps=(acc,))",
        f"    mbarrier.arrive(free.index((count + {size.stages - 1}) % {size.stages}), count=1)",
        f"    count += {size.groups - 1} * steps",
        *indent(ordered(size.columns, chunk)),
        *indent([] if small else vectors),
        *indent(_take_residual(tile, size, reader) if size.ahead else []),
        *(f"    t{i} = {widened(f'early{i}', tile.tiles[i].dtype)}" for i in early),
        *(f"    t{i} = tl.load(tile{i} + at, mask=mask, other=0.0).to(tl.float32)" for i in late),
        *indent(tile.lines),
        f"    tl.store(c + at, {rounded('result', out_type)}, mask=mask)",
    ]


def _take_residual(tile: TileBody, size: PingpongTile, reader: Reader) -> list[str]:
    """The place of the one before is free: all warps have multiplied since they read it."""
    before = f"(asked + {size.ahead - size.groups}) % {size.ahead}"
    flat = _flat("skip", reader, _skipped(tile), size.columns)
    return [
        f"mbarrier.arrive(taken.index({before}), count=1, pred=asked >= {size.groups})",
        f"mbarrier.wait(given.index(asked % {size.ahead}), (asked // {size.ahead}) & 1)",
        f"residual = residuals.index(asked % {size.ahead}){flat}.load(rows)",
        f"t0 = {widened('residual', tile.tiles[0].dtype)}",
        f"asked += {size.groups}",
    ]


def _flat(name: str, reader: Reader, element: Element, columns: int) -> str:
    """A box of pixels as rows."""
    if len(reader.block) == 2:
        return ""
    return f"._reinterpret({name}.dtype, [BM, {columns}], gl.{element.shared(columns)})"


def _order(size: PingpongTile, reader: Reader) -> list[str]:
    """From a tile's number to its place: all columns of some rows before the next, in groups where they are many."""
    across = -(-reader.columns // size.columns)
    return [f"pm = tile // {across}", f"pn = tile % {across}"] if across <= MOST_ACROSS else GROUPED_TILE
