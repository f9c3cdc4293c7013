"""The server beside a trivial echo, same client, same machine: `python -m benchmarks.serve`.

The model is an identity of 16 floats. HTTP's client is one process of raw sockets, gRPC's one of grpcio's stubs. The
peer is `http.server` answering a fixed body without reading what it says. 16 MB tensors are sent, and then placed in
shared memory. At half load, requests come at fixed times, half as many a second as four clients got answered.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import re
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

import venturi as vt
from benchmarks.report import save
from examples.serve.demo import started

CHUNKED = b"transfer-encoding: chunked"
ANY_PORTS = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
LENGTH = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)


def http_request(width: int) -> bytes:
    head = json.dumps({
        "inputs": [{"name": "x", "shape": [1, width], "datatype": "FP32", "parameters": {"binary_data_size": 4 * width}}],
        "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
    }).encode()  # fmt: skip
    body = head + np.ones(width, np.float32).tobytes()
    lines = (f"POST /v2/models/m{width}/infer HTTP/1.1\r\nHost: a\r\nInference-Header-Content-Length: {len(head)}\r\n"
             f"Content-Length: {len(body)}\r\n\r\n")  # fmt: skip
    return lines.encode() + body


def http_calls(port: int, request: bytes) -> Callable[[], None]:
    raw = socket.create_connection(("127.0.0.1", port))
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def call() -> None:
        raw.sendall(request)
        data = raw.recv(1 << 16)
        while b"\r\n\r\n" not in data:
            data += raw.recv(1 << 16)
        head, _, rest = data.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head[:200]
        if CHUNKED in head.lower():
            while not rest.endswith(b"0\r\n\r\n"):
                rest += raw.recv(1 << 16)
            return
        left = int(LENGTH.search(head)[1]) - len(rest)  # type: ignore[index]
        while left > 0:
            left -= len(raw.recv(1 << 20))

    return call


def grpc_calls(port: int) -> Callable[[], None]:
    import grpc
    from tritonclient.grpc import service_pb2_grpc

    stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(f"127.0.0.1:{port}"))
    message = grpc_message()
    return lambda: stub.ModelInfer(message)  # type: ignore[no-any-return]


def grpc_message() -> Any:
    from tritonclient.grpc import service_pb2

    message = service_pb2.ModelInferRequest(model_name="m16")
    message.inputs.add(name="x", datatype="FP32", shape=[1, 16])
    message.raw_input_contents.append(np.ones(16, np.float32).tobytes())
    return message


def client(kind: str, port: int, threads: int, seconds: float, request: bytes, answers: Any) -> None:
    """Runs in a process of its own; puts (calls a second, p50 ms, p99 ms)."""
    if kind == "stream":
        answers.put(stream(port, seconds))
        return
    times: list[float] = []
    end = time.perf_counter() + seconds

    def loop() -> None:
        call = grpc_calls(port) if kind == "grpc" else http_calls(port, request)
        while (start := time.perf_counter()) < end:
            call()
            times.append(time.perf_counter() - start)

    workers = [threading.Thread(target=loop) for _ in range(threads)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    ordered = sorted(times)
    answers.put((len(ordered) / seconds, ordered[len(ordered) // 2] * 1e3, ordered[int(len(ordered) * 0.99)] * 1e3))


def stream(port: int, seconds: float) -> tuple[float, float, float]:
    """Requests are sent as fast as the stream takes them; latencies are not measured."""
    import grpc
    from tritonclient.grpc import service_pb2_grpc

    stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(f"127.0.0.1:{port}"))
    message, end = grpc_message(), time.perf_counter() + seconds

    def messages() -> Any:
        while time.perf_counter() < end:
            yield message

    start, count = time.perf_counter(), 0
    for _ in stub.ModelStreamInfer(messages()):
        count += 1
    return count / (time.perf_counter() - start), float("nan"), float("nan")


def paced(port: int, per_s: float, seconds: float, request: bytes, answers: Any) -> None:
    """Four clients in a process of its own, each at its own fixed times; puts (calls a second, p50 ms, p99 ms), from
    sending to the answer."""
    times: list[float] = []
    begin = time.perf_counter() + 0.1

    def loop(number: int) -> None:
        call = http_calls(port, request)
        for i in range(int(per_s * seconds / 4)):
            due = begin + (i * 4 + number) / per_s
            if (left := due - time.perf_counter()) > 0:
                time.sleep(left)
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)

    workers = [threading.Thread(target=loop, args=(n,)) for n in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    ordered = sorted(times)
    rate = len(ordered) / (time.perf_counter() - begin)
    answers.put((rate, ordered[len(ordered) // 2] * 1e3, ordered[int(len(ordered) * 0.99)] * 1e3))


def half_load(port: int, per_s: float, seconds: float, rounds: int) -> dict[str, Any]:
    """Medians over rounds."""
    context = mp.get_context("spawn")
    found = []
    for _ in range(rounds):
        answers = context.SimpleQueue()
        process = context.Process(target=paced, args=(port, per_s / 2, seconds, http_request(16), answers))
        process.start()
        process.join(seconds + 60)
        found.append(answers.get())
    rate, p50, p99 = (statistics.median(f[i] for f in found) for i in range(3))
    return {"asked_per_s": per_s / 2, "per_s": rate, "p50_ms": p50, "p99_ms": p99}


def placed(port: int, path: Path, width: int, calls: int) -> dict[str, Any]:
    """A tensor of `width` floats in and out through system shared memory, beside the engine at `path` in this process,
    and a copy between two such arrays."""
    import tritonclient.http as http_client
    from tritonclient.utils import shared_memory as shm

    size, key = 4 * width, "/venturi_benchmark"
    region = shm.create_shared_memory_region("r", key, 2 * size)
    try:
        shm.set_shared_memory_region(region, [np.ones((1, width), np.float32)])
        with http_client.InferenceServerClient(f"127.0.0.1:{port}") as client:
            client.register_system_shared_memory("r", key, 2 * size)
            given = http_client.InferInput("x", [1, width], "FP32")
            given.set_shared_memory("r", size)
            wanted = http_client.InferRequestedOutput("y")
            wanted.set_shared_memory("r", size, size)
            calls_ms = [_timed(lambda: client.infer(f"m{width}", [given], outputs=[wanted])) for _ in range(calls)]
            client.unregister_system_shared_memory()
        a, b = np.ones(width, np.float32), np.ones(width, np.float32)
        copy_ms = statistics.median(_timed(lambda: np.copyto(b, a)) for _ in range(calls))
    finally:
        shm.destroy_shared_memory_region(region)
    ms, alone_ms = statistics.median(calls_ms[1:]), in_process_us(path, width, calls) / 1e3
    return {"ms": ms, "engine_ms": alone_ms, "copy_ms": copy_ms, "GB_per_s": 2 * size / ms / 1e6}


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def measured_once(kind: str, port: int, threads: int, seconds: float, request: bytes) -> tuple[float, float, float]:
    """(calls a second, p50 ms, p99 ms) of a client in a process of its own; `request` is HTTP's."""
    context = mp.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=client, args=(kind, port, threads, seconds, request, answers))
    process.start()
    process.join(seconds + 60)
    return answers.get()  # type: ignore[no-any-return]


