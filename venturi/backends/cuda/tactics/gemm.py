"""Products with constant weights as Triton kernels with the whole epilogue fused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir
import torch

from venturi.backends.base import Config, Kernel, RegionView
from venturi.backends.cuda.codegen.gemm import GemmConfig, pointer_source, tma_source, tma_split_source, vector_source
from venturi.backends.cuda.codegen.tile import TileBody, read_tile
from venturi.backends.cuda.device import KernelDevice
from venturi.backends.cuda.kernel import KernelSource
from venturi.backends.cuda.scratch import current_scratch
from venturi.backends.cuda.tactics.candidates import product_candidates
from venturi.backends.cuda.tactics.reference import DeviceReference
from venturi.ir.build import static_shape
from venturi.ir.dtypes import DT
from venturi.ops.tensors import STORAGE

T = torch.Tensor
HALF = (DT.FLOAT16, DT.BFLOAT16)
MAX_CANDIDATES = 12


@dataclass(frozen=True)
class Product:
    """x[..., K] @ weight[N, K]^T with its epilogue. `transposed`: the stored weight is [K, N]."""

    weight: ir.Value
    transposed: bool
    n: int
    k: int
    rows: int | None
    dtype: DT
    tile: TileBody

    def packed(self, region: RegionView) -> T:
        stored: T = region.constant(self.weight)
        return (stored.T if self.transposed else stored).contiguous()


def read_product(region: RegionView) -> Product | str:
    """MatMul or Gemm by a constant matrix in half precision, first operand computed; or why it is none."""
    node = region.anchor
    if node.domain or node.op_type not in ("MatMul", "Gemm"):
        return "the anchor is not a product"
    x, weight = node.inputs[0], node.inputs[1]
    if x is None or weight is None or not region.is_constant(weight) or region.position(x) is None:
        return "the second operand is not constant"
    shape = static_shape(weight)
    if shape is None or len(shape) != 2 or weight.dtype not in HALF or x.dtype != weight.dtype:
        return "not a half-precision matrix"
    attrs = region.attrs(node)
    if attrs.get("transA", 0) or attrs.get("alpha", 1.0) != 1.0 or attrs.get("beta", 1.0) != 1.0:
        return "Gemm with transA, alpha or beta"
    transposed = not attrs.get("transB", 0)
    k, n = shape if transposed else reversed(shape)
    if not n or not k:
        return "empty weights"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and not (
        region.is_constant(bias) and (static_shape(bias) or [])[-1:] == [n] and _size(bias) == n
    ):
        return "Gemm with a bias that is not one constant a column"
    tile = read_tile(region, -1, bias)
    if isinstance(tile, str):
        return tile
    lead = static_shape(x)
    rows = None if lead is None else int(torch.Size(lead[:-1]).numel())
    return Product(weight, transposed, n, k, rows, weight.dtype, tile)


def _size(value: ir.Value) -> int:
    return int(torch.Size(static_shape(value) or [0]).numel())


class TileOperands:
    """The epilogue's constants (flat, on the device) and the positions of its computed tiles."""

    def __init__(self, region: RegionView, tile: TileBody) -> None:
        self.columns = [region.constant(v).reshape(-1).contiguous() for v in tile.columns]
        self.positions: list[int] = [region.position(v) or 0 for v in tile.tiles]

    def tiles(self, args: Sequence[Any]) -> list[T]:
        return [args[p] for p in self.positions]


