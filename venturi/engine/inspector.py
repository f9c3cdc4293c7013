"""What an engine is made of, as data and as a table. Imports neither torch nor onnx: `venturi inspect` is quick."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from venturi.engine.plan import Plan


@dataclass(frozen=True)
class Layer:
    """One step: its time (us), share of the total, and where it comes from."""

    name: str
    kind: str
    ops: tuple[str, ...]
    tactic: str
    time_us: float | None
    share: float
    gflops: float | None
    sources: tuple[str, ...]
    candidates: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Report:
    """An engine's layers and totals. `str()` is a table."""

    target: str
    precision: str
    inputs: tuple[dict[str, Any], ...]
    outputs: tuple[dict[str, Any], ...]
    layers: tuple[Layer, ...]
    total_us: float
    passes: dict[str, int]
    arena_bytes: int | None = None
    library_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        text = StringIO()
        Console(file=text, width=140, markup=False).print(self.table())
        return text.getvalue()

    def table(self) -> Any:
        """A rich table, slowest information first: one row a layer in execution order."""
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=f"{len(self.layers)} layers, {self.total_us / 1e3:.3f} ms on {self.target} ({self.precision})"
        )
        for column in ("#", "layer", "operators", "tactic", "us", "%", "GFLOP/s", "source"):
            table.add_column(
                column,
                justify="right" if column in ("#", "us", "%", "GFLOP/s") else "left",
                overflow="ellipsis",
                no_wrap=True,
            )
        for i, layer in enumerate(self.layers):
            cells = (
                str(i),
                layer.name,
                "+".join(layer.ops),
                layer.tactic,
                "-" if layer.time_us is None else f"{layer.time_us:.1f}",
                "-" if layer.time_us is None else f"{100 * layer.share:.1f}",
                "-" if layer.gflops is None else f"{layer.gflops:.0f}",
                ", ".join(layer.sources),
            )
            table.add_row(*map(Text, cells))
        return table


def make_report(plan: Plan, times_us: list[float] | None = None, binding: Any = None) -> Report:
    """`times_us` by step replaces the times measured at build; `binding` adds the memory of bound shapes."""
    times = [s.time_us for s in plan.steps] if times_us is None else list(times_us)
    total = sum(t or 0.0 for t in times)
    layers = tuple(
        Layer(
            s.name, s.kind, s.ops, s.tactic, t, (t or 0.0) / total if total else 0.0,
            s.flops / t / 1e3 if t and s.flops else None, s.sources, tuple(asdict(m) for m in s.measurements),
        )
        for s, t in zip(plan.steps, times)
    )  # fmt: skip
    return Report(
        plan.target, plan.precision, tuple(asdict(s) for s in plan.inputs), tuple(asdict(s) for s in plan.outputs),
        layers, total, dict(plan.passes),
        None if binding is None else binding.arena_bytes, None if binding is None else binding.library_bytes,
    )  # fmt: skip
