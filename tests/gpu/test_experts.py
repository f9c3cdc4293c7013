"""The kernels of mixtures of experts on the device, at the sizes of real models, against the experts one by one."""

from __future__ import annotations

import pytest
import torch

from venturi.kernels import moe
from venturi.kernels.moe import ExpertWeights, Gate, Routing

pytestmark = pytest.mark.gpu

ROUTINGS = [
    (Routing("softmax", 8, renormalize=True), 128),
    (Routing("topk-softmax", 4), 32),
    (Routing("grouped-softmax", 6, groups=8, top_groups=3, scale=16.0), 160),
    (Routing("grouped-sigmoid", 8, renormalize=True, groups=8, top_groups=4, scale=2.5), 256),
]


@pytest.mark.parametrize(("routing", "count"), ROUTINGS, ids=lambda r: getattr(r, "kind", r))
@pytest.mark.parametrize("tokens", [1, 333])
def test_route(routing: Routing, count: int, tokens: int) -> None:
    logits = torch.stack([torch.randperm(count) for _ in range(tokens)]) / 50.0
    correction = torch.rand(count) if routing.kind == "grouped-sigmoid" else None
    weights, experts = moe.route(logits, correction, routing)
    ours, chosen = moe.route(logits.cuda(), None if correction is None else correction.cuda(), routing)
    torch.testing.assert_close(ours.cpu(), weights, rtol=1e-4, atol=1e-6)
    assert torch.equal(chosen.cpu().long(), experts)


def made(count: int, hidden: int, inner: int, dtype: torch.dtype, biased: bool) -> ExpertWeights:
    def some(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda") / shape[-1] ** 0.5).to(dtype)

    biases = (some(count, 2 * inner), some(count, hidden)) if biased else (None, None)
    return ExpertWeights(some(count, 2 * inner, hidden), some(count, hidden, inner), *biases)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gate", [Gate("silu"), Gate("silu", (1.702, 7.0))], ids=["silu", "clamped"])
@pytest.mark.parametrize("tokens", [1, 7, 100, 1500])
def test_experts_forward_in_a_graph(dtype: torch.dtype, gate: Gate, tokens: int) -> None:
    weights = made(32, 1024, 384, dtype, gate.clamped is not None)
    x, logits = torch.randn(tokens, 1024, device="cuda").to(dtype), torch.randn(tokens, 32, device="cuda")
    routing = Routing("softmax", 4, renormalize=True)

    def layer() -> torch.Tensor:
        return moe.experts_forward(x, *moe.route(logits, None, routing), weights, gate)

    first = layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer()
    logits.copy_(torch.randn(tokens, 32, device="cuda"))
    graph.replay()
    share, experts = (y.cpu() for y in moe.route(logits, None, routing))
    wide = ExpertWeights(*(None if w is None else w.float().cpu() for w in vars(weights).values()))
    theirs = moe.experts_forward(x.float().cpu(), share, experts, wide, gate)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.float().cpu(), theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))
    assert not torch.equal(out, first), "other experts were chosen"


def test_a_gate_without_a_kernel_goes_expert_by_expert() -> None:
    weights = made(4, 64, 32, torch.float32, False)
    x, experts = torch.randn(9, 64, device="cuda"), torch.randint(0, 4, (9, 2), device="cuda")
    share = torch.rand(9, 2, device="cuda")
    ours = moe.experts_forward(x, share, experts, weights, Gate("relu"))
    cpu = ExpertWeights(*(None if w is None else w.cpu() for w in vars(weights).values()))
    theirs = moe.experts_forward(x.cpu(), share.cpu(), experts.cpu(), cpu, Gate("relu"))
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)
