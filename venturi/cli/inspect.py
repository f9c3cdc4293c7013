"""`venturi inspect model|engine|plan|capability`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from venturi.cli.output import console, emit_json, table

app = typer.Typer(no_args_is_help=True)


@app.command("model", epilog="Example: venturi inspect model model.onnx --optimized")
def model(
    path: Annotated[Path, typer.Argument(help="ONNX file.")],
    optimized: Annotated[bool, typer.Option("--optimized", help="Show the graph of Regions after all passes.")] = False,
    precision: Annotated[str, typer.Option(help="Precision of the passes.")] = "model",
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Print a model's graph: interface, nodes with types, counts by operator."""
    from collections import Counter

    from venturi.engine.builder import spec_of
    from venturi.frontends.onnx_import import import_onnx
    from venturi.ir.printer import format_graph
    from venturi.passes.pipeline import run_pipeline
    from venturi.passes.rewriting import PassContext

    loaded = import_onnx(path)
    if optimized:
        run_pipeline(loaded, PassContext(precision=precision))
    counts = Counter(n.op_type for n in loaded.graph)
    if as_json:
        graph = loaded.graph
        emit_json(
            {
                "inputs": [vars(spec_of(v)) for v in graph.inputs],
                "outputs": [vars(spec_of(v)) for v in graph.outputs],
                "nodes": [{"name": n.name, "op": n.op_type, "domain": n.domain} for n in graph],
                "operators": dict(counts),
                "weights_bytes": sum(v.const_value.nbytes for v in graph.initializers.values() if v.const_value),
            }
        )
        return
    console.print(format_graph(loaded.graph), markup=False, highlight=False)
    console.print(table("operators", ["operator", "count"], [[k, v] for k, v in counts.most_common()]))


@app.command("engine", epilog="Example: venturi inspect engine model.vt --html report.html")
def engine(
    path: Annotated[Path, typer.Argument(help="Engine file.")],
    html: Annotated[Path | None, typer.Option(help="Write a report with charts.")] = None,
    onnx: Annotated[Path | None, typer.Option(help="Write the annotated graph for Netron.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Layers, tactics and times of an engine file."""
    from venturi.engine.artifact import open_artifact
    from venturi.engine.inspector import make_report

    loaded = open_artifact(path, verify=onnx is not None)
    report = make_report(loaded.plan)
    if html is not None:
        from venturi.engine.html_report import write_html

        write_html(html, report, loaded.manifest)
    if onnx is not None:
        from venturi.engine.annotate import write_annotated

        write_annotated(onnx, loaded)
    if as_json:
        emit_json({"manifest": loaded.manifest, **report.to_json()})
        return
    console.print(report.table())
    sizes = ", ".join(f"{n} {len(v) / 1e6:.2f} MB" for n, v in loaded.container.entries.items())
    console.print(
        f"built by venturi {loaded.manifest['venturi']} on {loaded.manifest['cpu']}\n{sizes}", highlight=False
    )


@app.command("plan", epilog="Example: venturi inspect plan model.vt --layer conv.3")
def plan(
    path: Annotated[Path, typer.Argument(help="Engine file.")],
    layer: Annotated[str | None, typer.Option(help="Only this step.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Every candidate of every step: its time, or the reason why it was rejected; and tensors that change layout."""
    from venturi.engine.artifact import open_artifact

    found = open_artifact(path, verify=False).plan
    steps = [s for s in found.steps if layer is None or s.name == layer]
    if as_json:
        emit_json(found.to_json())
        return
    rows = []
    for s in steps:
        for m in s.measurements:
            mark = "<--" if m.tactic == s.tactic and m.config == s.config else ""
            rows.append(
                [
                    s.name,
                    m.tactic,
                    "-" if m.median_us is None else m.median_us,
                    m.spread_us or "-",
                    mark,
                    m.reason,
                ]
            )
    console.print(table(str(path), ["step", "tactic", "median us", "spread", "", "reason"], rows))
    left = [r for r in found.reorders or () if layer is None or r.step == layer]
    if left:
        rows = [[r.source, r.step, f"{r.bytes / 1024:.1f}", r.why] for r in left]
        console.print(table("reorders that are left", ["from", "to", "KiB", "why"], rows))
    elif found.reorders is not None:
        console.print("no reorders are left")


@app.command("capability", epilog="Example: venturi inspect capability model.onnx")
def capability(
    path: Annotated[Path | None, typer.Argument(help="ONNX file; without one, the whole operator table.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Which operators are supported: all of them, or those of one model."""
    from venturi.ops.table import OPS, find_op, load_all

    load_all()
    if path is None:
        rows = [{"domain": d or "ai.onnx", "operator": n, "supported": True} for d, n in sorted(OPS)]
    else:
        import onnx_ir as ir

        from venturi.core.errors import ModelError, mapped

        with mapped(str(path), ModelError):
            used = {(n.domain, n.op_type) for n in ir.load(path).graph.all_nodes()}
        rows = [
            {"domain": d or "ai.onnx", "operator": n, "supported": find_op(d, n) is not None} for d, n in sorted(used)
        ]
    if as_json:
        emit_json(rows)
    else:
        console.print(table("operators", ["domain", "operator", "supported"], [list(r.values()) for r in rows]))
    raise typer.Exit(0 if all(r["supported"] for r in rows) else 1)
