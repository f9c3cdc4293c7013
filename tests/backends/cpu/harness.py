"""Runs generated kernels on tensors, for the host's vectors and for AVX2's."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from venturi.backends.cpu.codegen.emit import Emitter
from venturi.backends.cpu.codegen.isa import AVX2, Isa, host
from venturi.backends.cpu.native.jit import host_jit
from venturi.backends.cpu.native.walker import Job

T = torch.Tensor


def isas() -> list[Any]:
    """The host's own, and AVX2 where the host is wider. Without LLVM there is nothing to test, and a reason."""
    own = host()
    if isinstance(own, str):
        return [pytest.param(None, marks=pytest.mark.skip(reason=own))]
    narrow = dataclasses.replace(AVX2, triple=own.triple)
    return [own, narrow] if own.name == "avx512" else [own]


def run(isa: Isa, key: str, text: str, words: list[int], tasks: int) -> None:
    """Compile IR and run all its tasks."""
    Job([(host_jit(isa).address(key, lambda: text), words, tasks)]).run()


def unary(isa: Isa, fn: Any, x: T) -> T:
    """fn(emitter, vector) over a flat tensor whose length is a multiple of the vector."""
    e = Emitter(isa)
    source, out = e.pointer(0), e.pointer(1)
    e.each(e.begin, e.end, 1, lambda t: _one(e, fn, source, out, t))
    y = torch.empty_like(x)
    run(
        isa,
        f"{fn.__module__}.{fn.__qualname__} {isa.name}",
        e.finish(),
        [x.data_ptr(), y.data_ptr()],
        len(x) // isa.lanes,
    )
    return y


def _one(e: Emitter, fn: Any, source: Any, out: Any, t: Any) -> None:
    at = e.mul(t, e.isa.lanes)
    e.store(fn(e, e.load(e.at(source, at))), e.at(out, at))
