"""Lays images out anew: generated code for planes of few channels, torch for everything else."""

from __future__ import annotations

import threading

import torch

from venturi.backends.cpu.codegen.element import OF_TORCH
from venturi.backends.cpu.codegen.interleave import MOST_CHANNELS, InterleaveSpec, emit_interleave
from venturi.backends.cpu.codegen.isa import Isa, host
from venturi.backends.cpu.native.jit import host_jit
from venturi.backends.cpu.native.walker import Job

MOST_JOBS = 16


class _Jobs(threading.local):
    def __init__(self) -> None:
        self.made: dict[tuple[InterleaveSpec, int], Job] = {}


_jobs = _Jobs()


def lay_out(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`out`, of x's shape and type but of another order in memory, with x's numbers."""
    job = _job(x, out)
    if job is None:
        return out.copy_(x)
    words = job.words(0)
    words[0], words[1] = x.data_ptr(), out.data_ptr()
    job.run()
    return out


def laid_out(x: torch.Tensor, layout: torch.memory_format) -> torch.Tensor:
    """x itself where it lies so, else a copy that does."""
    if x.is_contiguous(memory_format=layout):
        return x
    return lay_out(x, torch.empty(x.shape, dtype=x.dtype, memory_format=layout))


def _job(x: torch.Tensor, out: torch.Tensor) -> Job | None:
    """Of this thread; None where torch must serve."""
    isa = host()
    if not isinstance(isa, Isa) or x.dim() != 4 or not 2 <= x.shape[1] <= MOST_CHANNELS or not x.numel():
        return None
    if x.dtype not in OF_TORCH or not x.is_contiguous() or not out.is_contiguous(memory_format=torch.channels_last):
        return None
    images, channels, height, width = x.shape
    spec = InterleaveSpec(channels, height * width, OF_TORCH[x.dtype])
    found = _jobs.made.get((spec, images))
    if found is None:
        address = host_jit(isa).address(repr(spec), lambda: emit_interleave(isa, spec))
        if len(_jobs.made) >= MOST_JOBS:
            _jobs.made.clear()
        found = _jobs.made[spec, images] = Job([(address, [0, 0], images * spec.tasks(isa))])
    return found
