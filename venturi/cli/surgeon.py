"""`venturi surgeon sanitize|extract|insert|prune|weight-strip|weight-reconstruct`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from venturi.cli.output import console, emit_json

app = typer.Typer(no_args_is_help=True)
Model = Annotated[Path, typer.Argument(help="ONNX file.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="File to write.")]
Json = Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")]


def _done(as_json: bool, output: Path, **facts: Any) -> None:
    if as_json:
        emit_json({"output": str(output), **facts})
    else:
        console.print(
            ", ".join(f"{k.replace('_', ' ')}: {v}" for k, v in facts.items()) + f" -> {output}",
            highlight=False,
        )


def _names(text: str | None) -> list[str]:
    return [n.strip() for n in (text or "").split(",") if n.strip()]


@app.command("sanitize", epilog="Example: venturi surgeon sanitize model.onnx -o clean.onnx")
def sanitize(
    model: Model,
    output: Output,
    fold_limit: Annotated[int, typer.Option(help="Largest folded tensor in bytes.")] = 64 << 20,
    as_json: Json = False,
) -> None:
    """Fold constants and remove dead and useless nodes."""
    from venturi.engine import surgery
    from venturi.frontends.onnx_import import import_onnx

    loaded = import_onnx(model)
    before = len(list(loaded.graph))
    done = surgery.sanitize(loaded, fold_limit)
    surgery.save_model(loaded, output)
    _done(as_json, output, nodes_before=before, nodes_after=len(list(loaded.graph)), rewrites=done)


@app.command("extract", epilog="Example: venturi surgeon extract model.onnx --outputs relu_3 -o part.onnx")
def extract(
    model: Model,
    output: Output,
    outputs: Annotated[str, typer.Option(help="Value names, comma-separated.")],
    inputs: Annotated[str | None, typer.Option(help="Value names; default the model's inputs.")] = None,
    as_json: Json = False,
) -> None:
    """Cut out the part of a graph between values."""
    from venturi.engine import surgery
    from venturi.frontends.onnx_import import import_onnx

    part = surgery.extract(import_onnx(model), _names(inputs), _names(outputs))
    surgery.save_model(part, output)
    _done(as_json, output, nodes=len(list(part.graph)), inputs=[v.name for v in part.graph.inputs])


@app.command("insert", epilog="Example: venturi surgeon insert model.onnx --op Relu --at logits -o new.onnx")
def insert(
    model: Model,
    output: Output,
    op: Annotated[str, typer.Option(help="Operator with one input.")],
    at: Annotated[str, typer.Option(help="Value whose readers shall read the new node.")],
    as_json: Json = False,
) -> None:
    """Insert a one-input operator behind a value."""
    from venturi.engine import surgery
    from venturi.frontends.onnx_import import import_onnx

    surgery.save_model(surgery.insert(import_onnx(model), op, at), output)
    _done(as_json, output, inserted=op, at=at)


@app.command("prune", epilog="Example: venturi surgeon prune model.onnx -o sparse.onnx")
def prune(model: Model, output: Output, as_json: Json = False) -> None:
    """Prune weights to 2:4 sparsity (accuracy is not kept: for measuring sparse kernels)."""
    from venturi.engine import surgery
    from venturi.frontends.onnx_import import import_onnx

    pruned, count = surgery.prune_2_4(import_onnx(model))
    surgery.save_model(pruned, output)
    _done(as_json, output, tensors_pruned=count)


@app.command("weight-strip", epilog="Example: venturi surgeon weight-strip model.onnx -o thin.onnx")
def weight_strip(model: Model, output: Output, as_json: Json = False) -> None:
    """Leave the weights out, for sharing a model's structure."""
    from venturi.engine import surgery
    from venturi.frontends.onnx_import import import_onnx

    _done(as_json, output, bytes_left_out=surgery.strip_to_file(import_onnx(model), output))


@app.command("weight-reconstruct", epilog="Example: venturi surgeon weight-reconstruct thin.onnx -o random.onnx")
def weight_reconstruct(
    model: Model,
    output: Output,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    as_json: Json = False,
) -> None:
    """Fill a stripped model with random weights."""
    from venturi.core.errors import ModelError, mapped
    from venturi.engine import surgery

    with mapped(str(model), ModelError):
        surgery.save_model(surgery.reconstruct(model, seed), output)
    _done(as_json, output, seed=seed)
