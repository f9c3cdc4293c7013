"""Runs a model by its meaning: named numpy inputs to named numpy outputs, optionally with every value on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch

from venturi.backends.reference.program import Hook, Program
from venturi.core.errors import ShapeError
from venturi.ops.tensors import to_numpy, to_torch


class Interpreter:
    """Holds a compiled reference program of `graph` on `device` ("cpu" or "cuda")."""

    def __init__(self, graph: ir.Graph, device: str = "cpu") -> None:
        self.graph = graph
        self.device = device
        self._program = Program(graph, device=device)

    def run(self, inputs: Mapping[str, Any], hook: Hook | None = None) -> dict[str, Any]:
        """numpy in and out (lists for sequences, None for empty optionals). Raises ShapeError for a missing input."""
        args = []
        for value in self.graph.inputs:
            name = value.name or ""
            if name not in inputs:
                raise ShapeError(f"input {name!r} is missing; given {sorted(inputs)}")
            args.append(self._store(inputs[name], value.dtype))
        with torch.inference_mode():
            outputs = self._program.run(args, hook)
        return {v.name or "": to_numpy(o, v.dtype) for v, o in zip(self.graph.outputs, outputs)}

    def _store(self, x: Any, dtype: ir.DataType | None) -> Any:
        if x is None or isinstance(x, dict):
            return x
        if isinstance(x, list):
            return [self._store(item, dtype) for item in x]
        stored = x if isinstance(x, torch.Tensor) else to_torch(x, dtype)
        return stored.to(self.device) if isinstance(stored, torch.Tensor) else stored
