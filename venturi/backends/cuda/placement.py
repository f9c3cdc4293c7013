"""Brings host values to the device: shape arithmetic runs on the host, kernels read device memory only."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from venturi.backends.base import Config, Kernel, RegionView, Tactic
from venturi.backends.cuda.kernel import KernelSource

T = torch.Tensor
_KEPT = 64


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def sources_of(tactic: Tactic, region: RegionView, config: Config) -> list[KernelSource]:
    """What must be compiled before `tactic` can be bound; nothing for library calls."""
    make: Callable[[RegionView, Config], list[KernelSource]] | None = getattr(tactic, "sources", None)
    return [] if make is None else make(region, config)


class Mover:
    """Device copies of host tensors, kept by content: a captured graph must not copy from the host.

    The least recent copies are dropped, but never one that a captured graph reads.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: OrderedDict[tuple[Any, ...], T] = OrderedDict()
        self._captured: dict[int, T] = {}

    def __call__(self, x: Any) -> Any:
        if not isinstance(x, T) or x.device == self._device:
            return x
        data = x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""
        key = (x.dtype, tuple(x.shape), hashlib.blake2b(data).digest())
        found = self._copies.get(key)
        if found is None:
            found = self._copies[key] = x.to(self._device)
            while len(self._copies) > _KEPT:
                self._copies.popitem(last=False)
        if _capturing(self._device):
            self._captured[found.data_ptr()] = found
        return found


class OnDevice:
    """A tactic whose kernels get every operand on the device."""

    def __init__(self, tactic: Tactic, device: torch.device) -> None:
        self.name = tactic.name
        self._tactic = tactic
        self._device = device

    def match(self, region: RegionView) -> list[Config] | str:
        return self._tactic.match(region)

    def sources(self, region: RegionView, config: Config) -> list[KernelSource]:
        return sources_of(self._tactic, region, config)

    def bind(self, region: RegionView, config: Config) -> Kernel:
        """Waits for the weights: kernels may read them before they wait for the stream's earlier work."""
        run, move, device = self._tactic.bind(region, config).run, Mover(self._device), self._device
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()

        def placed(*args: Any) -> Any:
            if all(a.device == device for a in args):
                return run(*args)
            return run(*(move(a) for a in args))

        return Kernel(placed)
