"""A linear layer in bf16 for any number of rows, few above all: weights are packed once and streamed from memory."""

from __future__ import annotations

from collections import OrderedDict

import torch

from venturi.backends.cpu.codegen.activation import Post
from venturi.backends.cpu.codegen.geometry import ConvGeometry
from venturi.backends.cpu.codegen.isa import Isa, host
from venturi.backends.cpu.codegen.matrix import MatrixSpec, Schedule, emit_matrix, pack_matrix
from venturi.backends.cpu.codegen.units import BLOCK, HALF
from venturi.backends.cpu.native.jit import host_jit
from venturi.backends.cpu.native.memory import packed_by_pieces
from venturi.backends.cpu.native.walker import Job

T = torch.Tensor
MOST_JOBS = 64
# Whoever has a channel's weights takes all rows through them. Best of eight ways to share out 40 to 1024 rows (Zen 5).
MOST_GROUPS, BLOCKS = 8, 2
_GROUPS = {"dots": (14, 8, 4, 2, 1), "tiles": (32, 16, 8, 4, 2, 1)}
X, OUT = 0, 4


def multiplier() -> Isa | None:
    """The CPU, where it multiplies bf16."""
    isa = host()
    return isa if isinstance(isa, Isa) and isa.unit(quantized=False) else None


def rows_of_a_group(rows: int, unit: str) -> int:
    """Of a handful, so that few pieces of code serve all numbers of rows: the one with least to compute, where reading
    the weights counts as three rows.

    >>> [rows_of_a_group(n, "dots") for n in (1, 3, 5, 16, 100)]
    [1, 2, 4, 8, 14]
    """
    found = [g for g in _GROUPS[unit] if g <= rows]
    return min(found, key=lambda g: -(-rows // g) * (g + 3))


class RowsLinear:
    """`weight` is [out, in] in bf16, `bias` [out]. Not thread-safe."""

    def __init__(self, isa: Isa, weight: T, bias: T | None) -> None:
        self._isa, self._unit = isa, isa.unit(quantized=False)
        self._out, self._in = weight.shape
        self._weight = packed_by_pieces(weight[:, :, None, None], BLOCK, pack_matrix)
        self._bias = None if bias is None else bias.float().contiguous()
        self._jobs: OrderedDict[int, Job] = OrderedDict()

    def __call__(self, x: T) -> T:
        """[rows, in] in bf16 to [rows, out]."""
        x, rows = x.contiguous(), len(x)
        out = x.new_empty(rows, self._out)
        if not rows:
            return out
        job = self._jobs.get(rows) or self._job(rows)
        words = job.words(0)
        words[X], words[OUT] = x.data_ptr(), out.data_ptr()
        job.run()
        return out

    def _job(self, rows: int) -> Job:
        group = rows_of_a_group(rows, self._unit)
        tiles = 2 if group > HALF else 1
        geometry = ConvGeometry(1, 0, self._in, self._out)
        spec = MatrixSpec(geometry, group // tiles, tiles, self._bias is not None, Post(), unit=self._unit)
        schedule = Schedule(min(MOST_GROUPS, -(-rows // group)), BLOCKS, channels_first=True)
        address = host_jit(self._isa).address(repr(spec), lambda: emit_matrix(self._isa, spec))
        words = [
            0, self._weight.data_ptr(), 0 if self._bias is None else self._bias.data_ptr(), 0, 0, rows,
            *schedule.words(spec, rows), 0, 0, 0,
        ]  # fmt: skip
        job = self._jobs[rows] = Job([(address, words, schedule.tasks(spec, rows))])
        while len(self._jobs) > MOST_JOBS:
            self._jobs.popitem(last=False)
        return job
