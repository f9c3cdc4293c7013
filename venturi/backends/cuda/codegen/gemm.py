"""Triton text of matrix products D = epilogue(A[M, K] @ B[N, K]^T): TMA persistent, pointers with split-K, and GEMV.

Rows may be free; N and K are passed at run time too, so layers of different widths share machine code.
"""

from __future__ import annotations

from dataclasses import dataclass

from venturi.backends.base import RegionView
from venturi.backends.cuda.codegen.dots import first_sums, last_sums, low_rows, step_sums
from venturi.backends.cuda.codegen.element import Element
from venturi.backends.cuda.codegen.expressions import rounded
from venturi.backends.cuda.codegen.module import constexprs, element_type, indent, module, pointer_type
from venturi.backends.cuda.codegen.tile import TileBody
from venturi.backends.cuda.kernel import KernelSource

GROUPED_TILE = [
    "group = tile // (8 * tiles_n)",
    "first = group * 8",
    "height = tl.minimum(tiles_m - first, 8)",
    "pm = first + (tile % (8 * tiles_n)) % height",
    "pn = (tile % (8 * tiles_n)) // height",
]
_TMA_OPERANDS = ("a.load([pm * BM, k * BK])", "b.load([pn * BN, k * BK]).T", "b.load([N + pn * BN, k * BK]).T")


@dataclass(frozen=True)
class GemmConfig:
    """Tile sizes, pipeline depth, warps; `split` programs share a tile's K, `waves` programs a multiprocessor.

    `rounded`: the sums of a step are added to those before it by ordinary additions, of fp32 in parts. Tensor cores cut
    what does not fit, which makes long sums smaller than they are.
    """

    bm: int
    bn: int
    bk: int
    stages: int
    warps: int
    split: int = 1
    waves: int = 1
    rounded: bool = False


def tma_source(region: RegionView, tile: TileBody, element: Element, c: GemmConfig, arch: int) -> KernelSource:
    """Persistent: every program walks tiles; loads, residual and store go through TMA. Needs rows of 16 bytes."""
    residuals = [f"tile{i}" for i in range(len(tile.tiles))]
    cols = [f"col{i}" for i in range(len(tile.columns))]
    arguments = ["a", "b", "c", *residuals, *cols, "M", "N", "K"]
    out_type = tile.output.dtype
    assert out_type is not None
    lines = [
        "tiles_m = tl.cdiv(M, BM)",
        "tiles_n = tl.cdiv(N, BN)",
        "for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):",
        *indent(GROUPED_TILE),
        *indent(first_sums(element)),
        "    for k in range(tl.cdiv(K, BK)):",
        *indent(step_sums(element, *_TMA_OPERANDS, c.rounded), 2),
        *indent(last_sums(element)),
        "    n = pn * BN + tl.arange(0, BN)",
        *indent(tile.load_columns("n", "n < N")),
        *(f"    t{i} = {r}.load([pm * BM, pn * BN]).to(tl.float32)" for i, r in enumerate(residuals)),
        *indent(tile.lines),
        f"    c.store([pm * BM, pn * BN], {rounded('result', out_type)})",
    ]
    text = module(region, "gemm_tma", [*arguments, *constexprs("BM", "BN", "BK")], lines, arch)
    kind, stored = element_type(element.dtype), element_type(out_type)
    signature = [
        ("a", f"tensordesc<{kind}[{c.bm},{c.bk}]>"),
        ("b", f"tensordesc<{kind}[{c.bn},{c.bk}]>"),
        ("c", f"tensordesc<{stored}[{c.bm},{c.bn}]>"),
        *((r, f"tensordesc<{element_type(v.dtype)}[{c.bm},{c.bn}]>") for r, v in zip(residuals, tile.tiles)),
        *((n, pointer_type(v.dtype)) for n, v in zip(cols, tile.columns)),
        ("M", "i32"), ("N", "i32"), ("K", "i32"),
        ("BM", "constexpr"), ("BN", "constexpr"), ("BK", "constexpr"),
    ]  # fmt: skip
    constants = (("BM", c.bm), ("BN", c.bn), ("BK", c.bk))
    return KernelSource("gemm_tma", text, tuple(signature), constants, tuple(cols), c.warps, c.stages, arch)


