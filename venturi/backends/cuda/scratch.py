"""Device memory that kernels use between two barriers: partial sums and tickets. One owner a context.

Kernels of a context run one after the other, so they share the buffers; every kernel leaves the tickets at zero.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Scratch:
    """Grows on demand. Outgrown buffers stay alive: captured graphs still point at them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: list[torch.Tensor] = []
        self._sums = torch.empty(0, dtype=torch.float32, device=device)
        self._tickets = torch.zeros(0, dtype=torch.int32, device=device)

    def sums(self, count: int) -> torch.Tensor:
        """At least `count` fp32 of any content."""
        if self._sums.numel() < count:
            self._kept.append(self._sums)
            self._sums = torch.empty(count, dtype=torch.float32, device=self._device)
        return self._sums

    def tickets(self, count: int) -> torch.Tensor:
        """At least `count` int32, all zero between kernels."""
        if self._tickets.numel() < count:
            self._kept.append(self._tickets)
            self._tickets = torch.zeros(max(count, 4096), dtype=torch.int32, device=self._device)
        return self._tickets

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self._kept, self._sums, self._tickets))


class _Current(threading.local):
    scratch: Scratch | None = None


_current = _Current()


def current_scratch(device: torch.device) -> Scratch:
    """The running context's, or one of this thread's own while tuning."""
    if _current.scratch is None or _current.scratch._device != device:
        _current.scratch = Scratch(device)
    return _current.scratch


@contextmanager
def using(scratch: Scratch) -> Iterator[None]:
    """Kernels launched by this thread take their scratch memory from `scratch`."""
    before, _current.scratch = _current.scratch, scratch
    try:
        yield
    finally:
        _current.scratch = before
