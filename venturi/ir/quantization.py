"""What QuantizeLinear and DequantizeLinear nodes say of their numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from venturi.ir.build import const_array, get_attr
from venturi.ir.dtypes import DT

BYTES = (DT.UINT8, DT.INT8)
FP8 = DT.FLOAT8E4M3FN


def per_tensor(node: ir.Node, kinds: Sequence[DT] = BYTES) -> bool:
    """A QuantizeLinear or DequantizeLinear with one constant scale and zero, between fp32 and `kinds`."""
    small = node.inputs[0] if node.op_type == "DequantizeLinear" else node.outputs[0]
    wide = node.outputs[0] if node.op_type == "DequantizeLinear" else node.inputs[0]
    scale, zero = const_array(node.inputs[1]), const_array(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1)
    if small is None or small.dtype not in kinds or wide is None or wide.dtype != DT.FLOAT:
        return False
    one = scale is not None and zero is not None and scale.size == zero.size == 1
    return one and not get_attr(node, "block_size", 0) and scale.dtype == np.float32 and bool(scale.item() > 0)  # type: ignore[union-attr]
