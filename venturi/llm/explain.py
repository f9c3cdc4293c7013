"""`LLM.explain()`: which code computes each part of a step on this device, and the memory plan."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from venturi.llm.layers.feed_forward import Experts
from venturi.llm.layers.linear import Linear
from venturi.llm.long_chunks import MIN_QUERIES
from venturi.llm.models.spec import MoeSpec

if TYPE_CHECKING:
    from venturi.llm.api import LLM


def explain(llm: LLM) -> str:
    spec, config = llm.loaded.model.spec, llm.loaded.config
    cuda = llm.device.type == "cuda"
    attention = "torch over gathered blocks"
    if cuda:
        refused = getattr(llm.runner, "long_refusal", None)
        long = f"long chunks too: {refused}" if refused else f"cuDNN from {MIN_QUERIES} new tokens on"
        attention = f"Triton split-KV (decode), Triton tiles (prefill; {long})"
    methods = Counter(m.method.name for m in llm.loaded.model.modules() if isinstance(m, Linear))
    windows = Counter(layer.attention.window for layer in spec.layers)
    experts = sum(isinstance(layer.mlp, MoeSpec) for layer in spec.layers)
    lines = [
        f"{config.architecture}: {len(spec.layers)} layers, hidden {spec.hidden}, vocabulary {spec.vocab_size},"
        f" context {llm.loaded.max_seq_len}, {str(llm.loaded.dtype).removeprefix('torch.')}",
        "  linear layers    " + ", ".join(f"{count} x {name}" for name, count in methods.items()),
        f"  attention        {attention}" + "".join(f"; {n} layers see {w or 'all'} keys" for w, n in windows.items()),
        f"  norms, rotary    {'Triton, fused with residual and cache write' if cuda else 'torch'}",
        f"  sampling         {'Triton, threshold search without sorting' if cuda else 'torch'}",
    ]
    if llm.deterministic:
        lines.append("  deterministic    a token's bits do not depend on what else is in its step")
    if experts:
        grouped = cuda and all(m.gate.on_device for m in llm.loaded.model.modules() if isinstance(m, Experts))
        how = "Triton routing, grouped products" if grouped else "expert by expert"
        lines.append(f"  experts          {experts} layers, {how}")
    graphs = getattr(llm.runner, "describe_graphs", None)
    lines.append(f"  decode steps     {graphs() if graphs else 'launched one by one'}")
    return "\n".join([*lines, str(llm.memory_plan)])
