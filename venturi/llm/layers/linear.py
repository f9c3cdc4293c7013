"""Linear layers. `Linear` knows which checkpoint tensors make up its weight; a `LinearMethod` knows the numerics."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from venturi.core.errors import ModelError
from venturi.kernels.quantize import ScaledRows


class LinearMethod(Protocol):
    """How a weight is kept and applied. `prepare` runs once, when all of the weight is loaded."""

    name: str
    takes_fp8: bool
    """Whether `apply` takes ScaledRows as well, so that what makes x may quantize it on the way out."""

    def prepare(self, layer: Linear) -> None: ...

    def apply(self, layer: Linear, x: Tensor | ScaledRows) -> Tensor: ...


class PlainMethod:
    """The weight as it is, through torch (cuBLASLt on CUDA)."""

    name = "torch linear"
    takes_fp8 = False

    def prepare(self, layer: Linear) -> None:
        pass

    def apply(self, layer: Linear, x: Tensor | ScaledRows) -> Tensor:
        assert isinstance(x, Tensor), "only given to methods that take it"
        return F.linear(x, layer.weight, layer.bias)


class Linear(nn.Module):
    """y = x W^T + b, of several checkpoint tensors stacked by rows (`pieces`, name -> rows).

    Args:
        pieces: e.g. {"q_proj": 2048, "k_proj": 512, "v_proj": 512}; one unnamed piece ("") is the layer itself.
    """

    def __init__(self, in_features: int, pieces: dict[str, int] | int, *, bias: bool = False) -> None:
        super().__init__()
        self.pieces = {"": pieces} if isinstance(pieces, int) else pieces
        self.in_features, self.out_features = in_features, sum(self.pieces.values())
        self.weight = nn.Parameter(torch.empty(self.out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(self.out_features), requires_grad=False) if bias else None
        self.scales: Tensor | None = None
        self.method: LinearMethod = PlainMethod()

    def forward(self, x: Tensor | ScaledRows) -> Tensor:
        return self.method.apply(self, x)

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        """The pieces of an output."""
        return y.split(list(self.pieces.values()), dim=-1)

    def rows(self, piece: str) -> slice:
        """Where a piece lies in the weight and bias."""
        start = 0
        for name, count in self.pieces.items():
            if name == piece:
                return slice(start, start + count)
            start += count
        raise ModelError(f"no piece {piece!r} in a linear layer of {', '.join(map(repr, self.pieces))}")
