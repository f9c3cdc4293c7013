"""What an engine is made of, as data and as a table. Imports neither torch nor onnx: `venturi inspect` is quick."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from venturi.backends.part_view import PAIR
from venturi.engine.plan import Plan, Step


@dataclass(frozen=True)
class Layer:
    """One step: its time (us), share of the total, what it computes and moves a second, and where it comes from.

    `roofline`: what the operations or the bytes would take at the device's best, as torch's product and sum measure it,
    in percent of the time; above 100 where operands came from a cache or the step is better than that product.
    """

    name: str
    kind: str
    ops: tuple[str, ...]
    tactic: str
    time_us: float | None
    share: float
    gflops: float | None
    gbytes: float | None
    roofline: float | None
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
        numbers = ["#", "us", "%", "GFLOP/s", "GB/s"]
        has_roofline = any(layer.roofline is not None for layer in self.layers)
        numbers += ["roof %"] if has_roofline else []
        for column in ("#", "layer", "operators", "tactic", *numbers[1:], "source"):
            table.add_column(
                column,
                justify="right" if column in numbers else "left",
                min_width=7 if column in numbers[1:] else None if column == "#" else 10,
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
                *("-" if x is None else f"{x:.0f}" for x in (layer.gflops, layer.gbytes)),
                *(["-" if layer.roofline is None else f"{layer.roofline:.0f}"] if has_roofline else []),
                ", ".join(layer.sources),
            )
            table.add_row(*map(Text, cells))
        return table

    def trace(self) -> dict[str, Any]:
        """The layers one after the other in Chrome's trace format, for ui.perfetto.dev or chrome://tracing."""
        events: list[dict[str, Any]] = [
            {"ph": "M", "pid": 0, "tid": 0, "name": "thread_name", "args": {"name": f"{self.target} {self.precision}"}}
        ]
        at = 0.0
        for layer in self.layers:
            spent = layer.time_us or 0.0
            args = {
                "tactic": layer.tactic, "operators": list(layer.ops), "source nodes": list(layer.sources),
                "GFLOP/s": layer.gflops, "GB/s": layer.gbytes, "roofline %": layer.roofline,
            }  # fmt: skip
            shown = {k: v for k, v in args.items() if v is not None}
            events.append(
                {"ph": "X", "pid": 0, "tid": 0, "ts": at, "dur": spent, "name": layer.name, "cat": layer.kind}
                | {"args": shown}
            )
            at += spent
        return {"traceEvents": events, "displayTimeUnit": "ns"}


def _is_of_bytes(step: Step) -> bool:
    return step.kind == "quantized" or (step.kind == PAIR and "DequantizeLinear" in step.ops)


def make_report(plan: Plan, times_us: list[float] | None = None, binding: Any = None, peaks: Any = None) -> Report:
    """`times_us` by step replaces the times measured at build; `binding` adds the memory of bound shapes, `peaks` the
    share of the roofline (not of quantized steps, whose operations are of another kind). Steps that were planned
    without values (opt level 0) have no rates."""
    times = [s.time_us for s in plan.steps] if times_us is None else list(times_us)
    total = sum(t or 0.0 for t in times)
    layers = tuple(
        Layer(
            s.name, s.kind, s.ops, s.tactic, t, (t or 0.0) / total if total else 0.0,
            s.flops / t / 1e3 if t and s.flops else None, s.bytes / t / 1e3 if t and s.bytes else None,
            100 * peaks.least_us(s.flops, s.bytes) / t if peaks and t and s.bytes and not _is_of_bytes(s) else None,
            s.sources, tuple(asdict(m) for m in s.measurements),
        )
        for s, t in zip(plan.steps, times)
    )  # fmt: skip
    return Report(
        plan.target, plan.precision, tuple(asdict(s) for s in plan.inputs), tuple(asdict(s) for s in plan.outputs),
        layers, total, dict(plan.passes),
        None if binding is None else binding.arena_bytes, None if binding is None else binding.library_bytes,
    )  # fmt: skip
