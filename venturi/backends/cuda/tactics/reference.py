"""The last tactic of every Region: the operator table on the device, values that decide shapes on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import torch

from venturi.backends.base import Arguments, Config, Kernel, RegionView
from venturi.backends.cuda.device import DeviceWeights
from venturi.backends.cuda.placement import Mover
from venturi.backends.cuda.rounding import is_exact, products_of_fp32
from venturi.backends.reference.program import OPERATOR_ERRORS, Program, node_function
from venturi.core.log import logger
from venturi.ir.build import subgraphs
from venturi.ir.dtypes import DT
from venturi.ir.region import body_of, is_region
from venturi.ops.table import CONTRACT, CONTROL, SHAPED_BY_VALUES, find_op

T = torch.Tensor
_RECURRENT = ("LSTM", "GRU", "RNN")
_SHAPED_BY_FIRST = ("Range", "ConstantOfShape")
_HOST_OPERANDS = SHAPED_BY_VALUES | {"CumSum", "CumProd", "Trilu"}


class DeviceReference:
    """Runs on the host when every input is there and the result is integers (shape arithmetic), else on the device.

    A reference that refuses device tensors (strings, numpy) runs on host copies: correct, slow, never captured.
    """

    name = "reference"

    def match(self, region: RegionView) -> list[Config] | str:
        return [{}]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        run, tf32 = self._run(region), region.tf32
        if not any(_has_products(n) for n in region.nodes):
            return Kernel(run)

        def with_products(*args: Any) -> Any:
            if is_exact() and any(v.dtype == DT.FLOAT for v in region.outputs):
                return _in_double(region, run)(*args)
            with products_of_fp32(tf32=tf32):
                return run(*args)

        return Kernel(with_products)

    @staticmethod
    def _run(region: RegionView) -> Callable[..., Any]:
        device = weights_device(region.weights)
        if is_region(region.node):
            program, fill = Program(body_of(region.node), region.weights, device=str(device)), Arguments(region)
            if len(region.outputs) == 1:
                return lambda *args: program.run(fill(args))[0]
            return lambda *args: tuple(program.run(fill(args)))
        return _Placed(region, device)


def _in_double(region: RegionView, fallback: Callable[..., Any]) -> Callable[..., Any]:
    """What the Region's operators give in fp64, rounded at the end: a measure for fp32 must not have its errors, nor
    those of torch's fused kernels, which make NaN of an infinity's parts."""
    device, fill = weights_device(region.weights), Arguments(region)
    if is_region(region.node):
        program = Program(body_of(region.node), region.weights, device=str(device))
        compute: Callable[..., Any] = _spread(program.run)
    else:
        compute = node_function(region.node, region.weights, str(device))

    def run(*args: Any) -> Any:
        try:
            made = compute(*(_wider(_placed(x, device)) for x in fill(args)))
        except OPERATOR_ERRORS:  # operators that mix types
            return fallback(*args)
        results = made if isinstance(made, tuple | list) else (made,)
        found = tuple(x.float() if isinstance(x, T) and x.dtype == torch.float64 else x for x in results)
        return found if len(found) > 1 else found[0]

    return run


def _spread(run: Callable[[list[Any]], Any]) -> Callable[..., Any]:
    return lambda *inputs: run(list(inputs))


def _wider(x: Any) -> Any:
    return x.double() if isinstance(x, T) and x.dtype == torch.float32 else x


def _has_products(node: ir.Node) -> bool:
    op = find_op(node.domain, node.op_type)
    return op is None or bool(op.traits & {CONTRACT, CONTROL}) or node.op_type in _RECURRENT


def weights_device(weights: Mapping[str, Any]) -> torch.device:
    return weights._device if isinstance(weights, DeviceWeights) else torch.device("cpu")


class _Placed:
    """One node with its operands where its reference wants them."""

    def __init__(self, region: RegionView, device: torch.device) -> None:
        node = region.node
        self._device, self._name = device, region.name or node.op_type
        self._fn = node_function(node, region.weights, str(device))
        self._host_fn = node_function(node, _host(region.weights))
        first = 0 if node.op_type in _SHAPED_BY_FIRST else 1
        shaping = node.op_type in _HOST_OPERANDS and not node.domain
        self._on_host = [shaping and i >= first for i in range(len(region.formal))]
        host = _host(region.weights)
        self._constants = [None if v is None else region.constant(v) for v in region.formal]
        self._host_constants = [
            None if c is None or v is None else host[_outer_name(region, v)]
            for v, c in zip(region.formal, self._constants)
        ]
        self._holes = [i for i, (v, c) in enumerate(zip(region.formal, self._constants)) if v is not None and c is None]
        data = any(v.dtype is None or v.dtype.is_floating_point() for v in node.outputs if v.name)
        self._shape_arithmetic = not subgraphs(node) and not data
        self._refused = False
        self._moved = Mover(device)

    def __call__(self, *args: Any) -> Any:
        own, captured = list(args[: len(self._holes)]), args[len(self._holes) :]
        if self._shape_arithmetic and not any(isinstance(a, T) and a.is_cuda for a in own):
            return self._host_fn(*self._filled(own, self._host_constants))
        if self._refused:
            return self._on_copies(own, captured)
        inputs = self._filled(own, self._constants)
        for i, x in enumerate(inputs):
            if self._on_host[i]:
                inputs[i] = self._host_constants[i] if self._constants[i] is not None else _cpu(x)
            else:
                inputs[i] = self._moved(x)
        try:
            return self._fn(*inputs, *captured)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, NotImplementedError) as exc:
            if torch.cuda.is_current_stream_capturing():
                raise
            result = self._on_copies(own, captured)
            logger.warning("%s runs on the host: its reference refuses device tensors (%s)", self._name, exc)
            self._refused = True
            return result

    def _filled(self, own: list[Any], constants: list[Any]) -> list[Any]:
        inputs = list(constants)
        for hole, x in zip(self._holes, own):
            inputs[hole] = x
        return inputs

    def _on_copies(self, own: list[Any], captured: tuple[Any, ...]) -> Any:
        inputs = self._filled([_cpu(x) for x in own], self._host_constants)
        return _placed(self._host_fn(*inputs, *(_cpu(x) for x in captured)), self._device)


def _host(weights: Mapping[str, Any]) -> Mapping[str, Any]:
    return weights.host if isinstance(weights, DeviceWeights) else weights


def _outer_name(region: RegionView, value: Any) -> str:
    outer = region.outer(value)
    return (outer.name or "") if outer is not None else ""


def _cpu(x: Any) -> Any:
    return _placed(x, torch.device("cpu"))


def _placed(x: Any, device: torch.device) -> Any:
    if isinstance(x, T):
        return x.to(device)
    if isinstance(x, tuple | list):
        return type(x)(_placed(v, device) for v in x)
    return x
