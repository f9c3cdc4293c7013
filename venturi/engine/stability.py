"""Which values have shapes that follow from the input shapes alone. Only those may live at fixed arena offsets."""

from __future__ import annotations

import onnx_ir as ir

from venturi.ir.build import subgraphs
from venturi.ir.region import is_region, members
from venturi.ops.table import CONTROL, DATA_DEPENDENT, RANDOM, SHAPED_BY_VALUES, find_op

_FROM_FIRST = frozenset({"Range", "ConstantOfShape"})


def stable_values(graph: ir.Graph) -> set[ir.Value]:
    """Values whose shape is the same for every run with the same input shapes.

    Two facts flow forward: `by_shape` (the value itself depends on input shapes only, as Shape's result does) and
    `stable` (its shape does).
    """
    by_shape: set[ir.Value] = {v for v in graph.initializers.values() if not v.is_graph_input()}
    stable: set[ir.Value] = {*by_shape, *(v for v in graph.inputs if isinstance(v.type, ir.TensorType))}
    for node in graph:
        inputs = [v for v in node.inputs if v is not None]
        traits = _traits(node)
        shapes_known = all(v in stable for v in inputs)
        values_known = all(v in by_shape for v in inputs) and not ({RANDOM, CONTROL} & traits)
        if node.op_type in ("Shape", "Size") and not node.domain:
            values_known = shapes_known
        ok = shapes_known and not ({DATA_DEPENDENT, CONTROL} & traits)
        if node.op_type in SHAPED_BY_VALUES and not node.domain:
            shaping = inputs if node.op_type in _FROM_FIRST else inputs[1:]
            ok = ok and all(v in by_shape for v in shaping)
        for out in node.outputs:
            if ok or (values_known and shapes_known):
                stable.add(out)
            if values_known:
                by_shape.add(out)
    return stable


def _traits(node: ir.Node) -> frozenset[str]:
    found: set[str] = set()
    for member in members(node) if is_region(node) else [node]:
        op = find_op(member.domain, member.op_type)
        found |= op.traits if op is not None else {DATA_DEPENDENT}
        if subgraphs(member):
            found.add(CONTROL)
    return frozenset(found)
