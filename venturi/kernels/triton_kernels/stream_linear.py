"""y = x W^T for few rows on Hopper, whose weights are under way before the kernel in front has ended.

Weights are the left operand of wgmma. A program takes BN outputs and one of SPLITS parts of K, in steps of 128 bytes,
DEPTH of them in a ring in shared memory. The weights, which nobody writes, are requested from the first instruction on;
the rows of x when programmatic dependent launch says that they are there. So the short kernels between two linear
layers cost no bandwidth. The last of a tile's programs to finish adds the parts, in the order of the splits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from venturi.kernels.triton_kernels.launch import options
from venturi.kernels.triton_kernels.small_linear import finish_tile, row_terms, weight_terms

STEP_BYTES = 128
WARPS = 4
FEWEST_ROWS = 8


@dataclass(frozen=True)
class StreamLinearConfig:
    """Tile of `outputs` (64 or 128); `splits`: parts of K. `depth` steps are in flight, `ahead` more are asked into the
    second-level cache. `inside`: x is a single row, which the kernel normalizes and quantizes itself."""

    outputs: int = 64
    depth: int = 6
    splits: int = 1
    ahead: int = 0
    inside: bool = False


@dataclass(frozen=True)
class RowNorm:
    """y = x * rsqrt(mean(x^2) + eps) * (weight + offset), of a row [K]; weight is [K]."""

    weight: Tensor
    eps: float
    offset: float


@triton.jit
def fetch_ahead(address, count):
    """Ask for `count` bytes (a multiple of 16) from each address to be brought to the second-level cache."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r", [address, count], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def request(w, w_ring, slot, there, first, second, k, pred, GATED: gl.constexpr):
    """Ask for a step's weights: rows from `first` on and, of gated layers, from `second` on."""
    wide: gl.constexpr = 2 if GATED else 1
    tma.async_copy_global_to_shared(w, [first, k], there.index(slot), w_ring.index(slot * wide), pred=pred)
    if GATED:
        tma.async_copy_global_to_shared(w, [second, k], there.index(slot), w_ring.index(slot * wide + 1), pred=pred)


@gluon.jit
def fetch_rest(w, w_start, first, N, K, at, count, BN: gl.constexpr, wide: gl.constexpr):
    """Have `count` elements of each row of the tile, from `at` on, brought to the second-level cache."""
    size: gl.constexpr = w.dtype.primitive_bitwidth // 8
    line = gl.arange(0, BN * wide, gl.BlockedLayout([1], [32], [4], [0]))
    line = tl.minimum(first + line % BN, N - 1) + line // BN * N
    count = tl.minimum(count, K - at) * size
    if count > 0:
        fetch_ahead((w_start + line.to(tl.int64) * K + at).to(tl.int64), count + line * 0)


@gluon.jit
def fetch_lines(start, count, MOST: gl.constexpr):
    """Have `count` numbers of two bytes, at most MOST, brought to the second-level cache."""
    lines: gl.constexpr = MOST // 64 if MOST > 64 else 1
    at = gl.arange(0, lines, gl.BlockedLayout([1], [32], [4], [0])) * 64
    address = (start + tl.minimum(at, count - 1)).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@gluon.jit
