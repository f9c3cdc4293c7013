"""`venturi serve`: a repository of models, or one model file, behind the KServe v2 protocol."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import typer

from venturi.cli import serve_options as options
from venturi.cli.output import console, emit_json, table
from venturi.core.errors import ModelError


def serve(
    repositories: options.Repositories = None,
    model_repository: options.ModelRepository = None,
    host: options.Host = "0.0.0.0",
    http_address: options.HttpAddress = None,
    grpc_address: options.GrpcAddress = None,
    metrics_address: options.MetricsAddress = None,
    http_port: options.HttpPort = 8000,
    grpc_port: options.GrpcPort = 8001,
    metrics_port: options.MetricsPort = 8002,
    allow_http: options.AllowHttp = True,
    allow_grpc: options.AllowGrpc = True,
    allow_metrics: options.AllowMetrics = True,
    model_control_mode: options.ControlMode = "none",
    load_model: options.LoadModel = None,
    model_load_retry_count: options.LoadRetries = 0,
    repository_poll_secs: options.PollSeconds = 15.0,
    server_id: options.ServerId = "venturi",
    exit_on_error: options.ExitOnError = True,
    strict_readiness: options.StrictReadiness = True,
    exit_timeout_secs: options.ExitTimeout = 30.0,
    disable_auto_complete_config: options.AsWritten = False,
    default_max_batch_size: options.DefaultMaxBatch = 4,
    http_max_input_size: options.MaxInput = 64 << 20,
    allow_client_shm: options.AllowShm = False,
    cache_config: options.CacheConfig = None,
    load_on_demand: options.OnDemand = False,
    model_memory_budget: options.MemoryBudget = 0,
    rate_limit: options.RateLimit = "off",
    rate_limit_resource: options.RateLimitResource = None,
    api_key_file: options.ApiKeyFile = None,
    max_request_rate: options.MaxRequestRate = 0.0,
    http_restricted_api: options.RestrictedHttp = None,
    grpc_restricted_protocol: options.RestrictedGrpc = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    tls_client_ca: options.TlsClientCa = None,
    grpc_keepalive_time: options.KeepaliveTime = 7_200_000,
    grpc_keepalive_timeout: options.KeepaliveTimeout = 20_000,
    grpc_keepalive_permit_without_calls: options.KeepaliveIdle = False,
    grpc_max_connection_age: options.MaxAge = 0,
    grpc_max_connection_age_grace: options.MaxAgeGrace = 0,
    grpc_infer_response_compression_level: options.Compression = "none",
    trace_config: options.TraceConfig = None,
    log_verbose: options.LogVerbose = 0,
    log_info: options.LogInfo = True,
    log_warning: options.LogWarning = True,
    log_error: options.LogError = True,
    log_file: options.LogFile = None,
    log_format: options.LogFormat = "default",
    as_json: options.AsJson = False,
) -> None:
    """Serve models to KServe v2 clients over HTTP and gRPC until SIGINT or SIGTERM."""
    run_until_signal = _server()
    from venturi.serve.app import ServeConfig
    from venturi.serve.cache_settings import parse_cache_config
    from venturi.serve.grpc.settings import GrpcSettings
    from venturi.serve.logs import LogSettings
    from venturi.serve.repository import Mode
    from venturi.serve.schedulers.rate_limit import parse_rate_limit
    from venturi.serve.tracing import parse_trace_config

    roots = [*(repositories or []), *(model_repository or [])]
    _check(roots, model_control_mode, log_format)
    hosts = {"http": http_address, "grpc": grpc_address, "metrics": metrics_address}
    config = ServeConfig(
        tuple(roots), host,
        http_port if allow_http else None, grpc_port if allow_grpc else None, metrics_port if allow_metrics else None,
        Mode(model_control_mode), tuple(load_model or ()), repository_poll_secs, server_id, exit_on_error,
        exit_timeout_secs, not disable_auto_complete_config, default_max_batch_size, http_max_input_size,
        allow_client_shm, parse_cache_config(cache_config or []),
        _gate(api_key_file, http_restricted_api or [], grpc_restricted_protocol or [], max_request_rate),
        _tls(tls_cert, tls_key, tls_client_ca), parse_trace_config(trace_config or []),
        LogSettings(str(log_file or ""), log_info, log_warning, log_error, log_verbose, log_format),
        parse_rate_limit(rate_limit, rate_limit_resource or []), load_on_demand, model_memory_budget,
        {name: given for name, given in hosts.items() if given}, strict_readiness, model_load_retry_count,
        GrpcSettings(
            grpc_keepalive_time, grpc_keepalive_timeout, grpc_keepalive_permit_without_calls, grpc_max_connection_age,
            grpc_max_connection_age_grace, grpc_infer_response_compression_level,
        ),
    )  # fmt: skip
    if not _run(run_until_signal(config, lambda running: _announce(running, config, as_json))):
        console.print(f"accepted requests did not finish within {exit_timeout_secs:g} s")
        raise typer.Exit(1)


def _server() -> Any:
    try:
        from venturi.serve.app import run_until_signal
    except ImportError as exc:
        raise ModelError(f"the server needs {exc.name}: pip install 'venturi[serve]'") from exc
    return run_until_signal


def _check(roots: list[Path], mode: str, log_format: str) -> None:
    from venturi.serve.logs import FORMATS
    from venturi.serve.repository import Mode

    if not roots:
        raise ModelError("no model repository given; expected a folder, an .onnx or a .vt file")
    if mode not in [m.value for m in Mode]:
        raise ModelError(f"--model-control-mode must be none, poll or explicit, got {mode!r}")
    if log_format not in FORMATS:
        raise ModelError(f"--log-format must be one of {', '.join(FORMATS)}, got {log_format!r}")


def _gate(key_file: Path | None, http: list[str], grpc: list[str], per_s: float) -> Any:
    from venturi.serve.quota import Quota
    from venturi.serve.security import Gate, parse_restriction, read_keys

    keys = read_keys(key_file) if key_file else ()
    over_http, over_grpc = (tuple(parse_restriction(r) for r in given) for given in (http, grpc))
    return Gate(keys, over_http, over_grpc, Quota(per_s) if per_s else None)


def _tls(certificate: Path | None, key: Path | None, client_ca: Path | None) -> Any:
    from venturi.serve.tls import Tls

    if certificate is None or key is None:
        if certificate or key or client_ca:
            raise ModelError("TLS needs both --tls-cert and --tls-key")
        return None
    return Tls(certificate, key, client_ca)


def _run(main: Any) -> bool:
    """On uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        return bool(asyncio.run(main))
    return bool(uvloop.run(main))


def _announce(running: Any, config: Any, as_json: bool) -> None:
    index = running.core.repository.index()
    page = _dashboard(config.address("http"), running.ports.get("http", 0), config.tls is not None)
    if as_json:
        emit_json({"host": config.host, "ports": running.ports, "dashboard": page, "models": index})
        return
    rows = [[m["name"], m.get("version", ""), m.get("state", ""), m.get("reason", "")] for m in index]
    console.print(table("models", ["model", "version", "state", "reason"], rows))
    for name, port in running.ports.items():
        console.print(f"{name:8} {config.address(name)}:{port}", highlight=False)
    if page:
        console.print(f"dashboard {page}", highlight=False)


def _dashboard(host: str, port: int, tls: bool) -> str | None:
    """Where a browser on this machine finds the page; None without HTTP."""
    if not port:
        return None
    name = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{'https' if tls else 'http'}://{name}:{port}/"
