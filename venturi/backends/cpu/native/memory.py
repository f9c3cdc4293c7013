"""Memory for packed weights and arenas on huge pages where the system has them: fewer translations to look up."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable

import torch

HUGE_PAGE = 2 << 20
ALIGNMENT = 64
PIECE_BYTES = 1 << 20


def empty_bytes(size: int) -> torch.Tensor:
    """Uninitialized bytes, aligned to 64 at least. Whole huge pages within them are asked for as such; what is left
    over lies on ordinary ones, so that nothing beyond `size` becomes resident."""
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        raw = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
        start = -raw.data_ptr() % ALIGNMENT
        return raw[start : start + size]
    region = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    raw = torch.frombuffer(region, dtype=torch.uint8)
    start = -raw.data_ptr() % HUGE_PAGE
    with contextlib.suppress(OSError):
        region.madvise(mmap.MADV_HUGEPAGE, start, size // HUGE_PAGE * HUGE_PAGE)
    return raw[start : start + size]


def packed_copy(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of `x` in such memory."""
    out = empty_bytes(x.nbytes).view(x.dtype).view(x.shape)
    out.copy_(x)
    return out


def packed_by_pieces(weight: torch.Tensor, block: int, pack: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`pack(weight)` in such memory. `pack` makes blocks of `block` of the outermost axis; it is given some at a time,
    so that what it needs besides stays small."""
    size, blocks = max(1, weight[:1].nbytes) * block, -(-weight.shape[0] // block)
    some = max(1, PIECE_BYTES // size)
    out = None
    for first in range(0, blocks, some):
        piece = pack(weight[first * block : (first + some) * block])
        if out is None:
            out = empty_bytes(blocks * piece[0].nbytes).view(piece.dtype).view(blocks, *piece.shape[1:])
        out[first : first + some] = piece
    assert out is not None, "weights without outputs have no kernel"
    return out
