"""The .vt file: a zip with stored, 64-byte aligned entries, sealed by the SHA-256 of everything before its comment.

    [entry][entry]...[central directory][end record | comment = "venturi-sha256:" + 64 hex digits]

Any changed byte breaks the seal; `unzip -l` lists the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from venturi.core.errors import EngineError

ALIGN = 64
SEAL = b"venturi-sha256:"
_PIECE = 1 << 20
_SEAL_BYTES = len(SEAL) + 64
_LOCAL = struct.Struct("<4s5H3L2H")
Chunks = Iterable[bytes | memoryview]


def write_container(path: str | Path, entries: Mapping[str, Chunks]) -> None:
    """Write atomically: temporary name beside the target, fsync, rename. On any failure nothing is left behind.

    Raises EngineError when the folder cannot be written or the disk is full.
    """
    path = Path(path)
    handle, name = -1, ""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "w+b") as file:
            _write_zip(file, entries)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as exc:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise EngineError(f"cannot write the engine: {exc.strerror or exc}", where=str(path)) from exc
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


class _Hashing:
    """A file that hashes what passes through it."""

    def __init__(self, file: object) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.at = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)  # type: ignore[attr-defined]
        self.digest.update(data)
        self.at += len(data)


def _write_zip(file: object, entries: Mapping[str, Chunks]) -> None:
    """A zip64 writer of stored entries: local headers padded so that data starts at multiples of 64 bytes."""
    out = _Hashing(file)
    directory = []
    for name, chunks in entries.items():
        parts = list(chunks)
        size, crc = sum(len(p) for p in parts), 0
        for part in parts:
            crc = zlib.crc32(part, crc)
        encoded = name.encode()
        start = out.at
        zip64 = struct.pack("<HHQQ", 1, 16, size, size)
        base = start + _LOCAL.size + len(encoded) + len(zip64)
        pad = -(base + 4) % ALIGN
        extra = zip64 + struct.pack("<HH", 0x4156, pad) + b"\0" * pad
        out.write(_LOCAL.pack(b"PK\3\4", 45, 0x800, 0, 0, 0x21, crc, 0xFFFFFFFF, 0xFFFFFFFF, len(encoded), len(extra)))
        out.write(encoded + extra)
        for part in parts:
            out.write(part)
        directory.append((encoded, size, crc, start))
    _write_directory(out, directory)


def _write_directory(out: _Hashing, directory: list[tuple[bytes, int, int, int]]) -> None:
    start = out.at
    for name, size, crc, offset in directory:
        extra = struct.pack("<HHQQQ", 1, 24, size, size, offset)
        head = struct.pack(
            "<4s6H3L5H2L", b"PK\1\2", 45, 45, 0x800, 0, 0, 0x21, crc, 0xFFFFFFFF, 0xFFFFFFFF,
            len(name), len(extra), 0, 0, 0, 0, 0xFFFFFFFF,
        )  # fmt: skip
        out.write(head + name + extra)
    size, count, end64 = out.at - start, len(directory), out.at
    out.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start))
    out.write(struct.pack("<4sLQL", b"PK\6\7", 0, end64, 1))
    out.write(
        struct.pack(
            "<4s4H2LH",
            b"PK\5\6",
            0,
            0,
            min(count, 0xFFFF),
            min(count, 0xFFFF),
            0xFFFFFFFF,
            0xFFFFFFFF,
            _SEAL_BYTES,
        )
    )
    seal = SEAL + out.digest.hexdigest().encode()
    out.write(seal)


class Container:
    """A sealed file, mapped. Entries are views of the map; they stay valid while the object lives."""

    def __init__(self, path: str | Path, *, verify: bool = True) -> None:
        self.path = Path(path)
        self._map = _map(self.path)
        self._data = memoryview(self._map)
        if verify:
            self._check_seal()
        self.entries = self._read_directory()

    def _check_seal(self) -> None:
        tail = bytes(self._data[-_SEAL_BYTES:])
        if len(self._data) < _SEAL_BYTES or not tail.startswith(SEAL):
            raise EngineError("this is no engine file, or its end is missing", where=str(self.path))
        digest = self._digest(len(self._data) - _SEAL_BYTES)
        if digest != tail[len(SEAL) :]:
            raise EngineError(
                f"the file is damaged: its SHA-256 is {digest.decode()[:16]}..., sealed as "
                f"{tail[len(SEAL) :][:16].decode('ascii', 'replace')}.... Build or copy it again",
                where=str(self.path),
            )

    def _digest(self, size: int) -> bytes:
        """Of the first `size` bytes, read rather than mapped, so that they do not become this process's memory."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            for start in range(0, size, _PIECE):
                digest.update(file.read(min(_PIECE, size - start)))
        return digest.hexdigest().encode()

    def release(self) -> None:
        """Let go of the pages that were read so far; those still needed are mapped again when they are touched."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _read_directory(self) -> dict[str, memoryview]:
        found: dict[str, memoryview] = {}
        try:
            with zipfile.ZipFile(self.path) as archive:
                for info in archive.infolist():
                    found[info.filename] = self._span(info)
        except (
            zipfile.BadZipFile,
            OSError,
            struct.error,
            ValueError,
            UnicodeDecodeError,
            NotImplementedError,
        ) as exc:
            raise EngineError(f"this is no engine file: {exc}", where=str(self.path)) from exc
        return found

    def _span(self, info: zipfile.ZipInfo) -> memoryview:
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"entry {info.filename!r} is compressed")
        head = _LOCAL.unpack(self._data[info.header_offset : info.header_offset + _LOCAL.size])
        start = info.header_offset + _LOCAL.size + head[-2] + head[-1]
        if head[0] != b"PK\3\4" or start + info.file_size > len(self._data):
            raise ValueError(f"entry {info.filename!r} leaves the file")
        return self._data[start : start + info.file_size]

    def entry(self, name: str) -> memoryview:
        if name not in self.entries:
            raise EngineError(f"the file has no entry {name!r}; it has {sorted(self.entries)}", where=str(self.path))
        return self.entries[name]


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise EngineError("the file is empty", where=str(path))
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as exc:
        raise EngineError(f"cannot read the engine: {exc.strerror or exc}", where=str(path)) from exc
