"""`venturi analyze`: the best configuration of a served model under a latency limit."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer

from venturi.cli.output import console, emit_json, errors, table
from venturi.core.errors import ModelError, RequestError


def analyze(
    repository: Annotated[Path, typer.Argument(help="A repository folder, an .onnx or a .vt file.")],
    model: Annotated[str, typer.Option("-m", "--model", help="Which model; default: the only one.")] = "",
    instances: Annotated[str, typer.Option(help="Instance counts to try.")] = "1,2",
    batches: Annotated[str, typer.Option(help="max_batch_size values to try, up to the model's own.")] = "1,2,4,8",
    delays_us: Annotated[str, typer.Option(help="max_queue_delay_microseconds values to try.")] = "0",
    max_concurrency: Annotated[int, typer.Option(min=1, help="Concurrency doubles from 1 up to this.")] = 16,
    latency_ms: Annotated[float, typer.Option(min=0, help="Latency budget in milliseconds, 0: none.")] = 0.0,
    percentile: Annotated[int, typer.Option(help="The latency that counts: 50, 90, 95, 99, or 0 for the mean.")] = 99,
    objective: Annotated[str, typer.Option(help="throughput or latency.")] = "throughput",
    shape: Annotated[list[str] | None, typer.Option(help="NAME:D1,D2 without the batch axis.")] = None,
    window_ms: Annotated[int, typer.Option(min=10, help="Milliseconds a window; three agree, or ten at most.")] = 500,
    output: Annotated[Path | None, typer.Option("-o", help="Write the results as an HTML page.")] = None,
    config: Annotated[Path | None, typer.Option(help="Write the best configuration as a config.pbtxt.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Try instances, batch sizes and concurrency on a server of our own, and say which serves best."""
    if objective not in ("throughput", "latency"):
        raise RequestError(f"--objective must be throughput or latency, got {objective!r}")
    if percentile not in (0, 50, 90, 95, 99):
        raise RequestError(f"--percentile must be 0, 50, 90, 95 or 99, got {percentile}")
    try:
        from venturi.serve.analyze.report import html
        from venturi.serve.analyze.search import best
        from venturi.serve.analyze.session import Session, Space
        from venturi.serve.config import config_from_json
        from venturi.serve.folders import find_sources
        from venturi.serve.perf.load import Rules
    except ImportError as exc:
        raise ModelError(f"venturi analyze needs {exc.name}: pip install 'venturi[serve]'") from exc
    from venturi.cli.perf import _shapes

    names = sorted(find_sources([repository]))
    if not model and len(names) != 1:
        raise ModelError(f"{repository} holds {len(names)} models, choose one with -m: {', '.join(names)}")
    if model and model not in names:
        raise ModelError(f"no model {model!r} in {repository}, which holds {', '.join(names)}")
    chosen_model = model or names[0]
    budget = latency_ms * 1e3 or None
    space = Space(
        _numbers(instances, "--instances", 1), _numbers(batches, "--batches", 1), _numbers(delays_us, "--delays-us", 0),
        max_concurrency, budget,
    )  # fmt: skip
    rules = Rules(window_ms / 1e3, 0.1, 10, percentile or None)

    def heard(result: Any) -> None:
        if not as_json:
            text = f"{result.variant.label}, concurrency {result.concurrency}: {result.infer_per_s:.1f}/s"
            errors.print(text, highlight=False)

    async def run() -> Any:
        async with Session(repository, chosen_model) as session:
            return await session.run(space, rules, _shapes(shape or []), heard)

    results, original = asyncio.run(run())
    found = best(results, objective, budget)
    measure = f"p{percentile}" if percentile else "mean"
    if output is not None:
        output.write_text(html(chosen_model, results, found, budget, measure))
    if config is not None and found is not None:
        config.write_text(str(config_from_json(found.variant.apply(original), "the best configuration")))
    if as_json:
        emit_json({
            "model": chosen_model, "best": found and found.to_json(), "results": [r.to_json() for r in results],
        })  # fmt: skip
    else:
        _print(chosen_model, results, found, measure)
    if found is None:
        raise RequestError(f"no configuration keeps {measure} within {latency_ms:g} ms; the least is "
                           f"{min(r.latency_us for r in results) / 1e3:.2f} ms")  # fmt: skip


def _print(model: str, results: list[Any], found: Any, measure: str) -> None:
    rows = [
        [r.variant.label, r.concurrency, round(r.infer_per_s, 1), round(r.latency_us / 1e3, 3),
         round(r.rows_a_batch, 2), "best" if r == found else ""]
        for r in results
    ]  # fmt: skip
    columns = ["configuration", "concurrency", "infer/s", f"{measure} ms", "rows a batch", ""]
    console.print(table(model, columns, rows))


def _numbers(text: str, name: str, least: int) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(p.isascii() and p.isdigit() and int(p) >= least for p in parts):
        raise RequestError(f"{name} must be numbers from {least} on with commas between, got {text!r}")
    return tuple(dict.fromkeys(int(p) for p in parts))
