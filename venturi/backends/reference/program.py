"""Compiles a graph once into a flat list of calls of operator references, and runs it.

This is the interpreter, the body of every Region without a better kernel, and the body of If, Loop and Scan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from venturi.core.errors import RequestError, VenturiError
from venturi.core.log import logger
from venturi.ir.build import captured, subgraphs
from venturi.ir.region import body_of, is_region
from venturi.ops.table import CONTROL, OpContext, get_op
from venturi.ops.tensors import to_torch

Fn = Callable[..., Any]
Hook = Callable[[ir.Node, list[Any], tuple[Any, ...]], None]


# What torch and Python raise when an operator refuses its inputs.
OPERATOR_ERRORS = (RuntimeError, IndexError, ValueError, TypeError, AttributeError, AssertionError, KeyError)


@dataclass(frozen=True)
class Step:
    """One call: read `inputs` (slot -1 is an absent input), write `outputs`, then forget `dead`."""

    node: ir.Node
    fn: Fn
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dead: tuple[int, ...]
    single: bool


class Program:
    """`run(args)` maps the graph's inputs (then captured outer values) to its outputs.

    Weights come from `constants` by name when given there (so that several programs share them), else from the
    graph's own initializers. Thread-safe: all state of a run is local to it.
    """

    def __init__(
        self,
        graph: ir.Graph,
        constants: Mapping[str, Any] | None = None,
        captures: Sequence[ir.Value] = (),
        device: str = "cpu",
    ) -> None:
        self.graph = graph
        self.device = device
        self._slots: dict[ir.Value, int] = {}
        self._constants: list[tuple[int, Any]] = []
        self._shared = constants or {}
        self.num_inputs = len(graph.inputs) + len(captures)
        for value in (*graph.inputs, *captures):
            self._slot(value)
        for value in graph.initializers.values():
            if not value.is_graph_input():
                self._add_constant(value)
        self.steps = self._compile(list(graph))
        self._outputs = tuple(self._slot(v) for v in graph.outputs)

    def _slot(self, value: ir.Value) -> int:
        return self._slots.setdefault(value, len(self._slots))

    def _add_constant(self, value: ir.Value) -> None:
        stored = self._shared.get(value.name or "")
        if stored is None:
            assert value.const_value is not None, f"initializer {value.name} has no data"
            stored = to_torch(value.const_value.numpy(), value.const_value.dtype)
            if self.device != "cpu" and isinstance(stored, torch.Tensor):
                stored = stored.to(self.device)
        self._constants.append((self._slot(value), stored))

    def _compile(self, nodes: list[ir.Node]) -> list[Step]:
        reads = []
        for node in nodes:
            extra = [v for g in subgraphs(node) for v in captured(g)] if not is_region(node) else []
            reads.append([*node.inputs, *extra])
        last: dict[ir.Value, int] = {}
        for i, values in enumerate(reads):
            for value in values:
                if value is not None:
                    last[value] = i
        keep = {*self.graph.outputs, *self.graph.initializers.values()}
        steps = []
        for i, (node, values) in enumerate(zip(nodes, reads)):
            dead = [v for v in dict.fromkeys(values) if v is not None and last[v] == i and v not in keep]
            dead += [v for v in node.outputs if v not in last and v not in keep]
            steps.append(
                Step(
                    node,
                    _on_device(node_function(node, self._shared, self.device), self.device),
                    tuple(-1 if v is None else self._slot(v) for v in values),
                    tuple(self._slot(v) for v in node.outputs),
                    tuple(self._slot(v) for v in dead),
                    len(node.outputs) == 1,
                )
            )
        return steps

    def run(self, args: Sequence[Any], hook: Hook | None = None) -> list[Any]:
        """Raises RequestError naming the node when an operator refuses its inputs."""
        env: list[Any] = [None] * (len(self._slots) + 1)
        env[: len(args)] = args
        for slot, stored in self._constants:
            env[slot] = stored
        step = None
        try:
            for step in self.steps:
                inputs = [env[i] for i in step.inputs]
                result = step.fn(*inputs)
                outputs = result if isinstance(result, tuple) else (result,)
                for slot, out in zip(step.outputs, outputs):
                    env[slot] = out
                if hook is not None:
                    hook(step.node, inputs, outputs)
                for slot in step.dead:
                    env[slot] = None
        except VenturiError as exc:
            exc.where = exc.where or _place(step)
            raise
        except OPERATOR_ERRORS as exc:
            raise RequestError(
                f"{type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ''}", where=_place(step)
            ) from exc
        return [env[i] for i in self._outputs]


def _on_device(fn: Fn, device: str) -> Fn:
    """On an accelerator, results of host-side references (Shape, strings, numpy) move to it, and a reference that
    refuses device tensors gets host copies. The interpreter is about meaning; the log says where this happened."""
    if device in ("cpu", "meta"):
        return fn

    def call(*args: Any) -> Any:
        try:
            result = fn(*args)
        except (RuntimeError, TypeError) as exc:
            logger.debug("reference runs on the host: %s", exc)
            result = fn(*(_moved(a, "cpu") for a in args))
        return _moved(result, device)

    return call


def _moved(x: Any, device: str) -> Any:
    if isinstance(x, torch.Tensor):
        return x.to(device)
    if isinstance(x, tuple | list):
        return type(x)(_moved(v, device) for v in x)
    return x


def _place(step: Step | None) -> str:
    return f"node {step.node.name!r} ({step.node.op_type})" if step else ""


def node_function(node: ir.Node, constants: Mapping[str, Any] | None = None, device: str = "cpu") -> Fn:
    """The reference of one node as a function of its inputs (then of what its subgraphs capture)."""
    if is_region(node):
        program = Program(body_of(node), constants, device=device)
        return lambda *args: tuple(program.run(args))
    op = get_op(node.domain, node.op_type)
    keywords: dict[str, Any] = {}
    bodies: list[tuple[str, Program, int]] = []
    for name, a in node.attributes.items():
        if a.type == ir.AttributeType.GRAPH:
            outer = captured(a.as_graph())
            bodies.append((name, Program(a.as_graph(), constants, outer, device), len(outer)))
        else:
            keywords[name] = attribute_value(a, device)
    if op.takes_ctx:
        keywords["ctx"] = OpContext(
            tuple(None if v is None else v.dtype for v in node.inputs),
            tuple(v.dtype for v in node.outputs),
            _used_outputs(node),
            node.name or "",
        )
    reference = op.reference
    if bodies or CONTROL in op.traits:
        return _with_bodies(reference, keywords, bodies, len(node.inputs))
    if keywords:
        return lambda *args: reference(*args, **keywords)
    return reference


def _used_outputs(node: ir.Node) -> int:
    """Outputs up to the last one that has a name or a use (ONNX leaves trailing outputs unnamed)."""
    used = [i for i, v in enumerate(node.outputs) if v.name or v.uses() or v.is_graph_output()]
    return used[-1] + 1 if used else len(node.outputs)


def _with_bodies(reference: Fn, keywords: dict[str, Any], bodies: list[tuple[str, Program, int]], count: int) -> Fn:
    def call(*args: Any) -> Any:
        at, bound = count, dict(keywords)
        for name, program, extra in bodies:
            outer = args[at : at + extra]
            at += extra
            bound[name] = lambda *inner, p=program, o=outer: tuple(p.run([*inner, *o]))
        return reference(*args[:count], **bound)

    return call


def attribute_value(a: ir.Attr, device: str = "cpu") -> Any:
    """An attribute as references take it: Python values, tensors as stored tensors."""
    kind = a.type
    if kind == ir.AttributeType.TENSOR:
        tensor = a.as_tensor()
        stored = to_torch(tensor.numpy(), tensor.dtype)
        return stored.to(device) if isinstance(stored, torch.Tensor) else stored
    if kind == ir.AttributeType.TENSORS:
        return [to_torch(t.numpy(), t.dtype) for t in a.as_tensors()]
    if kind == ir.AttributeType.SPARSE_TENSOR:
        return _dense(a.value)
    return list(a.value) if isinstance(a.value, tuple | list) else a.value


def _dense(sparse: Any) -> Any:
    values, indices = to_torch(sparse.values.numpy()), to_torch(sparse.indices.numpy())
    out = torch.zeros(list(sparse.dims), dtype=values.dtype)
    if indices.dim() == 1:
        out.view(-1)[indices] = values
    else:
        out[tuple(indices.T)] = values
    return out
