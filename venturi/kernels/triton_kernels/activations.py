"""act(gate) * up over rows of [gate | up], and the same quantized to fp8."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from venturi.kernels.triton_kernels.launch import options

MAX_ROW = 32768


@triton.jit
def activate(x, KIND: tl.constexpr):
    """SiLU, or GELU's tanh form, in fp32."""
    if KIND == "silu":
        return x / (1.0 + tl.exp(-x))
    inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-inner))


@triton.jit
def gated_kernel(gate_up, out, size, row_stride, KIND: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(gate_up + row * row_stride + columns, mask=inside, other=0.0)
    up = tl.load(gate_up + row * row_stride + size + columns, mask=inside, other=0.0)
    product = activate(gate.to(tl.float32), KIND).to(gate.dtype) * up
    tl.store(out + row * size + columns, product, mask=inside)


def gated(gate_up: Tensor, kind: str) -> Tensor:
    """[..., 2n] -> [..., n]; rows are contiguous."""
    size = gate_up.shape[-1] // 2
    out = torch.empty(*gate_up.shape[:-1], size, dtype=gate_up.dtype, device=gate_up.device)
    rows = gate_up.numel() // gate_up.shape[-1]
    if rows:
        grid = (rows, triton.cdiv(size, 1024))
        gated_kernel[grid](gate_up, out, size, gate_up.stride(-2), KIND=kind, BLOCK=1024, **options(gate_up))
    return out


@triton.jit
def gated_fp8_kernel(
    gate_up, out, scales, size, row_stride, KIND: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """One row a program, held in registers: the product, the row's scale (max |y| / 448), the product in fp8."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(gate_up + row * row_stride + columns, mask=inside, other=0.0)
    up = tl.load(gate_up + row * row_stride + size + columns, mask=inside, other=0.0)
    product = (activate(gate.to(tl.float32), KIND).to(gate.dtype) * up).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(product), 0), 1e-12) / 448.0
    packed = tl.minimum(tl.maximum(product / scale, -448.0), 448.0)
    tl.store(out + row * size + columns, packed.to(out.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


def gated_fp8(gate_up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """[rows, 2n] -> (float8_e4m3fn [rows, n], scales [rows] fp32); n is at most MAX_ROW."""
    rows, size = len(gate_up), gate_up.shape[-1] // 2
    out = torch.empty(rows, size, dtype=torch.float8_e4m3fn, device=gate_up.device)
    scales = torch.empty(rows, dtype=torch.float32, device=gate_up.device)
    if rows:
        block = triton.next_power_of_2(size)
        gated_fp8_kernel[(rows,)](
            gate_up, out, scales, size, gate_up.stride(0), KIND=kind, BLOCK=block,
            num_warps=max(1, min(16, block // 1024)), **options(gate_up),
        )  # fmt: skip
    return out, scales
