"""torch's OpenMP runtime: the one pool of threads that library calls and generated code share."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


@functools.cache
def openmp() -> Any:
    """The library, or None where torch has none that speaks GNU's interface."""
    folder = Path(torch.__file__).parent
    for path in sorted([*(folder / "lib").glob("lib*omp*"), *(folder.parent / "torch.libs").glob("lib*omp*")]):
        try:
            library = ctypes.CDLL(str(path))
            library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            library.GOMP_parallel.restype = None
            library.omp_set_num_threads.argtypes = [ctypes.c_int]
            library.omp_set_num_threads.restype = None
            return library
        except (OSError, AttributeError):
            continue
    return None


def max_threads() -> int:
    """Threads that a loop of the calling thread may use: torch's number, 1 where torch has no OpenMP."""
    return torch.get_num_threads() if openmp() is not None else 1


@contextmanager
def team_of(threads: int) -> Iterator[None]:
    """No loop of the calling thread uses more than `threads` inside; other threads are not concerned."""
    before, library = max_threads(), openmp()
    if library is None or before <= threads:
        yield
        return
    library.omp_set_num_threads(threads)
    try:
        yield
    finally:
        library.omp_set_num_threads(before)
