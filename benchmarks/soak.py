"""A server under load for a while: reloads every 5 s, a Python model that crashes, clients that hang up.

    python -m benchmarks.soak --minutes 10

Every answer is checked. Lost: no answer within 30 s, or a connection that the server broke. Wrong: not what was asked.
Memory is the resident size of the server's process, after the first tenth of the time and at the end.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import socket
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from tritonclient.utils import InferenceServerException

import venturi as vt
from benchmarks.report import save
from examples.serve.demo import started

CRASHING = """
import os
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            if (x < 0).any():
                os.abort()
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", x * 2)]))
        return answers
"""
PYTHON = 'backend: "python" max_batch_size: 4 input { name: "x" data_type: TYPE_FP32 dims: [4] } output { name: "y" data_type: TYPE_FP32 dims: [4] }'
SEQUENCES = """
max_batch_size: 8 input { name: "x" data_type: TYPE_FP32 dims: [1] } output { name: "y" data_type: TYPE_FP32 dims: [1] }
sequence_batching { oldest { max_candidate_sequences: 16 }
  control_input { name: "start" control { kind: CONTROL_SEQUENCE_START fp32_false_true: [0, 1] } }
  state { input_name: "kept" output_name: "next" data_type: TYPE_FP32 dims: [1] } }
"""


def make_repository(root: Path) -> None:
    twice = vt.Network("twice")
    twice.output("y", twice.input("x", ("n", 4)) * np.float32(2))
    total = vt.Network("total")
    x, kept, start = (total.input(n, ("n", 1)) for n in ("x", "kept", "start"))
    y = kept * (np.float32(1) - start) + x
    total.output("y", y)
    total.output("next", y + np.float32(0))
    for name, net, config in (("twice", twice, ""), ("total", total, SEQUENCES)):
        (root / name / "1").mkdir(parents=True)
        vt.build(net, device="cpu", opt_level=0).save(root / name / "1" / "model.vt")
        (root / name / "config.pbtxt").write_text(config)
    (root / "crashing" / "1").mkdir(parents=True)
    (root / "crashing" / "1" / "model.py").write_text(CRASHING)
    (root / "crashing" / "config.pbtxt").write_text(PYTHON)


class Soak:
    """Counts what happened; `over` ends all threads."""

    def __init__(self, ports: dict[str, int], pause_s: float) -> None:
        self.ports, self.pause_s = ports, pause_s
        self.over = threading.Event()
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self._lock = threading.Lock()

    def count(self, what: str, detail: str = "") -> None:
        with self._lock:
            self.counts[what] += 1
            if detail and len(self.problems) < 20:
                self.problems.append(f"{what}: {detail}")

    def client(self, kind: str) -> Any:
        module = {"http": http_client, "grpc": grpc_client}[kind]
        options = {"network_timeout": 30.0} if kind == "http" else {}
        return module, module.InferenceServerClient(f"127.0.0.1:{self.ports[kind]}", **options)

    def ask(self, module: Any, client: Any, model: str, x: np.ndarray, **options: Any) -> Any:
        given = module.InferInput("x", list(x.shape), "FP32")
        given.set_data_from_numpy(x)
        if module is grpc_client:
            options["client_timeout"] = 30.0
        return client.infer(model, [given], **options)

    def rows(self, kind: str, model: str, seed: int, crash_share: float = 0.0) -> None:
        rng = np.random.default_rng(seed)
        module, client = self.client(kind)
        for i in itertools.count():
            if self.over.wait(self.pause_s):
                return
            x = rng.random((int(rng.integers(1, 4)), 4), dtype=np.float32)
            crashes = rng.random() < crash_share
            try:
                got = self.ask(module, client, model, -1 - x if crashes else x, request_id=f"{seed}-{i}")
            except InferenceServerException as exc:
                expected = "died" in exc.message() and model == "crashing"
                self.count("told of the crash" if expected else "lost", "" if expected else exc.message())
                continue
            except Exception as exc:
                self.count("lost", repr(exc))
                module, client = self.client(kind)
                continue
            answer = got.get_response()
            own = answer["id"] if isinstance(answer, dict) else answer.id
            right = np.array_equal(got.as_numpy("y"), 2 * x) and own == f"{seed}-{i}" and not crashes
            self.count(f"right over {kind}" if right else "wrong", "" if right else f"{model} {kind} {own}")

    def sequences(self, kind: str, seed: int) -> None:
        """Reloads may end a sequence, which is then told so; what is answered must be the running total."""
        rng = random.Random(seed)
        module, client = self.client(kind)
        for number in itertools.count(1):
            total, length = 0, rng.randint(1, 12)
            for i in range(length):
                if self.over.wait(self.pause_s):
                    return
                value = rng.randint(1, 9)
                total += value
                try:
                    got = self.ask(module, client, "total", np.full((1, 1), value, np.float32),
                                   sequence_id=seed * 1_000_000 + number, sequence_start=i == 0,
                                   sequence_end=i == length - 1)  # fmt: skip
                except InferenceServerException as exc:
                    told = "START flag" in exc.message()
                    self.count("sequence ended by a reload" if told else "lost", "" if told else exc.message())
                    break
                right = float(got.as_numpy("y")[0, 0]) == total
                self.count("right in sequences" if right else "wrong", "" if right else f"sequence {number} step {i}")

    def reloads(self) -> None:
        _, client = self.client("http")
        while not self.over.wait(5):
            for model in ("twice", "crashing", "total"):
                try:
                    client.load_model(model)
                    self.count("reloads")
                except InferenceServerException as exc:
                    self.count("failed reloads", exc.message())

    def hang_ups(self) -> None:
        body = json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]})
        rng = random.Random(0)
        while not self.over.wait(0.05):
            with socket.create_connection(("127.0.0.1", self.ports["http"])) as raw:
                model = rng.choice(["twice", "crashing"])
                text = f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n{body}"
                raw.sendall(text.encode()[: rng.randint(1, len(text))])
                self.count("hang-ups")


def resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--pause-ms", type=float, default=8.0, help="of every client, between its requests")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_repository(Path(folder))
        free = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
        process, addresses = started([folder, *free, "--model-control-mode", "explicit", "--load-model", "*"])
        ports = addresses["ports"]
        soak = Soak(ports, args.pause_ms / 1e3)
        threads = [
            *(threading.Thread(target=soak.rows, args=(kind, "twice", i)) for i, kind in enumerate(["http", "grpc", "http"])),
            *(threading.Thread(target=soak.rows, args=(kind, "crashing", 10 + i, 0.01)) for i, kind in enumerate(["http", "grpc"])),
            *(threading.Thread(target=soak.sequences, args=(kind, 20 + i)) for i, kind in enumerate(["http", "grpc"])),
            threading.Thread(target=soak.reloads), threading.Thread(target=soak.hang_ups),
        ]  # fmt: skip
        for thread in threads:
            thread.start()
        seconds = args.minutes * 60
        time.sleep(seconds / 10)
        first = resident_mib(process.pid)
        time.sleep(seconds * 0.9)
        last = resident_mib(process.pid)
        soak.over.set()
        for thread in threads:
            thread.join(60)
        process.terminate()
        code = process.wait(60)
    results = {
        "minutes": args.minutes, **soak.counts, "lost": soak.counts["lost"], "wrong": soak.counts["wrong"],
        "rss_first_mib": first, "rss_last_mib": last, "rss_growth_percent": 100 * (last - first) / first,
        "exit_code": code, "problems": soak.problems,
    }  # fmt: skip
    print(json.dumps(results, indent=1))
    print(save("soak", results))


if __name__ == "__main__":
    main()
