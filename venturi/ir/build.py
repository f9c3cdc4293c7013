"""Small constructors for onnx-ir graphs. Nodes are named after what they do; values get unique names."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

_counter = itertools.count()
_SUFFIX = re.compile(r"(?:__\d+)+$")


def fresh_name(stem: str) -> str:
    """A name no value made in this process has; `reserve_names` keeps it clear of imported ones."""
    return f"{stem_of(stem)}__{next(_counter)}"


def stem_of(name: str) -> str:
    """The name without the numbers `fresh_name` appended."""
    return _SUFFIX.sub("", name) or name


def reserve_names(names: Iterable[str | None]) -> None:
    """Move the counter past every number that an imported name already carries."""
    global _counter
    used = [int(m.group(0).rsplit("__", 1)[1]) for n in names if n and (m := _SUFFIX.search(n))]
    if used and max(used) < 10**12:
        _counter = itertools.count(max(next(_counter), max(used) + 1))


def attr(name: str, value: Any) -> ir.Attr:
    """A Python value as an attribute; numpy arrays become tensors, graphs stay graphs."""
    if isinstance(value, np.ndarray):
        value = ir.tensor(value)
    if isinstance(value, ir.Graph):
        return ir.AttrGraph(name, value)
    if isinstance(value, bool):
        value = int(value)
    converted: ir.Attr = ir.convenience.convert_attribute(name, value)
    return converted


def make_node(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attrs: Mapping[str, Any] | None = None,
    *,
    domain: str = "",
    outputs: Sequence[ir.Value] | None = None,
    num_outputs: int = 1,
    name: str | None = None,
) -> ir.Node:
    """A detached node; None attribute values are left out."""
    converted = [attr(k, v) for k, v in (attrs or {}).items() if v is not None]
    name = name or fresh_name(op_type)
    if outputs is None:
        outputs = [ir.Value(name=fresh_name(name)) for _ in range(num_outputs)]
    return ir.Node(domain, op_type, list(inputs), converted, outputs=list(outputs), name=name)


def constant(graph: ir.Graph, array: np.ndarray[Any, Any] | ir.TensorProtocol, stem: str = "const") -> ir.Value:
    """Register an initializer in `graph` and return its value."""
    tensor = ir.tensor(array) if isinstance(array, np.ndarray) else array
    value = ir.Value(
        name=fresh_name(stem),
        shape=ir.Shape(list(tensor.shape.numpy())),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def int64s(graph: ir.Graph, values: Sequence[int] | int, stem: str = "const") -> ir.Value:
    return constant(graph, np.array(values, dtype=np.int64), stem)


def get_attr(node: ir.Node, name: str, default: Any = None) -> Any:
    """The plain value of an attribute (lists for repeated ones)."""
    found = node.attributes.get(name)
    if found is None:
        return default
    value = found.value
    return list(value) if isinstance(value, tuple) else value


def const_array(value: ir.Value | None, max_elements: int | None = None) -> np.ndarray[Any, Any] | None:
    """The numpy value of an initializer, or None. `max_elements` keeps pattern checks off large weights."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    if max_elements is not None and value.const_value.size > max_elements:
        return None
    array: np.ndarray[Any, Any] = value.const_value.numpy()
    return array


def scalar(value: ir.Value | None) -> float | None:
    """The number of a one-element constant, or None."""
    array = const_array(value, 1)
    if array is None or array.size != 1 or array.dtype == object:
        return None
    return float(array.reshape(-1)[0])


def ints(value: ir.Value | None) -> list[int] | None:
    """The list of a small constant integer tensor, or None."""
    array = const_array(value, 1024)
    if array is None or array.dtype.kind not in "iu":
        return None
    return [int(v) for v in array.reshape(-1)]


def static_shape(value: ir.Value | None) -> list[int] | None:
    """The shape when every dimension is a known number, else None."""
    if value is None or value.shape is None:
        return None
    dims = [d for d in value.shape if isinstance(d, int)]
    return dims if len(dims) == len(value.shape) else None


def rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def dim(value: ir.Value | None, axis: int) -> int | None:
    """One dimension as a number, or None when unknown or symbolic."""
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    d = value.shape[axis]
    return d if isinstance(d, int) else None


def copy_type(source: ir.Value, target: ir.Value) -> None:
    target.type = source.type
    target.shape = source.shape


def subgraphs(node: ir.Node) -> list[ir.Graph]:
    found = []
    for a in node.attributes.values():
        if a.type == ir.AttributeType.GRAPH:
            found.append(a.as_graph())
        elif a.type == ir.AttributeType.GRAPHS:
            found.extend(a.as_graphs())
    return found


def captured(graph: ir.Graph) -> list[ir.Value]:
    """Outer values that a subgraph (and those below it) reads, in order of first use."""
    own: set[ir.Value] = {*graph.inputs, *graph.initializers.values()}
    found: dict[ir.Value, None] = {}
    for node in graph:
        used = list(node.inputs)
        for sub in subgraphs(node):
            used.extend(captured(sub))
        for value in used:
            if value is not None and value not in own:
                found[value] = None
        own.update(node.outputs)
    for value in graph.outputs:
        if value not in own:
            found[value] = None
    return list(found)
