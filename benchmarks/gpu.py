"""The GPU table: our engines beside torch.compile, same model, precision and run. `python -m benchmarks.gpu --help`.

Times are CUDA events around replays, inputs already on the device, medians of rounds; accuracy is the relative error
of the output against the same network in fp32 (tf32 off).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch

import venturi as vt
from benchmarks.gpu_models import example, make

FLOPS = {"fp16": 790e12, "fp32": 51e12, "tf32": 410e12}  # on random data, as measured on this kind of GPU
ROWS = [
    ("resnet50", (1, 8, 32, 128)), ("bert_base", (1, 8, 32)), ("vit_b16", (1, 8, 32)),
    ("efficientnet_b0", (1, 32)), ("mobilenet_v3_large", (1, 32)),
]  # fmt: skip


def median_ms(fn, rounds: int = 9, calls: int = 20) -> tuple[float, float]:
    """(median, spread) of milliseconds a call."""
    for _ in range(3):
        fn()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            fn()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times), max(times) - min(times)


def host_us(fn, calls: int = 200) -> float:
    """Microseconds of host time a call, the device kept idle between batches of calls."""
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls // 5):
            fn()
        best = min(best, (time.perf_counter() - start) / (calls // 5) * 1e6)
    return best


def compiled_ms(model: torch.nn.Module, x: torch.Tensor) -> dict[str, float]:
    """torch.compile at its best for inference: CUDA graphs and frozen weights. The model must be made outside
    inference mode: weights that are inference tensors are copied before every replay."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    torch._dynamo.reset()
    compiled = torch.compile(model, mode="reduce-overhead")
    ms, spread = median_ms(lambda: compiled(x))
    return {"compile_ms": round(ms, 4), "compile_spread_ms": round(spread, 4)}


def one(name: str, batch: int, level: int, precision: str, peer: bool, out: Path | None) -> dict[str, object]:
    model, x = make(name), example(name, batch)
    start = time.perf_counter()
    stages: dict[str, float] = {}

    def watch(event) -> bool:
        stages[event.phase] = time.perf_counter() - start
        return True

    half, rounded = precision == "fp16", precision == "tf32"
    model = model.half() if half else model
    engine = vt.build(
        model, x if half else x.float() if x.is_floating_point() else x, device="cuda", opt_level=level, progress=watch,
        precision="tf32" if rounded else "model",
    )  # fmt: skip
    build_s = time.perf_counter() - start
    on_gpu = x.cuda() if half or not x.is_floating_point() else x.float().cuda()
    got = engine(on_gpu).float()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    wide = model.float().cuda()
    with torch.inference_mode():
        want = wide(on_gpu.float() if on_gpu.is_floating_point() else on_gpu).float()
        row: dict[str, object] = {
            "model": name, "batch": batch, "precision": precision, "build_s": round(build_s, 1),
            "steps": len(engine.plan.steps),
            "stages_s": {k: round(v, 1) for k, v in stages.items()},
            "flop_floor_ms": round(sum(s.flops for s in engine.plan.steps) / FLOPS[precision] * 1e3, 4),
            "error": float(((got - want).norm() / want.norm()).item()),
        }  # fmt: skip
        ms, spread = median_ms(lambda: engine(on_gpu))
        row |= {
            "venturi_ms": round(ms, 4),
            "spread_ms": round(spread, 4),
            "host_us": round(host_us(lambda: engine(on_gpu)), 1),
            "bound_host_us": round(host_us(engine.bind({engine.inputs[0].name: on_gpu}).run), 1),
        }
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = rounded
    same = wide.half() if half else wide
    with torch.no_grad():
        row["eager_error"] = float(((same(on_gpu).float() - want).norm() / want.norm()).item())
        if peer:
            row |= compiled_ms(same, on_gpu)
            row["speedup"] = round(row["compile_ms"] / row["venturi_ms"], 3)
    if out is not None:
        report = engine.profile({engine.inputs[0].name: on_gpu}, runs=5)
        (out / f"{name}_b{batch}.txt").write_text(describe_steps(engine) + "\n" + str(report))
    return row


def describe_steps(engine: vt.Engine) -> str:
    lines = []
    for s in engine.plan.steps:
        lines.append(f"{s.time_us} {s.tactic} {s.config} {'+'.join(s.ops)} {s.flops:.3g} {s.bytes}")
        lines += [f"    {m.tactic} {m.config} {m.median_us} {m.spread_us} {m.reason}" for m in s.measurements[:40]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=[n for n, _ in ROWS])
    parser.add_argument("--batches", nargs="*", type=int)
    parser.add_argument("--level", type=int, default=3)
    parser.add_argument("--precision", choices=("fp16", "fp32", "tf32"), default="fp16", help="of both")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--out", type=Path, default=None, help="folder for results and per-step reports")
    args = parser.parse_args()
    rows = []
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    print(f"{torch.cuda.get_device_name()} torch {torch.__version__}", flush=True)
    for name, batches in ROWS:
        for batch in batches if name in args.models else ():
            if args.batches and batch not in args.batches:
                continue
            try:
                row = one(name, batch, args.level, args.precision, not args.no_peer, args.out)
            except (RuntimeError, vt.VenturiError) as exc:
                row = {"model": name, "batch": batch, "failed": str(exc)[:400]}
            rows.append(row)
            print(json.dumps(row), flush=True)
            if args.out is not None:
                about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cpus": os.cpu_count()}
                (args.out / "gpu.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    ratios = [r["speedup"] for r in rows if "speedup" in r]
    if ratios:
        print(f"geomean of {len(ratios)} rows over torch.compile: {statistics.geometric_mean(ratios):.3f}")


if __name__ == "__main__":
    main()
