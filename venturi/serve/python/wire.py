"""Frames between the server and a worker: a JSON head and the bytes of tensors. No code travels, unlike with pickle."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from venturi.serve.request import Tensor
from venturi.serve.tensors import from_bytes, to_bytes

_LENGTHS = struct.Struct("<II")
Head = dict[str, Any]


class Closed(Exception):
    """The other side is gone."""


class Channel:
    """One end of a stream socket. `send` from any thread; `receive` from one."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._sending = threading.Lock()

    def send(self, head: Head, tensors: Sequence[Tensor] = ()) -> None:
        """Raises Closed."""
        blobs = [to_bytes(t.data, t.datatype) for t in tensors]
        text = orjson.dumps(head | {"tensors": [[t.name, t.datatype, t.shape] for t in tensors]})
        sizes = struct.pack(f"<{len(blobs)}Q", *(len(b) for b in blobs))
        try:
            with self._sending:
                self._socket.sendall(b"".join((_LENGTHS.pack(len(text), len(blobs)), sizes, text)))
                for blob in blobs:
                    self._socket.sendall(blob)
        except OSError as exc:
            raise Closed from exc

    def receive(self) -> tuple[Head, list[Tensor]]:
        """Raises Closed."""
        length, count = _LENGTHS.unpack(self._read(_LENGTHS.size))
        sizes = struct.unpack(f"<{count}Q", self._read(8 * count))
        head = orjson.loads(self._read(length))
        described = head.pop("tensors")
        tensors = [
            Tensor(name, datatype, from_bytes(name, datatype, shape, self._read(size)))
            for (name, datatype, shape), size in zip(described, sizes, strict=True)
        ]
        return head, tensors

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the other side was first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, size: int) -> memoryview:
        buffer = bytearray(size)
        view, at = memoryview(buffer), 0
        while at < size:
            try:
                got = self._socket.recv_into(view[at:])
            except OSError as exc:
                raise Closed from exc
            if not got:
                raise Closed
            at += got
        return view


def grouped(tensors: Iterable[Tensor], counts: Iterable[int]) -> list[list[Tensor]]:
    """The tensors of several requests or responses, sent one after another."""
    left = iter(tensors)
    return [[next(left) for _ in range(n)] for n in counts]
