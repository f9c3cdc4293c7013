"""What generated code computes of a language model on the CPU; nothing where llvmlite or the CPU is not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from venturi.backends.cpu.codegen.isa import Isa

if TYPE_CHECKING:
    from venturi.llm.cpu_attention import GeneratedAttention


def multiplier() -> Isa | None:
    """The CPU, where it multiplies bf16."""
    try:
        from venturi.backends.cpu.native.rows_linear import multiplier as found
    except ImportError:  # no llvmlite
        return None
    return found()


def generated_attention() -> GeneratedAttention | None:
    """What computes a step's attention."""
    try:
        from venturi.llm.cpu_attention import generated_attention as found
    except ImportError:  # no llvmlite
        return None
    return found()
