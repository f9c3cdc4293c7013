"""`venturi serve`: a repository of models, or one model file, behind the KServe v2 protocol."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer

from venturi.cli.output import console, emit_json, table
from venturi.core.errors import ModelError


def serve(
    repositories: Annotated[
        list[Path] | None, typer.Argument(metavar="REPO", help="Repository folders, .onnx or .vt files.")
    ] = None,
    model_repository: Annotated[list[Path] | None, typer.Option(help="The same as REPO.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",
    http_port: Annotated[int, typer.Option(help="KServe v2 over HTTP; 0 takes a free port.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="KServe v2 over gRPC; 0 takes a free port.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Prometheus metrics; 0 takes a free port.")] = 8002,
    allow_http: Annotated[bool, typer.Option(help="Listen for HTTP.")] = True,
    allow_grpc: Annotated[bool, typer.Option(help="Listen for gRPC.")] = True,
    allow_metrics: Annotated[bool, typer.Option(help="Listen for metrics.")] = True,
    model_control_mode: Annotated[str, typer.Option(help="none, poll or explicit.")] = "none",
    load_model: Annotated[list[str] | None, typer.Option(help="Loaded at the start in explicit mode; * all.")] = None,
    repository_poll_secs: Annotated[float, typer.Option(min=0.1, help="Seconds between polls.")] = 15.0,
    server_id: Annotated[str, typer.Option("--id", help="Name in the server metadata.")] = "venturi",
    exit_on_error: Annotated[bool, typer.Option(help="Stop when a model cannot be loaded at the start.")] = True,
    exit_timeout_secs: Annotated[float, typer.Option(min=0, help="Longest wait for accepted requests.")] = 30.0,
    disable_auto_complete_config: Annotated[
        bool, typer.Option("--disable-auto-complete-config", help="Use configurations as they are written.")
    ] = False,
    default_max_batch_size: Annotated[int, typer.Option(min=0, help="For models whose batch axis is free.")] = 4,
    http_max_input_size: Annotated[int, typer.Option(min=1, help="Bytes of JSON or decompressed body.")] = 64 << 20,
    allow_client_shm: Annotated[bool, typer.Option(help="Let clients register this machine's shared memory.")] = False,
    cache_config: Annotated[
        list[str] | None, typer.Option(help="Response cache: local,size=BYTES, or redis,host=HOST; repeatable.")
    ] = None,
    load_on_demand: Annotated[bool, typer.Option("--load-on-demand", help="Load models when first asked for.")] = False,
    model_memory_budget: Annotated[
        int, typer.Option(min=0, help="Bytes of model files in service with --load-on-demand; 0 for no bound.")
    ] = 0,
    rate_limit: Annotated[str, typer.Option(help="off, or execution_count: instances share resources.")] = "off",
    rate_limit_resource: Annotated[list[str] | None, typer.Option(help="NAME:COUNT[:DEVICE]; repeatable.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Keys, one a line: requests then need one, except for health.")
    ] = None,
    max_request_rate: Annotated[
        float, typer.Option(min=0, help="Requests a second of one client, by its key or address; 0: any number.")
    ] = 0.0,
    http_restricted_api: Annotated[list[str] | None, typer.Option(help="API[,API...]:KEY=VALUE; repeatable.")] = None,
    grpc_restricted_protocol: Annotated[
        list[str] | None, typer.Option(help="API[,API...]:KEY=VALUE; repeatable.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate: HTTP, gRPC and metrics over TLS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM key of the certificate.")] = None,
    tls_client_ca: Annotated[Path | None, typer.Option(help="PEM: clients must show a certificate of it.")] = None,
    trace_config: Annotated[
        list[str] | None,
        typer.Option(help="level=TIMESTAMPS, rate=N, count=N, triton,file=PATH, mode=opentelemetry, ...; repeatable."),
    ] = None,
    log_verbose: Annotated[int, typer.Option(min=0, help="Above 0: debug messages too.")] = 0,
    log_info: Annotated[bool, typer.Option(help="Log what happens.")] = True,
    log_format: Annotated[str, typer.Option(help="default, ISO8601 or json.")] = "default",
    as_json: Annotated[bool, typer.Option("--json", help="Print the addresses as JSON when ready.")] = False,
) -> None:
    """Serve models to KServe v2 clients over HTTP and gRPC until SIGINT or SIGTERM."""
    try:
        from venturi.serve.app import ServeConfig, run_until_signal
    except ImportError as exc:
        raise ModelError(f"the server needs {exc.name}: pip install 'venturi[serve]'") from exc
    from venturi.serve.cache_settings import parse_cache_config
    from venturi.serve.logs import FORMATS, LogSettings
    from venturi.serve.repository import Mode
    from venturi.serve.schedulers.rate_limit import parse_rate_limit
    from venturi.serve.tracing import parse_trace_config

    roots = [*(repositories or []), *(model_repository or [])]
    if not roots:
        raise ModelError("no model repository given; expected a folder, an .onnx or a .vt file")
    if model_control_mode not in [m.value for m in Mode]:
        raise ModelError(f"--model-control-mode must be none, poll or explicit, got {model_control_mode!r}")
    gate = _gate(api_key_file, http_restricted_api or [], grpc_restricted_protocol or [], max_request_rate)
    if log_format not in FORMATS:
        raise ModelError(f"--log-format must be one of {', '.join(FORMATS)}, got {log_format!r}")
    config = ServeConfig(
        tuple(roots), host,
        http_port if allow_http else None, grpc_port if allow_grpc else None, metrics_port if allow_metrics else None,
        Mode(model_control_mode), tuple(load_model or ()), repository_poll_secs, server_id, exit_on_error,
        exit_timeout_secs, not disable_auto_complete_config, default_max_batch_size, http_max_input_size,
        allow_client_shm, parse_cache_config(cache_config or []), gate, _tls(tls_cert, tls_key, tls_client_ca),
        parse_trace_config(trace_config or []),
        LogSettings(log_info=log_info, log_verbose_level=log_verbose, log_format=log_format),
        parse_rate_limit(rate_limit, rate_limit_resource or []), load_on_demand, model_memory_budget,
    )  # fmt: skip

    if not _run(run_until_signal(config, lambda running: _announce(running, host, as_json))):
        console.print(f"accepted requests did not finish within {exit_timeout_secs:g} s")
        raise typer.Exit(1)


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


def _announce(running: Any, host: str, as_json: bool) -> None:
    index = running.core.repository.index()
    if as_json:
        emit_json({"host": host, "ports": running.ports, "models": index})
        return
    rows = [[m["name"], m.get("version", ""), m.get("state", ""), m.get("reason", "")] for m in index]
    console.print(table("models", ["model", "version", "state", "reason"], rows))
    for name, port in running.ports.items():
        console.print(f"{name:8} {host}:{port}", highlight=False)
