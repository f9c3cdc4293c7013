"""What tensor cores multiply: halves, fp32 and e4m3 summed in fp32, or signed bytes summed in 32-bit integers."""

from __future__ import annotations

from dataclasses import dataclass

from venturi.ir.dtypes import DT
from venturi.ir.quantization import FP8

HALF = (DT.FLOAT16, DT.BFLOAT16)
FLOATS = (*HALF, DT.FLOAT)
EVERY = (*FLOATS, DT.INT8, FP8)
_ROW_BYTES = 128
_DEPTH_BYTES = 32
_WIDEST = {1: 128, 2: 256}


@dataclass(frozen=True)
class Element:
    """Of both operands. `sums` is Triton's name of the sums' type, `partial` that of a pointer to them.

    Tensor cores round fp32 to tf32, 11 significant bits. Where that is not allowed (`tf32` False) an operand is the sum
    of two such numbers (`in_parts`), and a product the sum of three.
    """

    dtype: DT
    tf32: bool = False

    @property
    def bytes(self) -> int:
        return {DT.INT8: 1, FP8: 1, DT.FLOAT: 4}.get(self.dtype, 2)

    @property
    def in_parts(self) -> bool:
        return self.dtype == DT.FLOAT and not self.tf32

    @property
    def sums(self) -> str:
        return "tl.int32" if self.dtype == DT.INT8 else "tl.float32"

    @property
    def partial(self) -> str:
        return "*i32" if self.dtype == DT.INT8 else "*fp32"

    @property
    def step(self) -> int:
        """Elements of a swizzled row of shared memory."""
        return _ROW_BYTES // self.bytes

    @property
    def depth(self) -> int:
        """Products along K of one instruction."""
        return _DEPTH_BYTES // self.bytes

    @property
    def aligned(self) -> int:
        """Elements of 16 bytes: what the tensor memory accelerator wants rows to be multiples of."""
        return 16 // self.bytes

    def sums_layout(self, warps: int, columns: int) -> str:
        """Gluon's layout of sums by warpgroup products. Triton has no instruction for 256 columns of integers."""
        return (
            f"gl.NVMMADistributedLayout([3, 0], [{warps}, 1], [16, {min(columns, _WIDEST[self.bytes])}, {self.depth}])"
        )

    def shared(self, step: int, rank: int = 2) -> str:
        """Gluon's layout of a tile whose rows have `step` elements."""
        swizzle = min(step * self.bytes, _ROW_BYTES)
        return f"NVMMASharedLayout(swizzle_byte_width={swizzle}, element_bitwidth={8 * self.bytes}, rank={rank})"
