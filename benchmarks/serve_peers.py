"""The server beside other Python model servers: an identity of 16 floats, one client, one machine, JSON for all.

    python -m benchmarks.serve_peers --litserve VENV --bentoml VENV --mlserver VENV --ray VENV --torchserve VENV

Each VENV has that server installed (`pip install litserve`, ...; they do not fit into one). A peer answers through its
own protocol (MLServer's is KServe v2, as ours), as its documentation shows it, with one worker, without batching. Rounds
go around all servers, so that a slow moment of the machine meets all of them. TorchServe also needs Java; its log, a few
lines a request by default, is off.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import save
from benchmarks.serve import identity, measured_once

V2 = {"inputs": [{"name": "x", "shape": [1, 16], "datatype": "FP32", "data": [1.0] * 16}]}
PLAIN = {"x": [1.0] * 16}


@dataclass(frozen=True)
class Peer:
    """`files` are written, `command` started in their folder; {port}, {grpc}, {metrics} and {python} are filled in."""

    files: dict[str, str]
    command: list[str]
    path: str
    body: dict[str, Any]


PEERS = {
    "litserve": Peer(
        {"app.py": """
import litserve as ls

class Identity(ls.LitAPI):
    def setup(self, device):
        pass
    def decode_request(self, request):
        return request["x"]
    def predict(self, x):
        return x
    def encode_response(self, output):
        return {"y": output}

if __name__ == "__main__":
    ls.LitServer(Identity(), accelerator="cpu").run(
        host="127.0.0.1", port={port}, log_level="warning", generate_client_file=False)
"""},
        ["{python}", "app.py"], "/predict", PLAIN,
    ),
    "bentoml": Peer(
        {"service.py": """
import bentoml

@bentoml.service(workers=1)
class Identity:
    @bentoml.api
    def identity(self, x: list[float]) -> list[float]:
        return x
"""},
        ["{python}", "-m", "bentoml", "serve", "service:Identity", "--host", "127.0.0.1", "--port", "{port}"],
        "/identity", PLAIN,
    ),
    "mlserver": Peer(
        {"settings.json": """{"host": "127.0.0.1", "http_port": {port}, "grpc_port": {grpc},
"metrics_port": {metrics}, "parallel_workers": 0, "debug": false}""",
         "model-settings.json": '{"name": "identity", "implementation": "model.Identity"}',
         "model.py": """
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

class Identity(MLModel):
    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        x = self.decode(payload.inputs[0], default_codec=NumpyCodec)
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", x)])
"""},
        ["{python}", "-c", "from mlserver.cli import main; main()", "start", "."], "/v2/models/identity/infer", V2,
    ),
    "ray": Peer(
        {"app.py": """
import signal
import sys
import time
import ray
from ray import serve
from starlette.requests import Request

@serve.deployment
class Identity:
    async def __call__(self, request: Request):
        return {"y": (await request.json())["x"]}

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # Ray then takes its own processes down
ray.init(address="local", log_to_driver=False, num_cpus=2)
serve.start(http_options={"host": "127.0.0.1", "port": {port}},
            logging_config={"log_level": "ERROR", "enable_access_log": False})
serve.run(Identity.bind())
time.sleep(3600)
"""},
        ["{python}", "app.py"], "/", PLAIN,
    ),
    "torchserve": Peer(
        {"handler.py": """
def handle(data, context):
    return None if data is None else [{"y": row["body"]["x"]} for row in data]
""",
         "config.properties": """
inference_address=http://127.0.0.1:{port}
management_address=http://127.0.0.1:{management}
metrics_address=http://127.0.0.1:{metrics}
grpc_inference_port={grpc}
grpc_management_port={grpc2}
default_workers_per_model=1
disable_token_authorization=true
""",
         "log.xml": """<Configuration><Appenders><Console name="c"/></Appenders>
<Loggers><Root level="error"><AppenderRef ref="c"/></Root></Loggers></Configuration>""",
         "app.py": """
import os
import subprocess
import sys

there = os.path.dirname(sys.executable)
subprocess.run([there + "/torch-model-archiver", "--model-name", "identity", "--version", "1", "--handler",
                "handler.py", "--export-path", "."], check=True)