def multiply(
    x, w, x_ring, w_ring, there, first, second, begin, steps, step_bytes: gl.constexpr, GATED: gl.constexpr,
    ROW: gl.constexpr, M: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    """The sums of a tile [BN, M], and of its second half of a gated layer. A slot of the ring is filled again one step
    later, when its product is known to be over."""
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, BK // 4])
    wide: gl.constexpr = 2 if GATED else 1
    acc = gl.zeros((BN, M), gl.float32, sums)
    up = gl.zeros((BN, M), gl.float32, sums)
    for i in range(steps):
        slot = i % DEPTH
        mbarrier.wait(there.index(slot), (i // DEPTH) & 1)
        right = x_ring.index(i if ROW else slot).permute((1, 0))
        acc = warpgroup_mma(w_ring.index(slot * wide), right, acc, is_async=True)
        if GATED:
            up = warpgroup_mma(w_ring.index(slot * wide + 1), right, up, is_async=True)
            acc, up = warpgroup_mma_wait(2, deps=(acc, up))
        else:
            acc = warpgroup_mma_wait(1, deps=(acc,))
        more = (i > 0) & (i - 1 + DEPTH < steps)
        free = (i + DEPTH - 1) % DEPTH
        k = (begin + i - 1 + DEPTH) * BK
        mbarrier.expect(there.index(free), step_bytes, pred=more)
        request(w, w_ring, free, there, first, second, k, more, GATED)
        if not ROW:
            tma.async_copy_global_to_shared(x, [0, k], there.index(free), x_ring.index(free), pred=more)
    if GATED:
        acc, up = warpgroup_mma_wait(0, deps=(acc, up))
    else:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    return acc, up


@gluon.jit
def leave_part(place, acc, up, GATED: gl.constexpr, M: gl.constexpr, BN: gl.constexpr):
    """Store sums to a part's place, transposed: the threads that finish the tile read neighbouring words."""
    n, m = gl.arange(0, BN, gl.SliceLayout(1, acc.type.layout)), gl.arange(0, M, gl.SliceLayout(0, acc.type.layout))
    at = place + (m * BN)[None, :] + n[:, None]
    tl.store(at, acc)
    if GATED:
        tl.store(at + BN * M, up)


@gluon.jit
def load_row(x, norm_weight, at, end, rstd, offset, NORM: gl.constexpr, layout: gl.constexpr, CHUNK: gl.constexpr):
    """CHUNK elements of x's only row from `at` on, normalized; zeros from `end` on."""
    column = at + gl.arange(0, CHUNK, layout)
    y = tl.load(x + column, mask=column < end, other=0.0).to(gl.float32)
    if NORM:
        y = y * rstd * (tl.load(norm_weight + column, mask=column < end, other=0.0).to(gl.float32) + offset)
    return y


@gluon.jit
def prepare_row(
    x, norm_weight, x_all, begin, end, eps, offset, NORM: gl.constexpr, K: gl.constexpr, WIDTH: gl.constexpr,
    M: gl.constexpr,
):  # fmt: skip
    """Put x's only row, normalized and in the type of x_all, [M, WIDTH], there: its columns [begin, end), in every row.
    Returns the scale that fp8 was divided by, the largest of these columns over 448."""
    fp8: gl.constexpr = x_all.dtype.primitive_bitwidth == 8
    CHUNK: gl.constexpr = 1024 if WIDTH > 1024 else WIDTH
    square: gl.constexpr = gl.BlockedLayout([1, 16 if fp8 else 8], [8, 4], [1, 4], [1, 0])
    line: gl.constexpr = gl.SliceLayout(0, square)
    rstd = 1.0
    if NORM:
        flat: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
        squares = gl.zeros((1024,), gl.float32, flat)
        for c in gl.static_range((K + 1023) // 1024):
            y = load_row(x, norm_weight, c * 1024, K, 1.0, 0.0, False, flat, 1024)
            squares += y * y
        rstd = tl.rsqrt(gl.sum(squares, 0) / K + eps)
    scale = 1.0
    if fp8:
        most = gl.zeros((CHUNK,), gl.float32, line)
        for c in gl.static_range(WIDTH // CHUNK):
            y = load_row(x, norm_weight, begin + c * CHUNK, end, rstd, offset, NORM, line, CHUNK)
            most = gl.maximum(most, gl.abs(y))
        scale = gl.maximum(gl.max(most, 0), 1e-12) / 448.0
    for c in gl.static_range(WIDTH // CHUNK):
        y = load_row(x, norm_weight, begin + c * CHUNK, end, rstd, offset, NORM, line, CHUNK)
        if fp8:
            y = gl.minimum(gl.maximum(y / scale, -448.0), 448.0)
        rows = gl.zeros((M, CHUNK), gl.float32, square) + gl.expand_dims(y, 0)
        x_all.slice(c * CHUNK, CHUNK, dim=1).store(rows.to(x_all.dtype))
    return scale


@gluon.jit(do_not_specialize=["rows"])
def stream_linear_kernel(
    x, w, w_start, x_scales, scales, residual, bias, out, partial, tickets, norm_weight, eps, offset, rows, N, K,
    residual_row, GATED: gl.constexpr, RESIDUAL: gl.constexpr, BIAS: gl.constexpr, SCALED: gl.constexpr,
    KIND: gl.constexpr, SPLITS: gl.constexpr, M: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    DEPTH: gl.constexpr, AHEAD: gl.constexpr, ROW: gl.constexpr, NORM: gl.constexpr, WIDTH: gl.constexpr,
    FIXED_K: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    wide: gl.constexpr = 2 if GATED else 1
    size: gl.constexpr = w.dtype.primitive_bitwidth // 8
    step_bytes: gl.constexpr = (wide * BN * BK + (0 if ROW else M * BK)) * size
    tile, split = tl.program_id(0), tl.program_id(1)
    first, second = tile * BN, N + tile * BN
    share = tl.cdiv(tl.cdiv(K, BK), SPLITS)
    begin = split * share
    steps = tl.minimum(share, tl.cdiv(K, BK) - begin)
    w_ring = gl.allocate_shared_memory(w.dtype, [DEPTH * wide, BN, BK], w.layout)
    there = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(DEPTH):
        mbarrier.init(there.index(i), count=1)
    fence_async_shared()
    for i in range(tl.minimum(steps, DEPTH)):
        mbarrier.expect(there.index(i), step_bytes)
        request(w, w_ring, i, there, first, second, (begin + i) * BK, True, GATED)
    if AHEAD > 0:
        fetch_rest(w, w_start, first, N, K, (begin + DEPTH) * BK, tl.minimum(steps - DEPTH, AHEAD) * BK, BN, wide)
    if NORM:
        fetch_lines(norm_weight + begin * BK, K - begin * BK, WIDTH)
    across: gl.constexpr = gl.BlockedLayout([4, 1], [16, 2], [1, 4], [0, 1])
    n, m = first + gl.arange(0, BN, gl.SliceLayout(1, across)), gl.arange(0, M, gl.SliceLayout(0, across))
    of_weights = weight_terms(scales, bias, n, N, GATED, BIAS, SCALED)
    if PDL:
        gdc_wait()
    scale = 1.0
    if ROW:
        x_all = gl.allocate_shared_memory(w.dtype, [M, WIDTH], w.layout)
        end = tl.minimum((begin + steps) * BK, K)
        scale = prepare_row(x, norm_weight, x_all, begin * BK, end, eps, offset, NORM, FIXED_K, WIDTH, M)
        fence_async_shared()
        gl.thread_barrier()
        x_ring = x_all._reinterpret(w.dtype, [WIDTH // BK, M, BK], w.layout)
    else:
        x_ring = gl.allocate_shared_memory(w.dtype, [DEPTH, M, BK], w.layout)
        for i in range(tl.minimum(steps, DEPTH)):
            tma.async_copy_global_to_shared(x, [0, (begin + i) * BK], there.index(i), x_ring.index(i))
    of_rows = row_terms(x_scales, residual, n, m, rows, N, residual_row, SCALED, RESIDUAL)
    acc, up = multiply(
        x, w, x_ring, w_ring, there, first, second, begin, steps, step_bytes, GATED, ROW, M, BN, BK, DEPTH
    )
    if ROW and SCALED:
        acc, up = acc * scale, up * scale

    if SPLITS == 1:
        acc, up = gl.convert_layout(acc, across), gl.convert_layout(up, across)
        finish_tile(acc, up, of_weights, of_rows, out, n, m, rows, N, GATED, KIND)
    else:
        stride = tl.num_programs(0) * (BN * M * wide)
        place = partial + tile * (BN * M * wide)
        leave_part(place + split * stride, acc, up, GATED, M, BN)
        gl.thread_barrier()
        ticket = tl.atomic_add(tickets + tile, 1, sem="acq_rel")
        if ticket == SPLITS - 1:
            gl.thread_barrier()
            total = gl.zeros((BN, M), gl.float32, across)
            total_up = gl.zeros((BN, M), gl.float32, across)
            for part in gl.static_range(SPLITS):
                at = place + part * stride + (m * BN)[None, :] + (n - first)[:, None]
                total += tl.load(at, cache_modifier=".cg")
                if GATED:
                    total_up += tl.load(at + BN * M, cache_modifier=".cg")
            finish_tile(total, total_up, of_weights, of_rows, out, n, m, rows, N, GATED, KIND)
            tl.store(tickets + tile, 0)


def refuses(x: Tensor, w: Tensor, inside: bool = False) -> str | None:
    """Why the kernel cannot compute x W^T; None when it can. `inside`: it prepares x itself."""
    if torch.cuda.get_device_capability(x.device)[0] != 9:
        return "not a Hopper GPU"
    real = (torch.bfloat16, torch.float16)
    quantized = w.dtype == torch.float8_e4m3fn
    if not (w.dtype in real or quantized) or not (x.dtype == w.dtype or (inside and quantized and x.dtype in real)):
        return f"{x.dtype} times {w.dtype}"
    if inside and len(x) != 1:
        return f"{len(x)} rows where one can be prepared"
    if w.stride(0) * w.element_size() % 16 or x.stride(0) * x.element_size() % 16 or x.data_ptr() % 16:
        return "rows do not begin at multiples of 16 bytes"
    return None


def stream_linear(
    x: Tensor, w: Tensor, config: StreamLinearConfig, *, tickets: Tensor, x_scales: Tensor | None = None,
    scales: Tensor | None = None, residual: Tensor | None = None, bias: Tensor | None = None, gated: str | None = None,
    out_dtype: torch.dtype | None = None, norm: RowNorm | None = None,
) -> Tensor:  # fmt: skip
    """[rows, K] x [N, K]^T -> [rows, N]; the arguments of `small_linear`. Raises ValueError for what it `refuses`.

    With config.inside, x is one row that is normalized if `norm` is given, and quantized if w is: x_scales stays None.
    """
    if reason := refuses(x, w, config.inside):
        raise ValueError(f"stream_linear: {reason}")
    rows, k = x.shape
    n = w.shape[0] // 2 if gated else w.shape[0]
    out = torch.empty(rows, n, dtype=out_dtype or x.dtype, device=x.device)
    m = max(FEWEST_ROWS, triton.next_power_of_2(rows))
    count = triton.cdiv(n, config.outputs)
    partial = out
    if config.splits > 1:
        size = config.splits * count * config.outputs * m * (2 if gated else 1)
        partial = torch.empty(size, dtype=torch.float32, device=x.device)
    step = STEP_BYTES // w.element_size()
    share = triton.cdiv(triton.cdiv(k, step), config.splits)
    if config.inside and scales is not None:
        x_scales = _one(x.device)
    stream_linear_kernel[(count, config.splits)](
        x if config.inside else _operand(x, m, step), _operand(w, config.outputs, step), w,
        x if x_scales is None else x_scales, x if scales is None else scales, x if residual is None else residual,
        x if bias is None else bias, out, partial, tickets, x if norm is None else norm.weight,
        0.0 if norm is None else norm.eps, 0.0 if norm is None else norm.offset, rows, n, k,
        0 if residual is None else residual.stride(0), GATED=gated is not None, RESIDUAL=residual is not None,
        BIAS=bias is not None, SCALED=scales is not None, KIND=gated or "silu", SPLITS=config.splits, M=m,
        BN=config.outputs, BK=step, DEPTH=config.depth, AHEAD=config.ahead, ROW=config.inside, NORM=norm is not None,
        WIDTH=triton.next_power_of_2(share) * step if config.inside else 0, FIXED_K=k if config.inside else 0,
        num_warps=WARPS, **options(x),
    )  # fmt: skip
    return out


@functools.cache
def _one(device: torch.device) -> Tensor:
    return torch.ones(1, device=device)


def _operand(x: Tensor, rows: int, step: int) -> Any:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=STEP_BYTES, element_bitwidth=8 * x.element_size(), rank=2)
    return TensorDescriptor.from_tensor(x, [rows, step], layout)
