"""The CUDA driver through ctypes: load cubins, encode tensor maps, launch. No Triton, no compiler.

torch owns the primary context, memory and streams; this file only adds kernels to them.
"""

from __future__ import annotations

import ctypes as C
import functools
import struct
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from venturi.backends.cuda.kernel import Cubin, Parameter
from venturi.core.errors import DeviceError

_MAX_DYNAMIC_SHARED = 8
_CLUSTER_DIMENSION = 4
_PROGRAMMATIC_SERIALIZATION = 6
_SLOT = 128
_PACK = {"i32": "<i", "u32": "<I", "i64": "<q", "u64": "<Q", "fp32": "<f", "fp64": "<d", "i1": "<b", "i8": "<b"}
# Triton's element types in cuTensorMapEncodeTiled's numbering, where they differ.
_MAP_TYPE = {8: 10, 9: 8, 10: 9}
_L2_PROMOTION_128B = 2


class _LaunchAttribute(C.Structure):
    _fields_ = [("id", C.c_uint32), ("pad", C.c_uint32), ("value", C.c_uint32 * 16)]


class _LaunchConfig(C.Structure):
    _fields_ = [
        ("grid", C.c_uint32 * 3), ("block", C.c_uint32 * 3), ("shared", C.c_uint32), ("stream", C.c_void_p),
        ("attributes", C.POINTER(_LaunchAttribute)), ("count", C.c_uint32),
    ]  # fmt: skip


class Driver:
    """libcuda.so.1. Every call raises DeviceError with the driver's own words."""

    def __init__(self) -> None:
        try:
            self._lib = C.CDLL("libcuda.so.1")
        except OSError as exc:
            raise DeviceError("the NVIDIA driver (libcuda.so.1) is not installed; use device='cpu'") from exc

    def call(self, name: str, *args: Any) -> None:
        status = getattr(self._lib, name)(*args)
        if status:
            text = C.c_char_p()
            self._lib.cuGetErrorString(status, C.byref(text))
            raise DeviceError(f"{name}: {(text.value or b'unknown error').decode()} ({status})")

    @property
    def launch(self) -> Any:
        return self._lib.cuLaunchKernelEx


@functools.cache
def driver() -> Driver:
    return Driver()


# Modules, and their devices, of kernels that are gone.
_dropped: deque[tuple[int, int]] = deque()
_unloading = threading.Lock()


def unload_dropped() -> None:
    """Free the machine code of kernels that are gone. Their finalizers do not: these may run while a graph is captured,
    or before the GPU has come to the kernel's last launch."""
    if not _dropped or torch.cuda.is_current_stream_capturing():
        return
    for index in {index for _, index in _dropped}:
        torch.cuda.synchronize(index)
    for _ in range(len(_dropped)):
        module, index = _dropped.popleft()
        with torch.cuda.device(index):
            driver().call("cuModuleUnload", C.c_void_p(module))


class LoadedKernel:
    """A cubin in the current device's context, ready to launch on torch's current stream. Thread-safe.

    A captured graph that launches it must keep it alive.
    """

    def __init__(self, cubin: Cubin) -> None:
        torch.cuda.current_stream()
        with _unloading:
            unload_dropped()
        self.cubin = cubin
        module, self._function = C.c_void_p(), C.c_void_p()
        driver().call("cuModuleLoadData", C.byref(module), cubin.image)
        driver().call("cuModuleGetFunction", C.byref(self._function), module, cubin.entry.encode())
        if cubin.shared > 48 * 1024:
            driver().call("cuFuncSetAttribute", self._function, _MAX_DYNAMIC_SHARED, cubin.shared)
        dropped = (int(module.value or 0), torch.cuda.current_device())
        weakref.finalize(self, _dropped.append, dropped).atexit = False
        self._count = len(cubin.parameters)
        self._threads = 32 * cubin.num_warps
        self._local = threading.local()
        wanted: list[tuple[int, tuple[int, ...]]] = [(_PROGRAMMATIC_SERIALIZATION, (1,))] if cubin.overlaps else []
        if cubin.cluster > 1:
            wanted.append((_CLUSTER_DIMENSION, (1, cubin.cluster, 1)))
        self._attributes = (_LaunchAttribute * max(len(wanted), 1))()
        self._num_attributes = len(wanted)
        for attribute, (kind, values) in zip(self._attributes, wanted):
            attribute.id = kind
            attribute.value[: len(values)] = values

    def launch(self, grid: Sequence[int], args: Sequence[Any]) -> None:
        """`args` as the source's signature without constants: tensors for pointers and descriptors."""
        if 0 in grid:
            return
        base, pointers = self._buffers()
        slot = 0
        for arg in args:
            parameter = self.cubin.parameters[slot]
            at = base + slot * _SLOT
            if parameter.kind == "ptr":
                if not arg.is_cuda:
                    raise DeviceError(f"{self.cubin.entry}: argument {parameter.name!r} is on {arg.device}")
                C.c_uint64.from_address(at).value = arg.data_ptr()
                slot += 1
            elif parameter.kind == "tmap":
                slot += self._describe(slot, base, parameter, arg)
            else:
                C.memmove(at, struct.pack(_PACK[parameter.kind], arg), 8 if parameter.kind[-2:] == "64" else 4)
                slot += 1
        if slot != self._count - 2:
            raise DeviceError(f"{self.cubin.entry} takes {self._count - 2} parameters, got {slot}")
        config = _LaunchConfig()
        config.grid[:] = (*grid, 1, 1)[:3]
        config.block[:] = (self._threads, 1, 1)
        config.shared = self.cubin.shared
        config.stream = torch.cuda.current_stream().cuda_stream
        config.attributes, config.count = self._attributes, self._num_attributes
        status = driver().launch(C.byref(config), self._function, pointers, None)
        if status:
            raise DeviceError(f"launch of {self.cubin.entry} on grid {tuple(grid)} failed with status {status}")

    def _buffers(self) -> tuple[int, Any]:
        """This thread's parameter memory (64-byte aligned) and the array of pointers into it."""
        found = getattr(self._local, "found", None)
        if found is None:
            raw = C.create_string_buffer(_SLOT * self._count + 64)
            base = C.addressof(raw) + (-C.addressof(raw)) % 64
            pointers = (C.c_void_p * self._count)(*(base + i * _SLOT for i in range(self._count)))
            found = self._local.found = (base, pointers, raw)
        return found[0], found[1]

    def _describe(self, slot: int, base: int, p: Parameter, t: torch.Tensor) -> int:
        """Encode a TMA map of `t` (last dimension contiguous), then its shape and strides; returns slots used."""
        rank = t.dim()
        dims = (C.c_uint64 * rank)(*reversed(t.shape))
        strides = (C.c_uint64 * max(rank - 1, 1))(*(s * p.element_bytes for s in reversed(t.stride()[:-1])))
        box = (C.c_uint32 * rank)(*reversed(p.block))
        ones = (C.c_uint32 * rank)(*([1] * rank))
        driver().call(
            "cuTensorMapEncodeTiled", C.c_void_p(base + slot * _SLOT), _MAP_TYPE.get(p.element_type, p.element_type),
            rank, C.c_void_p(t.data_ptr()), dims, strides, box, ones, 0, p.swizzle, _L2_PROMOTION_128B, 0,
        )  # fmt: skip
        for i in range(rank):
            C.c_int32.from_address(base + (slot + 1 + i) * _SLOT).value = t.shape[i]
            C.c_int64.from_address(base + (slot + 1 + rank + i) * _SLOT).value = t.stride(i)
        return 1 + 2 * rank
