"""Gluon text of two products on Hopper, the second of the first's results: the wide tensor between them is written (if
anyone else reads it) but not read again.

A group of warps has some rows. For every chunk of the first product's columns it computes the sums and their epilogue,
stores them, and multiplies them by their rows of the second weights without leaving registers: what a product leaves in
a thread is what the next one wants there of its left operand, in an order that the stored weights make up for (see
codegen/sums.py).

Weights stay in shared memory as long as the program lives where they fit, else they pass through a ring, for all groups
of warps at a time. One warp requests everything, residuals too: registers could not hold as many as must be in flight.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from venturi.backends.base import RegionView
from venturi.backends.cuda.codegen.early import GLUON_HEADER, descriptor_type
from venturi.backends.cuda.codegen.element import Element
from venturi.backends.cuda.codegen.expressions import rounded
from venturi.backends.cuda.codegen.module import HEADER, OVERLAP_HEADER, described, functions, indent, pointer_type
from venturi.backends.cuda.codegen.pingpong import WARPS
from venturi.backends.cuda.codegen.sums import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    chunk_of,
    ordered,
    rows_layout,
    widened,
)
from venturi.backends.cuda.codegen.tile import Computed, TileBody
from venturi.backends.cuda.kernel import KernelSource
from venturi.ir.dtypes import DT


@dataclass(frozen=True)
class PairTile:
    """`rows` of each of `groups` of warps. In flight are `stages` of them, `ahead` chunks of residuals, and `ring` of
    weights, or all where that is 0."""

    rows: int
    groups: int
    stages: int
    ring: int = 0
    ahead: int = 0


@dataclass(frozen=True)
class PairSizes:
    """[M, depth] x [depth, wide], then x [wide, narrow], in elements; depth in steps of `deep`."""

    depth: int
    wide: int
    narrow: int
    deep: int

    def chunks(self, element: Element) -> int:
        return self.wide // element.step

    @property
    def steps(self) -> int:
        return self.depth // self.deep

    def chunk_bytes(self, element: Element) -> int:
        """Of both weights."""
        return element.step * (self.depth + self.narrow) * element.bytes

    def shared_bytes(self, c: PairTile, element: Element) -> int:
        """Of rows, weights and residuals."""
        weights = (c.ring or self.chunks(element)) * self.chunk_bytes(element)
        return (c.stages * self.depth + c.ahead * element.step) * c.rows * element.bytes + weights


def pair_source(
    region: RegionView, first: TileBody, second: TileBody, element: Element, c: PairTile, s: PairSizes, *,
    stores_wide: bool, arch: int,
) -> KernelSource:  # fmt: skip
    """wide[M, s.wide] = first(X[M, depth] @ W1[wide, depth]^T), narrow[M, s.narrow] = second(wide @ W2[narrow]^T).

    W2 [narrow, wide] is stored with its columns in the order of W1's rows.
    """
    descriptors = ["x", "w1", "w2", *(["skip"] if first.tiles else [])]
    memory = ["image", "weights1", "weights2", "free", "there", "spent", "ready"]
    memory += ["residuals", "taken", "given"] if first.tiles else []
    shared = [*descriptors, *memory, "M"]
    wide = ["wide"] if stores_wide else []
    columns = first.arguments[: len(first.columns)]
    results = [*wide, *columns, "narrow", *map(_of_second, second.arguments)]
    everything = ", ".join([*shared, *results, "BM"])
    first, second = first.raised(), second.raised()
    consume = _consume(first, second, element, c, s, stores_wide)
    steps, ring = s.steps, c.ring or s.chunks(element)
    barrier = "gl.allocate_shared_memory(gl.int64, [{}, 1], mbarrier.MBarrierLayout())".format
    text = "\n".join([
        described(region),
        HEADER + GLUON_HEADER + OVERLAP_HEADER + functions(first.lines, second.lines, consume),
        *_epilogue("_first", first),
        *_epilogue("_second", second),
        "@gluon.jit",
        f"def _produce({', '.join(shared)}, BM: gl.constexpr):",
        *indent(_produce(c, s, element, bool(first.tiles))),
        "\n\n@gluon.jit",
        f"def _consume({', '.join([*shared, *results])}, BM: gl.constexpr, GROUP: gl.constexpr):",
        *indent(consume),
        "\n\n@gluon.jit",
        f"def pair({', '.join([*descriptors, *results])}, M, BM: gl.constexpr):",
        *indent([
            "gdc_launch_dependents()",
            f"image = gl.allocate_shared_memory(x.dtype, [{c.stages * steps}] + x.block_type.shape, x.layout)",
            f"weights1 = gl.allocate_shared_memory(w1.dtype, [{ring * steps}] + w1.block_type.shape, w1.layout)",
            f"weights2 = gl.allocate_shared_memory(w2.dtype, [{ring}] + w2.block_type.shape, w2.layout)",
            f"free = {barrier(c.stages)}",
            f"there = {barrier(c.stages)}",
            f"spent = {barrier(ring if c.ring else 1)}",
            f"ready = {barrier(ring if c.ring else 1)}",
            f"for i in gl.static_range({c.stages}):",
            "    mbarrier.init(free.index(i), count=1)",
            "    mbarrier.init(there.index(i), count=1)",
            *(_residual_memory(c) if first.tiles else []),
            f"for i in gl.static_range({ring if c.ring else 1}):",
            f"    mbarrier.init(spent.index(i), count={c.groups})",
            "    mbarrier.init(ready.index(i), count=1)",
            "fence_async_shared()",
            "gl.warp_specialize([",
            *(f"    (_consume, ({everything}, {group}))," for group in range(c.groups)),
            f"    (_produce, ({', '.join(shared)}, BM)),",
            f"], {[*[WARPS] * (c.groups - 1), 1]}, "
            f"{[*[CONSUMER_REGISTERS[c.groups]] * (c.groups - 1), PRODUCER_REGISTERS]})",
        ]),
        "",
    ])  # fmt: skip
    signature = [
        ("x", descriptor_type(element, (c.rows, s.deep))),
        ("w1", descriptor_type(element, (element.step, s.deep))),
        ("w2", descriptor_type(element, (s.narrow, element.step))),
        *(("skip", descriptor_type(element, (c.rows, element.step))) for _ in first.tiles),
        *((name, pointer_type(first.output.dtype)) for name in wide),
        *zip(columns, (pointer_type(v.dtype) for v in first.columns)),
        ("narrow", pointer_type(second.output.dtype)),
        *zip(map(_of_second, second.arguments), (pointer_type(v.dtype) for v in second.values)),
        ("M", "i32"), ("BM", "constexpr"),
    ]  # fmt: skip
    return KernelSource("pair", text, tuple(signature), (("BM", c.rows),), tuple(results), WARPS, 1, arch)


def _residual_memory(c: PairTile) -> list[str]:
    return [
        f"residuals = gl.allocate_shared_memory(skip.dtype, [{c.ahead}] + skip.block_type.shape, skip.layout)",
        f"taken = gl.allocate_shared_memory(gl.int64, [{c.ahead}, 1], mbarrier.MBarrierLayout())",
        f"given = gl.allocate_shared_memory(gl.int64, [{c.ahead}, 1], mbarrier.MBarrierLayout())",
        f"for i in gl.static_range({c.ahead}):",
        "    mbarrier.init(taken.index(i), count=1)",
        "    mbarrier.init(given.index(i), count=1)",
    ]


def _of_second(text: str) -> str:
    """The second epilogue's operands have names of their own."""
    return re.sub(r"\b(b|t|col|tile)(\d)", r"second_\1\2", text)


