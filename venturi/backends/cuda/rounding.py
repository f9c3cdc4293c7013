"""Whether torch's own products of fp32 may round their operands to tf32: said for every call, whatever the process
says.

torch lets convolutions do so by default. The switches are the process's: while calls of several threads overlap nothing
is rounded unless all of them allow it, and the last one puts the switches back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

_lock = threading.Lock()
_calls: list[list[bool]] = []
_before: list[bool] = []
_exact: ContextVar[bool] = ContextVar("exact", default=False)


@contextmanager
def products_of_fp32(*, tf32: bool) -> Iterator[None]:
    """Rounded if `tf32` says so, but for calls within `no_rounding`."""
    mine = [tf32 and not _exact.get()]
    with _lock:
        if not _calls:
            _before[:] = _switches()
        _calls.append(mine)
        _set([all(c[0] for c in _calls)] * 2)
    try:
        yield
    finally:
        with _lock:
            _calls[:] = [c for c in _calls if c is not mine]
            _set([all(c[0] for c in _calls)] * 2 if _calls else _before)


def _switches() -> list[bool]:
    return [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]


def _set(values: Sequence[bool]) -> None:
    cudnn: Any = torch.backends.cudnn
    torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32 = values


def is_exact() -> bool:
    """Within `no_rounding`."""
    return _exact.get()


@contextmanager
def no_rounding() -> Iterator[None]:
    token = _exact.set(True)
    try:
        with products_of_fp32(tf32=False):
            yield
    finally:
        _exact.reset(token)
