"""CPU latency beside torch eager, onnxruntime and OpenVINO on the same ONNX files: one process, interleaved.

Every model is checked against torch before it is timed. Rounds alternate between the engines, so that a noisy
neighbour hits all of them; the first two calls of a turn, which find the other's threads still spinning, do not count.
The figure is the median over all rounds, the spread the interquartile range. The peak is measured between the models:
independent multiply-adds in registers on all threads.

    python -m benchmarks.cpu --models ResNet-50,BERT-base-128 --batches 1,8
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from rich.console import Console
from rich.table import Table

import venturi as vt
from benchmarks.cpu_models import MODELS
from benchmarks.report import save, version_of
from venturi.backends.cpu.codegen.emit import Emitter
from venturi.backends.cpu.codegen.isa import host
from venturi.backends.cpu.native.jit import host_jit
from venturi.backends.cpu.native.openmp import max_threads
from venturi.backends.cpu.native.walker import Job
from venturi.frontends.torch_export import export

ROUNDS, CALLS, UNCOUNTED, SETTLE_S = 8, 6, 2, 0.06
FMA_LOOPS, CHAINS = 400_000, 20


def measure(calls: dict[str, Callable[[], Any]]) -> dict[str, tuple[float, float]]:
    """Median and interquartile range in ms of every call, in alternating rounds. A round begins uncounted until the
    threads of the engine before it, which spin for a while, are asleep."""
    times: dict[str, list[float]] = {n: [] for n in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            settled = time.perf_counter() + SETTLE_S
            for _ in range(UNCOUNTED):
                call()
            while time.perf_counter() < settled:
                call()
            for _ in range(CALLS - UNCOUNTED):
                start = time.perf_counter()
                call()
                times[name].append((time.perf_counter() - start) * 1e3)
    out = {}
    for name, t in times.items():
        q = statistics.quantiles(t, n=4)
        out[name] = (statistics.median(t), q[2] - q[0])
    return out


def peak_gflops() -> float | None:
    """GFLOP/s of fp32 multiply-adds on all threads, the best of 5; None where no code can be generated."""
    isa = host()
    if isinstance(isa, str):
        return None

    def emit() -> str:
        e = Emitter(isa)
        p = e.pointer(0)
        a, b = e.load(p), e.load(e.at(p, isa.lanes))

        def task(t: Any) -> None:
            sums = [e.constant(float(i)) for i in range(CHAINS)]
            sums = e.loop(0, FMA_LOOPS, 1, sums, lambda i, s: [e.fma(a, x, b) for x in s])
            total = sums[0]
            for x in sums[1:]:
                total = e.b.fadd(total, x)
            e.store(total, e.at(p, e.add(2 * isa.lanes, e.mul(t, isa.lanes))))

        e.each(e.begin, e.end, 1, task)
        return e.finish()

    threads = max_threads()
    memory = torch.zeros((threads + 2) * isa.lanes)
    job = Job([(host_jit(isa).address(f"peak {FMA_LOOPS} {CHAINS}", emit), [memory.data_ptr()], threads)])
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        job.run()
        best = min(best, time.perf_counter() - start)
    return threads * FMA_LOOPS * CHAINS * isa.lanes * 2 / best / 1e9


def peers(path: Path, arrays: list[Any]) -> dict[str, Callable[[], Any]]:
    """onnxruntime, and OpenVINO where it is installed, at their defaults for latency."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {i.name: x for i, x in zip(session.get_inputs(), arrays)}
    found: dict[str, Callable[[], Any]] = {"onnxruntime": lambda: session.run(None, feed)}
    try:
        import openvino as ov
    except ImportError:
        return found
    core = ov.Core()
    for name, kind in (("openvino", "f32"), ("openvino-bf16", "bf16")):
        hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": kind}
        compiled = core.compile_model(core.read_model(str(path)), "CPU", hints)
        found[name] = lambda compiled=compiled: compiled(arrays)
    return found


