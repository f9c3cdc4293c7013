"""How much memory of a GPU there is, in the words of an error."""

from __future__ import annotations

import re

import torch

from venturi.core.errors import DeviceError

_ASKED = re.compile(r"Tried to allocate ([\d.]+ \w+)")
_GIB = 1 << 30


def out_of_memory(device: torch.device, exc: torch.OutOfMemoryError, doing: str) -> DeviceError:
    """The error to raise from `exc`: what was needed, what is free, what to do."""
    asked = _ASKED.search(str(exc))
    free, total = torch.cuda.mem_get_info(device)
    return DeviceError(
        f"{device} has no memory left for {doing}: {asked[1] if asked else 'more'} needed, {free / _GIB:.2f} of "
        f"{total / _GIB:.2f} GiB free. Smaller shapes, fewer contexts at a time or a lower precision need less; "
        "`engine.device_memory_bytes` says how much an engine takes"
    )
