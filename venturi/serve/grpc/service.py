"""GRPCInferenceService and the health service, on grpcio's thread pool: a thread a request in progress."""

from __future__ import annotations

import asyncio
import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import orjson
from google.protobuf.json_format import ParseDict
from tritonclient.grpc import model_config_pb2, service_pb2_grpc
from tritonclient.grpc import service_pb2 as pb

from venturi.core.log import logger
from venturi.serve.core import Core
from venturi.serve.errors import ServeError, invalid, unavailable, unsupported
from venturi.serve.grpc.codec import decode_infer, encode_infer
from venturi.serve.request import InferRequest
from venturi.serve.schedulers.driver import Result
from venturi.serve.served import ServedVersion
from venturi.serve.shared_memory import Regions

Context = Any
MAX_THREADS = 128
MAX_STREAM_BACKLOG = 256
_MAX_MESSAGE = (1 << 31) - 1
_LOAD_TIMEOUT_S = 3600.0


def _answers(method: Callable[[Any, Any, Context], Any]) -> Callable[[Any, Any, Context], Any]:
    """ServeErrors become statuses; anything else is logged and becomes INTERNAL."""

    @functools.wraps(method)
    def wrapped(self: Any, request: Any, context: Context) -> Any:
        try:
            return method(self, request, context)
        except ServeError as exc:
            code, text = getattr(grpc.StatusCode, exc.status.grpc), exc.message
        except Exception as exc:
            logger.exception("a gRPC request failed")
            code, text = grpc.StatusCode.INTERNAL, f"{type(exc).__name__}: {exc}"
        context.set_code(code)
        context.set_details(text)
        return None

    return wrapped


class Waiter:
    """One answer, handed from the thread that has it to the one that waits."""

    def __init__(self, served: ServedVersion, request: InferRequest, regions: Regions) -> None:
        self._served = served
        self._regions = regions
        self._request = request
        self._ready = threading.Lock()
        self._ready.acquire()
        self._result: Result | None = None
        served.submit(request, self._done)

    @property
    def is_done(self) -> bool:
        return self._result is not None

    def wait(self) -> Any:
        """The response as a message. Raises the ServeError that it failed with."""
        self._ready.acquire()
        if self._result is None or isinstance(self._result, ServeError):
            raise self._result or unavailable("no answer")
        served = self._served
        return encode_infer(self._result, self._request, served.signature, served.version, self._regions)

    def cancel(self) -> None:
        self._served.driver.cancel(self._request)

    def _done(self, result: Result) -> None:
        self._result = result
        self._ready.release()


Pending = tuple[str, Waiter | ServeError]


