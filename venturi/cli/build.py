"""`venturi build`: a model file in, an engine file out. `venturi tune`: an engine file, timed here."""

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
    target: Annotated[
        str | None, typer.Option(help="Architecture of a GPU that is not here: sm_90. Needs --no-tune.")
    ] = None,
    precision: Annotated[str, typer.Option(help="model, fp32, tf32, fp16 or bf16.")] = "model",
    shapes: Annotated[str | None, typer.Option(help="Fixed shapes: x:1x3x224x224,ids:1x128.")] = None,
    min_shapes: Annotated[str | None, typer.Option(help="Smallest shapes of a profile.")] = None,
    opt_shapes: Annotated[str | None, typer.Option(help="Shapes to tune for.")] = None,
    max_shapes: Annotated[str | None, typer.Option(help="Largest shapes of a profile.")] = None,
    budget: Annotated[float | None, typer.Option(help="Seconds of tuning; default no limit.")] = None,
    opt_level: Annotated[int, typer.Option(help="0 (no timing) to 5 (longest).")] = 3,
    no_tune: Annotated[bool, typer.Option("--no-tune", help="Choose by heuristics: --opt-level 0.")] = False,
    timing_cache: Annotated[Path | None, typer.Option(help="JSON file; default ~/.cache/venturi/timing.json.")] = None,
    refit: Annotated[bool, typer.Option("--refit", help="Keep the source, so that weights can be replaced.")] = False,
    strip: Annotated[bool, typer.Option("--strip", help="Leave the weights out of the file.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse layers that only the reference computes.")] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="All choices from the timing cache; the same file every time.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan's summary as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress bar.")] = False,
) -> None:
    """Compile an ONNX model into an engine file."""
    import venturi as vt

    file = output or model.with_suffix(".vt")
    profile = profile_options(shapes, min_shapes, opt_shapes, max_shapes)
    start = time.perf_counter()
    with progress_bar(not quiet and not as_json) as progress:
        engine = vt.build(
            model, device=device, target=target, precision=precision, profiles=profile, budget=budget,
            opt_level=0 if no_tune else opt_level, timing_cache=timing_cache, refit=refit, strip=strip, strict=strict,
            deterministic=deterministic, progress=progress,
        )  # fmt: skip
    _save(engine, file, time.perf_counter() - start, as_json, "built")


def tune(
    engine: Annotated[Path, typer.Argument(help="Engine file.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to write; default over the file.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default what the file was built for.")] = None,
    budget: Annotated[float | None, typer.Option(help="Seconds of tuning; default no limit.")] = None,
    opt_level: Annotated[int, typer.Option(help="1 to 5 (longest).")] = 3,
    timing_cache: Annotated[Path | None, typer.Option(help="JSON file; default ~/.cache/venturi/timing.json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan's summary as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress bar.")] = False,
) -> None:
    """Choose the kernels of an engine file anew, by timing them on this machine."""
    import venturi as vt

    start = time.perf_counter()
    with progress_bar(not quiet and not as_json) as progress:
        made = vt.tune(
            engine, device=device, budget=budget, opt_level=opt_level, timing_cache=timing_cache, progress=progress
        )
    _save(made, output or engine, time.perf_counter() - start, as_json, "tuned")


def _save(engine: Any, file: Path, seconds: float, as_json: bool, done: str) -> None:
    engine.save(file)
    report = engine.inspect()
    if as_json:
        emit_json({"engine": str(file), "build_s": seconds, "bytes": file.stat().st_size, **report.to_json()})
        return
    console.print(report.table())
    console.print(f"{done} in {seconds:.2f} s, {file.stat().st_size / 1e6:.1f} MB: {file}", highlight=False)
