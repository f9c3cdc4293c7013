"""cuDNN's graph API: the package nvidia-cudnn-frontend over the libcudnn that torch brings. Optional."""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch


@functools.cache
def frontend() -> Any:
    """The module, or None when it is not installed or does not load."""
    try:
        import cudnn
    except (ImportError, OSError):
        return None
    return cudnn


class _Handles(threading.local):
    def __init__(self) -> None:
        self.by_device: dict[int, Any] = {}


_handles = _Handles()


def handle() -> Any:
    """This thread's cuDNN handle on torch's current device, set to torch's current stream."""
    device = torch.cuda.current_device()
    if device not in _handles.by_device:
        _handles.by_device[device] = frontend().create_handle()
    own = _handles.by_device[device]
    frontend().set_stream(handle=own, stream=torch.cuda.current_stream().cuda_stream)
    return own
