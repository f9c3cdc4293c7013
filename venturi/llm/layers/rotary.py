"""Angles of rotary embeddings with every scaling of Hugging Face configs: one function per rope_type.

A function returns (inverse frequencies [pairs], factor of cosines and sines). Sources: "linear" Chen et al. 2023
(position interpolation); "dynamic" NTK-aware scaling; "yarn" Peng et al. 2023; "llama3" the Llama 3.1 model card's
rule; "longrope" Ding et al. 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from venturi.core.errors import ModelError
from venturi.core.registry import nearest
from venturi.llm.models.spec import RotarySpec

Frequencies = tuple[Tensor, float]


def rotary_angles(spec: RotarySpec, max_seq_len: int) -> Tensor:
    """[max_seq_len, 2 * pairs] fp32: cosines, then sines, of position * frequency.

    Scalings that depend on the length of the text (dynamic, longrope) take max_seq_len as that length, so that a
    cached key never has to be rotated again.
    """
    kind = spec.scaling.get("rope_type") or spec.scaling.get("type") or "default"
    if kind not in _KINDS:
        raise ModelError(f"rope_type {kind!r} is unknown.{nearest(kind, _KINDS)} Known: {', '.join(_KINDS)}")
    inverse, factor = _KINDS[kind](spec, max_seq_len)
    angles = torch.arange(max_seq_len, dtype=torch.float32)[:, None] * inverse.float()[None]
    return torch.cat((angles.cos() * factor, angles.sin() * factor), -1)


def _inverse(spec: RotarySpec, theta: float) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, spec.dim, 2, dtype=torch.int64).float() / spec.dim)


def _default(spec: RotarySpec, length: int) -> Frequencies:
    return _inverse(spec, spec.theta), 1.0


def _linear(spec: RotarySpec, length: int) -> Frequencies:
    return _inverse(spec, spec.theta) / spec.scaling["factor"], 1.0


def _dynamic(spec: RotarySpec, length: int) -> Frequencies:
    factor, trained = spec.scaling["factor"], _original(spec)
    stretch = factor * max(length, trained) / trained - (factor - 1)
    return _inverse(spec, spec.theta * stretch ** (spec.dim / (spec.dim - 2))), 1.0


def _llama3(spec: RotarySpec, length: int) -> Frequencies:
    rope, inverse = spec.scaling, _inverse(spec, spec.theta)
    low, high, trained = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inverse
    smooth = (trained / wavelength - low) / (high - low)
    blended = (1 - smooth) * inverse / rope["factor"] + smooth * inverse
    scaled = torch.where(wavelength > trained / low, inverse / rope["factor"], inverse)
    between = (wavelength <= trained / low) & (wavelength >= trained / high)
    return torch.where(between, blended, scaled), 1.0


def _yarn(spec: RotarySpec, length: int) -> Frequencies:
    rope, trained = spec.scaling, _original(spec)
    factor = rope.get("factor") or spec.max_positions / trained

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = rope.get("attention_factor")
    if attention is None:
        if rope.get("mscale") and rope.get("mscale_all_dim"):
            attention = magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"])
        else:
            attention = magnitude(1.0)

    def dimension(rotations: float) -> float:
        return spec.dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    ramp = ((torch.arange(spec.dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    inverse = _inverse(spec, spec.theta)
    return inverse / factor * ramp + inverse * (1 - ramp), attention


def _longrope(spec: RotarySpec, length: int) -> Frequencies:
    rope, trained = spec.scaling, _original(spec)
    factors = torch.tensor(rope["long_factor"] if length > trained else rope["short_factor"], dtype=torch.float32)
    factor = rope.get("factor") or spec.max_positions / trained
    attention = rope.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    return _inverse(spec, spec.theta) / factors, attention


def _original(spec: RotarySpec) -> int:
    return int(spec.scaling.get("original_max_position_embeddings") or spec.max_positions)


_KINDS: dict[str, Callable[[RotarySpec, int], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
    "su": _longrope,
}


def yarn_score_scale(scaling: dict[str, Any]) -> float:
    """DeepSeek multiplies attention scores by (0.1 * mscale_all_dim * ln(factor) + 1)^2."""
    factor, scale = scaling.get("factor", 1.0), scaling.get("mscale_all_dim", 0.0)
    if not scale or factor <= 1:
        return 1.0
    return float((0.1 * scale * math.log(factor) + 1.0) ** 2)
