"""One NVIDIA GPU: what it is, the cubins loaded on it, and weights that move there when first asked for."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from venturi.backends.cuda.kernel import KernelSource
from venturi.backends.cuda.memory import out_of_memory
from venturi.backends.cuda.store import KernelStore
from venturi.core.errors import DeviceError, TuningError

MIN_ARCH = 80
MAX_SPILLS = 256


class Launchable(Protocol):
    def launch(self, grid: Any, args: Any) -> None: ...


class KernelDevice(Protocol):
    """What tactics need to know of a device. Tests put Triton's interpreter behind it."""

    @property
    def arch(self) -> int: ...

    @property
    def num_sms(self) -> int: ...

    def kernel(self, source: KernelSource) -> Launchable: ...


@dataclass(frozen=True)
class OfflineDevice:
    """A GPU that is not here: tactics can match and generate code for it, nothing can be loaded."""

    arch: int
    num_sms: int = 132

    def kernel(self, source: KernelSource) -> Launchable:
        raise DeviceError(f"kernel {source.name} cannot run: sm_{self.arch} is described, not present")


@dataclass
class CudaDevice:
    """A GPU opened by `open_device`. Kernels are loaded once a device and kept."""

    index: int
    name: str
    arch: int
    num_sms: int
    memory_bytes: int
    store: KernelStore
    _loaded: dict[str, Launchable] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cuda", self.index)

    def kernel(self, source: KernelSource) -> Launchable:
        """Raises TuningError when it does not compile or spills registers."""
        from venturi.backends.cuda.driver import LoadedKernel

        with self._lock:
            found = self._loaded.get(source.key)
            if found is None:
                cubin = self.store.get(source)
                if cubin.spills > MAX_SPILLS:
                    raise TuningError(f"{source.name} spills {cubin.spills} bytes of registers a thread")
                with torch.cuda.device(self.index):
                    found = self._loaded[source.key] = LoadedKernel(cubin)
            return found


def open_device(spec: str, store: KernelStore) -> CudaDevice:
    """ "cuda" or "cuda:1". Raises DeviceError naming what is missing."""
    index = _index(spec)
    if not torch.cuda.is_available():
        built = "is built without CUDA" if torch.version.cuda is None else "finds no NVIDIA GPU or driver"
        raise DeviceError(f"device {spec!r}: torch {torch.__version__} {built}; use device='cpu'")
    count = torch.cuda.device_count()
    if index >= count:
        raise DeviceError(f"device {spec!r}: this machine has {count} GPUs, cuda:0 to cuda:{count - 1}")
    about = torch.cuda.get_device_properties(index)
    arch = about.major * 10 + about.minor
    if arch < MIN_ARCH:
        raise DeviceError(f"device {spec!r} is {about.name} (sm_{arch}); sm_{MIN_ARCH} or newer is needed")
    return CudaDevice(index, about.name, arch, about.multi_processor_count, about.total_memory, store)


def _index(spec: str) -> int:
    if spec == "cuda":
        return 0
    kind, _, number = spec.partition(":")
    if kind != "cuda" or not number.isdigit():
        raise DeviceError(f"unknown device {spec!r}; known: auto, cpu, cuda, cuda:N")
    return int(number)


class DeviceWeights(Mapping[str, Any]):
    """Weights by name on the device, moved on demand and kept only as long as a kernel holds them.

    `host` has the originals: operands that decide shapes are read there.
    """

    def __init__(self, host: Mapping[str, Any], device: torch.device) -> None:
        self.host = host
        self._device = device
        self._moved: weakref.WeakValueDictionary[str, torch.Tensor] = weakref.WeakValueDictionary()

    def __getitem__(self, name: str) -> Any:
        stored = self.host[name]
        if not isinstance(stored, torch.Tensor):
            return stored
        moved = self._moved.get(name)
        if moved is None:
            try:
                moved = stored.to(self._device)
            except torch.OutOfMemoryError as exc:
                raise out_of_memory(self._device, exc, f"weight {name!r}") from exc
            self._moved[name] = moved
        return moved

    def __contains__(self, name: object) -> bool:
        return name in self.host

    def __iter__(self) -> Iterator[str]:
        return iter(self.host)

    def __len__(self) -> int:
        return len(self.host)