def pointer_source(
    region: RegionView, tile: TileBody, element: Element, c: GemmConfig, arch: int, even_k: bool, wide: bool
) -> KernelSource:
    """Any M, N, K by masks. `wide`: K and N are multiples of 16. With split > 1 the last program of a tile to
    finish adds the others' sums in a fixed order, so results do not depend on timing."""
    arguments = ["a", "b", "c", *tile.arguments, "work", "locks", "M", "N", "K"]
    out_type = tile.output.dtype
    assert out_type is not None
    guard_k = "" if even_k else " & (kk < K)"
    guard_w = f"mask=(n < N)[None, :]{guard_k.replace('kk', 'kk[:, None]')}, other=0.0"
    weights = [
        f"w = tl.load(row_b + kk[:, None], {guard_w})",
        *low_rows(element, [f"low = tl.load(row_b + N.to(tl.int64) * K + kk[:, None], {guard_w})"]),
    ]
    lines = [
        "tiles_m = tl.cdiv(M, BM)",
        "tiles_n = tl.cdiv(N, BN)",
        "tile = tl.program_id(0)",
        *GROUPED_TILE,
        "m = pm * BM + tl.arange(0, BM)",
        "n = pn * BN + tl.arange(0, BN)",
        "steps = tl.cdiv(tl.cdiv(K, BK), SPLIT)",
        "begin = tl.program_id(1) * steps",
        *first_sums(element),
        "row_a = a + m.to(tl.int64)[:, None] * K",
        "row_b = b + n.to(tl.int64)[None, :] * K",
        "for k in range(begin, tl.minimum(begin + steps, tl.cdiv(K, BK))):",
        "    kk = k * BK + tl.arange(0, BK)",
        f"    x = tl.load(row_a + kk[None, :], mask=(m < M)[:, None]{guard_k.replace('kk', 'kk[None, :]')}, other=0.0)",
        *(f"    {w}" for w in weights),
        *indent(step_sums(element, "x", "w", "low", c.rounded)),
        *last_sums(element),
        "mask = (m < M)[:, None] & (n < N)[None, :]",
        "at = m.to(tl.int64)[:, None] * N + n[None, :]",
        *finish_lines(tile, element, "n", "n < N", "M * N"),
    ]
    text = module(region, "gemm", [*arguments, *constexprs("BM", "BN", "BK", "SPLIT")], lines, arch)
    signature = [
        ("a", pointer_type(element.dtype)), ("b", pointer_type(element.dtype)), ("c", pointer_type(out_type)),
        *zip(tile.arguments, (pointer_type(v.dtype) for v in tile.values)),
        ("work", element.partial), ("locks", "*i32"), ("M", "i32"), ("N", "i32"), ("K", "i32"),
        ("BM", "constexpr"), ("BN", "constexpr"), ("BK", "constexpr"), ("SPLIT", "constexpr"),
    ]  # fmt: skip
    divisible = ["a", "b", "c", *tile.arguments, "work", "locks", *(["N", "K"] if wide else [])]
    constants = (("BM", c.bm), ("BN", c.bn), ("BK", c.bk), ("SPLIT", c.split))
    return KernelSource("gemm", text, tuple(signature), constants, tuple(divisible), c.warps, c.stages, arch)


def finish_lines(
    tile: TileBody, element: Element, column: str, column_mask: str, stride: str, early: int = 0
) -> list[str]:
    """From `acc` to memory: split-K reduction when SPLIT > 1, then the epilogue at `at` under `mask`.

    The first `early` tiles were loaded before the sums, which hides their latency. With a split every program
    publishes its sums, then takes a ticket; the one with the last ticket reads all of them.
    """
    store = store_lines(tile, column, column_mask, early)
    return [
        "if SPLIT == 1:",
        *indent(store),
        "else:",
        f"    slab = ({stride}).to(tl.int64)",
        "    tl.store(work + tl.program_id(1) * slab + at, acc, mask=mask)",
        "    tl.debug_barrier()",
        '    ticket = tl.atomic_add(locks + tile, 1, sem="acq_rel")',
        "    if ticket == SPLIT - 1:",
        f"        acc = tl.zeros((BM, BN), {element.sums})",
        "        for s in range(SPLIT):",
        '            acc += tl.load(work + s * slab + at, mask=mask, other=0, cache_modifier=".cg")',
        *indent(store, 2),
        "        tl.store(locks + tile, 0)",
    ]


def store_lines(tile: TileBody, column: str, column_mask: str, early: int = 0) -> list[str]:
    """The epilogue of complete sums in `acc`, and its result's way to memory at `at` under `mask`."""
    later = range(early, len(tile.tiles))
    return [
        *tile.load_columns(column, column_mask),
        *(f"t{i} = early{i}.to(tl.float32)" for i in range(early)),
        *(f"t{i} = tl.load(tile{i} + at, mask=mask, other=0.0).to(tl.float32)" for i in later),
        *tile.lines,
        f"tl.store(c + at, {rounded('result', tile.output.dtype)}, mask=mask)",
    ]


