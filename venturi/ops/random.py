"""Random generators. Not pure: passes must neither fold nor merge them. A seed makes a node repeatable."""

from __future__ import annotations

import torch

from venturi.ir.dtypes import DT
from venturi.ops.table import RANDOM, op
from venturi.ops.tensors import STORAGE

T = torch.Tensor


def _generator(seed: float | None) -> torch.Generator | None:
    if seed is None:
        return None
    generator = torch.Generator()
    generator.manual_seed(int(torch.tensor(seed, dtype=torch.float64).view(torch.int64)))
    return generator


def _type(dtype: int | None, like: T | None) -> torch.dtype:
    if dtype:
        return STORAGE[DT(dtype)]
    return like.dtype if like is not None and like.dtype.is_floating_point else torch.float32


@op("RandomNormal", RANDOM)
def random_normal(
    *, shape: list[int], dtype: int = 1, mean: float = 0.0, scale: float = 1.0, seed: float | None = None
) -> T:
    return (torch.randn(shape, generator=_generator(seed)) * scale + mean).to(_type(dtype, None))


@op("RandomUniform", RANDOM)
def random_uniform(
    *, shape: list[int], dtype: int = 1, high: float = 1.0, low: float = 0.0, seed: float | None = None
) -> T:
    return (torch.rand(shape, generator=_generator(seed)) * (high - low) + low).to(_type(dtype, None))


@op("RandomNormalLike", RANDOM)
def random_normal_like(
    x: T, *, dtype: int | None = None, mean: float = 0.0, scale: float = 1.0, seed: float | None = None
) -> T:
    return (torch.randn(x.shape, generator=_generator(seed)) * scale + mean).to(_type(dtype, x))


@op("RandomUniformLike", RANDOM)
def random_uniform_like(
    x: T, *, dtype: int | None = None, high: float = 1.0, low: float = 0.0, seed: float | None = None
) -> T:
    return (torch.rand(x.shape, generator=_generator(seed)) * (high - low) + low).to(_type(dtype, x))


@op("Bernoulli", RANDOM)
def bernoulli(x: T, *, dtype: int | None = None, seed: float | None = None) -> T:
    drawn = torch.rand(x.shape, generator=_generator(seed)) < x.float()
    return drawn.to(STORAGE[DT(dtype)] if dtype else x.dtype)


@op("Multinomial", RANDOM)
def multinomial(x: T, *, dtype: int = 6, sample_size: int = 1, seed: float | None = None) -> T:
    weights = torch.softmax(x.float(), -1)
    return torch.multinomial(weights, sample_size, True, generator=_generator(seed)).to(STORAGE[DT(dtype)])
