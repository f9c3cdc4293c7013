"""Fixed costs: import, Python per run, build, load and inspect. Run: make bench-overheads"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import venturi as vt
from benchmarks.report import save
from venturi.cli.resnet import NetworkOps, Weights, resnet50


def seconds(fn: Callable[[], object], repeats: int = 5) -> dict[str, float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def python(*code: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, *code], check=True, capture_output=True)


def measure(folder: Path) -> dict[str, dict[str, float]]:
    found = {"python, nothing imported": seconds(python("-c", "pass"))}
    found["import venturi (process)"] = seconds(python("-c", "import venturi"))
    net = vt.Network("one")
    x = net.input("x", (4,))
    net.output("y", net.relu(x))
    one = vt.build(net, device="cpu", opt_level=0)
    data = np.zeros(4, np.float32)
    one(data)
    run = seconds(lambda: [one(data) for _ in range(2000)])
    found["one-node run"] = {k: v / 2000 for k, v in run.items()}
    model, cache = vt.Network("resnet50"), folder / "timing.json"
    image = model.input("image", (1, 3, 224, 224))
    model.output("logits", resnet50(NetworkOps(model), image, Weights()))
    start = time.perf_counter()
    engine = vt.build(model, device="cpu", timing_cache=cache)
    cold = time.perf_counter() - start
    found["ResNet-50 build, empty timing cache"] = {"median": cold, "min": cold, "max": cold}
    found["ResNet-50 build, full timing cache"] = seconds(lambda: vt.build(model, device="cpu", timing_cache=cache), 3)
    path = folder / "resnet.vt"
    engine.save(path)
    found["ResNet-50 load"] = seconds(lambda: vt.load(path))
    found["venturi inspect engine (process)"] = seconds(python("-m", "venturi", "inspect", "engine", str(path)))
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    for name, t in found.items():
        print(f"{name:40} {t['median'] * 1e3:12.4f} ms  ({t['min'] * 1e3:.4f} to {t['max'] * 1e3:.4f})")
    print(save("overheads", found))


if __name__ == "__main__":
    main()
