"""`venturi check`: everything wrong with a model, at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from venturi.cli.output import console, emit_json, table


def check(
    model: Annotated[Path, typer.Argument(help="ONNX file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print findings as JSON.")] = False,
) -> None:
    """Lint a model: validity, unsupported nodes, suspicious weights, unused parts. Exit status 1 on errors."""
    from venturi.engine.lint import lint

    findings = lint(model)
    failed = any(f.level == "error" for f in findings)
    if as_json:
        emit_json({"model": str(model), "passed": not failed, "findings": [f.to_json() for f in findings]})
    elif findings:
        console.print(table(str(model), ["level", "where", "finding"], [[f.level, f.where, f.text] for f in findings]))
    else:
        console.print(f"{model}: nothing to complain about", highlight=False)
    raise typer.Exit(1 if failed else 0)
