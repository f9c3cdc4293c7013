"""Drops constant attention masks that mask nothing: all true, or all zero where the mask is added."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from venturi.ir.build import const_array
from venturi.ir.dtypes import DT
from venturi.passes.rewriting import PassContext

_MASK = 3


def run(graph: ir.Graph, ctx: PassContext) -> None:
    for node in graph:
        if node.op_type != "Attention" or node.domain or len(node.inputs) <= _MASK:
            continue
        mask = node.inputs[_MASK]
        if mask is None or not _is_neutral(node, mask):
            continue
        if not ctx.take():
            return
        node.replace_input_with(_MASK, None)


def _is_neutral(node: ir.Node, mask: ir.Value) -> bool:
    """A mask shorter than the keys masks the rest, so its last axis must be known to cover them."""
    array = const_array(mask)
    keys = node.inputs[1]
    if array is None or keys is None or keys.shape is None or (len(node.inputs) > 4 and node.inputs[4] is not None):
        return False
    if array.ndim == 0 or array.size == 0 or keys.shape[-2] != array.shape[-1]:
        return False
    if mask.dtype == DT.BOOL:
        return bool(array.all())
    return not np.any(np.asarray(array, dtype=np.float32))
