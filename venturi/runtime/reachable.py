"""Which memory an executable holds on to: the tensors that its kernels' functions can reach."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

import torch


def reachable_bytes(root: Any, device: torch.device) -> int:
    """Bytes of memory of `device` behind tensors, memory that several share counted once."""
    storages = {}
    seen: set[int] = set()
    queue = [root]
    while queue:
        x = queue.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            if x.device == device:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        else:
            queue.extend(_held_by(x))
    return sum(storages.values())


def _held_by(x: Any) -> Iterator[Any]:
    """What a function, a container or an object of ours refers to; nothing of other libraries."""
    if isinstance(x, FunctionType):
        yield from (c.cell_contents for c in x.__closure__ or () if _is_filled(c))
        yield from x.__defaults__ or ()
        yield from (x.__kwdefaults__ or {}).values()
    elif isinstance(x, MethodType):
        yield x.__self__
    elif isinstance(x, functools.partial):
        yield x.func
        yield from x.args
        yield from x.keywords.values()
    elif isinstance(x, dict):
        yield from x.values()
    elif isinstance(x, tuple | list | set | frozenset):
        yield from x
    elif type(x).__module__.startswith("venturi."):
        yield from vars(x).values() if hasattr(x, "__dict__") else ()


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
