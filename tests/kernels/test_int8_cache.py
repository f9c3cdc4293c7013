"""The int8 KV cache: codes and scales, and attention over them, in torch and in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

import tests.backends.cuda.interpreted  # noqa: F401  (before triton)
from tests.kernels.test_triton_kernels import KINDS, make_batch
from venturi.kernels.attention import AttentionKind, paged_attention
from venturi.kernels.rotary import quantize_heads, rotate_and_write
from venturi.kernels.triton_kernels import rotary
from venturi.kernels.triton_kernels.attention_parts import TileConfig
from venturi.kernels.triton_kernels.decode import decode
from venturi.kernels.triton_kernels.prefill import prefill


def empty_cache(blocks: int, size: int, heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, tuple]:
    k, v = (torch.zeros(blocks, size, heads, dim, dtype=torch.int8) for _ in "kv")
    return k, v, (torch.zeros(blocks, size, heads), torch.zeros(blocks, size, heads))


def wide(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return codes.float() * scale[..., None]


def test_codes_are_within_half_a_step() -> None:
    x = torch.randn(50, 3, 64) * torch.logspace(-6, 6, 50)[:, None, None]
    x[0], x[1, 0, 5] = 0.0, 3e38
    codes, scale = quantize_heads(x)
    assert codes.dtype == torch.int8
    assert codes.abs().max() == 127
    assert ((wide(codes, scale) - x).abs() <= scale[..., None] * 0.5001).all()


def test_what_is_not_finite_stays_so() -> None:
    x = torch.randn(4, 2, 16)
    x[0, 0, 3], x[1, 1, 5], x[2, 0, 0] = float("nan"), float("inf"), -float("inf")
    spoiled = wide(*quantize_heads(x)).isfinite().logical_not().any(-1)
    assert spoiled.nonzero().tolist() == [[0, 0], [1, 1], [2, 0]]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [0, 5, 12])
@pytest.mark.parametrize("kv_heads", [1, 3, 10])
def test_rotate_and_write(interleaved: bool, pairs: int, kv_heads: int) -> None:
    tokens, heads, dim = 7, 5, 24
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim)
    q, k, v = (x.view(tokens, -1, dim) for x in qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], 1))
    angles = torch.randn(50, 2 * pairs) if pairs else None
    positions, slots = torch.randint(0, 50, (tokens,)), torch.randperm(10 * 8)[:tokens]
    k[0, 0], v[1, 0, 2], v[2, 0, 0] = 0.0, float("nan"), float("inf")
    theirs, ours = empty_cache(10, 8, kv_heads, dim), empty_cache(10, 8, kv_heads, dim)
    q_theirs = rotate_and_write(q.clone(), k, v, angles, positions, *theirs[:2], slots, interleaved, theirs[2])
    q_ours = rotary.rotate_and_write(q.clone(), k, v, angles, positions, *ours[:2], slots, interleaved, ours[2])
    torch.testing.assert_close(q_ours, q_theirs, rtol=1e-5, atol=1e-5)
    for place in (0, 1):
        torch.testing.assert_close(ours[2][place], theirs[2][place], rtol=1e-5, atol=0, equal_nan=True)
        apart = (ours[place].int() - theirs[place].int()).abs()
        assert apart.max() <= 1
        assert (apart > 0).float().mean() < 0.01, "only where rotations differ by a rounding"


@pytest.mark.parametrize("kind", KINDS, ids=["plain", "window", "softcap"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "sinks", "dtype"),
    [(6, 2, 24, False, torch.float32), (4, 1, 64, True, torch.float32), (8, 2, 128, False, torch.bfloat16)],
)
def test_paged_attention(
    kind: AttentionKind, heads: int, kv_heads: int, dim: int, sinks: bool, dtype: torch.dtype
) -> None:
    lengths, size = [1, 70, 200], 8
    k_cache, v_cache, scales = empty_cache(90, size, kv_heads, dim)
    for cache, scale in ((k_cache, scales[0]), (v_cache, scales[1])):
        codes, factors = quantize_heads(torch.randn(90, size, kv_heads, dim))
        cache.copy_(codes)
        scale.copy_(factors)
    plain = wide(k_cache, scales[0]), wide(v_cache, scales[1])
    sink = torch.randn(heads) if sinks else None
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    singles = make_batch([1, 1, 1], lengths, size, 90)
    q = torch.randn(3, heads, dim).to(dtype)
    wanted = paged_attention(q.float(), *plain, singles, kind, sink)
    torch.testing.assert_close(
        paged_attention(q, k_cache, v_cache, singles, kind, sink, scales).float(), wanted, **tolerance
    )
    for splits in (1, 4):
        ours = decode(q, k_cache, v_cache, singles, kind, sink, splits, TileConfig(), scales=scales)
        torch.testing.assert_close(ours.float(), wanted, **tolerance)
    mixed = make_batch([1, 37, 20], lengths, size, 90)
    q = torch.randn(58, heads, dim).to(dtype)
    wanted = paged_attention(q.float(), *plain, mixed, kind, sink)
    torch.testing.assert_close(
        paged_attention(q, k_cache, v_cache, mixed, kind, sink, scales).float(), wanted, **tolerance
    )
    ours = prefill(q, k_cache, v_cache, mixed, kind, sink, TileConfig(32, 16), scales=scales)
    torch.testing.assert_close(ours.float(), wanted, **tolerance)