class TmaGemm:
    """Persistent kernel fed by the tensor memory accelerator; Hopper and newer, rows of multiples of 16 bytes."""

    name = "triton-gemm-tma"

    def __init__(self, device: KernelDevice) -> None:
        self._device = device

    def match(self, region: RegionView) -> list[Config] | str:
        made = read_product(region)
        if isinstance(made, str):
            return made
        if self._device.arch < 90:
            return "no tensor memory accelerator"
        if made.n % 8 or made.k % 8:
            return f"N={made.n} and K={made.k} must be multiples of 8"
        if made.rows is not None and made.rows < 16:
            return f"{made.rows} rows"
        return tma_configs(made.rows, made.n, made.k, self._device.num_sms)

    def sources(self, region: RegionView, config: Config) -> list[KernelSource]:
        made = read_product(region)
        assert isinstance(made, Product)
        return [tma_source(region, made.tile, made.dtype, GemmConfig(**config), self._device.arch)]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        made = read_product(region)
        assert isinstance(made, Product)
        c = GemmConfig(**config)
        kernel = self._device.kernel(tma_source(region, made.tile, made.dtype, c, self._device.arch))
        weight, operands = made.packed(region), TileOperands(region, made.tile)
        programs, out_dtype = self._device.num_sms * c.waves, STORAGE[made.tile.output.dtype]  # type: ignore[index]
        first = region.position(region.anchor.inputs[0])
        fallback = DeviceReference().bind(region, {}).run

        def run(*args: Any) -> Any:
            x: T = args[first]  # type: ignore[index]
            rows = x.numel() // made.k
            if not rows:
                return fallback(*args)
            out = torch.empty((*x.shape[:-1], made.n), dtype=out_dtype, device=x.device)
            flat = aligned(x).view(rows, made.k)
            tiles = [aligned(t).view(rows, made.n) for t in operands.tiles(args)]
            count = -(-rows // c.bm) * -(-made.n // c.bn)
            kernel.launch(
                (min(count, programs),),
                [flat, weight, out.view(rows, made.n), *tiles, *operands.columns, rows, made.n, made.k],
            )
            return out

        return Kernel(run)


def tma_configs(rows: int | None, n: int, k: int, num_sms: int) -> list[Config]:
    found = product_candidates(rows, n, k, num_sms, MAX_CANDIDATES, splits=False)
    doubled = [
        GemmConfig(**{**asdict(c), "waves": 2})
        for i, c in enumerate(found)
        if c.bm * c.bn <= 128 * 128 and (i < 3 or c.stages == 2 or c.bk == 32)
    ]
    return [asdict(c) for c in (*found, *doubled)]


def tma_split_configs(rows: int | None, n: int, k: int, num_sms: int) -> list[Config]:
    """Only where tiles are fewer than multiprocessors."""
    found = product_candidates(rows, n, k, num_sms, MAX_CANDIDATES, splits=True)
    return [asdict(c) for c in found if c.bm >= 64] if rows else []


class TmaSplitGemm:
    """Few tiles: TMA operands and K shared among programs."""

    name = "triton-gemm-tma-split"

    def __init__(self, device: KernelDevice) -> None:
        self._device = device

    def match(self, region: RegionView) -> list[Config] | str:
        made = read_product(region)
        if isinstance(made, str):
            return made
        if self._device.arch < 90:
            return "no tensor memory accelerator"
        if made.n % 8 or made.k % 8 or made.rows is None or made.rows < 16:
            return f"N={made.n} and K={made.k} must be multiples of 8, rows ({made.rows}) known and at least 16"
        return tma_split_configs(made.rows, made.n, made.k, self._device.num_sms)

    def sources(self, region: RegionView, config: Config) -> list[KernelSource]:
        made = read_product(region)
        assert isinstance(made, Product)
        return [tma_split_source(region, made.tile, made.dtype, GemmConfig(**config), self._device.arch)]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        made = read_product(region)
        assert isinstance(made, Product)
        c, kernel = GemmConfig(**config), self._device.kernel(self.sources(region, config)[0])
        weight, operands = made.packed(region), TileOperands(region, made.tile)
        out_dtype = STORAGE[made.tile.output.dtype]  # type: ignore[index]
        first = region.position(region.anchor.inputs[0])
        fallback = DeviceReference().bind(region, {}).run

        def run(*args: Any) -> Any:
            x: T = args[first]  # type: ignore[index]
            rows = x.numel() // made.k
            if not rows:
                return fallback(*args)
            out = torch.empty((*x.shape[:-1], made.n), dtype=out_dtype, device=x.device)
            count = -(-rows // c.bm) * -(-made.n // c.bn)
            work, locks = split_buffers(out, c.split, rows * made.n, count)
            tiles = [aligned(t) for t in operands.tiles(args)]
            flat = aligned(x).view(rows, made.k)
            kernel.launch(
                (count, c.split),
                [flat, weight, out, *operands.columns, *tiles, work, locks, rows, made.n, made.k],
            )
            return out

        return Kernel(run)


def aligned(x: T) -> T:
    """Contiguous and 16-byte aligned; copied only if needed."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


class PointerGemm:
    """Any size, by masked loads; splits K among programs when there are too few tiles."""

    name = "triton-gemm"

    def __init__(self, device: KernelDevice) -> None:
        self._device = device

    def match(self, region: RegionView) -> list[Config] | str:
        made = read_product(region)
        if isinstance(made, str):
            return made
        found = product_candidates(made.rows, made.n, made.k, self._device.num_sms, MAX_CANDIDATES, splits=True)
        return [asdict(c) for c in found]

    def sources(self, region: RegionView, config: Config) -> list[KernelSource]:
        made = read_product(region)
        assert isinstance(made, Product)
        return [self._source(region, made, GemmConfig(**config))]

    def _source(self, region: RegionView, made: Product, c: GemmConfig) -> KernelSource:
        wide = made.n % 16 == 0 and made.k % 16 == 0
        return pointer_source(region, made.tile, made.dtype, c, self._device.arch, made.k % c.bk == 0, wide)

    def bind(self, region: RegionView, config: Config) -> Kernel:
        made = read_product(region)
        assert isinstance(made, Product)
        c = GemmConfig(**config)
        kernel = self._device.kernel(self._source(region, made, c))
        weight, operands = made.packed(region), TileOperands(region, made.tile)
        out_dtype = STORAGE[made.tile.output.dtype]  # type: ignore[index]
        first = region.position(region.anchor.inputs[0])
        fallback = DeviceReference().bind(region, {}).run

        def run(*args: Any) -> Any:
            x: T = args[first]  # type: ignore[index]
            rows = x.numel() // made.k
            if not rows:
                return fallback(*args)
            out = torch.empty((*x.shape[:-1], made.n), dtype=out_dtype, device=x.device)
            count = -(-rows // c.bm) * -(-made.n // c.bn)
            work, locks = split_buffers(out, c.split, rows * made.n, count)
            tiles = [aligned(t) for t in operands.tiles(args)]
            kernel.launch(
                (count, c.split),
                [aligned(x), weight, out, *operands.columns, *tiles, work, locks, rows, made.n, made.k],
            )
            return out

        return Kernel(run)


VECTOR_ROWS = 64
VECTOR_CONFIGS = (
    (4, 512, 4), (8, 256, 4), (2, 1024, 4), (4, 256, 2), (1, 1024, 2), (16, 128, 4), (16, 64, 2), (8, 64, 1),
)  # fmt: skip


def vector_configs(rows: int | None, n: int, k: int) -> list[Config] | str:
    """Candidates of the few-rows kernel, or why it is not worth timing."""
    if rows is None or rows > VECTOR_ROWS:
        return f"{rows or 'any number of'} rows, more than {VECTOR_ROWS}"
    fits = [c for c in VECTOR_CONFIGS if c[1] < 2 * k or c[1] == 64]
    return [{"columns": c, "depth": d, "warps": w} for c, d, w in fits]


class VectorGemm:
    """Few rows: reads the weights once a row at memory speed."""

    name = "triton-gemv"

    def __init__(self, device: KernelDevice) -> None:
        self._device = device

    def match(self, region: RegionView) -> list[Config] | str:
        made = read_product(region)
        return made if isinstance(made, str) else vector_configs(made.rows, made.n, made.k)

    def sources(self, region: RegionView, config: Config) -> list[KernelSource]:
        made = read_product(region)
        assert isinstance(made, Product)
        size = (config["columns"], config["depth"], config["warps"])
        return [vector_source(region, made.tile, made.dtype, *size, self._device.arch)]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        made = read_product(region)
        assert isinstance(made, Product)
        kernel = self._device.kernel(self.sources(region, config)[0])
        weight, operands, columns = made.packed(region), TileOperands(region, made.tile), config["columns"]
        out_dtype = STORAGE[made.tile.output.dtype]  # type: ignore[index]
        first = region.position(region.anchor.inputs[0])
        fallback = DeviceReference().bind(region, {}).run

        def run(*args: Any) -> Any:
            x: T = args[first]  # type: ignore[index]
            rows = x.numel() // made.k
            if not 0 < rows < 65536:
                return fallback(*args)
            out = torch.empty((*x.shape[:-1], made.n), dtype=out_dtype, device=x.device)
            tiles = [aligned(t) for t in operands.tiles(args)]
            grid = (-(-made.n // columns), rows)
            kernel.launch(grid, [aligned(x), weight, out, *operands.columns, *tiles, rows, made.n, made.k])
            return out

        return Kernel(run)


def split_buffers(out: T, split: int, size: int, tiles: int) -> tuple[T, T]:
    """Memory for partial sums and tickets; nothing real when K is not split."""
    scratch = current_scratch(out.device)
    return (scratch.sums(1), scratch.tickets(1)) if split == 1 else (scratch.sums(split * size), scratch.tickets(tiles))
