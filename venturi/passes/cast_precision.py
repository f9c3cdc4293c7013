"""Runs a float32 model in bf16 or fp16 (or a half model in fp32) by casts; inputs and outputs keep their types. For
tf32 nothing is cast: products of fp32 are marked as those that may round their operands.

Contractions are narrowed; cheap operators follow their inputs; what sums many terms or takes exponentials outside
a kernel that accumulates in fp32 stays wide.
"""

from __future__ import annotations

import onnx_ir as ir

from venturi.ir.build import make_node, subgraphs
from venturi.ir.dtypes import DT, precision_dtype
from venturi.ir.marks import PRODUCTS, TF32
from venturi.passes.rewriting import PassContext

NARROW = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm", "Attention"})
FOLLOW = frozenset(
    {
        "Add", "Sub", "Mul", "Relu", "LeakyRelu", "Clip", "Gelu", "Swish", "HardSwish", "HardSigmoid", "Sigmoid",
        "Tanh",
        "Mish", "Elu", "PRelu", "Max", "Min", "Where", "Neg", "Abs", "Reshape", "Transpose", "Flatten", "Squeeze",
        "Unsqueeze", "Expand", "Concat", "Split", "Slice", "Gather", "Pad", "Tile", "DepthToSpace", "SpaceToDepth",
        "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity", "LayerNormalization",
        "RMSNormalization", "GroupNormalization", "InstanceNormalization", "Softmax", "Sum",
    }
)  # fmt: skip
_FLOATS = (DT.FLOAT, DT.FLOAT16, DT.BFLOAT16)


def run(graph: ir.Graph, ctx: PassContext) -> None:
    if ctx.precision == "tf32":
        _mark(graph, ctx)
    if ctx.precision not in ("fp32", "fp16", "bf16"):
        return
    target = precision_dtype(ctx.precision)
    casts: dict[tuple[ir.Value, DT], ir.Value] = {}
    declared = {v: v.dtype for v in graph.outputs}
    for node in list(graph):
        if subgraphs(node) or node.domain not in ("", "com.microsoft"):
            continue
        wanted = _wanted(node, target)
        if wanted is None:
            continue
        if not ctx.take():
            return
        _convert(graph, node, wanted, casts)
    for i, value in enumerate(list(graph.outputs)):
        want = declared[value]
        if value.dtype != want and want is not None:
            _cast_output(graph, i, value, want)


def _mark(graph: ir.Graph, ctx: PassContext) -> None:
    for node in graph:
        x = node.inputs[0] if node.op_type in NARROW and not node.domain else None
        if x is not None and x.dtype == DT.FLOAT and ctx.take():
            node.metadata_props[PRODUCTS] = TF32


def _wanted(node: ir.Node, target: DT) -> DT | None:
    """The float type this node shall compute in; None leaves it alone."""
    floats = [v for v in node.inputs if v is not None and v.dtype in _FLOATS]
    if not floats:
        return None
    if target == DT.FLOAT:
        return DT.FLOAT
    if node.op_type in NARROW and not node.domain:
        return target
    live = [v for v in floats if v.const_value is None]
    if node.op_type in FOLLOW and not node.domain and any(v.dtype == target for v in live):
        return target
    return DT.FLOAT if any(v.dtype == target for v in floats) else None


def _convert(graph: ir.Graph, node: ir.Node, wanted: DT, casts: dict[tuple[ir.Value, DT], ir.Value]) -> None:
    for i, value in enumerate(node.inputs):
        if value is None or value.dtype not in _FLOATS or value.dtype == wanted:
            continue
        made = casts.get((value, wanted))
        if made is None:
            cast = make_node("Cast", [value], {"to": int(wanted)})
            made = cast.outputs[0]
            made.type, made.shape = ir.TensorType(wanted), value.shape
            home = value.producer()
            if home is not None and home.graph is graph:
                graph.insert_after(home, cast)
            else:
                graph.insert_before(next(iter(graph)), cast)
            casts[value, wanted] = made
        node.replace_input_with(i, made)
    if node.op_type == "Cast":
        if wanted == DT.FLOAT and DT(node.attributes["to"].as_int()) in (DT.FLOAT16, DT.BFLOAT16):
            node.attributes["to"] = ir.AttrInt64("to", int(DT.FLOAT))
            node.outputs[0].type = ir.TensorType(DT.FLOAT)
        return
    for value in node.outputs:
        if value.dtype in _FLOATS:
            value.type = ir.TensorType(wanted)


def _cast_output(graph: ir.Graph, index: int, value: ir.Value, want: DT) -> None:
    cast = make_node("Cast", [value], {"to": int(want)})
    out = cast.outputs[0]
    out.type, out.shape = ir.TensorType(want), value.shape
    graph.append(cast)
    name = value.name
    value.name, out.name = out.name, name
    graph.outputs[index] = out