def measured(kind: str, port: int, threads: int, seconds: float, rounds: int, width: int = 16) -> dict[str, Any]:
    """Medians over rounds, with the range of the rates."""
    request = http_request(width)
    found = [measured_once(kind, port, threads, seconds if i else 0.5, request) for i in range(rounds + 1)]
    rates = [f[0] for f in found[1:]]
    return {
        "clients": threads, "per_s": statistics.median(rates), "range": [min(rates), max(rates)],
        "p50_ms": statistics.median(f[1] for f in found[1:]), "p99_ms": statistics.median(f[2] for f in found[1:]),
    }  # fmt: skip


class Echo(BaseHTTPRequestHandler):
    """Reads the body's bytes and answers 64 others."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 64\r\n\r\n" + bytes(64))

    def log_message(self, *args: object) -> None:
        return


def echo(ports: Any) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    ports.put(server.server_address[1])
    server.serve_forever()


def identity(root: Path, width: int) -> None:
    net = vt.Network(f"m{width}")
    net.output("y", net.identity(net.input("x", ("n", width))))
    folder = root / f"m{width}" / "1"
    folder.mkdir(parents=True)
    vt.build(net, device="cpu", opt_level=0).save(folder / "model.vt")


def in_process_us(path: Path, width: int = 16, calls: int = 3000) -> float:
    engine, x = vt.load(path), np.ones((1, width), np.float32)
    return statistics.median(_timed(lambda: engine.run({"x": x})) for _ in range(calls)) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    wide = 4 << 20
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for width in (16, wide):
            identity(root, width)
        results["engine in process us"] = in_process_us(root / "m16/1/model.vt")
        context = mp.get_context("spawn")
        found = context.SimpleQueue()
        peer = context.Process(target=echo, args=(found,), daemon=True)
        peer.start()
        process, addresses = started([folder, *ANY_PORTS, "--allow-client-shm"])
        ports = addresses["ports"]
        echo_port = found.get()
        cells = [("echo http", "http", echo_port), ("http", "http", ports["http"]), ("grpc", "grpc", ports["grpc"])]
        try:
            for threads in (1, 4):
                for name, kind, port in cells:
                    results[f"{name} x{threads}"] = measured(kind, port, threads, args.seconds, args.rounds)
                    print(name, threads, json.dumps(results[f"{name} x{threads}"]), flush=True)
            results["grpc stream"] = measured("stream", ports["grpc"], 1, args.seconds, args.rounds)
            print("stream", json.dumps(results["grpc stream"]), flush=True)
            large = measured("http", ports["http"], 1, args.seconds, args.rounds, wide)
            large["GB_per_s"] = large["per_s"] * wide * 4 * 2 / 1e9
            results["http 16 MB"] = large
            print("16 MB", json.dumps(large), flush=True)
            results["shared memory 16 MB"] = placed(ports["http"], root / f"m{wide}/1/model.vt", wide, 60)
            print("shared memory", json.dumps(results["shared memory 16 MB"]), flush=True)
            per_s = results["http x4"]["per_s"]
            results["http at half load"] = half_load(ports["http"], per_s, args.seconds, args.rounds)
            print("half load", json.dumps(results["http at half load"]), flush=True)
        finally:
            process.terminate()
            process.wait(60)
            peer.terminate()
    print(save("serve", results))


if __name__ == "__main__":
    main()
