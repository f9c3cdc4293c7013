"""What load is put on: a KServe v2 server over HTTP or gRPC, or an engine in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from venturi.core.errors import DeviceError, RequestError
from venturi.serve.request import Tensor
from venturi.serve.tensors import BYTES, DATATYPES, ENGINE_TYPES, to_bytes

Call = Callable[[], Awaitable[None]]


class Target(Protocol):
    """`connect` gives one client's way to send the request and wait for its answer; the call raises RequestError."""

    async def connect(self) -> Call: ...

    async def statistics(self) -> dict[str, Any] | None:
        """The server's model_stat; None where there is none."""

    async def close(self) -> None: ...


@dataclass(frozen=True)
class PortShape:
    """An input of the model as its metadata has it."""

    name: str
    datatype: str
    shape: tuple[int, ...]


def make_inputs(
    ports: list[PortShape], rows: int, batches: bool, shapes: Mapping[str, tuple[int, ...]], seed: int = 0
) -> list[Tensor]:
    """Random data; free dimensions come from `shapes` (without the batch axis). Raises RequestError."""
    rng = np.random.default_rng(seed)
    unknown = sorted(set(shapes) - {p.name for p in ports})
    if unknown:
        raise RequestError(f"--shape names {unknown}, the model's inputs are {[p.name for p in ports]}")
    made = []
    for port in ports:
        own = port.shape[1:] if batches else port.shape
        shape = shapes.get(port.name, own)
        fits = len(shape) == len(own) and all(want in (-1, got) for want, got in zip(own, shape))
        if not fits or any(d < 0 for d in shape):
            raise RequestError(
                f"input '{port.name}' has shape {list(own)}; give its sizes with --shape {port.name}:..."
            )
        full = (rows, *shape) if batches else tuple(shape)
        made.append(Tensor(port.name, port.datatype, _random(rng, port.datatype, full)))
    return made


