"""Products as cuBLASLt algorithms with bias, residual and activation in its epilogue."""

from __future__ import annotations

import functools
from typing import Any

import torch

from venturi.backends.base import Config, Kernel, RegionView
from venturi.backends.cuda.codegen.element import FLOATS
from venturi.backends.cuda.lib.cublaslt import LtProblem, LtProduct, frozen, library
from venturi.backends.cuda.tactics.gemm import Linear, aligned, read_linear
from venturi.backends.cuda.tactics.products import Product
from venturi.backends.cuda.tactics.reference import DeviceReference
from venturi.core.errors import TuningError
from venturi.ops.tensors import STORAGE

T = torch.Tensor
MAX_ALGORITHMS = 8


class CublasLtGemm:
    """Enumerated algorithms are the candidates; the choice is frozen as cuBLASLt's own 64 bytes."""

    name = "cublaslt"

    def match(self, region: RegionView) -> list[Config] | str:
        made = read_linear(region, FLOATS)
        if isinstance(made, str):
            return made
        problem = read_problem(region, made.product)
        if isinstance(problem, str):
            return problem
        if library() is None:
            return "cuBLASLt is not available here"
        found = _algorithms(problem)
        return [{"algorithm": a, "workspace": w} for a, w in found] or "cuBLASLt has no algorithm"

    def bind(self, region: RegionView, config: Config) -> Kernel:
        made = read_linear(region, FLOATS)
        assert isinstance(made, Linear)
        tile, problem = made.product.tile, read_problem(region, made.product)
        assert isinstance(problem, LtProblem)
        bias = tile.column_tensors(region)[0] if problem.bias else None
        product = LtProduct(problem, bias)
        workspace = product.workspace_of(config["algorithm"])
        if workspace is None:
            raise TuningError("this cuBLASLt does not run the frozen algorithm; build the engine again")
        algorithm, weight = frozen(config["algorithm"]), made.packed(region)
        fallback = DeviceReference().bind(region, {}).run
        residual = region.position(tile.tiles[0]) if problem.residual else None

        def run(*args: Any) -> Any:
            x: T = args[made.first]
            if x.numel() != problem.m * problem.k:
                return fallback(*args)
            out = torch.empty((*x.shape[:-1], problem.n), dtype=problem.dtype, device=x.device)
            other = None if residual is None else aligned(args[residual])
            product.run(algorithm, workspace, aligned(x), weight, other, out)
            return out

        return Kernel(run)


@functools.cache
def _algorithms(problem: LtProblem) -> list[tuple[str, int]]:
    return LtProduct(problem, None).algorithms(MAX_ALGORITHMS)


def read_problem(region: RegionView, made: Product) -> LtProblem | str:
    """The product in cuBLASLt's terms: bias, then residual, then activation, in this order; or what does not fit."""
    if made.rows is None or made.rows == 0:
        return "cuBLASLt algorithms need a fixed number of rows"
    aligned_to = made.element.aligned
    if made.dtype not in FLOATS:
        return "not floating point"
    if made.n % aligned_to or made.k % aligned_to:
        return f"N={made.n} and K={made.k} must be multiples of {aligned_to}"
    if len(made.tile.columns) > 1 or len(made.tile.tiles) > 1 or made.tile.output.dtype != made.dtype:
        return "more than one bias or residual, or another output type"
    bias, residual, activation = bool(made.tile.columns), False, ""
    for node in region.nodes[1:]:
        if activation:
            return f"{node.op_type} after the activation"
        if node.op_type == "Add":
            residual = residual or any(v is t for t in made.tile.tiles for v in node.inputs)
        elif node.op_type == "Relu":
            activation = "relu"
        elif node.op_type == "Gelu" and region.attrs(node).get("approximate", "none") == "tanh":
            activation = "gelu"
        else:
            return f"no epilogue for {node.op_type}"
    if len(region.nodes) - 1 != int(bias and not _own_bias(region)) + int(residual) + bool(activation):
        return "an Add of a single number"
    return LtProblem(made.rows, made.n, made.k, STORAGE[made.dtype], bias, residual, activation, made.element.tf32)


def _own_bias(region: RegionView) -> bool:
    return len(region.anchor.inputs) > 2 and region.anchor.inputs[2] is not None
