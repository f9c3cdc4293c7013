"""What all passes share: the context that counts rewrites and burns fuel, and safe replacement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from venturi.frontends.infer import infer_node
from venturi.ir.build import copy_type


@dataclass
class PassContext:
    """State of one pipeline run. `fuel` < 0 is endless; `rewrites` counts by pass name.

    Of the device: `fuses_quantized`, it has kernels that take integers in and give them out, `signed_bytes`, of signed
    ones only, and where those may round within (`rounds_within`: "sums" right behind them, "anywhere", or nowhere);
    `fuses_fp8`, it multiplies dequantized e4m3; `fuses_dynamic`, it has kernels for products of what is rounded by its
    own range; `flat_attention`, its attention takes heads side by side, and all three operands from one tensor where
    `packed_attention`.
    """

    fuel: int = -1
    precision: str = "model"
    fuses_quantized: bool = False
    signed_bytes: bool = False
    rounds_within: str = ""
    fuses_dynamic: bool = False
    fuses_fp8: bool = False
    flat_attention: bool = False
    packed_attention: bool = False
    fold_limit_bytes: int = 64 << 20
    rewrites: dict[str, int] = field(default_factory=dict)
    current: str = ""

    def take(self) -> bool:
        """Ask to do one rewrite; False means stop rewriting."""
        if self.fuel == 0:
            return False
        self.fuel -= 1 if self.fuel > 0 else 0
        self.rewrites[self.current] = self.rewrites.get(self.current, 0) + 1
        return True


def single_use(value: ir.Value) -> ir.Node | None:
    """The only reader of a value, or None when it has several or leaves the graph."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    user = next(iter(uses))[0]
    return user if user.graph is value.producer().graph else None  # type: ignore[union-attr]


def producer(value: ir.Value | None, *op_types: str, domain: str = "") -> ir.Node | None:
    """The node that makes `value` when it is one of `op_types`."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == domain and node.op_type in op_types else None


def sources(*nodes: ir.Node) -> str:
    """Provenance of a node that replaces `nodes`."""
    names: list[str] = []
    for node in nodes:
        names.extend(node.metadata_props.get("source", node.name or node.op_type).split("|"))
    return "|".join(dict.fromkeys(names))


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Point every reader of `old` at `new`. A graph output keeps its name."""
    if old.is_graph_output():
        name = old.name
        if new.is_graph_output() or new.is_graph_input() or new.is_initializer():
            raise ValueError("replacement of a graph output must be a plain value")
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name, new.name = None, name
    else:
        ir.convenience.replace_all_uses_with(old, new)


def can_forward(old: ir.Value, new: ir.Value) -> bool:
    """Whether `old` may be dropped in favour of `new` without renaming an interface value."""
    return not old.is_graph_output() or not (
        new.is_graph_output() or new.is_graph_input() or new.is_initializer() or new.producer() is None
        or new.producer().graph is not old.producer().graph  # type: ignore[union-attr]
    )  # fmt: skip


def substitute(
    matched: Sequence[ir.Node], new: Sequence[ir.Node], outputs: Sequence[tuple[ir.Value, ir.Value]]
) -> None:
    """Insert `new` before the last matched node, take over `outputs` (old, new), drop what became dead."""
    last = matched[-1]
    graph = last.graph
    assert graph is not None
    props = sources(*matched)
    for node in new:
        node.metadata_props["source"] = props
        graph.insert_before(last, node)
    for old, out in outputs:
        copy_type(old, out)
    for node in new:
        if any(v.dtype is None or v.shape is None for v in node.outputs):
            infer_node(node)
    for old, out in outputs:
        replace_value(old, out)
    drop_dead(list(matched)[::-1])


def drop_dead(nodes: Sequence[ir.Node]) -> None:
    """Remove those of `nodes` whose outputs nobody reads, in the given order."""
    for node in nodes:
        if node.graph is not None and not any(v.uses() or v.is_graph_output() for v in node.outputs):
            node.graph.remove(node, safe=True)


def commuted(node: ir.Node) -> list[tuple[ir.Value, ir.Value]]:
    """Both operand orders of a binary node."""
    a, b = node.inputs[0], node.inputs[1]
    if a is None or b is None:
        return []
    return [(a, b), (b, a)]
