"""What the tuner's pools are worth, kernel by kernel: `python -m benchmarks.gpu_kernels --out FILE`.

Products (60 shapes) and the convolutions of ResNet-50's engine: the time of the candidate that the tuner chose beside
the best of each library and of our own kernels, all from the tuner's own table. Memory-bound kernels on tensors above
64 MB: bytes a second beside a copy of as many bytes in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import venturi as vt
from benchmarks.gpu_models import example, make
from benchmarks.report import save
from venturi.engine.plan import Step

ROWS = (1, 8, 32, 128, 512, 4096)
COLUMNS_AND_DEPTHS = (
    (768, 768), (2304, 768), (3072, 768), (768, 3072), (1024, 1024), (4096, 1024), (4096, 4096), (14336, 4096),
    (4096, 14336), (1000, 2048),
)  # fmt: skip
LIBRARIES = ("cublaslt", "cudnn-conv", "aten-cudnn", "onednn", "aten")
ELEMENTS = 1 << 26  # 128 MB of halves


def weight(dtype: str, *shape: int) -> np.ndarray[Any, Any]:
    return (np.random.default_rng(1).standard_normal(shape) / shape[-1] ** 0.5).astype(dtype)


def product(dtype: str, rows: int, n: int, k: int) -> vt.Network:
    net = vt.Network("product")
    net.output("y", net.input("x", (rows, k), dtype) @ weight(dtype, k, n) + weight(dtype, n))
    return net


def convolutions(batch: int, device: str) -> dict[str, dict[str, Any]]:
    """Of ResNet-50, as its engine has them: NHWC, with their epilogues; by what they are and how often."""
    model, x = make("resnet50"), example("resnet50", batch)
    if device == "cpu":
        model, x = model.float(), x.float()
    else:
        model = model.half()
    engine = vt.build(model, x, device=device, opt_level=1)
    steps: dict[str, Step] = {}
    for step in engine.plan.steps:
        if "Conv" in step.ops and step.measurements[0].median_us is not None:
            steps.setdefault(f"{'+'.join(step.ops)} {step.flops:.4g} {step.bytes}", step)
    return {name: table(step) for name, step in steps.items()}


def pool(net: vt.Network, device: str) -> dict[str, Any]:
    """Of the step with the most work, chosen by its time alone (level 1: not in place)."""
    engine = vt.build(net, device=device, opt_level=1)
    return table(max(engine.plan.steps, key=lambda s: s.flops))


def table(step: Step) -> dict[str, Any]:
    """What the tuner timed for a step: chosen, best of every tactic, best of libraries and of ours."""
    timed = [m for m in step.measurements if m.median_us is not None]
    chosen = next(m for m in timed if (m.tactic, m.config) == (step.tactic, step.config))
    best: dict[str, float] = {}
    for m in timed:
        best[m.tactic] = min(best.get(m.tactic, float("inf")), m.median_us)
    libraries = [t for n, t in best.items() if n.startswith(LIBRARIES)]
    ours = [t for n, t in best.items() if not n.startswith((*LIBRARIES, "reference"))]
    return {
        "tactic": step.tactic, "us": chosen.median_us, "tera": step.flops / chosen.median_us / 1e6, "best": best,
        "over library": chosen.median_us / min(libraries) if libraries else None,
        "over ours": chosen.median_us / min(ours) if ours else None, "candidates": len(timed),
    }  # fmt: skip


def streams(dtype: str) -> dict[str, tuple[vt.Network, int]]:
    """Memory-bound networks over ELEMENTS numbers, with the tensors of that size that they read and write."""
    made = {}
    rows, width = ELEMENTS // 4096, 4096
    for name, tensors in (("gelu", 2), ("add, relu", 3), ("softmax", 2), ("layer norm", 2), ("rms norm", 2)):
        net = vt.Network(name)
        x, ones = net.input("x", (rows, width), dtype), np.ones(width, dtype)
        if name == "add, relu":
            y = net.relu(x + net.input("z", (rows, width), dtype))
        elif name == "gelu":
            y = net.gelu(x)
        elif name == "softmax":
            y = net.softmax(x)
        elif name == "layer norm":
            y = net.layer_normalization(x, ones, ones)
        else:
            y = net.op("RMSNormalization", x, ones)
        net.output("y", y)
        made[name] = (net, tensors)
    return made


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy of 256 MB."""
    source = torch.ones(ELEMENTS, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / best_s(lambda: target.copy_(source), device)


def best_s(work: Callable[[], Any], device: torch.device, calls: int = 10) -> float:
    """Seconds a call, of `calls` in a row."""
    times = []
    for _ in range(12):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - start) / calls)
    return min(times)


def ratios(rows: dict[str, dict[str, Any]], key: str) -> dict[str, float]:
    found = [r[key] for r in rows.values() if r.get(key) is not None]
    return {"geomean": statistics.geometric_mean(found), "worst": max(found), "of": len(found)} if found else {}


def keep(results: dict[str, Any], path: Path | None) -> None:
    """What there is so far: a lent device may be taken back."""
    if path is not None:
        path.write_text(json.dumps(results, indent=1))


def add(
    results: dict[str, Any], part: str, rows: Iterable[tuple[str, dict[str, Any]]], out: Path | None
) -> None:  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    for name, row in rows:
        found[name] = row
        print(part, name, json.dumps({k: v for k, v in row.items() if k != "best"}), flush=True)
        results[part] = {"rows": found} | {k: ratios(found, k) for k in ("over library", "over ours")}
        keep(results, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float16", choices=["float16", "float32"])
    parser.add_argument("--batch", type=int, default=32, help="images of the convolutions")
    parser.add_argument("--limit", type=int, help="only the first of each kind")
    parser.add_argument("--parts", nargs="*", default=["products", "convolutions", "memory"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {"device": args.device, "dtype": args.dtype}
    if "memory" in args.parts:
        found = {}
        for name, (net, tensors) in list(streams(args.dtype).items())[: args.limit]:
            engine = vt.build(net, device=args.device)
            moved = tensors * ELEMENTS * np.dtype(args.dtype).itemsize
            us = sum(s.time_us or 0.0 for s in engine.plan.steps)
            found[name] = {"us": us, "bytes_s": moved / us * 1e6, "steps": [s.tactic for s in engine.plan.steps]}
            del engine
        limit = copy_bandwidth(torch.device(args.device))
        for name, row in found.items():
            row["of copy"] = row["bytes_s"] / limit
            print("memory", name, json.dumps(row), flush=True)
        results["memory"] = {"copy_bytes_s": limit, "rows": found}
        keep(results, args.out)
    if "products" in args.parts:
        shapes = [(m, n, k) for m in ROWS for n, k in COLUMNS_AND_DEPTHS][: args.limit]
        add(results, "products", ((f"{s}", pool(product(args.dtype, *s), args.device)) for s in shapes), args.out)
    if "convolutions" in args.parts:
        add(results, "convolutions", convolutions(args.batch, args.device).items(), args.out)
    if args.out is None:
        print(save("gpu-kernels", results))


if __name__ == "__main__":
    main()
