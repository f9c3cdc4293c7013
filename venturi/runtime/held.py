"""Inputs and outputs that stay where they are from run to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from venturi.core.errors import RequestError


@dataclass(frozen=True)
class Held:
    """`run` reads `inputs` and overwrites `outputs`, on a GPU in the order of the caller's current stream."""

    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    run: Callable[[], None]


def hold_on_host(execute: Callable[[Sequence[Any]], list[Any]], args: Sequence[Any]) -> Held:
    """Of a context that gives new outputs at every run, which are copied. Raises RequestError for what is no tensor."""
    if not all(isinstance(a, torch.Tensor) for a in args):
        raise RequestError("only tensors can be bound; use engine.run")
    inputs = tuple(a.clone() for a in args)
    outputs = tuple(execute(inputs))
    if not all(isinstance(o, torch.Tensor) for o in outputs):
        raise RequestError("the outputs are no tensors and cannot be bound; use engine.run")
    held = tuple(o.clone() for o in outputs)

    def run() -> None:
        for own, new in zip(held, execute(inputs)):
            if new.shape != own.shape:
                raise RequestError(
                    f"an output had shape {list(own.shape)} when it was bound and has {list(new.shape)} now: its shape "
                    "depends on values; use engine.run"
                )
            own.copy_(new)

    return Held(inputs, held, run)
