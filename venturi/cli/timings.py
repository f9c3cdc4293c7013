"""`venturi timings`: look at timing caches, merge them, and drop what is out of date."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from venturi.cli.output import console, emit_json, table

app = typer.Typer(no_args_is_help=True)
JsonFlag = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
CacheFile = Annotated[Path | None, typer.Argument(help="JSON file; default ~/.cache/venturi/timing.json.")]


@app.command("show", epilog="Example: venturi timings show timing.json --problem Conv")
def show(
    file: CacheFile = None,
    problem: Annotated[str, typer.Option(help="Only problems whose text contains this, with their candidates.")] = "",
    as_json: JsonFlag = False,
) -> None:
    """The machines of a cache, or every candidate of some problems: its time, or why it was rejected."""
    machines = _open(file).machines()
    found = [
        (json.loads(machine), name, measurements)
        for machine, problems in machines.items()
        for name, measurements in problems.items()
        if problem in name
    ]
    if as_json:
        emit_json([{"machine": m, "problem": p, "candidates": [vars(c) for c in cs]} for m, p, cs in found])
        return
    if not problem:
        rows = [[*_names(json.loads(m)), len(p)] for m, p in machines.items()]
        console.print(table("machines", ["device", "cpu", "kernels", "problems"], rows))
        return
    for machine, name, candidates in found:
        rows = [
            [c.tactic, json.dumps(c.config), "-" if c.median_us is None else c.median_us, c.spread_us, c.reason]
            for c in candidates
        ]
        title = f"{name} on {machine.get('device', '')}"
        console.print(table(title, ["tactic", "configuration", "us", "spread", "rejected because"], rows))


@app.command("merge", epilog="Example: venturi timings merge a.json b.json -o both.json")
def merge(
    files: Annotated[list[Path], typer.Argument(help="Caches; of a problem in several, the first one's times stay.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write; may be one of the files.")],
    as_json: JsonFlag = False,
) -> None:
    """Join timing caches, those of other machines included."""
    from venturi.tuning.cache import TimingCache

    caches = [_open(f) for f in files]
    merged = TimingCache()
    merged.path = output
    for cache in caches:
        merged.merge(cache)
    merged.save(replace=True)
    _report(merged, output, as_json)


@app.command("drop", epilog="Example: venturi timings drop timing.json --stale")
def drop(
    file: CacheFile = None,
    problem: Annotated[str, typer.Option(help="Drop problems whose text contains this.")] = "",
    stale: Annotated[
        bool, typer.Option("--stale", help="Drop machines of other versions of Venturi's kernels.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Take problems out of a cache, so that the next build times them again."""
    from venturi.core.errors import TuningError

    if not problem and not stale:
        raise TuningError("nothing to drop: pass --problem TEXT or --stale")
    cache = _open(file)
    cache.drop(problem, stale)
    cache.save(replace=True)
    _report(cache, cache.path or Path(), as_json)


def _open(file: Path | None) -> Any:
    from venturi.core.errors import TuningError
    from venturi.tuning.cache import TimingCache, default_path

    path = default_path() if file is None else file
    if not path.exists():
        raise TuningError("no timing cache; build something with opt level 1 or more first", where=str(path))
    return TimingCache(path)


def _report(cache: Any, path: Path, as_json: bool) -> None:
    known = cache.machines()
    counts = {"file": str(path), "machines": len(known), "problems": sum(map(len, known.values()))}
    if as_json:
        emit_json(counts)
        return
    console.print(f"{counts['problems']} problems of {counts['machines']} machines: {path}", highlight=False)


def _names(machine: dict[str, str]) -> list[str]:
    return [machine.get(k, "")[:40] for k in ("device", "cpu", "kernels")]
