"""Memory for weights and arenas on huge pages where the system has them: fewer translations for the CPU to look up."""

from __future__ import annotations

import contextlib
import mmap
import threading

import torch

HUGE_PAGE = 2 << 20
CHUNK = 16 * HUGE_PAGE
ALIGNMENT = 64


def empty_bytes(size: int) -> torch.Tensor:
    """Uninitialized bytes, aligned to 64 at least; on huge pages of their own where `size` is a page or more."""
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        raw = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
        start = -raw.data_ptr() % ALIGNMENT
        return raw[start : start + size]
    whole = -(-size // HUGE_PAGE) * HUGE_PAGE
    region = mmap.mmap(-1, whole + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        region.madvise(mmap.MADV_HUGEPAGE)
    raw = torch.frombuffer(region, dtype=torch.uint8)
    start = -raw.data_ptr() % HUGE_PAGE
    return raw[start : start + size]


class Pool:
    """Hands out pieces of large blocks. A block lives as long as a tensor on it; the last one is kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._block: torch.Tensor | None = None
        self._used = 0

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of `x` in the pool."""
        size = -(-x.nbytes // ALIGNMENT) * ALIGNMENT
        if size >= CHUNK:
            home = empty_bytes(x.nbytes)
        else:
            with self._lock:
                if self._block is None or self._used + size > CHUNK:
                    self._block, self._used = empty_bytes(CHUNK), 0
                home = self._block[self._used : self._used + x.nbytes]
                self._used += size
        out = home.view(x.dtype).view(x.shape)
        out.copy_(x)
        return out


WEIGHTS = Pool()