def run_model(name: str, batch: int) -> dict[str, Any]:
    """Figures of one model: ms and interquartile range by engine, build seconds, error against torch, peak."""
    torch.manual_seed(0)
    make, example = MODELS[name]
    module, inputs = make(), example(batch)
    with torch.inference_mode():
        want = module(*inputs)
        want = want[0] if isinstance(want, tuple) else want
        exported = export(module, inputs, None)
        start = time.perf_counter()
        engine = vt.build(exported)
        build_s = time.perf_counter() - start
        half = vt.build(exported, precision="bf16")
        got = engine(*inputs)
        error = float((got - want).abs().max() / want.abs().max())
        bf16_error = float((half(*inputs) - want).abs().max() / want.abs().max())
        if not error < 1e-3 or not bf16_error < 0.05:
            raise SystemExit(f"{name}: errors {error}, {bf16_error} (bf16) against torch; nothing is timed")
        arrays = [x.numpy() for x in inputs]
        with tempfile.TemporaryDirectory() as folder:
            ir.save(exported, Path(folder) / "m.onnx")
            others = peers(Path(folder) / "m.onnx", arrays)
        before = peak_gflops()
        calls = {"venturi": lambda: engine(*arrays), "venturi-bf16": lambda: half(*arrays), **others}
        found = measure({**calls, "eager": lambda: module(*inputs)})
    ms, iqr = ({k: round(v[i], 3) for k, v in found.items()} for i in range(2))
    gflop = sum(s.flops for s in engine.plan.steps) / 1e9
    generated = sum(s.tactic.startswith("native-") for s in engine.plan.steps) / len(engine.plan.steps)
    return {
        "model": name, "batch": batch, "ms": ms, "iqr_ms": iqr, "build_s": round(build_s, 2), "error": error, "bf16_error": bf16_error,
        "gflop": round(gflop, 2), "peak_gflops": [before, peak_gflops()], "generated_steps": round(generated, 2),
    }  # fmt: skip


def ratio(rows: list[dict[str, Any]], ours: str, peer: str) -> float | None:
    """Geometric mean of our time over the peer's; None where the peer did not run."""
    found = [r["ms"][ours] / r["ms"][peer] for r in rows if peer in r["ms"]]
    return statistics.geometric_mean(found) if found else None


def show(rows: list[dict[str, Any]]) -> None:
    names = list(rows[0]["ms"])
    table = Table("model", "batch", *(f"{n} ms" for n in names), "x ORT", "x OpenVINO", "bf16 x OV", "build s")
    for r in rows:
        ms = r["ms"]
        pairs = (("venturi", "onnxruntime"), ("venturi", "openvino"), ("venturi-bf16", "openvino-bf16"))
        ratios = [f"{ms[a] / ms[b]:.2f}" if b in ms else "-" for a, b in pairs]
        figures = [f"{ms[k]:.1f} ± {r['iqr_ms'][k]:.1f}" for k in names]
        table.add_row(r["model"], str(r["batch"]), *figures, *ratios, str(r["build_s"]))
    Console(width=200).print(table)
    for ours, peer in (("venturi", "onnxruntime"), ("venturi", "openvino"), ("venturi-bf16", "openvino-bf16")):
        found = ratio(rows, ours, peer)
        if found is not None:
            print(f"geometric mean of {ours} / {peer}: {found:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batches", default="1")
    parser.add_argument("--no-save", action="store_true", help="do not write benchmarks/results")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows = []
    for batch in map(int, args.batches.split(",")):
        for name in args.models.split(","):
            print(f"{name}, batch {batch} ...", flush=True)
            rows.append(run_model(name, batch))
            print({k: rows[-1][k] for k in ("ms", "iqr_ms", "build_s", "peak_gflops")}, flush=True)
    show(rows)
    if not args.no_save:
        save("cpu", rows, {p: version_of(p) for p in ("onnxruntime", "openvino", "transformers", "llvmlite")})


if __name__ == "__main__":
    main()
