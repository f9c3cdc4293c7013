"""GRPCInferenceService and the health service on grpc.aio."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import orjson
from google.protobuf.json_format import ParseDict
from tritonclient.grpc import model_config_pb2, service_pb2_grpc
from tritonclient.grpc import service_pb2 as pb

from venturi.core.log import logger
from venturi.serve.core import Core
from venturi.serve.errors import ServeError, invalid
from venturi.serve.grpc.exchange import StreamExchange, begin
from venturi.serve.grpc.gate import GateInterceptor
from venturi.serve.grpc.messages import Handlers, Malformed
from venturi.serve.grpc.settings import GrpcSettings
from venturi.serve.grpc.streams import AnswerStream, StreamRefused
from venturi.serve.security import Gate
from venturi.serve.shared_memory import Kind

Context = Any


def _answers(method: Callable[[Any, Any, Context], Awaitable[Any]]) -> Callable[[Any, Any, Context], Awaitable[Any]]:
    """ServeErrors become statuses; anything else is logged and becomes INTERNAL."""

    @functools.wraps(method)
    async def wrapped(self: Any, request: Any, context: Context) -> Any:
        if isinstance(request, Malformed):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, request.reason)
        try:
            self.count(method.__name__, context)
            return await method(self, request, context)
        except ServeError as exc:
            await context.abort(getattr(grpc.StatusCode, exc.status.grpc), exc.message)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception as exc:
            logger.exception("a gRPC request failed")
            await context.abort(grpc.StatusCode.INTERNAL, f"{type(exc).__name__}: {exc}")

    return wrapped


class InferenceService(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """One method a remote procedure."""

    def __init__(self, core: Core, gate: Gate) -> None:
        self._core, self._gate = core, gate

    @_answers
    async def ServerLive(self, request: Any, context: Context) -> Any:
        return pb.ServerLiveResponse(live=not self._core.exiting)

    @_answers
    async def ServerReady(self, request: Any, context: Context) -> Any:
        return pb.ServerReadyResponse(ready=self._core.is_ready)

    @_answers
    async def ModelReady(self, request: Any, context: Context) -> Any:
        self._core.find(request.name, request.version)
        return pb.ModelReadyResponse(ready=True)

    @_answers
    async def ServerMetadata(self, request: Any, context: Context) -> Any:
        return pb.ServerMetadataResponse(**self._core.metadata())

    @_answers
    async def ModelMetadata(self, request: Any, context: Context) -> Any:
        return ParseDict(self._core.model_metadata(request.name, request.version), pb.ModelMetadataResponse())

    @_answers
    async def ModelConfig(self, request: Any, context: Context) -> Any:
        config = model_config_pb2.ModelConfig()
        config.CopyFrom(self._core.find(request.name, request.version).config)
        return pb.ModelConfigResponse(config=config)

    @_answers
    async def ModelStatistics(self, request: Any, context: Context) -> Any:
        return ParseDict(self._core.statistics(request.name, request.version), pb.ModelStatisticsResponse())

    @_answers
    async def RepositoryIndex(self, request: Any, context: Context) -> Any:
        return ParseDict({"models": self._core.repository.index(request.ready)}, pb.RepositoryIndexResponse())

    @_answers
    async def RepositoryModelLoad(self, request: Any, context: Context) -> Any:
        config, files = None, {}
        for key, value in request.parameters.items():
            if key.startswith("file:"):
                files[key.removeprefix("file:")] = value.bytes_param
                continue
            if key != "config":
                raise invalid(f"unrecognized load parameter '{key}', expected 'config' or 'file:<version>/<name>'")
            try:
                config = orjson.loads(value.string_param)
            except orjson.JSONDecodeError as exc:
                raise invalid(f"load parameter 'config' must be a string of JSON: {exc}") from exc
        await self._core.load(request.model_name, config, files)
        return pb.RepositoryModelLoadResponse()

    @_answers
    async def RepositoryModelUnload(self, request: Any, context: Context) -> Any:
        dependents = request.parameters["unload_dependents"].bool_param if request.parameters else False
        await self._core.unload(request.model_name, dependents=dependents)
        return pb.RepositoryModelUnloadResponse()

    @_answers
    async def TraceSetting(self, request: Any, context: Context) -> Any:
        given = {k: list(v.value) if k == "trace_level" else (v.value[0] if v.value else None)
                 for k, v in request.settings.items()}  # fmt: skip
        found = self._core.trace_settings(request.model_name, given)
        values = {k: {"value": v if isinstance(v, list) else [v]} for k, v in found.items()}
        return ParseDict({"settings": values}, pb.TraceSettingResponse())

    @_answers
    async def LogSettings(self, request: Any, context: Context) -> Any:
        given = {k: getattr(v, v.WhichOneof("parameter_choice") or "bool_param") for k, v in request.settings.items()}
        self._core.log.update(given)
        kinds = {bool: "bool_param", int: "uint32_param", str: "string_param"}
        values = {k: {kinds[type(v)]: v} for k, v in self._core.log.to_json().items()}
        return ParseDict({"settings": values}, pb.LogSettingsResponse())

    @_answers
    async def SystemSharedMemoryStatus(self, request: Any, context: Context) -> Any:
        found = {r["name"]: r for r in self._core.regions.status(Kind.SYSTEM, request.name)}
        return ParseDict({"regions": found}, pb.SystemSharedMemoryStatusResponse())

    @_answers
    async def SystemSharedMemoryRegister(self, request: Any, context: Context) -> Any:
        self._core.regions.register(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    @_answers
    async def SystemSharedMemoryUnregister(self, request: Any, context: Context) -> Any:
        self._core.regions.unregister(Kind.SYSTEM, request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    @_answers
    async def CudaSharedMemoryStatus(self, request: Any, context: Context) -> Any:
        found = {r["name"]: r for r in self._core.regions.status(Kind.CUDA, request.name)}
        return ParseDict({"regions": found}, pb.CudaSharedMemoryStatusResponse())

    @_answers
    async def CudaSharedMemoryRegister(self, request: Any, context: Context) -> Any:
        self._core.regions.register_cuda(request.name, request.raw_handle, request.device_id, request.byte_size)
        return pb.CudaSharedMemoryRegisterResponse()

    @_answers
    async def CudaSharedMemoryUnregister(self, request: Any, context: Context) -> Any:
        self._core.regions.unregister(Kind.CUDA, request.name)
        return pb.CudaSharedMemoryUnregisterResponse()

    @_answers
    async def ModelInfer(self, message: Any, context: Context) -> Any:
        await self._core.prepare(message.model_name)
        pending = begin(self._core, message, self._trace_parent(context))
        return pending.encode(await pending.future)

    async def ModelStreamInfer(self, messages: AsyncIterator[Any], context: Context) -> None:
        """Requests run at once. Answers come in the order of the requests, those of decoupled models as they come; an
        error does not end the stream, unless the client's metadata has triton_grpc_error."""
        strict = any(k == "triton_grpc_error" and v == "true" for k, v in context.invocation_metadata() or ())

        async def write(answer: Any) -> None:
            if not isinstance(answer, ServeError):
                await context.write(pb.ModelStreamInferResponse(infer_response=answer))
                return
            if strict:
                raise StreamRefused(answer)
            failed = pb.ModelInferResponse(id=answer.where)
            await context.write(pb.ModelStreamInferResponse(error_message=answer.message, infer_response=failed))

        count = functools.partial(self.count, "ModelStreamInfer", context)
        exchange = StreamExchange(self._core, self._trace_parent(context), count)
        refused = await AnswerStream(exchange, write).run(messages)
        if refused is not None:
            await context.abort(getattr(grpc.StatusCode, refused.status.grpc), refused.message)

    def count(self, method: str, context: Context) -> None:
        """One request more of the client. Raises ServeError."""
        if self._gate.quota is not None:
            metadata = {k: v for k, v in context.invocation_metadata() or () if isinstance(v, str)}
            self._gate.count_grpc(method, metadata, context.peer())

    def _trace_parent(self, context: Context) -> str:
        if not self._core.tracer.is_on:
            return ""
        return next((str(v) for k, v in context.invocation_metadata() or () if k == "traceparent"), "")


def make_server(core: Core, gate: Gate, settings: GrpcSettings) -> Any:
    """A grpc.aio server with the services added, not yet bound to a port."""
    server = grpc.aio.server(options=settings.options(), interceptors=[] if gate.is_open else [GateInterceptor(gate)])
    handlers = Handlers()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(InferenceService(core, gate), handlers)
    assert handlers.made, "tritonclient's generated code registers its methods by name"
    server.add_generic_rpc_handlers((*handlers.made, _health(core)))
    return server


def _health(core: Core) -> Any:
    """grpc.health.v1.Health/Check without its package: field 1 of the answer is 1 (serving) or 2."""

    async def check(request: bytes, context: Context) -> bytes:
        return b"\x08\x01" if core.is_ready else b"\x08\x02"

    handler = grpc.unary_unary_rpc_method_handler(check)
    return grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": handler})
