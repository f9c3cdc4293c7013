"""What an engine on the CPU costs beside its latency: memory, loading, idling, allocations, sharing the threads.

Memory, loading and idling are of fresh processes, ours and onnxruntime's, on the same models; the second figure of
memory leaves out what importing the libraries took. `python -m benchmarks.cpu_costs`
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

import venturi as vt
from benchmarks.cpu_models import MODELS
from benchmarks.report import save
from venturi.frontends.torch_export import export

CHAIN_ELEMENTS = 16 << 20
SERIES = ("ResNet-50", "MobileNet-V3", "BERT-base-128")
CHILD = """
import json, sys, time
kind, path, data = sys.argv[1:]
import numpy as np
arrays = list(np.load(data).values())

def memory(field):
    text = open("/proc/self/status").read()
    return int(text.split(field + ":")[1].split()[0]) / 1024

if kind == "venturi":
    import venturi, torch, venturi.engine.engine, venturi.backends.cpu.native.jit
    imported = memory("VmRSS")
    start = time.perf_counter()
    engine = venturi.load(path)
    loaded = time.perf_counter() - start
    call = lambda: engine(*arrays)
else:
    import onnxruntime
    imported = memory("VmRSS")
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    loaded = time.perf_counter() - start
    feed = dict(zip([i.name for i in session.get_inputs()], arrays))
    call = lambda: session.run(None, feed)
for _ in range(10):
    call()
time.sleep(0.5)
before = time.process_time()
time.sleep(2)
idle = (time.process_time() - before) / 2
print(json.dumps({"peak_mb": memory("VmHWM"), "imported_mb": imported, "load_s": loaded, "idle_percent": 100 * idle}))
"""


def in_process(kind: str, path: Path, data: Path) -> dict[str, float]:
    command = [sys.executable, "-c", CHILD, kind, str(path), str(data)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def median_ms(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def memory_of(name: str, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    make, example = MODELS[name]
    inputs = example(1)
    stem = folder / name.replace("/", "-")
    onnx, engine, data = (stem.with_suffix(s) for s in (".onnx", ".vt", ".npz"))
    with torch.inference_mode():
        ir.save(export(make(), inputs, None), onnx)
    vt.build(onnx, opt_level=0)
    start = time.perf_counter()
    vt.build(onnx, opt_level=0)
    build_s = time.perf_counter() - start
    vt.build(onnx).save(engine)
    np.savez(data, *(x.numpy() for x in inputs))
    ours, other = in_process("venturi", engine, data), in_process("onnxruntime", onnx, data)
    own, peer = (p["peak_mb"] - p["imported_mb"] for p in (ours, other))
    return {
        "model": name, "build_opt_0_s": build_s, "venturi": ours, "onnxruntime": other,
        "peak_ratio": ours["peak_mb"] / other["peak_mb"], "peak_ratio_without_imports": own / peer,
    }  # fmt: skip


def chain() -> dict[str, float]:
    """Ten pointwise operators over 16M floats: ms, the share of torch's copy bandwidth, and times eager."""
    net = vt.Network("chain")
    x = net.input("x", (CHAIN_ELEMENTS,))
    y = net.relu(net.add(net.mul(x, np.float32(1.5)), np.float32(0.25)))
    y = net.add(net.abs(net.sub(net.mul(y, x), np.float32(1.0))), x)
    net.output("y", net.neg(net.max(net.mul(y, np.float32(0.5)), np.float32(-3.0))))
    engine = vt.build(net, device="cpu", opt_level=0)
    given, home = torch.randn(CHAIN_ELEMENTS), torch.empty(CHAIN_ELEMENTS)

    def eager() -> torch.Tensor:
        z = torch.relu(given * 1.5 + 0.25)
        z = (z * given - 1.0).abs() + given
        return -torch.clamp_min(z * 0.5, -3.0)

    torch.testing.assert_close(engine(given), eager())
    calls: dict[str, Callable[[], object]] = {
        "venturi": lambda: engine(given), "eager": eager, "copy": lambda: home.copy_(given),
    }  # fmt: skip
    rounds = [{n: median_ms(call, 3) for n, call in calls.items()} for _ in range(9)]
    ms = {n: statistics.median(r[n] for r in rounds) for n in calls}
    return ms | {"of_copy": ms["copy"] / ms["venturi"], "times_eager": ms["eager"] / ms["venturi"]}


def series() -> dict[str, float]:
    """Three models one after the other against the sum of each alone."""
    engines = {}
    for name in SERIES:
        torch.manual_seed(0)
        make, example = MODELS[name]
        with torch.inference_mode():
            engines[name] = (vt.build(export(make(), example(1), None), opt_level=0), example(1))
    calls = [lambda e=e, x=x: e(*x) for e, x in engines.values()]  # type: ignore[misc]
    rounds = []
    for _ in range(9):
        alone = sum(median_ms(call, 5) for call in calls)
        rounds.append((alone, median_ms(lambda: [call() for call in calls], 5)))
    alone, together = (statistics.median(r[i] for r in rounds) for i in range(2))
    return {"sum_ms": alone, "series_ms": together, "ratio": together / alone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="ResNet-50,MobileNet-V3,BERT-base-128,ViT-B/16")
    parser.add_argument("--no-save", action="store_true", help="do not write benchmarks/results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {"models": [memory_of(n, Path(folder)) for n in args.models.split(",")]}
    for row in found["models"]:
        print(row)
    found["pointwise"], found["series"] = chain(), series()
    print(found["pointwise"], found["series"], sep="\n")
    if not args.no_save:
        save("cpu-costs", found)


if __name__ == "__main__":
    main()