os.environ["PATH"] = there + ":" + os.environ["PATH"]
os.execv(there + "/torchserve", ["torchserve", "--start", "--foreground", "--model-store", ".", "--models",
         "identity.mar", "--ts-config", "config.properties", "--log-config", "log.xml", "--disable-token-auth"])
"""},
        ["{python}", "app.py"], "/predictions/identity", PLAIN,
    ),
}  # fmt: skip


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in held]
    for s in held:
        s.close()
    return ports


def request_bytes(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def start(peer: Peer, python: str, folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    names = ("port", "grpc", "metrics", "grpc2", "management")
    ports = dict(zip(names, free_ports(len(names))))

    def filled(text: str) -> str:
        for name, value in {**ports, "python": python}.items():
            text = text.replace("{" + name + "}", str(value))
        return text

    folder.mkdir()
    for name, text in peer.files.items():
        (folder / name).write_text(filled(text))
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "BENTOML_DO_NOT_TRACK": "true"}
    log = (folder / "log").open("wb")
    process = subprocess.Popen(
        [filled(c) for c in peer.command], cwd=folder, stdout=log, stderr=log, env=environment, start_new_session=True
    )
    return process, ports["port"]


def wait_until_right(port: int, path: str, body: dict[str, Any], log: Path, seconds: float = 90) -> None:
    """Until the answer holds sixteen ones."""
    end = time.monotonic() + seconds
    while True:
        try:
            call = urllib.request.Request(
                f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(call, timeout=5) as reply:
                text = reply.read().decode()
            assert text.count("1.0") == 16, text
            return
        except (OSError, urllib.error.URLError):
            if time.monotonic() > end:
                raise RuntimeError(f"no answer: {log.read_text()[-2000:]}") from None
            time.sleep(0.3)


def one_round(peer: Peer, python: str, root: Path, threads: int, seconds: float) -> tuple[float, float, float]:
    """(calls a second, p50 ms, p99 ms) of a server that is started for it and warmed for a second."""
    place = root / str(time.monotonic_ns())
    process, port = start(peer, python, place)
    try:
        wait_until_right(port, peer.path, peer.body, place / "log")
        request = request_bytes(peer.path, peer.body)
        measured_once("http", port, threads, 1.0, request)
        return measured_once("http", port, threads, seconds, request)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def version(python: str, name: str) -> str:
    code = f"from importlib.metadata import version; print(version({name!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in PEERS:
        parser.add_argument(f"--{name}", metavar="VENV", type=Path, help=f"environment with {name}")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    pythons = {n: str(getattr(args, n).absolute() / "bin" / "python") for n in PEERS if getattr(args, n)}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "repository").mkdir()
        identity(root / "repository", 16)
        ours = Peer(
            {}, ["{python}", "-m", "venturi", "serve", str(root / "repository"), "--http-port", "{port}", "--grpc-port",
                 "{grpc}", "--metrics-port", "{metrics}", "--host", "127.0.0.1"], "/v2/models/m16/infer", V2,
        )  # fmt: skip
        servers = {"venturi": ours, **{n: PEERS[n] for n in pythons}}
        about = {n: version(p, n) for n, p in pythons.items()}
        found: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
        for threads in (1, 4):
            for _ in range(args.rounds):
                for name, peer in servers.items():
                    one = one_round(peer, pythons.get(name, sys.executable), root, threads, args.seconds)
                    found.setdefault(name, {}).setdefault(f"x{threads}", []).append(one)
                    print(name, threads, [round(v, 3) for v in one], flush=True)
    results: dict[str, Any] = {"versions": about}
    for name, cells in found.items():
        results[name] = {
            cell: {"per_s": statistics.median(o[0] for o in all_), "range": [min(o[0] for o in all_), max(o[0] for o in all_)],
                   "p50_ms": statistics.median(o[1] for o in all_), "p99_ms": statistics.median(o[2] for o in all_)}
            for cell, all_ in cells.items()
        }  # fmt: skip
    for cell in ("x1", "x4"):
        best = max((results[n][cell]["per_s"] for n in pythons), default=float("nan"))
        results[f"ratio to the best peer {cell}"] = results["venturi"][cell]["per_s"] / best
    print(json.dumps(results, indent=1))
    print(save("serve-peers", results))


if __name__ == "__main__":
    main()
