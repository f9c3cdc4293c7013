"""Building for a GPU that is not here: kernels are compiled for its architecture, nothing is bound, run or timed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from venturi.backends.base import Backend, Config, Kernel, RegionView, Tactic
from venturi.backends.cuda.backend import cuda_backend
from venturi.backends.cuda.device import MIN_ARCH, OfflineDevice
from venturi.backends.cuda.kernel import KernelSource
from venturi.backends.cuda.placement import sources_of
from venturi.backends.cuda.store import KernelStore
from venturi.core.errors import DeviceError

# Multiprocessors of a common chip of the architecture; they only guide the choice of tiles.
NUM_SMS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 103: 148, 120: 170}
# Their candidates are enumerated by the library on the device.
_ASK_THE_DEVICE = ("cublaslt", "cudnn-conv", "cudnn-conv-3d", "cudnn-attention")


def parse_arch(target: str) -> int:
    """90 for "sm_90". Raises DeviceError for what is no architecture we generate code for."""
    number = target.removeprefix("sm_")
    if not target.startswith("sm_") or not number.isdigit() or int(number) not in NUM_SMS:
        known = ", ".join(f"sm_{a}" for a in NUM_SMS if a >= MIN_ARCH)
        raise DeviceError(f"unknown target {target!r}; known: {known}")
    return int(number)


def offline_backend(arch: int, store: KernelStore) -> Backend:
    """The tactics of `arch` that need no device to say what they can do."""
    whole = cuda_backend(OfflineDevice(arch, NUM_SMS[arch]), torch.device("cpu"))
    tactics = tuple(_Compiled(t, store) for t in whole.tactics if t.name not in _ASK_THE_DEVICE)
    return replace(whole, tactics=tactics)


class _Compiled:
    """A tactic whose kernels are compiled and kept for the engine file, but not loaded."""

    def __init__(self, tactic: Tactic, store: KernelStore) -> None:
        self.name = tactic.name
        self._tactic, self._store = tactic, store

    def match(self, region: RegionView) -> list[Config] | str:
        return self._tactic.match(region)

    def sources(self, region: RegionView, config: Config) -> list[KernelSource]:
        return sources_of(self._tactic, region, config)

    def bind(self, region: RegionView, config: Config) -> Kernel:
        for source in self.sources(region, config):
            self._store.get(source)
        return Kernel(_not_here)


def _not_here(*args: Any) -> Any:
    raise DeviceError("this engine is built for a GPU that is not here; save it, and load the file there")
