"""Whether torch's own products of fp32 may round their operands to tf32: said for every call, whatever the process
says.

torch lets convolutions do so by default. The switch is the process's: calls of other threads see it meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

_exact: ContextVar[bool] = ContextVar("exact", default=False)


@contextmanager
def products_of_fp32(*, tf32: bool) -> Iterator[None]:
    """Rounded if `tf32` says so, but for calls within `no_rounding`."""
    rounds = tf32 and not _exact.get()
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [p.allow_tf32 for p in places]
    try:
        for p in places:
            p.allow_tf32 = rounds
        yield
    finally:
        for p, kept in zip(places, before):
            p.allow_tf32 = kept


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
