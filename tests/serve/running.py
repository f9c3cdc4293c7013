"""A real server on free ports in a thread of its own, and small models for it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import venturi as vt
from venturi.serve.app import Running, ServeConfig, start
from venturi.serve.repository import Mode

DIGITS = Path(__file__).resolve().parents[2] / "examples/digits/digits.onnx"


class Server:
    """`call` runs a coroutine on the server's loop and waits for it."""

    def __init__(self, config: ServeConfig) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self.running: Running = self.call(start(config), 120)
        except BaseException:
            self._loop.call_soon_threadsafe(self._loop.stop)
            raise

    def call(self, coroutine: Any, timeout: float = 60) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout)

    def url(self, kind: str) -> str:
        return f"127.0.0.1:{self.running.ports[kind]}"

    def stop(self, timeout: float = 20) -> bool:
        finished = self.call(self.running.stop(timeout), timeout + 20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        return bool(finished)


@contextmanager
def serving(*roots: Path, mode: Mode = Mode.NONE, **options: Any) -> Iterator[Server]:
    server = Server(ServeConfig(roots, "127.0.0.1", 0, 0, 0, mode, **options))
    try:
        yield server
    finally:
        server.stop()


def add_engine(root: Path, name: str, net: vt.Network, config: str = "", version: int = 1) -> Path:
    """Puts an engine of `net` under root/name/version and returns the model's folder."""
    folder = root / name / str(version)
    folder.mkdir(parents=True, exist_ok=True)
    vt.build(net, opt_level=0, device="cpu").save(folder / "model.vt")
    if config:
        (root / name / "config.pbtxt").write_text(config)
    return root / name


def scaled(factor: float, width: int | str = 4, batch: int | str = "n") -> vt.Network:
    """y = factor * x, rows of `width` floats."""
    net = vt.Network("scaled")
    x = net.input("x", (batch, width))
    net.output("y", x * np.float32(factor))
    return net


def add_sub(dtype: str) -> vt.Network:
    """sum and difference of two inputs."""
    net = vt.Network("add_sub")
    a, b = net.input("a", ("n", 3), dtype), net.input("b", ("n", 3), dtype)
    net.output("sum", a + b)
    net.output("difference", a - b)
    return net


def wait_for(condition, seconds=10):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it did not happen"
        time.sleep(0.01)