class InferenceService(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """One method a remote procedure. `loop` is where models are loaded and unloaded."""

    def __init__(self, core: Core, loop: asyncio.AbstractEventLoop) -> None:
        self._core = core
        self._loop = loop

    @_answers
    def ServerLive(self, request: Any, context: Context) -> Any:
        return pb.ServerLiveResponse(live=not self._core.exiting)

    @_answers
    def ServerReady(self, request: Any, context: Context) -> Any:
        return pb.ServerReadyResponse(ready=self._core.is_ready)

    @_answers
    def ModelReady(self, request: Any, context: Context) -> Any:
        self._core.find(request.name, request.version)
        return pb.ModelReadyResponse(ready=True)

    @_answers
    def ServerMetadata(self, request: Any, context: Context) -> Any:
        return pb.ServerMetadataResponse(**self._core.metadata())

    @_answers
    def ModelMetadata(self, request: Any, context: Context) -> Any:
        return ParseDict(self._core.model_metadata(request.name, request.version), pb.ModelMetadataResponse())

    @_answers
    def ModelConfig(self, request: Any, context: Context) -> Any:
        config = model_config_pb2.ModelConfig()
        config.CopyFrom(self._core.find(request.name, request.version).config)
        return pb.ModelConfigResponse(config=config)

    @_answers
    def ModelStatistics(self, request: Any, context: Context) -> Any:
        return ParseDict(self._core.statistics(request.name, request.version), pb.ModelStatisticsResponse())

    @_answers
    def RepositoryIndex(self, request: Any, context: Context) -> Any:
        return ParseDict({"models": self._core.repository.index(request.ready)}, pb.RepositoryIndexResponse())

    @_answers
    def RepositoryModelLoad(self, request: Any, context: Context) -> Any:
        config = None
        for key, value in request.parameters.items():
            if key.startswith("file:"):
                raise unsupported(f"models cannot be uploaded ({key!r}); put them into the repository")
            if key != "config":
                raise invalid(f"unrecognized load parameter '{key}', expected 'config'")
            try:
                config = orjson.loads(value.string_param)
            except orjson.JSONDecodeError as exc:
                raise invalid(f"load parameter 'config' must be a string of JSON: {exc}") from exc
        self._on_loop(self._core.load(request.model_name, config))
        return pb.RepositoryModelLoadResponse()

    @_answers
    def RepositoryModelUnload(self, request: Any, context: Context) -> Any:
        self._on_loop(self._core.unload(request.model_name))
        return pb.RepositoryModelUnloadResponse()

    @_answers
    def SystemSharedMemoryStatus(self, request: Any, context: Context) -> Any:
        found = {r["name"]: r for r in self._core.regions.status(request.name)}
        return ParseDict({"regions": found}, pb.SystemSharedMemoryStatusResponse())

    @_answers
    def SystemSharedMemoryRegister(self, request: Any, context: Context) -> Any:
        self._core.regions.register(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    @_answers
    def SystemSharedMemoryUnregister(self, request: Any, context: Context) -> Any:
        self._core.regions.unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    @_answers
    def CudaSharedMemoryStatus(self, request: Any, context: Context) -> Any:
        return pb.CudaSharedMemoryStatusResponse()

    @_answers
    def CudaSharedMemoryUnregister(self, request: Any, context: Context) -> Any:
        return pb.CudaSharedMemoryUnregisterResponse()

    @_answers
    def ModelInfer(self, request: Any, context: Context) -> Any:
        waiter = self._start(request)
        if not waiter.is_done:
            context.add_callback(waiter.cancel)
        return waiter.wait()

    def ModelStreamInfer(self, requests: Iterator[Any], context: Context) -> Iterator[Any]:
        """Requests run as they come, answers come in the order of the requests; an error does not end the stream."""
        backlog: queue.Queue[Pending | None] = queue.Queue(MAX_STREAM_BACKLOG)
        ended = threading.Event()

        def offer(item: Pending | None) -> None:
            while not ended.is_set():
                try:
                    return backlog.put(item, timeout=0.5)
                except queue.Full:
                    continue

        def read() -> None:
            try:
                for message in requests:
                    offer(self._pending(message))
            except grpc.RpcError:
                return
            finally:
                offer(None)

        threading.Thread(target=read, name="venturi-stream", daemon=True).start()
        context.add_callback(ended.set)
        try:
            while (item := backlog.get()) is not None:
                yield _stream_answer(*item)
        finally:
            ended.set()
            while not backlog.empty():
                left = backlog.get_nowait()
                if left is not None and isinstance(left[1], Waiter):
                    left[1].cancel()

    def _pending(self, message: Any) -> Pending:
        try:
            return message.id, self._start(message)
        except ServeError as exc:
            return message.id, exc

    def _start(self, message: Any) -> Waiter:
        started = time.perf_counter_ns()
        served = self._core.find(message.model_name, message.model_version)
        request = decode_infer(message, self._core.regions)
        request.times.start = started
        return Waiter(served, request, self._core.regions)

    def _on_loop(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_LOAD_TIMEOUT_S)


def _stream_answer(request_id: str, item: Waiter | ServeError) -> Any:
    try:
        if isinstance(item, ServeError):
            raise item
        response = item.wait()
    except ServeError as exc:
        empty = pb.ModelInferResponse(id=request_id)
        return pb.ModelStreamInferResponse(error_message=exc.message, infer_response=empty)
    response.parameters["triton_final_response"].bool_param = True
    return pb.ModelStreamInferResponse(infer_response=response)


def make_server(core: Core, loop: asyncio.AbstractEventLoop) -> Any:
    """A grpc server with the services added, not yet bound to a port."""
    options = [
        ("grpc.max_send_message_length", _MAX_MESSAGE),
        ("grpc.max_receive_message_length", _MAX_MESSAGE),
        ("grpc.so_reuseport", 0),
    ]
    pool = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="venturi-grpc")
    server = grpc.server(pool, options=options)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(InferenceService(core, loop), server)
    server.add_generic_rpc_handlers((_health(core),))
    return server


def _health(core: Core) -> Any:
    """grpc.health.v1.Health/Check without its package: field 1 of the answer is 1 (serving) or 2."""

    def check(request: bytes, context: Context) -> bytes:
        return b"\x08\x01" if core.is_ready else b"\x08\x02"

    handler = grpc.unary_unary_rpc_method_handler(check)
    return grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": handler})
