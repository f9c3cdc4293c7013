"""A Plan bound to kernels: the flat list of calls that every context of an engine runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from venturi.backends.base import Backend, Kernel, RegionView, Tactic
from venturi.core.errors import EngineError, at
from venturi.core.log import logger
from venturi.engine.plan import Step
from venturi.engine.stability import stable_values
from venturi.ir.build import captured, subgraphs
from venturi.ir.region import is_region
from venturi.tuning.cache import Measurement


@dataclass(frozen=True)
class Call:
    """One kernel call: env slots to read, to write, and to forget afterwards."""

    step: Step
    kernel: Kernel
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dead: tuple[int, ...]
    stable: bool


@dataclass(frozen=True)
class Executable:
    """Immutable and shared by contexts. `template` is the environment with its constants in place."""

    calls: tuple[Call, ...]
    template: tuple[Any, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    last_use: Mapping[int, int]

    @property
    def num_slots(self) -> int:
        return len(self.template)


def reads_of(node: ir.Node, weights: Mapping[str, Any]) -> list[ir.Value]:
    """The computed values a node's kernel takes, in order: dynamic inputs, then what its subgraphs capture."""
    own = [v for v in node.inputs if v is not None and (v.name or "") not in weights]
    extra = [] if is_region(node) else [v for g in subgraphs(node) for v in captured(g)]
    return own + extra


def bind_plan(
    graph: ir.Graph,
    steps: Sequence[Step],
    weights: Mapping[str, Any],
    backend: Backend,
    bound_one: Callable[[], None] = lambda: None,
) -> Executable:
    """Prepare every kernel the steps name. A tactic that cannot run on this machine is replaced by the first that
    can; the step then says so. `bound_one` is called after each. Raises EngineError when steps and graph disagree."""
    nodes = list(graph)
    if len(nodes) != len(steps):
        raise EngineError(f"the plan has {len(steps)} steps for {len(nodes)} nodes")
    kernels, bound = [], []
    for node, step in zip(nodes, steps):
        tactic = backend.tactic(step.tactic)
        if tactic is None or step.name != node.name:
            raise EngineError(f"the plan's step {step.name!r} ({step.tactic}) does not fit node {node.name!r}")
        with at(f"step {step.name!r}"):
            region = RegionView(node, weights)
            if isinstance(reason := tactic.match(region), str):
                tactic, step = _replacement(region, step, reason, backend)
            kernels.append(tactic.bind(region, step.config))
            bound.append(step)
            bound_one()
    return link(graph, bound, kernels, weights)


def _replacement(region: RegionView, step: Step, reason: str, backend: Backend) -> tuple[Tactic, Step]:
    for tactic in backend.tactics:
        configs = tactic.match(region)
        if not isinstance(configs, str):
            logger.warning("step %r: %s cannot run here (%s); using %s", step.name, step.tactic, reason, tactic.name)
            lost = Measurement(step.tactic, dict(step.config), reason=f"not on this machine: {reason}")
            chosen = Measurement(tactic.name, dict(configs[0]), reason="first match at load")
            return tactic, replace(step, tactic=tactic.name, config=dict(configs[0]), measurements=(chosen, lost))
    raise EngineError(f"no tactic of {backend.name} can run here; {step.tactic}: {reason}")


def link(graph: ir.Graph, steps: Sequence[Step], kernels: Sequence[Kernel], weights: Mapping[str, Any]) -> Executable:
    """Assign slots and lifetimes."""
    slots: dict[ir.Value, int] = {}
    constants: dict[int, Any] = {}

    def slot(value: ir.Value) -> int:
        if value not in slots:
            slots[value] = len(slots)
            stored = weights.get(value.name or "") if value.is_initializer() else None
            if stored is not None:
                constants[slots[value]] = stored
        return slots[value]

    inputs = tuple(slot(v) for v in graph.inputs)
    nodes = list(graph)
    reads = [reads_of(n, weights) for n in nodes]
    last: dict[ir.Value, int] = {}
    for i, values in enumerate(reads):
        for value in values:
            last[value] = i
    keep = {*graph.outputs, *graph.initializers.values()}
    stable = stable_values(graph)
    calls = []
    for i, (node, step, kernel) in enumerate(zip(nodes, steps, kernels)):
        dead = [v for v in dict.fromkeys(reads[i]) if last[v] == i and v not in keep]
        dead += [v for v in node.outputs if v not in last and v not in keep]
        calls.append(
            Call(
                step,
                kernel,
                tuple(slot(v) for v in reads[i]),
                tuple(slot(v) for v in node.outputs),
                tuple(slot(v) for v in dead),
                all(v in stable for v in node.outputs),
            )
        )
    outputs = tuple(slot(v) for v in graph.outputs)
    template: list[Any] = [None] * len(slots)
    for at_slot, stored in constants.items():
        template[at_slot] = stored
    return Executable(
        tuple(calls), tuple(template), inputs, outputs, {slots[v]: i for v, i in last.items() if v in slots}
    )
