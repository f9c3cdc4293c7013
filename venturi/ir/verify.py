"""Structural checks of a graph: what every pass must leave true."""

from __future__ import annotations

import onnx_ir as ir

from venturi.core.errors import InternalError, ModelError
from venturi.ir.build import subgraphs


def verify(graph: ir.Graph, *, after: str = "") -> None:
    """Raise InternalError unless names are unique, every use has a definition before it, and outputs exist."""
    _verify(graph, set(), after or "import")


def _verify(graph: ir.Graph, outer: set[ir.Value], after: str) -> None:
    known: set[ir.Value] = set(outer)
    names: set[str] = set()

    def define(value: ir.Value) -> None:
        if value.name:
            if value.name in names:
                raise InternalError(f"value name {value.name!r} is defined twice", where=f"after {after}")
            names.add(value.name)
        known.add(value)

    for value in graph.inputs:
        define(value)
    for value in graph.initializers.values():
        if not value.is_graph_input():
            define(value)
    for node in graph:
        for read in node.inputs:
            if read is not None and read not in known:
                raise InternalError(
                    f"node {node.name!r} ({node.op_type}) reads {read.name!r} before it is defined",
                    where=f"after {after}",
                )
        for sub in subgraphs(node):
            _verify(sub, known, after)
        for value in node.outputs:
            define(value)
    for value in graph.outputs:
        if value not in known:
            raise InternalError(f"graph output {value.name!r} has no producer", where=f"after {after}")


def sort_topologically(graph: ir.Graph) -> None:
    """Put producers before users. Raises ModelError for a cyclic graph."""
    try:
        graph.sort()
    except ValueError as exc:
        raise ModelError(f"the graph has a cycle: {exc}. A model must be acyclic; use Loop for iteration") from exc
