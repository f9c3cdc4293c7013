"""Shared memory that clients register, the system's or a GPU's: tensors are read and written in place, not sent.

Off unless the server is started with --allow-client-shm: a client names any region of the machine's /dev/shm.
"""

from __future__ import annotations

import mmap
import os
import stat
import threading
from dataclasses import dataclass
from enum import Enum
from typing import Any

from venturi.serve.cuda_memory import CudaMapping, CudaMemory
from venturi.serve.errors import ServeError, Status, invalid, not_found, unsupported
from venturi.serve.request import Place, Tensor
from venturi.serve.tensors import wire_view

FOLDER = "/dev/shm"
RESERVED = "triton_python_backend_shm_region_"


class Kind(Enum):
    """What the protocol registers apart; names are unique among both."""

    SYSTEM = "system"
    CUDA = "cuda"


@dataclass(frozen=True)
class SystemRegion:
    """`memory` starts at the beginning of the object; `offset` and `byte_size` say which part was registered."""

    name: str
    key: str
    offset: int
    byte_size: int
    memory: mmap.mmap
    kind = Kind.SYSTEM

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "key": self.key, "offset": self.offset, "byte_size": self.byte_size}

    def read(self, offset: int, size: int) -> memoryview:
        """The memory itself."""
        return memoryview(self.memory)[self.offset + offset : self.offset + offset + size]

    def write(self, offset: int, data: memoryview) -> None:
        self.read(offset, len(data))[:] = data


@dataclass(frozen=True)
class CudaRegion:
    """`byte_size` bytes of a client's allocation on a device."""

    name: str
    device: int
    byte_size: int
    memory: CudaMapping
    kind = Kind.CUDA

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "device_id": self.device, "byte_size": self.byte_size}

    def read(self, offset: int, size: int) -> memoryview:
        """A copy on the host."""
        return self.memory.read(offset, size)

    def write(self, offset: int, data: memoryview) -> None:
        self.memory.write(offset, data)


Region = SystemRegion | CudaRegion


class Regions:
    """Thread-safe. A region that is unregistered stays mapped until the requests that use it are answered."""

    def __init__(self, allowed: bool, cuda: CudaMemory | None = None) -> None:
        self._allowed = allowed
        self._cuda = cuda or CudaMemory()
        self._lock = threading.Lock()
        self._regions: dict[str, Region] = {}

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Raises ServeError for what is not allowed, known already, missing, or smaller than it is said to be."""
        with self._lock:
            self._check(name, offset, byte_size)
            memory = _open(name, key, offset + byte_size)
            self._regions[name] = SystemRegion(name, key, offset, byte_size, memory)

    def register_cuda(self, name: str, handle: bytes, device: int, byte_size: int) -> None:
        """`handle` is a cudaIpcMemHandle_t of another process. Raises ServeError as `register` does, and without the
        device."""
        with self._lock:
            self._check(name, 0, byte_size)
            self._regions[name] = CudaRegion(name, device, byte_size, self._cuda.map(name, handle, device, byte_size))

    def _check(self, name: str, offset: int, byte_size: int) -> None:
        if not self._allowed:
            raise unsupported("client shared memory is disabled; start the server with --allow-client-shm")
        if not name or name.startswith(RESERVED):
            raise invalid(f"cannot register shared memory region '{name}': the name is empty or reserved")
        if offset < 0 or byte_size <= 0:
            raise invalid(f"cannot register shared memory region '{name}': offset {offset}, byte_size {byte_size}")
        if name in self._regions:
            raise ServeError(Status.ALREADY_EXISTS, f"shared memory region '{name}' already in manager")

    def unregister(self, kind: Kind, name: str = "") -> None:
        """One region, or all of them. Names that are unknown, or of the other kind, are no error."""
        with self._lock:
            gone = [n for n, r in self._regions.items() if r.kind is kind and name in ("", n)]
            for known in gone:
                del self._regions[known]

    def status(self, kind: Kind, name: str = "") -> list[dict[str, Any]]:
        with self._lock:
            found = [r for n, r in sorted(self._regions.items()) if r.kind is kind and name in ("", n)]
        if name and not found:
            raise not_found(f"Unable to find {kind.value} shared memory region: '{name}'")
        return [r.to_json() for r in found]

    def read(self, name: str, offset: int, size: int) -> memoryview:
        """The bytes of a tensor. Raises ServeError when the region is unknown or too small."""
        return self._find(name, offset, size).read(offset, size)

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Raises as `read` does."""
        self._find(name, offset, len(data)).write(offset, data)

    def _find(self, name: str, offset: int, size: int) -> Region:
        with self._lock:
            region = self._regions.get(name)
        if region is None:
            raise not_found(f"Unable to find shared memory region: '{name}'")
        if offset < 0 or size < 0 or offset + size > region.byte_size:
            raise invalid(f"Invalid offset + byte size for shared memory region: '{name}': {offset} + {size} of "
                          f"{region.byte_size} bytes")  # fmt: skip
        return region


def _open(name: str, key: str, wanted: int) -> mmap.mmap:
    """The key is what shm_open takes: one name after a slash."""
    bare = key.removeprefix("/")
    if not bare or "/" in bare or "\0" in bare or bare in (".", ".."):
        raise invalid(f"Unable to open shared memory region: '{name}': key {key!r} is not a name of shared memory")
    try:
        file = os.open(os.path.join(FOLDER, bare), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as exc:
        raise invalid(f"Unable to open shared memory region: '{name}': {exc.strerror}") from exc
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_size < wanted:
            raise invalid(f"failed to register shared memory region '{name}': it has {found.st_size} bytes, "
                          f"offset and byte_size need {wanted}")  # fmt: skip
        return mmap.mmap(file, found.st_size)
    finally:
        os.close(file)


def read_place(given: Any, what: str) -> Place | None:
    """From a tensor's parameters (a mapping of plain values); None when it names no region."""
    if "shared_memory_region" not in given:
        return None
    region = given["shared_memory_region"]
    offset, size = given.get("shared_memory_offset", 0), given.get("shared_memory_byte_size")
    if not isinstance(region, str) or type(offset) is not int or type(size) is not int:
        raise invalid(f"{what} needs 'shared_memory_region', a string, and 'shared_memory_byte_size', a number")
    return Place(region, offset, size)


def write_place(regions: Regions, place: Place, tensor: Tensor) -> dict[str, str | int]:
    """Puts the tensor where the client wants it and says so. Raises ServeError INTERNAL when it does not fit."""
    data = wire_view(tensor.data, tensor.datatype)
    if len(data) > place.byte_size:
        text = f"shared memory size specified with the request for output '{tensor.name}' ({place.byte_size} bytes)"
        raise ServeError(Status.INTERNAL, f"{text} should be at least {len(data)} bytes")
    regions.write(place.region, place.offset, data)
    where: dict[str, str | int] = {"shared_memory_region": place.region, "shared_memory_byte_size": len(data)}
    return where | ({"shared_memory_offset": place.offset} if place.offset else {})
