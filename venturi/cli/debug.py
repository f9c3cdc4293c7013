"""`venturi debug reduce|bisect|precision|repeat`."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from venturi.cli.output import console, emit_json, table

app = typer.Typer(no_args_is_help=True)
Model = Annotated[Path, typer.Argument(help="ONNX file.")]
Shapes = Annotated[str | None, typer.Option(help="Input shapes: x:2x3x32x32.")]
Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


def _inputs(model: Path, shapes: str | None) -> dict[str, Any]:
    from venturi.cli.run import load_inputs

    return load_inputs(model, shapes, None, 0)


@app.command("reduce", epilog="Example: venturi debug reduce bad.onnx -o small.onnx --check 'venturi run {}'")
def reduce(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="Smallest failing model.")],
    check: Annotated[str, typer.Option(help="Command; {} is the candidate's path; a non-zero exit means it fails.")],
    timeout: Annotated[float, typer.Option(help="Seconds for one check; running longer counts as failing.")] = 300.0,
    as_json: Json = False,
) -> None:
    """Cut a failing model down to the smallest part that still fails."""
    import shlex

    from venturi.core.errors import ModelError
    from venturi.engine.debugging import reduce_model
    from venturi.engine.surgery import save_model
    from venturi.frontends.onnx_import import import_onnx

    with tempfile.TemporaryDirectory() as folder:

        def fails(part: Any) -> bool:
            path = Path(folder) / "candidate.onnx"
            save_model(part, path)
            command = [w.replace("{}", str(path)) for w in shlex.split(check)]
            try:
                return subprocess.run(command, capture_output=True, timeout=timeout, check=False).returncode != 0
            except subprocess.TimeoutExpired:
                return True

        whole = import_onnx(model)
        if not fails(whole):
            raise ModelError(f"the check {check!r} passes on the whole model; there is nothing to reduce")
        small = reduce_model(whole, fails)
    save_model(small, output)
    names = [f"{n.op_type} {n.name}" for n in small.graph]
    if as_json:
        emit_json({"output": str(output), "nodes": names})
    else:
        console.print(
            f"{len(list(whole.graph))} nodes reduced to {len(names)} -> {output}: {', '.join(names[:10])}",
            highlight=False,
        )


@app.command("bisect", epilog="Example: venturi debug bisect model.onnx --rtol 1e-4")
def bisect(
    model: Model,
    shapes: Shapes = None,
    precision: Annotated[str, typer.Option(help="Precision of the passes.")] = "model",
    rtol: Annotated[float, typer.Option(help="Relative tolerance.")] = 1e-3,
    atol: Annotated[float, typer.Option(help="Absolute tolerance.")] = 1e-4,
    as_json: Json = False,
) -> None:
    """Find the first graph rewrite that changes the answer. Exit status 1 when there is one."""
    from venturi.backends.reference.interpreter import Interpreter
    from venturi.engine.debugging import bisect_passes, differs
    from venturi.frontends.onnx_import import import_onnx

    source, inputs = import_onnx(model), _inputs(model, shapes)
    want = Interpreter(source.graph).run(inputs)
    found = bisect_passes(source, differs(inputs, want, rtol, atol), precision)
    if as_json:
        emit_json(None if found is None else vars(found))
    elif found is None:
        console.print("every rewrite keeps the answer")
    else:
        console.print(
            f"rewrite {found.rewrite} of {found.total}, by pass {found.name!r}, changes the answer",
            highlight=False,
        )
    raise typer.Exit(0 if found is None else 1)


@app.command("precision", epilog="Example: venturi debug precision model.onnx --precision bf16")
def precision(
    model: Model,
    shapes: Shapes = None,
    precision: Annotated[str, typer.Option(help="fp16 or bf16.")] = "bf16",
    top: Annotated[int, typer.Option(help="Show the worst so many.")] = 20,
    as_json: Json = False,
) -> None:
    """Rank layers by the error they make when they alone compute in a lower precision."""
    from venturi.engine.debugging import precision_sensitivity
    from venturi.frontends.onnx_import import import_onnx

    found = precision_sensitivity(import_onnx(model), _inputs(model, shapes), precision)
    if as_json:
        emit_json([vars(s) for s in found])
    else:
        console.print(
            table(
                f"error in {precision}",
                ["node", "operator", "max error"],
                [[s.step, s.op, s.error] for s in found[:top]],
            )
        )


@app.command("repeat", epilog="Example: venturi debug repeat model.onnx --times 5")
def repeat(
    model: Model,
    shapes: Shapes = None,
    times: Annotated[int, typer.Option(help="Builds and runs.")] = 3,
    as_json: Json = False,
) -> None:
    """Build and run several times; exit status 1 when outputs differ between builds."""
    import numpy as np

    import venturi as vt

    inputs = _inputs(model, shapes)
    results = [vt.build(model).run(inputs) for _ in range(times)]
    worst = {
        n: max(
            (float(np.max(np.abs(r[n].astype(np.float64) - x.astype(np.float64)), initial=0.0)) for r in results[1:]),
            default=0.0,
        )
        for n, x in results[0].items()
        if isinstance(x, np.ndarray) and x.dtype.kind in "fiub"
    }
    same = all(v == 0.0 for v in worst.values())
    if as_json:
        emit_json({"identical": same, "max_difference": worst})
    else:
        console.print(table(f"{times} builds", ["output", "max difference"], [[n, v] for n, v in worst.items()]))
    raise typer.Exit(0 if same else 1)
