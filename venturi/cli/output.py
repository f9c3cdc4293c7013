"""How commands speak: tables for people on stdout, JSON for machines, errors and progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from venturi.core.errors import ShapeError, VenturiError
from venturi.core.progress import ProgressCallback, ProgressEvent

# Names come from models: brackets in them are no markup.
console = Console(width=None if sys.stdout.isatty() else 140, markup=False)
errors = Console(stderr=True)


def emit_json(data: Any) -> None:
    print(json.dumps(data, indent=1, default=str))


def fail(exc: VenturiError) -> None:
    errors.print(f"[bold red]error[/] ({exc.code}): ", end="")
    errors.print(str(exc), markup=False, highlight=False)


def table(title: str, columns: list[str], rows: list[list[Any]]) -> Table:
    """Numbers are right-aligned; cells are plain text, brackets included."""
    out = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        numeric = all(isinstance(r[i], int | float) or r[i] in ("", "-") for r in rows) and bool(rows)
        out.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        out.add_row(*(Text(f"{c:.4g}" if isinstance(c, float) else str(c)) for c in row))
    return out


@contextmanager
def progress_bar(enabled: bool = True) -> Iterator[ProgressCallback | None]:
    """A bar a phase on stderr; nothing when disabled."""
    if not enabled:
        yield None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("{task.description:>8}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(), TextColumn("{task.fields[detail]}", markup=False), console=errors, transient=True,
    ) as bar:  # fmt: skip
        tasks: dict[str, Any] = {}

        def show(event: ProgressEvent) -> None:
            if event.phase not in tasks:
                tasks[event.phase] = bar.add_task(event.phase, total=event.num_steps, detail="")
            bar.update(tasks[event.phase], completed=event.step, total=event.num_steps, detail=event.detail[:40])

        yield show


def parse_shapes(text: str | None) -> dict[str, tuple[int, ...]]:
    """`x:1x3x224x224,ids:1x128` → shapes by input name. Raises ShapeError with the expected form."""
    found: dict[str, tuple[int, ...]] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        name, _, dims = part.strip().rpartition(":")
        try:
            if not name:
                raise ValueError("no input name")
            found[name] = tuple(int(d) for d in dims.lower().split("x")) if dims else ()
        except ValueError as exc:
            raise ShapeError(f"shape {part!r} is not valid ({exc}); expected NAME:1x3x224x224[,NAME:...]") from exc
    return found
