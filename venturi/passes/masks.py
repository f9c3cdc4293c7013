"""Drops attention masks that mask nothing: constants, all true or all zero where they are added, and views of them.

A constant mask that hides from every query the keys behind it becomes the attribute that says so.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from venturi.ir.build import attr, const_array
from venturi.ir.dtypes import DT
from venturi.passes.rewriting import PassContext

_MASK = 3
_HIDDEN = -6e4  # what is added to a score that shall not count; the least number of fp16 is meant by it too
_VIEWS = ("Expand", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Identity")


def run(graph: ir.Graph, ctx: PassContext) -> None:
    for node in graph:
        if node.op_type != "Attention" or node.domain or len(node.inputs) <= _MASK:
            continue
        mask = node.inputs[_MASK]
        causal = mask is not None and _is_causal(node, mask)
        if mask is None or not (causal or _is_neutral(node, mask)):
            continue
        if not ctx.take():
            return
        node.replace_input_with(_MASK, None)
        if causal:
            node.attributes["is_causal"] = attr("is_causal", 1)


def _is_neutral(node: ir.Node, mask: ir.Value) -> bool:
    """A mask shorter than the keys masks the rest, so its last axis must be known to cover them."""
    array = const_array(_source(mask))
    keys = node.inputs[1]
    if array is None or keys is None or keys.shape is None or (len(node.inputs) > 4 and node.inputs[4] is not None):
        return False
    if not array.size or mask.shape is None or not len(mask.shape) or not _same(keys.shape[-2], mask.shape[-1]):
        return False
    if mask.dtype == DT.BOOL:
        return bool(array.all())
    return not np.any(np.asarray(array, dtype=np.float32))


def _is_causal(node: ir.Node, mask: ir.Value) -> bool:
    """[..., n, n] for n queries and n keys: nothing or 0 up to the diagonal, hidden behind it."""
    array = const_array(_source(mask))
    sizes = [None if v is None or v.shape is None else v.shape[-2] for v in node.inputs[:2]]
    if array is None or array.ndim < 2 or sizes[0] != sizes[1] or array.shape[-2:] != (sizes[0], sizes[0]):
        return False
    if mask.shape is None or list(mask.shape)[-2:] != list(array.shape)[-2:] or any(node.inputs[_MASK + 1 :]):
        return False
    seen = np.tril(np.ones(array.shape[-2:], bool))
    if mask.dtype == DT.BOOL:
        return bool((array == seen).all())
    wide = np.asarray(array, dtype=np.float32)
    return bool((wide[..., seen] == 0).all() and (wide[..., ~seen] <= _HIDDEN).all())


def _same(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> bool:
    """Known to be equal: the same number or the same named dimension."""
    if isinstance(a, ir.SymbolicDim) and isinstance(b, ir.SymbolicDim):
        return a.value is not None and a.value == b.value
    return a == b


def _source(value: ir.Value) -> ir.Value:
    """The value whose elements, moved or repeated, make up this one."""
    while (node := value.producer()) is not None and node.op_type in _VIEWS and not node.domain:
        first = node.inputs[0]
        if first is None:
            break
        value = first
    return value
