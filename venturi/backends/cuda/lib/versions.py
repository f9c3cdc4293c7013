"""Versions of the NVIDIA libraries in this process: a tuned choice is only as good as the library it was timed on."""

from __future__ import annotations

import functools
from importlib import metadata

import torch


@functools.cache
def library_versions() -> str:
    """For example "cuda 13.0 cudnn 91900 cublaslt 13.1 triton 3.6.0"; "absent" for what is not installed."""
    found = {"cuda": torch.version.cuda or "absent", "cudnn": str(torch.backends.cudnn.version() or "absent")}
    for name in ("triton", "nvidia-cublas", "nvidia-cudnn-frontend"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return " ".join(f"{k} {v}" for k, v in found.items())
