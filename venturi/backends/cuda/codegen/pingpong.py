"""Gluon text of large products on Hopper whose epilogues cost nothing: two groups of warps take turns.

One warp requests operands through the tensor memory accelerator, in the order of a program's tiles; two warpgroups
multiply every other tile each. While one computes and stores an epilogue, the other has the tensor cores: the scheme
that CUTLASS calls "pingpong".

Barriers tell phases apart by one bit only. A warpgroup may wait for an operand only when it is the next of the ring:
`turns` lets the two through their products one after the other.
"""

from __future__ import annotations

from venturi.backends.base import RegionView
from venturi.backends.cuda.codegen.early import GLUON_HEADER, STEP, descriptor_type
from venturi.backends.cuda.codegen.expressions import TRITON_TYPES, rounded
from venturi.backends.cuda.codegen.gemm import GROUPED_TILE, GemmConfig
from venturi.backends.cuda.codegen.module import HEADER, OVERLAP_HEADER, PRELUDE, described, indent, pointer_type
from venturi.backends.cuda.codegen.tile import TileBody
from venturi.backends.cuda.kernel import KernelSource
from venturi.ir.dtypes import DT

WARPS = 4
_CONSUMER_REGISTERS, _PRODUCER_REGISTERS = 240, 24


def pingpong_source(
    region: RegionView, tile: TileBody, dtype: DT, c: GemmConfig, columns: int, arch: int
) -> KernelSource:
    """D[M, N] = epilogue(A[M, K] @ B[N, K]^T), persistent. `columns` is N; `c.stages` steps of 64 are in flight."""
    operands = ["a", "b", "a_ring", "b_ring", "free", "there", "turns", "M", "N", "K"]
    results = ["c", *tile.arguments]
    constants = "BM: tl.constexpr, BN: tl.constexpr"
    everything = ", ".join([*operands, *results, "BM", "BN"])
    text = "\n".join([
        described(region),
        HEADER + GLUON_HEADER + OVERLAP_HEADER + PRELUDE,
        "@gluon.jit",
        f"def _produce({', '.join(operands)}, {constants}):",
        *indent(_produce(c)),
        "\n\n@gluon.jit",
        f"def _consume({', '.join([*operands, *results])}, {constants}, TURN: tl.constexpr):",
        *indent(_consume(tile, c)),
        "\n\n@gluon.jit",
        f"def gemm_pingpong(a, b, {', '.join(results)}, M, N, K, {constants}):",
        *indent([
            "gdc_launch_dependents()",
            f"a_ring = gl.allocate_shared_memory(a.dtype, [{c.stages}] + a.block_type.shape, a.layout)",
            f"b_ring = gl.allocate_shared_memory(b.dtype, [{c.stages}] + b.block_type.shape, b.layout)",
            f"free = gl.allocate_shared_memory(gl.int64, [{c.stages}, 1], mbarrier.MBarrierLayout())",
            f"there = gl.allocate_shared_memory(gl.int64, [{c.stages}, 1], mbarrier.MBarrierLayout())",
            "turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())",
            "for i in gl.static_range(2):",
            "    mbarrier.init(turns.index(i), count=1)",
            f"for i in gl.static_range({c.stages}):",
            "    mbarrier.init(free.index(i), count=1)",
            "    mbarrier.init(there.index(i), count=1)",
            "fence_async_shared()",
            "gl.warp_specialize([",
            f"    (_consume, ({everything}, 0)),",
            f"    (_consume, ({everything}, 1)),",
            f"    (_produce, ({', '.join(operands)}, BM, BN)),",
            f"], [{WARPS}, 1], [{_CONSUMER_REGISTERS}, {_PRODUCER_REGISTERS}])",
        ]),
        "",
    ])  # fmt: skip
    kind = TRITON_TYPES[dtype]
    signature = [
        ("a", descriptor_type(kind, (c.bm, STEP))), ("b", descriptor_type(kind, (c.bn, STEP))),
        ("c", pointer_type(tile.output.dtype)),
        *zip(tile.arguments, (pointer_type(v.dtype) for v in tile.values)),
        ("M", "i32"), ("N", "i32"), ("K", "i32"), ("BM", "constexpr"), ("BN", "constexpr"),
    ]  # fmt: skip
    divisible = ("c", *tile.arguments, *(["N"] if columns % 16 == 0 else []))
    return KernelSource(
        "gemm_pingpong", text, tuple(signature), (("BM", c.bm), ("BN", c.bn)), divisible, WARPS, 1, arch
    )  # fmt: skip


