"""What passes say of a node beside its meaning: kept in its metadata, so in engine files too."""

from __future__ import annotations

import onnx_ir as ir

LAYOUT = "venturi.layout"
NHWC = "NHWC"
PRODUCTS = "venturi.products"
TF32 = "tf32"


def rounds_to_tf32(node: ir.Node) -> bool:
    """Whether products of fp32 operands may round them to 11 significant bits."""
    return node.metadata_props.get(PRODUCTS) == TF32