def _operands(tile: TileBody) -> list[str]:
    """Of an epilogue: numbers, columns, tiles."""
    names = []
    for i, column in enumerate(tile.columns):
        count = column.scalars if isinstance(column, Computed) else 0
        names += [f"b{i}_{j}" for j in range(count)] or [f"b{i}"]
    return [*names, *(f"t{i}" for i in range(len(tile.tiles)))]


def _epilogue(name: str, tile: TileBody) -> list[str]:
    out_type = tile.output.dtype
    assert out_type is not None
    result = "result.to(tl.int8)" if out_type == DT.INT8 else rounded("result", out_type)
    return [
        "@gluon.jit",
        f"def {name}({', '.join(['acc', *_operands(tile)])}):",
        *indent([*tile.lines, f"return {result}"]),
        "\n",
    ]


def _tiles(c: PairTile) -> str:
    return f"range(tl.program_id(0), tl.cdiv(M, {c.groups} * BM), tl.num_programs(0))"


def _produce(c: PairTile, s: PairSizes, element: Element, residual: bool) -> list[str]:
    """Weights that stay are asked for before the kernel in front has ended: nobody writes them."""
    chunks, steps = s.chunks(element), s.steps

    def weights(barrier: str, slot: str, j: str) -> list[str]:
        return [
            f"mbarrier.expect({barrier}, {steps} * w1.block_type.nbytes + w2.block_type.nbytes)",
            f"for k in gl.static_range({steps}):",
            f"    tma.async_copy_global_to_shared(w1, [{j} * {element.step}, k * {s.deep}], {barrier}, "
            f"weights1.index({slot} * {steps} + k))",
            f"tma.async_copy_global_to_shared(w2, [0, {j} * {element.step}], {barrier}, weights2.index({slot}))",
        ]

    together = f"{chunks} * ({steps} * w1.block_type.nbytes + w2.block_type.nbytes)"
    stay = [
        f"mbarrier.expect(ready.index(0), {together})",
        f"for i in gl.static_range({chunks}):",
        *indent(weights("ready.index(0)", "i", "i")[1:]),
    ]
    pass_by = [
        f"slot = part % {c.ring}",
        f"mbarrier.wait(spent.index(slot), ((part // {c.ring}) & 1) ^ 1)",
        *weights("ready.index(slot)", "slot", "j"),
        "part += 1",
    ]
    skip = [
        f"for group in gl.static_range({c.groups}):",
        f"    place = asked % {c.ahead}",
        f"    mbarrier.wait(taken.index(place), ((asked // {c.ahead}) & 1) ^ 1)",
        "    mbarrier.expect(given.index(place), skip.block_type.nbytes)",
        f"    tma.async_copy_global_to_shared(skip, [(tile * {c.groups} + group) * BM, j * {element.step}], "
        "given.index(place), residuals.index(place))",
        "    asked += 1",
    ]
    of_a_chunk = [*(pass_by if c.ring else []), *(skip if residual else [])]
    return [
        *([] if c.ring else stay),
        "count = 0",
        *(["part = 0"] if c.ring else []),
        *(["asked = 0"] if residual else []),
        "gdc_wait()",
        f"for tile in {_tiles(c)}:",
        f"    for group in gl.static_range({c.groups}):",
        f"        place = count % {c.stages}",
        f"        mbarrier.wait(free.index(place), ((count // {c.stages}) & 1) ^ 1)",
        f"        mbarrier.expect(there.index(place), {steps} * x.block_type.nbytes)",
        f"        for k in gl.static_range({steps}):",
        f"            tma.async_copy_global_to_shared(x, [(tile * {c.groups} + group) * BM, k * {s.deep}], "
        f"there.index(place), image.index(place * {steps} + k))",
        "        count += 1",
        *([f"    for j in range({chunks}):", *indent(of_a_chunk, 2)] if of_a_chunk else []),
    ]


