"""Losses and optimizer steps (forward formulas only)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from venturi.ops.table import TRAINING, op

T = torch.Tensor


@op("NegativeLogLikelihoodLoss", ulps=64)
def negative_log_likelihood_loss(
    x: T, target: T, weight: T | None = None, *, ignore_index: int | None = None, reduction: str = "mean"
) -> T:
    ignored = -100 if ignore_index is None else ignore_index
    if x.dim() == 1:
        x, target = x[None], target.reshape(1)
    return F.nll_loss(x, target.long(), weight, ignore_index=ignored, reduction=reduction)


@op("SoftmaxCrossEntropyLoss", ulps=64)
def softmax_cross_entropy_loss(
    x: T, target: T, weight: T | None = None, *, ignore_index: int | None = None, reduction: str = "mean"
) -> tuple[T, T]:
    log_probability = torch.log_softmax(x, 1)
    loss = negative_log_likelihood_loss(log_probability, target, weight, ignore_index=ignore_index, reduction=reduction)
    return loss, log_probability


def _each(groups: int, inputs: tuple[T, ...], step: Callable[..., tuple[T, ...]]) -> tuple[T, ...]:
    """Variadic inputs come grouped by role; apply `step` per tensor and regroup its results."""
    count = len(inputs) // groups
    results = [step(*inputs[i::count]) for i in range(count)]
    return tuple(r[j] for j in range(groups - 1) for r in results)


@op("Adagrad", domain=TRAINING, ulps=32)
def adagrad(
    rate: T, count: T, *xs: T, decay_factor: float = 0.0, epsilon: float = 0.0, norm_coefficient: float = 0.0
) -> tuple[T, ...]:
    r = rate / (1 + count * decay_factor)

    def step(x: T, g: T, h: T) -> tuple[T, ...]:
        g = norm_coefficient * x + g
        h = h + g * g
        return (x - r * g / (torch.sqrt(h) + epsilon)).to(x.dtype), h.to(x.dtype)

    return _each(3, xs, step)


@op("Momentum", domain=TRAINING, ulps=32)
def momentum(rate: T, count: T, *xs: T, alpha: float, beta: float, mode: str, norm_coefficient: float) -> tuple[T, ...]:
    def step(x: T, g: T, v: T) -> tuple[T, ...]:
        g = norm_coefficient * x + g
        v = alpha * v + (beta if int(count) > 0 else 1.0) * g
        return (x - rate * (g + alpha * v if mode == "nesterov" else v)).to(x.dtype), v.to(x.dtype)

    return _each(3, xs, step)


@op("Adam", domain=TRAINING, ulps=32)
def adam(
    rate: T, count: T, *xs: T, alpha: float = 0.9, beta: float = 0.999, epsilon: float = 1e-6,
    norm_coefficient: float = 0.0, norm_coefficient_post: float = 0.0,
) -> tuple[T, ...]:  # fmt: skip
    t = int(count)
    r = rate * (1 - beta**t) ** 0.5 / (1 - alpha**t) if t > 0 else rate

    def step(x: T, g: T, v: T, h: T) -> tuple[T, ...]:
        g = norm_coefficient * x + g
        v, h = alpha * v + (1 - alpha) * g, beta * h + (1 - beta) * g * g
        new = (1 - norm_coefficient_post) * (x - r * v / (torch.sqrt(h) + epsilon))
        return new.to(x.dtype), v.to(x.dtype), h.to(x.dtype)

    return _each(4, xs, step)
