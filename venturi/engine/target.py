"""Where an engine runs: the backend of a device with its timer, its contexts and the place of its weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from venturi.backends.base import Backend, Config, RegionView, Tactic
from venturi.backends.cpu.backend import CPU
from venturi.core.errors import DeviceError
from venturi.core.progress import ProgressCallback, report
from venturi.runtime.context import Context
from venturi.runtime.executable import Executable
from venturi.runtime.held import Held
from venturi.runtime.profiler import Profiler
from venturi.tuning.timer import CpuTimer, Timer

if TYPE_CHECKING:
    from venturi.backends.cuda.store import KernelStore

Expected = tuple[Tactic, RegionView, Config]
# Microseconds of a run, of fewer runs when they take longer than the given ones; None: timed alone is good enough.
EngineTimer = Callable[[Executable, float], float | None]


class RunContext(Protocol):
    """What an engine needs of a context, on any device."""

    profiler: Profiler | None

    def run(self, args: Sequence[Any]) -> list[Any]: ...

    @property
    def arena_bytes(self) -> int: ...

    def binding_of(self, args: Sequence[Any]) -> Any: ...

    def hold(self, args: Sequence[Any]) -> Held: ...


class Target(Protocol):
    """`name` is what plans are filed under ("cpu", "cuda"), `device` the torch device results live on."""

    name: str
    device: torch.device
    backend: Backend

    def describe(self) -> str: ...

    def fingerprint(self) -> dict[str, str]: ...

    def timer(self) -> Timer: ...

    def context(self, executable: Executable, threads: int) -> RunContext:
        """`threads`: the most that a run uses on the CPU."""
        ...

    def weights(self, host: Mapping[str, Any]) -> Mapping[str, Any]: ...

    def prepare(self, expected: Iterable[Expected], progress: ProgressCallback | None) -> None: ...

    def kernel_files(self) -> dict[str, bytes]: ...

    def engine_timer(self, args: Sequence[Any]) -> EngineTimer:
        """Times whole engines on `args`."""


class CpuTarget:
    name = "cpu"
    device = torch.device("cpu")
    backend = CPU

    def describe(self) -> str:
        return "cpu"

    def fingerprint(self) -> dict[str, str]:
        return {}

    def timer(self) -> Timer:
        return CpuTimer()

    def context(self, executable: Executable, threads: int) -> RunContext:
        return Context(executable, threads)

    def weights(self, host: Mapping[str, Any]) -> Mapping[str, Any]:
        return host

    def prepare(self, expected: Iterable[Expected], progress: ProgressCallback | None) -> None:
        """Nothing is compiled ahead on the CPU."""

    def kernel_files(self) -> dict[str, bytes]:
        return {}

    def engine_timer(self, args: Sequence[Any]) -> EngineTimer:
        """Kernels neither overlap nor find other caches than when timed alone."""
        return lambda executable, hopeless_us: None


class CudaTarget:
    """`kernels` are an engine file's own; with them nothing is compiled."""

    name = "cuda"

    def __init__(self, spec: str, kernels: Mapping[str, Any] | None = None) -> None:
        from venturi.backends.cuda.backend import cuda_backend
        from venturi.backends.cuda.device import open_device
        from venturi.backends.cuda.store import KernelStore

        self._store = KernelStore(kernels, compiles=kernels is None)
        self._gpu = open_device(spec, self._store)
        self.device = self._gpu.torch_device
        self.backend = cuda_backend(self._gpu, self.device)

    def describe(self) -> str:
        from venturi.backends.cuda.lib.versions import library_versions

        return f"{self._gpu.name} sm_{self._gpu.arch} {library_versions()}"

    def fingerprint(self) -> dict[str, str]:
        """What an engine file remembers of its GPU: kernels are machine code for `arch`."""
        from venturi.backends.cuda.lib.versions import library_versions

        return {"arch": f"sm_{self._gpu.arch}", "gpu": self._gpu.name, "libraries": library_versions()}

    def timer(self) -> Timer:
        from venturi.tuning.cuda_timer import CudaTimer

        return CudaTimer(self.device)

    def context(self, executable: Executable, threads: int) -> RunContext:
        from venturi.runtime.cuda_context import CudaContext

        return CudaContext(executable, self.device)

    def weights(self, host: Mapping[str, Any]) -> Mapping[str, Any]:
        from venturi.backends.cuda.device import DeviceWeights

        return DeviceWeights(host, self.device)

    def engine_timer(self, args: Sequence[Any]) -> EngineTimer:
        from venturi.runtime.cuda_context import replay_us

        return lambda executable, hopeless_us: replay_us(executable, self.device, args, hopeless_us)

    def prepare(self, expected: Iterable[Expected], progress: ProgressCallback | None) -> None:
        """Compile the kernels that may be bound, in parallel."""
        compile_expected(self._store, expected, progress)

    def kernel_files(self) -> dict[str, bytes]:
        return self._store.files()


def compile_expected(store: KernelStore, expected: Iterable[Expected], progress: ProgressCallback | None) -> None:
    from venturi.backends.cuda.placement import sources_of

    sources = [source for found in expected for source in sources_of(*found)]
    store.compile(sources, lambda i, n: report(progress, "compile", i, n))


class OfflineTarget:
    """A GPU that is not here: engines can be built and saved for it, not run."""

    name = "cuda"
    device = torch.device("cpu")

    def __init__(self, target: str) -> None:
        from venturi.backends.cuda.offline import offline_backend, parse_arch
        from venturi.backends.cuda.store import KernelStore

        self._arch = parse_arch(target)
        self._store = KernelStore()
        self.backend = offline_backend(self._arch, self._store)

    def describe(self) -> str:
        return f"sm_{self._arch} that is not here"

    def fingerprint(self) -> dict[str, str]:
        return {"arch": f"sm_{self._arch}", "gpu": "", "libraries": ""}

    def timer(self) -> Timer:
        return CpuTimer()

    def context(self, executable: Executable, threads: int) -> RunContext:
        raise DeviceError(f"the engine is built for sm_{self._arch}, which is not here: save it, and load it there")

    def weights(self, host: Mapping[str, Any]) -> Mapping[str, Any]:
        return host

    def engine_timer(self, args: Sequence[Any]) -> EngineTimer:
        return lambda executable, hopeless_us: None

    def prepare(self, expected: Iterable[Expected], progress: ProgressCallback | None) -> None:
        compile_expected(self._store, expected, progress)

    def kernel_files(self) -> dict[str, bytes]:
        return self._store.files()


@functools.cache
def _cpu() -> CpuTarget:
    return CpuTarget()


def resolve_device(device: str) -> str:
    """The device a spec means: "auto" is the first GPU, else the CPU. Raises DeviceError for unknown ones."""
    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if device == "cpu" or device == "cuda" or device.startswith("cuda:"):
        return device
    raise DeviceError(f"unknown device {device!r}; known: auto, cpu, cuda, cuda:N")


def open_target(device: str, kernels: Mapping[str, Any] | None = None) -> Target:
    """Raises DeviceError when the device is not there."""
    found = resolve_device(device)
    return _cpu() if found == "cpu" else CudaTarget(found, kernels)
