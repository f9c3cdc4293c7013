"""Which tile shapes are worth timing for a product of a given size: a coarse model of a multiprocessor, best first."""

from __future__ import annotations

from dataclasses import replace

from venturi.backends.cuda.codegen.element import Element
from venturi.backends.cuda.codegen.gemm import GemmConfig

# (BM, BN, BK of halves, stages, warps): what compiles without spilling and has paid on Hopper or Ampere.
TILES = (
    (128, 256, 64, 3, 8), (128, 128, 64, 3, 8), (128, 128, 64, 4, 4), (256, 64, 64, 3, 8), (256, 128, 64, 3, 8),
    (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4), (64, 64, 128, 3, 4), (64, 32, 64, 5, 4),
    (64, 32, 128, 4, 4), (128, 32, 64, 4, 4), (32, 64, 64, 5, 4), (32, 32, 128, 4, 4), (16, 64, 128, 4, 4),
    (16, 32, 128, 5, 2), (16, 128, 64, 4, 4), (128, 64, 32, 5, 4), (64, 64, 32, 5, 4), (128, 32, 32, 4, 4),
    (64, 32, 32, 4, 4), (128, 16, 32, 4, 4), (64, 16, 64, 4, 4), (32, 32, 32, 4, 2), (16, 32, 32, 4, 2),
    (32, 16, 64, 4, 2), (64, 128, 64, 4, 8), (128, 128, 64, 4, 8), (64, 256, 64, 3, 8), (64, 64, 64, 4, 8),
    (128, 64, 64, 4, 8), (64, 64, 128, 3, 8), (128, 128, 32, 4, 8), (128, 128, 64, 2, 8), (128, 128, 32, 2, 8),
    (128, 64, 64, 2, 4), (64, 128, 64, 2, 4), (128, 64, 32, 3, 4), (64, 16, 32, 4, 4), (16, 16, 32, 3, 2),
)  # fmt: skip
# Little shared memory: two programs a multiprocessor, one computes while the other loads and stores.
LIGHT = frozenset({(128, 128, 32, 4, 8), (128, 128, 64, 2, 8), (128, 64, 64, 2, 4)})
SPLITS = (1, 2, 3, 4, 6, 8)
# Nanoseconds: what a tile costs before its first and after its last product; a K step's latency that nothing hides.
_TILE_NS, _STEP_NS, _REDUCE_NS = 900.0, 60.0, 1500.0
# With two sums for every output and two tiles of weights a step: outputs a warp, bytes of a program.
_PARTS_TILE, _SHARED = 2048, 220 * 1024
# Terms of a sum that tensor cores may make too small, and how many candidates are offered that add with rounding.
_LONG, _ROUNDED = 2048, 4
_FLOPS_PER_NS, _BYTES_PER_NS = 6000.0, 60.0


def product_candidates(
    rows: int | None, columns: int, depth: int, num_sms: int, limit: int, *, splits: bool, element: Element
) -> list[GemmConfig]:
    """About `limit` configurations for [rows, depth] x [depth, columns]; `rows` None stands for many."""
    bytes, is_long = element.bytes, element.in_parts and depth >= _LONG
    depth = -(-depth * bytes // 2)
    m = rows if rows else 4096
    scored = []
    for bm, bn, bk, stages, warps in TILES:
        if element.in_parts and (bm * bn > _PARTS_TILE * warps or (bm + 2 * bn) * bk * 2 * stages > _SHARED):
            continue
        if bm > max(64, _up(m)) or bn > max(16, _up(columns)) or bk > max(32, _up(depth)):
            continue
        tiles = -(-m // bm) * -(-columns // bn)
        steps = -(-depth // bk)
        for split in SPLITS if splits else (1,):
            if split > 1 and (tiles * split > 2 * num_sms or steps // split < 2):
                continue
            cost = _cost(tiles, split, steps, bm, bn, bk, num_sms)
            scored.append((cost, GemmConfig(bm, bn, bk * 2 // bytes, stages, warps, split)))
    scored.sort(key=lambda s: s[0])
    best = [c for _, c in scored[:limit]]
    if is_long:
        best += [replace(c, rounded=True) for c in best[:_ROUNDED]]
    many = -(-m // 128) * -(-columns // 128) > 2 * num_sms
    return best + [c for _, c in scored[limit:] if many and (c.bm, c.bn, c.bk * bytes // 2, c.stages, c.warps) in LIGHT]


def _cost(tiles: int, split: int, steps: int, bm: int, bn: int, bk: int, num_sms: int) -> float:
    """Nanoseconds by waves of whole tiles."""
    waves = -(-tiles * split // num_sms)
    rate: float = _FLOPS_PER_NS * min(1.0, (bm * bn) / (128 * 256)) ** 0.4 * (0.5 if bm < 64 else 1.0)
    step = max(2.0 * bm * bn * bk / rate, 2.0 * (bm + bn) * bk / _BYTES_PER_NS) + _STEP_NS
    return float(waves) * (_TILE_NS + -(-steps // split) * step) + (_REDUCE_NS if split > 1 else 0.0)


def _up(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
