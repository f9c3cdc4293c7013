"""The graph of an engine as plain ONNX with tactic and time on every node, for viewing in Netron."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from venturi.core.errors import EngineError, mapped
from venturi.engine.artifact import Loaded


def write_annotated(path: str | Path, loaded: Loaded) -> None:
    """Write the graph without its weights; tactic, time and source nodes are metadata of each node."""
    with mapped(str(path), EngineError):
        proto = onnx.ModelProto.FromString(bytes(loaded.container.entry("graph.onnx")))
        model = ir.from_proto(proto)
        for node, step in zip(model.graph, loaded.plan.steps):
            node.metadata_props["venturi.tactic"] = step.tactic
            node.metadata_props["venturi.source"] = ", ".join(step.sources)
            if step.time_us is not None:
                node.metadata_props["venturi.time_us"] = f"{step.time_us:.1f}"
        Path(path).write_bytes(ir.to_proto(model).SerializeToString())
