"""Serves the digits model, asks it over HTTP and gRPC with tritonclient, prints what came back, stops cleanly."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from rich.console import Console
from rich.table import Table

MODEL = Path(__file__).resolve().parents[1] / "digits" / "digits.onnx"


def held_out() -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 1, 8, 8] in 0..1 and labels: scikit-learn's digits; noise and labels of -1 where it is absent."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        return np.random.default_rng(0).random((64, 1, 8, 8), dtype=np.float32), np.full(64, -1)
    data = load_digits()
    return (data.images[-64:, None] / 16).astype(np.float32), data.target[-64:]


def started(arguments: list[str]) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """The server's process and its addresses, once it is ready."""
    command = [sys.executable, "-m", "venturi", "serve", *arguments, "--host", "127.0.0.1", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    text = ""
    assert process.stdout is not None
    while not text.endswith("\n}\n"):
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"the server ended with status {process.wait()}")
        text += line
    return process, json.loads(text)


def ask(module, client, images: np.ndarray, rounds: int) -> tuple[np.ndarray, list[float]]:
    """Classes of all images, one request an image, and milliseconds a request."""
    times, classes = [], []
    for image in np.concatenate([images] * rounds):
        given = module.InferInput("image", [1, 1, 8, 8], "FP32")
        given.set_data_from_numpy(image[None])
        start = time.perf_counter()
        answer = client.infer("digits", [given])
        times.append((time.perf_counter() - start) * 1e3)
        classes.append(int(answer.as_numpy("logits").argmax()))
    return np.array(classes[: len(images)]), times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="times each image is sent")
    rounds = parser.parse_args().rounds
    images, labels = held_out()
    console = Console()
    process, found = started([str(MODEL), "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"])
    ports = found["ports"]
    try:
        console.print(
            f"serving {MODEL.name}: {', '.join(f'{n} 127.0.0.1:{p}' for n, p in ports.items())}", highlight=False
        )
        console.print(f"dashboard: {found['dashboard']}", highlight=False)
        table = Table("client", "requests", "median ms", "p99 ms", "right", title="digits over the wire")
        for module, kind in ((http_client, "http"), (grpc_client, "grpc")):
            with module.InferenceServerClient(f"127.0.0.1:{ports[kind]}") as client:
                classes, times = ask(module, client, images, rounds)
            right = f"{(classes == labels).mean():.1%}" if labels[0] >= 0 else "-"
            table.add_row(kind, str(len(times)), f"{np.median(times):.2f}", f"{np.percentile(times, 99):.2f}", right)
        console.print(table)
        with urllib.request.urlopen(f"http://127.0.0.1:{ports['metrics']}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        console.print(
            "\n".join(x for x in lines if x.startswith(("nv_inference_count", "nv_inference_exec"))), highlight=False
        )
    finally:
        process.send_signal(signal.SIGTERM)
    console.print(f"stopped with status {process.wait(30)}")


if __name__ == "__main__":
    main()
