"""Whatever a user calls a model → one imported onnx-ir model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from venturi.core.errors import ModelError
from venturi.frontends.onnx_import import import_onnx


def import_model(source: Any, example: Any = None, dynamic_shapes: Any = None) -> ir.Model:
    """ONNX (path, bytes, proto, onnx-ir), `vt.Network`, `nn.Module` with example inputs, or `ExportedProgram`.

    Raises ModelError for anything else, naming what is accepted.
    """
    from venturi.frontends.network import Network

    if isinstance(source, Network):
        return import_onnx(source.to_model())
    if isinstance(source, str | Path | bytes | bytearray | onnx.ModelProto | ir.Model):
        return import_onnx(source)
    from venturi.frontends.torch_export import export, is_torch_model

    if is_torch_model(source):
        return import_onnx(export(source, example, dynamic_shapes))
    raise ModelError(
        f"cannot build from {type(source).__name__}; expected an ONNX path, bytes or proto, an onnx_ir.Model, a "
        "vt.Network, an nn.Module (with example inputs) or an ExportedProgram"
    )
