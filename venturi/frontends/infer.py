"""Type inference: onnx's own symbolic inference, then ours for what it leaves open.

Ours runs the operators' references on meta tensors with every symbolic dimension replaced by a number, at three
different choices of numbers; small tensors computed from shapes stay real, so that reshapes by computed shapes
resolve. An output size equal at all three is static, one that equals a symbol's number each time is that symbol,
anything else is unknown. Three choices, one of them small, keep clamped sizes such as min(s, 77) from looking static.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import onnx
import onnx_ir as ir
import torch

from venturi.backends.reference.program import node_function
from venturi.core.errors import ShapeError
from venturi.ir.build import subgraphs
from venturi.ir.region import is_region
from venturi.ops.table import CONTROL, DATA_DEPENDENT, POINTWISE, RANDOM, SHAPED_BY_VALUES, find_op
from venturi.ops.tensors import STORAGE, logical_dtype, to_torch

log = logging.getLogger("venturi")
_BIG = 1024
_PROBES = ((3, 2), (53, 6), (211, 10))
_ERRORS = (Exception,)


def infer_types(model: ir.Model, *, fill: bool = True) -> None:
    """Annotate every value of `model` with dtype and shape as far as they can be known. Never raises."""
    _infer_standard(model)
    if fill:
        refine_types(model.graph)


def _infer_standard(model: ir.Model) -> None:
    """onnx.shape_inference on a copy without large weights, so that 2 GB models pass."""
    graph = model.graph
    held = {
        name: value.const_value
        for name, value in graph.initializers.items()
        if value.const_value is not None and value.const_value.size > _BIG and not value.is_graph_output()
    }
    values = [graph.initializers.pop(name) for name in held]
    extra = [v for v in values if not v.is_graph_input()]
    for value in values:
        value.const_value = None
    graph.inputs.extend(extra)
    found = None
    try:
        inferred = onnx.shape_inference.infer_shapes(
            ir.to_proto(model), check_type=False, strict_mode=False, data_prop=True
        )
        found = ir.from_proto(inferred)
    except Exception as exc:
        log.debug("onnx shape inference failed: %s", exc)
    finally:
        for value in extra:
            graph.inputs.remove(value)
        for value in values:
            value.const_value = held[value.name or ""]
            graph.initializers[value.name or ""] = value
    if found is not None:
        _copy_types(found.graph, graph)


def _copy_types(source: ir.Graph, target: ir.Graph) -> None:
    known = {v.name: v for n in source for v in n.outputs if v.name}
    for node in target:
        for value in node.outputs:
            other = known.get(value.name or "")
            if other is None:
                continue
            if value.type is None:
                value.type = other.type
            if value.shape is None and other.shape is not None:
                value.shape = other.shape
    for old, new in zip(source, target):
        if old.op_type == new.op_type:
            for a, b in zip(subgraphs(old), subgraphs(new)):
                _copy_types(a, b)


class Symbols:
    """The number of each symbolic dimension at each probe."""

    def __init__(self) -> None:
        self._numbers: dict[str, tuple[int, ...]] = {}

    def number(self, name: str, probe: int) -> int:
        i = len(self._numbers)
        return self._numbers.setdefault(name, tuple(base + step * i for base, step in _PROBES))[probe]

    def name_of(self, sizes: tuple[int, ...]) -> int | str | None:
        """What the sizes seen at all probes stand for."""
        if len(set(sizes)) == 1:
            return sizes[0]
        return next((n for n, numbers in self._numbers.items() if numbers == sizes), None)


def refine_types(graph: ir.Graph) -> None:
    """Fill unknown dtypes, shapes and dimensions of a whole graph."""
    symbols = Symbols()
    runs = [_probe(graph, symbols, probe) for probe in range(len(_PROBES))]
    for node in graph:
        for value in node.outputs:
            seen = [run.get(value) for run in runs]
            if all(isinstance(s, torch.Tensor) for s in seen):
                _annotate(value, seen, symbols)  # type: ignore[arg-type]


def infer_node(node: ir.Node) -> None:
    """Type the outputs of one node from its typed inputs; leaves open what cannot be known."""
    symbols = Symbols()
    runs = []
    for probe in range(len(_PROBES)):
        env = {v: _given(v, symbols, probe) for v in node.inputs if v is not None}
        runs.append(_run_node(node, env, symbols, probe))
    for i, value in enumerate(node.outputs):
        seen = [run[i] if run is not None and i < len(run) else None for run in runs]
        if all(isinstance(s, torch.Tensor) for s in seen):
            _annotate(value, seen, symbols)  # type: ignore[arg-type]


def _annotate(value: ir.Value, seen: list[torch.Tensor], symbols: Symbols) -> None:
    if value.dtype is None:
        value.type = ir.TensorType(logical_dtype(seen[0]))
    if len({s.dim() for s in seen}) != 1:
        return
    found = [symbols.name_of(sizes) for sizes in zip(*(tuple(s.shape) for s in seen))]
    found = [None if isinstance(d, str) and d.startswith("?") else d for d in found]
    if value.shape is not None:
        old = [d if isinstance(d, int) else d.value for d in value.shape]
        if len(old) != len(found):
            return
        found = [f if o is None else o for o, f in zip(old, found)]
        if found == old:
            return
    value.shape = ir.Shape(found)


def _given(value: ir.Value, symbols: Symbols, probe: int) -> Any:
    """A stand-in for a value: its own small constant, or a meta tensor of its annotated type."""
    if value.const_value is not None and not value.is_graph_input():
        if value.dtype == ir.DataType.STRING:
            return None
        if value.const_value.size <= _BIG:
            return to_torch(value.const_value.numpy(), value.dtype)
    if value.dtype not in STORAGE or value.shape is None or not isinstance(value.type, ir.TensorType):
        return None
    shape = [
        d
        if isinstance(d, int)
        else symbols.number(str(d.value) if d.value is not None else f"?{value.name}.{i}", probe)
        for i, d in enumerate(value.shape)
    ]
    return torch.empty(shape, dtype=STORAGE[value.dtype], device="meta")


def _probe(graph: ir.Graph, symbols: Symbols, probe: int) -> dict[ir.Value, Any]:
    env: dict[ir.Value, Any] = {}
    for value in (*graph.inputs, *graph.initializers.values()):
        env[value] = _given(value, symbols, probe)
    for node in graph:
        result = _run_node(node, env, symbols, probe)
        for i, value in enumerate(node.outputs):
            out = result[i] if result is not None and i < len(result) else None
            env[value] = out if isinstance(out, torch.Tensor) else _given(value, symbols, probe)
    return env


def _run_node(node: ir.Node, env: Mapping[ir.Value, Any], symbols: Symbols, probe: int) -> tuple[Any, ...] | None:
    """The node's reference on stand-ins; None when it cannot run on them."""
    inputs = [None if v is None else env.get(v) for v in node.inputs]
    if any(v is not None and x is None for v, x in zip(node.inputs, inputs)):
        return None
    real = all(x is None or x.device.type != "meta" for x in inputs)
    op = None
    if not is_region(node):
        op = find_op(node.domain, node.op_type)
        if op is None or CONTROL in op.traits or (not real and {DATA_DEPENDENT, RANDOM} & op.traits):
            return None
    try:
        with torch.inference_mode():
            if not real and op is not None and POINTWISE in op.traits and len(node.outputs) == 1:
                return (_pointwise(node, inputs),)
            result = node_function(node, device="cpu" if real else "meta")(*_uniform(node, inputs))
    except _ERRORS as exc:
        log.debug("no inference for %s: %s", node.name, exc)
        return None
    outputs = result if isinstance(result, tuple) else (result,)
    return tuple(
        o.to("meta") if isinstance(o, torch.Tensor) and o.device.type != "meta" and o.numel() > _BIG else o
        for o in outputs
    )


