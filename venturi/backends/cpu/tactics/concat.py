"""Concat whose inputs may already lie in its output: what is in place is not copied."""

from __future__ import annotations

import torch

from venturi.backends.base import Config, Kernel, RegionView
from venturi.ir.build import rank

T = torch.Tensor


class JoinConcat:
    """The context places inputs inside the output where their memory is one piece of it; the others are copied in."""

    name = "aten-join"

    def match(self, region: RegionView) -> list[Config] | str:
        node = region.node
        if node.op_type != "Concat" or node.domain:
            return "not Concat"
        if any(v is None or region.is_constant(v) or rank(v) is None for v in node.inputs):
            return "a constant input, or one of unknown rank"
        if any(v.dtype is None or v.dtype.is_string() for v in node.inputs if v is not None):
            return "strings"
        return [{}]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        dims = rank(region.node.inputs[0]) or 1
        axis = int(region.attrs(region.node)["axis"]) % dims

        def run_out(*parts: T, out: T) -> None:
            at = 0
            for part in parts:
                home = out.narrow(axis, at, part.shape[axis])
                if part.data_ptr() != home.data_ptr():
                    home.copy_(part)
                at += part.shape[axis]

        return Kernel(lambda *parts: torch.cat(parts, axis), run_out, joins=axis)
