"""Forms Regions around convolutions and products: anchor, then bias, residual add and activation in one kernel."""

from __future__ import annotations

import onnx_ir as ir

from venturi.ir.build import dim, rank, scalar
from venturi.ir.region import form_region
from venturi.passes.rewriting import PassContext, commuted, single_use

ACTIVATIONS = frozenset(
    {
        "Relu",
        "Gelu",
        "Swish",
        "HardSwish",
        "Sigmoid",
        "Tanh",
        "HardSigmoid",
        "LeakyRelu",
        "Clip",
        "Mish",
        "Elu",
    }
)
_KINDS = {"Conv": "conv", "ConvTranspose": "conv", "MatMul": "gemm", "Gemm": "gemm"}


def run(graph: ir.Graph, ctx: PassContext) -> None:
    """A chain grows while each value has one reader, keeps its type, and an Add's other side keeps the shape."""
    for node in list(graph):
        kind = _KINDS.get(node.op_type)
        if node.domain or kind is None or node.graph is not graph:
            continue
        chain = chain_of(node, kind)
        if len(chain) == 1:
            continue
        if not ctx.take():
            return
        form_region(kind, chain)


def chain_of(anchor: ir.Node, kind: str) -> list[ir.Node]:
    chain, bias, residual, activation = [anchor], False, False, False
    while True:
        out = chain[-1].outputs[0]
        user = single_use(out)
        if user is None or user.domain or user.outputs[0].dtype != out.dtype or out.dtype is None:
            return chain
        if user.op_type == "Add" and kind == "gemm" and not bias and not activation and _is_bias(user, out):
            bias = True
        elif user.op_type == "Add" and not residual and _is_residual(user, out):
            residual = True
        elif user.op_type in ACTIVATIONS and not activation and _plain_activation(user):
            activation = True
        else:
            return chain
        chain.append(user)


def _is_bias(add: ir.Node, out: ir.Value) -> bool:
    for value, other in commuted(add):
        if value is out and other.const_value is not None:
            shape = list(other.const_value.shape)
            return len(shape) == 1 and shape[0] == dim(out, -1)
    return False


def _is_residual(add: ir.Node, out: ir.Value) -> bool:
    for value, other in commuted(add):
        if value is out:
            same = other.shape is not None and out.shape is not None and list(other.shape) == list(out.shape)
            named = same and all(isinstance(d, int) or d.value is not None for d in out.shape)  # type: ignore[union-attr]
            return named and other is not out and other.const_value is None and other.dtype == out.dtype
    return False


def _plain_activation(node: ir.Node) -> bool:
    if node.op_type != "Clip":
        return True
    bounds = node.inputs[1:]
    return rank(node.inputs[0]) is not None and all(v is None or scalar(v) is not None for v in bounds)
