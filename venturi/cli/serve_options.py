"""The options of `venturi serve`. Where Triton's server has the same, the name is Triton's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand


def _option(text: str, *names: str, **bounds: Any) -> Any:
    return typer.Option(*names, help=text, **bounds)


Repositories = Annotated[
    list[Path] | None, typer.Argument(metavar="REPO", help="Repository folders, .onnx or .vt files.")
]
ModelRepository = Annotated[list[Path] | None, _option("The same as REPO.")]
Host = Annotated[str, _option("Address to listen on.")]
HttpAddress = Annotated[str | None, _option("Address for HTTP alone; --host without.")]
GrpcAddress = Annotated[str | None, _option("Address for gRPC alone; --host without.")]
MetricsAddress = Annotated[str | None, _option("Address for metrics alone; --host without.")]
HttpPort = Annotated[int, _option("KServe v2 over HTTP; 0 takes a free port.")]
GrpcPort = Annotated[int, _option("KServe v2 over gRPC; 0 takes a free port.")]
MetricsPort = Annotated[int, _option("Prometheus metrics; 0 takes a free port.")]
AllowHttp = Annotated[bool, _option("Listen for HTTP.")]
AllowGrpc = Annotated[bool, _option("Listen for gRPC.")]
AllowMetrics = Annotated[bool, _option("Listen for metrics.")]
ControlMode = Annotated[str, _option("none, poll or explicit.")]
LoadModel = Annotated[list[str] | None, _option("Loaded at the start in explicit mode; * all.")]
LoadRetries = Annotated[int, _option("Further attempts to load a model.", min=0)]
PollSeconds = Annotated[float, _option("Seconds between polls.", min=0.1)]
ServerId = Annotated[str, _option("Name in the server metadata.", "--id")]
ExitOnError = Annotated[bool, _option("Stop when a model cannot be loaded at the start.")]
StrictReadiness = Annotated[bool, _option("Ready only when every model is; without, when the server answers.")]
ExitTimeout = Annotated[float, _option("Longest wait for accepted requests.", min=0)]
AsWritten = Annotated[bool, _option("Use configurations as they are written.", "--disable-auto-complete-config")]
DefaultMaxBatch = Annotated[int, _option("For models whose batch axis is free.", min=0)]
MaxInput = Annotated[int, _option("Bytes of JSON or decompressed body.", min=1)]
AllowShm = Annotated[bool, _option("Let clients register this machine's shared memory.")]
CacheConfig = Annotated[list[str] | None, _option("Response cache: local,size=BYTES, or redis,host=HOST; repeatable.")]
OnDemand = Annotated[bool, _option("Load models when first asked for.", "--load-on-demand")]
MemoryBudget = Annotated[int, _option("Bytes of model files in service with --load-on-demand; 0: any.", min=0)]
RateLimit = Annotated[str, _option("off, or execution_count: instances share resources.")]
RateLimitResource = Annotated[list[str] | None, _option("NAME:COUNT[:DEVICE]; repeatable.")]
ApiKeyFile = Annotated[Path | None, _option("Keys, one a line: requests then need one, except for health.")]
MaxRequestRate = Annotated[
    float, _option("Requests a second of one client, by its key or address; 0: any number.", min=0)
]
RestrictedHttp = Annotated[list[str] | None, _option("API[,API...]:KEY=VALUE; repeatable.")]
RestrictedGrpc = Annotated[list[str] | None, _option("API[,API...]:KEY=VALUE; repeatable.")]
TlsCert = Annotated[Path | None, _option("PEM certificate: HTTP, gRPC and metrics over TLS.")]
TlsKey = Annotated[Path | None, _option("PEM key of the certificate.")]
TlsClientCa = Annotated[Path | None, _option("PEM: clients must show a certificate of it.")]
TraceConfig = Annotated[
    list[str] | None,
    _option("level=TIMESTAMPS, rate=N, count=N, triton,file=PATH, mode=opentelemetry, ...; repeatable."),
]
LogVerbose = Annotated[int, _option("Above 0: debug messages too.", min=0)]
LogInfo = Annotated[bool, _option("Log what happens.")]
LogWarning = Annotated[bool, _option("Log warnings.")]
LogError = Annotated[bool, _option("Log errors.")]
LogFile = Annotated[Path | None, _option("Append the log to this file; standard error without.")]
LogFormat = Annotated[str, _option("default, ISO8601 or json.")]
KeepaliveTime = Annotated[int, _option("Milliseconds of silence until the server pings a gRPC client.", min=1)]
KeepaliveTimeout = Annotated[int, _option("Milliseconds that a ping's answer may take.", min=1)]
KeepaliveIdle = Annotated[bool, _option("Ping connections without calls too.")]
MaxAge = Annotated[int, _option("Milliseconds a gRPC connection may live; 0: any.", min=0)]
MaxAgeGrace = Annotated[int, _option("Milliseconds more for calls in flight; 0: any.", min=0)]
Compression = Annotated[str, _option("Of gRPC answers: none, low, medium or high.")]
AsJson = Annotated[bool, _option("Print the addresses as JSON when ready.", "--json")]

_TRUE, _FALSE = ("true", "1", "on"), ("false", "0", "off")


class ServeCommand(TyperCommand):
    """Takes --flag=true and --flag=false, as Triton's server is started, for --flag and --no-flag."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        flags = {name: p for p in self.params if getattr(p, "is_flag", False) for name in p.opts}
        return super().parse_args(ctx, [_without_value(arg, flags) for arg in args])


def _without_value(arg: str, flags: dict[str, Any]) -> str:
    name, equals, value = arg.partition("=")
    if not equals or name not in flags:
        return arg
    if value.lower() in _TRUE:
        return name
    off = flags[name].secondary_opts
    return off[0] if value.lower() in _FALSE and off else arg
