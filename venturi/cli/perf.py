"""`venturi perf`: throughput and latency of a served model, level by level of load."""

from __future__ import annotations

import asyncio
import csv
from pathlib import Path
from typing import Annotated, Any

import typer

from venturi.cli.output import console, emit_json, errors, table
from venturi.core.errors import ModelError, RequestError

PROTOCOLS = ("http", "grpc", "inprocess")
_COLUMNS = {
    "infer_per_s": "infer/s", "avg_us": "avg us", "p50_us": "p50", "p90_us": "p90", "p95_us": "p95", "p99_us": "p99",
    "errors": "errors", "server_queue_us": "queue us", "server_compute_infer_us": "infer us",
    "server_batch": "batch", "stable": "stable",
}  # fmt: skip


def perf(
    model: Annotated[str, typer.Argument(help="The model's name on the server; a file for -i inprocess.")],
    url: Annotated[str, typer.Option("-u", "--url", help="host:port; default: 8000 for http, 8001 for grpc.")] = "",
    protocol: Annotated[str, typer.Option("-i", "--protocol", help="http, grpc or inprocess.")] = "http",
    concurrency: Annotated[str, typer.Option(help="Requests in flight: START[:END[:STEP]].")] = "1",
    request_rate: Annotated[str, typer.Option(help="Requests a second instead: START[:END[:STEP]].")] = "",
    poisson: Annotated[bool, typer.Option("--poisson", help="Random gaps at the rate, not equal ones.")] = False,
    batch: Annotated[int, typer.Option("-b", "--batch", min=1, help="Rows a request.")] = 1,
    shape: Annotated[list[str] | None, typer.Option(help="NAME:D1,D2 without the batch axis.")] = None,
    version: Annotated[str, typer.Option(help="Model version; default: the newest.")] = "",
    window_ms: Annotated[int, typer.Option(min=10, help="Milliseconds a window.")] = 1000,
    stability: Annotated[float, typer.Option(min=0, help="Percent that three windows may differ.")] = 10.0,
    max_windows: Annotated[int, typer.Option(min=3, help="Windows at most a level.")] = 10,
    percentile: Annotated[int, typer.Option(min=0, max=99, help="Compare this percentile, 0: the mean.")] = 0,
    output: Annotated[Path | None, typer.Option("-f", help="Also write the rows to a CSV file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Put load on a KServe v2 server (ours or any other) and print what it answers."""
    if protocol not in PROTOCOLS:
        raise ModelError(f"--protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    try:
        from venturi.serve.perf.load import Rules
        from venturi.serve.perf.windows import sweep

        levels = sweep(request_rate, "--request-rate") if request_rate else sweep(concurrency, "--concurrency")
    except ImportError as exc:
        raise ModelError(f"venturi perf needs {exc.name}: pip install 'venturi[serve]'") from exc
    except ValueError as exc:
        raise RequestError(str(exc)) from exc
    rules = Rules(window_ms / 1e3, stability / 100, max_windows, percentile or None)
    rows = asyncio.run(_run(
        model, url, protocol, levels, bool(request_rate), poisson, batch, _shapes(shape or []), version, rules, as_json
    ))  # fmt: skip
    if output is not None:
        with output.open("w", newline="") as file:
            writer = csv.DictWriter(file, list({k: None for r in rows for k in r}))
            writer.writeheader()
            writer.writerows(rows)
    if as_json:
        emit_json({"model": model, "protocol": protocol, "batch": batch, "levels": rows})
        return
    load = "request_rate" if request_rate else "concurrency"
    shown = {load: load.replace("_", " "), **{k: v for k, v in _COLUMNS.items() if any(k in r for r in rows)}}
    cells = [["yes" if r.get(k) is True else "no" if r.get(k) is False else r.get(k, "") for k in shown] for r in rows]
    console.print(table(f"{model} over {protocol}, batch {batch}", list(shown.values()), cells))


async def _run(
    model: str, url: str, protocol: str, levels: list[float], is_rate: bool, poisson: bool, batch: int,
    shapes: dict[str, tuple[int, ...]], version: str, rules: Any, quiet: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    from venturi.serve.perf.load import at_concurrency, at_rate
    from venturi.serve.perf.target import EngineTarget, GrpcTarget, HttpTarget, make_inputs

    target: Any
    if protocol == "inprocess":
        if not Path(model).is_file():
            raise ModelError(f"no file {model!r}; -i inprocess takes a .vt or .onnx file")
        target = EngineTarget(Path(model))
    elif protocol == "grpc":
        target = GrpcTarget(url or "127.0.0.1:8001", model, version)
    else:
        target = HttpTarget(url or "127.0.0.1:8000", model, version)
    try:
        ports, max_batch = await target.describe()
        if batch > max(max_batch, 1):
            raise RequestError(f"--batch {batch}: model '{model}' takes at most {max(max_batch, 1)} rows a request")
        target.prepare(make_inputs(ports, batch, max_batch > 0, shapes))
        found = []
        for level in levels:
            if not quiet:
                errors.print(f"{'rate' if is_rate else 'concurrency'} {level:g} ...", highlight=False)
            if is_rate:
                result = await at_rate(target, level, batch, rules, poisson=poisson)
            else:
                result = await at_concurrency(target, int(level), batch, rules)
            found.append(result.to_json())
        return found
    finally:
        await target.close()


def _shapes(given: list[str]) -> dict[str, tuple[int, ...]]:
    found = {}
    for text in given:
        name, _, sizes = text.rpartition(":")
        if not name or not all(s.isascii() and s.isdigit() for s in sizes.split(",")):
            raise RequestError(f"--shape must be NAME:D1,D2,..., got {text!r}")
        found[name] = tuple(int(s) for s in sizes.split(","))
    return found