def _consume(
    first: TileBody, second: TileBody, element: Element, c: PairTile, s: PairSizes, stores_wide: bool
) -> list[str]:
    """All chunks of a tile, then the second epilogue."""
    step, chunk, narrow = element.step, chunk_of(second), s.narrow
    lines = [
        f"sums: gl.constexpr = {element.sums_layout(WARPS, step)}",
        f"totals: gl.constexpr = {element.sums_layout(WARPS, narrow)}",
        f"operand: gl.constexpr = gl.DotOperandLayout(0, totals, {_together(element)})",
        f"rows: gl.constexpr = {rows_layout(c.rows, step, chunk_of(first), f'[BM, {step}]')}",
        f"narrow_rows: gl.constexpr = {rows_layout(c.rows, narrow, chunk, f'[BM, {narrow}]')}",
        "count = GROUP",
        *(["part = 0"] if c.ring else []),
        *(["asked = GROUP"] if first.tiles else []),
        *first.load_numbers(),
        *map(_of_second, second.load_numbers()),
        f"n = gl.arange(0, {step}, gl.SliceLayout(0, rows))",
        f"across = gl.arange(0, {narrow}, gl.SliceLayout(0, narrow_rows))",
        *([] if c.ring else ["mbarrier.wait(ready.index(0), 0)"]),
        "gdc_wait()",
        f"for tile in {_tiles(c)}:",
    ]
    start = f"(tile * {c.groups} + GROUP) * BM"
    body = [
        f"m = gl.arange(0, BM, gl.SliceLayout(1, rows)) + {start}",
        f"mask = (m < M)[:, None] & (n < {step})[None, :]",
        f"at = m.to(tl.int64)[:, None] * {s.wide} + n[None, :]",
        f"total = {second.first_sums(element.sums, 'totals', f'(BM, {narrow})')}",
        f"place = count % {c.stages}",
        f"mbarrier.wait(there.index(place), (count // {c.stages}) & 1)",
    ]
    for j in range(s.chunks(element)):
        body += _chunk(j, first, element, c, s, stores_wide)
    last = s.chunks(element) - 1
    body += [
        *([] if element.bytes == 1 else [_wait("total", f"y{last}")]),
        *_pass_on(c, first),
        f"count += {c.groups}",
        f"down = gl.arange(0, BM, gl.SliceLayout(1, narrow_rows)) + {start}",
        f"inside = (down < M)[:, None] & (across < {narrow})[None, :]",
        f"to = down.to(tl.int64)[:, None] * {narrow} + across[None, :]",
        *ordered(narrow, chunk, "total", "narrow_rows", f"[BM, {narrow}]"),
        *map(_of_second, second.load_vectors("across", f"across < {narrow}")),
        *(
            f"second_t{i} = tl.load(second_tile{i} + to, mask=inside, other=0.0).to(tl.float32)"
            for i in range(len(second.tiles))
        ),
        f"tl.store(narrow + to, _second({', '.join(['total', *map(_of_second, _operands(second))])}), mask=inside)",
    ]
    return [*lines, *indent(body)]


