"""Renames what passes made to names that depend on the graph alone, so that two builds give the same file."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from venturi.ir.build import stem_of, subgraphs
from venturi.passes.rewriting import PassContext


def run(graph: ir.Graph, ctx: PassContext) -> None:
    values, nodes = list(_values(graph)), list(_nodes(graph))
    kept = {v.name for v in (*graph.inputs, *graph.outputs)}
    taken = {n for n in kept if n}
    for value in values:
        if value.name and value.name not in kept:
            new = _unique(stem_of(value.name), taken)
            if new != value.name:
                _rename(graph, value, new)
            taken.add(new)
    taken = set()
    for node in nodes:
        node.name = _unique(stem_of(node.name or node.op_type), taken)
        taken.add(node.name)


def _rename(graph: ir.Graph, value: ir.Value, new: str) -> None:
    """Initializers are keyed by name, so they are taken out while renamed."""
    home = value.graph if value.is_initializer() else None
    if home is None:
        value.name = new
        return
    old = value.name or ""
    del home.initializers[old]
    value.name = new
    other = home.initializers.pop(new, None)
    home.initializers[new] = value
    if other is not None:
        other.name = new + ".old"
        home.initializers[new + ".old"] = other


def _unique(stem: str, taken: set[str]) -> str:
    if stem not in taken:
        return stem
    i = 1
    while f"{stem}.{i}" in taken:
        i += 1
    return f"{stem}.{i}"


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in graph:
        yield node
        for sub in subgraphs(node):
            yield from _nodes(sub)


def _values(graph: ir.Graph, top: bool = True) -> Iterator[ir.Value]:
    if not top:
        yield from graph.inputs
    yield from [v for v in graph.initializers.values() if not v.is_graph_input()]
    for node in graph:
        for sub in subgraphs(node):
            yield from _values(sub, top=False)
        yield from node.outputs
