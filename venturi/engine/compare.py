"""Compares outputs of two runs, tensor by tensor, and finds the first step where an engine leaves its reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from venturi.backends.base import RegionView, disagreement, region_slack, region_ulps
from venturi.backends.cpu.tactics.reference import Reference
from venturi.runtime.executable import reads_of


@dataclass(frozen=True)
class Difference:
    """Statistics of |a - b| over one tensor; relative errors are over |b|; PSNR and SNR in dB."""

    name: str
    max_abs: float
    mean_abs: float
    median_abs: float
    p99_abs: float
    max_rel: float
    mean_rel: float
    median_rel: float
    p99_rel: float
    cosine: float
    psnr_db: float
    snr_db: float
    passed: bool = True
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _bare(name: str, passed: bool, note: str) -> Difference:
    """A verdict without statistics."""
    nan = float("nan")
    return Difference(name, nan, nan, nan, nan, nan, nan, nan, nan, nan, nan, nan, passed, note)


def compare(name: str, a: Any, b: Any, rtol: float, atol: float) -> Difference:
    """`passed`: same shape and type and |a - b| <= atol + rtol |b| everywhere, NaN meeting NaN."""
    if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray) or a.dtype == object:
        same = bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else a == b
        return _bare(name, same, "not numeric")
    if a.shape != b.shape or a.dtype != b.dtype:
        return _bare(name, False, f"{a.dtype}{list(a.shape)} against {b.dtype}{list(b.shape)}")
    if a.size == 0:
        return _bare(name, True, "empty")
    x, y = a.astype(np.float64).reshape(-1), b.astype(np.float64).reshape(-1)
    passed = bool(np.allclose(x, y, rtol=rtol, atol=atol, equal_nan=True))
    both = np.isfinite(x) & np.isfinite(y)
    if not both.any():
        return _bare(name, passed, "nothing finite")
    x, y = x[both], y[both]
    d = np.abs(x - y)
    rel = d / np.maximum(np.abs(y), np.finfo(np.float64).tiny)
    rel = np.where(d == 0, 0.0, rel)
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    cosine = float(x @ y) / norms if norms else 1.0 if not d.any() else 0.0
    mse, peak = float(np.mean(d**2)), float(np.abs(y).max())
    psnr = 10 * np.log10(peak**2 / mse) if mse and peak else float("inf")
    snr = 10 * np.log10(float(np.mean(y**2)) / mse) if mse and y.any() else float("inf")
    return Difference(
        name, float(d.max()), float(d.mean()), float(np.median(d)), float(np.quantile(d, 0.99)), float(rel.max()),
        float(rel.mean()), float(np.median(rel)), float(np.quantile(rel, 0.99)), cosine, float(psnr), float(snr),
        passed,
    )  # fmt: skip


@dataclass(frozen=True)
class Divergence:
    """The first step whose kernel disagrees with its reference on the same inputs."""

    step: str
    tactic: str
    sources: tuple[str, ...]
    reason: str


def first_divergence(engine: Any, inputs: Mapping[str, Any]) -> Divergence | None:
    """Walk the engine's steps; every kernel gets the reference's values, so that only its own error shows."""
    built = engine._built
    args = engine._accept([inputs[s.name] for s in engine.inputs], None)
    graph: ir.Graph = built.model.graph
    env: dict[ir.Value, Any] = {v: built.weights[n] for n, v in graph.initializers.items() if n in built.weights}
    env.update(zip(graph.inputs, args))
    with torch.inference_mode():
        for node, call in zip(graph, built.executable.calls):
            region = RegionView(node, built.weights)
            values = [env[v] for v in reads_of(node, built.weights)]
            want = Reference().bind(region, {}).run(*values)
            got = call.kernel.run(*values)
            reason = disagreement(got, want, region_ulps(region), slack=region_slack(region))
            if reason is not None:
                return Divergence(call.step.name, call.step.tactic, call.step.sources, reason)
            env.update(zip(node.outputs, want if isinstance(want, tuple) else (want,)))
    return None
