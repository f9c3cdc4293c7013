"""Builds one zoo entry and compares its outputs with torch eager at both input sizes."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass

import torch

import venturi as vt
from tests.e2e.zoo import Entry
from venturi.frontends.torch_export import export


@dataclass(frozen=True)
class Result:
    """`error` is relative to the largest magnitude of the output, over all outputs and sizes."""

    name: str
    export_s: float
    build_s: float
    steps: int
    error: float
    attentions: int


def check_entry(entry: Entry, opt_level: int = 1) -> Result:
    """Raises AssertionError when an output is off; every other exception is the failure it is."""
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        model = entry.make()
        dynamic = None if entry.dynamic is None else {"args": entry.dynamic}
        start = time.perf_counter()
        exported = export(model, entry.first(), dynamic)
        export_s = time.perf_counter() - start
        start = time.perf_counter()
        engine = vt.build(exported, opt_level=opt_level)
        build_s = time.perf_counter() - start
        worst = 0.0
        for make_inputs in (entry.first, entry.second, entry.first):
            inputs = make_inputs()
            want = model(*inputs)
            got = engine(*inputs)
            got = got if isinstance(got, tuple) else (got,)
            assert len(got) == len(want), f"{len(got)} outputs, expected {len(want)}"
            for g, w in zip(got, want):
                assert g.shape == w.shape, f"shape {tuple(g.shape)}, expected {tuple(w.shape)}"
                scale = float(w.abs().max())
                error = float((g - w).abs().max()) / max(scale, 1e-6)
                assert error <= entry.rtol, f"relative error {error:.2g} exceeds {entry.rtol}"
                worst = max(worst, error)
    ops = [op for s in engine.plan.steps for op in s.ops]
    return Result(entry.name, export_s, build_s, len(engine.plan.steps), worst, ops.count("Attention"))
