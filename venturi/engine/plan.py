"""The Plan: how a graph runs on one target, as pure data that round-trips through JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from venturi.core.errors import EngineError
from venturi.tuning.cache import Measurement

PLAN_FORMAT = 1


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: `shape` holds ints, names of free dimensions, or None; `kind` tensor, sequence, ..."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None
    kind: str = "tensor"


@dataclass(frozen=True)
class Step:
    """One Region: which tactic runs it, what it stands for, what else was tried."""

    name: str
    kind: str
    ops: tuple[str, ...]
    tactic: str
    config: dict[str, Any]
    sources: tuple[str, ...]
    measurements: tuple[Measurement, ...] = ()
    flops: float = 0.0
    bytes: int = 0
    layout: str = ""

    @property
    def time_us(self) -> float | None:
        """Of the chosen candidate timed alone."""
        chosen = (m for m in self.measurements if m.tactic == self.tactic and m.config == self.config)
        return next((m.median_us for m in chosen if m.median_us), None)


@dataclass(frozen=True)
class Reorder:
    """`bytes` that `step` lays out anew before it reads them: `source` (a step or an input) left them in another order
    than `tactic` reads."""

    source: str
    step: str
    tactic: str
    lies: str
    wanted: str
    bytes: int
    why: str


@dataclass(frozen=True)
class Plan:
    """`inputs`/`outputs` are the engine's interface; `steps` are in execution order, one per node of graph.onnx.

    `threads`: a run on the CPU takes at most so many; None: all. `reorders`: layout changes that are left, at the tuned
    shapes; None where nobody looked (other devices, offline builds, inputs without sizes).
    """

    target: str
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    steps: tuple[Step, ...]
    profiles: tuple[dict[str, list[list[int]]], ...] = ()
    tuned_shapes: dict[str, list[int]] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=dict)
    timings_ms: dict[str, float] = field(default_factory=dict)
    threads: int | None = None
    reorders: tuple[Reorder, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        return {"format": PLAN_FORMAT, **asdict(self)}

    @staticmethod
    def from_json(data: Any) -> Plan:
        """Raises EngineError when `data` is not a plan of this format."""
        try:
            if data["format"] != PLAN_FORMAT:
                raise EngineError(f"plan format {data['format']!r}, this version reads {PLAN_FORMAT}")
            return Plan(
                str(data["target"]),
                str(data["precision"]),
                tuple(_spec(s) for s in data["inputs"]),
                tuple(_spec(s) for s in data["outputs"]),
                tuple(_step(s) for s in data["steps"]),
                tuple(dict(p) for p in data["profiles"]),
                {str(k): [int(d) for d in v] for k, v in data["tuned_shapes"].items()},
                {str(k): int(v) for k, v in data["passes"].items()},
                {str(k): float(v) for k, v in data["timings_ms"].items()},
                None if data.get("threads") is None else int(data["threads"]),
                None if data.get("reorders") is None else tuple(_reorder(r) for r in data["reorders"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise EngineError(f"the plan is damaged: {type(exc).__name__} {exc}") from exc


def _spec(s: dict[str, Any]) -> TensorSpec:
    shape = None if s["shape"] is None else tuple(d if d is None or isinstance(d, str) else int(d) for d in s["shape"])
    return TensorSpec(str(s["name"]), str(s["dtype"]), shape, str(s["kind"]))


def _reorder(r: dict[str, Any]) -> Reorder:
    source, step, tactic, lies, wanted, why = (
        str(r[name]) for name in ("source", "step", "tactic", "lies", "wanted", "why")
    )
    return Reorder(source, step, tactic, lies, wanted, int(r["bytes"]), why)


def _step(s: dict[str, Any]) -> Step:
    return Step(
        str(s["name"]),
        str(s["kind"]),
        tuple(map(str, s["ops"])),
        str(s["tactic"]),
        dict(s["config"]),
        tuple(map(str, s["sources"])),
        tuple(Measurement(**m) for m in s["measurements"]),
        float(s["flops"]),
        int(s["bytes"]),
        str(s["layout"]),
    )
