"""`venturi bench`: trtexec's protocol and figures for a model or an engine."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from venturi.cli.output import console, emit_json, parse_shapes, progress_bar, table

CALLERS_A_STREAM = 2


def open_or_build(
    path: Path, *, quiet: bool, intra_threads: int | None, streams: int | str | None, **options: Any
) -> tuple[Any, dict[str, float]]:
    """(engine, milliseconds of loading, or of reading and compiling)."""
    import venturi as vt
    import venturi.engine.engine  # imports are not part of the times below
    import venturi.frontends.onnx_import
    from venturi.core.progress import ProgressEvent

    start = time.perf_counter()
    if path.suffix == ".vt":
        engine = vt.load(path, intra_threads=intra_threads, streams=streams)
        return engine, {"load_ms": (time.perf_counter() - start) * 1e3}
    times: dict[str, float] = {}
    with progress_bar(not quiet) as show:

        def progress(event: ProgressEvent) -> bool | None:
            if event.phase == "import" and event.step == event.num_steps:
                times["read_ms"] = (time.perf_counter() - start) * 1e3
            return show(event) if show is not None else None

        engine = vt.build(path, progress=progress, intra_threads=intra_threads, streams=streams, **options)
    times["compile_ms"] = (time.perf_counter() - start) * 1e3 - times["read_ms"]
    return engine, times


def runs_on_cpu(path: Path, device: str) -> bool:
    """Where an engine file was built for, or what `device` means for a model."""
    from venturi.engine.artifact import open_artifact
    from venturi.engine.target import resolve_device

    found = open_artifact(path, verify=False).plan.target if path.suffix == ".vt" else resolve_device(device)
    return found == "cpu"


def random_inputs(engine: Any, shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Any]:
    """Inputs at the given shapes, else at the tuned ones, else 1 (first axis) or 32 for free dimensions."""
    import numpy as np

    from venturi.core.errors import ShapeError
    from venturi.core.registry import nearest
    from venturi.ir.dtypes import dtype_from_name, numpy_dtype

    names = [s.name for s in engine.inputs]
    for name in shapes:
        if name not in names:
            raise ShapeError(f"no input {name!r}; the engine has {names}.{nearest(name, names)}")
    rng = np.random.default_rng(seed)
    found: dict[str, Any] = {}
    for spec in engine.inputs:
        shape = shapes.get(spec.name) or engine.plan.tuned_shapes.get(spec.name)
        if shape is None:
            shape = [d if isinstance(d, int) else 1 if i == 0 else 32 for i, d in enumerate(spec.shape or ())]
        dtype = numpy_dtype(dtype_from_name(spec.dtype) or 1)  # type: ignore[arg-type]
        integer = dtype.kind in "iub"
        found[spec.name] = (rng.integers(0, 2, shape) if integer else rng.standard_normal(shape)).astype(dtype)
    return found


def read_inputs(path: Path) -> dict[str, Any]:
    """Arrays of an .npz file by name. Raises ModelError for anything else; nothing pickled is loaded."""
    import zipfile

    import numpy as np

    from venturi.core.errors import ModelError

    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("the file is missing" if not path.exists() else "it is no archive of arrays")
        with np.load(path, allow_pickle=False) as data:
            return {n: data[n] for n in data.files}
    except (OSError, ValueError, AttributeError) as exc:
        raise ModelError(f"cannot read inputs: {exc}; expected an .npz file", where=str(path)) from exc


def bench(
    model: Annotated[Path, typer.Argument(help="ONNX or engine file.")],
    shapes: Annotated[str | None, typer.Option(help="Input shapes: x:8x3x224x224.")] = None,
    load: Annotated[Path | None, typer.Option("--load-inputs", help=".npz of inputs by name, else random.")] = None,
    device: Annotated[str, typer.Option(help="For ONNX files: auto, cpu, cuda, cuda:1.")] = "auto",
    precision: Annotated[str, typer.Option(help="For ONNX files: model, fp32, tf32, fp16, bf16.")] = "model",
    opt_level: Annotated[int, typer.Option(help="For ONNX files: 0 to 5.")] = 3,
    duration: Annotated[float, typer.Option(help="Measure at least this many seconds.")] = 3.0,
    warm_up: Annotated[float, typer.Option(help="Milliseconds of warm-up.")] = 200.0,
    iterations: Annotated[int, typer.Option(help="Measure at least this many runs.")] = 10,
    streams: Annotated[str, typer.Option(help="Runs side by side, on cores of their own: a number, auto.")] = "none",
    intra_threads: Annotated[int | None, typer.Option(help="Most threads of a run on the CPU; default: all.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Add time, rates and roofline of every layer.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Write the layers for ui.perfetto.dev.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
) -> None:
    """Measure latency and throughput: 200 ms warm-up, at least 3 s and 10 runs.

    With --streams two callers keep each stream busy: latency then holds the time of waiting for one. On a GPU a
    stream is a caller with a context of its own.
    """
    from venturi.cli.build import profile_options
    from venturi.engine.benchmarking import measure

    options = {
        "device": device,
        "precision": precision,
        "opt_level": opt_level,
        "profiles": profile_options(shapes, None, None, None),
    }
    wanted = None if streams == "none" else int(streams) if streams.isdigit() else streams
    gpu_callers = wanted if isinstance(wanted, int) and not runs_on_cpu(model, device) else 0
    shared_out = None if gpu_callers else wanted
    engine, times = open_or_build(model, quiet=as_json, intra_threads=intra_threads, streams=shared_out, **options)
    callers = gpu_callers or CALLERS_A_STREAM * engine.streams or 1
    inputs = random_inputs(engine, parse_shapes(shapes)) if load is None else read_inputs(load)
    start = time.perf_counter()
    engine.run(inputs)
    times["first_inference_ms"] = (time.perf_counter() - start) * 1e3
    result = measure(
        lambda: engine.run(inputs), warm_up_ms=warm_up, duration_s=duration, iterations=iterations, callers=callers
    )
    report = engine.profile(inputs, roofline=True) if profile or trace else None
    if trace is not None and report is not None:
        trace.write_text(json.dumps(report.trace()), encoding="utf-8")
    if as_json:
        data = {
            "model": str(model),
            "device": engine.device,
            "streams": gpu_callers or engine.streams,
            "shapes": {n: list(x.shape) for n, x in inputs.items()},
            **times,
            **result.to_json(),
        }
        emit_json(data | ({"profile": report.to_json()} if profile and report else {}))
        return
    rows: list[list[Any]] = [[name.replace("_ms", ""), value] for name, value in times.items()]
    rows += [["min", result.min_ms], ["median", result.median_ms], ["mean", result.mean_ms]]
    rows += [[f"percentile {p} %", v] for p, v in result.percentiles_ms.items()] + [["max", result.max_ms]]
    console.print(table(f"{model}: {result.runs} runs in {result.wall_s:.2f} s", ["figure", "ms"], rows))
    console.print(f"throughput {result.throughput_qps:.2f} qps, spread {result.cv_percent:.1f} %", highlight=False)
    if result.cv_percent > 25:
        console.print("the spread is large: something else is using the machine")
    if profile and report is not None:
        console.print(report.table())
