"""Throughput on the CPU: runs side by side on cores of their own, beside OpenVINO's THROUGHPUT hint, on the same files.

Both get more requests than they run at once. Windows alternate between the engines; the figure is the median number of
inferences a second over all windows, the spread the interquartile range. `one run` is our engine in latency mode, a
request after the other on all cores.

    python -m benchmarks.cpu_streams --models ResNet-50,BERT-base-128 --precision fp32
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from rich.console import Console
from rich.table import Table

import venturi as vt
from benchmarks.cpu_models import MODELS
from benchmarks.report import save, version_of
from venturi.frontends.torch_export import export

ROUNDS, WINDOW_S, SETTLE_S = 7, 1.5, 0.2
Window = Callable[[float], int]


def callers(engine: Any, arrays: list[Any], count: int) -> Window:
    """`count` threads that call the engine until the time is over; the number of calls they finished."""
    pool = ThreadPoolExecutor(count)

    def run(seconds: float) -> int:
        end = time.perf_counter() + seconds

        def loop(_: int) -> int:
            done = 0
            while time.perf_counter() < end:
                engine(*arrays)
                done += 1
            return done

        return sum(pool.map(loop, range(count)))

    return run


def openvino(path: Path, arrays: list[Any], kind: str) -> Window | None:
    """Its own queue of as many requests as it thinks best."""
    try:
        import openvino as ov
    except ImportError:
        return None
    core = ov.Core()
    hints = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": kind}
    queue = ov.AsyncInferQueue(core.compile_model(core.read_model(str(path)), "CPU", hints))

    def run(seconds: float) -> int:
        end, done = time.perf_counter() + seconds, 0
        while time.perf_counter() < end:
            queue.start_async(arrays)
            done += 1
        queue.wait_all()
        return done

    return run


def measure(windows: dict[str, Window]) -> dict[str, tuple[float, float]]:
    """Median and interquartile range of inferences a second. A turn begins uncounted, until the threads of the engine
    before it are asleep."""
    found: dict[str, list[float]] = {n: [] for n in windows}
    for _ in range(ROUNDS):
        for name, run in windows.items():
            run(SETTLE_S)
            start = time.perf_counter()
            done = run(WINDOW_S)
            found[name].append(done / (time.perf_counter() - start))
    quartiles = {n: statistics.quantiles(t, n=4) for n, t in found.items()}
    return {n: (statistics.median(t), quartiles[n][2] - quartiles[n][0]) for n, t in found.items()}


def run_model(name: str, precision: str) -> dict[str, Any]:
    torch.manual_seed(0)
    make, example = MODELS[name]
    module, inputs = make(), example(1)
    arrays = [x.numpy() for x in inputs]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        exported = export(module, inputs, None)
        onnx, path = Path(folder) / "m.onnx", Path(folder) / "m.vt"
        ir.save(exported, onnx)
        one = vt.build(exported, precision=precision)
        one.save(path)
        many = vt.load(path, streams="auto")
        windows = {
            "venturi": callers(many, arrays, 2 * many.streams),
            "openvino": openvino(onnx, arrays, "f32" if precision == "fp32" else "bf16"),
            "one run": callers(one, arrays, 1),
        }
        found = measure({n: w for n, w in windows.items() if w is not None})
        many.close()
    rates, iqr = ({n: round(v[i], 2) for n, v in found.items()} for i in range(2))
    return {"model": name, "precision": precision, "streams": many.streams, "rates": rates, "iqr": iqr}


def show(rows: list[dict[str, Any]]) -> None:
    names = list(rows[0]["rates"])
    table = Table("model", "precision", "streams", *(f"{n} /s" for n in names), "x OpenVINO", "x one run")
    for r in rows:
        rates = r["rates"]
        ratios = [f"{rates['venturi'] / rates[n]:.2f}" if n in rates else "-" for n in ("openvino", "one run")]
        figures = [f"{rates[n]:.1f} ± {r['iqr'][n]:.1f}" for n in names]
        table.add_row(r["model"], r["precision"], str(r["streams"]), *figures, *ratios)
    Console(width=160).print(table)
    for kind in dict.fromkeys(r["precision"] for r in rows):
        found = [r["rates"] for r in rows if r["precision"] == kind and "openvino" in r["rates"]]
        if found:
            mean = statistics.geometric_mean([r["venturi"] / r["openvino"] for r in found])
            print(f"{kind}: geometric mean of venturi / openvino: {mean:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--precision", default="fp32,bf16")
    parser.add_argument("--no-save", action="store_true", help="do not write benchmarks/results")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows = []
    for precision in args.precision.split(","):
        for name in args.models.split(","):
            rows.append(run_model(name, precision))
            print(rows[-1], flush=True)
    show(rows)
    if not args.no_save:
        save("cpu-streams", rows, {"openvino": version_of("openvino")})


if __name__ == "__main__":
    main()
