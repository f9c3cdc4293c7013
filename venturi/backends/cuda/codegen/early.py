"""Gluon text of small products and convolutions on Hopper: weights are requested before the kernel in front has ended.

A kernel of a small batch lasts as long as its memory latencies. Here the operands of all K steps (or of as many as fit)
are in flight at once, in a ring in shared memory: the weights, which nobody writes, from the first instruction on, the
activations as soon as programmatic dependent launch says that they are there. One warpgroup of four warps multiplies 64
rows. See codegen/reader.py for what a step of a convolution is.

When tiles are few, the programs of a cluster share a tile's K: each leaves its sums in its own shared memory (in the
ring, which comes first there and is over by then), and each adds up a part of the rows from all of them, in a fixed
order.
"""

from __future__ import annotations

from dataclasses import dataclass

from venturi.backends.base import RegionView
from venturi.backends.cuda.codegen.conv import ConvGeometry
from venturi.backends.cuda.codegen.element import Element
from venturi.backends.cuda.codegen.expressions import TRITON_TYPES, rounded
from venturi.backends.cuda.codegen.gemm import GROUPED_TILE
from venturi.backends.cuda.codegen.module import HEADER, OVERLAP_HEADER, described, functions, indent, pointer_type
from venturi.backends.cuda.codegen.reader import Box, Reader, conv_reader, product_reader
from venturi.backends.cuda.codegen.tile import TileBody
from venturi.backends.cuda.kernel import KernelSource

# Elements a thread handles side by side in an epilogue, without and with a split.
ACCESS = (8, 4)
GLUON_HEADER = (
    "from triton.experimental import gluon\n"
    "from triton.experimental.gluon import language as gl\n"
    "from triton.experimental.gluon.language.nvidia.hopper import (\n"
    "    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait,\n"
    ")\n"
)
PEER_PRELUDE = """
@triton.jit
def _cluster_barrier():
    tl.inline_asm_elementwise(
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; // dummy $0",
        "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _leave(at, x):
    # Pairs of neighbours to byte `at` of this program's shared memory.
    tl.inline_asm_elementwise(
        "{ .reg .u32 p; mov.u32 p, global_smem; add.u32 p, p, $2; "
        "st.shared.v2.f32 [p], {$4, $5}; mov.u32 $0, 0; mov.u32 $1, 0; }",
        "=r,=r,r,r,f,f", [at, x], dtype=tl.int32, is_pure=False, pack=2)


@triton.jit
def _fetch(at, rank):
    # Four neighbours from byte `at` of the shared memory of a program of the cluster.
    return tl.inline_asm_elementwise(
        "{ .reg .u32 p; mov.u32 p, global_smem; add.u32 p, p, $4; "
        "mapa.shared::cluster.u32 p, p, $8; ld.shared::cluster.v4.f32 {$0, $1, $2, $3}, [p]; }",
        "=f,=f,=f,=f,r,r,r,r,r,r,r,r", [at, rank], dtype=tl.float32, is_pure=False, pack=4)

"""
_PADDING = 8
BARRIER_BYTES = 1024
_EARLY_RESIDUALS = 64


@dataclass(frozen=True)
class EarlyConfig:
    """A tile of `bm` rows (for convolutions `height` x `width` pixels of `images`) and `bn` columns; `depth` steps of
    `step` elements in flight; `split` programs, a cluster, share K."""

    bm: int
    bn: int
    depth: int
    warps: int
    split: int = 1
    height: int = 0
    width: int = 0
    images: int = 0
    step: int = 64

    @property
    def box(self) -> Box:
        return Box(self.images, self.height, self.width)

    @property
    def rows(self) -> int:
        """Of a tile that one program finishes."""
        return self.bm // self.split

    @property
    def peer_bytes(self) -> int:
        return self.bm * (self.bn + _PADDING) * 4 if self.split > 1 else 0

    def ring_bytes(self, element: Element) -> int:
        return self.depth * (self.bm + self.bn) * self.step * element.bytes

    def peer_start(self, element: Element) -> int:
        """Where a program leaves its sums: in the ring or, where it is too small, behind all else; never on barriers,
        whose memory the hardware may still write."""
        ring = self.ring_bytes(element)
        return 0 if self.peer_bytes <= ring else ring + BARRIER_BYTES

    def shared_bytes(self, element: Element) -> int:
        """At least what a program needs."""
        return max(self.ring_bytes(element) + BARRIER_BYTES, self.peer_start(element) + self.peer_bytes)


