"""What dynamic batching gains beside what the engine itself gains from batches: `python -m benchmarks.serve_batching`.

ResNet-50 with a free batch is served twice from one file: with a batcher of up to 8 rows and without. `--clients` ask
over HTTP, an image each; windows alternate between the two, so that both meet the same machine. The engine is timed in
process at each batch size, in turns too. Medians, with their range.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import venturi as vt
from benchmarks.cpu_models import MODELS
from benchmarks.report import save
from examples.serve.demo import started

BATCHES = (1, 2, 4, 8)
BATCHED = "max_batch_size: 8\ndynamic_batching { max_queue_delay_microseconds: 20000 preferred_batch_size: [ 8 ] }\n"
ALONE = "max_batch_size: 8\n"


def repository(root: Path, name: str, precision: str) -> Path:
    """Both configurations of one engine; returns its file."""
    make, example = MODELS[name]
    free = torch.export.Dim("batch", min=1, max=8)
    with torch.inference_mode():
        engine = vt.build(make(), example=example(2), dynamic_shapes=(({0: free},),), precision=precision)
    for model, config in (("batched", BATCHED), ("alone", ALONE)):
        folder = root / model / "1"
        folder.mkdir(parents=True)
        engine.save(folder / "model.vt")
        (root / model / "config.pbtxt").write_text(config)
    return root / "alone" / "1" / "model.vt"


def summary(rates: list[float]) -> dict[str, Any]:
    return {"per_s": round(statistics.median(rates), 2), "range": [round(min(rates), 2), round(max(rates), 2)]}


def in_process(path: Path, name: str, rounds: int, seconds: float) -> dict[int, dict[str, Any]]:
    """Rows a second by batch."""
    engine = vt.load(path)
    inputs = {b: MODELS[name][1](b) for b in BATCHES}
    rates: dict[int, list[float]] = {b: [] for b in BATCHES}
    for _ in range(rounds + 1):
        for batch, x in inputs.items():
            done, start = 0, time.perf_counter()
            while (spent := time.perf_counter() - start) < seconds:
                engine(*x)
                done += batch
            rates[batch].append(done / spent)
    return {b: summary(r[1:]) for b, r in rates.items()}


def loaded(model: str, port: int, clients: int, seconds: float) -> dict[str, Any]:
    """What `venturi perf` finds, in a process of its own."""
    command = [sys.executable, "-m", "venturi", "perf", model, "-u", f"127.0.0.1:{port}", "--concurrency", str(clients),
               "--window-ms", str(int(seconds * 1e3)), "--max-windows", "3", "--json"]  # fmt: skip
    made = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found: dict[str, Any] = json.loads(made.stdout)["levels"][0]
    return found


def served(root: Path, clients: int, rounds: int, seconds: float) -> dict[str, Any]:
    process, addresses = started([str(root), "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"])
    ports = addresses["ports"]
    found: dict[str, list[dict[str, Any]]] = {"alone": [], "batched": []}
    try:
        for _ in range(rounds):
            for model, rows in found.items():
                rows.append(loaded(model, ports["http"], clients, seconds))
                print(model, rows[-1], flush=True)
    finally:
        process.terminate()
        process.wait(60)
    return {
        m: summary([r["infer_per_s"] for r in rows]) | {"batch": statistics.median(r["server_batch"] for r in rows)}
        for m, rows in found.items()
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ResNet-50", choices=sorted(MODELS))
    parser.add_argument("--precisions", nargs="*", default=["fp32", "bf16"])
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    args = parser.parse_args()
    results: dict[str, Any] = {"model": args.model, "clients": args.clients}
    for precision in args.precisions:
        with tempfile.TemporaryDirectory() as folder:
            path = repository(Path(folder), args.model, precision)
            engine = in_process(path, args.model, args.rounds, args.seconds / 2)
            server = served(Path(folder), args.clients, args.rounds, args.seconds)
        results[precision] = {
            "engine": engine,
            "engine gain": round(engine[8]["per_s"] / engine[1]["per_s"], 3),
            "server": server,
            "server gain": round(server["batched"]["per_s"] / server["alone"]["per_s"], 3),
        }
        print(precision, json.dumps(results[precision], indent=1), flush=True)
    print(save("serve-batching", results))


if __name__ == "__main__":
    main()
