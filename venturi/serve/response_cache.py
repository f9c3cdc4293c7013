"""Answers kept by what was asked, for models whose configuration enables it; here an LRU of bounded size."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from concurrent.futures import Executor
from typing import Protocol

from venturi.serve.request import InferRequest, InferResponse
from venturi.serve.tensors import BYTES, to_bytes

_OVERHEAD = 256  # bytes of an entry beside its data: key, names, shapes


class Cache(Protocol):
    """Thread-safe. `threads` is where lookups that wait for something belong; None: they are quick."""

    threads: Executor | None

    def get(self, key: bytes) -> InferResponse | None:
        """What `put` kept, if it is still there."""

    def put(self, key: bytes, response: InferResponse) -> None:
        """Keep it, if there is room."""

    def close(self) -> None:
        """Give back what it holds. Nothing is asked of it afterwards."""


def request_key(model: str, version: int, stamp: str, request: InferRequest) -> bytes:
    """A digest of the model version and its files' stamp, the inputs and the outputs asked for. Ids and parameters do
    not count."""
    digest = hashlib.blake2b(digest_size=20)
    digest.update(f"{model}\0{version}\0{stamp}\0{sorted(o.name for o in request.outputs)}".encode())
    for name, tensor in sorted(request.inputs.items()):
        digest.update(f"\0{name}\0{tensor.datatype}\0{tensor.shape}\0".encode())
        digest.update(to_bytes(tensor.data, tensor.datatype))
    return digest.digest()


class ResponseCache:
    """Thread-safe. Entries larger than `max_bytes` are not kept; the least recently used go first."""

    threads: Executor | None = None

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, tuple[InferResponse, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        return self._bytes

    def close(self) -> None:
        """Nothing but memory."""

    def get(self, key: bytes) -> InferResponse | None:
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                return None
            self._entries.move_to_end(key)
            return found[0]

    def put(self, key: bytes, response: InferResponse) -> None:
        size = _OVERHEAD + sum(_size(t.datatype, t.data) for t in response.outputs.values())
        if size > self._max_bytes:
            return
        with self._lock:
            old = self._entries.pop(key, None)
            self._bytes += size - (old[1] if old else 0)
            self._entries[key] = response, size
            while self._bytes > self._max_bytes:
                _, (_, gone) = self._entries.popitem(last=False)
                self._bytes -= gone


def _size(datatype: str, data: object) -> int:
    return len(to_bytes(data, datatype)) if datatype == BYTES else int(data.nbytes)  # type: ignore[attr-defined, arg-type]
