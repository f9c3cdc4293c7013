"""Small integer arrays to the device in one asynchronous copy, through a ring of pinned buffers."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Staging:
    """Uploads int64 arrays. A buffer is used again only after the copy that read it has finished."""

    def __init__(self, device: torch.device, buffers: int = 8) -> None:
        self._device = device
        self._ring: list[tuple[Tensor, torch.cuda.Event | None]] = [
            (torch.empty(1024, dtype=torch.int64, pin_memory=True), None) for _ in range(buffers)
        ]
        self._next = 0

    def upload(self, *arrays: NDArray[np.integer]) -> list[Tensor]:
        """Copies of the arrays on the device, as views of one new tensor."""
        sizes = [len(a) for a in arrays]
        total = sum(sizes)
        pinned, event = self._ring[self._next]
        if event is not None:
            event.synchronize()
        if len(pinned) < total:
            pinned = torch.empty(2 * total, dtype=torch.int64, pin_memory=True)
        host = pinned[:total]
        np.concatenate(arrays, out=host.numpy(), casting="unsafe")
        target = torch.empty(total, dtype=torch.int64, device=self._device)
        target.copy_(host, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._ring[self._next] = (pinned, event)
        self._next = (self._next + 1) % len(self._ring)
        return list(target.split(sizes))
