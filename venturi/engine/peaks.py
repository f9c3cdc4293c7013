"""What the device can do at best, measured now: what a roofline is made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from venturi.backends.cuda.rounding import products_of_fp32
from venturi.engine.plan import Plan

_SIZES = {"cpu": 1536, "cuda": 8192}
_PROBE_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
_TRIES = 5
_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_OF_IR = {
    ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16,
}  # fmt: skip


@dataclass(frozen=True)
class Peaks:
    """Floating-point operations a second of a large product, bytes a second read from memory."""

    flops: float
    bytes: float

    def least_us(self, flops: float, moved: int) -> float:
        """What the operations or the bytes take, whichever is more."""
        return max(flops / self.flops, moved / self.bytes) * 1e6


def peaks_of(plan: Plan, graph: ir.Graph, device: torch.device) -> Peaks:
    """What the device can do at best in the type that most of the plan is computed in."""
    return measure_peaks(device, product_type(plan, graph), tf32=plan.precision == "tf32")


def product_type(plan: Plan, graph: ir.Graph) -> torch.dtype:
    """The precision's type, or with "model" the floating-point type of the inputs of whichever steps do most
    operations. The graph's nodes are the plan's steps."""
    if plan.precision != "model":
        return _TYPES.get(plan.precision, torch.float32)
    done = dict.fromkeys(_OF_IR.values(), 0.0)
    for node, step in zip(graph, plan.steps):
        first = node.inputs[0] if node.inputs else None
        kind = None if first is None or first.dtype is None else _OF_IR.get(first.dtype)
        if kind is not None:
            done[kind] += step.flops
    return max(done, key=lambda kind: done[kind])


def measure_peaks(device: torch.device, dtype: torch.dtype, *, tf32: bool = False) -> Peaks:
    """By torch: a square product of `dtype`, fp32 without rounding unless it is `tf32`, and a sum.

    Takes some tenths of a second and, on a GPU, 4 GiB of its memory.
    """
    n = _SIZES[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    with products_of_fp32(tf32=tf32):
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
