"""`venturi run`: the same inputs through several backends, outputs compared tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from venturi.cli.output import console, emit_json, parse_shapes, table
from venturi.core.errors import ModelError
from venturi.core.registry import nearest

BACKENDS = ("venturi", "venturi-bf16", "venturi-fp16", "reference", "onnxruntime")


def run_backend(name: str, model: Path, inputs: dict[str, Any], opt_level: int = 3) -> dict[str, Any]:
    """Outputs by name. Raises ModelError for unknown backends and for what onnxruntime refuses."""
    import venturi as vt

    if name == "venturi" and model.suffix == ".vt":
        return vt.load(model).run(inputs)
    if name.startswith("venturi"):
        precision = name.partition("-")[2] or "model"
        return vt.build(model, precision=precision, opt_level=opt_level).run(inputs)
    if name == "reference":
        from venturi.backends.reference.interpreter import Interpreter
        from venturi.frontends.onnx_import import import_onnx

        return Interpreter(import_onnx(model).graph).run(inputs)
    if name == "onnxruntime":
        return _onnxruntime(model, inputs)
    raise ModelError(f"no backend {name!r}; known: {', '.join(BACKENDS)}.{nearest(name, BACKENDS)}")


def _onnxruntime(model: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    try:
        import onnxruntime as ort
    except ImportError as exc:
        raise ModelError("onnxruntime is not installed: pip install onnxruntime") from exc
    try:
        session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
        return dict(zip([o.name for o in session.get_outputs()], session.run(None, inputs)))
    except Exception as exc:
        raise ModelError(f"onnxruntime refuses: {str(exc).splitlines()[0]}", where=str(model)) from exc


def load_inputs(model: Path, shapes: str | None, path: Path | None, seed: int) -> dict[str, Any]:
    """From an .npz file, else random ones."""
    import venturi as vt
    from venturi.cli.bench import random_inputs, read_inputs

    if path is not None:
        return read_inputs(path)
    engine = vt.load(model) if model.suffix == ".vt" else vt.build(model, opt_level=0)
    return random_inputs(engine, parse_shapes(shapes), seed)


def run(
    model: Annotated[Path, typer.Argument(help="ONNX file (or engine, for venturi alone).")],
    backends: Annotated[
        str, typer.Option(help=f"Comma-separated: {', '.join(BACKENDS)}. The last is the yardstick.")
    ] = "venturi,reference",
    shapes: Annotated[str | None, typer.Option(help="Input shapes: x:2x3x32x32.")] = None,
    rtol: Annotated[float, typer.Option(help="Relative tolerance.")] = 1e-3,
    atol: Annotated[float, typer.Option(help="Absolute tolerance.")] = 1e-4,
    seed: Annotated[int, typer.Option(help="Of random inputs.")] = 0,
    load_inputs_from: Annotated[Path | None, typer.Option("--load-inputs", help=".npz of inputs by name.")] = None,
    save_inputs_to: Annotated[Path | None, typer.Option("--save-inputs", help="Write the inputs as .npz.")] = None,
    save_outputs_to: Annotated[
        Path | None, typer.Option("--save-outputs", help="Write the first backend's outputs as .npz.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print statistics as JSON.")] = False,
) -> None:
    """Compare backends on the same inputs. Exit status 1 when a tensor is outside the tolerance."""
    import numpy as np

    from venturi.engine.compare import compare

    inputs = load_inputs(model, shapes, load_inputs_from, seed)
    if save_inputs_to is not None:
        np.savez(save_inputs_to, **inputs)
    names = [b.strip() for b in backends.split(",") if b.strip()]
    results = {b: run_backend(b, model, inputs) for b in names}
    if save_outputs_to is not None:
        np.savez(save_outputs_to, **results[names[0]])
    yardstick = names[-1]
    found = {
        b: [compare(n, x, results[yardstick].get(n), rtol, atol) for n, x in results[b].items()] for b in names[:-1]
    }
    failed = any(not d.passed for ds in found.values() for d in ds)
    divergence = _diverged(model, inputs) if failed and model.suffix != ".vt" else None
    if as_json:
        emit_json({"against": yardstick, "passed": not failed, "first_divergence": divergence,
                   "outputs": {b: [d.to_json() for d in ds] for b, ds in found.items()}})  # fmt: skip
    elif len(names) == 1:
        rows: list[list[Any]] = [
            [n, str(x.dtype), list(x.shape)] for n, x in results[names[0]].items() if isinstance(x, np.ndarray)
        ]
        console.print(table(f"outputs of {names[0]}", ["output", "dtype", "shape"], rows))
    else:
        for b, differences in found.items():
            rows = [_row(d) for d in differences]
            columns = [
                "output",
                "max abs",
                "mean abs",
                "median abs",
                "p99 abs",
                "max rel",
                "median rel",
                "cosine",
                "PSNR",
                "SNR",
                "",
            ]
            console.print(table(f"{b} against {yardstick} (rtol {rtol}, atol {atol})", columns, rows))
        if divergence:
            console.print(f"first divergent step: {divergence}", highlight=False)
    raise typer.Exit(1 if failed else 0)


def _row(d: Any) -> list[Any]:
    numbers = [d.max_abs, d.mean_abs, d.median_abs, d.p99_abs, d.max_rel, d.median_rel, d.cosine, d.psnr_db, d.snr_db]
    return [d.name, *numbers, "pass" if d.passed else f"FAIL {d.note}"]


def _diverged(model: Path, inputs: dict[str, Any]) -> str | None:
    import venturi as vt
    from venturi.engine.compare import first_divergence

    found = first_divergence(vt.build(model), inputs)
    return None if found is None else f"{found.step} ({found.tactic}) from {', '.join(found.sources)}: {found.reason}"
