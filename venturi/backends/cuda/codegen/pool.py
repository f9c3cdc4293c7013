"""Triton text of NHWC pooling: windows, and means over a whole image."""

from __future__ import annotations

from venturi.backends.base import RegionView
from venturi.backends.cuda.codegen.conv import ConvGeometry
from venturi.backends.cuda.codegen.expressions import BYTE_LIMITS, STORE_TYPES, rounded
from venturi.backends.cuda.codegen.module import constexprs, filler, module, pointer_type
from venturi.backends.cuda.kernel import KernelSource
from venturi.ir.dtypes import DT

_LOWEST = 'float("-inf")'
# From here on there are instructions for two 16-bit numbers.
_PAIRED_ARCH = 90


def window_source(
    region: RegionView, g: ConvGeometry, dtype: DT, mean: bool, padded: bool, size: tuple[int, int, int], arch: int
) -> KernelSource:
    """Maximum or mean over windows; `padded` counts the padding in the mean. `size`: pixels, channels, warps."""
    rows, cols = g.kernel
    outside, fill = "0.0" if mean else _LOWEST, list[str]()
    first = "tl.zeros((BM, BN), tl.float32)" if mean else 'tl.full((BM, BN), float("-inf"), tl.float32)'
    step = "acc += x" if mean else "acc = tl.maximum(acc, x, propagate_nan=tl.PropagateNan.ALL)"
    if dtype in BYTE_LIMITS:
        lowest = BYTE_LIMITS[dtype][0]
        fill, outside = filler(lowest)
        larger = f"_larger_{STORE_TYPES[dtype].removeprefix('tl.')}" if arch >= _PAIRED_ARCH else "tl.maximum"
        first, step = f"tl.full((BM, BN), {lowest}, {STORE_TYPES[dtype]})", f"acc = {larger}(acc, x)"
    divisor = str(rows * cols) if padded else "seen.to(tl.float32)[:, None]"
    count = [f"acc = acc / {divisor}"] if mean else []
    lines = [
        "M = images * P * Q",
        "m = tl.program_id(0) * BM + tl.arange(0, BM)",
        "n = tl.program_id(1) * BN + tl.arange(0, BN)",
        f"h0 = ((m // Q) % P) * {g.strides[0]} - {g.pads[0]}",
        f"v0 = (m % Q) * {g.strides[1]} - {g.pads[1]}",
        "image = a + (m // (P * Q)).to(tl.int64) * (H * W * N)",
        f"acc = {first}",
        *fill,
        "seen = tl.zeros((BM,), tl.int32)",
        f"for r in tl.static_range({rows}):",
        f"    for s in tl.static_range({cols}):",
        f"        h = h0 + r * {g.dilations[0]}",
        f"        v = v0 + s * {g.dilations[1]}",
        "        ok = (h >= 0) & (h < H) & (v >= 0) & (v < W) & (m < M)",
        "        pixel = image + (h * W + v) * N",
        "        inside = ok[:, None] & (n < N)[None, :]",
        f"        x = tl.load(pixel[:, None] + n[None, :], mask=inside, other={outside})",
        *([] if dtype in BYTE_LIMITS else ["        x = x.to(tl.float32)"]),
        f"        {step}",
        "        seen += ok.to(tl.int32)",
        *count,
        "at = m.to(tl.int64)[:, None] * N + n[None, :]",
        f"tl.store(c + at, acc.to({STORE_TYPES[dtype]}), mask=(m < M)[:, None] & (n < N)[None, :])",
    ]
    sizes = ["images", "H", "W", "P", "Q", "N"]
    text = module(region, "pool", ["a", "c", *sizes, *constexprs("BM", "BN")], lines, arch)
    signature = (
        ("a", pointer_type(dtype)), ("c", pointer_type(dtype)), *((s, "i32") for s in sizes),
        ("BM", "constexpr"), ("BN", "constexpr"),
    )  # fmt: skip
    divisible = ("a", "c", *(["N"] if g.channels % 16 == 0 else []))
    return KernelSource("pool", text, signature, (("BM", size[0]), ("BN", size[1])), divisible, size[2], 1, arch)


def mean_source(
    region: RegionView, dtype: DT, wide: bool, block: tuple[int, int], split: int, arch: int
) -> KernelSource:
    """Mean over all pixels of an image: `split` programs share one image's pixels, the last to finish adds them up."""
    store = f"tl.store(c + image * N + n, {rounded('(total / pixels)', dtype)}, mask=n < N)"
    lines = [
        "blocks = tl.cdiv(N, BN)",
        "image = (tl.program_id(0) // blocks).to(tl.int64)",
        "n = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)",
        "share = tl.cdiv(pixels, SPLIT)",
        "begin = tl.program_id(1) * share",
        "end = tl.minimum(begin + share, pixels)",
        "sums = tl.zeros((BM, BN), tl.float32)",
        "for start in range(begin, end, BM):",
        "    p = start + tl.arange(0, BM)",
        "    where = a + (image * pixels + p)[:, None] * N + n[None, :]",
        "    sums += tl.load(where, mask=(p < end)[:, None] & (n < N)[None, :], other=0.0).to(tl.float32)",
        "total = tl.sum(sums, 0)",
        "if SPLIT == 1:",
        f"    {store}",
        "else:",
        "    slab = images.to(tl.int64) * N",
        "    tl.store(work + tl.program_id(1) * slab + image * N + n, total, mask=n < N)",
        "    tl.debug_barrier()",
        '    ticket = tl.atomic_add(locks + tl.program_id(0), 1, sem="acq_rel")',
        "    if ticket == SPLIT - 1:",
        "        total = tl.zeros((BN,), tl.float32)",
        "        for s in range(SPLIT):",
        '            total += tl.load(work + s * slab + image * N + n, mask=n < N, other=0.0, cache_modifier=".cg")',
        f"        {store}",
        "        tl.store(locks + tl.program_id(0), 0)",
    ]
    names = ["a", "c", "work", "locks", "images", "pixels", "N"]
    text = module(region, "mean", [*names, *constexprs("BM", "BN", "SPLIT")], lines, arch)
    signature = (
        ("a", pointer_type(dtype)), ("c", pointer_type(dtype)), ("work", "*fp32"), ("locks", "*i32"),
        ("images", "i32"), ("pixels", "i32"), ("N", "i32"),
        ("BM", "constexpr"), ("BN", "constexpr"), ("SPLIT", "constexpr"),
    )  # fmt: skip
    constants = (("BM", block[0]), ("BN", block[1]), ("SPLIT", split))
    divisible = ("a", "c", "work", "locks", *(["N"] if wide else []))
    return KernelSource("mean", text, signature, constants, divisible, 4, 1, arch)