def product_source(
    region: RegionView, tile: TileBody, element: Element, c: EarlyConfig, n: int, k: int, arch: int
) -> KernelSource:
    """D[M, n] = epilogue(A[M, k] @ B[n, k]^T)."""
    return _source("gemm_early", region, tile, element, c, arch, product_reader(n, k, c.bm, c.step))


def conv_source(
    region: RegionView, tile: TileBody, g: ConvGeometry, element: Element, c: EarlyConfig, arch: int
) -> KernelSource:
    """Weights are [outputs, taps * channels]; see `conv_reader` for the image."""
    return _source("conv_early", region, tile, element, c, arch, conv_reader(g, c.box, c.step))


def _source(
    name: str, region: RegionView, tile: TileBody, element: Element, c: EarlyConfig, arch: int, reader: Reader
) -> KernelSource:
    arguments = ["a", "b", "c", *tile.arguments, *reader.sizes]
    body = [*_prologue(tile, element, c, reader), *_sums(element, c, reader), *_finish(tile, element, c)]
    text = "\n".join([
        described(region),
        HEADER + GLUON_HEADER + OVERLAP_HEADER + functions(tile.lines) + (PEER_PRELUDE if c.split > 1 else ""),
        "@gluon.jit",
        f"def {name}({', '.join(arguments)}, BM: tl.constexpr, BN: tl.constexpr):",
        *indent(body),
        "",
    ])  # fmt: skip
    signature = [
        ("a", descriptor_type(element, reader.block)), ("b", descriptor_type(element, (c.bn, c.step))),
        ("c", pointer_type(tile.output.dtype)),
        *zip(tile.arguments, (pointer_type(v.dtype) for v in tile.values)),
        *((s, "i32") for s in reader.sizes),
        ("BM", "constexpr"), ("BN", "constexpr"),
    ]  # fmt: skip
    divisible = ("c", *tile.arguments, *(["N"] if reader.columns % 16 == 0 else []))
    constants = (("BM", c.bm), ("BN", c.bn))
    return KernelSource(
        name, text, tuple(signature), constants, divisible, c.warps, 1, arch, c.split,
        c.shared_bytes(element) if c.split > 1 else 0,
    )  # fmt: skip


def descriptor_type(element: Element, block: tuple[int, ...]) -> str:
    sizes = ",".join(map(str, block))
    return f"tensordesc<{TRITON_TYPES[element.dtype]}[{sizes}],{element.shared(block[-1], len(block))}>"


def _prologue(tile: TileBody, element: Element, c: EarlyConfig, reader: Reader) -> list[str]:
    """Up to the moment the first sums can be computed."""
    early = range(len(tile.tiles)) if _loads_early(c) else ()
    return [
        "gdc_launch_dependents()",
        f"sums: gl.constexpr = {element.sums_layout(c.warps, c.bn)}",
        f"rows: gl.constexpr = {_rows_layout(c)}",
        f"tiles_m = {reader.tiles}",
        "tiles_n = tl.cdiv(N, BN)",
        "tile = tl.program_id(0)",
        *GROUPED_TILE,
        *reader.locate,
        f"total = {reader.steps}",
        f"share = tl.cdiv(total, {c.split})",
        "begin = tl.program_id(1) * share",
        "steps = tl.minimum(share, total - begin)",
        f"a_ring = gl.allocate_shared_memory(a.dtype, [{c.depth}] + a.block_type.shape, a.layout)",
        f"b_ring = gl.allocate_shared_memory(b.dtype, [{c.depth}] + b.block_type.shape, b.layout)",
        f"there = gl.allocate_shared_memory(gl.int64, [{c.depth}, 1], mbarrier.MBarrierLayout())",
        f"for i in gl.static_range({c.depth}):",
        "    mbarrier.init(there.index(i), count=1)",
        "fence_async_shared()",
        f"for i in range(tl.minimum(steps, {c.depth})):",
        "    k = begin + i",
        "    mbarrier.expect(there.index(i), a.block_type.nbytes + b.block_type.nbytes)",
        f"    tma.async_copy_global_to_shared(b, [pn * BN, k * {c.step}], there.index(i), b_ring.index(i))",
        f"m = gl.arange(0, {c.rows}, gl.SliceLayout(1, rows)) + tl.program_id(1) * {c.rows}"
        + ("" if c.height else f" + {reader.row}"),
        "n = gl.arange(0, BN, gl.SliceLayout(0, rows)) + pn * BN",
        *tile.load_columns("n", "n < N"),
        "gdc_wait()",
        f"for i in range(tl.minimum(steps, {c.depth})):",
        "    k = begin + i",
        *indent(reader.step_lines),
        f"    tma.async_copy_global_to_shared(a, {reader.coordinates}, there.index(i), a_ring.index(i))",
        *reader.address,
        f"mask = {reader.mask(c.bn)}",
        *(f"early{i} = tl.load(tile{i} + at, mask=mask, other=0.0)" for i in early),
    ]


