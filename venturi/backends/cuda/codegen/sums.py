"""Where the sums of a warpgroup's products lie, and how they get to memory without passing through shared memory.

A thread holds two neighbouring columns of every eight of a tile of sums. Weights are stored in an order (`shuffled`)
that makes these neighbours in the result, as many as one access moves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from venturi.backends.cuda.codegen.tile import TileBody
from venturi.ir.dtypes import DT
from venturi.ops.tensors import STORAGE

# A thread's registers, by the number of warpgroups that compute, and those of the warp that feeds them.
CONSUMER_REGISTERS, PRODUCER_REGISTERS = {2: 240, 3: 160}, 24


def chunk_of(tile: TileBody) -> int:
    """Neighbouring columns of a thread: 16 bytes of the result."""
    assert tile.output.dtype is not None
    return 16 // STORAGE[tile.output.dtype].itemsize


def rows_layout(rows: int, columns: int, chunk: int, shape: str = "[BM, BN]") -> str:
    """Where the sums are, in the result's order: registers, lanes and warps by the (row, column) they add."""
    right, down = [1 << i for i in range(chunk.bit_length() - 1)], [8]
    right += [4 * chunk << i for i in range((columns // (4 * chunk)).bit_length() - 1)]
    down += [64 << i for i in range((rows // 64).bit_length() - 1)]
    registers = [[0, c] for c in right] + [[r, 0] for r in down]
    lanes = [[0, chunk], [0, 2 * chunk], [1, 0], [2, 0], [4, 0]]
    return f"gl.DistributedLinearLayout({registers}, {lanes}, [[16, 0], [32, 0]], [], {shape})"


def ordered(columns: int, chunk: int, acc: str = "acc", rows: str = "rows", shape: str = "[BM, BN]") -> list[str]:
    """`acc` in the layout `rows`: renames registers, moves nothing."""
    return [
        f"{acc} = gl.permute(gl.reshape({acc}, [BM, {columns // (4 * chunk)}, {chunk // 2}, 4, 2]), (0, 1, 3, 2, 4))",
        f"{acc} = gl.convert_layout(gl.reshape({acc}, {shape}), {rows})",
    ]


def shuffled(weight: torch.Tensor, tile: TileBody, columns: int, together: int = 2) -> torch.Tensor:
    """Weights [n, k] as the kernels read them: [n padded to whole tiles of `columns`, k], rows of every tile in
    another order. A thread has `together` neighbours of them in sums, other numbers in operands."""
    chunk = chunk_of(tile)
    padded = F.pad(weight, [0, 0, 0, -weight.shape[0] % columns])
    tiles = padded.reshape(-1, columns // (4 * chunk), 4, chunk // together, together, weight.shape[1])
    return tiles.permute(0, 1, 3, 2, 4, 5).reshape(padded.shape).contiguous()


def widened(name: str, dtype: DT | None) -> str:
    """A residual in fp32."""
    return f"_real_bytes({name})" if dtype == DT.INT8 else f"{name}.to(tl.float32)"
