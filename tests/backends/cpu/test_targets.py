"""Every generated kernel compiles for every architecture we write for, whatever machine this is, and keeps its sums
in registers."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("llvmlite")

from venturi.backends.cpu.codegen.activation import Post
from venturi.backends.cpu.codegen.axes import Axes
from venturi.backends.cpu.codegen.body import Body, Statement
from venturi.backends.cpu.codegen.depthwise import DepthwiseSpec, emit_depthwise
from venturi.backends.cpu.codegen.direct import DirectSpec, emit_direct
from venturi.backends.cpu.codegen.element import BF16, FLOAT
from venturi.backends.cpu.codegen.elementwise import ElementwiseSpec, emit_elementwise
from venturi.backends.cpu.codegen.geometry import ConvGeometry
from venturi.backends.cpu.codegen.interleave import InterleaveSpec, emit_interleave
from venturi.backends.cpu.codegen.isa import AVX2, AVX512, NEON, Isa
from venturi.backends.cpu.codegen.pool import PoolSpec, emit_global_mean, emit_pool
from venturi.backends.cpu.codegen.rows import RowSpec, emit_rows
from venturi.backends.cpu.codegen.winograd import WinogradSpec, emit_patches, emit_products
from venturi.backends.cpu.native.contraction import TILES
from venturi.backends.cpu.native.jit import optimized
from venturi.backends.cpu.native.walker import walker_ir

IMAGE = ConvGeometry(14, 14, 40, 72, (3, 3), (1, 1), (1, 1, 1, 1))
ISAS = pytest.mark.parametrize("isa", [AVX512, AVX2, NEON], ids=lambda i: i.name)
MULTIPLY_ADD = {"avx512": r"vfmadd\w+ps\s.*zmm", "avx2": r"vfmadd\w+ps\s.*ymm", "neon": r"fmla\s+v"}


def _assembly(isa: Isa, text: str) -> str:
    module, machine = optimized(isa, text)
    return str(machine.emit_assembly(module))


def _kernels(isa: Isa) -> dict[str, str]:
    rows, vectors, unroll = TILES[isa.name][0]
    gelu = Post("Gelu", residual=True)
    winograd = WinogradSpec(IMAGE, 4, rows, vectors, 2, unroll, True, gelu)
    softmax = Body((FLOAT, FLOAT), (Statement("Add", (0, 1)), Statement("Softmax", (2,))), 3)
    pointwise = Body((FLOAT, BF16), (Statement("Mul", (0, 1)), Statement("Erf", (2,)), Statement("Log", (3,))), 4)
    return {
        "direct": emit_direct(isa, DirectSpec(IMAGE, rows, vectors, 8, unroll, 0, False, True, gelu)),
        "blocked": emit_direct(isa, DirectSpec(IMAGE, rows, vectors, 8, unroll, 16, True, False, Post())),
        "patches": emit_patches(isa, winograd),
        "products": emit_products(isa, winograd),
        "depthwise": emit_depthwise(isa, DepthwiseSpec(IMAGE, 7, 1, True, Post("HardSwish"))),
        "max": emit_pool(isa, PoolSpec(IMAGE, "max")),
        "mean": emit_pool(isa, PoolSpec(IMAGE, "mean", True)),
        "global": emit_global_mean(isa, 49, 70, BF16),
        "rows": emit_rows(isa, RowSpec(Axes((0, 100), ((100, 1), (0, 1))), softmax, 1)),
        "pointwise": emit_elementwise(isa, ElementwiseSpec(Axes((0, 7, 33), ((231, 33, 1), (0, 33, 1))), pointwise)),
        "interleave": emit_interleave(isa, InterleaveSpec(3, 1000, BF16)),
        "walker": walker_ir(isa),
    }


@ISAS
def test_all_kernels_compile(isa: Isa) -> None:
    for name, text in _kernels(isa).items():
        assert "ret" in _assembly(isa, text), name


@ISAS
def test_products_use_the_widest_vectors_and_stay_in_registers(isa: Isa) -> None:
    """In the loop over channels of a whole tile: as many multiply-adds as the tile has vectors, sums in registers.

    LLVM may keep weights or addresses on the stack; a spilled sum would cost two accesses a step.
    """
    for rows, vectors, unroll in TILES[isa.name]:
        geometry = ConvGeometry(1, 0, 256, 16 * vectors * isa.lanes)
        text = emit_direct(isa, DirectSpec(geometry, rows, vectors, 8, unroll, 0, False, False, Post()))
        blocks = re.split(r"^\.?L\w+:", _assembly(isa, text), flags=re.M)
        found = [list(re.finditer(MULTIPLY_ADD[isa.name], b)) for b in blocks]
        loops = [b[: f[-1].end()] for b, f in zip(blocks, found) if len(f) >= rows * vectors]
        assert loops, f"{rows}x{vectors}: no loop of {rows * vectors} multiply-adds"
        accesses = min(len(re.findall(r"\((%rsp|%rbp)\)|\[sp", b)) for b in loops)
        assert accesses <= unroll * rows * vectors / 4, f"{rows}x{vectors}: {accesses} accesses to the stack"
