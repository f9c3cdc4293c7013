"""`venturi build`: a model file in, an engine file out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from venturi.cli.output import console, emit_json, parse_shapes, progress_bar


def profile_options(shapes: str | None, low: str | None, opt: str | None, high: str | None) -> Any:
    """A Profile from --shapes, or from --min/--opt/--max-shapes (a missing one repeats its neighbour)."""
    from venturi.engine.config import Profile

    fixed = parse_shapes(shapes)
    if fixed:
        return Profile.from_dict(fixed)
    a, b, c = parse_shapes(low), parse_shapes(opt), parse_shapes(high)
    names = {*a, *b, *c}
    if not names:
        return None
    ranges = {}
    for n in names:
        middle = b.get(n) or c.get(n) or a[n]
        ranges[n] = (a.get(n, middle), middle, c.get(n, middle))
    return Profile.from_dict(ranges)


def build(
    model: Annotated[Path, typer.Argument(help="ONNX file.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Engine file; default MODEL.vt.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    precision: Annotated[str, typer.Option(help="model, fp32, fp16 or bf16.")] = "model",
    shapes: Annotated[str | None, typer.Option(help="Fixed shapes: x:1x3x224x224,ids:1x128.")] = None,
    min_shapes: Annotated[str | None, typer.Option(help="Smallest shapes of a profile.")] = None,
    opt_shapes: Annotated[str | None, typer.Option(help="Shapes to tune for.")] = None,
    max_shapes: Annotated[str | None, typer.Option(help="Largest shapes of a profile.")] = None,
    budget: Annotated[float | None, typer.Option(help="Seconds of tuning; default no limit.")] = None,
    opt_level: Annotated[int, typer.Option(help="0 (no timing) to 5 (longest).")] = 3,
    timing_cache: Annotated[Path | None, typer.Option(help="JSON file; default ~/.cache/venturi/timing.json.")] = None,
    refit: Annotated[bool, typer.Option("--refit", help="Keep the source, so that weights can be replaced.")] = False,
    strip: Annotated[bool, typer.Option("--strip", help="Leave the weights out of the file.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse layers that only the reference computes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan's summary as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress bar.")] = False,
) -> None:
    """Compile an ONNX model into an engine file."""
    import venturi as vt

    target = output or model.with_suffix(".vt")
    profile = profile_options(shapes, min_shapes, opt_shapes, max_shapes)
    start = time.perf_counter()
    with progress_bar(not quiet and not as_json) as progress:
        engine = vt.build(
            model, device=device, precision=precision, profiles=profile, budget=budget, opt_level=opt_level,
            timing_cache=timing_cache, refit=refit, strip=strip, strict=strict, progress=progress,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    engine.save(target)
    report = engine.inspect()
    if as_json:
        emit_json({"engine": str(target), "build_s": seconds, "bytes": target.stat().st_size, **report.to_json()})
        return
    console.print(report.table())
    console.print(f"built in {seconds:.2f} s, {target.stat().st_size / 1e6:.1f} MB: {target}", highlight=False)