def _chunk(j: int, first: TileBody, element: Element, c: PairTile, s: PairSizes, stores_wide: bool) -> list[str]:
    """Columns of the wide tensor from j * step on: sums, epilogue, and their part of the second sums."""
    step, steps, last = element.step, s.steps, j + 1 == s.chunks(element)
    slot = f"part % {c.ring}" if c.ring else str(j)
    waits = ["acc"] if j == 0 or element.bytes == 1 else ["acc", "total", f"y{j - 1}"]
    chunk, together = chunk_of(first), _together(element)
    return [
        *([f"mbarrier.wait(ready.index(part % {c.ring}), (part // {c.ring}) & 1)"] if c.ring else []),
        f"acc = {first.first_sums(element.sums, 'sums', f'(BM, {step})')}",
        f"for k in gl.static_range({steps}):",
        f"    acc = warpgroup_mma(image.index(place * {steps} + k), "
        f"weights1.index(({slot}) * {steps} + k).permute((1, 0)), acc, is_async=True)",
        _wait(*waits),
        *(_pass_on(c, first) if j else []),
        *(["mbarrier.arrive(free.index(place), count=1)"] if last else []),
        *ordered(step, chunk, "acc", "rows", f"[BM, {step}]"),
        *first.load_vectors(f"{j * step} + n", f"n < {step}"),
        *(
            [
                f"mbarrier.wait(given.index(asked % {c.ahead}), (asked // {c.ahead}) & 1)",
                f"t0 = {widened(f'residuals.index(asked % {c.ahead}).load(rows)', element.dtype)}",
                f"asked += {c.groups}",
            ]
            if first.tiles
            else []
        ),
        f"result{j} = _first({', '.join(['acc', *_operands(first)])})",
        *([f"tl.store(wide + at + {j * step}, result{j}, mask=mask)"] if stores_wide else []),
        f"y{j} = gl.reshape(result{j}, [BM, {step // (4 * chunk)}, 4, {chunk // together}, {together}])",
        f"y{j} = gl.permute(y{j}, (0, 1, 3, 2, 4))",
        f"y{j} = gl.convert_layout(gl.reshape(y{j}, [BM, {step}]), operand)",
        f"total = warpgroup_mma(y{j}, weights2.index({slot}).permute((1, 0)), total, is_async=True)",
        *([_wait("total")] if element.bytes == 1 else []),
        *(["part += 1"] if c.ring else []),
    ]


def _wait(*names: str) -> str:
    """For sums, whose operands in registers stay as they are until then. Triton cannot keep bytes: theirs are waited
    for at once."""
    return f"{', '.join(names)} = warpgroup_mma_wait(0, deps=({', '.join(names)},))"


def _together(element: Element) -> int:
    """Neighbours along K that a thread has of a left operand in registers: four bytes."""
    return 4 // element.bytes


def _pass_on(c: PairTile, first: TileBody) -> list[str]:
    """The chunk before the present one is over: all warps have multiplied what they loaded."""
    weights = f"mbarrier.arrive(spent.index((part + {c.ring - 1}) % {c.ring}), count=1)"
    residual = f"mbarrier.arrive(taken.index((asked - {c.groups}) % {c.ahead}), count=1)"
    return [*([weights] if c.ring else []), *([residual] if first.tiles else [])]