def _pointwise(node: ir.Node, inputs: list[Any]) -> torch.Tensor:
    """Shapes broadcast; the type is what single elements give. torch's own meta kernels would import its compiler."""
    single = [None if x is None else torch.ones((1,) * x.dim(), dtype=x.dtype) for x in inputs]
    result = node_function(node, device="cpu")(*single)
    shaped = inputs[:1] if node.op_type == "CastLike" else inputs
    shape = torch.broadcast_shapes(*(x.shape for x in shaped if x is not None))
    return torch.empty(shape, dtype=result.dtype, device="meta")


_HOST_OPERANDS = SHAPED_BY_VALUES | {"CumSum", "CumProd", "Trilu"}


def _uniform(node: ir.Node, inputs: list[Any]) -> list[Any]:
    """Torch wants operands on one device: real ones go to meta, except those whose values are read on the host."""
    if not any(x is not None and x.device.type == "meta" for x in inputs):
        return inputs
    if is_region(node) or node.op_type not in _HOST_OPERANDS:
        return [x if x is None else x.to("meta") for x in inputs]
    return [x if x is None or i else x.to("meta") for i, x in enumerate(inputs)]


def check_node(node: ir.Node) -> None:
    """Type a node that was just made; raises ShapeError when its operator refuses the input shapes or types."""
    symbols = Symbols()
    env = {v: _given(v, symbols, 1) for v in node.inputs if v is not None}
    if any(v is not None and env[v] is None for v in node.inputs):
        return
    op = find_op(node.domain, node.op_type)
    if op is None or {CONTROL, DATA_DEPENDENT} & op.traits:
        infer_node(node)
        return
    inputs = [None if v is None else env[v] for v in node.inputs]
    real = all(x is None or x.device.type != "meta" for x in inputs)
    try:
        with torch.inference_mode():
            node_function(node, device="cpu" if real else "meta")(*_uniform(node, inputs))
    except NotImplementedError:
        return
    except Exception as exc:
        shapes = ", ".join(f"{v.name}: [{', '.join(map(str, v.shape or ()))}]" for v in node.inputs if v is not None)
        raise ShapeError(
            f"{node.op_type} refuses ({shapes}): {str(exc).splitlines()[0]}", where=node.name or ""
        ) from exc
    infer_node(node)