def _produce(c: GemmConfig) -> list[str]:
    return [
        "tiles_m = tl.cdiv(M, BM)",
        "tiles_n = tl.cdiv(N, BN)",
        "count = 0",
        "gdc_wait()",
        "for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):",
        *indent(GROUPED_TILE),
        f"    for k in range(tl.cdiv(K, {STEP})):",
        f"        slot = count % {c.stages}",
        f"        mbarrier.wait(free.index(slot), ((count // {c.stages}) & 1) ^ 1)",
        "        mbarrier.expect(there.index(slot), a.block_type.nbytes + b.block_type.nbytes)",
        f"        tma.async_copy_global_to_shared(a, [pm * BM, k * {STEP}], there.index(slot), a_ring.index(slot))",
        f"        tma.async_copy_global_to_shared(b, [pn * BN, k * {STEP}], there.index(slot), b_ring.index(slot))",
        "        count += 1",
    ]


def _consume(tile: TileBody, c: GemmConfig) -> list[str]:
    """Every second tile of the program, from TURN on. A slot is free again when the product after it has begun."""
    out_type = tile.output.dtype
    assert out_type is not None
    across = min(32, c.bn // 8)
    return [
        f"sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [{WARPS}, 1], [16, BN, 16])",
        f"rows: gl.constexpr = gl.BlockedLayout([1, 8], [{32 // across}, {across}], [{WARPS}, 1], [1, 0])",
        "tiles_m = tl.cdiv(M, BM)",
        "tiles_n = tl.cdiv(N, BN)",
        f"steps = tl.cdiv(K, {STEP})",
        "count = TURN * steps",
        "lap = 1 - TURN",
        "gdc_wait()",
        "first_tile = tl.program_id(0) + TURN * tl.num_programs(0)",
        "for tile in range(first_tile, tiles_m * tiles_n, 2 * tl.num_programs(0)):",
        *indent(GROUPED_TILE),
        "    acc = gl.zeros((BM, BN), gl.float32, sums)",
        "    mbarrier.wait(turns.index(TURN), lap & 1)",
        "    lap += 1",
        "    for k in range(steps):",
        f"        slot = count % {c.stages}",
        f"        mbarrier.wait(there.index(slot), (count // {c.stages}) & 1)",
        "        acc = warpgroup_mma(a_ring.index(slot), b_ring.index(slot).permute((1, 0)), acc, is_async=True)",
        "        acc = warpgroup_mma_wait(1, deps=(acc,))",
        f"        mbarrier.arrive(free.index((count + {c.stages - 1}) % {c.stages}), count=1, pred=k > 0)",
        "        count += 1",
        "    mbarrier.arrive(turns.index(1 - TURN), count=1)",
        "    acc = warpgroup_mma_wait(0, deps=(acc,))",
        f"    mbarrier.arrive(free.index((count + {c.stages - 1}) % {c.stages}), count=1)",
        "    count += steps",
        "    m = gl.arange(0, BM, gl.SliceLayout(1, rows)) + pm * BM",
        "    wide_n = gl.arange(0, BN, gl.SliceLayout(0, rows)) + pn * BN",
        "    mask = (m < M)[:, None] & (wide_n < N)[None, :]",
        "    at = m.to(tl.int64)[:, None] * N + wide_n[None, :]",
        "    n = gl.arange(0, BN, gl.SliceLayout(0, sums)) + pn * BN",
        *indent(tile.load_columns("n", "n < N")),
        *(
            f"    t{i} = gl.convert_layout(tl.load(tile{i} + at, mask=mask, other=0.0), sums).to(tl.float32)"
            for i in range(len(tile.tiles))
        ),
        *indent(tile.lines),
        f"    tl.store(c + at, gl.convert_layout({rounded('result', out_type)}, rows), mask=mask)",
    ]