def vector_source(
    region: RegionView, tile: TileBody, element: Element, columns: int, depth: int, warps: int, arch: int
) -> KernelSource:
    """Few rows: a program multiplies one row by `columns` columns, `depth` elements a step, on the ordinary units."""
    arguments = ["a", "b", "c", *tile.arguments, "M", "N", "K"]
    out_type = tile.output.dtype
    lines = [
        "m = tl.program_id(1) + tl.arange(0, 1)",
        "n = tl.program_id(0) * BN + tl.arange(0, BN)",
        "row_a = a + tl.program_id(1).to(tl.int64) * K",
        "row_b = b + n.to(tl.int64)[:, None] * K",
        f"sums = tl.zeros((BN, BK), {element.sums})",
        "for k in range(0, K, BK):",
        "    kk = k + tl.arange(0, BK)",
        f"    x = tl.load(row_a + kk, mask=kk < K, other=0.0).to({element.sums})",
        "    w = tl.load(row_b + kk[None, :], mask=(n < N)[:, None] & (kk < K)[None, :], other=0.0)",
        f"    w = w.to({element.sums})",
        "    sums += w * x[None, :]",
        "acc = tl.sum(sums, 1)[None, :]",
        "mask = (n < N)[None, :]",
        "at = m.to(tl.int64)[:, None] * N + n[None, :]",
        *tile.load_columns("n", "n < N"),
        *(f"t{i} = tl.load(tile{i} + at, mask=mask, other=0.0).to(tl.float32)" for i in range(len(tile.tiles))),
        *tile.lines,
        f"tl.store(c + at, {rounded('result', out_type)}, mask=mask)",
    ]
    text = module(region, "gemv", [*arguments, *constexprs("BN", "BK")], lines, arch)
    signature = [
        ("a", pointer_type(element.dtype)), ("b", pointer_type(element.dtype)), ("c", pointer_type(out_type)),
        *zip(tile.arguments, (pointer_type(v.dtype) for v in tile.values)),
        ("M", "i32"), ("N", "i32"), ("K", "i32"), ("BN", "constexpr"), ("BK", "constexpr"),
    ]  # fmt: skip
    constants = (("BN", columns), ("BK", depth))
    divisible = ("a", "b", "c", *tile.arguments)
    return KernelSource("gemv", text, tuple(signature), constants, divisible, warps, 1, arch)


def tma_split_source(region: RegionView, tile: TileBody, element: Element, c: GemmConfig, arch: int) -> KernelSource:
    """Operands through TMA, K shared by `split` programs a tile; for products with few tiles."""
    arguments = ["a", "b", "c", *tile.arguments, "work", "locks", "M", "N", "K"]
    out_type = tile.output.dtype
    early = len(tile.tiles) if c.split == 1 else 0
    lines = [
        "tiles_m = tl.cdiv(M, BM)",
        "tiles_n = tl.cdiv(N, BN)",
        "tile = tl.program_id(0)",
        *GROUPED_TILE,
        "m = pm * BM + tl.arange(0, BM)",
        "n = pn * BN + tl.arange(0, BN)",
        "steps = tl.cdiv(tl.cdiv(K, BK), SPLIT)",
        "begin = tl.program_id(1) * steps",
        "mask = (m < M)[:, None] & (n < N)[None, :]",
        "at = m.to(tl.int64)[:, None] * N + n[None, :]",
        *(f"early{i} = tl.load(tile{i} + at, mask=mask, other=0.0)" for i in range(early)),
        *first_sums(element),
        "for k in range(begin, tl.minimum(begin + steps, tl.cdiv(K, BK))):",
        *indent(step_sums(element, *_TMA_OPERANDS, c.rounded)),
        *last_sums(element),
        *finish_lines(tile, element, "n", "n < N", "M * N", early),
    ]
    text = module(region, "gemm_tma_split", [*arguments, *constexprs("BM", "BN", "BK", "SPLIT")], lines, arch)
    kind = element_type(element.dtype)
    signature = [
        ("a", f"tensordesc<{kind}[{c.bm},{c.bk}]>"), ("b", f"tensordesc<{kind}[{c.bn},{c.bk}]>"),
        ("c", pointer_type(out_type)),
        *zip(tile.arguments, (pointer_type(v.dtype) for v in tile.values)),
        ("work", element.partial), ("locks", "*i32"),
        ("M", "i32"), ("N", "i32"), ("K", "i32"),
        ("BM", "constexpr"), ("BN", "constexpr"), ("BK", "constexpr"), ("SPLIT", "constexpr"),
    ]  # fmt: skip
    constants = (("BM", c.bm), ("BN", c.bn), ("BK", c.bk), ("SPLIT", c.split))
    divisible = ("c", *tile.arguments, "work", "locks")
    return KernelSource("gemm_tma_split", text, tuple(signature), constants, divisible, c.warps, c.stages, arch)
