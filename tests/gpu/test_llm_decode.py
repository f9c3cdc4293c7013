"""Kernels of a decode step of few sequences on the GPU against fp64: streamed weights, rotation inside attention."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.gpu.test_llm_attention import batch_of, on_device
from venturi.kernels.attention import AttentionKind, paged_attention
from venturi.kernels.quantize import quantize_rows
from venturi.kernels.rotary import rotate_and_write

pytestmark = pytest.mark.gpu
# rows, outputs, inputs, (tile, depth, splits, ahead), gated, residual, bias
CASES = [
    (1, 256, 512, (64, 6, 1, 0), None, False, False),
    (3, 200, 528, (64, 4, 1, 8), None, True, True),
    (16, 1000, 1024, (128, 4, 3, 0), None, True, False),
    (64, 512, 2048, (64, 4, 4, 64), "silu", False, False),
    (8, 192, 4096, (64, 8, 2, 8), "silu", True, True),
    (5, 320, 144, (64, 12, 1, 8), None, False, False),
    (33, 640, 1536, (64, 4, 2, 0), "gelu_tanh", False, False),
    (1, 4096, 14336, (64, 12, 4, 24), None, True, False),
    (9, 64, 64, (64, 6, 4, 8), None, False, False),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_streamed_weights(case: tuple, dtype: torch.dtype) -> None:
    from venturi.kernels.triton_kernels.stream_linear import StreamLinearConfig, stream_linear

    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernel is Hopper's")
    rows, n, k, config, gated, with_residual, with_bias = case
    torch.manual_seed(rows)
    real = torch.bfloat16 if dtype.itemsize == 1 else dtype
    x = torch.randn(rows, k, device="cuda", dtype=real)
    w = torch.randn(2 * n if gated else n, k, device="cuda", dtype=real) * 0.05
    residual = torch.randn(rows, n, device="cuda", dtype=real) if with_residual else None
    bias = torch.randn(len(w), device="cuda", dtype=real) if with_bias else None
    x_scales = scales = None
    if dtype.itemsize == 1:
        scales = w.float().abs().amax(1) / 448
        w = (w.float() / scales[:, None]).to(dtype)
        x, x_scales = quantize_rows(x)
    wanted = x.double() @ w.double().T
    if scales is not None and x_scales is not None:
        wanted *= x_scales.double()[:, None] * scales.double()
    if bias is not None:
        wanted += bias.double()
    if gated:
        gate, up = wanted.chunk(2, 1)
        wanted = (F.silu(gate) if gated == "silu" else F.gelu(gate, approximate="tanh")) * up
    if residual is not None:
        wanted += residual.double()
    tickets = torch.zeros(1 << 12, dtype=torch.int32, device="cuda")
    for _ in range(3):
        ours = stream_linear(
            x, w, StreamLinearConfig(*config), tickets=tickets, x_scales=x_scales, scales=scales, residual=residual,
            bias=bias, gated=gated, out_dtype=real,
        )  # fmt: skip
        # Hopper adds fp8 products in 14 bits.
        tolerance = 1e-2 if dtype.itemsize == 1 else 4e-3
        assert ((ours.double() - wanted).abs() / (wanted.abs() + wanted.abs().mean())).max() < tolerance
        assert not tickets.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "config", "gated"),
    [
        (6144, 4096, (64, 12, 1, 8), None), (200, 528, (64, 4, 2, 0), None), (512, 4096, (64, 6, 1, 0), "silu"),
        (4096, 14336, (64, 8, 6, 0), None), (64, 64, (64, 4, 1, 0), None), (192, 1152, (64, 8, 3, 8), "gelu_tanh"),
    ],
)  # fmt: skip
def test_streamed_weights_of_a_row_prepared_inside(
    n: int, k: int, config: tuple, gated: str | None, with_norm: bool, dtype: torch.dtype
) -> None:
    from venturi.kernels.triton_kernels.stream_linear import RowNorm, StreamLinearConfig, stream_linear

    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernel is Hopper's")
    torch.manual_seed(k)
    real = torch.bfloat16 if dtype.itemsize == 1 else dtype
    x = torch.randn(1, k, device="cuda", dtype=real)
    w = torch.randn(2 * n if gated else n, k, device="cuda", dtype=real) * 0.05
    residual = torch.randn(1, n, device="cuda", dtype=real)
    norm = RowNorm(torch.randn(k, device="cuda", dtype=real), 1e-5, 1.0) if with_norm else None
    y = x.double()
    if norm is not None:
        y = y * (y.square().mean(1, keepdim=True) + norm.eps).rsqrt() * (norm.weight.double() + norm.offset)
    scales = None
    if dtype.itemsize == 1:
        scales = w.float().abs().amax(1) / 448
        w = (w.float() / scales[:, None]).to(dtype)
        # What the kernel rounds to: e4m3, scaled by the largest of the part of K that a program takes.
        step, splits = 128, config[2]
        steps = (k + step - 1) // step
        part = (steps + splits - 1) // splits * step
        for piece in y.split(part, 1):
            scale = piece.abs().max() / 448
            piece.copy_((piece / scale).to(dtype).double() * scale)
    else:
        y = y.to(real).double()
    wanted = y @ w.double().T * (1 if scales is None else scales.double())
    if gated:
        gate, up = wanted.chunk(2, 1)
        wanted = (F.silu(gate) if gated == "silu" else F.gelu(gate, approximate="tanh")) * up
    wanted += residual.double()
    tickets = torch.zeros(1 << 12, dtype=torch.int32, device="cuda")
    for _ in range(3):
        ours = stream_linear(
            x, w, StreamLinearConfig(*config, inside=True), tickets=tickets, scales=scales, residual=residual,
            gated=gated, out_dtype=real, norm=norm,
        )  # fmt: skip
        # A number on the edge of two roundings may fall to either side.
        tolerance = 2e-2 if dtype.itemsize == 1 else 4e-3
        assert ((ours.double() - wanted).abs() / (wanted.abs() + wanted.abs().mean())).max() < tolerance
        assert not tickets.any()


def test_what_streaming_refuses() -> None:
    from venturi.kernels.triton_kernels.stream_linear import StreamLinearConfig, stream_linear

    x, w = torch.randn(2, 24, device="cuda"), torch.randn(64, 24, device="cuda")
    with pytest.raises(ValueError, match="stream_linear"):
        stream_linear(x, w, StreamLinearConfig(), tickets=torch.zeros(8, dtype=torch.int32, device="cuda"))


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(("splits", "keys", "warps"), [(1, 64, 4), (8, 64, 4), (16, 128, 8)])
@pytest.mark.parametrize(
    "kind", [AttentionKind(0.1), AttentionKind(0.1, window=77), AttentionKind(0.1, softcap=9.0)], ids=str
)
@pytest.mark.parametrize(
    ("width", "pairs", "interleaved", "heads", "kv_heads"),
    [(128, 64, False, 32, 8), (64, 16, True, 9, 3), (80, 40, False, 8, 8)],
)
def test_rotation_write_and_decoding(
    width: int, pairs: int, interleaved: bool, heads: int, kv_heads: int, kind: AttentionKind, splits: int, keys: int,
    warps: int, cache: torch.dtype,
) -> None:  # fmt: skip
    from venturi.kernels.triton_kernels.attention_parts import TileConfig
    from venturi.kernels.triton_kernels.decode_rotated import decode_rotated

    torch.manual_seed(2)
    lengths, size, blocks = [1, 33, 900, 2, 2049], 32, 400
    batch = batch_of([1] * 5, lengths, size, blocks)
    batch.positions = torch.tensor(lengths) - 1
    own = batch.block_tables[batch.table_rows.long()].long()
    batch.slots = own[torch.arange(5), batch.positions // size] * size + batch.positions % size
    k_cache, v_cache = (torch.randn(blocks, size, kv_heads, width).to(cache) for _ in range(2))
    rows = torch.randn(5, (heads + 2 * kv_heads) * width).bfloat16()
    q, k, v = (x.view(5, -1, width) for x in rows.split([heads * width, kv_heads * width, kv_heads * width], 1))
    angles, sinks = torch.randn(2100, 2 * pairs), torch.randn(heads)
    wide_k, wide_v = k_cache.bfloat16(), v_cache.bfloat16()
    turned = rotate_and_write(q, k, v, angles, batch.positions, wide_k, wide_v, batch.slots, interleaved)
    theirs_k, theirs_v = wide_k.to(cache), wide_v.to(cache)
    theirs = paged_attention(turned.float(), theirs_k.float(), theirs_v.float(), batch, kind, sinks)
    device = rows.cuda()
    dq, dk, dv = (x.view(5, -1, width) for x in device.split([heads * width, kv_heads * width, kv_heads * width], 1))
    ours_k, ours_v, there = k_cache.cuda(), v_cache.cuda(), on_device(batch)
    for _ in range(2):
        ours = decode_rotated(
            dq, dk, dv, angles.cuda(), interleaved, ours_k, ours_v, there, kind, sinks.cuda(), splits,
            TileConfig(keys, warps=warps, stages=2),
        )  # fmt: skip
        torch.testing.assert_close(ours.cpu().float(), theirs, rtol=2e-2, atol=2e-2)
        assert torch.equal(ours_v.cpu().float(), theirs_v.float())
        torch.testing.assert_close(ours_k.cpu().float(), theirs_k.float(), rtol=0.13, atol=2e-3)
    assert torch.equal(device.cpu(), rows), "the projections are left as they were"
