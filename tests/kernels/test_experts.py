"""Mixtures of experts: routing, grouping and grouped products in Triton's interpreter, against their torch forms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tests.backends.cuda.interpreted  # noqa: F401  (before triton)
from venturi.kernels import moe
from venturi.kernels.moe import ExpertWeights, Gate, Routing
from venturi.kernels.triton_kernels import grouped_linear, routing
from venturi.kernels.triton_kernels.grouped_linear import GroupedConfig

ROUTINGS = [
    Routing("softmax", 2),
    Routing("softmax", 3, renormalize=True, scale=1.3),
    Routing("topk-softmax", 4),
    Routing("grouped-softmax", 3, groups=4, top_groups=2, scale=2.5),
    Routing("grouped-sigmoid", 3, renormalize=True, groups=4, top_groups=2, scale=2.5),
    Routing("grouped-sigmoid", 1, groups=1, top_groups=1),
]


@pytest.mark.parametrize("kind", ROUTINGS, ids=lambda r: f"{r.kind}-{r.top_k}")
@pytest.mark.parametrize("count", [8, 12, 160])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_route(kind: Routing, count: int, dtype: torch.dtype) -> None:
    logits = torch.stack([torch.randperm(count) for _ in range(5)]).to(dtype) / 7
    correction = torch.rand(count) if kind.kind == "grouped-sigmoid" else None
    weights, experts = moe.route(logits, correction, kind)
    ours, chosen = routing.route(logits, correction, kind)
    assert torch.equal(chosen.long(), experts)
    torch.testing.assert_close(ours, weights, rtol=1e-5, atol=1e-6)


def test_of_equal_scores_the_first_is_chosen() -> None:
    _, experts = routing.route(torch.zeros(2, 6), None, Routing("softmax", 3))
    assert experts.tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("kind", ROUTINGS, ids=lambda r: f"{r.kind}-{r.top_k}")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_whatever_the_scores_experts_exist(kind: Routing, value: float) -> None:
    """An expert that does not exist would be read from memory that is not ours."""
    correction = torch.zeros(12) if kind.kind == "grouped-sigmoid" else None
    _, experts = routing.route(torch.full((3, 12), value), correction, kind)
    assert ((experts >= 0) & (experts < 12)).all()


@pytest.mark.parametrize(
    ("tokens", "k", "count", "rows"), [(1, 2, 6, 16), (7, 3, 5, 4), (900, 2, 9, 16), (40, 1, 3, 64)]
)
def test_group(tokens: int, k: int, count: int, rows: int) -> None:
    experts = torch.randint(0, count - 1, (tokens, k), dtype=torch.int32)
    tiles = routing.group(experts, count, rows)
    flat = experts.flatten()
    assert torch.equal(tiles.order.long(), flat.sort(stable=True).indices)
    used = tiles.table[tiles.table[:, 0] >= 0]
    covered = torch.cat([torch.arange(first, end) for _, first, end in used.tolist()])
    assert torch.equal(covered, torch.arange(tokens * k)), "every pair is in one tile"
    assert ((used[:, 2] - used[:, 1]) <= rows).all()
    for expert, first, end in used.tolist():
        assert (flat[tiles.order[first:end].long()] == expert).all()


def made(count: int, hidden: int, inner: int, dtype: torch.dtype, biased: bool) -> ExpertWeights:
    biases = (torch.randn(count, 2 * inner).to(dtype), torch.randn(count, hidden).to(dtype)) if biased else (None, None)
    gate_up, down = torch.randn(count, 2 * inner, hidden) / 4, torch.randn(count, hidden, inner) / 4
    return ExpertWeights(gate_up.to(dtype), down.to(dtype), *biases)


@pytest.mark.parametrize(
    "gate", [Gate("silu"), Gate("gelu_new"), Gate("silu", (1.702, 7.0))], ids=["silu", "gelu", "clamped"]
)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "dtype"),
    [(1, 48, 24, torch.float32), (37, 33, 70, torch.float32), (9, 128, 64, torch.bfloat16), (3, 40, 17, torch.float16)],
)
def test_experts_forward(gate: Gate, biased: bool, tokens: int, hidden: int, inner: int, dtype: torch.dtype) -> None:
    weights = made(6, hidden, inner, dtype, biased)
    x = (torch.randn(tokens, hidden + 5) * 2).to(dtype)[:, :hidden]
    share, experts = moe.route(torch.randn(tokens, 6), None, Routing("softmax", 2, renormalize=True))
    wide = ExpertWeights(*(None if w is None else w.float() for w in vars(weights).values()))
    theirs = moe.experts_forward(x.float(), share, experts, wide, gate)
    ours = grouped_linear.experts_forward(x, share, experts.int(), weights, gate)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(ours.float(), theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize("pairs", [1, 100, 200, 700])
def test_every_tile_gives_the_same(pairs: int) -> None:
    weights, gate = made(4, 64, 32, torch.float32, False), Gate("silu")
    x, experts = torch.randn(pairs, 64), torch.randint(0, 4, (pairs, 1), dtype=torch.int32)
    share = torch.rand(pairs, 1)
    theirs = moe.experts_forward(x, share, experts, weights, gate)
    torch.testing.assert_close(
        grouped_linear.experts_forward(x, share, experts, weights, gate), theirs, rtol=1e-5, atol=1e-4
    )
    assert GroupedConfig.of(pairs, 4, 4).m == {1: 16, 100: 32, 200: 64, 700: 128}[pairs]


def test_nan_stays_with_its_token() -> None:
    weights = made(6, 48, 24, torch.float32, True)
    x = torch.randn(5, 48)
    x[2, 7] = float("nan")
    share, experts = moe.route(torch.randn(5, 6), None, Routing("softmax", 2))
    for gate in (Gate("silu"), Gate("silu", (1.702, 7.0))):
        found = grouped_linear.experts_forward(x, share, experts.int(), weights, gate).isnan()
        assert found[2].all()
        assert not found[[0, 1, 3, 4]].any()


def test_no_tokens() -> None:
    weights = made(6, 48, 24, torch.float32, False)
    share, experts = routing.route(torch.zeros(0, 6), None, Routing("softmax", 2))
    assert grouped_linear.experts_forward(torch.zeros(0, 48), share, experts, weights, Gate("silu")).shape == (0, 48)


def test_gates_that_kernels_do_not_know() -> None:
    assert Gate("relu").on_device is None
    assert replace(Gate("relu"), clamped=(1.0, 2.0)).on_device == "clamped"