def _sums(element: Element, c: EarlyConfig, reader: Reader) -> list[str]:
    """All of `acc`. A step's ring slot is filled again one step later, when its product is known to be over."""
    flat = "" if len(reader.block) == 2 else f"._reinterpret(a.dtype, [BM, {c.step}], gl.{element.shared(c.step)})"
    refill = [
        f"    more = (i > 0) & (i - 1 + {c.depth} < steps)",
        f"    free = (i + {c.depth - 1}) % {c.depth}",
        f"    k = begin + i - 1 + {c.depth}",
        *indent(reader.step_lines),
        "    mbarrier.expect(there.index(free), a.block_type.nbytes + b.block_type.nbytes, pred=more)",
        "    tma.async_copy_global_to_shared("
        f"b, [pn * BN, k * {c.step}], there.index(free), b_ring.index(free), pred=more)",
        "    tma.async_copy_global_to_shared("
        f"a, {reader.coordinates}, there.index(free), a_ring.index(free), pred=more)",
    ]
    return [
        f"acc = gl.zeros((BM, BN), {element.sums}, sums)",
        "for i in range(steps):",
        f"    slot = i % {c.depth}",
        f"    mbarrier.wait(there.index(slot), (i // {c.depth}) & 1)",
        f"    x = a_ring.index(slot){flat}",
        "    acc = warpgroup_mma(x, b_ring.index(slot).permute((1, 0)), acc, is_async=True)",
        "    acc = warpgroup_mma_wait(1, deps=(acc,))",
        *(refill if -(-reader.count // c.split) > c.depth else []),
        "acc = warpgroup_mma_wait(0, deps=(acc,))",
    ]


def _finish(tile: TileBody, element: Element, c: EarlyConfig) -> list[str]:
    """The epilogue on the rows of a tile that this program finishes."""
    out_type = tile.output.dtype
    assert out_type is not None
    loads = [f"t{i} = early{i}.to(tl.float32)" for i in range(len(tile.tiles))]
    if not _loads_early(c):
        loads = [f"t{i} = tl.load(tile{i} + at, mask=mask, other=0.0).to(tl.float32)" for i in range(len(tile.tiles))]
    store = [*loads, *tile.lines, f"tl.store(c + at, {rounded('result', out_type)}, mask=mask)"]
    if c.split == 1:
        return ["acc = gl.convert_layout(acc, rows)", *store]
    stride, start = 4 * (c.bn + _PADDING), c.peer_start(element)
    bits, back = "acc", ""
    if element.sums != "tl.float32":
        bits, back = "acc.to(tl.float32, bitcast=True)", f".to({element.sums}, bitcast=True)"
    return [
        "gl.thread_barrier()",
        "down = gl.arange(0, BM, gl.SliceLayout(1, sums))",
        "across = gl.arange(0, BN, gl.SliceLayout(0, sums))",
        f"_leave((down * {stride})[:, None] + (across * 4 + {start})[None, :], {bits})",
        "_cluster_barrier()",
        f"down = gl.arange(0, {c.rows}, gl.SliceLayout(1, rows)) + tl.program_id(1) * {c.rows}",
        "across = gl.arange(0, BN, gl.SliceLayout(0, rows))",
        f"where = (down * {stride})[:, None] + (across * 4 + {start})[None, :]",
        f"acc = _fetch(where, where * 0){back}",
        f"for rank in gl.static_range(1, {c.split}):",
        f"    acc += _fetch(where, where * 0 + rank){back}",
        "_cluster_barrier()",
        *store,
    ]


def _rows_layout(c: EarlyConfig) -> str:
    """Neighbouring threads hold neighbouring columns, as many a thread as one access moves."""
    width = ACCESS[c.split > 1]
    across = min(32, c.bn // width)
    return f"gl.BlockedLayout([1, {width}], [{32 // across}, {across}], [{c.warps}, 1], [1, 0])"


def _loads_early(c: EarlyConfig) -> bool:
    return c.rows * c.bn <= _EARLY_RESIDUALS * 32 * c.warps
