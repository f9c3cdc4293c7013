"""Findings about a model: errors that stop a build, warnings that a user should know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from venturi.core.errors import ModelError
from venturi.frontends.onnx_import import import_onnx
from venturi.ir.dtypes import FLOATS
from venturi.ops.table import RANDOM, find_op


@dataclass(frozen=True)
class Finding:
    """`level` is error, warning or info; `where` names a node, weight or the file."""

    level: str
    where: str
    text: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def lint(path: str | Path) -> list[Finding]:
    """Never raises for a bad model: what is wrong with it is a finding."""
    try:
        model = import_onnx(path)
    except ModelError as exc:
        return [Finding("error", str(path), line.strip()) for line in exc.message.splitlines() if line.strip()]
    return [*_weights(model.graph), *_nodes(model.graph), *_types(model.graph)]


def _weights(graph: ir.Graph) -> Iterator[Finding]:
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if not value.uses() and not value.is_graph_output():
            yield Finding("info", name, "the weight is never read")
        if tensor is not None and value.dtype in FLOATS and tensor.size:
            array = tensor.numpy().astype(np.float64)
            if not np.isfinite(array).all():
                bad = int((~np.isfinite(array)).sum())
                if array.size > 1:
                    yield Finding("warning", name, f"{bad} of {array.size} values are NaN or infinite")
            elif value.dtype == ir.DataType.FLOAT and float(np.abs(array).max()) > 65504:
                yield Finding("info", name, "values exceed fp16's range")


def _nodes(graph: ir.Graph) -> Iterator[Finding]:
    for node in graph:
        op = find_op(node.domain, node.op_type)
        if op is not None and RANDOM in op.traits and "seed" not in node.attributes:
            yield Finding("info", node.name or "", f"{node.op_type} without a seed: outputs differ from run to run")
        if not any(v.uses() or v.is_graph_output() for v in node.outputs):
            yield Finding("info", node.name or "", f"nothing reads this {node.op_type}")


def _types(graph: ir.Graph) -> Iterator[Finding]:
    for node in graph:
        unknown = [v.name for v in node.outputs if v.name and v.dtype is None]
        if unknown and isinstance(node.outputs[0].type, ir.TensorType | None):
            yield Finding("info", node.name or "", f"the type of {unknown} cannot be inferred before a run")
