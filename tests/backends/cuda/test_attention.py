"""The generated attention kernel, run by Triton's interpreter, against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import venturi as vt
from tests.backends.cuda.interpreted import InterpretedDevice
from tests.backends.cuda.test_clusters import run_all, tensor
from venturi.backends.cuda.tactics.attention import TritonAttention


def attend(q, k, v, mask=None, **attrs):
    net = vt.Network()
    given = {"q": q, "k": k, "v": v} | ({} if mask is None else {"mask": mask})
    names = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.bool: "bool", torch.float32: "float32"}
    inputs = [net.input(n, tuple(x.shape), names[x.dtype]) for n, x in given.items()]
    net.output("y", net.attention(*inputs, **attrs))
    return run_all(net, TritonAttention(InterpretedDevice()), given)


def half(*shape, seed=0, dtype=torch.float16, special=False):
    return tensor(*shape, seed=seed, dtype=dtype, special=special)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("causal", [0, 1])
def test_heads_of_four_dimensions(dtype, causal):
    q = half(2, 3, 37, 32, dtype=dtype)
    k, v = half(2, 3, 70, 32, seed=1, dtype=dtype), half(2, 3, 70, 32, seed=2, dtype=dtype)
    assert attend(q, k, v, is_causal=causal) == 1


def test_grouped_queries_in_three_dimensions():
    q, k, v = half(2, 19, 4 * 48), half(2, 33, 2 * 48, seed=1), half(2, 33, 2 * 48, seed=2)
    assert attend(q, k, v, q_num_heads=4, kv_num_heads=2) == 1


@pytest.mark.parametrize("shape", [(33,), (17, 33), (2, 1, 1, 33), (1, 4, 17, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bool])
def test_masks_broadcast(shape, dtype):
    q, k, v = half(2, 4, 17, 16), half(2, 4, 33, 16, seed=1), half(2, 4, 33, 16, seed=2)
    mask = half(*shape, seed=7)
    if len(shape) == 1:
        mask = mask[None]
    mask = mask > -1 if dtype == torch.bool else mask
    assert attend(q, k, v, mask) == 1


def test_nan_and_infinity_spread_as_in_the_reference():
    q, k, v = half(1, 2, 20, 16, special=True), half(1, 2, 20, 16, seed=1), half(1, 2, 20, 16, seed=2, special=True)
    assert attend(q, k, v) == 1


def test_strided_heads_are_not_copied():
    joined = half(2, 24, 3 * 2 * 32)
    q, k, v = joined.split(64, 2)
    assert not q.is_contiguous()
    assert attend(q, k, v, q_num_heads=2, kv_num_heads=2) == 1


def test_odd_heads_are_refused():
    assert attend(half(1, 2, 8, 20), half(1, 2, 8, 20), half(1, 2, 8, 20)) == 0
    assert np.isfinite(half(1, 2, 8, 20).numpy()).all()
