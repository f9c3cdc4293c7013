"""MatMul and Gemm by constant weights as Triton products with the whole epilogue fused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from venturi.backends.base import Config, Kernel, RegionView
from venturi.backends.cuda.codegen.element import EVERY, HALF
from venturi.backends.cuda.codegen.tile import read_tile
from venturi.backends.cuda.device import KernelDevice
from venturi.backends.cuda.kernel import KernelSource
from venturi.backends.cuda.tactics.products import Operands, Product, ProductKernel, TileOperands
from venturi.backends.cuda.tactics.quantized import read_ends
from venturi.backends.cuda.tactics.reference import DeviceReference
from venturi.backends.real_view import RealView
from venturi.ir.build import static_shape
from venturi.ir.dtypes import DT
from venturi.ir.quantization import FP8
from venturi.ops.tensors import STORAGE

T = torch.Tensor


@dataclass(frozen=True)
class Linear:
    """x[..., k] @ weight^T with its epilogue. `transposed`: the stored weight is [k, n]."""

    product: Product
    weight: ir.Value
    transposed: bool
    first: int

    def packed(self, region: RegionView) -> T:
        """[n, k]."""
        stored: T = region.constant(self.weight)
        return (stored.T if self.transposed else stored).contiguous()


def read_linear(region: RegionView, kinds: Sequence[DT] = HALF) -> Linear | str:
    """MatMul or Gemm by a constant matrix, first operand computed, of `kinds` or of signed bytes in a quantized
    Region; or why it is none."""
    real = RealView(region) if region.kind == "quantized" else None
    view = real or region
    node = view.anchor
    if node.domain or node.op_type not in ("MatMul", "Gemm"):
        return "the anchor is not a product"
    x, weight = node.inputs[0], node.inputs[1]
    if x is None or weight is None or not view.is_constant(weight) or view.position(x) is None:
        return "the second operand is not constant"
    shape, attrs = static_shape(weight), region.attrs(node)
    if shape is None or len(shape) != 2:
        return "not a matrix"
    if attrs.get("transA", 0) or attrs.get("alpha", 1.0) != 1.0 or attrs.get("beta", 1.0) != 1.0:
        return "Gemm with transA, alpha or beta"
    transposed = not attrs.get("transB", 0)
    k, n = shape if transposed else reversed(shape)
    if not n or not k:
        return "empty weights"
    ends = None if real is None else read_ends(real, int(transposed))
    if isinstance(ends, str):
        return ends
    if ends is not None and ends.dtype == FP8 and FP8 not in kinds:
        return "bytes of floating point"
    if ends is None and (weight.dtype not in kinds or x.dtype != weight.dtype):
        return "not half precision"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and not (
        view.is_constant(bias) and (static_shape(bias) or [])[-1:] == [n] and _size(bias) == n
    ):
        return "Gemm with a bias that is not one constant a column"
    tile = read_tile(region, -1, bias) if ends is None else ends.tile(-1, bias)
    if isinstance(tile, str):
        return tile
    lead = static_shape(x)
    rows = None if lead is None else int(torch.Size(lead[:-1]).numel())
    stored, dtype = (weight, weight.dtype) if ends is None else (ends.weight, ends.dtype)
    assert dtype is not None
    return Linear(Product(rows, n, k, dtype, tile, region.tf32), stored, transposed, view.position(x) or 0)


def _size(value: ir.Value) -> int:
    return int(torch.Size(static_shape(value) or [0]).numel())


def aligned(x: T) -> T:
    """Contiguous and 16-byte aligned; copied only if needed."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


class Gemm:
    """A product kernel behind a MatMul or Gemm Region."""

    def __init__(self, device: KernelDevice, kernel: ProductKernel) -> None:
        self.name = f"triton-gemm{kernel.suffix}"
        self._device, self._kernel = device, kernel

    def match(self, region: RegionView) -> list[Config] | str:
        made = read_linear(region, self._kernel.kinds)
        return made if isinstance(made, str) else self._kernel.configs(made.product, self._device)

    def sources(self, region: RegionView, config: Config) -> list[KernelSource]:
        made = read_linear(region, EVERY)
        assert isinstance(made, Linear)
        return [self._kernel.source(region, made.product, config, self._device.arch)]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        made = read_linear(region, EVERY)
        assert isinstance(made, Linear)
        n, k, device = made.product.n, made.product.k, self._device
        kernel = device.kernel(self.sources(region, config)[0])
        weight = self._kernel.weights(made.packed(region), made.product, config)
        operands, dtype = TileOperands(region, made.product.tile), STORAGE[made.product.tile.output.dtype]  # type: ignore[index]
        fallback, launch = DeviceReference().bind(region, {}).run, self._kernel.launch

        def run(*args: Any) -> Any:
            x: T = args[made.first]
            rows = x.numel() // k
            if not 0 < rows < 2**31 // max(n, k):
                return fallback(*args)
            out = torch.empty((*x.shape[:-1], n), dtype=dtype, device=x.device)
            tiles = [aligned(t).view(rows, n) for t in operands.tiles(args)]
            given = Operands(aligned(x).view(rows, k), weight, out.view(rows, n), tiles, operands.columns)
            launch(kernel, config, device, given)
            return out

        return Kernel(run)
