"""What generated code computes of a language model on the CPU; nothing where llvmlite or the CPU is not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from venturi.backends.cpu.codegen.isa import Isa
from venturi.llm.models.spec import AttentionSpec

if TYPE_CHECKING:
    from venturi.llm.cpu_attention import GeneratedAttention


def multiplier() -> Isa | None:
    """The CPU, where it multiplies bf16."""
    try:
        from venturi.backends.cpu.native.rows_linear import multiplier as found
    except ImportError:  # no llvmlite
        return None
    return found()


def generated_attention(*, always: bool = False) -> GeneratedAttention | None:
    """What computes a step's attention; all of it, with `always`."""
    try:
        from venturi.llm.cpu_attention import generated_attention as found
    except ImportError:  # no llvmlite
        return None
    return found(always=always)


def serves_attention(spec: AttentionSpec, dtype: torch.dtype, k_cache: Tensor) -> bool:
    """Whether there is code for a layer's attention over this cache."""
    try:
        from venturi.llm.cpu_attention import serves
    except ImportError:  # no llvmlite
        return False
    return serves(spec, dtype, k_cache)