def _random(rng: np.random.Generator, datatype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    if datatype == BYTES:
        out = np.empty(int(np.prod(shape)), dtype=object)
        out[:] = [f"{v:08x}".encode() for v in rng.integers(0, 1 << 31, out.size)]
        return out.reshape(shape)
    dtype = DATATYPES[datatype]
    if dtype.kind in "iu":
        return rng.integers(0, 8, shape).astype(dtype)
    return (rng.random(shape) < 0.5) if datatype == "BOOL" else rng.random(shape).astype(dtype)


class HttpTarget:
    """HTTP/1.1 with one kept connection a client; tensors go as bytes, both ways."""

    def __init__(self, address: str, model: str, version: str = "") -> None:
        host, _, port = address.removeprefix("http://").partition(":")
        self._host, self._port = host, int(port or 8000)
        self._path = f"/v2/models/{model}" + (f"/versions/{version}" if version else "")
        self._request = b""
        self._writers: list[asyncio.StreamWriter] = []

    async def describe(self) -> tuple[list[PortShape], int]:
        """The inputs and max_batch_size."""
        config, metadata = await self.get(f"{self._path}/config"), await self.get(self._path)
        ports = [PortShape(p["name"], p["datatype"], tuple(int(d) for d in p["shape"])) for p in metadata["inputs"]]
        return ports, int(config.get("max_batch_size", 0))

    def prepare(self, inputs: list[Tensor]) -> None:
        blobs = [to_bytes(t.data, t.datatype) for t in inputs]
        described = [
            {"name": t.name, "datatype": t.datatype, "shape": t.shape, "parameters": {"binary_data_size": len(b)}}
            for t, b in zip(inputs, blobs)
        ]
        head = json.dumps({"inputs": described, "parameters": {"binary_data_output": True}}).encode()
        body = b"".join([head, *blobs])
        lines = (
            f"POST {self._path}/infer HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
            f"Content-Type: application/octet-stream\r\nInference-Header-Content-Length: {len(head)}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self._request = lines.encode() + body

    async def connect(self) -> Call:
        reader, writer = await self._open()

        async def call() -> None:
            writer.write(self._request)
            status, body = await _answer(reader)
            if status != 200:
                raise RequestError(f"the server answers {status}: {body[:300].decode(errors='replace')}")

        return call

    async def statistics(self) -> dict[str, Any] | None:
        found = await self.get(f"{self._path}/stats")
        return dict(found["model_stats"][0])

    async def close(self) -> None:
        for writer in self._writers:
            writer.close()

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port)
        except OSError as exc:
            raise DeviceError(f"no server at {self._host}:{self._port}: {exc}; start one with venturi serve") from exc
        self._writers.append(writer)
        return reader, writer

    async def get(self, path: str) -> Any:
        """JSON of a path. Raises RequestError for other statuses than 200."""
        return await self._json("GET", path, b"")

    async def post(self, path: str, data: Any) -> Any:
        return await self._json("POST", path, json.dumps(data).encode())

    async def _json(self, method: str, path: str, sent: bytes) -> Any:
        reader, writer = await self._open()
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nContent-Length: {len(sent)}\r\n\r\n"
        writer.write(head.encode() + sent)
        status, body = await _answer(reader)
        if status != 200:
            raise RequestError(f"{method} {path} answers {status}: {body[:300].decode(errors='replace')}")
        return json.loads(body) if body else None


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        fields = dict(line.lower().split(b":", 1) for line in lines[1:] if b":" in line)
        body = await reader.readexactly(int(fields.get(b"content-length", b"0")))
    except (asyncio.IncompleteReadError, ConnectionError, asyncio.LimitOverrunError) as exc:
        raise RequestError(f"the server closed the connection: {exc}") from exc
    return int(lines[0].split()[1]), body


class GrpcTarget:
    """Unary ModelInfer; one channel for all clients."""

    def __init__(self, address: str, model: str, version: str = "") -> None:
        import grpc
        from tritonclient.grpc import service_pb2, service_pb2_grpc

        self._pb, self._error = service_pb2, grpc.aio.AioRpcError
        self._channel = grpc.aio.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)])
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._model, self._version, self._address = model, version, address
        self._message: Any = None

    async def describe(self) -> tuple[list[PortShape], int]:
        named = {"name": self._model, "version": self._version}
        try:
            metadata = await self._stub.ModelMetadata(self._pb.ModelMetadataRequest(**named))
            config = await self._stub.ModelConfig(self._pb.ModelConfigRequest(**named))
        except self._error as exc:
            raise RequestError(f"the server at {self._address} answers {exc.code().name}: {exc.details()}") from exc
        ports = [PortShape(p.name, p.datatype, tuple(p.shape)) for p in metadata.inputs]
        return ports, config.config.max_batch_size

    def prepare(self, inputs: list[Tensor]) -> None:
        self._message = self._pb.ModelInferRequest(model_name=self._model, model_version=self._version)
        for tensor in inputs:
            self._message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
            self._message.raw_input_contents.append(to_bytes(tensor.data, tensor.datatype))

    async def connect(self) -> Call:
        async def call() -> None:
            try:
                await self._stub.ModelInfer(self._message)
            except self._error as exc:
                raise RequestError(f"the server answers {exc.code().name}: {exc.details()}") from exc

        return call

    async def statistics(self) -> dict[str, Any] | None:
        from google.protobuf.json_format import MessageToDict

        asked = self._pb.ModelStatisticsRequest(name=self._model, version=self._version)
        found = MessageToDict(
            await self._stub.ModelStatistics(asked), preserving_proto_field_name=True,
            always_print_fields_with_no_presence=True,
        )  # fmt: skip
        stats = dict(found["model_stats"][0])
        for phase in ("queue", "compute_input", "compute_infer", "compute_output"):
            stats["inference_stats"].setdefault(phase, {"count": 0, "ns": 0})
        return stats

    async def close(self) -> None:
        await self._channel.close()


class EngineTarget:
    """An engine file run in this process, a thread a client: what the server's overhead is measured against."""

    def __init__(self, path: Path) -> None:
        import venturi as vt

        self._engine = vt.load(path) if path.suffix == ".vt" else vt.build(path)
        self._inputs: dict[str, Any] = {}
        self._threads = ThreadPoolExecutor(1024)

    async def describe(self) -> tuple[list[PortShape], int]:
        batches = all(
            s.shape and not isinstance(s.shape[0], int) for s in [*self._engine.inputs, *self._engine.outputs]
        )
        ports = [
            PortShape(s.name, ENGINE_TYPES[s.dtype], tuple(d if isinstance(d, int) else -1 for d in s.shape or ()))
            for s in self._engine.inputs
        ]
        return ports, (1 << 30 if batches else 0)

    def prepare(self, inputs: list[Tensor]) -> None:
        self._inputs = {t.name: t.data for t in inputs}

    async def connect(self) -> Call:
        loop = asyncio.get_running_loop()

        async def call() -> None:
            await loop.run_in_executor(self._threads, self._engine.run, self._inputs)

        return call

    async def statistics(self) -> dict[str, Any] | None:
        return None

    async def close(self) -> None:
        self._threads.shutdown()
        self._engine.close()
