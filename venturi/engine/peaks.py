"""What the device can do at best, measured now: what a roofline is made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from venturi.backends.cuda.rounding import products_of_fp32

_SIZES = {"cpu": 1536, "cuda": 8192}
_PROBE_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
_TRIES = 5
_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Peaks:
    """Floating-point operations a second of a large product, bytes a second read from memory."""

    flops: float
    bytes: float

    def least_us(self, flops: float, moved: int) -> float:
        """What the operations or the bytes take, whichever is more."""
        return max(flops / self.flops, moved / self.bytes) * 1e6


def measure_peaks(device: torch.device, precision: str) -> Peaks:
    """By torch: a square product in the precision's type (fp32 without rounding for "model" and "fp32"), and a sum.

    Takes some tenths of a second and, on a GPU, 4 GiB of its memory.
    """
    n = _SIZES[device.type]
    dtype = _TYPES.get(precision, torch.float32)
    rounded = precision == "tf32"
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    with products_of_fp32(tf32=rounded):
        flops = 2.0 * n**3 / _best_s(lambda: a @ b, device)
    return Peaks(flops, measure_bandwidth(device))


def measure_bandwidth(device: torch.device) -> float:
    """Bytes a second of a sum over memory that no cache holds."""
    wide = torch.ones(_PROBE_BYTES[device.type] // 4, device=device)
    return wide.numel() * 4 / _best_s(wide.sum, device)


def _best_s(work: Callable[[], Any], device: torch.device) -> float:
    best = float("inf")
    for _ in range(_TRIES + 1):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
