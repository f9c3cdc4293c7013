"""The list of architectures, by the name in config.json's "architectures"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from venturi.core.errors import ModelError
from venturi.core.registry import nearest
from venturi.llm.models.config import Config
from venturi.llm.models.spec import DecoderSpec

if TYPE_CHECKING:
    from torch import Tensor

FILES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen",
    "Qwen3ForCausalLM": "qwen",
    "Qwen3MoeForCausalLM": "qwen_moe",
    "Gemma2ForCausalLM": "gemma",
    "Gemma3ForCausalLM": "gemma",
    "Phi3ForCausalLM": "phi3",
    "GPT2LMHeadModel": "gpt2",
    "MixtralForCausalLM": "mixtral",
    "GptOssForCausalLM": "gpt_oss",
    "DeepseekV2ForCausalLM": "deepseek",
    "DeepseekV3ForCausalLM": "deepseek",
}


@dataclass(frozen=True)
class Architecture:
    """Args:
    spec: config -> what the model is made of.
    renames: (pattern, replacement) applied in order to checkpoint names, after a leading "model." is dropped.
    ignored: patterns of checkpoint names that carry no weight we need.
    transform: (our name, tensor) -> tensor in our layout.
    """

    spec: Callable[[Config], DecoderSpec]
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    transform: Callable[[str, Tensor], Tensor] | None = None


def architecture(config: Config) -> Architecture:
    """The architecture of a config; ModelError with the list of known ones."""
    name = config.architecture
    if name not in FILES:
        raise ModelError(
            f"architecture {name!r} is not supported.{nearest(name, FILES)} Supported: {', '.join(FILES)}",
            where=config.where,
        )
    found = import_module(f"venturi.llm.models.{FILES[name]}").ARCHITECTURE
    assert isinstance(found, Architecture), f"models/{FILES[name]}.py must define ARCHITECTURE"
    return found
