"""Four kernels for out[rows, n] = epilogue(x[rows, k] @ weight[n, k]^T): what products and 1x1 convolutions come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from venturi.backends.base import Config, RegionView
from venturi.backends.cuda.codegen.dots import stored
from venturi.backends.cuda.codegen.element import EVERY, HALF, Element
from venturi.backends.cuda.codegen.gemm import (
    GemmConfig,
    pointer_source,
    tma_source,
    tma_split_source,
    vector_source,
)
from venturi.backends.cuda.codegen.sums import chunk_of
from venturi.backends.cuda.codegen.tile import TileBody
from venturi.backends.cuda.device import KernelDevice, Launchable
from venturi.backends.cuda.kernel import KernelSource
from venturi.backends.cuda.scratch import current_scratch
from venturi.backends.cuda.tactics.candidates import product_candidates
from venturi.ir.dtypes import DT

T = torch.Tensor
MAX_CANDIDATES = 12
TMA_ARCH = 90
VECTOR_ROWS = 64
VECTOR_CONFIGS = (
    (4, 512, 4), (8, 256, 4), (2, 1024, 4), (4, 256, 2), (1, 1024, 2), (16, 128, 4), (16, 64, 2), (8, 64, 1),
)  # fmt: skip


@dataclass(frozen=True)
class Product:
    """Sizes (`rows` None when not fixed), element type and epilogue."""

    rows: int | None
    n: int
    k: int
    dtype: DT
    tile: TileBody
    tf32: bool = False

    @property
    def element(self) -> Element:
        return Element(self.dtype, self.tf32)

    def candidates(self, num_sms: int, *, splits: bool) -> list[GemmConfig]:
        return product_candidates(
            self.rows, self.n, self.k, num_sms, MAX_CANDIDATES, splits=splits, element=self.element
        )


@dataclass(frozen=True)
class Operands:
    """Device tensors of one launch, all compact: x [rows, k], weight [n, k], out and tiles [rows, n], columns [n]."""

    x: T
    weight: T
    out: T
    tiles: list[T]
    columns: list[T]

    @property
    def sizes(self) -> list[int]:
        return [self.x.shape[0], self.out.shape[1], self.x.shape[1]]


class ProductKernel(Protocol):
    """One way to compute a Product. `suffix` names it among the others; `kinds` are the operands it takes."""

    suffix: str
    kinds: tuple[DT, ...] = (*HALF, DT.INT8)

    def configs(self, p: Product, device: KernelDevice) -> list[Config] | str: ...

    def source(self, region: RegionView, p: Product, config: Config, arch: int) -> KernelSource: ...

    def weights(self, weight: T, p: Product, config: Config) -> T:
        """[n, k] in the order in which the kernel reads them."""
        return weight

    def launch(self, kernel: Launchable, config: Config, device: KernelDevice, o: Operands) -> None: ...


def split_buffers(out: T, split: int, size: int, tiles: int) -> tuple[T, T]:
    """Memory for partial sums and tickets; nothing real when K is not split."""
    scratch = current_scratch(out.device)
    return (scratch.sums(1), scratch.tickets(1)) if split == 1 else (scratch.sums(split * size), scratch.tickets(tiles))


def num_tiles(rows: int, n: int, c: GemmConfig) -> int:
    return -(-rows // c.bm) * -(-n // c.bn)


def misaligned(p: Product) -> str:
    """Why kernels that read operands by the memory accelerator and write 16 bytes of the result cannot, if so."""
    columns, depth = chunk_of(p.tile), p.element.aligned
    if p.n % columns or p.k % depth:
        return f"N={p.n} and K={p.k} must be multiples of {columns} and {depth}"
    return ""


def _tma_obstacle(p: Product, device: KernelDevice) -> str:
    if device.arch < TMA_ARCH:
        return "no tensor memory accelerator"
    if p.n % p.element.aligned or p.k % p.element.aligned:
        return f"N={p.n} and K={p.k} must be multiples of {p.element.aligned}"
    return f"{p.rows} rows" if p.rows is not None and p.rows < 16 else ""


class TmaProduct(ProductKernel):
    """Persistent, fed by the tensor memory accelerator; Hopper and newer, rows of multiples of 16 bytes."""

    suffix = "-tma"
    kinds = EVERY

    def configs(self, p: Product, device: KernelDevice) -> list[Config] | str:
        obstacle = _tma_obstacle(p, device)
        if obstacle:
            return obstacle
        found = p.candidates(device.num_sms, splits=False)
        doubled = [
            GemmConfig(**{**asdict(c), "waves": 2})
            for i, c in enumerate(found)
            if c.bm * c.bn <= 128 * 128 and (i < 3 or c.stages == 2 or c.bk == p.element.step // 2)
        ]
        return [asdict(c) for c in (*found, *doubled)]

    def source(self, region: RegionView, p: Product, config: Config, arch: int) -> KernelSource:
        return tma_source(region, p.tile, p.element, GemmConfig(**config), arch)

    def weights(self, weight: T, p: Product, config: Config) -> T:
        return stored(weight, p.element)

    def launch(self, kernel: Launchable, config: Config, device: KernelDevice, o: Operands) -> None:
        c, (rows, n, _) = GemmConfig(**config), o.sizes
        grid = (min(num_tiles(rows, n, c), device.num_sms * c.waves),)
        kernel.launch(grid, [o.x, o.weight, o.out, *o.tiles, *o.columns, *o.sizes])


class TmaSplitProduct(ProductKernel):
    """TMA operands, one tile a program: residuals load while the sums run, K is shared when tiles are few."""

    suffix = "-tma-split"
    kinds = EVERY

    def configs(self, p: Product, device: KernelDevice) -> list[Config] | str:
        obstacle = _tma_obstacle(p, device) or ("" if p.rows else "the number of rows is not fixed")
        if obstacle:
            return obstacle
        found = p.candidates(device.num_sms, splits=True)
        return [asdict(c) for c in found if c.bm >= 64] or "no tile of 64 rows fits"

    def source(self, region: RegionView, p: Product, config: Config, arch: int) -> KernelSource:
        return tma_split_source(region, p.tile, p.element, GemmConfig(**config), arch)

    def weights(self, weight: T, p: Product, config: Config) -> T:
        return stored(weight, p.element)

    def launch(self, kernel: Launchable, config: Config, device: KernelDevice, o: Operands) -> None:
        _launch_split(kernel, GemmConfig(**config), o)


class PointerProduct(ProductKernel):
    """Any size, by masked loads; splits K among programs when there are too few tiles."""

    suffix = ""
    kinds = EVERY

    def configs(self, p: Product, device: KernelDevice) -> list[Config] | str:
        found = p.candidates(device.num_sms, splits=True)
        return [asdict(c) for c in found]

    def source(self, region: RegionView, p: Product, config: Config, arch: int) -> KernelSource:
        c, wide = GemmConfig(**config), p.n % 16 == 0 and p.k % 16 == 0
        return pointer_source(region, p.tile, p.element, c, arch, p.k % c.bk == 0, wide)

    def weights(self, weight: T, p: Product, config: Config) -> T:
        return stored(weight, p.element)

    def launch(self, kernel: Launchable, config: Config, device: KernelDevice, o: Operands) -> None:
        _launch_split(kernel, GemmConfig(**config), o)


def _launch_split(kernel: Launchable, c: GemmConfig, o: Operands) -> None:
    rows, n, _ = o.sizes
    tiles = num_tiles(rows, n, c)
    work, locks = split_buffers(o.out, c.split, rows * n, tiles)
    kernel.launch((tiles, c.split), [o.x, o.weight, o.out, *o.columns, *o.tiles, work, locks, *o.sizes])


class VectorProduct(ProductKernel):
    """Few rows: reads the weights once a row at memory speed, without tensor cores."""

    suffix = "-vector"
    kinds = EVERY

    def configs(self, p: Product, device: KernelDevice) -> list[Config] | str:
        if p.rows is None or p.rows > VECTOR_ROWS:
            return f"{p.rows or 'any number of'} rows, more than {VECTOR_ROWS}"
        fits = [c for c in VECTOR_CONFIGS if c[1] < 2 * p.k or c[1] == 64]
        return [{"columns": c, "depth": d, "warps": w} for c, d, w in fits]

    def source(self, region: RegionView, p: Product, config: Config, arch: int) -> KernelSource:
        size = (config["columns"], config["depth"], config["warps"])
        return vector_source(region, p.tile, p.element, *size, arch)

    def launch(self, kernel: Launchable, config: Config, device: KernelDevice, o: Operands) -> None:
        rows, n, _ = o.sizes
        grid = (-(-n // config["columns"]), rows)
        kernel.launch(grid, [o.x, o.weight, o.out, *o.columns, *o.tiles, *o.sizes])


TMA, TMA_SPLIT, POINTERS, VECTOR = TmaProduct(), TmaSplitProduct(), PointerProduct(), VectorProduct()


class TileOperands:
    """The epilogue's constants (flat, on the device) and the positions of its computed tiles."""

    def __init__(self, region: RegionView, tile: TileBody) -> None:
        self.columns = tile.column_tensors(region)
        self.positions: list[int] = [region.position(v) or 0 for v in tile.tiles]

    def tiles(self, args: Sequence[Any]) -> list[T]:
        return [args[p] for p in self.positions]
