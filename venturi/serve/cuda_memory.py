"""Device memory that a client's process allocated and shows to this one: CUDA's inter-process handles, through the
driver alone."""

from __future__ import annotations

import ctypes as C
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from venturi.serve.errors import ServeError, Status, invalid, unavailable

HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


class _Handle(C.Structure):
    _fields_ = [("reserved", C.c_char * HANDLE_BYTES)]


class CudaMemory:
    """The driver, opened when it is first needed. Thread-safe.

    `library` stands in for libcuda.so.1 in tests.
    """

    def __init__(self, library: Any = None) -> None:
        self._library = library
        self._contexts: dict[int, C.c_void_p] = {}
        self._lock = threading.Lock()
        self._started = False

    def map(self, name: str, handle: bytes, device: int, byte_size: int) -> CudaMapping:
        """The memory behind a cudaIpcMemHandle_t on `device`. Raises ServeError without a driver or such a device, and
        for what is no handle, is a handle of this process, or has fewer bytes."""
        what = f"failed to register CUDA shared memory region '{name}'"
        if len(handle) != HANDLE_BYTES:
            raise invalid(f"{what}: raw_handle has {len(handle)} bytes, a cudaIpcMemHandle_t has {HANDLE_BYTES}")
        context, address = self._context(device, what), C.c_uint64()
        raw = _Handle()
        C.memmove(C.byref(raw), handle, HANDLE_BYTES)
        with self.current(context):
            self._call(what, "cuIpcOpenMemHandle_v2", C.byref(address), raw, _LAZY_PEER_ACCESS)
            start, size = C.c_uint64(), C.c_size_t()
            self._call(what, "cuMemGetAddressRange_v2", C.byref(start), C.byref(size), address)
            found = start.value + size.value - address.value
            if found < byte_size:
                self.call("cuIpcCloseMemHandle", address)
                raise invalid(f"{what}: it has {found} bytes, byte_size is {byte_size}")
        return CudaMapping(self, context, address.value)

    @contextmanager
    def current(self, context: C.c_void_p) -> Iterator[None]:
        """Calls in here are about the context's device."""
        self._call("CUDA shared memory", "cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self._library.cuCtxPopCurrent_v2(C.byref(C.c_void_p()))

    def call(self, name: str, *args: Any) -> None:
        """Raises ServeError INTERNAL with the driver's own words."""
        self._call("CUDA shared memory", name, *args, status=Status.INTERNAL)

    def _context(self, device: int, what: str) -> C.c_void_p:
        """The device's primary context, which torch uses too."""
        with self._lock:
            self._start()
            if device not in self._contexts:
                count, found, context = C.c_int(), C.c_int(), C.c_void_p()
                self._call(what, "cuDeviceGetCount", C.byref(count))
                if not 0 <= device < count.value:
                    raise invalid(f"{what}: device_id {device}, this machine has {count.value} CUDA devices")
                self._call(what, "cuDeviceGet", C.byref(found), device)
                self._call(what, "cuDevicePrimaryCtxRetain", C.byref(context), found)
                self._contexts[device] = context
            return self._contexts[device]

    def _start(self) -> None:
        if self._started:
            return
        if self._library is None:
            try:
                self._library = C.CDLL("libcuda.so.1")
            except OSError as exc:
                raise unavailable("CUDA shared memory needs the NVIDIA driver (libcuda.so.1) on this machine") from exc
        self._call("CUDA shared memory", "cuInit", 0)
        self._started = True

    def _call(self, what: str, name: str, *args: Any, status: Status = Status.INVALID_ARG) -> None:
        code = getattr(self._library, name)(*args)
        if code:
            text = C.c_char_p()
            self._library.cuGetErrorString(code, C.byref(text))
            raise ServeError(status, f"{what}: {name}: {(text.value or b'unknown error').decode()} ({code})")


class CudaMapping:
    """A client's allocation in this process; unmapped when nobody holds it any more."""

    def __init__(self, driver: CudaMemory, context: C.c_void_p, address: int) -> None:
        self._driver, self._context, self._address = driver, context, address
        weakref.finalize(self, _unmap, driver, context, address).atexit = False

    def read(self, offset: int, size: int) -> memoryview:
        """A copy in host memory. What the client's streams have not finished writing is not in it."""
        data = bytearray(size)
        if size:
            with self._driver.current(self._context):
                place = (C.c_char * size).from_buffer(data)
                self._driver.call("cuMemcpyDtoH_v2", place, C.c_uint64(self._address + offset), C.c_size_t(size))
        return memoryview(data)

    def write(self, offset: int, data: memoryview) -> None:
        """Returns when the device has the bytes."""
        if data:
            with self._driver.current(self._context):
                given = C.c_void_p(np.frombuffer(data, np.uint8).ctypes.data)
                to = C.c_uint64(self._address + offset)
                self._driver.call("cuMemcpyHtoD_v2", to, given, C.c_size_t(len(data)))


def _unmap(driver: CudaMemory, context: C.c_void_p, address: int) -> None:
    with driver.current(context):
        driver.call("cuIpcCloseMemHandle", C.c_uint64(address))
