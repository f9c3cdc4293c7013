"""Phi-3 and Phi-4: Llama's shape with fused projections in the checkpoint, long rope, partly rotated heads."""

from __future__ import annotations

from venturi.llm.models.llama import like_llama
from venturi.llm.models.registry import Architecture

ARCHITECTURE = Architecture(like_llama)
